"""``effect``: what edits of experts do to a model's predictions on a text, and whether other experts' edits do as much.

The model runs unedited, edited, and with the same edits on experts drawn at random that fire about as often. If these controls
change as much, the figure says nothing about the experts that were meant. Shapes: B batch, T tokens, V vocabulary, N experts,
K active; n predictions.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.markup import escape
from rich.table import Table as RichTable
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mxdsurgery.base.activations import record_activations
from mxdsurgery.base.running import hooked, logits_of
from mxdsurgery.base.surgery import resumed_at
from mxdsurgery.catalogue.experts import recorded_coefficients
from mxdsurgery.editing.edits import Edits, check_for
from mxdsurgery.editing.predictions import Opened, open_on_text, prediction_shifts, widened
from mxdsurgery.errors import EditError
from mxdsurgery.hardware.guard import guarded
from mxdsurgery.layers.layer import Coefficients
from mxdsurgery.measuring.intervals import Table, with_interval
from mxdsurgery.measuring.usage import firings
from mxdsurgery.terminal.console import ProgressLine, Reporter
from mxdsurgery.terminal.figures import legend, value_of, with_range
from mxdsurgery.text.sources import token_strings

# How many tokens are shown before a prediction.
_SHOWN = 12
# A control is drawn among so many experts, those with the nearest firing frequencies.
_NEAREST = 20
# How many edited experts a line names.
_LISTED = 8

# Which predictions: all of them, those made at tokens where an edited expert fires, and those where none does.
PARTS = ("all", "firing", "silent")

_FORMS = {"delta_ce": "+.3g", "kl": ".3g"}
# What the columns of figures say.
WORDS = {
    "ΔCE": "nats per token that next-token prediction got worse by (below 0: better)",
    "KL": "how much predictions changed, in nats per token",
    "same top-1": "how often the likeliest next token stayed the same",
}
_RANGES = "In brackets: 95 % intervals over contexts."
_OTHERS = "Other experts: the same edits on experts drawn at random that fire about as often; in brackets, from least to most."


@guarded
def effect(
    folder: str | Path,
    *,
    edits: Edits,
    data: str | None = None,
    tokens: int | None = None,
    text_column: str | None = None,
    controls: int = 5,
    top: int = 20,
    seed: int = 0,
    device: str | None = None,
    compute: str = "float32",
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Measures what edits do to next-token predictions, and what the same edits of other experts do.

    Args:
        folder: what ``convert`` or ``edit`` wrote; it is left as it is.
        edits: what to do.
        data: the text; default: the recipe's held-out text.
        tokens: how many of its tokens; default: the recipe's ``eval_tokens``.
        text_column: column or field with the text; default: the recipe's.
        controls: how many times the same edits are made to other experts, drawn at random among the 20 of the same layer
            whose firing frequency is nearest; for an expert that never fired, among others that never did, if there are any.
        top: how many predictions, and how many next tokens, are listed.
        seed: of the controls.
        device: ``auto``, ``cpu``, ``cuda``, ``mps`` or ``xpu``; default: the recipe's.
        compute: dtype to compute in. bfloat16 takes half the memory, but rounds more than most single experts do; ``auto``: as
            stored, or float32 where that is faster on this device.
        trust_remote_code: run the code that came with the base model, where it has its own; see `load`.
        reporter: where progress is reported; default: nowhere.

    Returns:
        A JSON object. ``all``, ``firing`` and ``silent`` (predictions made at tokens where one of the edited experts fires in
        the unedited model, or none): ``tokens``, ``delta_ce`` and ``kl`` (unedited ‖ edited) in nats per prediction with 95 %
        intervals over contexts, ``top1_agreement``; ``rose`` and ``fell``: next tokens by the change of their mean
        probability. ``experts``: on how many tokens each edited one fired. ``controls``: each draw's experts and figures.
        ``predictions``: the most changed ones, by KL. Position 0 of every context is left out.

    Raises:
        NotConvertedError: the folder is not one of ours.
        EditError: there are no edits, they do not fit this model, they make its predictions NaN or infinite, or no other
            experts are left to compare with.
        DataError: the text cannot be read or is too short.
    """
    reporter = reporter or Reporter()
    if not edits:
        raise EditError(
            "no edits were given",
            expected="an edit",
            fix="give --edits, or --ablate, or --drop, or --scale, or --steer, or --clamp",
        )
    text = {"data": data, "tokens": tokens, "text_column": text_column}
    opened = open_on_text(folder, **text, device=device, compute=compute, trust_remote_code=trust_remote_code)
    check_for(edits, opened.converted)
    with reporter.progress("effect", "passes") as line:
        step = _steps(line, len(opened.batches()) * (3 + controls))
        fired = _firings(opened, edits.layers, step)
        draw = torch.Generator().manual_seed(seed)
        others = [draw_control(edits, fired, draw) for _ in range(controls)]
        record, drawn = _measure(opened, edits, others, top, step)
    rests_on = opened.rests_on()
    counted = rests_on["sequences"] * (rests_on["context"] - 1)
    return rests_on | {
        "edits": edits.to_dict(),
        "words": edits.words(),
        "experts": [
            {"layer": layer, "expert": expert, "fired": int(fired[layer][expert]), "of": counted}
            for layer in edits.layers
            for expert in edits.experts(layer)
        ],
        **record.figures(opened.converted.tokenizer(), top),
        "controls": _compared(others, fired, drawn, rests_on["tokens"]),
    }


