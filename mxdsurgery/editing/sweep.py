"""``sweep``: the exact effect of ablating each expert of a layer alone, for all of them.

An expert changes nothing before it first fires in a context, nothing below its layer, and in its layer only the block's
output, by ``a_n c_n * m``. So each context runs once unedited; the states from which later passes can start are kept, and
many copies of the context, each without one expert, run from there on. Each expert is measured on a few of its contexts, drawn
at random, and its sums are scaled up to all of them: unbiased estimates, exact where all its contexts were measured.

Shapes: B contexts at a time, G of them kept together, R pairs of an expert and a context, T tokens, D width, N experts, K
active, V vocabulary.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from transformers import DynamicCache

from mxdsurgery.base.activations import record_activations
from mxdsurgery.base.decoder import vocabulary_size
from mxdsurgery.base.running import hooked, own_code_named
from mxdsurgery.base.surgery import resumed_at
from mxdsurgery.catalogue.experts import layers_with_experts, recorded_coefficients
from mxdsurgery.checkpoint.writing import check_file, write_json
from mxdsurgery.editing.held import SweepBytes
from mxdsurgery.editing.predictions import Opened, open_on_text, prediction_shifts, widened
from mxdsurgery.errors import UnsupportedBlockError
from mxdsurgery.hardware.guard import guarded
from mxdsurgery.layers.layer import Coefficients
from mxdsurgery.terminal.console import ProgressLine, Reporter, size
from mxdsurgery.terminal.figures import legend
from mxdsurgery.text.sources import token_strings

# Counts of (expert, token) are merged whenever so many more have come in.
_COUNTS = 2**20

# What the columns say.
WORDS = {
    "fires on": "the share of the text's tokens",
    "contexts measured": "out of those in which it fires",
    "KL per 1,000": "how much predictions change against the unedited model's: nats per 1,000 predictions of the text, scaled "
    "up from the contexts that were measured",
    "± error": "the standard error that comes of it",
    "ΔCE per 1,000": "how much worse (above 0) predictions get, in the same unit",
    "KL per firing": "nats for each token that it fires on",
}


@guarded
def sweep(
    folder: str | Path,
    *,
    layer: int,
    data: str | None = None,
    tokens: int | None = None,
    text_column: str | None = None,
    contexts_per_expert: int = 4,
    batch: int | None = None,
    seed: int = 0,
    device: str | None = None,
    compute: str = "float32",
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Ranks all experts of a layer by what ablating each one alone does to next-token predictions.

    Args:
        folder: what ``convert`` or ``edit`` wrote.
        layer: the layer of the experts; negative: counted from the model's end.
        data: the text; default: the recipe's held-out text.
        tokens: how many of its tokens; default: the recipe's ``eval_tokens``.
        text_column: column or field with the text; default: the recipe's.
        contexts_per_expert: an expert that fires in more contexts is measured on so many of them, drawn at random.
        batch: tokens per forward pass; default: the recipe's.
        seed: of the draw.
        device: ``auto``, ``cpu``, ``cuda``, ``mps`` or ``xpu``; default: the recipe's.
        compute: dtype to compute in; see `effect`.
        trust_remote_code: run the code that came with the base model, where it has its own; see `load`.
        reporter: where progress is reported; default: nowhere.

    Returns:
        A JSON object, kept in the folder as ``effects/sweep-layer<layer>.json``. ``experts``: those that fire on the text, by
        falling KL, each with ``fired`` (tokens, position 0 left out) and ``frequency``; in how many ``contexts`` it fires and
        on how many it was ``measured``; ``kl`` (unedited ‖ ablated), its standard error ``kl_error`` (0 where all contexts
        were measured, None where it is not known), and ``delta_ce``, in nats per 1,000 predictions of the text;
        ``kl_per_firing`` and ``delta_ce_per_firing`` in nats; the ``token`` on which it fires most often and that token's
        ``share`` of its firings. ``never_fired``: how many others there are.

    Raises:
        NotConvertedError: the folder is not one of ours.
        LayerSelectionError: it has no experts in that layer.
        DataError: the text cannot be read or is too short.
        OutputError: the result cannot be kept in the folder.
        MemoryBudgetError: what it holds beside the model does not fit.
        UnsupportedBlockError: a pass of the model cannot start at a layer in the middle.
    """
    reporter = reporter or Reporter()
    check_file(Path(folder) / "effects" / "sweep.json")
    opened = open_on_text(
        folder,
        data=data,
        tokens=tokens,
        text_column=text_column,
        device=device,
        compute=compute,
        trust_remote_code=trust_remote_code,
    )
    opened = dataclasses.replace(opened, batch=batch or opened.batch)
    (index,) = layers_with_experts(opened.converted, str(layer))
    draw, held = torch.Generator().manual_seed(seed), SweepBytes.of(opened, index)
    held.check(opened.batch, opened.model.device.type)
    reporter.say(
        f"memory     {size(held.peak(opened.batch))} beside the model, for {held.contexts(opened.batch)} contexts at a time"
    )
    with reporter.progress("read", "contexts") as line:
        survey = survey_layer(opened, index, contexts_per_expert, draw, line)
    with reporter.progress("sweep", "pairs") as line:
        sums = ablate_each(opened, index, survey, line)
    rests_on = opened.rests_on() | {"layer": index, "seed": seed, "contexts_per_expert": contexts_per_expert}
    rows = _ranked(survey, sums, rests_on["tokens"], rests_on["sequences"] * (rests_on["context"] - 1))
    ids = sorted({row["token"] for row in rows} - {None})
    text = dict(zip(ids, token_strings(opened.converted.tokenizer(), ids), strict=True))
    for row in rows:
        row["token"] = text.get(row["token"])
    result = rests_on | {"never_fired": len(survey.fired) - len(rows), "pairs": int(sums.measured.sum()), "experts": rows}
    write_json(Path(folder) / "effects" / f"sweep-layer{index}.json", result)
    return result


