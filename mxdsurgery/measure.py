"""What replacing blocks costs, against the original model: every figure of an evaluation.

For each converted layer alone and for all together, the model runs with the new layers and with four things to compare them
with: the original blocks, nothing (zero-ablation), their mean output (mean-ablation), and the new layers with the experts'
say frozen at its best constant. All of them share one model, whose blocks are put in and taken out.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxdsurgery.activations import hooked, record_activations, recording
from mxdsurgery.blocks import Block
from mxdsurgery.device import widest
from mxdsurgery.errors import DataError
from mxdsurgery.metrics import Sums, Table, error_sums, frequency_decades, next_token_sums, scored_predictions, with_interval
from mxdsurgery.model import check_fits, decoder_layers
from mxdsurgery.offload import execution_device
from mxdsurgery.surgery import ConstantOutput, FrozenExperts, modules_replaced, replaced, resumed_at


@dataclass
class _Usage:
    """How one layer uses its experts on original inputs, position 0 left out."""

    best_constant: Tensor  # (D,), for what they say
    fired: Tensor  # (N,), tokens on which each expert fired
    tokens: int


def measure(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    layers: dict[int, nn.Module],
    input_ids: Tensor,
    batch: int,
    report: Callable[[int, int], None] = lambda _done, _total: None,
    maps: Mapping[str, nn.Module] | None = None,
) -> dict[str, Any]:
    """All figures, as one JSON object (the README lists its entries).

    Args:
        model: the original model; it is left as it was.
        blocks: the blocks that the layers stand for.
        layers: by layer index, in the model's dtype and on its device.
        input_ids: held-out contexts, (S, T) int64.
        batch: tokens per forward pass.
        report: called with the forward passes done and to do.
        maps: other modules that were changed, by path from the base model. They stand in with all layers together, not with
            single ones, and not where the blocks are ablated.

    Raises:
        DataError: there is no text, or it is not of this model's tokens.
        RecipeError: the contexts are longer than what the model can read.
    """
    return measure_candidates(model, blocks, [layers], input_ids, batch, report, maps)[0]


def measure_candidates(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    candidates: Sequence[dict[int, nn.Module]],
    input_ids: Tensor,
    batch: int,
    report: Callable[[int, int], None] = lambda _done, _total: None,
    maps: Mapping[str, nn.Module] | None = None,
) -> list[dict[str, Any]]:
    """As `measure`, for several sets of layers that stand for the same blocks; what they are compared with runs once."""
    check_fits(model, input_ids)
    if scored_predictions(input_ids) < 1:
        raise DataError(f"contexts of {input_ids.shape[1]} tokens hold no prediction to score", expected="3 tokens or more")
    device = execution_device(model)
    batches = input_ids.to(device).split(max(1, batch // input_ids.shape[1]))
    outputs, used = _statistics(model, blocks, candidates, batches)
    subsets = {block.layer: [block] for block in blocks} | ({"all": list(blocks)} if len(blocks) > 1 or maps else {})
    variants = {key: _variants(subset, candidates, outputs, used) for key, subset in subsets.items()}
    tables = {key: Table() for key in subsets}
    total, done = len(batches) * sum(len(v) for v in variants.values()), 0
    for ids in batches:
        original = run_original(model, blocks, ids)
        original_sums = next_token_sums(original.logits, original.logits, ids)
        for key, subset in subsets.items():
            tables[key].add("original", original_sums)
            for name, modules in variants[key].items():
                ablated = name in ("zero", "mean")
                beside = maps if maps and key == "all" and not ablated else {}
                sums, errors = _run_variant(model, subset, modules, beside, ids, original, outputs)
                tables[key].add(name, sums | (errors if not ablated else {}))
                done += 1
                report(done, total)
    scored = scored_predictions(input_ids)
    columns = {key: table.columns() for key, table in tables.items()}
    for column in columns.values():
        column["tokens"] = torch.full((len(input_ids),), float(scored), dtype=torch.float64)
    whole = columns.get("all", columns[blocks[0].layer])
    rests_on = {"tokens": scored * len(input_ids), "sequences": len(input_ids), "context": input_ids.shape[1]}
    rests_on |= {"original": with_interval("ce", whole, lambda s: s["original.ce"] / s["tokens"])}
    return [rests_on | _evaluation(number, blocks, columns, whole, usage) for number, usage in enumerate(used)]


def _evaluation(
    number: int, blocks: Sequence[Block], columns: dict[int | str, Sums], whole: Sums, usage: dict[int, "_Usage"]
) -> dict[str, Any]:
    """One candidate's figures, of all layers together and of each."""
    return {
        "all": _figures(whole, number) | _usage_figures(list(usage.values())),
        "layers": [
            {"layer": block.layer} | _figures(columns[block.layer], number) | _usage_figures([usage[block.layer]])
            for block in blocks
        ],
    }


