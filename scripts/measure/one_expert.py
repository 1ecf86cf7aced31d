"""What one expert of a converted layer does: where it fires, when it is steered by, and to what the text labels.

single_experts.py measures with it. What is known of experts (how often each fires, how strongly, which tokens follow, what it
prefers) is known from one text, the training text; what changing them does is measured on another, held-out one. Position 0 of
each context is left out.

Shapes: S contexts, B of them at a time, T tokens, N experts, K active, V vocabulary, E examined experts; n predictions.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mxdsurgery.base.decoder import decoder_layers, vocabulary_size
from mxdsurgery.base.running import hooked, logits_of
from mxdsurgery.base.surgery import resumed_at
from mxdsurgery.catalogue.contexts import Corpus
from mxdsurgery.catalogue.experts import recorded_coefficients
from mxdsurgery.checkpoint.converted import Converted
from mxdsurgery.editing.edits import Edits
from mxdsurgery.editing.effect import draw_control
from mxdsurgery.editing.predictions import prediction_shifts, widened
from mxdsurgery.layers.layer import Coefficients
from mxdsurgery.measuring.intervals import with_interval

# Contexts per pass.
BATCH = 32
# An expert's own tokens: those that follow it more often than they do anywhere, so many of them.
OWN_TOKENS = 5
# A strength is accepted once its KL is so near to what is asked for, as a share of it.
_NEAR, _TRIES = 0.03, 30
_STRONGEST = 1e5
# Rates to which 1e-4 is added before they are compared: an expert that fires three times says little about what it prefers.
_RATE_FLOOR = 1e-4


class Pass(NamedTuple):
    """A pass of the model as it is: contexts (B, T), logits (B, T, V), outputs of the decoder layers below, coefficients."""

    ids: Tensor
    logits: Tensor
    below: list[object]
    a: Coefficients


class Shifts(NamedTuple):
    """What a change did to n predictions: their ΔCE and KL, (n,) each, and the changed logits, (n, V)."""

    delta_ce: Tensor
    kl: Tensor
    after: Tensor


@dataclass(frozen=True)
class LayerAtWork:
    """A converted model, of which one layer is changed; changed passes begin at that layer."""

    converted: Converted
    layer: int

    @property
    def n_experts(self) -> int:
        """N."""
        return self.converted.layers[self.layer].gate.n_experts

    def unedited(self, ids: Tensor) -> Pass:
        """Runs contexts (B, T)."""
        model, below = self.converted.model, []
        decoder = decoder_layers(model)[1][: self.layer]
        hooks = [module.register_forward_hook(lambda _m, _a, output: below.append(output)) for module in decoder]
        with hooked(*hooks), recorded_coefficients(self.converted, [self.layer]) as seen:
            logits = widened(logits_of(model, ids))
        a, _ = seen[self.layer]
        return Pass(ids, logits, below, Coefficients(*(part.reshape(*ids.shape, -1) for part in a)))

    def changed(self, run: Pass, change: AbstractContextManager, where: Tensor) -> Shifts:
        """Runs a pass again with a change; what it does to the predictions made at ``where``, (B, T) bool."""
        model = self.converted.model
        with change, resumed_at(decoder_layers(model)[1], self.layer, run.below):
            after = widened(logits_of(model, run.ids))[where]
        next_ids = run.ids.roll(-1, 1)[where]
        return Shifts(*prediction_shifts(run.logits[where], after, next_ids), after)

    @contextmanager
    def without_slots(self, slots: Tensor) -> Iterator[None]:
        """While open, these coefficients (B, T, K) of a batch are 0."""

        def zeroed(_module: Any, _args: Any, a: Coefficients) -> Coefficients:
            return Coefficients(a.values.masked_fill(slots.view_as(a.values), 0), a.indices)

        with hooked(self.converted.layers[self.layer].gate.register_forward_hook(zeroed)):
            yield

    @contextmanager
    def without_layer(self, where: Tensor) -> Iterator[None]:
        """While open, the layer's output is 0 at some places (B, T) of a batch."""

        def zeroed(_module: Any, _args: Any, y: Tensor) -> Tensor:
            return y.masked_fill(where.reshape(y.shape[:-1])[..., None], 0)

        with hooked(self.converted.layers[self.layer].register_forward_hook(zeroed)):
            yield


def scored(ids: Tensor) -> Tensor:
    """Which places (B, T) predict something and have a past."""
    where = torch.ones_like(ids, dtype=torch.bool)
    where[:, 0] = where[:, -1] = False
    return where


