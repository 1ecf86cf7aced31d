"""What replacing blocks costs, against the original model: every figure of an evaluation.

For each converted layer alone and for all together, the model runs with the new layers and with what to compare them with:
the original blocks, nothing (zero-ablation), their mean output (mean-ablation), the new layers with the experts' term ``Cᵀ a``
frozen at its best constant, and with the `controls` of their choice of experts. All of them use one model, in which blocks are
replaced and restored.

What the new layers are compared with keeps the output at position 0, where no figure is taken. In real models an early layer
puts an attention sink there, an output tens of times as large as any other, and without it the model breaks at every position:
zeroed, layer 2 of SmolLM2-135M costs 1.23 nats, and .23 if position 0 is kept. Beside the former, any layer looks faithful.

All variants share the hidden states below the first replaced layer, and the original's predictions. Predictions over a
large vocabulary are never held for a whole batch. All layers together are measured on all contexts. The work of measuring
each alone grows with the square of their number: it is done on as many contexts as the time allows, evenly spread.

Shapes: S contexts, B of them at a time, T tokens, D model width, N experts.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
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
from mxdsurgery.base.scores import SCORES
from mxdsurgery.base.surgery import ConstantOutput, FirstKept, FrozenExperts, modules_replaced, replaced, resumed_at
from mxdsurgery.errors import DataError
from mxdsurgery.hardware.device import widest
from mxdsurgery.measuring import controls
from mxdsurgery.measuring.controls import Usage
from mxdsurgery.measuring.intervals import Sums, Table, error_sums, scored_predictions, with_interval
from mxdsurgery.measuring.jacobian import JacobianErrors
from mxdsurgery.measuring.pace import Passes, measured_rates
from mxdsurgery.measuring.remembering import remembering
from mxdsurgery.measuring.scoring import Original, prediction_sums, run_original
from mxdsurgery.measuring.usage import UsageSums, usage_figures
from mxdsurgery.planning.calibrate import wide_rate
from mxdsurgery.planning.effort import (
    ON_ALL,
    RUN_LAYERS,
    Alone,
    Runs,
    evaluation_runs,
    fitted_together,
    solving_seconds,
    statistics_passes,
)
from mxdsurgery.terminal.console import duration

# What stands in the blocks' places where they are ablated.
_ABLATED = ("zero", "mean")


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
    """All figures, as one JSON object (docs/guide/measure.md lists its entries).

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
        solving: those of them in which dense paths are fitted anew, on however much text.
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
        self.rates = measured_rates(model, blocks, candidates[0], self.input_ids[: self.size])
        kinds = [controls.kind_of(layers[blocks[0].layer]) for layers in candidates]
        runs = evaluation_runs(blocks, self.depth, contexts, length, kinds, bool(self.maps))
        together, single = map(self.rates.seconds, runs)
        self.solving = solving_seconds(blocks, kinds, lambda: wide_rate(self.input_ids.device.type))
        self.contexts_alone = alone.contexts(together, single, contexts, length, self.solving)
        self.seconds = self.solving + contexts * together + self.contexts_alone * single

    @property
    def tokens_alone(self) -> int:
        """Tokens in ``contexts_alone``, as `Alone` counts them."""
        return self.contexts_alone * self.input_ids.shape[1]

    def batches(self, chosen: Tensor) -> Sequence[Tensor]:
        """Some of the contexts, chosen by number or by mask, (B, T) at a time; none where there are none."""
        ids = self.input_ids[chosen.to(self.input_ids.device)]
        return ids.split(self.size) if len(ids) else ()

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
        progress = Passes(self.rates, self.size, self.depth, self.seconds, report)
        batches = self.input_ids.split(self.size)
        nearby = JacobianErrors(self.blocks, self.model.base_model, self.candidates, *self.input_ids.shape)
        outputs, used = _statistics(self.model, self.blocks, self.candidates, batches, nearby, progress)
        subsets: dict[int | str, list[Block]] = {block.layer: [block] for block in self.blocks}
        whole: int | str = self.blocks[0].layer
        if len(self.blocks) > 1 or self.maps:
            whole, subsets["all"] = "all", list(self.blocks)
        retrained = _retrained(self, used, progress)
        stand_ins = _stand_ins(self, outputs, used, retrained)
        work = _Work(self, subsets, stand_ins, list(retrained.values()), outputs, progress)
        scored, (contexts, length) = scored_predictions(self.input_ids), self.input_ids.shape
        columns = work.columns([whole], torch.arange(contexts))
        columns |= work.columns([key for key in subsets if key != whole], _spread(contexts, self.contexts_alone))
        rests_on = {"tokens": scored * contexts, "sequences": contexts, "context": length}
        rests_on |= {"original": with_interval("ce", columns[whole]["original.ce"], columns[whole]["tokens"])}
        rests_on |= {"jacobian_inputs": nearby.inputs}
        return [
            rests_on | _evaluation(number, self.blocks, columns, columns[whole], usage, nearby)
            for number, usage in enumerate(used)
        ]