def _steps(line: ProgressLine, total: int) -> Callable[[], None]:
    count = itertools.count(1)
    return lambda: line.update(next(count), total)


@torch.no_grad()
def _firings(opened: Opened, layers: list[int], step: Callable[[], None]) -> dict[int, Tensor]:
    """On how many tokens each expert of some layers fires, position 0 left out: (N,) each. The pass stops after them."""
    converted = opened.converted
    blocks = [block for block in converted.plan.blocks if block.layer in layers]
    fired = {layer: torch.zeros(converted.layers[layer].gate.n_experts, dtype=torch.int64) for layer in layers}
    for ids in opened.batches():
        for layer, (x, _) in record_activations(opened.model, blocks, ids).items():
            fired[layer] += firings(converted.layers[layer], x[:, 1:]).cpu()
        step()
    return fired


def draw_control(edits: Edits, fired: dict[int, Tensor], draw: torch.Generator) -> Edits:
    """The same edits of other experts, each drawn among those whose log firing frequency is nearest.

    Args:
        edits: the edits; sources of copies stay, and are not drawn.
        fired: by layer, on how many tokens each expert fires, (N,).
        draw: the random number generator.

    Raises:
        EditError: a layer has fewer other experts than edited ones.
    """
    chosen: dict[tuple[int, int], int] = {}
    for layer in edits.layers:
        count = fired[layer]
        free = torch.ones(len(count), dtype=torch.bool)
        free[edits.experts(layer) + list(edits.copy.get(layer, {}).values())] = False
        log = count.double().clamp_min(0.5).log()
        for expert in edits.experts(layer):
            alike = free & ((count > 0) == (count[expert] > 0))
            pool = (alike if alike.any() else free).nonzero()[:, 0]
            if len(pool) == 0:
                raise EditError(
                    f"layer {layer} has no experts left to compare {len(edits.experts(layer))} edited ones with",
                    expected="at least as many others",
                    fix="edit fewer, or compare with none: --controls 0",
                )
            pool = pool[torch.randperm(len(pool), generator=draw)]  # so that ties are broken at random
            nearest = pool[(log[pool] - log[expert]).abs().argsort(stable=True)[:_NEAREST]]
            other = nearest[torch.randint(len(nearest), (), generator=draw)].item()
            chosen[layer, expert] = other
            free[other] = False
    return edits.with_experts(lambda layer, expert: chosen[layer, expert])