@dataclass(frozen=True)
class Firings:
    """Where experts fire in a text, and on what.

    Attributes:
        places: how many predictions were looked at.
        fired: on how many each expert fires, (N,).
        mean: its mean coefficient there, (N,).
        contexts: the contexts in which each fires, by expert.
        follows: how often each token follows it, (N, V); and anywhere, ``base`` (V,).
        labelled: by label, on how many of the labelled places it fires, (N,); and how many there are.
    """

    places: int
    fired: Tensor
    mean: Tensor
    contexts: dict[int, Tensor]
    follows: Tensor
    base: Tensor
    labelled: dict[str, tuple[Tensor, int]]

    @property
    def frequency(self) -> Tensor:
        """(N,)."""
        return self.fired / self.places

    def own_tokens(self, expert: int) -> Tensor:
        """At most `OWN_TOKENS` tokens that follow an expert more often than they do anywhere.

        They are those with the largest ``p(t | it fires) log(p(t | it fires) / p(t))``.
        """
        here, anywhere = self.follows[expert] / self.follows[expert].sum().clamp_min(1), self.base / self.base.sum()
        says = torch.where(here > 0, here * (here / anywhere.clamp_min(1e-12)).log(), 0)
        found = says.topk(OWN_TOKENS)
        return found.indices[found.values > 0]

    def preferring(self, label: str) -> Tensor:
        """All experts that fire, by falling ratio of how often they fire on labelled places and on others."""
        fired, labelled = self.labelled[label]
        others = (self.fired - fired) / (self.places - labelled)
        ratio = (fired / labelled + _RATE_FLOOR) / (others + _RATE_FLOOR)
        order = ratio.argsort(descending=True, stable=True)
        return order[self.fired[order] > 0]