@dataclass
class Survey:
    """Where the experts of a layer fire, and where each of them is to be measured.

    Attributes:
        fired: on how many tokens each expert fires, position 0 left out, (N,) int64.
        contexts: in how many contexts, position 0 included, (N,) int64.
        token: the token on which it fires most often, (N,) int64; -1 for none.
        token_fired: how often it fires on that token, (N,) int64.
        expert, context, first: the pairs to measure, (P,) int64 each, by context; ``first`` is where the expert fires first.
    """

    fired: Tensor
    contexts: Tensor
    token: Tensor
    token_fired: Tensor
    expert: Tensor
    context: Tensor
    first: Tensor


@torch.no_grad()
def survey_layer(opened: Opened, layer: int, most: int, draw: torch.Generator, line: ProgressLine) -> Survey:
    """Runs the text up to the layer, and draws for each expert up to ``most`` of the contexts in which it fires."""
    module = opened.converted.layers[layer]
    block = next(block for block in opened.converted.plan.blocks if block.layer == layer)
    n, context = module.gate.n_experts, opened.input_ids.shape[1]
    vocabulary = vocabulary_size(opened.model)
    fired, contexts = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
    # Per expert the contexts with the smallest random keys so far: a sample in which all contexts are equally likely.
    key, chosen, first = torch.full((n, most), torch.inf), torch.zeros(n, most).long(), torch.zeros(n, most).long()
    counts, done = _Counts(), 0
    for ids in opened.batches():
        a = module.coefficients(record_activations(opened.model, [block], ids)[layer].x)
        row, position, slot = (part.cpu() for part in (a.values > 0).nonzero(as_tuple=True))
        expert = a.indices.cpu()[row, position, slot]
        counted = position > 0
        fired += torch.bincount(expert[counted], minlength=n)
        counts.add(expert[counted] * vocabulary + ids.cpu()[row, position][counted])
        earliest = torch.full((n, len(ids)), context).flatten()
        earliest = earliest.scatter_reduce(0, expert * len(ids) + row, position, "amin").view(n, len(ids))
        contexts += (earliest < context).sum(1)
        offered = torch.rand(n, len(ids), generator=draw).masked_fill(earliest == context, torch.inf)
        key, order = torch.cat([key, offered], 1).topk(most, largest=False)
        numbers = torch.arange(done, done + len(ids)).expand(n, -1)
        chosen = torch.cat([chosen, numbers], 1).gather(1, order)
        first = torch.cat([first, earliest], 1).gather(1, order)
        done += len(ids)
        line.update(done, len(opened.input_ids))
    experts, slots = (key < torch.inf).nonzero(as_tuple=True)
    by_context = chosen[experts, slots].argsort(stable=True)
    experts, slots = experts[by_context], slots[by_context]
    token, token_fired = counts.largest(n, vocabulary)
    return Survey(fired, contexts, token, token_fired, experts, chosen[experts, slots], first[experts, slots])


