"""Which changes are in force, by thread and task. Travels with every exported checkpoint.

The threads and tasks of a process share a model's modules. So what one of them enters is kept in a context variable, and a
module that anybody has changed looks there at every call: it sees what the running thread or task itself entered and no more.
A thread starts with nothing; a task of asyncio, and `asyncio.to_thread`, with what was in force where it was made, as always
with context variables. Leaving a context ends its changes wherever they were taken. Modules that nobody changes look nowhere.
"""

import threading
import warnings
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .changes import Change, InterventionError, change_coefficients, mix_with_rows
from .layer import Coefficients, Experts, Gate

_ELSEWHERE = (
    "the model runs here without the interventions that are in force in another thread or task: they hold where they were "
    "entered only. If they are meant here, give the thread changes.bind(model.generate) as its target, where changes is "
    "what you would enter, or run it by contextvars.copy_context().run. If not, `with model.mxd:` around the call says so"
)
_IN_BACKWARD = (
    "a forward pass is computed again in a thread of the backward pass, which knows no interventions: call "
    "model.gradient_checkpointing_disable() before the forward pass"
)
_REPLICATED = (
    "nn.DataParallel runs copies of the model in threads of its own, which know no interventions: run the model itself, or a "
    "process for each device"
)


@dataclass(eq=False)
class Entered:
    """One entering of an `Interventions`.

    Attributes:
        owner: the `Interventions`.
        changes: by gate, to its coefficients, in the order in which they are applied.
        rows: by experts module, rows of C: by expert, (D,).
        handles: hooks that are removed at the end.
        open: whether it has not yet been left.
    """

    owner: object
    changes: dict[Gate, tuple[Change, ...]] = field(default_factory=dict)
    rows: dict[Experts, dict[int, Tensor]] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)
    open: bool = True

    def enter(self) -> None:
        """Puts it in force in this thread or task, after what is in force there already."""
        with _Shared.lock:
            for module in (*self.changes, *self.rows):
                _Shared.holders[module] = _Shared.holders.get(module, 0) + 1
                module.interventions = _changed if isinstance(module, Gate) else _mixed
        _Shared.entered.set((*entered(), self))

    def leave(self) -> None:
        """Ends it, in whichever threads and tasks it is in force. Modules that nobody changes any more are as they were."""
        self.open = False
        with _Shared.lock:
            for module in (*self.changes, *self.rows):
                _Shared.holders[module] -= 1
                if not _Shared.holders[module]:
                    del _Shared.holders[module]
                    module.interventions = None
        for handle in self.handles:
            handle.remove()
        self.changes, self.rows, self.handles = {}, {}, []  # a copied context may keep this object for long
        _Shared.entered.set(entered())


class _Shared:
    """By thread or task, what was entered, the first first; over all of them, how many open ones change a module."""

    entered: ContextVar[tuple[Entered, ...]] = ContextVar("mxd_interventions", default=())
    holders: dict[nn.Module, int] = {}
    lock = threading.Lock()


def entered() -> tuple[Entered, ...]:
    """What this thread or task has entered and not left, the first first."""
    return tuple(one for one in _Shared.entered.get() if one.open)


def changes_of(gate: Gate) -> tuple[Change, ...]:
    """The changes of a gate's coefficients that are in force in this thread or task, the first that is applied first."""
    return tuple(change for one in entered() for change in one.changes.get(gate, ()))


def _changed(gate: Gate, x: Tensor) -> Coefficients:
    """What a gate that somebody has changed does: ``gate.interventions``."""
    return _looked_up(gate, x)


def _mixed(experts: Experts, a: Coefficients) -> Tensor:
    """What an experts module some of whose rows somebody has replaced does: ``experts.interventions``."""
    return _looked_up(experts, a)


# torch.compile would keep what it finds in a context variable for all threads. This is not itself a module's
# ``interventions``: for a function that is not compiled there is no guard.
@torch.compiler.disable(reason="which interventions are in force is looked up by thread, outside of compiled code")
def _looked_up(module: Gate | Experts, given: Tensor | Coefficients) -> Coefficients | Tensor:
    _check(module)
    if isinstance(module, Gate):
        changes = changes_of(module)
        return change_coefficients(module, given, changes) if changes else module.choose(given, module.bias)
    rows = {expert: row for one in entered() for expert, row in one.rows.get(module, {}).items()}
    return mix_with_rows(module, given, rows) if rows else module.mix(given)


def _check(module: nn.Module) -> None:
    """Refuses or warns where it may be meant that changes are in force, and none are."""
    if entered():
        return
    if getattr(module, "_is_replica", False):
        raise InterventionError(_REPLICATED)
    if module not in _Shared.holders:  # a copy of a model that was changed when it was made
        module.interventions = None
    elif torch._C._current_graph_task_id() != -1:
        raise InterventionError(_IN_BACKWARD)
    else:
        warnings.warn(_ELSEWHERE, stacklevel=2)
