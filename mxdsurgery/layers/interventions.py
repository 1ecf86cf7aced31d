"""``model.mxd``: changes single experts of a converted model while it runs. Travels with every exported checkpoint.

    with model.mxd.ablate({12: [4031]}).steer({9: {77: 8.0}}):
        model.generate(...)

Layers and experts are numbered as in the model's config. Every method returns a new object with one more change, and changes
nothing yet; the object is a context manager, and while it is open the changes are in force. Contexts nest; changes that
were made first, or in an outer context, are applied first. On leaving, also by an exception, the gates are as they were.
Changes are part of each layer's ``gate``: they work in batches, in ``generate`` with a KV cache and under ``torch.compile``,
which recompiles for them.

Shapes: B batch, T tokens, D model width, N experts; a gate gives (..., K) coefficients of K chosen experts.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real

import torch
from torch import Tensor, nn
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file

from .layer import Coefficients, Gate

# By layer, each expert's largest coefficient: `mxdsurgery experts` writes it beside the model.
MAXIMUM_FILE = "experts/maximum.safetensors"

WHEN = ("always", "firing", "silent")
UNITS = ("coefficient", "maximum")

Positions = Iterable[int] | slice | Tensor


class InterventionError(ValueError):
    """An invalid layer, expert or number; the message says what was found and what is possible."""


@dataclass(eq=False)
class Columns:
    """The positions in the text of the running forward pass's tokens; a hook on the model sets them.

    Attributes:
        batch: B.
        tokens: T.
        start: the first token's position, after the tokens that a KV cache holds; None outside of a forward pass.
    """

    batch: int = 0
    tokens: int = 0
    start: int | None = None

    def enter(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook of the model."""
        given = next(v for v in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if v is not None)
        cache = kwargs.get("past_key_values")
        self.batch, self.tokens = given.shape[:2]
        self.start = 0 if cache is None else int(cache.get_seq_length())

    def leave(self, *_) -> None:
        """A forward hook of the model."""
        self.start = None

    def chosen(self, positions: Positions, like: Tensor) -> Tensor:
        """Which tokens are at the positions: bool, like (..., K) without its last dimension."""
        if self.start is None:
            raise InterventionError(
                "positions are known inside the model's own forward pass only, and not where torch.compile skips its hooks: "
                "open the context before the model is compiled, or leave positions out"
            )
        places = torch.arange(self.start, self.start + self.tokens, device=like.device)
        if isinstance(positions, Tensor) and positions.dtype == torch.bool:
            if len(positions) == 0 or self.batch % len(positions):
                raise InterventionError(f"a mask of {len(positions)} rows for a batch of {self.batch}")
            # generate() runs each row so many times, one after the other: beams, or several sequences.
            positions = positions.repeat_interleave(self.batch // len(positions), dim=0)
            inside = places < positions.shape[1]
            mask = positions.to(like.device)[:, places.clamp_max(positions.shape[1] - 1)] & inside
        elif isinstance(positions, slice):
            step = positions.step or 1
            mask = (places >= (positions.start or 0)) & ((places - (positions.start or 0)) % step == 0)
            mask = mask if positions.stop is None else mask & (places < positions.stop)
        else:
            mask = torch.isin(places, torch.as_tensor(positions, device=like.device))
        return mask.expand(self.batch, self.tokens).reshape(like.shape[:-1])


@dataclass(frozen=True, eq=False)
class Change:
    """One kind of change to some experts of a layer.

    Attributes:
        kind: ``drop``, ``ablate``, ``scale``, ``steer``, ``clamp``, ``copy`` or ``merge``.
        experts: (M,) int64.
        amounts: (M,) float32, the numbers of ``scale``, ``steer`` and ``clamp``; (M,) int64, the source experts of ``copy``;
            int64, the group sizes of ``merge``, whose groups follow each other in ``experts``.
        when: for ``steer`` and ``clamp``: ``always``, or where the gate chose the expert (``firing``) or not (``silent``).
        positions: where in the text; None: everywhere.
        columns: where the tokens of the running pass stand, if ``positions`` needs to know.
    """

    kind: str
    experts: Tensor
    amounts: Tensor | None = None
    when: str = "always"
    positions: Positions | None = None
    columns: Columns | None = None

    def here(self, like: Tensor) -> Tensor | None:
        """The tokens that it changes: bool, like (..., K) without its last dimension; None: all of them."""
        return None if self.positions is None else self.columns.chosen(self.positions, like)

    def on(self, device: torch.device) -> "Change":
        """The same with its tensors on a device."""
        if self.experts.device == device:
            return self
        amounts = None if self.amounts is None else self.amounts.to(device)
        return replace(self, experts=self.experts.to(device), amounts=amounts)

    def find(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """For each of the indices (..., K): its place in ``experts``, and whether it is among them at all; both (..., K)."""
        order = self.experts.sort()
        place = torch.searchsorted(order.values, indices).clamp_max(len(self.experts) - 1)
        return order.indices[place], order.values[place] == indices

    def apply(self, a: Coefficients, chosen: Coefficients) -> Coefficients:
        """The changed coefficients; ``chosen`` are those that the gate gave."""
        here = self.here(a.values)
        if self.kind == "copy":
            which, mine = self.find(a.indices)
            return Coefficients(a.values, torch.where(mine & _every(here), self.amounts[which], a.indices))
        if self.kind == "merge":
            return self._merged(a, here)
        if self.kind in ("ablate", "scale"):
            which, mine = self.find(a.indices)
            factors = 0 if self.kind == "ablate" else self.amounts.to(a.values)[which]
            return Coefficients(a.values * torch.where(mine & _every(here), factors, 1), a.indices)
        fires = ((chosen.indices[..., None] == self.experts) & (chosen.values > 0)[..., None]).any(-2)  # (..., M)
        told = {"always": torch.ones_like(fires), "firing": fires, "silent": ~fires}[self.when]
        told = told if here is None else told & here[..., None]
        values = a.values
        if self.kind == "clamp":
            values = values.masked_fill(((a.indices[..., None] == self.experts) & told[..., None, :]).any(-1), 0)
        added = self.amounts.to(values.dtype) * told
        indices = self.experts.expand_as(added)
        return Coefficients(torch.cat([values, added], -1), torch.cat([a.indices, indices], -1))

    def _merged(self, a: Coefficients, here: Tensor | None) -> Coefficients:
        """Splits each coefficient of a group's expert equally among all experts of the group."""
        values, indices = [a.values], [a.indices]
        for group in self.experts.split(self.amounts.tolist()):
            member = torch.isin(a.indices, group) & _every(here)
            summed = (a.values * member).sum(-1, keepdim=True) / len(group)  # (..., 1)
            values[0] = values[0].masked_fill(member, 0)
            values.append(summed.expand(*summed.shape[:-1], len(group)))
            indices.append(group.expand_as(values[-1]))
        return Coefficients(torch.cat(values, -1), torch.cat(indices, -1))


class GateChanges:
    """What a gate does while changes are in force: ``gate.interventions``. Never altered: a new one takes its place."""

    def __init__(self, changes: Sequence[Change]) -> None:
        self.changes = tuple(changes)

    def __call__(self, gate: Gate, x: Tensor) -> Coefficients:
        """Chooses without the experts that are dropped, and changes the coefficients of the chosen ones."""
        changes = [change.on(x.device) for change in self.changes]  # an offloaded gate is on a device only while it runs
        drops = [change for change in changes if change.kind == "drop"]
        everywhere = [change.experts for change in drops if change.positions is None]
        somewhere = [change for change in drops if change.positions is not None]
        bias = gate.bias.index_fill(0, torch.cat(everywhere), -math.inf) if everywhere else gate.bias
        chosen = gate.choose(x, bias, spare=sum(len(change.experts) for change in somewhere))
        if somewhere:
            values = chosen.values
            for change in somewhere:
                out = torch.isin(chosen.indices, change.experts) & change.here(values)[..., None]
                values = values.masked_fill(out, 0)
            values, best = values.topk(min(gate.active, values.shape[-1]), dim=-1)
            chosen = Coefficients(values, chosen.indices.gather(-1, best))
        a = chosen
        for change in changes:
            a = a if change.kind == "drop" else change.apply(a, chosen)
        return a


def _every(here: Tensor | None) -> Tensor | bool:
    return torch.tensor(True) if here is None else here[..., None]


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
        self._open: list[tuple[list[tuple[Gate, Change]], list[tuple[Tensor, int, Tensor]], list]] = []

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
            weight = self.layers[layer].experts.weight
            if weight.is_meta:
                raise InterventionError(f"layer {layer} is offloaded: its rows of C cannot be exchanged while the model runs")
            for expert, row in zip(self._experts(layer, given), given.values(), strict=True):
                row = torch.as_tensor(row, dtype=torch.float32)
                if row.shape != weight.shape[1:] or not row.isfinite().all():
                    raise InterventionError(
                        f"layer {layer}, expert {expert}: {tuple(row.shape)} numbers to replace c_n with; "
                        f"expected {weight.shape[1]} finite ones"
                    )
                found.append((layer, expert, row.to(weight)))
        return Interventions(self.model, self._changes, (*self._rows, *found))

    def __enter__(self) -> "Interventions":
        record: tuple = ([], [], [])
        self._open.append(record)
        placed, rows, handles = record
        columns = Columns()
        if any(change.positions is not None for _, change in self._changes):
            for module in {self.model, self.model.base_model}:  # either may be called, and the model may bypass its base model
                handles.append(module.register_forward_pre_hook(columns.enter, with_kwargs=True))
                handles.append(module.register_forward_hook(columns.leave, always_call=True))
        for layer, expert, row in self._rows:
            weight = self.layers[layer].experts.weight
            rows.append((weight, expert, weight[expert].detach().clone()))
            with torch.no_grad():
                weight[expert] = row
        for layer, change in self._changes:
            for gate in _gates(self.layers[layer]):
                mine = replace(change, columns=columns)
                mine = mine if gate.weight.is_meta else mine.on(gate.weight.device)
                placed.append((gate, mine))
                gate.interventions = GateChanges((*_changes_of(gate), mine))
        return self

    def __exit__(self, *_) -> None:
        placed, rows, handles = self._open.pop()
        for gate, mine in placed:
            left = [change for change in _changes_of(gate) if change is not mine]
            gate.interventions = GateChanges(left) if left else None
        for weight, expert, row in reversed(rows):
            with torch.no_grad():
                weight[expert] = row
        for handle in handles:
            handle.remove()

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
        n_experts = _gates(self.layers[layer])[0].n_experts
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


def _gates(layer: nn.Module) -> list[Gate]:
    """A layer's gate; if PEFT wrapped the gate to train it, the original and the copies, any of which may run."""
    return [module for module in layer.gate.modules() if isinstance(module, Gate)]


def _changes_of(gate: Gate) -> tuple[Change, ...]:
    return () if gate.interventions is None else gate.interventions.changes
