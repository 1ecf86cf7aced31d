"""The host's memory, where the device that trains has its own: what has to lie in it, and whether that fits."""

from collections.abc import Sequence

from mxdsurgery.base.blocks import distinct
from mxdsurgery.errors import MemoryBudgetError
from mxdsurgery.hardware.device import devices, shares_host_memory
from mxdsurgery.hardware.memory import free_memory
from mxdsurgery.planning.budget import BUDGET_SHARE
from mxdsurgery.recipe import Recipe
from mxdsurgery.terminal.console import size
from mxdsurgery.training.activation_cache import caching_bytes
from mxdsurgery.training.adam import moment_bytes
from mxdsurgery.training.cost import TEXT_BYTES, WEIGHT, BaseShape, LayerPlan, Machine, states_bytes


def host_bytes(layers: Sequence[LayerPlan], base: BaseShape, recipe: Recipe, machine: Machine) -> int:
    """Peak bytes of host memory beside a device that has its own; 0 where the device shares it: its peak has it all.

    The base model's weights while they are loaded; or, while the layers train, the buffer of text, finished layers, hidden
    states, activations on their way to and from the disk, and the part of a checkpoint that is being written: one layer with
    Adam's state, or one buffer of positions.
    """
    if shares_host_memory(machine.device):
        return 0
    blocks = distinct(layer.block for layer in layers)
    kept = caching_bytes(blocks, recipe, base.element_bytes)
    part = (WEIGHT + moment_bytes(recipe)) * max(layer.parameters for layer in layers)
    mixed = recipe.activation_buffer * base.d_model * base.element_bytes
    finished = 0 if base.offloaded else base.element_bytes * sum(layer.all_parameters for layer in layers)
    states = 0 if base.states_on_disk else states_bytes(base, recipe)
    best = WEIGHT * sum(layer.parameters for layer in layers) if recipe.inputs == "joint" else 0  # as of the best step so far
    return max(base.held_bytes, recipe.shuffle * TEXT_BYTES + kept + finished + states + best + max(part, mixed))


def host_refusal(needed: int, base: BaseShape, recipe: Recipe, machine: Machine) -> MemoryBudgetError | None:
    """The error if so many bytes of host memory are not free on the machine that has the device; else None."""
    room = int(BUDGET_SHARE * free_memory("cpu"))
    if needed <= room or machine.device not in devices():
        return None
    over, fixes = needed - room, []
    if recipe.shuffle * TEXT_BYTES > over:
        fixes.append(f"a smaller buffer of text: --shuffle {recipe.shuffle - -(-over // TEXT_BYTES)}")
    if not base.offloaded:
        fixes.append("the base model and finished layers on disk: --inputs converted --offload disk")
    return MemoryBudgetError(
        f"{size(needed)} of host memory are needed beside {machine.device}'s own: {size(over)} more than {BUDGET_SHARE:.0%} "
        "of what is free",
        expected="room for the base model while it is loaded, and for text, finished layers and a part of a checkpoint",
        fix=", or ".join([*fixes, "fewer layers: --layers"]),
    )
