"""What a conversion runs on: the device, how much memory it may take there, and what is computed in."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig

from mxdsurgery.accelerator import computes_in_bf16, selects_in_bf16
from mxdsurgery.blocks import Block
from mxdsurgery.budget import BUDGET_SHARE
from mxdsurgery.compute import Choice, Shape, model_dtype
from mxdsurgery.cost import GIB, LayerPlan, Machine
from mxdsurgery.memory import free_memory
from mxdsurgery.recipe import Recipe


def this_machine(recipe: Recipe, layers: Sequence[LayerPlan], config: PreTrainedConfig, dtype: str) -> Machine:
    """The recipe's device, also where it is not here, what is computed in there, and the memory budget."""
    device = "cuda" if recipe.device == "cuda" or (recipe.device == "auto" and torch.cuda.is_available()) else "cpu"
    if recipe.memory is not None:
        memory, source = int(recipe.memory * GIB), "recipe key 'memory'"
    elif device == "cpu" or torch.cuda.is_available():
        memory, source = int(BUDGET_SHARE * free_memory(device)), f"{BUDGET_SHARE:.0%} of what is free on {device}"
    else:
        memory, source = None, "there is no GPU here: name one with --memory"
    block = max((layer.block for layer in layers), key=lambda block: block.d_hidden)
    n_experts = max(layer.n_experts for layer in layers)
    if device != "cpu" and not torch.cuda.is_available():
        chosen, bf16 = Choice(dtype, "as stored; not measured: there is no GPU here"), recipe.precision != "fp32"
        return Machine(device, bf16, recipe.selection != "fp32", memory, source, None, chosen.dtype, chosen.why)
    chosen = model_dtype(dtype, recipe.compute, device, model_shape(config, block, recipe.batch, recipe.context))
    return Machine(
        device=device,
        bf16=computes_in_bf16(recipe, block.d_model, block.d_hidden),
        selection=selects_in_bf16(recipe, block.d_model, n_experts),
        memory=memory,
        memory_source=source,
        threads=torch.get_num_threads(),
        compute=chosen.dtype,
        compute_why=chosen.why,
    )


def model_shape(config: PreTrainedConfig, block: Block, tokens: int, context: int) -> Shape:
    """What a model computes at a time, in forward passes of so many tokens."""
    heads = getattr(config.get_text_config(decoder=True), "num_attention_heads", None)
    return Shape(tokens, context, block.d_model, block.d_hidden, heads if isinstance(heads, int) else 1)
