"""What a conversion runs on: the device, how much memory it may take there, and the dtypes to compute in."""

import dataclasses
from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig

from mxdsurgery.hardware.compute import Choice, Shape, model_dtype
from mxdsurgery.hardware.device import devices, meant
from mxdsurgery.hardware.gpus import GIB
from mxdsurgery.hardware.memory import free_memory
from mxdsurgery.planning.budget import BUDGET_SHARE
from mxdsurgery.recipe import Recipe
from mxdsurgery.training.accelerator import computes_in_bf16, selects_in_bf16
from mxdsurgery.training.cost import LayerPlan, Machine, largest_layer


def this_machine(recipe: Recipe, layers: Sequence[LayerPlan], config: PreTrainedConfig, dtype: str) -> Machine:
    """The recipe's device, even if this machine lacks it; the dtypes to compute in there, and the memory budget."""
    device = meant(recipe.device)
    here = device in devices()
    free = free_memory(device) if here else None
    if recipe.memory is not None:
        memory, source = int(recipe.memory * GIB), "recipe key 'memory'"
    elif free is not None:
        memory, source = int(BUDGET_SHARE * free), f"{BUDGET_SHARE:.0%} of what is free on {device}"
    else:
        why = f"{device} does not say what is free" if here else f"there is no {device} here"
        memory, source = None, f"{why}: name one with --memory"
    if not here:
        chosen, bf16 = Choice(dtype, f"as stored; not measured: there is no {device} here"), recipe.precision != "fp32"
        return Machine(device, bf16, recipe.selection != "fp32", memory, source, None, chosen.dtype, chosen.why)
    shape = model_shape(config, layers, recipe.batch, recipe.context)
    chosen = model_dtype(dtype, recipe.compute, device, shape)
    settled = settled_recipe(recipe, layers, chosen.dtype)
    return Machine(
        device=device,
        bf16=settled.precision == "bf16",
        selection=settled.selection == "bf16",
        memory=memory,
        memory_source=source,
        threads=torch.get_num_threads(),
        compute=chosen.dtype,
        compute_why=chosen.why,
    )


def model_shape(config: PreTrainedConfig, layers: Sequence[LayerPlan], tokens: int, context: int) -> Shape:
    """The shape of a converted model's forward passes of so many tokens, with contexts of so many."""
    block = largest_layer(layers).block
    heads = getattr(config.get_text_config(decoder=True), "num_attention_heads", None)
    return Shape(tokens, context, block.d_model, block.d_hidden, heads if isinstance(heads, int) else 1)


def settled_recipe(recipe: Recipe, layers: Sequence[LayerPlan], compute: str) -> Recipe:
    """The recipe with the dtypes to compute in on its device, in place of each ``auto``.

    Args:
        recipe: the recipe as it was asked for.
        layers: the new layers.
        compute: the dtype that models compute in.
    """
    largest = largest_layer(layers)
    precision = "bf16" if computes_in_bf16(recipe, largest.block.d_model, largest.block.d_hidden) else "fp32"
    selection = "bf16" if selects_in_bf16(recipe, largest.block.d_model, largest.n_experts) else "fp32"
    return dataclasses.replace(recipe, compute=compute, precision=precision, selection=selection)
