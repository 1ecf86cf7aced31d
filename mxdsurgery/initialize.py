"""How a layer starts: the three values of the recipe key ``init``, and the statistics of the text that they rest on."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mxdsurgery.activations import record_activations
from mxdsurgery.blocks import Block, Part
from mxdsurgery.cost import LayerPlan
from mxdsurgery.errors import MxDWarning
from mxdsurgery.layer import MxDLayer

# `pretrained`: how much a token's gate pre-activations spread around 1, where they all stand at first.
_PRETRAINED_SPREAD = 1e-3


class Statistics(NamedTuple):
    """Means over the tokens of a sample of text, in fp32."""

    mean_x: Tensor  # (D,) of the block's input
    mean_y: Tensor  # (D,) of the block's output


def measure_statistics(model: PreTrainedModel, blocks: Sequence[Block], batches: Sequence[Tensor]) -> dict[int, Statistics]:
    """The statistics of each block over some batches of input ids (B, T), position 0 left out."""
    sums: dict[int, list[Tensor]] = {block.layer: [0.0, 0.0] for block in blocks}
    count = 0
    for batch in batches:
        count += batch[:, 1:].numel()
        for layer, (x, y) in record_activations(model, blocks, batch).items():
            sums[layer][0] += x[:, 1:].float().sum((0, 1))
            sums[layer][1] += y[:, 1:].float().sum((0, 1))
    return {layer: Statistics(x / count, y / count) for layer, (x, y) in sums.items()}


def layer_shape(block: Block, n_experts: int, k: int) -> dict[str, object]:
    """The arguments of the `MxDLayer` that replaces a block; they go into the exported config."""
    return {
        "d_model": block.d_model,
        "d_hidden": block.d_hidden,
        "n_experts": n_experts,
        "k": k,
        "kind": block.kind,
        "activation": block.activation,
        "encoder_bias": block.encoder_bias,
    }


def initial_layers(
    model: PreTrainedModel, layers: Sequence[LayerPlan], sample: Sequence[Tensor], *, init: str, seed: int
) -> dict[int, MxDLayer]:
    """New layers by index, started from the model and the statistics of some batches of input ids (B, T)."""
    statistics = measure_statistics(model, [layer.block for layer in layers], sample)
    return {
        layer.block.layer: initial_layer(
            model,
            layer.block,
            n_experts=layer.n_experts,
            k=layer.k,
            init=init,
            statistics=statistics[layer.block.layer],
            seed=seed,
        )
        for layer in layers
    }


@torch.no_grad()
def initial_layer(
    model: PreTrainedModel, block: Block, *, n_experts: int, k: int, init: str, statistics: Statistics, seed: int
) -> MxDLayer:
    """A new layer for a block, fp32, on the model's device, ready to train.

    Args:
        model: the model that holds the block.
        block: what it replaces.
        n_experts: N.
        k: K.
        init: ``random``, the paper's start (encoder and gate as default linear layers, C random unit rows, D zero);
            ``encoder``, the same with E and its biases from the block; ``pretrained``, D from the block too and Cᵀa near 1,
            faithful at once, but then the experts are decoration.
        statistics: the block's, for the gate bias: ``b_g = -G mean(x)``, so that the average token favours no expert.
        seed: of the random parts; the layer's index is mixed in, so a layer's start does not depend on its neighbours.
    """
    root = model.base_model
    device = statistics.mean_x.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * 10_007 + block.layer)
        layer = MxDLayer(**layer_shape(block, n_experts, k)).to(device)
    if init in ("encoder", "pretrained"):
        _copy_part(layer.encoder, block.encoder, root)
        if block.encoder_up is not None:
            _copy_part(layer.encoder_up, block.encoder_up, root)
    if init == "pretrained":
        warnings.warn(
            "init: pretrained is faithful from the start because the dense path does all the work: expert_share will be "
            "near 0 and the experts mean little. Use init: encoder to study experts.",
            MxDWarning,
            stacklevel=2,
        )
        layer.decoder.weight.copy_(block.decoder.weight(root))
        if block.decoder_bias:
            layer.bias.copy_(block.decoder.bias(root))
        # All pre-activations near 1, C constant: Cᵀa = 1 up to the spread, whichever experts are chosen.
        layer.gate.weight.mul_(_PRETRAINED_SPREAD / statistics.mean_x.square().mean().sqrt().clamp_min(1.0))
        layer.experts.weight.fill_(1.0 / k)
    else:
        layer.bias.copy_(statistics.mean_y)
    layer.gate.bias.sub_(layer.gate.weight @ statistics.mean_x)
    if init == "pretrained":
        layer.gate.bias.add_(1.0)
    return layer


def _copy_part(linear: torch.nn.Linear, part: Part, root: torch.nn.Module) -> None:
    linear.weight.copy_(part.weight(root))
    if linear.bias is not None:
        linear.bias.copy_(part.bias(root))