def _evaluation(
    number: int,
    blocks: Sequence[Block],
    columns: dict[int | str, Sums],
    whole: Sums,
    usage: dict[int, Usage],
    nearby: JacobianErrors,
) -> dict[str, Any]:
    """One candidate's figures, of all layers together and of each."""
    every = [block.layer for block in blocks]
    return {
        "all": _figures(whole, number, every) | nearby.figure(number, every) | usage_figures(list(usage.values())),
        "layers": [
            {"layer": block.layer, "tokens": int(columns[block.layer]["tokens"].sum())}
            | _figures(columns[block.layer], number, [block.layer])
            | nearby.figure(number, [block.layer])
            | with_interval("nmse_together", *_errors(whole, f"converted {number}", [block.layer], "power"))
            | usage_figures([usage[block.layer]])
            for block in blocks
        ],
    }


def _statistics(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    candidates: Sequence[dict[int, nn.Module]],
    batches: Sequence[Tensor],
    nearby: JacobianErrors,
    progress: Passes,
) -> tuple[dict[int, Tensor], list[dict[int, Usage]]]:
    """One pass over the text with the original model: each block's mean output (D,), and each candidate's use of experts.

    The derivatives of all layers are taken in the same pass.
    """
    outputs: dict[int, Tensor | int] = defaultdict(int)
    used = [{block.layer: UsageSums() for block in blocks} for _ in candidates]
    tokens, wide = 0, widest(batches[0].device)
    passes = statistics_passes(sum(map(len, batches)), batches[0].shape[1])
    for ids in batches:
        tokens += ids[:, 1:].numel()
        recorded = record_activations(model, blocks, ids)
        nearby.add(recorded)
        for index, (x, y) in recorded.items():
            x, y = x[:, 1:].flatten(0, 1), y[:, 1:].flatten(0, 1).to(wide)
            outputs[index] = outputs[index] + y.sum(0)
            for layers, sums in zip(candidates, used, strict=True):
                sums[index].add(layers[index], x, y)
        progress.add(len(ids), Runs(max(b.layer for b in blocks) + 1, len(candidates) * len(blocks) * passes, 0))
    outputs = {block.layer: outputs[block.layer] / tokens for block in blocks}
    return outputs, [{index: sums.usage() for index, sums in of_candidate.items()} for of_candidate in used]


def _retrained(
    of: Measurement, used: Sequence[dict[int, Usage]], progress: Passes
) -> dict[tuple[int, int], controls.RetrainedDensePath]:
    """By candidate and layer, the layers with their dense path fitted anew; in as many passes over the text as memory asks."""
    of_quarter, retrained = controls.quarters(len(of.input_ids)), {}
    fitting = [n for n, layers in enumerate(of.candidates) if controls.dense_features(layers[of.blocks[0].layer]) is not None]
    kinds = [controls.kind_of(of.candidates[number][of.blocks[0].layer]) for number in fitting]
    for group in fitted_together(of.blocks, kinds):
        fits = {
            (number, block.layer): controls.DenseFit(_frozen(of.candidates[number][block.layer], used[number][block.layer]))
            for number in fitting
            for block in group
        }
        for quarter in range(4):
            for ids in of.batches(of_quarter == quarter):
                recorded = record_activations(of.model, group, ids)
                for (_, layer), fit in fits.items():
                    fit.add(quarter, *(part[:, 1:].flatten(0, 1) for part in recorded[layer]))
                progress.add(len(ids), Runs(max(block.layer for block in group) + 1 + len(fits), 0, 0))
        retrained |= {key: fit.retrained(of.model.dtype) for key, fit in fits.items()}
        progress.took(of.solving * len(group) / len(of.blocks))
    return retrained


def _frozen(layer: nn.Module, usage: Usage) -> FrozenExperts:
    return FrozenExperts(layer, usage.best_constant)


def _stand_ins(
    of: Measurement,
    outputs: dict[int, Tensor],
    used: Sequence[dict[int, Usage]],
    retrained: dict[tuple[int, int], controls.RetrainedDensePath],
) -> dict[str, dict[int, nn.Module]]:
    """What stands in the blocks' places in each run: ``converted 0``, ``frozen 0`` (its experts), ..., ``zero``, ``mean``."""
    length, variants = of.input_ids.shape[1], defaultdict(dict)
    for index, mean in outputs.items():
        variants["zero"][index], variants["mean"][index] = ConstantOutput(torch.zeros_like(mean)), ConstantOutput(mean)
        for number, layers in enumerate(of.candidates):
            layer, usage = layers[index], used[number][index]
            made = {"converted": layer, "frozen": _frozen(layer, usage)}
            made |= controls.stand_ins(layer, usage, length, seed=index) if hasattr(layer, "gate") else {}
            if (number, index) in retrained:
                made["retrained"] = retrained[number, index]
            for name, module in made.items():
                variants[f"{name} {number}"][index] = module if name == "converted" else FirstKept(module, layer, length)
    return variants


