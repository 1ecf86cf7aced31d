"""What evaluation costs: how many passes of each kind it runs, and on how much of the text it measures each layer alone.

All layers together are measured on all contexts. Measuring each alone grows with the square of their number.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# By default, evaluation takes at most this share of the training time: single layers are measured on fewer contexts.
EVALUATION_SHARE = 0.2
# But not on fewer tokens than these, nor on fewer contexts, over which the intervals are taken.
_FEWEST_TOKENS_ALONE, _FEWEST_CONTEXTS_ALONE = 8192, 16


@dataclass(frozen=True)
class Runs:
    """How often each part of the model runs on one context in evaluation; see `evaluation_runs`."""

    decoder_layers: int
    new_layers: int
    heads: int  # the language-model head, and the comparison of its predictions


@dataclass(frozen=True)
class Rates:
    """Seconds that one run of each of these takes for one context."""

    decoder_layer: float
    new_layer: float
    head: float

    def seconds(self, runs: Runs) -> float:
        """Seconds of all runs of a context."""
        return runs.decoder_layers * self.decoder_layer + runs.new_layers * self.new_layer + runs.heads * self.head


def evaluation_runs(layers: Sequence[int], n_layers: int, candidates: int = 1, more: bool = False) -> tuple[Runs, Runs]:
    """The runs for a context on which all layers are measured together, and for one on which each is measured alone.

    A variant runs from the first replaced layer on. Each candidate has two variants: converted, and with its experts frozen.
    All candidates share two: the blocks' outputs zero, and at their mean. A pass for statistics of the original comes first.

    Args:
        layers: the converted layers, by index.
        n_layers: decoder layers of the model.
        candidates: how many sets of layers replace the same blocks.
        more: whether other modules changed, too: then even a single layer alone differs from all changes together.
    """
    variants, first = 2 * candidates + 2, 0 if more else min(layers)
    together = Runs(
        decoder_layers=max(layers) + 1 + n_layers + variants * (n_layers - first),
        new_layers=2 * candidates * len(layers),
        heads=1 + variants,
    )
    if len(layers) == 1 and not more:
        return together, Runs(0, 0, 0)
    alone = Runs(
        decoder_layers=n_layers + variants * sum(n_layers - layer for layer in layers),
        new_layers=candidates * len(layers),
        heads=1 + variants * len(layers),
    )
    return together, alone


@dataclass(frozen=True)
class Alone:
    """On how much of the text each layer alone is measured.

    Attributes:
        tokens: on so many tokens, in whole contexts; None: by time.
        seconds: on as many as keep the whole evaluation within so many seconds, if possible; None: on all.
    """

    tokens: int | None = None
    seconds: float | None = None

    def contexts(self, together: float, alone: float, contexts: int, length: int) -> int:
        """On how many of the contexts.

        By time, the number is a power of two, unless it is the minimum or all: small differences in time change no figures.

        Args:
            together: seconds per context of measuring all layers together, on all contexts.
            alone: seconds per context of measuring every layer alone.
            contexts: S, the number of held-out contexts.
            length: T, tokens in each.
        """
        if self.tokens is not None:
            return min(contexts, max(1, self.tokens // length))
        if self.seconds is None or self.seconds >= contexts * (together + alone):
            return contexts
        affordable = int(max(0.0, self.seconds - contexts * together) / alone) if alone > 0 else 0
        return max(fewest_contexts_alone(contexts, length), 2 ** affordable.bit_length() // 2)


ON_ALL = Alone()


def fewest_contexts_alone(contexts: int, length: int) -> int:
    """On how many of ``contexts`` contexts of length T each layer alone is measured at least."""
    return min(contexts, max(-(-_FEWEST_TOKENS_ALONE // length), _FEWEST_CONTEXTS_ALONE))
