"""What replacing blocks costs, against the original model: every figure of an evaluation.

For each converted layer alone and for all together, the model runs with the new layers and with four things to compare them
with: the original blocks, nothing (zero-ablation), their mean output (mean-ablation), and the new layers with the experts'
say frozen at its best constant. All of them share one model, whose blocks are put in and taken out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxdsurgery.activations import hooked, record_activations, recording
from mxdsurgery.blocks import Block
from mxdsurgery.layer import MxDLayer
from mxdsurgery.metrics import Sums, Table, error_sums, next_token_sums, scored_predictions, with_interval
from mxdsurgery.model import decoder_layers
from mxdsurgery.surgery import ConstantGate, ConstantOutput, replaced, resumed_at

# Firing frequencies are binned by decade; the first bin holds what fired less often than 1e-5 of the tokens.
_FREQUENCY_DECADES = (-5, -4, -3, -2, -1, 0)


@dataclass
class _LayerStatistics:
    """Of one layer on original inputs, position 0 left out; (D,) and (N,) tensors."""

    mean_y: Tensor
    best_constant: Tensor
    fired: Tensor  # tokens on which each expert fired
    active: float  # mean number of nonzero coefficients
    tokens: int


def measure(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    layers: dict[int, MxDLayer],
    input_ids: Tensor,
    batch: int,
    report: Callable[[int, int], None] = lambda _done, _total: None,
) -> dict[str, Any]:
    """All figures, as one JSON object (the README lists its entries).

    Args:
        model: the original model; it is left as it was.
        blocks: the blocks that the layers stand for.
        layers: by layer index, in the model's dtype and on its device.
        input_ids: held-out contexts, (S, T) int64.
        batch: tokens per forward pass.
        report: called with the forward passes done and to do.
    """
    device = next(model.parameters()).device
    batches = input_ids.to(device).split(max(1, batch // input_ids.shape[1]))
    statistics = _layer_statistics(model, blocks, layers, batches)
    subsets = {block.layer: [block] for block in blocks} | {"all": list(blocks)}
    variants = {key: _variants(subset, layers, statistics) for key, subset in subsets.items()}
    tables = {key: Table() for key in subsets}
    total, done = len(batches) * sum(len(v) for v in variants.values()), 0
    for ids in batches:
        original = _run_original(model, blocks, ids)
        original_sums = next_token_sums(original.logits, original.logits, ids)
        for key, subset in subsets.items():
            tables[key].add("original", original_sums)
            for name, modules in variants[key].items():
                sums, errors = _run_variant(model, subset, modules, ids, original, statistics)
                tables[key].add(name, sums)
                if name in ("converted", "constant"):
                    tables[key].add(name, errors)
                done += 1
                report(done, total)
    scored = scored_predictions(input_ids)
    columns = {key: table.columns() for key, table in tables.items()}
    for column in columns.values():
        column["tokens"] = torch.full((len(input_ids),), float(scored), dtype=torch.float64)
    return {
        "tokens": scored * len(input_ids),
        "sequences": len(input_ids),
        "context": input_ids.shape[1],
        "original": with_interval("ce", columns["all"], lambda s: s["original.ce"] / s["tokens"]),
        "all": _figures(columns["all"]) | _usage([statistics[b.layer] for b in blocks]),
        "layers": [
            {"layer": block.layer} | _figures(columns[block.layer]) | _usage([statistics[block.layer]]) for block in blocks
        ],
    }


@torch.no_grad()
def _layer_statistics(
    model: PreTrainedModel, blocks: Sequence[Block], layers: dict[int, MxDLayer], batches: Sequence[Tensor]
) -> dict[int, _LayerStatistics]:
    """One pass over the text with the original model.

    The best constant for ``Cᵀa`` is the per-dimension least-squares one, ``c = Σ m (y - b) / Σ m²`` with ``m = D z``.
    """
    sums: dict[int, dict[str, Tensor]] = {}
    for ids in batches:
        for index, (x, y) in record_activations(model, blocks, ids).items():
            layer = layers[index]
            x, y = x[:, 1:].flatten(0, 1), y[:, 1:].flatten(0, 1).double()
            a = layer.gate(x)
            m = layer.decoder(layer.hidden(x)).double()
            fires = a.indices[a.values > 0]
            new = {
                "y": y.sum(0),
                "my": (m * (y - layer.bias.double())).sum(0),
                "mm": m.square().sum(0),
                "fired": torch.bincount(fires, minlength=layer.gate.weight.shape[0]),
                "tokens": torch.tensor(len(y)),
            }
            old = sums.setdefault(index, {name: torch.zeros_like(value) for name, value in new.items()})
            sums[index] = {name: old[name] + value for name, value in new.items()}
    return {
        index: _LayerStatistics(
            mean_y=s["y"] / s["tokens"],
            best_constant=s["my"] / s["mm"].clamp_min(1e-30),
            fired=s["fired"],
            active=(s["fired"].sum() / s["tokens"]).item(),
            tokens=int(s["tokens"]),
        )
        for index, s in sums.items()
    }


def _variants(
    subset: Sequence[Block], layers: dict[int, MxDLayer], statistics: dict[int, _LayerStatistics]
) -> dict[str, dict[int, nn.Module]]:
    """What stands in the blocks' places in each run."""
    variants: dict[str, dict[int, nn.Module]] = {"converted": {}, "constant": {}, "zero": {}, "mean": {}}
    for block in subset:
        layer, known = layers[block.layer], statistics[block.layer]
        variants["converted"][block.layer] = layer
        variants["constant"][block.layer] = ConstantGate(layer, known.best_constant)
        variants["zero"][block.layer] = ConstantOutput(torch.zeros_like(known.mean_y))
        variants["mean"][block.layer] = ConstantOutput(known.mean_y)
    return variants


