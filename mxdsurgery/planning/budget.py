"""Whether a conversion fits the memory budget; if not, which part is too large and which changes would make it fit."""

import dataclasses
import itertools
from collections.abc import Sequence

from mxdsurgery.base.selection import write_layers
from mxdsurgery.errors import MemoryBudgetError
from mxdsurgery.hardware.device import shares_host_memory
from mxdsurgery.hardware.gpus import GIB
from mxdsurgery.hardware.memory import free_memory
from mxdsurgery.recipe import Recipe
from mxdsurgery.terminal.console import size
from mxdsurgery.training.cost import (
    TEXT_BYTES,
    BaseShape,
    Group,
    LayerPlan,
    Machine,
    evaluation_bytes,
    make_group,
    make_groups,
    states_bytes,
)
from mxdsurgery.training.parameters import layer_parameters

# Share of a device's free memory; the rest is for fragmentation, kernels' workspaces and other processes.
BUDGET_SHARE = 0.9


def stored(layers: Sequence[LayerPlan], base: BaseShape, recipe: Recipe, machine: Machine) -> BaseShape:
    """The base shape with where weights and hidden states are kept: in memory if they fit the budget there, else on disk."""
    if recipe.inputs != "converted":
        return base
    offloaded = {"auto": (False, True), "none": (False,), "disk": (True,)}[recipe.offload]
    # If the device has its own memory, the host keeps the states, and the host's memory bounds them.
    host = None if shares_host_memory(machine.device) else free_memory("cpu") * BUDGET_SHARE
    on_disk = (False, True) if host is None or states_bytes(base, recipe) < host else (True,)
    choices = [
        dataclasses.replace(base, offloaded=first, states_on_disk=second)
        for first, second in itertools.product(offloaded, on_disk)
    ]
    fitting = (c for c in choices if machine.memory is None or needed_bytes(layers, c, recipe, machine) <= machine.memory)
    return next(fitting, choices[-1])


def needed_bytes(layers: Sequence[LayerPlan], base: BaseShape, recipe: Recipe, machine: Machine) -> int:
    """The smallest sufficient budget, for evaluation and for training with each layer in a group of its own if it may be."""
    if recipe.inputs == "joint":
        alone = [group.peak_bytes for group in make_groups(layers, base, recipe, machine)]
    else:
        alone = [make_group([layer], layers[:index], base, recipe, machine).peak_bytes for index, layer in enumerate(layers)]
    return max(*alone, evaluation_bytes(layers, base, recipe, machine))


def refusal(
    layers: Sequence[LayerPlan], groups: Sequence[Group], base: BaseShape, recipe: Recipe, machine: Machine
) -> MemoryBudgetError | None:
    """The error if not even one layer at a time fits the budget, or evaluation does not fit; None if all fits."""
    if machine.memory is None:
        return None
    worst = max(groups, key=lambda group: group.peak_bytes)
    evaluation = evaluation_bytes(layers, base, recipe, machine)
    if max(worst.peak_bytes, evaluation) <= machine.memory:
        return None
    evaluating = "evaluating and exporting the converted model"
    if worst.peak_bytes > machine.memory:
        together = len(worst.layers) > 1
        what = (
            f"training layers {write_layers(worst.layers)} jointly" if together else f"training layer {worst.layers[0]} alone"
        )
        needed = worst.peak_bytes
        expected = f"room for the base model and {'all layers' if together else 'one layer'} in training"
        also = f"; {evaluating} takes {size(evaluation)}" if evaluation > machine.memory else ""
    else:
        what, needed, also = evaluating, evaluation, ""
        expected = "room for the base model, all new layers and the reloaded checkpoint, in the base model's dtype"
    return MemoryBudgetError(
        f"{what} takes {size(needed)}: {size(needed - machine.memory)} more than the memory budget of "
        f"{size(machine.memory)} ({machine.memory_source}){also}",
        expected=expected,
        fix=", or ".join(_remedies(layers, base, recipe, machine)),
    )


def _remedies(layers: Sequence[LayerPlan], base: BaseShape, recipe: Recipe, machine: Machine) -> list[str]:
    """Changes that each make the conversion fit, as flags with values that suffice."""
    found = []
    n_experts = largest_n_experts(layers, base, recipe, machine)
    if n_experts is not None:
        found.append(f"fewer experts: --n-experts {_rounded_down(n_experts, recipe.k)}")
    smaller = [dataclasses.replace(recipe, batch=batch) for batch in _halves(recipe.batch, recipe.context)]
    fitting = [changed for changed in smaller if _fits(layers, base, changed, machine)]
    if fitting:
        found.append(f"a smaller batch: --batch {fitting[0].batch}")
    in_order = dataclasses.replace(recipe, shuffle=0)
    if shares_host_memory(machine.device) and _fits(layers, base, in_order, machine):
        room = machine.memory - needed_bytes(layers, base, in_order, machine)
        found.append(f"a smaller buffer of text: --shuffle {_rounded_down(min(room // TEXT_BYTES, recipe.shuffle), 0)}")
    if recipe.inputs == "joint" or (recipe.inputs == "original" and not found):
        by_block = dataclasses.replace(recipe, inputs="converted")
        if _fits(layers, dataclasses.replace(base, offloaded=True, states_on_disk=True), by_block, machine):
            found.append("one layer after the other, with one block of the base model in memory: --inputs converted")
    half = dataclasses.replace(base, dtype="bfloat16")
    if base.element_bytes == 4 and _fits(layers, half, recipe, machine):
        found.append("the base model in half the bytes: --dtype bfloat16 --compute bfloat16")
    several = len({layer.block.layer for layer in layers}) == len(layers)  # not kinds for the same block
    fewer = [count for count in range(1, len(layers)) if several and _fits(layers[:count], base, recipe, machine)]
    if fewer:
        chosen = write_layers([layer.block.layer for layer in layers[: fewer[-1]]])
        found.append(f"fewer layers: --layers {chosen}")
    both = ((changed.batch, largest_n_experts(layers, base, changed, machine)) for changed in smaller if not found)
    batch, n_experts = next((pair for pair in both if pair[1] is not None), (0, None))
    if n_experts is not None:
        found.append(f"together: --batch {batch} --n-experts {_rounded_down(n_experts, recipe.k)}")
    more = -(-needed_bytes(layers, base, recipe, machine) * 100 // GIB) / 100
    return [*found, f"--memory {more:g} (GiB) where there is as much"]


def _halves(number: int, least: int) -> list[int]:
    """Half of ``number``, a quarter and so on, down to ``least``."""
    halves = []
    while number // 2 >= least:
        number //= 2
        halves.append(number)
    return halves


def _fits(layers: Sequence[LayerPlan], base: BaseShape, recipe: Recipe, machine: Machine) -> bool:
    return needed_bytes(layers, base, recipe, machine) <= machine.memory


def largest_n_experts(layers: Sequence[LayerPlan], base: BaseShape, recipe: Recipe, machine: Machine) -> int | None:
    """The largest N, the same for all layers, that fits the budget; None where not even K experts do."""

    def fits(n: int) -> bool:
        changed = [
            dataclasses.replace(layer, n_experts=n, parameters=layer_parameters(layer.block, n, layer.kind, layer.shared))
            for layer in layers
        ]
        return _fits(changed, base, recipe, machine)

    low, high = recipe.k, max(layer.n_experts for layer in layers)
    if not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _rounded_down(number: int, least: int) -> int:
    """Rounds down to two digits, so that the value still fits when a little less memory is free the next time."""
    unit = 10 ** max(0, len(str(number)) - 2)
    return max(least, number // unit * unit)
