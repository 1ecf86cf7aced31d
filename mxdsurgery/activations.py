"""What goes into MLP blocks and comes out of them, recorded from one forward pass of the model."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxdsurgery.blocks import Block


class Activations(NamedTuple):
    """A block's input ``x`` and output ``y``, each (B, T, D) or (n, D), in the model's dtype."""

    x: Tensor
    y: Tensor


def shuffle_positions(batches: Iterator[dict[int, Activations]], buffer: int, seed: int) -> Iterator[dict[int, Activations]]:
    """Mixes positions across batches: as many batches, of the same size, each drawn at random from a buffer.

    The buffer fills first; then each position drawn makes room for one of the next batch; in the end it empties. All layers
    are drawn alike, so what one of them sees does not depend on which others there are.

    Args:
        batches: by layer, x and y (n, D), in one dtype and on one device, every batch of the same n.
        buffer: how many positions it holds; with less than two batches' worth nothing is mixed.
        seed: of the drawing.

    Yields:
        By layer, x and y (n, D).
    """
    first = next(batches, None)
    if first is None:
        return
    n = len(next(iter(first.values())).x)
    room = buffer // n
    held = {
        layer: Activations(*(part.new_empty(room * n, part.shape[1]) for part in pair))
        for layer, pair in first.items()
        if room > 1
    }
    batches = itertools.chain((first,), batches)
    del first  # a batch of all layers is large: nothing here keeps one longer than it is needed
    if not held:
        yield from batches
        return
    filled = 0
    for fresh in itertools.islice(batches, room):
        _put(held, torch.arange(filled, filled + n), fresh)
        filled += n
    del fresh
    generator = torch.Generator().manual_seed(seed)
    for fresh in batches:
        places = torch.randperm(filled, generator=generator)[:n]
        drawn = _take(held, places)
        _put(held, places, fresh)
        del fresh
        yield drawn
    for places in torch.randperm(filled, generator=generator).split(n):
        yield _take(held, places)


def _take(held: dict[int, Activations], places: Tensor) -> dict[int, Activations]:
    return {layer: Activations(*(part[places.to(part.device)] for part in pair)) for layer, pair in held.items()}


def _put(held: dict[int, Activations], places: Tensor, fresh: dict[int, Activations]) -> None:
    for layer, pair in held.items():
        for part, values in zip(pair, fresh[layer], strict=True):
            part[places.to(part.device)] = values


def hidden_of(output: object) -> Tensor:
    """The hidden states (B, T, D) among what a decoder layer returns."""
    return output if isinstance(output, Tensor) else output[0]


class _LastBlockReached(Exception):
    """Ends a forward pass once everything that was asked for is recorded."""


@contextmanager
def hooked(*hooks: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    """Removes hooks on leaving, however the block is left."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def record_activations(model: PreTrainedModel, blocks: Sequence[Block], input_ids: Tensor) -> dict[int, Activations]:
    """Runs the model on a batch and returns the blocks' activations, by layer.

    The pass stops after the last block asked for: later layers and the language-model head are not computed.

    Args:
        model: the model, as it is (with whatever blocks it holds).
        blocks: the blocks to look at.
        input_ids: (B, T) int64, on the model's device.
    """
    return _record(model, blocks, lambda: model(input_ids=input_ids, use_cache=False))


def record_layer(model: PreTrainedModel, block: Block, shape: Sequence[int], run: Callable[[], object]) -> Activations:
    """As `record_activations`, of the one block in a decoder layer that is run alone, on hidden states of shape (B, T)."""
    return _record(model, [block], run, shape)[block.layer]


@torch.no_grad()
def _record(
    model: PreTrainedModel, blocks: Sequence[Block], run: Callable[[], object], shape: Sequence[int] = ()
) -> dict[int, Activations]:
    with recording(model, blocks, stop=True, shape=shape) as recorded:
        try:
            run()
        except _LastBlockReached:
            pass
        return {block.layer: recorded[block.layer] for block in blocks}


def stream_activations(
    model: PreTrainedModel, blocks: Sequence[Block], batches: Iterator[Tensor], device: torch.device
) -> Iterator[dict[int, Activations]]:
    """The blocks' activations on each batch of input ids (B, T), by layer: x and y (B T, D) on the device."""
    for input_ids in batches:
        input_ids = input_ids.to(device, non_blocking=True)
        yield {
            layer: Activations(x.flatten(0, 1), y.flatten(0, 1))
            for layer, (x, y) in record_activations(model, blocks, input_ids).items()
        }


@contextmanager
def recording(
    model: PreTrainedModel, blocks: Sequence[Block], stop: bool = False, shape: Sequence[int] = ()
) -> Iterator[dict[int, Activations]]:
    """While open, every forward pass leaves the blocks' activations in the mapping that is yielded.

    Args:
        model: the model, as it is.
        blocks: the blocks to look at.
        stop: whether to end a pass (by an exception) after the last block.
        shape: (B, T) where decoder layers are run alone; default: each pass's own.
    """
    inputs: dict[int, Tensor] = {}
    recorded: dict[int, Activations] = {}
    shape = list(shape)
    last = max(block.layer for block in blocks)

    def note_shape(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        shape[:] = kwargs["input_ids"].shape if "input_ids" in kwargs else args[0].shape

    def note_input(layer: int) -> Callable:
        def hook(_module: nn.Module, args: tuple) -> None:
            inputs[layer] = args[0]

        return hook

    def note_output(layer: int) -> Callable:
        def hook(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            x = inputs.pop(layer)
            # Some families flatten (B, T) before the block.
            recorded[layer] = Activations(x.view(*shape, -1), output.view(*shape, -1))
            if stop and layer == last:
                raise _LastBlockReached

        return hook

    root = model.base_model
    handles = [model.register_forward_pre_hook(note_shape, with_kwargs=True)]
    for block in blocks:
        handles.append(root.get_submodule(block.path).register_forward_pre_hook(note_input(block.layer)))
        handles.append(root.get_submodule(block.output_path).register_forward_hook(note_output(block.layer)))
    with hooked(*handles):
        yield recorded
