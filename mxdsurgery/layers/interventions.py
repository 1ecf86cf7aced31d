"""``model.mxd``: changes single experts of a converted model while it runs. Travels with every exported checkpoint.

    with model.mxd.ablate({12: [4031]}).steer({9: {77: 8.0}}):
        model.generate(...)

Layers and experts are numbered as in the model's config. Every method returns a new object with one more change, and changes
nothing yet; the object is a context manager, and while it is open the changes are in force. Contexts nest; changes that
were made first, or in an outer context, are applied first. On leaving, also by an exception, the model is as it was.

They are in force in the thread or asyncio task that entered them and in no other, so that requests to one server do not see
each other's. A thread that is started inside a context begins without them; this one has them, for as long as it runs:

    Thread(target=model.mxd.steer({9: {77: 8.0}}).bind(model.generate), kwargs=...).start()

Changes are part of each layer's ``gate`` and ``experts``: they work in batches and in ``generate`` with a KV cache. Under
``torch.compile``, changed gates run between pieces of compiled code.

Shapes: B batch, T tokens, D model width, N experts.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor, nn
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file

from .changes import Change, InterventionError, Positions, RunningPass
from .in_force import Entered, changes_of, entered
from .layer import Experts, Gate

# By layer, each expert's largest coefficient: `mxdsurgery experts` writes it beside the model.
MAXIMUM_FILE = "experts/maximum.safetensors"

WHEN = ("always", "firing", "silent")
UNITS = ("coefficient", "maximum")
_ONLY_BEGIN = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)


class Interventions:
    """Changes to single experts; see the module. ``model.mxd`` is one without any.

    Args:
        model: a converted model, of any family.
        changes: each with its layer, in the order in which they are applied.
        rows: new rows of C: (layer, expert, (D,) tensor).
    """

    def __init__(
        self,
        model: nn.Module,
        changes: Sequence[tuple[int, Change]] = (),
        rows: Sequence[tuple[int, int, Tensor]] = (),
    ) -> None:
        self.model = model
        self.layers: dict[int, nn.Module] = {  # by index, those that have experts
            entry["layer"]: model.base_model.get_submodule(entry["path"])
            for entry in model.config.mxd["layers"]
            if "n_experts" in entry["shape"]
        }
        self._changes = tuple(changes)
        self._rows = tuple(rows)
        self._open: list[Entered] = []  # of all threads

    def ablate(self, experts: Mapping[int, Iterable[int]], *, positions: Positions | None = None) -> "Interventions":
        """Sets coefficients to 0 after the choice: no other experts take their place. The same as zeroing ``c_n``.

        Args:
            experts: by layer.
            positions: places in the text, the first token's being 0: numbers, a slice without negative numbers, or a bool mask
                (B, T) over the prompt; default: all. Padding counts.

        Raises:
            InterventionError: there is no such layer or expert.
        """
        return self._with("ablate", self._listed(experts), positions=positions)

    def drop(self, experts: Mapping[int, Iterable[int]], *, positions: Positions | None = None) -> "Interventions":
        """Takes experts out before the choice: those that rank next take their places. Arguments as `ablate`'s.

        Drops are applied before all other changes.
        """
        return self._with("drop", self._listed(experts), positions=positions)

    def scale(self, factors: Mapping[int, Mapping[int, float]], *, positions: Positions | None = None) -> "Interventions":
        """Multiplies coefficients; ``factors`` by layer and expert, else as `ablate`."""
        return self._with("scale", self._numbers(factors), positions=positions)

    def steer(
        self,
        amounts: Mapping[int, Mapping[int, float]],
        *,
        when: str = "always",
        positions: Positions | None = None,
        unit: str = "coefficient",
    ) -> "Interventions":
        """Adds to coefficients, whether the expert was chosen or not.

        Args:
            amounts: by layer and expert.
            when: ``always``, or only where the gate itself chose the expert (``firing``) or did not (``silent``).
            positions: as for `ablate`.
            unit: of the amounts: ``coefficient``, or ``maximum``, the largest coefficient of the expert that
                `mxdsurgery experts` observed.

        Raises:
            InterventionError: no such layer or expert, a number that is not finite, or no maximum is known.
        """
        return self._with("steer", self._numbers(amounts, unit), when, positions)

    def clamp(
        self,
        values: Mapping[int, Mapping[int, float]],
        *,
        when: str = "always",
        positions: Positions | None = None,
        unit: str = "coefficient",
    ) -> "Interventions":
        """Sets coefficients to a value. Arguments and errors as `steer`'s."""
        return self._with("clamp", self._numbers(values, unit), when, positions)

    def copy(self, sources: Mapping[int, Mapping[int, int]], *, positions: Positions | None = None) -> "Interventions":
        """Where an expert fires, it does what another one does: ``{layer: {expert: source}}``; ``c_expert = c_source``."""
        found = [
            (layer, self._experts(layer, given), torch.tensor(self._experts(layer, given.values())))
            for layer, given in self._by_layer(sources).items()
        ]
        return self._with("copy", found, positions=positions)

    def merge(self, groups: Mapping[int, Iterable[Iterable[int]]]) -> "Interventions":
        """Gives each expert of a group the mean of the group's ``c_n``: it no longer matters which of them fires.

        Args:
            groups: by layer, of two experts or more, none in two groups.
        """
        found = []
        for layer, given in self._by_layer(groups).items():
            lists = [self._experts(layer, group) for group in given]
            together = [expert for group in lists for expert in group]
            if not lists or min(map(len, lists)) < 2 or len(set(together)) < len(together):
                raise InterventionError(
                    f"layer {layer}: merge takes groups of two experts or more, none of them in two groups"
                )
            found.append((layer, together, torch.tensor([len(group) for group in lists])))
        return self._with("merge", found)

    def replace(self, rows: Mapping[int, Mapping[int, Tensor | Sequence[float]]]) -> "Interventions":
        """Puts other vectors (D,) in the place of ``c_n``: by layer and expert."""
        found = []
        for layer, given in self._by_layer(rows).items():
            if not _modules(self.layers[layer].experts, Experts):
                raise InterventionError(f"layer {layer} has no vectors c_n to replace: its experts are matrices")
            weight = self.layers[layer].experts.weight
            for expert, row in zip(self._experts(layer, given), given.values(), strict=True):
                row = torch.as_tensor(row, dtype=torch.float32)
                if row.shape != weight.shape[1:] or not row.isfinite().all():
                    raise InterventionError(
                        f"layer {layer}, expert {expert}: {tuple(row.shape)} numbers to replace c_n with; "
                        f"expected {weight.shape[1]} finite ones"
                    )
                found.append((layer, expert, row))
        return Interventions(self.model, self._changes, (*self._rows, *found))

    def bind(self, function: Callable) -> Callable:
        """The same function, during which the changes are in force in the thread that runs it: for a thread's target.

        Raises:
            InterventionError: it is a coroutine function or a generator function, which only begins when it is called.
        """
        if any(is_one(function) for is_one in _ONLY_BEGIN):
            raise InterventionError(f"{function.__name__} only begins when it is called: enter the context inside of it")

        @functools.wraps(function)
        def bound(*args, **kwargs):
            with self:
                return function(*args, **kwargs)

        return bound

    def in_force(self, layer: int) -> tuple[Change, ...]:
        """The changes of a layer's coefficients that are in force in this thread or task, the first that is applied first."""
        self._by_layer({layer: ()})
        return changes_of(_modules(self.layers[layer].gate, Gate)[0])

    def __enter__(self) -> "Interventions":
        record = Entered(self)
        for layer, expert, row in self._rows:
            for experts in _modules(self.layers[layer].experts, Experts):
                device = torch.device("cpu") if experts.weight.is_meta else experts.weight.device
                record.rows.setdefault(experts, {})[expert] = row.to(device)
        for layer, change in self._changes:
            for gate in _modules(self.layers[layer].gate, Gate):
                mine = change if gate.weight.is_meta else change.on(gate.weight.device)
                record.changes[gate] = (*record.changes.get(gate, ()), mine)
        if any(change.positions is not None for _, change in self._changes):
            for module in {self.model, self.model.base_model}:  # either may be called, and the model may bypass its base model
                record.handles.append(module.register_forward_pre_hook(RunningPass.begins, with_kwargs=True))
                record.handles.append(module.register_forward_hook(RunningPass.ends, always_call=True))
        self._open.append(record)
        record.enter()
        return self

    def __exit__(self, *_) -> None:
        here = [record for record in entered() if record.owner is self]
        record = (here or self._open)[-1]  # it may have been entered in another task, as a test's fixture is
        self._open.remove(record)
        record.leave()

    def maximum(self, layer: int) -> Tensor:
        """Each expert's largest coefficient, (N,), as `mxdsurgery experts` observed it.

        Raises:
            InterventionError: there is no such record beside the model.
        """
        path = cached_file(
            self.model.name_or_path,
            MAXIMUM_FILE,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if path is None:
            raise InterventionError(
                f"{self.model.name_or_path!r} holds no {MAXIMUM_FILE}: run mxdsurgery experts on it, or give coefficients"
            )
        return load_state_dict(path)[f"layer{layer}"]

    def _with(
        self,
        kind: str,
        found: Sequence[tuple[int, list[int], Tensor | None]],
        when: str = "always",
        positions: Positions | None = None,
    ) -> "Interventions":
        if when not in WHEN:
            raise InterventionError(f"when is {when!r}; expected one of {', '.join(WHEN)}")
        if isinstance(positions, slice):
            bad = min(positions.start or 0, positions.stop or 0) < 0 or (positions.step or 1) < 1
        elif isinstance(positions, Tensor) and positions.dtype == torch.bool:
            bad = positions.ndim != 2
        elif positions is not None:
            positions = [int(position) for position in positions]
            bad = min(positions, default=0) < 0
        else:
            bad = False
        if bad:
            raise InterventionError("positions count from the first token: numbers or a slice from 0 on, or a mask (B, T)")
        changes = [
            (layer, Change(kind, torch.tensor(experts), amounts, when, positions))
            for layer, experts, amounts in found
            if experts
        ]
        return Interventions(self.model, (*self._changes, *changes), self._rows)

    def _by_layer(self, given: Mapping[int, Iterable]) -> Mapping[int, Iterable]:
        if not isinstance(given, Mapping):
            raise InterventionError(f"{type(given).__name__} given; expected a mapping by layer, for example {{12: ...}}")
        for layer in given:
            if layer not in self.layers:
                there = ", ".join(map(str, self.layers)) or "none"
                raise InterventionError(f"layer {layer!r} has no experts; layers that have: {there}")
        return given

    def _experts(self, layer: int, given: Iterable[int]) -> list[int]:
        n_experts = _modules(self.layers[layer].gate, Gate)[0].n_experts
        experts = list(given)
        for expert in experts:
            if isinstance(expert, bool) or not isinstance(expert, Integral) or not 0 <= expert < n_experts:
                raise InterventionError(f"layer {layer} has no expert {expert!r}; expected 0 to {n_experts - 1}")
        return [int(expert) for expert in experts]

    def _listed(self, given: Mapping[int, Iterable[int]]) -> list[tuple[int, list[int], None]]:
        return [(layer, self._experts(layer, experts), None) for layer, experts in self._by_layer(given).items()]

    def _numbers(
        self, given: Mapping[int, Mapping[int, float]], unit: str = "coefficient"
    ) -> list[tuple[int, list[int], Tensor]]:
        if unit not in UNITS:
            raise InterventionError(f"unit is {unit!r}; expected one of {', '.join(UNITS)}")
        found = []
        for layer, numbers in self._by_layer(given).items():
            experts = self._experts(layer, numbers)
            for expert, number in numbers.items():
                if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number):
                    raise InterventionError(f"layer {layer}, expert {expert}: {number!r} is not a finite number")
            amounts = torch.tensor(list(numbers.values()), dtype=torch.float32)
            if unit == "maximum":
                maximum = self.maximum(layer)[experts]
                if not maximum.all():
                    never = [expert for expert, most in zip(experts, maximum.tolist(), strict=True) if most == 0]
                    raise InterventionError(f"layer {layer}: experts {never} never fired: no maximum to measure in")
                amounts = amounts * maximum
            found.append((layer, experts, amounts))
        return found


def _modules(module: nn.Module, kind: type[nn.Module]) -> list:
    """A layer's gate or experts; if PEFT wrapped it to train it, the original and the copies, any of which may run."""
    return [inner for inner in module.modules() if isinstance(inner, kind)]
