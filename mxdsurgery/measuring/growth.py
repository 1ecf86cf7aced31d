"""``growth``: how the error grows with the number of converted layers: do single errors add up, cancel or explode, and where?

The original model runs with the first 1, 2, 4, ... of its converted layers in place, with the last 1, 2, 4, ..., with each
alone and with all. What that does to predictions is compared with the sum of what the single layers do; and for every decoder
layer it is measured how far the residual stream is from the original's. Shapes: S contexts, B of them at a time, T tokens,
D width.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table as RichTable
from rich.text import Text
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxdsurgery.base.activations import hidden_of
from mxdsurgery.base.blocks import Block
from mxdsurgery.base.decoder import decoder_layers
from mxdsurgery.base.lora import healed_maps
from mxdsurgery.base.selection import write_layers
from mxdsurgery.base.surgery import replaced, resumed_at
from mxdsurgery.checkpoint.card import computed_in
from mxdsurgery.checkpoint.converted import Converted, load, saved_recipe, settle
from mxdsurgery.errors import BaseModelError
from mxdsurgery.hardware.device import check_device, widest
from mxdsurgery.hardware.guard import guarded
from mxdsurgery.measuring.evaluate import check_before_loading, load_original
from mxdsurgery.measuring.held_out import held_out, trained_share
from mxdsurgery.measuring.intervals import Sums, Table, error_sums, scored_predictions, with_interval
from mxdsurgery.measuring.scoring import Original, prediction_sums, run_original
from mxdsurgery.terminal.console import Reporter
from mxdsurgery.terminal.figures import EXPLAINED, interval, legend, range_of, value_of
from mxdsurgery.text.fingerprints import tokens_in_words
from mxdsurgery.text.packing import in_batches
from mxdsurgery.text.places import text_name

# Layers that are in place together, by index, from below.
_Set = tuple[int, ...]

# What a row's layers have in common: name in JSON, and in words.
PARTS = (("bottom", "from the bottom"), ("top", "from the top"), ("alone", "each alone"))

# What its columns say, beside those of `EXPLAINED`.
WORDS = {
    "sum": "ΔCE of the same layers, each converted alone, added up",
    "difference": "ΔCE beyond that sum",
    "stream error": "squared distance of a decoder layer's output from the original's, over its squared size",
    "FVU": "the same over its variance",
    "own": "stream error with this layer alone converted; what all layers have beyond it comes from below",
}
_PREDICTIONS = ("", "layers", "ΔCE", "95 % interval", "KL", "same top-1", "sum", "difference")
_STREAM = ("layer", "stream error", "95 % interval", "FVU", "own")


@guarded
def growth(
    folder: str | Path,
    *,
    data: str | None = None,
    tokens: int | None = None,
    text_column: str | None = None,
    base: str | None = None,
    device: str | None = None,
    compute: str | None = None,
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Measures how the error of a converted model grows with the number of its layers; nothing is written.

    Args:
        folder: what ``convert`` wrote.
        data: the text; default: the recipe's held-out text.
        tokens: how many of its tokens; default: the recipe's ``eval_tokens``.
        text_column: column or field with the text; default: the recipe's.
        base: the original model, if it is no longer where the recipe says.
        device: ``auto``, ``cpu``, ``cuda``, ``mps`` or ``xpu``; default: the recipe's.
        compute: dtype to compute in; ``auto``: as stored, or float32 where that is faster here; default: the recipe's.
        trust_remote_code: run the code that came with the base model, where it has its own; see `load`.
        reporter: where progress is reported; default: nowhere.

    Returns:
        A JSON object. ``data``, ``tokens``, ``sequences``, ``context`` and ``trained_on`` (as `evaluate`) that it rests on,
        ``original`` (``ce``). ``bottom``, ``top`` and ``alone``: rows with the ``layers`` in place, ``delta_ce`` and ``kl``
        (original ‖ converted) in nats per token, ``top1_agreement``, ``singles_delta_ce`` and ``singles_kl`` (what these
        layers cost alone, added up) and ``excess_delta_ce`` (ΔCE less that sum). ``stream``: for every decoder ``layer`` of
        the model with all of them in place ``error``, Σ‖ĥ-h‖²/Σ‖h‖² of its output h, ``fvu``, the same over Σ‖h-h̄‖², and
        ``own_error``, with this layer alone in place (None where it is not converted). ``verdict``: in words. Each figure has
        its 95 % interval over contexts as ``<figure>_ci``. Position 0 is left out.

    Raises:
        NotConvertedError: the folder is not one of ours.
        BaseModelError: the original model is missing, or differs outside the converted blocks, as where LoRA healed it.
        DataError: the text cannot be read or is too short.
    """
    reporter = reporter or Reporter()
    folder = Path(folder)
    check_before_loading(folder, data, base, trust_remote_code)
    converted = load(folder, trust_remote_code=trust_remote_code)
    _check_layers_only(converted)
    recipe = settle(converted, saved_recipe(folder, device), compute)
    ids = held_out(converted, recipe, data, tokens, text_column)
    where = check_device(recipe.device)
    original = load_original(converted, base or recipe.model, recipe).to(where)
    layers = {index: layer.to(where) for index, layer in converted.layers.items()}
    with reporter.progress("growth", "passes") as line:
        columns = _measure(original, converted.plan.blocks, layers, ids.to(where), recipe.batch, line.update)
    scored = scored_predictions(ids)
    columns["tokens"] = torch.full((len(ids),), float(scored), dtype=torch.float64)
    rests_on = {"tokens": scored * len(ids), "sequences": len(ids), "context": ids.shape[1]}
    rests_on |= trained_share(converted, ids)
    rows = {name: [_figures(columns, which) for which in sets] for name, sets in _sets(sorted(layers)).items()}
    return {
        "compute": recipe.compute,
        "data": text_name(data or recipe.eval_data or recipe.data),
        **rests_on,
        "original": with_interval("ce", columns["original.ce"], columns["tokens"]),
        **rows,
        "stream": _stream_figures(columns, sorted(layers), len(decoder_layers(original)[1])),
        "verdict": _verdict(rows["bottom"][-1]),
    }