@torch.no_grad()
def _measure(
    opened: Opened, edits: Edits, others: list[Edits], top: int, step: Callable[[], None]
) -> tuple["_Record", list[dict[str, float]]]:
    """A pass over the text unedited, one edited, one with each control; all but the first begin at the first edited layer."""
    model, decoder, first = opened.model, opened.decoder, edits.layers[0]
    edited = {layer: torch.tensor(edits.experts(layer), device=model.device) for layer in edits.layers}
    record = _Record(edited, top, model.get_output_embeddings().weight.shape[0])
    drawn = [{"delta_ce": 0.0, "kl": 0.0} for _ in others]
    for ids in opened.batches():
        original, outputs, a = _unedited(opened, edits.layers, ids)
        step()
        for number, variant in enumerate([edits, *others]):
            with variant.live(model), resumed_at(decoder, first, outputs):
                changed = logits_of(model, ids)
            if number == 0:
                record.add(ids, original, changed, a)
            else:
                for _, delta_ce, kl in _rows(ids, original, changed):
                    drawn[number - 1]["delta_ce"] += delta_ce.cpu().double().sum().item()
                    drawn[number - 1]["kl"] += kl.cpu().double().sum().item()
            step()
    return record, drawn


def _unedited(opened: Opened, layers: list[int], ids: Tensor) -> tuple[Tensor, list[object], dict[int, Coefficients]]:
    """Logits (B, T, V), what the decoder layers below ``layers`` give, and by layer the coefficients (B, T, K)."""
    below, outputs = opened.decoder[: layers[0]], []
    hooks = [layer.register_forward_hook(lambda _m, _a, output: outputs.append(output)) for layer in below]
    with hooked(*hooks), recorded_coefficients(opened.converted, layers) as seen:
        logits = logits_of(opened.model, ids)
    a = {layer: Coefficients(*(part.reshape(*ids.shape, -1) for part in seen[layer][0])) for layer in layers}
    return logits, outputs, a


def _rows(ids: Tensor, original: Tensor, changed: Tensor) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """The scored predictions of one context at a time, as V may be large: ``before, after, p, next_ids``; ΔCE; KL."""
    for row_ids, before, after in zip(ids, original, changed, strict=True):
        before, after, next_ids = widened(before[1:-1]), widened(after[1:-1]), row_ids[2:]
        p = before.softmax(-1)
        delta_ce, kl = prediction_shifts(before, after, next_ids, p)
        if not kl.isfinite().all():
            raise EditError("the edited model's predictions are no numbers any more", fix="edit with smaller numbers")
        yield (before, after, p, next_ids), delta_ce, kl


class _Record:
    """What is kept of the edited model's predictions, batch by batch.

    Args:
        edited: by layer, the edited experts.
        top: how many predictions are kept.
        vocabulary: V.
    """

    def __init__(self, edited: dict[int, Tensor], top: int, vocabulary: int) -> None:
        self.edited, self.top = edited, top
        self.table = Table()
        # The probability of each next token, summed over the predictions of a part: unedited and edited.
        self.mass = {part: torch.zeros(2, vocabulary, dtype=torch.float64) for part in ("all", "firing")}
        self.most: list[dict[str, Any]] = []
        self.contexts = 0

    def add(self, ids: Tensor, original: Tensor, changed: Tensor, a: dict[int, Coefficients]) -> None:
        """Takes in a batch: ids (B, T), logits (B, T, V), and the edited layers' coefficients (B, T, K), unedited."""
        mine = {layer: torch.isin(a[layer].indices, self.edited[layer]) & (a[layer].values > 0) for layer in a}
        firing = torch.stack([fires.any(-1) for fires in mine.values()]).any(0)  # (B, T)
        for row, ((before, after, p, next_ids), delta_ce, kl) in enumerate(_rows(ids, original, changed)):
            q = after.softmax(-1)
            fires = firing[row, 1:-1]
            self.mass["all"] += torch.stack([p.sum(0), q.sum(0)]).cpu()
            self.mass["firing"] += torch.stack([p[fires].sum(0), q[fires].sum(0)]).cpu()
            figures = {
                "ce": F.cross_entropy(before, next_ids, reduction="none"),
                "delta_ce": delta_ce,
                "kl": kl,
                "agree": before.argmax(-1) == after.argmax(-1),
                "tokens": torch.ones_like(kl),
            }
            for part, chosen in zip(PARTS, (torch.ones_like(fires), fires, ~fires), strict=True):
                self.table.add(part, {name: value[chosen].cpu().double().sum()[None] for name, value in figures.items()})
            for place in kl.topk(min(self.top, len(kl))).indices.tolist():
                if kl[place] <= (self.most[-1]["kl"] if len(self.most) == self.top else 0):
                    break
                entry = _prediction(ids[row], place + 1, before[place], after[place])
                there = {layer: (a[layer], mine[layer][row, place + 1]) for layer in a}
                entry["experts"] = [
                    {"layer": layer, "expert": expert, "coefficient": coefficient}
                    for layer, (of, which) in there.items()
                    for expert, coefficient in zip(
                        of.indices[row, place + 1][which].tolist(), of.values[row, place + 1][which].tolist(), strict=True
                    )
                ]
                entry |= {"kl": kl[place].item(), "context": self.contexts + row}
                self.most = sorted([*self.most, entry], key=lambda one: -one["kl"])[: self.top]
        self.contexts += len(ids)

    def figures(self, tokenizer: PreTrainedTokenizerBase, top: int) -> dict[str, Any]:
        """All figures, with intervals, and tokens as text."""
        columns = self.table.columns()
        result: dict[str, Any] = {"original": with_interval("ce", columns["all.ce"], columns["all.tokens"])}
        for part in PARTS:
            result[part] = {"tokens": int(columns[f"{part}.tokens"].sum())}
            for name, column in (("delta_ce", "delta_ce"), ("kl", "kl"), ("top1_agreement", "agree")):
                result[part] |= with_interval(name, columns[f"{part}.{column}"], columns[f"{part}.tokens"])
        for part, mass in self.mass.items():
            result[part] |= _moved(mass / max(1, result[part]["tokens"]), top)
        result["predictions"] = self.most
        _put_strings(result, tokenizer)
        return result


