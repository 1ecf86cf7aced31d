"""Figures from per-sequence sums, each with a bootstrap interval over sequences."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mxdsurgery.base.scores import SCORES, known_predictions, next_token_scores
from mxdsurgery.hardware.device import widest

_RESAMPLES = 2000
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


def with_interval(
    name: str, columns: Sums, figure: Callable[[dict[str, Tensor]], Tensor], seed: int = 0
) -> dict[str, float | list[float]]:
    """A figure and its 95 % bootstrap interval over sequences.

    Args:
        name: of the figure.
        columns: per-sequence sums, (S,) each.
        figure: computes the figure from sums over sequences, elementwise, from tensors of any shape.
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