def _check_layers_only(converted: Converted) -> None:
    """Raises BaseModelError where more than blocks was changed: some layers alone would then make no meaningful model."""
    mxd = converted.model.config.mxd
    if healed_maps(mxd, "merged") or healed_maps(mxd, "adapter"):
        raise BaseModelError(
            f"{str(converted.folder)!r} differs from its original outside the converted blocks: its attention was healed, too",
            expected="a model of which only the layers differ",
            fix="measure the folder that it was healed from",
        )


def _sets(converted: Sequence[int]) -> dict[str, list[_Set]]:
    """Which layers are in place together: 1, 2, 4, ... and all of them from the bottom and from the top, and each alone."""
    n = len(converted)
    counts = [2**power for power in range(n.bit_length()) if 2**power < n] + [n]
    return {
        "bottom": [tuple(converted[:count]) for count in counts],
        "top": [tuple(converted[n - count :]) for count in counts],
        "alone": [(layer,) for layer in converted],
    }


@torch.no_grad()
def _measure(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    layers: dict[int, nn.Module],
    input_ids: Tensor,
    batch: int,
    report: Callable[[int, int], None],
) -> Sums:
    """Per-context sums (S,) of every set's predictions, and of the distances in the residual stream."""
    batches = in_batches(input_ids, batch)
    sets = list(dict.fromkeys(which for part in _sets(sorted(layers)).values() for which in part))
    table, done, total = Table(), 0, len(batches) * len(sets)
    means = _stream_means(model, blocks, batches)
    for ids in batches:
        original = run_original(model, blocks, ids)
        runs = _runs(model, blocks, layers, sets, ids, original, means, table)
        for name, sums in prediction_sums(model, ids, original.hidden, runs):
            table.add(name, sums)
            if name != "original":
                done += 1
                report(done, total)
    return table.columns()


def _runs(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    layers: dict[int, nn.Module],
    sets: Sequence[_Set],
    ids: Tensor,
    original: Original,
    means: Sequence[Tensor],
    table: Table,
) -> Iterator[tuple[str, Tensor]]:
    """Every set's name and hidden states on one batch; its distances in the residual stream go into the table."""
    stream, every = _stream(original), max(sets, key=len)
    for which in sets:
        run = _run_set(model, blocks, {layer: layers[layer] for layer in which}, ids, original)
        if which == every or len(which) == 1:
            for layer, h in enumerate(_stream(run)):
                if which == every or layer in which:
                    table.add(f"{_name(which)} at {layer}", error_sums(h, stream[layer], means[layer]))
        yield _name(which), run.hidden


def _run_set(
    model: PreTrainedModel, blocks: Sequence[Block], modules: dict[int, nn.Module], ids: Tensor, original: Original
) -> Original:
    """One batch (B, T) with some layers in place; decoder layers below them are not computed again."""
    with replaced(model, blocks, modules), resumed_at(decoder_layers(model)[1], min(modules), original.layer_outputs):
        return run_original(model, [block for block in blocks if block.layer in modules], ids)


def _stream(run: Original) -> list[Tensor]:
    """The residual stream after every decoder layer, (B, T, D) each."""
    return [hidden_of(output) for output in run.layer_outputs]


