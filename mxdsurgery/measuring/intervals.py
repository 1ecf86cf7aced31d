"""Figures from per-sequence sums, each with its interval over sequences."""

import math
from dataclasses import dataclass, field

import torch
from scipy.special import stdtrit
from torch import Tensor

from mxdsurgery.base.scores import SCORES, known_predictions, next_token_scores
from mxdsurgery.hardware.device import widest

_LEVEL = 0.95
# Firing frequencies are binned by decade; the first bin holds experts that fire on at most 1e-5 of the tokens.
_FREQUENCY_DECADES = (-5, -4, -3, -2, -1, 0)

# Sums over the scored positions of each sequence, by name: each (S,) float64, S sequences.
Sums = dict[str, Tensor]


def next_token_sums(logits: Tensor, original: Tensor, input_ids: Tensor) -> Sums:
    """The `next_token_scores` summed over each sequence's scored positions.

    A prediction is scored at every position but 0 (BOS, or a token without context) and the last (nothing follows it).

    Args:
        logits: (B, T, V).
        original: (B, T, V), of the original model.
        input_ids: (B, T).
    """
    scores = [
        next_token_scores(row[1:-1], known_predictions(original_row[1:-1]), ids[2:])
        for row, original_row, ids in zip(logits, original, input_ids, strict=True)  # one at a time: V may be large
    ]
    return {name: sum_sequences(values, len(input_ids)) for name, values in zip(SCORES, torch.cat(scores, dim=1), strict=True)}


def sum_sequences(values: Tensor, sequences: int) -> Tensor:
    """One value for each scored position, sequence after sequence: (n,) -> sums (S,) float64, on the CPU."""
    return values.cpu().double().view(sequences, -1).sum(-1)


def scored_predictions(input_ids: Tensor) -> int:
    """How many predictions per sequence `next_token_sums` scores."""
    return input_ids.shape[1] - 2


def error_sums(y_hat: Tensor, y: Tensor, mean_y: Tensor) -> Sums:
    """‖ŷ-y‖², ‖y‖² and ‖y-ȳ‖² summed over each sequence's positions but 0: y_hat, y (B, T, D), mean_y (D,)."""
    y_hat, y = (part[:, 1:].to(widest(y.device)) for part in (y_hat, y))
    sums = {"error": y_hat - y, "power": y, "variance": y - mean_y}
    return {name: part.square().sum((1, 2)).cpu().double() for name, part in sums.items()}


@dataclass
class Table:
    """Per-sequence sums of many batches, under a prefix each: ``table["zero.ce"]`` is (S,) float64."""

    rows: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, prefix: str, sums: Sums) -> None:
        """Appends a batch's sums under ``prefix.name``."""
        for name, values in sums.items():
            self.rows.setdefault(f"{prefix}.{name}", []).append(values)

    def columns(self) -> Sums:
        """All sums, the batches joined: (S,) each."""
        return {name: torch.cat(values) for name, values in self.rows.items()}


def with_interval(name: str, top: Tensor, bottom: Tensor, *, signed: bool = False) -> dict[str, float | list[float] | None]:
    """A figure Σ top / Σ bottom, its sums over sequences, and its 95 % interval.

    Sequences are drawn from the text as wholes. The interval is that of a ratio estimate over such clusters, by linearisation
    (Cochran, Sampling Techniques, 1977, chapter 6; for figures of language models Miller, arXiv 2411.00640), with Student's t
    of as many degrees of freedom as sequences, less one. So it is wide for few sequences, and there is none for one. Those
    that hold nothing of what is counted, where both are zero, are no evidence and do not count (Korn and Graubard, Analysis
    of Health Surveys, 1999, section 5.4). Being symmetric, it may reach a little beyond what the figure can be.

    Args:
        name: of the figure.
        top: each sequence's sum, (S,); or (L, S) of L ratios, whose mean is then the figure.
        bottom: of the same shape: a count or sum of squares, or, where ``signed``, a difference.
        signed: the denominator may be zero or negative. The figure is one only where the denominator is positive and its own
            95 % interval excludes 0. That is where Fieller's interval of a ratio (J. R. Stat. Soc. B 16, 1954) is bounded,
            and it is the interval then.

    Returns:
        ``{name: value, name_ci: [low, high]}``; None for what is no number.
    """
    x, y = (part.reshape(-1, part.shape[-1]) for part in (top, bottom))
    counted = ((x != 0) | (y != 0)).any(0)
    x, y, n = x[:, counted], y[:, counted], int(counted.sum())
    value, ends = _fieller(x[0], y[0], n) if signed else _linearised(x, y, n)
    return {name: value, f"{name}_ci": ends}


# A figure and its interval's ends; None for what is no number.
_Estimate = tuple[float | None, list[float] | None]


def _linearised(x: Tensor, y: Tensor, n: int) -> _Estimate:
    """The mean of L ratios Σ x / Σ y with its interval: (L, n) each, ``n`` sequences."""
    totals = y.sum(1, keepdim=True)
    if not (totals > 0).all():
        return None, None
    ratios = x.sum(1, keepdim=True) / totals
    value = ratios.mean().item()
    if not math.isfinite(value):
        return None, None
    if n < 2:
        return value, None
    influence = ((x - ratios * y) / totals).mean(0) * n
    reach = _t(n) * influence.std().item() / math.sqrt(n)
    return value, [value - reach, value + reach]


def _fieller(x: Tensor, y: Tensor, n: int) -> _Estimate:
    """Σ x / Σ y with Fieller's interval, where the sign of Σ y is certain: (n,) each."""
    if n < 2:
        return None, None
    means = torch.stack([x.mean(), y.mean()])
    products = means.outer(means) - _t(n) ** 2 / n * torch.cov(torch.stack([x, y]))
    (xx, xy), (_, yy) = products.tolist()
    value = (means[0] / means[1]).item()
    if not (means[1] > 0 and yy > 0 and math.isfinite(value)):  # yy > 0: the interval of Σ y excludes 0
        return None, None
    root = math.sqrt(max(0.0, xy**2 - xx * yy))
    return value, [(xy - root) / yy, (xy + root) / yy]


def _t(n: int) -> float:
    """How many standard errors of the mean of n values an interval reaches to either side."""
    return float(stdtrit(n - 1, (1 + _LEVEL) / 2))


def frequency_decades(frequency: Tensor) -> dict[str, float]:
    """The share of experts whose firing frequency (N,) is above zero and up to 1e-5, from there up to 1e-4, and so on."""
    decades = frequency[frequency > 0].log10().ceil().clamp(_FREQUENCY_DECADES[0], _FREQUENCY_DECADES[-1])
    return {f"up to 1e{decade}": (decades == decade).sum().item() / len(frequency) for decade in _FREQUENCY_DECADES}