@torch.no_grad()
def firings(work: LayerAtWork, corpus: Corpus, labels: dict[str, Tensor]) -> Firings:
    """Runs a text through the model; ``labels`` say which of its places (S, T) are labelled."""
    n, vocabulary = work.n_experts, vocabulary_size(work.converted.model)
    fired, total = torch.zeros(n), torch.zeros(n)
    follows, base = torch.zeros(n * vocabulary), torch.zeros(vocabulary)
    labelled = {label: torch.zeros(n) for label in labels}
    where_fired: list[Tensor] = []
    for start, run in passes(work, corpus):
        where = scored(run.ids)
        active = (run.a.values > 0) & where[..., None]
        row, _, _ = places = active.nonzero(as_tuple=True)
        expert, after = run.a.indices[active], run.ids.roll(-1, 1)[places[:2]]
        ones = torch.ones(len(expert))
        fired.index_add_(0, expert, ones)
        total.index_add_(0, expert, run.a.values[active].float())
        follows.index_add_(0, expert * vocabulary + after, ones)
        base += torch.bincount(run.ids.roll(-1, 1)[where], minlength=vocabulary)
        for label, which in labels.items():
            labelled[label].index_add_(0, expert, which[start : start + len(run.ids)][places[:2]].float())
        where_fired.append((expert * len(corpus.ids) + start + row).unique())
    codes = torch.cat(where_fired).sort().values
    experts, counts = (codes // len(corpus.ids)).unique_consecutive(return_counts=True)
    contexts = dict(zip(experts.tolist(), (codes % len(corpus.ids)).split(counts.tolist()), strict=True))
    every = scored(corpus.ids)
    return Firings(
        places=int(every.sum()),
        fired=fired,
        mean=total / fired.clamp_min(1),
        contexts=contexts,
        follows=follows.view(n, vocabulary),
        base=base,
        labelled={label: (labelled[label], int((which & every).sum())) for label, which in labels.items()},
    )


def passes(work: LayerAtWork, corpus: Corpus) -> Iterator[tuple[int, Pass]]:
    """Passes over a text, each with the number of its first context."""
    for start in range(0, len(corpus.ids), BATCH):
        yield start, work.unedited(corpus.ids[start : start + BATCH].long())


def drawn(known: Firings, there: Firings, band: tuple[float, float], count: int, least: int) -> list[int]:
    """Experts whose frequencies are spread over a band as those of any other layer: the nearest to each of ``count`` rates.

    Args:
        known: by which the frequency is known.
        there: on the text to measure on, where an expert has to fire ``least`` times.
        band: the lowest and the highest frequency.
        count: how many, if there are as many.
        least: see ``there``.
    """
    low, high = (math.log(end) for end in band)
    free = (known.frequency >= band[0]) & (known.frequency < band[1]) & (there.fired >= least)
    log, chosen = known.frequency.clamp_min(1e-12).log(), []
    for number in range(count):
        if not free.any():
            break
        away = (log - (low + (high - low) * (number + 0.5) / count)).abs().masked_fill(~free, math.inf)
        chosen.append(int(away.argmin()))
        free[chosen[-1]] = False
    return chosen


def said(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of a set of next tokens: logits (n, V) -> (n,)."""
    return logits.log_softmax(-1)[:, tokens].logsumexp(-1)


@torch.no_grad()
def ablation(
    work: LayerAtWork, corpus: Corpus, there: Firings, expert: int, own: Tensor, most: int, draw: torch.Generator
) -> dict[str, Any]:
    """What is lost where an expert fires: without it, without another one that fires there, and without the whole layer.

    Args:
        work: the layer.
        corpus: the text to measure on.
        there: where experts fire in it.
        expert: the expert.
        own: its own tokens.
        most: in how many contexts, drawn at random.
        draw: the random number generator, also of the other ones: one at each place.

    Returns:
        ``fired``: at how many places; for ``itself``, ``other`` and ``layer``, per place: ``kl``, ``delta_ce``, and ``own``,
        what the log-probability of its own tokens falls by.
    """
    contexts = there.contexts[expert]
    contexts = contexts[torch.randperm(len(contexts), generator=draw)[:most]]
    run = work.unedited(corpus.ids[contexts].long())
    active = run.a.values > 0
    mine = active & (run.a.indices == expert)
    fires = mine.any(-1) & scored(run.ids)
    key = torch.rand(active.shape, generator=draw).masked_fill(~active | mine, -1)
    other = torch.zeros_like(active).scatter(-1, key.argmax(-1, keepdim=True), True) & (key > 0)
    before = said(run.logits[fires], own)
    result: dict[str, Any] = {"fired": int(fires.sum())}
    for name, change in (
        ("itself", work.without_slots(mine & fires[..., None])),
        ("other", work.without_slots(other & fires[..., None])),
        ("layer", work.without_layer(fires)),
    ):
        found = work.changed(run, change, fires)
        figures = {"kl": found.kl, "delta_ce": found.delta_ce, "own": before - said(found.after, own)}
        result[name] = {figure: values.double().mean().item() for figure, values in figures.items()}
    return result


@torch.no_grad()
def steering(
    work: LayerAtWork, ids: Tensor, known: Firings, experts: list[int], kl: float
) -> tuple[list[float | None], Tensor, Tensor]:
    """What steering by each of some experts, at every place and all equally hard, does to the own tokens of each.

    Args:
        work: the layer.
        ids: the text, (B, T).
        known: where the experts fire, and how strongly.
        experts: E of them.
        kl: how hard: KL(unedited ‖ steered), nats per prediction.

    Returns:
        Each one's strength in units of its mean coefficient, None where none has that KL; and (E, E): by how much steering by
        the first changes the log-probability, and the probability, of the second's own tokens; nan where there is no strength.
    """
    run, where = work.unedited(ids), scored(ids)
    own = run.logits.new_zeros(run.logits.shape[-1], len(experts))
    for column, expert in enumerate(experts):
        own[known.own_tokens(expert), column] = 1.0
    before = run.logits[where].softmax(-1) @ own
    strengths, logs, masses = [], [], []
    for expert in experts:
        unit = known.mean[expert].item()

        def steered(strength: float, expert: int = expert, unit: float = unit) -> Shifts:
            return work.changed(run, work.converted.model.mxd.steer({work.layer: {expert: strength * unit}}), where)

        strength, found = at_kl(steered, kl)
        strengths.append(strength)
        if strength is None:
            logs.append(torch.full((len(experts),), torch.nan))
            masses.append(logs[-1])
            continue
        after = found.after.softmax(-1) @ own
        logs.append((after.clamp_min(1e-30).log() - before.clamp_min(1e-30).log()).mean(0))
        masses.append((after - before).mean(0))
    return strengths, torch.stack(logs), torch.stack(masses)


def at_kl(steered: Callable[[float], Shifts], kl: float) -> tuple[float | None, Shifts | None]:
    """The strength at which a change has a KL, and what it then does; None where no strength up to `_STRONGEST` has.

    KL grows with about the square of the strength; where it does not, the interval that holds it is halved.
    """
    low, high, strength = 0.0, math.inf, 1.0
    for _ in range(_TRIES):
        found = steered(strength)
        at = found.kl.double().mean().item()
        if abs(at / kl - 1) <= _NEAR:
            return strength, found
        low, high = (strength, high) if at < kl else (low, strength)
        guess = strength * min(8.0, max(1 / 8, math.sqrt(kl / max(at, 1e-30))))
        inside = low < guess < high
        strength = guess if inside else (low + high) / 2 if high < math.inf else 2 * low
        if strength > _STRONGEST:
            break
    return None, None


@dataclass(frozen=True)
class Losses:
    """A text's predictions before and after, context by context.

    Attributes:
        ce: by part (the label's name, ``rest``), the sum of each context's ΔCE, (S,).
        kl: likewise, of KL.
        counts: how many predictions each has, (S,).
    """

    ce: dict[bool, Tensor]
    kl: dict[bool, Tensor]
    counts: dict[bool, Tensor]

    def mean(self, labelled: bool, figure: str = "ce") -> float:
        """Nats per prediction, of the labelled ones or of the others."""
        return (getattr(self, figure)[labelled].sum() / self.counts[labelled].sum()).item()

    def damages(self) -> dict[str, float]:
        """ΔCE and KL of the labelled predictions, and of the rest."""
        ce, kl = ({part: self.mean(part, figure) for part in (True, False)} for figure in ("ce", "kl"))
        return {"damage": ce[True], "rest": ce[False], "kl": kl[True], "rest_kl": kl[False]}

    def collateral(self) -> dict[str, Any]:
        """What the others lose, as a share of what the labelled ones lose, by ΔCE and by KL, with intervals over contexts."""
        total = {part: count.sum() for part, count in self.counts.items()}
        figures: dict[str, Any] = {}
        for figure in ("ce", "kl"):
            rest, labelled = (getattr(self, figure)[part] / total[part] for part in (False, True))
            figures |= with_interval(f"collateral_{figure}", rest, labelled, signed=True)
        return figures


def losses(
    work: LayerAtWork, runs: list[tuple[int, Pass]], which: Tensor, change: Callable[[Tensor], AbstractContextManager]
) -> Losses:
    """What a change does to the labelled predictions of a text, ``which`` (S, T), and to the others.

    Args:
        work: the layer.
        runs: the text's passes, each with the number of its first context.
        which: see above.
        change: takes a batch (B, T).
    """
    sums: dict[str, dict[bool, list[Tensor]]] = {name: {True: [], False: []} for name in ("ce", "kl", "counts")}
    for start, run in runs:
        where = scored(run.ids)
        found = work.changed(run, change(run.ids), where)
        shape = (len(run.ids), -1)
        labelled = which[start : start + len(run.ids)][where].view(shape)
        for part in (True, False):
            mine = labelled == part
            for name, values in (("ce", found.delta_ce), ("kl", found.kl), ("counts", torch.ones_like(found.kl))):
                sums[name][part].append((values.view(shape).double() * mine).sum(1))
    return Losses(**{name: {part: torch.cat(rows) for part, rows in of.items()} for name, of in sums.items()})


@torch.no_grad()
def erasing(
    work: LayerAtWork, corpus: Corpus, which: Tensor, known: Firings, label: str, budgets: tuple[float, ...], draws: int
) -> Iterator[dict[str, Any]]:
    """Ablates the experts that prefer what a text labels, as many as it takes to make its predictions so much worse.

    Args:
        work: the layer.
        corpus: the text to measure on, and ``which`` of its places (S, T) are labelled.
        which: see ``corpus``.
        known: where experts fire, on other text; they are taken in the order of `Firings.preferring`.
        label: the label.
        budgets: ΔCE of the labelled predictions, as a share of what removing the whole layer costs them.
        draws: how often as many experts that fire as often are drawn to compare with.

    Yields:
        For each budget ``experts``, how many it takes; its damages, and the collateral figures. ``random``: the damages by
        each draw; ``layer``: by removing the layer.
    """
    order, runs = known.preferring(label), list(passes(work, corpus))
    layer = losses(work, runs, which, lambda ids: work.without_layer(scored(ids)))
    tried: dict[int, Losses] = {}

    def first(count: int) -> Losses:
        if count not in tried:
            edit = Edits(ablate={work.layer: order[:count].tolist()}).live(work.converted.model)
            tried[count] = losses(work, runs, which, lambda _ids: edit)
        return tried[count]

    for budget in budgets:
        wanted = budget * layer.mean(True)
        count = 1
        while count < len(order) and first(count).mean(True) < wanted:
            count = min(2 * count, len(order))
        low = count // 2
        while count - low > max(1, count // 16):  # damage need not grow with every expert
            middle = (low + count) // 2
            low, count = (low, middle) if first(middle).mean(True) >= wanted else (middle, count)
        found, random = first(count), []
        edit = Edits(ablate={work.layer: order[:count].tolist()})
        for number in range(draws if 2 * count <= len(order) else 0):
            alike = draw_control(edit, {work.layer: known.fired.long()}, torch.Generator().manual_seed(number))
            control = losses(work, runs, which, lambda _ids, alike=alike: alike.live(work.converted.model))
            random.append(control.damages())
        yield {
            "label": label,
            "budget": budget,
            "layer": layer.damages(),
            "experts": count,
            "reached": found.mean(True) >= wanted,
            "random": random,
            **found.damages(),
            **found.collateral(),
        }