def _stream_means(model: PreTrainedModel, blocks: Sequence[Block], batches: Sequence[Tensor]) -> list[Tensor]:
    """Means of the original's residual stream after each decoder layer, (D,) in the `widest` dtype; position 0 left out."""
    sums: list[Tensor] = []
    wide = widest(batches[0].device)
    for ids in batches:
        found = [h[:, 1:].sum((0, 1), dtype=wide) for h in _stream(run_original(model, blocks, ids))]
        sums = [total + part for total, part in zip(sums, found, strict=True)] if sums else found
    return [total / sum(ids[:, 1:].numel() for ids in batches) for total in sums]


def _name(which: _Set) -> str:
    return ",".join(map(str, which))


def _figures(columns: Sums, which: _Set) -> dict[str, Any]:
    """A row: what the layers of a set do together, and what they do alone, added up."""

    original, name = columns["original.ce"], _name(which)
    together = columns[f"{name}.ce"] - original
    singles = sum(columns[f"{layer}.ce"] - original for layer in which)
    figures = {
        "delta_ce": together,
        "kl": columns[f"{name}.kl"],
        "top1_agreement": columns[f"{name}.agree"],
        "singles_delta_ce": singles,
        "singles_kl": sum(columns[f"{layer}.kl"] for layer in which),
        "excess_delta_ce": together - singles,
    }
    row: dict[str, Any] = {"layers": list(which)}
    for figure, sums in figures.items():
        row |= with_interval(figure, sums, columns["tokens"])
    return row


def _stream_figures(columns: Sums, converted: Sequence[int], n_layers: int) -> list[dict[str, Any]]:
    """A row for every decoder layer of the model."""

    def relative(figure: str, key: str, size: str) -> dict[str, Any]:
        return with_interval(figure, columns[f"{key}.error"], columns[f"{key}.{size}"])

    rows = []
    for layer in range(n_layers):
        joint = f"{_name(tuple(converted))} at {layer}"
        row = {"layer": layer} | relative("error", joint, "power") | relative("fvu", joint, "variance")
        alone = {"own_error": None, "own_error_ci": None}
        if layer in converted:
            alone = relative("own_error", f"{layer} at {layer}", "power")
        rows.append(row | alone)
    return rows


def _verdict(joint: dict[str, Any]) -> str:
    """Whether the errors of single layers add up, cancel or feed on each other, from the interval of the difference."""
    if len(joint["layers"]) == 1:
        return "One layer is converted: there is nothing to add up."
    ends = interval(joint, "excess_delta_ce")
    if ends is None:
        word = "may add up or not: one context is too little text to tell"
    elif ends[0] > 0:
        word = "more than add up"
    else:
        word = "cancel in part" if ends[1] < 0 else "add up (the interval of the difference holds 0)"
    return (
        f"All {len(joint['layers'])} layers together: {joint['delta_ce']:+.4f} nats per token; the single ones added up: "
        f"{joint['singles_delta_ce']:+.4f}; difference {joint['excess_delta_ce']:+.4f} "
        f"({range_of(joint, 'excess_delta_ce', '+.4f')}). Errors {word}."
    )


def growth_table(result: dict[str, Any]) -> list[Any]:
    """What `growth` returns, for a terminal."""
    predictions = RichTable(title=f"On {tokens_in_words(result)}{computed_in(result)}; layers in place")
    for heading in _PREDICTIONS:
        predictions.add_column(heading, justify="left" if heading in ("", "layers") else "right")
    for part, words in PARTS:
        predictions.add_section()
        for number, row in enumerate(result[part]):
            cells = (
                f"{row['delta_ce']:+.4f}",
                range_of(row, "delta_ce", "+.4f"),
                f"{row['kl']:.4f}",
                f"{row['top1_agreement']:.1%}",
            )
            sums = (f"{row['singles_delta_ce']:+.4f}", f"{row['excess_delta_ce']:+.4f}") if part != "alone" else ("", "")
            predictions.add_row(words if number == 0 else "", write_layers(row["layers"]), *cells, *sums)
    stream = RichTable(title="The residual stream after each decoder layer, all in place")
    for heading in _STREAM:
        stream.add_column(heading, justify="left" if heading == "layer" else "right")
    for row in result["stream"]:
        own = "" if row["own_error"] is None else f"{row['own_error']:.5f}"
        cells = (value_of(row, "error", ".5f"), range_of(row, "error", ".5f"), value_of(row, "fvu", ".5f"))
        stream.add_row(str(row["layer"]), *cells, own)
    return [predictions, stream, Text(f"{result['verdict']}\n\n{growth_legend()}")]


def growth_legend() -> str:
    """What the columns of both tables say."""
    return legend((*_PREDICTIONS, *_STREAM), EXPLAINED | WORDS, more="")