def _prediction(ids: Tensor, position: int, before: Tensor, after: Tensor) -> dict[str, Any]:
    """One prediction, tokens as ids: made at a position of a context (T,), with logits (V,) before and after."""
    log_p, log_q = before.log_softmax(-1), after.log_softmax(-1)
    entry: dict[str, Any] = {"position": position, "text": ids[max(0, position + 1 - _SHOWN) : position + 1].tolist()}
    entry |= {"next": ids[position + 1].item()}
    for when, log in (("before", log_p), ("after", log_q)):
        entry[f"logprob_{when}"] = log[ids[position + 1]].item()
        entry[f"likeliest_{when}"] = {"token": log.argmax().item(), "probability": log.max().exp().item()}
    return entry


def _moved(mean: Tensor, top: int) -> dict[str, list[dict[str, Any]]]:
    """The next tokens whose mean probability changed most, tokens as ids: (2, V), unedited and edited."""
    change = mean[1] - mean[0]
    found = {}
    for name, largest in (("rose", True), ("fell", False)):
        ids = change.topk(min(top, len(change)), largest=largest).indices
        ids = ids[change[ids] > 0] if largest else ids[change[ids] < 0]
        rows = zip(ids.tolist(), *mean[:, ids].tolist(), strict=True)
        found[name] = [{"token": token, "before": before, "after": after} for token, before, after in rows]
    return found


