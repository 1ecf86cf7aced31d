"""How a layer starts: the four values of the recipe key ``init``, and the statistics of the text that they rest on."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxdsurgery.base.activations import Activations, record_activations
from mxdsurgery.base.blocks import Block, Part
from mxdsurgery.base.model import check_fits
from mxdsurgery.base.offload import resident
from mxdsurgery.errors import MxDWarning
from mxdsurgery.hardware.device import widest
from mxdsurgery.hardware.randomness import OwnNumbers
from mxdsurgery.layers.baselines import Transcoder
from mxdsurgery.layers.layer import DenseLayer, MxDLayer
from mxdsurgery.layers.replacement import LAYER_KINDS
from mxdsurgery.recipe import Recipe
from mxdsurgery.runs.parallel import agree, text_shares
from mxdsurgery.training.cost import LayerPlan
from mxdsurgery.training.losses import common_size

# `pretrained`: how much a token's gate pre-activations spread around 1 at the start.
_PRETRAINED_SPREAD = 1e-3


# `shared`: on how many tokens the dense path is made a constant, and the ridge, as a share of the hidden units' mean square.
_SAMPLE = 1024
_RIDGE = 1e-4


class Statistics(NamedTuple):
    """What a sample of text shows of a block, in fp32."""

    mean_x: Tensor  # (D,) of the block's input
    mean_y: Tensor  # (D,) of the block's output
    x: Tensor  # (n, D), inputs of the first `_SAMPLE` tokens
    y: Tensor  # (n, D), their outputs


def measure_statistics(model: PreTrainedModel, blocks: Sequence[Block], batches: Sequence[Tensor]) -> dict[int, Statistics]:
    """The statistics of each block over some batches of input ids (B, T), position 0 left out.

    Raises:
        DataError, RecipeError: the model cannot read the batches; see `mxdsurgery.base.model.check_fits`.
    """
    for batch in batches:
        check_fits(model, batch)
    return statistics_of(record_activations(model, blocks, batch) for batch in batches)


def statistics_of(recorded: Iterable[Mapping[int, Activations]]) -> dict[int, Statistics]:
    """The statistics of blocks over some batches of their activations (B, T, D), by layer, position 0 left out."""
    sums: dict[int, tuple[Tensor | float, Tensor | float]] = {}
    samples: dict[int, tuple[Tensor, Tensor]] = {}
    count = 0
    for activations in recorded:
        for layer, found in activations.items():
            x, y = (part[:, 1:].flatten(0, 1).float() for part in found)
            mean_x, mean_y = sums.get(layer, (0.0, 0.0))
            sums[layer] = mean_x + x.sum(0), mean_y + y.sum(0)
            samples.setdefault(layer, (x[:_SAMPLE].clone(), y[:_SAMPLE].clone()))
        count += len(x)
    return {layer: Statistics(x / count, y / count, *samples[layer]) for layer, (x, y) in sums.items()}


def layer_shape(layer: LayerPlan) -> dict[str, object]:
    """The arguments of the layer's class in `LAYER_KINDS`; they go into the exported config."""
    block = layer.block
    dense = {
        "d_hidden": block.d_hidden,
        "kind": block.kind,
        "activation": block.activation,
        "encoder_bias": block.encoder_bias,
    }
    experts = {"n_experts": layer.n_experts, "k": layer.k}
    if layer.sparsity != "topk":
        experts["sparsity"] = layer.sparsity
    if layer.shared:
        experts["expert_bias"] = True
    own = {"mxd": experts | dense, "topk-sae": experts | dense, "dense": dense}.get(layer.kind, experts)
    return {"d_model": block.d_model} | own


def initial_layers(
    model: PreTrainedModel, layers: Sequence[LayerPlan], statistics: Mapping[int, Statistics], recipe: Recipe
) -> dict[LayerPlan, nn.Module]:
    """New layers, started as the recipe says from the model and the statistics of its blocks, by layer."""
    return {layer: initial_layer(model, layer, recipe, statistics[layer.block.layer]) for layer in layers}


