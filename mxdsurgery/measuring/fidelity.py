"""What replacing blocks costs, against the original model: every figure of an evaluation.

For each converted layer alone and for all together, the model runs with the new layers and with four things to compare them
with: the original blocks, nothing (zero-ablation), their mean output (mean-ablation), and the new layers with the experts'
term ``Cᵀ a`` frozen at its best constant. All of them use one model, in which blocks are replaced and restored.

All variants share the hidden states below the first replaced layer, and the original's predictions. Predictions over a
large vocabulary are never held for a whole batch. All layers together are measured on all contexts. The work of measuring
each alone grows with the square of their number: it is done on as many contexts as the time allows, evenly spread.

Shapes: S contexts, B of them at a time, T tokens, D model width, N experts.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxdsurgery.base.activations import record_activations, recording
from mxdsurgery.base.blocks import Block
from mxdsurgery.base.decoder import decoder_layers
from mxdsurgery.base.model import check_fits
from mxdsurgery.base.offload import execution_device
from mxdsurgery.base.running import hidden_states
from mxdsurgery.base.surgery import ConstantOutput, FrozenExperts, modules_replaced, replaced, resumed_at
from mxdsurgery.errors import DataError
from mxdsurgery.hardware.device import synchronise, widest
from mxdsurgery.measuring.intervals import Sums, Table, error_sums, frequency_decades, scored_predictions, with_interval
from mxdsurgery.measuring.scoring import Original, prediction_sums, run_original
from mxdsurgery.planning.effort import ON_ALL, Alone, Rates, Runs, evaluation_runs
from mxdsurgery.terminal.console import duration


@dataclass
class _Usage:
    """How one layer uses its experts on original inputs, position 0 left out."""

    best_constant: Tensor  # (D,), in place of their term Cᵀ a
    fired: Tensor  # (N,), tokens on which each expert fired
    tokens: int


def measure(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    layers: dict[int, nn.Module],
    input_ids: Tensor,
    batch: int,
    report: Callable[[float, float], None] = lambda _done, _total: None,
    maps: Mapping[str, nn.Module] | None = None,
    alone: Alone = ON_ALL,
) -> dict[str, Any]:
    """All figures, as one JSON object (the README lists its entries).

    Args:
        model: the original model; it is left as it was.
        blocks: the blocks that the layers replace.
        layers: by layer index, in the model's dtype and on its device.
        input_ids: held-out contexts, (S, T) int64.
        batch: tokens per forward pass.
        report: called with the forward passes done and to do.
        maps: other modules that were changed, by path from the base model. They are in place where all layers are measured
            together, not with single layers, and not where the blocks are ablated.
        alone: on how much of the text single layers are measured.

    Raises:
        DataError: there is no text, or it is not of this model's tokens.
        RecipeError: the contexts are longer than what the model can read.
    """
    return Measurement(model, blocks, [layers], input_ids, batch, maps, alone).run(report)[0]


class Measurement:
    """As `measure`, for several sets of layers that replace the same blocks; the runs that they are compared with are shared.

    The constructor times the first batch, so that it is known before `run` how long that will take.

    Attributes:
        contexts_alone: on how many of the S contexts each layer alone is measured.
        seconds: that `run` will take.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        candidates: Sequence[dict[int, nn.Module]],
        input_ids: Tensor,
        batch: int,
        maps: Mapping[str, nn.Module] | None = None,
        alone: Alone = ON_ALL,
    ) -> None:
        check_fits(model, input_ids)
        contexts, length = input_ids.shape
        if scored_predictions(input_ids) < 1:
            raise DataError(f"contexts of {length} tokens hold no prediction to score", expected="3 tokens or more")
        self.model, self.blocks, self.candidates, self.maps = model, blocks, candidates, maps or {}
        self.input_ids = input_ids.to(execution_device(model))
        self.size = max(1, batch // length)  # B
        self.depth = len(decoder_layers(model)[1])
        self.rates = _rates(model, blocks, candidates[0], self.input_ids[: self.size])
        runs = evaluation_runs([block.layer for block in blocks], self.depth, len(candidates), bool(self.maps))
        together, single = map(self.rates.seconds, runs)
        self.contexts_alone = alone.contexts(together, single, contexts, length)
        self.seconds = contexts * together + self.contexts_alone * single

    @property
    def tokens_alone(self) -> int:
        """Tokens in ``contexts_alone``, as `Alone` counts them."""
        return self.contexts_alone * self.input_ids.shape[1]

    def announcement(self) -> str:
        """For people: what is measured on how many tokens, and how long it will take."""
        scored, contexts = scored_predictions(self.input_ids), len(self.input_ids)
        several, fewer = len(self.blocks) > 1, self.contexts_alone < contexts
        what = "one layer" if not several else "all layers together" if fewer else "all layers together and each alone"
        alone = f", each alone on {scored * self.contexts_alone:,}" if several and fewer else ""
        return f"{what} on {scored * contexts:,} tokens{alone}: about {duration(self.seconds)}"

    @torch.no_grad()
    def run(self, report: Callable[[float, float], None] = lambda _done, _total: None) -> list[dict[str, Any]]:
        """The figures of each candidate; ``report`` is called with the forward passes done and to do."""
        progress = _Passes(self, report)
        batches = self.input_ids.split(self.size)
        outputs, used = _statistics(self.model, self.blocks, self.candidates, batches, progress)
        subsets: dict[int | str, list[Block]] = {block.layer: [block] for block in self.blocks}
        whole: int | str = self.blocks[0].layer
        if len(self.blocks) > 1 or self.maps:
            whole, subsets["all"] = "all", list(self.blocks)
        variants = {key: _variants(subset, self.candidates, outputs, used) for key, subset in subsets.items()}
        work = _Work(self, subsets, variants, outputs, progress)
        columns = work.columns([whole], self.input_ids)
        columns |= work.columns([key for key in subsets if key != whole], _spread(self.input_ids, self.contexts_alone))
        scored, (contexts, length) = scored_predictions(self.input_ids), self.input_ids.shape
        rests_on = {"tokens": scored * contexts, "sequences": contexts, "context": length}
        rests_on |= {"original": with_interval("ce", columns[whole]["original.ce"], columns[whole]["tokens"])}
        return [
            rests_on | _evaluation(number, self.blocks, columns, columns[whole], usage) for number, usage in enumerate(used)
        ]


def _evaluation(
    number: int, blocks: Sequence[Block], columns: dict[int | str, Sums], whole: Sums, usage: dict[int, "_Usage"]
) -> dict[str, Any]:
    """One candidate's figures, of all layers together and of each."""
    return {
        "all": _figures(whole, number, [block.layer for block in blocks]) | _usage_figures(list(usage.values())),
        "layers": [
            {"layer": block.layer, "tokens": int(columns[block.layer]["tokens"].sum())}
            | _figures(columns[block.layer], number, [block.layer])
            | with_interval("nmse_together", *_errors(whole, f"converted {number}", [block.layer], "power"))
            | _usage_figures([usage[block.layer]])
            for block in blocks
        ],
    }


def _statistics(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    candidates: Sequence[dict[int, nn.Module]],
    batches: Sequence[Tensor],
    progress: "_Passes",
) -> tuple[dict[int, Tensor], list[dict[int, "_Usage"]]]:
    """One pass over the text with the original model: each block's mean output (D,), and each candidate's use of experts.

    The best constant for the experts' term s of a layer ``s * m + r`` is the least-squares one of each dimension,
    ``c = Σ m (y - r) / Σ m²``; in a Mixture of Decoders, ``s = Cᵀ a``, ``m = D z`` and ``r = b``.
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
        progress.add(len(ids), Runs(max(b.layer for b in blocks) + 1, len(candidates) * len(blocks), 0))
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
    """On how many of the tokens x (n, D) each expert fires: (N,) int64; empty without experts."""
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


@torch.no_grad()
def _rates(model: PreTrainedModel, blocks: Sequence[Block], layers: dict[int, nn.Module], ids: Tensor) -> Rates:
    """How fast this machine runs the model, measured on one batch (B, T)."""

    def timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
        start = time.perf_counter()
        result = run()
        synchronise(ids.device.type)
        return (time.perf_counter() - start) / len(ids), result

    hidden_states(model, ids[:1])  # warms up: the first run takes longer
    body, hidden = timed(lambda: hidden_states(model, ids))
    heads, _ = timed(lambda: dict(prediction_sums(model, ids, hidden, [("itself", hidden)])))
    with replaced(model, blocks, layers):
        converted, _ = timed(lambda: hidden_states(model, ids))
    return Rates(body / len(decoder_layers(model)[1]), max(0.0, converted - body) / len(layers), heads / 2)


class _Passes:
    """Counts the work, in passes of a whole batch through the whole model."""

    def __init__(self, of: Measurement, report: Callable[[float, float], None]) -> None:
        self.rates, self.report = of.rates, report
        self.whole = of.size * of.rates.seconds(Runs(of.depth, 0, 1))
        self.done, self.total = 0.0, of.seconds / self.whole

    def add(self, contexts: int, runs: Runs) -> None:
        """Counts so many contexts as having taken part in ``runs``."""
        self.done += contexts * self.rates.seconds(runs) / self.whole
        self.report(min(self.done, self.total), self.total)


@dataclass
class _Work:
    """Runs the variants of every subset of layers."""

    of: Measurement
    subsets: dict[int | str, list[Block]]
    variants: dict[int | str, dict[str, dict[int, nn.Module]]]
    outputs: dict[int, Tensor]
    progress: _Passes

    def columns(self, keys: Sequence[int | str], input_ids: Tensor) -> dict[int | str, Sums]:
        """Per-context sums of some subsets on contexts (S, T)."""
        tables = {key: Table() for key in keys}
        for ids in input_ids.split(self.of.size) if keys else ():
            original = run_original(self.of.model, self.of.blocks, ids)
            self.progress.add(len(ids), Runs(self.of.depth, 0, 1))
            runs = (
                ((key, name), self._run(key, name, ids, original, tables[key])) for key in keys for name in self.variants[key]
            )
            for name, sums in prediction_sums(self.of.model, ids, original.hidden, runs):
                if name == "original":
                    for table in tables.values():
                        table.add("original", sums)
                else:
                    tables[name[0]].add(name[1], sums)
        columns = {key: table.columns() for key, table in tables.items()}
        for column in columns.values():
            column["tokens"] = torch.full((len(input_ids),), float(scored_predictions(input_ids)), dtype=torch.float64)
        return columns

    def _run(self, key: int | str, name: str, ids: Tensor, original: Original, table: Table) -> Tensor:
        """One variant's hidden states; the errors of its blocks' outputs go into the table."""
        of, subset, modules = self.of, self.subsets[key], self.variants[key][name]
        ablated = name in ("zero", "mean")
        maps = of.maps if key == "all" and not ablated else {}
        first = 0 if maps else min(block.layer for block in subset)
        _, decoder = decoder_layers(of.model)
        with (
            replaced(of.model, subset, modules),
            modules_replaced(of.model, maps),
            resumed_at(decoder, first, original.layer_outputs),
            recording(of.model, subset, shape=ids.shape) as recorded,
        ):
            hidden = hidden_states(of.model, ids)
        for layer, activations in recorded.items() if not ablated else ():
            table.add(f"{name} at {layer}", error_sums(activations.y, original.y[layer], self.outputs[layer]))
        converted = name.startswith("converted")
        self.progress.add(len(ids), Runs(of.depth - first, len(subset) if converted else 0, 1))
        return hidden


def _spread(input_ids: Tensor, contexts: int) -> Tensor:
    """``contexts`` of the contexts (S, T), evenly spread over all of them."""
    chosen = (torch.arange(contexts) + 0.5).mul(len(input_ids) / contexts).long()
    return input_ids[chosen.to(input_ids.device)]


def _errors(columns: Sums, name: str, layers: Sequence[int], size: str) -> tuple[Tensor, Tensor]:
    """The squared errors of L layers' outputs in a run, and their ``size`` (power or variance): (L, S) each."""
    error, over = (torch.stack([columns[f"{name} at {layer}.{sums}"] for layer in layers]) for sums in ("error", size))
    return error, over


def _figures(columns: Sums, number: int, layers: Sequence[int]) -> dict[str, Any]:
    """A candidate's figures with these layers in place, with their intervals; errors of outputs are means over the layers."""
    converted, frozen = f"converted {number}", f"frozen {number}"
    tokens, ce = columns["tokens"], {name: columns[f"{name}.ce"] for name in (converted, frozen, "original", "zero", "mean")}
    figures = {
        "delta_ce": (ce[converted] - ce["original"], tokens),
        "kl": (columns[f"{converted}.kl"], tokens),
        "top1_agreement": (columns[f"{converted}.agree"], tokens),
        "nmse": _errors(columns, converted, layers, "power"),
        "fvu": _errors(columns, converted, layers, "variance"),
        "zero_delta_ce": (ce["zero"] - ce["original"], tokens),
        "mean_delta_ce": (ce["mean"] - ce["original"], tokens),
        "constant_gate_delta_ce": (ce[frozen] - ce["original"], tokens),
        "constant_gate_nmse": _errors(columns, frozen, layers, "power"),
    }
    # Shares of what a layer is worth over no block at all: the original's, or the converted one's.
    shares = {
        "loss_recovered": (ce["zero"] - ce[converted], ce["zero"] - ce["original"]),
        "expert_share": (ce[frozen] - ce[converted], ce["zero"] - ce[converted]),
    }
    result: dict[str, Any] = {}
    for name, parts in figures.items():
        result |= with_interval(name, *parts)
    for name, parts in shares.items():
        result |= with_interval(name, *parts, signed=True)
    return result


def _usage_figures(usage: Sequence[_Usage]) -> dict[str, Any]:
    """How the experts are used on these tokens: L0, the share that never fired, firing frequencies by decade.

    All are None where there are no experts.
    """
    frequency = torch.cat([layer.fired.cpu().double() / layer.tokens for layer in usage])
    if len(frequency) == 0:
        return {"l0": None, "dead_share": None, "firing_frequency": None}
    return {
        "l0": sum(layer.fired.sum().item() / layer.tokens for layer in usage) / len(usage),
        "dead_share": (frequency == 0).double().mean().item(),
        "firing_frequency": frequency_decades(frequency),
    }