@torch.no_grad()
def _statistics(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    candidates: Sequence[dict[int, nn.Module]],
    batches: Sequence[Tensor],
) -> tuple[dict[int, Tensor], list[dict[int, "_Usage"]]]:
    """One pass over the text with the original model: each block's mean output (D,), and each candidate's use of experts.

    The best constant for what the experts say is the per-dimension least-squares one, ``c = Σ m (y - r) / Σ m²`` for a layer
    ``s * m + r``; of a Mixture of Decoders, ``m = D z`` and ``r = b``.
    """
    sums: dict[tuple, Tensor | int] = defaultdict(int)
    tokens, wide = 0, widest(batches[0].device)
    for ids in batches:
        tokens += ids[:, 1:].numel()
        for index, (x, y) in record_activations(model, blocks, ids).items():
            x, y = x[:, 1:].flatten(0, 1), y[:, 1:].flatten(0, 1).to(wide)
            sums[index, "y"] = sums[index, "y"] + y.sum(0)
            for number, layers in enumerate(candidates):
                m, r = (part.to(wide).expand_as(y) for part in layers[index].dense_path(x))
                for name, value in (
                    ("my", (m * (y - r)).sum(0)),
                    ("mm", m.square().sum(0)),
                    ("fired", firings(layers[index], x)),
                ):
                    sums[index, number, name] = sums[index, number, name] + value
    outputs = {block.layer: sums[block.layer, "y"] / tokens for block in blocks}
    used = [
        {
            i: _Usage(sums[i, number, "my"] / sums[i, number, "mm"].clamp_min(1e-30), sums[i, number, "fired"], tokens)
            for i in outputs
        }
        for number in range(len(candidates))
    ]
    return outputs, used


def firings(layer: nn.Module, x: Tensor) -> Tensor:
    """On how many of the tokens x (n, D) each expert fires: (N,); empty without experts."""
    if not hasattr(layer, "gate"):
        return torch.zeros(0, dtype=torch.int64, device=x.device)
    a = layer.coefficients(x)
    return torch.bincount(a.indices[a.values > 0], minlength=layer.gate.n_experts)


def _variants(
    subset: Sequence[Block],
    candidates: Sequence[dict[int, nn.Module]],
    outputs: dict[int, Tensor],
    used: Sequence[dict[int, "_Usage"]],
) -> dict[str, dict[int, nn.Module]]:
    """What stands in the blocks' places in each run: ``converted 0``, ``frozen 0`` (its experts), ..., ``zero``, ``mean``."""
    variants: dict[str, dict[int, nn.Module]] = {"zero": {}, "mean": {}}
    for block in subset:
        index = block.layer
        variants["zero"][index] = ConstantOutput(torch.zeros_like(outputs[index]))
        variants["mean"][index] = ConstantOutput(outputs[index])
        for number, layers in enumerate(candidates):
            frozen = FrozenExperts(layers[index], used[number][index].best_constant)
            variants.setdefault(f"converted {number}", {})[index] = layers[index]
            variants.setdefault(f"frozen {number}", {})[index] = frozen
    return variants