@torch.no_grad()
def initial_layer(model: PreTrainedModel, plan: LayerPlan, recipe: Recipe, statistics: Statistics) -> nn.Module:
    """A new layer for a block, fp32, on the model's device, ready to train.

    Args:
        model: the model that holds the block.
        plan: the block, and what replaces it.
        recipe: ``init`` says how E, D and the experts of kind ``mxd`` start, and E and D of kind ``dense``; other kinds have
            one start. ``shared``: the block itself, as a shared expert that is always there, beside experts that do nothing
            yet; the dense path is near a constant, too, so that experts can add what they like as those of a transcoder
            do. ``random``: the paper's (encoder and gate as default linear layers, C random unit rows, D zero);
            ``encoder``: the same with E and its biases from the block; ``pretrained``: D from the block too and Cᵀa near 1,
            faithful at once, but then the dense path does all the work. ``seed`` is for the random parts; the layer's index is
            mixed in, so that a layer's start does not depend on its neighbours. Transcoders start with C zero, or with
            random unit rows where ``unit_norm`` keeps them at that length.
        statistics: the block's, for the gate bias: ``b_g = -G mean(x)``, so that the average token favours no expert; and for
            what a start rests on.
    """
    root, block = model.base_model, plan.block
    with OwnNumbers(recipe.seed * 10_007 + block.layer):
        layer = LAYER_KINDS[plan.kind](**layer_shape(plan)).to(statistics.mean_x.device)
        if recipe.unit_norm and isinstance(layer, Transcoder):
            layer.experts.reset_parameters()
    layer.bias.copy_(statistics.mean_y)
    if plan.kind == "topk-sae":
        _copy_encoder(layer.block, block, root)
        _copy_decoder(layer.block, block, root)
        # Each feature writes in the direction that it reads, as autoencoders of this kind start.
        layer.experts.weight.copy_(layer.gate.weight)
        layer.experts.normalize()
    elif plan.kind in ("mxd", "dense") and recipe.start != "random":
        _copy_encoder(layer, block, root)
        if recipe.start == "pretrained" or plan.shared:
            _copy_decoder(layer, block, root)
    if plan.kind != "dense":
        layer.gate.bias.sub_(layer.gate.weight @ (statistics.mean_y if plan.kind == "topk-sae" else statistics.mean_x))
    near_one = plan.kind == "mxd" and recipe.start == "pretrained"
    if (plan.shared or near_one) and recipe.share_target is None:
        warnings.warn(
            f"init: {recipe.start} is faithful from the start because the dense path does all the work: expert_share will be "
            "near 0 and the experts mean little. Ask for an expert_share, or use init: encoder, to study experts.",
            MxDWarning,
            stacklevel=3,
        )
    if near_one:
        _start_near_one(layer, statistics)
    if plan.shared:
        _start_as_shared(layer, statistics, text_shares(recipe))
    return layer


def _start_as_shared(layer: MxDLayer, statistics: Statistics, shares: int) -> None:
    """With the block's D: adds to ``D z`` what is nearly the same for every token, as large as the block's outputs are.

    The hidden units' nearest linear map to 1, ``w = Zᵀ (Z Zᵀ + λ)⁻¹ 1``, is added to each row of D, times the
    `common_size` of the outputs; b makes up for it. ``c_0`` is 1, C is 0. The processes that share a text take the mean of
    what they find.
    """
    z = layer.hidden(statistics.x)
    wide = z.to(widest(z.device))
    products = wide @ wide.T
    products.diagonal().add_(_RIDGE * len(z) * wide.square().mean().clamp_min(1e-30))
    constant = (wide.T @ torch.linalg.solve(products, torch.ones_like(products[:, 0]))).float()
    layer.decoder.weight.add_(common_size(statistics.y) * constant)
    layer.bias.copy_((statistics.y - layer.decoder(z)).mean(0))
    layer.experts.weight.zero_()
    layer.experts.bias.fill_(1.0)
    for value in (layer.decoder.weight, layer.bias):
        agree(value, shares, mean=True)


def _start_near_one(layer: MxDLayer, statistics: Statistics) -> None:
    """All pre-activations near 1, C constant: Cᵀa = 1 up to the spread, whichever experts are chosen."""
    factor = _PRETRAINED_SPREAD / statistics.mean_x.square().mean().sqrt().clamp_min(1.0)
    layer.gate.weight.mul_(factor)
    layer.gate.bias.mul_(factor).add_(1.0)
    layer.experts.weight.fill_(1.0 / layer.gate.k)


def _copy_encoder(layer: DenseLayer, block: Block, root: nn.Module) -> None:
    _copy_part(layer.encoder, block.encoder, root)
    if block.encoder_up is not None:
        _copy_part(layer.encoder_up, block.encoder_up, root)
    if block.activation_path is not None:
        with resident(root.get_submodule(block.activation_path)):
            layer.activation.load_state_dict(root.get_submodule(block.activation_path).state_dict())


def _copy_decoder(layer: DenseLayer, block: Block, root: nn.Module) -> None:
    with resident(root.get_submodule(block.decoder.path)):
        layer.decoder.weight.copy_(block.decoder.weight(root))
        layer.bias.copy_(block.decoder.bias(root) if block.decoder_bias else torch.zeros_like(layer.bias))


def _copy_part(linear: nn.Linear, part: Part, root: nn.Module) -> None:
    with resident(root.get_submodule(part.path)):
        linear.weight.copy_(part.weight(root))
        if linear.bias is not None:
            linear.bias.copy_(part.bias(root))