@dataclass
class _Work:
    """Runs the variants of every subset of layers."""

    of: Measurement
    subsets: dict[int | str, list[Block]]
    stand_ins: dict[str, dict[int, nn.Module]]  # by variant and layer
    retrained: list[controls.RetrainedDensePath]  # those among them
    outputs: dict[int, Tensor]
    progress: Passes
    memory: ExitStack = field(default_factory=ExitStack)
    remembers: int | str | None = None  # whose first layers do

    def columns(self, keys: Sequence[int | str], contexts: Tensor) -> dict[int | str, Sums]:
        """Per-context sums of some subsets on some of the contexts, by their numbers, ascending."""
        tables = {key: Table() for key in keys}
        with self.memory:
            self._add(tables, contexts)
            self.remembers = None
        columns = {key: table.columns() for key, table in tables.items()}
        for column in columns.values():
            column["tokens"] = torch.full((len(contexts),), float(scored_predictions(self.of.input_ids)), dtype=torch.float64)
        return columns

    def _add(self, tables: dict[int | str, Table], contexts: Tensor) -> None:
        """Adds the sums of contexts to the tables of subsets."""
        for ids in self._batches(contexts) if tables else ():
            original = run_original(self.of.model, self.of.blocks, ids)
            self._keep_first(original)
            self.progress.add(len(ids), Runs(self.of.depth, 0, 1))
            runs = (
                ((key, name), self._run(key, name, ids, original, table))
                for key, table in tables.items()
                for name in self.stand_ins
            )
            for name, sums in prediction_sums(self.of.model, ids, original.hidden, runs, wanted=_wanted):
                if name == "original":
                    for table in tables.values():
                        table.add("original", sums)
                else:
                    tables[name[0]].add(name[1], sums)

    def _keep_first(self, original: Original) -> None:
        """Tells ablated blocks what the original gives at position 0."""
        for name in _ABLATED:
            for layer, module in self.stand_ins[name].items():
                module.first = original.y[layer][:, :1]

    def _batches(self, contexts: Tensor) -> Iterator[Tensor]:
        """The contexts in batches, each from one half of the text, for which the retrained layers are told so."""
        of_half = controls.quarters(len(self.of.input_ids))[contexts] // 2
        for half in range(2):
            for module in self.retrained:
                module.half = half
            yield from self.of.batches(contexts[of_half == half])

    def _run(self, key: int | str, name: str, ids: Tensor, original: Original, table: Table) -> Tensor:
        """One variant's hidden states; the errors of its blocks' outputs go into the table."""
        of, subset = self.of, self.subsets[key]
        modules = {block.layer: self.stand_ins[name][block.layer] for block in subset}
        ablated = name in _ABLATED
        maps = of.maps if key == "all" and not ablated else {}
        start = min(block.layer for block in subset)
        first = 0 if maps else start
        if self.remembers != key:  # all variants of a subset give its first layer the same input
            self.remembers = key
            self.memory.close()
            for layers in of.candidates:
                self.memory.enter_context(remembering(layers[start]))
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
        variant = name.partition(" ")[0]
        new = len(subset) - (variant != "converted") if variant in RUN_LAYERS else 0
        self.progress.add(len(ids), Runs(of.depth - first, new, 1))
        return hidden


def _wanted(name: tuple[int | str, str]) -> Sequence[str]:
    """The scores of a run: of one that is there to compare the new layers with, cross-entropy says all."""
    return SCORES if name[1].startswith("converted") else ("ce",)


def _spread(contexts: int, fewer: int) -> Tensor:
    """The numbers of ``fewer`` of the contexts, evenly spread over all of them."""
    return (torch.arange(fewer) + 0.5).mul(contexts / fewer).long()


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
    return result | _control_figures(columns, number)


def _control_figures(columns: Sums, number: int) -> dict[str, Any]:
    """What each control costs, and the share of the layer's worth that is lost under it; all None where nothing is chosen."""
    result: dict[str, Any] = {}
    for control, share in controls.SHARES.items():
        name = f"{control} {number}"
        if f"permuted {number}.ce" not in columns:
            result |= dict.fromkeys((f"{control}_delta_ce", f"{control}_delta_ce_ci", share, f"{share}_ci"))
            continue
        if f"{name}.ce" not in columns:  # the dense path is a constant: with its experts frozen the layer is at its best
            name = f"frozen {number}"
        ce, converted = columns[f"{name}.ce"], columns[f"converted {number}.ce"]
        result |= with_interval(f"{control}_delta_ce", ce - columns["original.ce"], columns["tokens"])
        result |= with_interval(share, ce - converted, columns["zero.ce"] - converted, signed=True)
    return result
