"""Figures from per-sequence sums, each with a bootstrap interval over sequences."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mxdsurgery.device import widest

_RESAMPLES = 2000
_LEVEL = 0.95
# Firing frequencies are binned by decade; the first bin holds what fired less often than 1e-5 of the tokens.
_FREQUENCY_DECADES = (-5, -4, -3, -2, -1, 0)

# Of a prediction beside the original's: cross-entropy, KL(original ‖ it), and whether the likeliest token is the same.
SCORES = ("ce", "kl", "agree")
# Logits per group where the likeliest token is found by groups.
_ARGMAX_GROUP = 64

# Sums over the scored positions of each sequence, by name: each (S,) float64, S sequences.
Sums = dict[str, Tensor]


class Known(NamedTuple):
    """What the original predicts at n positions, computed once for all that is compared with it."""

    log_p: Tensor  # (n, V) fp32
    p: Tensor  # (n, V) fp32
    likeliest: Tensor  # (n,) int64

    def cross_entropy(self, following: Tensor) -> Tensor:
        """Of the tokens (n,) that follow: (n,) fp32."""
        return -self.log_p.gather(1, following[:, None])[:, 0]


def known_predictions(logits: Tensor) -> Known:
    """From the original's logits (n, V)."""
    logits = logits.float()
    log_p = F.log_softmax(logits, dim=-1)
    return Known(log_p, log_p.exp(), likeliest(logits))


def next_token_scores(logits: Tensor, known: Known, following: Tensor) -> Tensor:
    """Cross-entropy, KL(original ‖ logits) and top-1 agreement at n positions, in nats, from one pass over the logits.

    Args:
        logits: (n, V).
        known: what the original predicts there.
        following: (n,), the tokens that follow.

    Returns:
        (3, n) fp32, by `SCORES`.
    """
    logits = logits.float()
    log_q = F.log_softmax(logits, dim=-1)
    ce = -log_q.gather(1, following[:, None])[:, 0]
    agree = (likeliest(logits) == known.likeliest).float()
    kl = log_q.neg_().add_(known.log_p).mul_(known.p).sum(-1)  # in place: memory that is new costs more than the sums
    return torch.stack([ce, kl, agree])


def likeliest(logits: Tensor) -> Tensor:
    """``logits.argmax(-1)``, (n, V) -> (n,), in groups: their maxima first. On a CPU four times as fast."""
    n, vocabulary = logits.shape
    groups = vocabulary // _ARGMAX_GROUP
    whole = groups * _ARGMAX_GROUP
    maxima = logits[:, :whole].unflatten(1, (groups, _ARGMAX_GROUP)).amax(-1)
    if whole < vocabulary:
        maxima = torch.cat([maxima, logits[:, whole:].amax(-1, keepdim=True)], dim=1)
    places = _ARGMAX_GROUP * maxima.argmax(-1, keepdim=True) + torch.arange(_ARGMAX_GROUP, device=logits.device)
    places = places.clamp_max(vocabulary - 1)
    return places.gather(1, logits.gather(1, places).argmax(-1, keepdim=True))[:, 0]


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


def with_interval(
    name: str, columns: Sums, figure: Callable[[dict[str, Tensor]], Tensor], seed: int = 0
) -> dict[str, float | list[float]]:
    """A figure and its 95 % bootstrap interval over sequences.

    Args:
        name: of the figure.
        columns: per-sequence sums, (S,) each.
        figure: the figure from sums over sequences; it is given tensors of any shape, elementwise.
        seed: of the resampling.

    Returns:
        ``{name: value, name_ci: [low, high]}``; NaN becomes None.
    """
    value = figure({key: column.sum() for key, column in columns.items()}).item()
    weights = _resample_weights(len(next(iter(columns.values()))), seed)
    samples = figure({key: weights @ column for key, column in columns.items()})
    tail = (1 - _LEVEL) / 2
    low, high = torch.quantile(samples, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return {name: _finite(value), f"{name}_ci": [_finite(low), _finite(high)]}


def _resample_weights(sequences: int, seed: int) -> Tensor:
    """How often each bootstrap resample draws each sequence: (resamples, S) float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(sequences, (_RESAMPLES, sequences), generator=generator)
    return torch.zeros(_RESAMPLES, sequences, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones_like(drawn, dtype=torch.float64)
    )


def _finite(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None


def frequency_decades(frequency: Tensor) -> dict[str, float]:
    """The share of experts whose firing frequency (N,) is above zero and up to 1e-5, from there up to 1e-4, and so on."""
    decades = frequency[frequency > 0].log10().ceil().clamp(_FREQUENCY_DECADES[0], _FREQUENCY_DECADES[-1])
    return {f"up to 1e{decade}": (decades == decade).sum().item() / len(frequency) for decade in _FREQUENCY_DECADES}