@dataclass
class Original:
    """One batch through the original model."""

    logits: Tensor
    y: dict[int, Tensor]  # the blocks' outputs, by layer
    layer_outputs: list[object]  # of every decoder layer


@torch.no_grad()
def run_original(model: PreTrainedModel, blocks: Sequence[Block], ids: Tensor) -> Original:
    """One pass of the model as it is on ids (B, T): what others are compared with, and may go on from."""
    _, decoder = decoder_layers(model)
    outputs: list[object] = []
    hooks = [layer.register_forward_hook(lambda _m, _a, output: outputs.append(output)) for layer in decoder]
    with hooked(*hooks), recording(model, blocks) as recorded:
        logits = model(input_ids=ids, use_cache=False).logits
    return Original(logits, {layer: a.y for layer, a in recorded.items()}, outputs)


@torch.no_grad()
def _run_variant(
    model: PreTrainedModel,
    subset: Sequence[Block],
    modules: dict[int, nn.Module],
    maps: Mapping[str, nn.Module],
    ids: Tensor,
    original: Original,
    outputs: dict[int, Tensor],
) -> tuple[Sums, Sums]:
    """Next-token sums and the summed errors of the subset's outputs with other modules in place of its blocks."""
    _, decoder = decoder_layers(model)
    first = 0 if maps else min(block.layer for block in subset)
    with (
        replaced(model, subset, modules),
        modules_replaced(model, maps),
        resumed_at(decoder, first, original.layer_outputs),
        recording(model, subset) as recorded,
    ):
        logits = model(input_ids=ids, use_cache=False).logits
    errors: Sums = {}
    for layer, activations in recorded.items():
        for name, value in error_sums(activations.y, original.y[layer], outputs[layer]).items():
            errors[name] = errors.get(name, 0) + value
    return next_token_sums(logits, original.logits, ids), errors


def _figures(columns: Sums, number: int) -> dict[str, Any]:
    """A candidate's figures of one layer, or of all together, with their intervals."""
    converted, frozen = f"converted {number}", f"frozen {number}"

    def delta(name: str) -> Callable[[Sums], Tensor]:
        return lambda s: (s[f"{name}.ce"] - s["original.ce"]) / s["tokens"]

    figures = {
        "delta_ce": delta(converted),
        "kl": lambda s: s[f"{converted}.kl"] / s["tokens"],
        "top1_agreement": lambda s: s[f"{converted}.agree"] / s["tokens"],
        "nmse": lambda s: s[f"{converted}.error"] / s[f"{converted}.power"],
        "fvu": lambda s: s[f"{converted}.error"] / s[f"{converted}.variance"],
        "zero_delta_ce": delta("zero"),
        "mean_delta_ce": delta("mean"),
        "loss_recovered": lambda s: (s["zero.ce"] - s[f"{converted}.ce"]) / (s["zero.ce"] - s["original.ce"]),
        "constant_gate_delta_ce": delta(frozen),
        "constant_gate_nmse": lambda s: s[f"{frozen}.error"] / s[f"{frozen}.power"],
        "expert_share": lambda s: (s[f"{frozen}.ce"] - s[f"{converted}.ce"]) / (s["zero.ce"] - s[f"{converted}.ce"]),
    }
    result: dict[str, Any] = {}
    for name, figure in figures.items():
        result |= with_interval(name, columns, figure)
    return result


def _usage_figures(usage: Sequence[_Usage]) -> dict[str, Any]:
    """How the experts are used on these tokens: L0, the share that never fired, firing frequencies by decade.

    Nothing is known of experts where there are none.
    """
    frequency = torch.cat([layer.fired.cpu().double() / layer.tokens for layer in usage])
    if len(frequency) == 0:
        return {"l0": None, "dead_share": None, "firing_frequency": None}
    return {
        "l0": sum(layer.fired.sum().item() / layer.tokens for layer in usage) / len(usage),
        "dead_share": (frequency == 0).double().mean().item(),
        "firing_frequency": frequency_decades(frequency),
    }
