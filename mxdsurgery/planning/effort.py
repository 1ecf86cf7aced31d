"""What evaluation costs: how many passes of each kind it runs, and on how much of the text it measures each layer alone.

All layers together are measured on all contexts. Measuring each alone grows with the square of their number.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mxdsurgery.base.blocks import Block
from mxdsurgery.recipe import Recipe
from mxdsurgery.text.sources import VALIDATION_TOKENS
from mxdsurgery.training.cost import (
    FIT_BYTES,
    BaseShape,
    LayerPlan,
    base_forward_flops,
    fit_bytes,
    fit_flops,
    layer_flops,
    steered,
)
from mxdsurgery.training.share import LOOKS, SHARES

# By default, evaluation takes at most this share of the training time: single layers are measured on fewer contexts.
EVALUATION_SHARE = 0.2
# But not on fewer tokens than these, nor on fewer contexts, over which the intervals are taken.
_FEWEST_TOKENS_ALONE, _FEWEST_CONTEXTS_ALONE = 4096, 16
# What the experts carry is measured, while they learn, on so many tokens that it takes this share of the training's work; but
# at least on so many, or on this share of what is trained on if that is fewer.
_LOOKING_SHARE, _LEAST_LOOKED_AT, _OF_FEW = 0.15, 1024, 1 / 32
# What it is compared with is fitted on up to so many times as much text, and on at most the same share of what is trained on.
_FITTED_PER_SCORED = 8


@dataclass(frozen=True)
class Runs:
    """How often each part of the model runs on one context in evaluation; see `evaluation_runs`."""

    decoder_layers: int
    new_layers: float
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


# Derivatives of layers and of their blocks are taken at so many inputs, each in one direction, or at one of each context.
JACOBIAN_INPUTS = 4096
# A layer's takes as long as so many passes through it: it is taken by backward passes.
_DERIVATIVE = 3
# A training step is the work of so many passes through a layer.
_STEP_IN_PASSES = 3
# What is measured of a candidate, by kind: the layers themselves, with their experts frozen, and the `controls`.
_ALL_VARIANTS = ("converted", "frozen", "permuted", "shuffled", "random_gate", "few_experts", "retrained")
_VARIANTS = {"dense": _ALL_VARIANTS[:2], "transcoder": _ALL_VARIANTS[:-1], "topk-sae": _ALL_VARIANTS[:-1]}
_VARIANTS["molt"] = _VARIANTS["transcoder"]
# Variants that take as long as the layers themselves; the others cost next to nothing beside the decoder layers.
RUN_LAYERS = frozenset({"converted", "permuted", "shuffled", "random_gate", "few_experts"})


def variants_of(kind: str) -> tuple[str, ...]:
    """The variants that evaluation measures of layers of a kind."""
    return _VARIANTS.get(kind, _ALL_VARIANTS)


def fitted_together(blocks: Sequence[Block], kinds: Sequence[str]) -> list[list[Block]]:
    """The blocks whose dense paths are fitted anew in the same pass, as many as memory allows; none if no kind has one.

    Args:
        blocks: that are replaced.
        kinds: of the candidates that replace them.
    """
    groups: list[list[Block]] = []
    held = 0
    for block in blocks:
        needed = sum(fit_bytes(block, kind) for kind in kinds)
        if not needed:
            continue
        if not groups or held + needed > FIT_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(block)
        held += needed
    return groups


def jacobian_inputs(contexts: int, length: int) -> int:
    """At how many inputs of each of S contexts of T tokens derivatives are taken."""
    return max(1, min(length - 1, JACOBIAN_INPUTS // contexts))


def statistics_passes(contexts: int, length: int) -> float:
    """As many passes through a layer as its statistics and derivatives take, on each of S contexts of T tokens."""
    return 1 + _DERIVATIVE * jacobian_inputs(contexts, length) / length


def solving_seconds(blocks: Sequence[Block], kinds: Sequence[str], rate: Callable[[], float]) -> float:
    """Seconds, however long the text is, of solving for the dense paths that are fitted anew.

    Args:
        blocks: that are replaced.
        kinds: of the candidates.
        rate: FLOPs per second of products in the widest dtype; it is asked only where there is something to solve.
    """
    flops = sum(fit_flops(block, kind) for block in blocks for kind in kinds)
    return flops / rate() if flops else 0.0


def evaluation_runs(
    blocks: Sequence[Block],
    n_layers: int,
    contexts: int,
    length: int,
    kinds: Sequence[str] = ("mxd",),
    more: bool = False,
) -> tuple[Runs, Runs]:
    """The runs for a context on which all layers are measured together, and for one on which each is measured alone.

    A variant runs from the first replaced layer on, which computes once what variants share. Each candidate has those of its
    kind; all share two: the blocks' outputs zero, and at their mean. Passes of the original come first: one for statistics and
    derivatives, and those in which dense paths are fitted anew, which takes about as long as a decoder layer for each; see
    `solving_seconds`, too.

    Args:
        blocks: that are converted.
        n_layers: decoder layers of the model.
        contexts: S, on which all layers are measured.
        length: T.
        kinds: of the sets of layers that replace the same blocks.
        more: whether other modules changed, too: then even a single layer alone differs from all changes together.
    """
    layers = [block.layer for block in blocks]
    names = [name for kind in kinds for name in variants_of(kind)]
    variants, first = len(names) + 2, 0 if more else min(layers)
    new = sum(name in RUN_LAYERS for name in names)
    groups, fits = fitted_together(blocks, kinds), names.count("retrained")
    fitting = sum(max(block.layer for block in group) + 1 + fits * len(group) for group in groups)
    statistics = len(kinds) * statistics_passes(contexts, length)
    together = Runs(
        decoder_layers=max(layers) + 1 + fitting + n_layers + variants * (n_layers - first),
        new_layers=statistics * len(layers) + new * (len(layers) - 1) + len(kinds),
        heads=1 + variants,
    )
    if len(layers) == 1 and not more:
        return together, Runs(0, 0, 0)
    alone = Runs(
        decoder_layers=n_layers + variants * sum(n_layers - layer for layer in layers),
        new_layers=len(kinds) * len(layers),
        heads=1 + variants * len(layers),
    )
    return together, alone


def fitted_per_scored(tokens: int, scored: int) -> int:
    """Contexts that what is compared is fitted on, per one that is scored: with so many tokens to train on, and scored."""
    return max(1, min(_FITTED_PER_SCORED, int(_OF_FEW * tokens / scored)))


def looking_runs(blocks: Sequence[Block], n_layers: int, fitted: int = _FITTED_PER_SCORED) -> Runs:
    """The runs for a context on which it is measured what the experts of layers in training carry, each layer alone.

    The original runs to its last block, and each layer once, on each context that is fitted on; the original to its end, and
    from its own decoder layer on each layer, and what its experts are compared with, on the one that is scored.

    Args:
        blocks: that the layers replace.
        n_layers: decoder layers of the model.
        fitted: contexts that are fitted on, per one that is scored.
    """
    layers, variants = [block.layer for block in blocks], 1 + len(SHARES)
    return Runs(
        decoder_layers=fitted * (max(layers) + 1) + n_layers + variants * sum(n_layers - layer for layer in layers),
        new_layers=(fitted + variants) * len(layers),
        heads=1 + variants * len(layers),
    )


def look_tokens(layers: Sequence[LayerPlan], base: BaseShape, recipe: Recipe, flops: int) -> int:
    """On how many tokens it is measured, each time, what the experts of layers in training carry.

    Args:
        layers: that are trained.
        base: the base model's shape.
        recipe: tokens, context, expert_share.
        flops: of the training, per token.

    Returns:
        Tokens of all positions that are scored; 0 where no share is asked for.
    """
    mine = steered(layers, recipe)
    if not mine:
        return 0
    n_layers = len(base.layer_parameters)
    runs = looking_runs([layer.block for layer in mine], n_layers)
    of_decoder_layer = base_forward_flops(base, n_layers - 1, recipe.context) / n_layers
    of_new_layer = sum(sum(layer_flops(layer).values()) for layer in mine) / len(mine) / _STEP_IN_PASSES
    of_head = 2 * base.vocabulary * base.d_model
    each = runs.decoder_layers * of_decoder_layer + runs.new_layers * of_new_layer + runs.heads * of_head
    affordable = _LOOKING_SHARE * recipe.tokens * flops / (len(LOOKS) * each)
    least = min(_LEAST_LOOKED_AT, _OF_FEW * recipe.tokens)
    return max(1, round(min(max(affordable, least), VALIDATION_TOKENS)))


@dataclass(frozen=True)
class Alone:
    """On how much of the text each layer alone is measured.

    Attributes:
        tokens: on so many tokens, in whole contexts; None: by time.
        seconds: on as many as keep the whole evaluation within so many seconds, if possible; None: on all.
    """

    tokens: int | None = None
    seconds: float | None = None

    def contexts(self, together: float, alone: float, contexts: int, length: int, once: float = 0.0) -> int:
        """On how many of the contexts.

        By time, the number is a power of two, unless it is the minimum or all: small differences in time change no figures.

        Args:
            together: seconds per context of measuring all layers together, on all contexts.
            alone: seconds per context of measuring every layer alone.
            contexts: S, the number of held-out contexts.
            length: T, tokens in each.
            once: seconds that are needed whatever the number of contexts.
        """
        if self.tokens is not None:
            return min(contexts, max(1, self.tokens // length))
        if self.seconds is None or self.seconds >= once + contexts * (together + alone):
            return contexts
        affordable = int(max(0.0, self.seconds - once - contexts * together) / alone) if alone > 0 else 0
        return max(fewest_contexts_alone(contexts, length), 2 ** affordable.bit_length() // 2)


ON_ALL = Alone()


def fewest_contexts_alone(contexts: int, length: int) -> int:
    """On how many of ``contexts`` contexts of length T each layer alone is measured at least."""
    return min(contexts, max(-(-_FEWEST_TOKENS_ALONE // length), _FEWEST_CONTEXTS_ALONE))