def _put_strings(result: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Replaces token ids by text, in place."""
    entries = [entry for part in ("all", "firing") for name in ("rose", "fell") for entry in result[part][name]]
    entries += [one[f"likeliest_{when}"] for one in result["predictions"] for when in ("before", "after")]
    places = [(entry, "token") for entry in entries] + [(one, "next") for one in result["predictions"]]
    for (entry, name), text in zip(places, token_strings(tokenizer, [e[n] for e, n in places]), strict=True):
        entry[name] = text
    for one in result["predictions"]:
        one["text"] = tokenizer.decode(one["text"], clean_up_tokenization_spaces=False)


def _compared(
    others: list[Edits], fired: dict[int, Tensor], drawn: list[dict[str, float]], tokens: int
) -> dict[str, Any] | None:
    """The controls' figures in nats per prediction, their mean and range."""
    if not others:
        return None
    draws = []
    for other, sums in zip(others, drawn, strict=True):
        experts = {str(layer): other.experts(layer) for layer in other.layers}
        on = sum(int(fired[layer][other.experts(layer)].sum()) for layer in other.layers)
        draws.append({"experts": experts, "fired": on} | {name: total / tokens for name, total in sums.items()})
    figures: dict[str, Any] = {"draws": draws}
    for name in ("delta_ce", "kl"):
        values = [one[name] for one in draws]
        figures |= {name: sum(values) / len(values), f"{name}_range": [min(values), max(values)]}
    return figures


def effect_tables(result: dict[str, Any]) -> list[RichTable | str]:
    """For a terminal: the figures beside the controls', the next tokens that moved, the predictions that changed most."""
    counts = [f"{one['layer']}:{one['expert']} fires on {one['fired']:,}" for one in result["experts"] if one["fired"]]
    never = [f"{one['layer']}:{one['expert']}" for one in result["experts"] if not one["fired"]]
    lines = [*result["words"], *_shortened(counts, f" of {result['experts'][0]['of']:,} tokens")]
    if never:
        lines += _shortened(never, " never fires on this text: an edit that waits for it to fire does nothing here")
    if result["controls"] is not None:
        on = [one["fired"] for one in result["controls"]["draws"]]
        lines.append(f"other experts edited alike, {len(on)} times over, fire {min(on):,} to {max(on):,} times")
    parts: list[RichTable | str] = [escape("\n".join(lines)), _figures_table(result)]
    where = "firing" if result["firing"]["tokens"] else "all"
    parts.append(_moved_table(result[where], "where an edited expert fires" if where == "firing" else "everywhere"))
    if result["predictions"]:
        parts.append(_predictions_table(result["predictions"]))
    return parts


def _shortened(items: list[str], rest: str) -> list[str]:
    """A line of some items."""
    if not items:
        return []
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ["experts " + ", ".join(items[:_LISTED]) + more + rest]


def _figures_table(result: dict[str, Any]) -> RichTable:
    ce = result["original"]["ce"]
    title = f"On {result['tokens']:,} predictions of {result['data']}; unedited cross-entropy {ce:.4f} nats per token"
    headings, others = ("tokens", "ΔCE", "KL", "same top-1"), result["controls"]
    ranges = _RANGES if others is None else f"{_RANGES} {_OTHERS}"
    table = RichTable("predictions", title=escape(title), caption=legend(headings, WORDS, ranges), caption_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right")
    for part, name in zip(PARTS, ("all", "where an edited expert fires", "where none fires"), strict=True):
        figures = result[part]
        cells = [escape(with_range(figures, key, form)) for key, form in _FORMS.items()]
        table.add_row(name, f"{figures['tokens']:,}", *cells, value_of(figures, "top1_agreement", ".2%"))
    if others is not None:
        table.add_section()
        ranges = {f"{key}_ci": others[f"{key}_range"] for key in _FORMS}
        cells = [escape(with_range(others | ranges, key, form)) for key, form in _FORMS.items()]
        table.add_row(f"all, other experts edited: mean of {len(others['draws'])}", f"{result['tokens']:,}", *cells, "")
    return table


def _moved_table(part: dict[str, Any], where: str) -> RichTable:
    title = f"Next tokens by their mean probability {where}"
    table = RichTable("rose", "from", "to", "fell", "from", "to", title=title)
    for rose, fell in itertools.zip_longest(part["rose"], part["fell"]):
        cells = []
        for one in (rose, fell):
            cells += (
                ["", "", ""] if one is None else [escape(repr(one["token"])), f"{one['before']:.3%}", f"{one['after']:.3%}"]
            )
        table.add_row(*cells)
    return table


def _predictions_table(predictions: list[dict[str, Any]]) -> RichTable:
    table = RichTable("KL", "text", "next", "its log-probability", "likeliest before", "and after", "coefficient")
    table.title = "The predictions that changed most"
    for one in predictions:
        likeliest = [one[f"likeliest_{when}"] for when in ("before", "after")]
        firing = ", ".join(f"{e['layer']}:{e['expert']} {e['coefficient']:.2f}" for e in one["experts"])
        table.add_row(
            f"{one['kl']:.3f}",
            escape(repr(one["text"])),
            escape(repr(one["next"])),
            f"{one['logprob_before']:.2f} to {one['logprob_after']:.2f}",
            *(escape(f"{found['token']!r} {found['probability']:.1%}") for found in likeliest),
            firing or "-",
        )
    return table