class _Counts:
    """Counts how often each of many integer codes occurs; memory grows with the distinct ones only."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor]] = []
        self.held, self.limit = 0, _COUNTS

    def add(self, codes: Tensor) -> None:
        """Takes in codes (n,)."""
        self.parts.append(codes.unique(return_counts=True))
        self.held += len(self.parts[-1][0])
        if self.held > self.limit:
            self._add_up()
            self.limit = 2 * self.held + _COUNTS  # so that merging stays cheap compared with counting

    def _add_up(self) -> None:
        codes, counts = (torch.cat(part) for part in zip(*self.parts, strict=True))
        codes, place = codes.unique(return_inverse=True)
        self.parts = [(codes, torch.zeros_like(codes).index_add(0, place, counts))]
        self.held = len(codes)

    def largest(self, groups: int, size: int) -> tuple[Tensor, Tensor]:
        """Of codes ``group * size + item``: each group's most frequent item, -1 for none, and its count: (groups,) each."""
        self._add_up()
        (codes, counts) = self.parts[0]
        rank = counts * size + (size - 1 - codes % size)  # of two equally frequent items, the smaller
        best = torch.full((groups,), -1).scatter_reduce(0, codes // size, rank, "amax")
        return torch.where(best < 0, -1, size - 1 - best % size), torch.where(best < 0, 0, best // size)


@dataclass
class Sums:
    """Sums over the measured pairs of each expert: (N,) float64 each, in nats over the scored predictions.

    Attributes:
        measured: the number of contexts.
        delta_ce: the sum of ΔCE.
        kl: the sum of KL.
        kl_squares: the sum of the squares of each context's KL.
    """

    measured: Tensor
    delta_ce: Tensor
    kl: Tensor
    kl_squares: Tensor

    def add(self, expert: Tensor, delta_ce: Tensor, kl: Tensor) -> None:
        """Adds pairs: (R,) each."""
        for held, values in (
            (self.measured, torch.ones_like(kl)),
            (self.delta_ce, delta_ce),
            (self.kl, kl),
            (self.kl_squares, kl.square()),
        ):
            held.index_add_(0, expert, values)


@torch.no_grad()
def ablate_each(opened: Opened, layer: int, survey: Survey, line: ProgressLine) -> Sums:
    """Measures, for all pairs of a survey, what ablating only that expert does in that context."""
    held = SweepBytes.of(opened, layer)
    sums = Sums(*(torch.zeros(len(survey.fired), dtype=torch.float64) for _ in range(4)))
    done, midway = 0, None
    contexts = survey.context.unique_consecutive()
    groups = contexts.split(held.contexts(opened.batch)) if len(contexts) else ()
    for group in groups:
        run = _Unedited(opened, layer, opened.input_ids[group.to(opened.input_ids.device)])
        midway = run.resumes_midway() if midway is None else midway
        mine = slice(*torch.searchsorted(survey.context, torch.stack([group[0], group[-1] + 1])).tolist())
        by_first = survey.first[mine].argsort(stable=True)
        expert, first = survey.expert[mine][by_first], survey.first[mine][by_first]
        row = torch.searchsorted(group, survey.context[mine][by_first])
        at = 0
        while at < len(expert):
            start = int(first[at]) if midway else 0
            some = slice(at, at + held.pairs(opened.batch, start))
            sums.add(expert[some], *run.without(expert[some], row[some], first[some], start))
            at += len(expert[some])
            line.update(done + at, len(survey.expert))
        done += at
    return sums


class _Unedited:
    """Some contexts run through the unedited model; keeps all that passes without one expert of a layer start from.

    Args:
        opened: the model.
        layer: the layer of the experts.
        ids: the contexts, (G, T).
    """

    def __init__(self, opened: Opened, layer: int, ids: Tensor) -> None:
        self.model, self.layer, self.ids = opened.model, layer, ids
        decoder, self.module = opened.decoder, opened.converted.layers[layer]
        calls: dict[nn.Module, list[tuple[bool, Any]]] = {}

        def keep(module: nn.Module, _args: Any, output: Any) -> None:
            calls.setdefault(module, []).append((layer in seen, output))

        modules = (*decoder[max(0, layer - 1) : layer], *decoder[layer].children(), self.module)
        cache = DynamicCache()
        hooks = [module.register_forward_hook(keep) for module in {*modules}]
        with hooked(*hooks), recorded_coefficients(opened.converted, [layer]) as seen:
            with own_code_named(self.model, "a sweep needs past_key_values, use_cache and logits_to_keep"):
                logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        # The first tells the length of the past; other layers below do not run again.
        self.cached = [(i, held.keys, held.values) for i, held in enumerate(cache.layers) if i == 0 or i >= layer]
        ((_, y),) = calls.pop(self.module)
        a, m = seen[layer]
        self.flat = y.ndim == 2  # some families flatten (B, T) before the block
        shaped = (*ids.shape, -1)
        self.y, self.m = y.reshape(shaped), None if m is None else m.reshape(shaped)
        self.a = Coefficients(a.values.reshape(shaped), a.indices.reshape(shaped))
        below = [calls.pop(module)[0][1] for module in decoder[max(0, layer - 1) : layer]] * layer
        # What the layer computes before its block, such as attention, is the same without an expert: it is not computed again.
        # A module that is called again after the block (a dropout, say) must be.
        before = {}
        for module, ((after, output), *again) in calls.items():
            if not after and not again and self._by_token(output):
                before[module] = output
        self.modules = [*decoder[:layer], *before, self.module]
        self.outputs = [*below, *before.values()]
        self.logits = widened(logits[:, 1:-1])  # of the scored predictions
        self.p = self.logits.softmax(-1)

    def _by_token(self, output: Any) -> bool:
        first = output[0] if isinstance(output, tuple) else output
        return isinstance(first, Tensor) and first.shape[:2] == self.ids.shape

    def resumes_midway(self) -> bool:
        """Whether passes can begin in the middle of a context, on cached keys and values: tested with one that edits nothing.

        Raises:
            UnsupportedBlockError: not even passes over whole contexts can begin at the layer.
        """
        rows = torch.arange(len(self.ids), device=self.ids.device)
        for start in (self.ids.shape[1] // 2, 0):
            again = widened(self._resumed(self.y[:, start:], rows, start))
            wanted = self.logits[:, max(start, 1) - 1 :]
            # A median, because rounding may change the choice of experts here and there.
            if (again - wanted).abs().median() <= torch.finfo(self.y.dtype).eps ** 0.5 * wanted.std():
                return start > 0
        raise UnsupportedBlockError(
            f"{type(self.model).__name__}: run again from layer {self.layer} on, it does not give the same predictions",
            expected="decoder layers that depend on nothing but what they are given",
        )

    def without(self, expert: Tensor, row: Tensor, first: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """What ablating one expert does, for pairs (R,) of experts and contexts.

        Args:
            expert: (R,).
            row: the pair's context, as its row of ``ids``, (R,).
            first: where the expert first fires in it, (R,).
            start: no pass begins before this position, and no expert fires before it.

        Returns:
            ΔCE and KL summed over the context's scored predictions, (R,) float64 each.
        """
        sums = torch.zeros(2, len(expert), dtype=torch.float64)
        if start < self.ids.shape[1] - 1:  # nothing follows what the last position predicts
            n, rows = expert.to(self.ids.device), row.to(self.ids.device)
            values, indices = self.a.values[rows, start:], self.a.indices[rows, start:]
            said = (values * (indices == n[:, None, None])).sum(-1, keepdim=True).to(self.y.dtype)  # (R, T, 1)
            said = said if self.m is None else said * self.m[rows, start:]
            logits = self._resumed(self.y[rows, start:] - self.module.experts.term(n, said), rows, start)
            for number, (context, changes) in enumerate(zip(row.tolist(), first.tolist(), strict=True)):
                changes = max(changes, 1)
                before, p = self.logits[context, changes - 1 :], self.p[context, changes - 1 :]
                after = widened(logits[number, changes - max(start, 1) :])
                shifts = prediction_shifts(before, after, self.ids[context, changes + 1 :], p)
                sums[:, number] = torch.stack(shifts).cpu().double().sum(1)
        return sums[0], sums[1]

    def _resumed(self, y: Tensor, rows: Tensor, start: int) -> Tensor:
        """The scored predictions' logits from ``start`` on, with outputs y (R, T, D) of the block in the contexts ``rows``."""
        past = None
        if start:
            past = DynamicCache()
            for index, keys, values in self.cached:
                past.update(keys[rows, :, :start], values[rows, :, :start], index)
        outputs = [_of_rows(output, rows, start) for output in self.outputs]
        outputs.append(y.flatten(0, 1) if self.flat else y)
        scored = torch.arange(max(start, 1), self.ids.shape[1] - 1, device=y.device) - start
        with resumed_at(self.modules, len(self.modules), outputs):
            given = {"input_ids": self.ids[rows, start:], "past_key_values": past, "use_cache": past is not None}
            with own_code_named(self.model, "a sweep needs past_key_values, use_cache and logits_to_keep"):
                return self.model(**given, logits_to_keep=scored).logits


def _of_rows(output: Any, rows: Tensor, start: int) -> Any:
    if isinstance(output, tuple):  # the rest of what attention returns is not used
        return (output[0][rows, start:], *(None for _ in output[1:]))
    return output[rows, start:]


def _ranked(survey: Survey, sums: Sums, tokens: int, counted: int) -> list[dict[str, Any]]:
    """The experts that fire, by falling KL."""
    rows = []
    for expert in (survey.contexts > 0).nonzero()[:, 0].tolist():
        fired, contexts, measured = (int(x[expert]) for x in (survey.fired, survey.contexts, sums.measured))
        kl, delta_ce = (contexts / measured * x[expert].item() for x in (sums.kl, sums.delta_ce))
        error = 0.0 if measured == contexts else None
        if 1 < measured < contexts:
            mean = sums.kl[expert].item() / measured
            variance = max(0.0, sums.kl_squares[expert].item() / measured - mean**2) * measured / (measured - 1)
            error = contexts * ((1 - measured / contexts) * variance / measured) ** 0.5
        rows.append(
            {
                "expert": expert,
                "fired": fired,
                "frequency": fired / counted,
                "contexts": contexts,
                "measured": measured,
                "kl": 1000 * kl / tokens,
                "kl_error": None if error is None else 1000 * error / tokens,
                "delta_ce": 1000 * delta_ce / tokens,
                "kl_per_firing": kl / fired if fired else None,
                "delta_ce_per_firing": delta_ce / fired if fired else None,
                "token": int(survey.token[expert]) if fired else None,
                "share": int(survey.token_fired[expert]) / fired if fired else None,
            }
        )
    return sorted(rows, key=lambda row: -row["kl"])


def sweep_table(result: dict[str, Any], top: int = 20) -> Table:
    """For a terminal: the ``top`` experts with the largest effect."""
    rows = result["experts"]
    firing = f"{len(rows):,} of {len(rows) + result['never_fired']:,} experts fire on them"
    title = f"Layer {result['layer']}, each expert ablated alone, on {result['tokens']:,} predictions; {firing}"
    table = Table("expert", title=title, caption_justify="left")
    for heading in WORDS:
        table.add_column(heading, justify="right")
    table.caption = legend(WORDS, WORDS, "Position 0 is left out.")
    table.add_column("fires most at")
    for row in rows[:top]:
        cells = [f"{row['frequency']:.2%}", f"{row['measured']} of {row['contexts']}", f"{row['kl']:.4g}"]
        cells += ["?" if row["kl_error"] is None else f"{row['kl_error']:.2g}", f"{row['delta_ce']:+.4g}"]
        cells.append("-" if row["kl_per_firing"] is None else f"{row['kl_per_firing']:.2g}")
        often = "position 0" if row["token"] is None else f"{row['token']!r} ({row['share']:.0%})"
        table.add_row(str(row["expert"]), *cells, escape(often))
    return table
