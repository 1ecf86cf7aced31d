"""What goes into MLP blocks and comes out of them, recorded from one forward pass of the model."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxdsurgery.base.blocks import Block
from mxdsurgery.base.running import hooked, run
from mxdsurgery.errors import UnsupportedBlockError


class Activations(NamedTuple):
    """A block's input ``x`` and output ``y``, each (B, T, D) or (n, D), in the model's dtype."""

    x: Tensor
    y: Tensor


class ShuffledPositions(Iterator[dict[int, Activations]]):
    """Mixes positions across batches: yields as many batches, of the same size, each drawn at random from a buffer.

    First the buffer fills; then each position drawn makes room for one of the next batch; at the end the buffer empties. All
    layers draw the same positions, so what one layer sees does not depend on which others there are.

    Args:
        batches: by layer, x and y (n, D), in one dtype and on one device, every batch of the same n.
        buffer: how many positions it holds; with less than two batches' worth nothing is mixed.
        n: positions in a batch.
        seed: of the drawing.
    """

    def __init__(self, batches: Iterator[dict[int, Activations]], buffer: int, n: int, seed: int) -> None:
        self.batches, self.n = batches, n
        self.room = self.ahead(buffer, n)  # in batches
        self.held: dict[int, Activations] = {}
        self.filled = 0
        self.generator = torch.Generator().manual_seed(seed)
        self.last: list[Tensor] = []  # the positions that are left, once the text is through
        self.ended = False

    @staticmethod
    def ahead(buffer: int, n: int) -> int:
        """How many more batches it has taken than it has yielded, until the batches end."""
        return buffer // n if buffer >= 2 * n else 0

    def __next__(self) -> dict[int, Activations]:
        if not self.room:
            return next(self.batches)
        while not self.ended and self.filled < self.room * self.n:
            self._fill()
        if not self.ended:
            fresh = next(self.batches, None)
            if fresh is not None:
                places = torch.randperm(self.filled, generator=self.generator)[: self.n]
                drawn = _take(self.held, places)
                _put(self.held, places, fresh)
                return drawn
            self._end()
        if not self.last:
            raise StopIteration
        return _take(self.held, self.last.pop(0))

    def _fill(self) -> None:
        fresh = next(self.batches, None)
        if fresh is None:
            self._end()
            return
        if not self.held:
            size = self.room * self.n
            self.held = {
                layer: Activations(*(part.new_empty(size, part.shape[1]) for part in pair)) for layer, pair in fresh.items()
            }
        _put(self.held, torch.arange(self.filled, self.filled + self.n), fresh)
        self.filled += self.n

    def _end(self) -> None:
        self.ended = True
        order = torch.randperm(self.filled, generator=self.generator)
        self.last = list(order.split(self.n)) if self.filled else []

    def state(self) -> dict[str, Tensor]:
        """The buffer, the random generator and how far it is, by name; empty where nothing is mixed."""
        if not self.room:
            return {}
        held = {f"{name}.{layer}": part for layer, pair in self.held.items() for name, part in pair._asdict().items()}
        last = torch.cat(self.last) if self.last else torch.empty(0, dtype=torch.int64)
        stands = torch.tensor([self.filled, self.ended])
        return held | {"generator": self.generator.get_state(), "last": last, "stands": stands}

    def restore(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Goes on from a `state`; the batches given have to begin after those that were taken before it."""
        if not self.room:
            return
        layers = sorted(int(name.partition(".")[2]) for name in state if name.startswith("x."))
        self.held = {layer: Activations(state[f"x.{layer}"].to(device), state[f"y.{layer}"].to(device)) for layer in layers}
        self.generator.set_state(state["generator"])
        self.filled, self.ended = int(state["stands"][0]), bool(state["stands"][1])
        self.last = list(state["last"].split(self.n)) if len(state["last"]) else []


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


def record_activations(model: PreTrainedModel, blocks: Sequence[Block], input_ids: Tensor) -> dict[int, Activations]:
    """Runs the model on a batch and returns the blocks' activations, by layer.

    The pass stops after the last block asked for: later layers and the language-model head are not computed.

    Args:
        model: the model, as it is (with whatever blocks it holds).
        blocks: the blocks to look at.
        input_ids: (B, T) int64, on the model's device.
    """
    return _record(model, blocks, lambda: run(model, input_ids))


def record_layer(model: PreTrainedModel, block: Block, shape: Sequence[int], run: Callable[[], object]) -> Activations:
    """As `record_activations`, of one block, whose decoder layer ``run`` runs alone on (B, T, D); ``shape`` is (B, T)."""
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

    Raises:
        UnsupportedBlockError: a block is not run on each token, or the model changed what was recorded.
    """
    inputs: dict[int, Tensor] = {}
    recorded: dict[int, Activations] = {}
    versions: dict[int, int] = {}  # how often a block's input had been changed in place
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
            if x.shape[:-1].numel() != math.prod(shape):
                raise UnsupportedBlockError(
                    f"decoder layer {layer} runs its block on {x.shape[:-1].numel()} positions of {math.prod(shape)} tokens",
                    expected="a block that is run once on each token",
                    fix="leave this layer out with --layers",
                )
            # Some families flatten (B, T) before the block; some add to its output, in place (Falcon, Llama 4).
            recorded[layer] = Activations(x.view(*shape, -1), output.clone().view(*shape, -1))
            versions[layer] = x._version
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
    for layer, pair in recorded.items():
        if pair.x._version != versions[layer]:
            raise UnsupportedBlockError(
                f"decoder layer {layer} changes its block's input in place: it cannot be recorded",
                expected="a layer that leaves what its block was given as it is",
                fix="leave this layer out with --layers",
            )
