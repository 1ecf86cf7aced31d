"""Passes of the original model, and how the predictions from other passes' hidden states differ from its own.

The original's predictions are made once for as many others as are held together, and predictions over a large vocabulary are
never held for a whole batch. Shapes: B contexts, T tokens, D model width.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mxdsurgery.base.activations import recording
from mxdsurgery.base.blocks import Block
from mxdsurgery.base.decoder import decoder_layers, vocabulary_size
from mxdsurgery.base.running import hidden_states, hooked, predict
from mxdsurgery.base.scores import SCORES, known_predictions, next_token_scores
from mxdsurgery.layers.sparse import chunk_bytes
from mxdsurgery.measuring.intervals import Sums, sum_sequences
from mxdsurgery.training.cost import HELD_BYTES
from mxdsurgery.training.teacher import parts


@dataclass
class Original:
    """One batch through the original model."""

    hidden: Tensor  # before the language-model head, (B, T, D)
    y: dict[int, Tensor]  # the blocks' outputs, by layer
    layer_outputs: list[object]  # of every decoder layer


@torch.no_grad()
def run_original(model: PreTrainedModel, blocks: Sequence[Block], ids: Tensor) -> Original:
    """One pass of the unchanged model on ids (B, T): other passes are compared with it, and may start from it."""
    _, decoder = decoder_layers(model)
    outputs: list[object] = []
    hooks = [layer.register_forward_hook(lambda _m, _a, output: outputs.append(output)) for layer in decoder]
    with hooked(*hooks), recording(model, blocks, shape=ids.shape) as recorded:
        hidden = hidden_states(model, ids)
    return Original(hidden, {layer: a.y for layer, a in recorded.items()}, outputs)


@torch.no_grad()
def prediction_sums(
    model: PreTrainedModel,
    ids: Tensor,
    original: Tensor,
    others: Iterable[tuple[Hashable, Tensor]],
    wanted: Callable[[Hashable], Sequence[str]] = lambda _name: SCORES,
) -> Iterator[tuple[Hashable, Sums]]:
    """Compares what hidden states predict with the original's: ``original`` with its cross-entropy, then the others by name.

    Args:
        model: its head makes predictions, of some positions at a time.
        ids: (B, T).
        original: hidden states before the head, (B, T, D).
        others: by name, the same of other runs; they may be made when they are asked for.
        wanted: which of `SCORES` are wanted of another, by its name; default: all.

    Yields:
        A name, and sums over the scored positions of each context; see `next_token_scores`.
    """
    vocabulary = vocabulary_size(model)
    known_states, following = _scored(original), ids[:, 2:].flatten()
    for number, group in enumerate(_held(others)):
        ce: list[Tensor] = []
        scores: dict[Hashable, list[Tensor]] = {name: [] for name in group}
        for rows in parts(len(following), vocabulary, chunk_bytes(ids.device.type)):
            known = known_predictions(predict(model, known_states[rows]))
            ce.append(known.cross_entropy(following[rows]))
            for name, states in group.items():
                scores[name].append(next_token_scores(predict(model, states[rows]), known, following[rows], wanted(name)))
        if number == 0:
            yield "original", {"ce": sum_sequences(torch.cat(ce), len(ids))}
        for name, found in scores.items():
            sums = zip(wanted(name), torch.cat(found, dim=1), strict=True)
            yield name, {figure: sum_sequences(values, len(ids)) for figure, values in sums}


def _scored(hidden: Tensor) -> Tensor:
    """The scored positions of (B, T, D), one after the other."""
    return hidden[:, 1:-1].flatten(0, 1)


def _held(states: Iterable[tuple[Hashable, Tensor]]) -> Iterator[dict[Hashable, Tensor]]:
    """Groups of ``states``, at their scored positions, as many at a time as `HELD_BYTES` lets be held together."""
    group: dict[Hashable, Tensor] = {}
    for name, hidden in states:
        group[name] = _scored(hidden)
        if sum(held.nbytes for held in group.values()) >= HELD_BYTES:
            yield group
            group = {}
    if group:
        yield group