@dataclass
class _Original:
    """One batch through the original model."""

    logits: Tensor
    y: dict[int, Tensor]  # the blocks' outputs, by layer
    layer_outputs: list[object]  # of every decoder layer


@torch.no_grad()
def _run_original(model: PreTrainedModel, blocks: Sequence[Block], ids: Tensor) -> _Original:
    _, decoder = decoder_layers(model)
    outputs: list[object] = []
    hooks = [layer.register_forward_hook(lambda _m, _a, output: outputs.append(output)) for layer in decoder]
    with hooked(*hooks), recording(model, blocks) as recorded:
        logits = model(input_ids=ids, use_cache=False).logits
    return _Original(logits, {layer: a.y for layer, a in recorded.items()}, outputs)


@torch.no_grad()
def _run_variant(
    model: PreTrainedModel,
    subset: Sequence[Block],
    modules: dict[int, nn.Module],
    ids: Tensor,
    original: _Original,
    statistics: dict[int, _LayerStatistics],
) -> tuple[Sums, Sums]:
    """Next-token sums and the summed errors of the subset's outputs with other modules in place of its blocks."""
    _, decoder = decoder_layers(model)
    first = min(block.layer for block in subset)
    with (
        replaced(model, subset, modules),
        resumed_at(decoder, first, original.layer_outputs),
        recording(model, subset) as recorded,
    ):
        logits = model(input_ids=ids, use_cache=False).logits
    errors: Sums = {}
    for layer, activations in recorded.items():
        for name, value in error_sums(activations.y, original.y[layer], statistics[layer].mean_y).items():
            errors[name] = errors.get(name, 0) + value
    return next_token_sums(logits, original.logits, ids), errors


def _figures(columns: Sums) -> dict[str, Any]:
    """The figures of one layer, or of all together, with their intervals."""

    def delta(name: str) -> Callable[[Sums], Tensor]:
        return lambda s: (s[f"{name}.ce"] - s["original.ce"]) / s["tokens"]

    figures = {
        "delta_ce": delta("converted"),
        "kl": lambda s: s["converted.kl"] / s["tokens"],
        "top1_agreement": lambda s: s["converted.agree"] / s["tokens"],
        "nmse": lambda s: s["converted.error"] / s["converted.power"],
        "fvu": lambda s: s["converted.error"] / s["converted.variance"],
        "zero_delta_ce": delta("zero"),
        "mean_delta_ce": delta("mean"),
        "loss_recovered": lambda s: (s["zero.ce"] - s["converted.ce"]) / (s["zero.ce"] - s["original.ce"]),
        "constant_gate_delta_ce": delta("constant"),
        "constant_gate_nmse": lambda s: s["constant.error"] / s["constant.power"],
        "expert_share": lambda s: (s["constant.ce"] - s["converted.ce"]) / (s["zero.ce"] - s["converted.ce"]),
    }
    result: dict[str, Any] = {}
    for name, figure in figures.items():
        result |= with_interval(name, columns, figure)
    return result


def _usage(statistics: Sequence[_LayerStatistics]) -> dict[str, Any]:
    """How the experts are used on these tokens: L0, the share that never fired, firing frequencies by decade."""
    frequency = torch.cat([s.fired.double() / s.tokens for s in statistics])
    fired = frequency[frequency > 0]
    decades = fired.log10().ceil().clamp(_FREQUENCY_DECADES[0], _FREQUENCY_DECADES[-1])
    shares = [(decades == decade).sum().item() / len(frequency) for decade in _FREQUENCY_DECADES]
    return {
        "l0": sum(s.active for s in statistics) / len(statistics),
        "dead_share": (frequency == 0).double().mean().item(),
        "firing_frequency": {f"up to 1e{decade}": share for decade, share in zip(_FREQUENCY_DECADES, shares, strict=True)},
    }
