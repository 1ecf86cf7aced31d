"""What layers in training are fed: inputs of their blocks and targets, from the text (recipe key ``inputs``).

``original``: both from the unmodified model, so that layers are independent and one pass of the model feeds them all.

``converted``: inputs from a model whose layers below are converted already, so that a layer learns on the inputs that it
will get. The decoder layers are processed one by one: the hidden states of the text that enter a layer are kept, in memory or
on disk; the decoder layer is run on them to train its new layer, then once more, with its block replaced, to give the hidden
states that enter the next one. No more than one decoder layer of the base model has to be in memory at a time.
"""

import copy
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from mxdsurgery.base.activations import Activations, hidden_of, record_layer, recording, stream_activations
from mxdsurgery.base.blocks import Block
from mxdsurgery.base.decoder import decoder_layers
from mxdsurgery.base.offload import move, resident
from mxdsurgery.base.running import hooked, run_base
from mxdsurgery.base.surgery import replaced
from mxdsurgery.errors import UnsupportedBlockError
from mxdsurgery.recipe import Recipe
from mxdsurgery.runs.parallel import agree, my_contexts, text_shares
from mxdsurgery.terminal.console import Reporter
from mxdsurgery.text.fingerprints import Fingerprints
from mxdsurgery.text.sources import TextStream
from mxdsurgery.training.activation_cache import ActivationCache
from mxdsurgery.training.cost import LayerPlan, kept_batches
from mxdsurgery.training.initialize import Statistics, measure_statistics, statistics_of

# The statistics that layers start from rest on so many batches of the training text.
_STATISTICS_BATCHES = 4
# Largest relative error, in fp32, with which a decoder layer adds its block's output to the hidden states.
_STREAM_TOLERANCE = 1e-3


class Read(Iterator[Tensor]):
    """Batches of ids (B, T), or contexts (T,), and what is to be remembered of all that were taken.

    Attributes:
        contexts: how many were taken.
    """

    def __init__(self, batches: Iterator[Tensor]) -> None:
        self.batches, self.sha256 = batches, hashlib.sha256()
        self.contexts = 0
        self._met: list[Fingerprints] = []

    def __next__(self) -> Tensor:
        batch = next(self.batches)
        self.sha256.update(batch.contiguous().numpy())
        contexts = batch.view(-1, batch.shape[-1])
        self.contexts += len(contexts)
        self._met.append(Fingerprints.of(contexts, contexts.shape[1]))
        return batch

    def skip(self, count: int) -> None:
        """Takes ``count`` batches and drops them."""
        for _ in range(count):
            next(self)

    def digest(self) -> str:
        """SHA-256 of the batches taken so far: a resumed run checks with it that its text is the same."""
        return self.sha256.hexdigest()

    def fingerprints(self) -> Fingerprints:
        """Of the contexts taken so far; at least one was."""
        self._met = [Fingerprints.union(self._met)]
        return self._met[0]


class Feed(NamedTuple):
    """What some layers are trained on.

    Attributes:
        statistics: of the blocks that they stand for, by layer.
        batches: endless, by layer: inputs and targets (B T, D).
        read: the text, as far as it was taken.
    """

    statistics: dict[int, Statistics]
    batches: Iterator[dict[int, Activations]]
    read: Read


class OriginalInputs:
    """Inputs and targets from the unmodified model, all blocks from one pass. It reads the text anew for each group of layers.

    Args:
        base: the model, on the device of the training.
        text: what it reads.
        recipe: batch, context, parallel.
        device: of the training.
        kept: where activations are read that are kept already, and others are kept; default: nowhere.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        text: TextStream,
        recipe: Recipe,
        device: torch.device,
        kept: ActivationCache | None = None,
    ) -> None:
        self.base, self.text, self.recipe, self.device, self.kept = base, text, recipe, device, kept
        self.contexts = recipe.batch // recipe.context
        self.times_read = 0
        self.read = Read(iter(()))

    @contextmanager
    def feed(self, blocks: Sequence[Block], skip: int = 0) -> Iterator[Feed]:
        """Opens the text for the layers that stand for some blocks; an earlier process took the first ``skip`` batches."""
        text = dataclasses.replace(self.text)
        with closing(text.batches(self.contexts)) as batches:
            sample = list(itertools.islice(batches, _STATISTICS_BATCHES))
            self.read = Read(itertools.chain(sample, batches))
            if self.kept is None:
                statistics = measure_statistics(self.base, blocks, [batch.to(self.device) for batch in sample])
            else:
                statistics = statistics_of(self.kept.sample(blocks, sample))
            self.read.skip(skip)
            mine = (my_contexts(batch, self.recipe) for batch in self.read)
            if self.kept is None:
                stream = stream_activations(self.base, blocks, mine, self.device)
            else:
                stream = self.kept.stream(blocks, mine, skip)
            with closing(stream):
                yield Feed(statistics, stream, self.read)
        self.times_read = text.passes

    def replace(self, layers: Mapping[LayerPlan, nn.Module]) -> None:
        """Does nothing: trained layers do not change what later ones are fed."""


class HiddenStates:
    """The hidden states (B, T, D) that enter one decoder layer, of each batch of a text: ``converted``, or also ``original``.

    Args:
        folder: where they are kept, a safetensors file for each batch; None: in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.held: dict[int, dict[str, Tensor]] = {}
        self.count = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return self.held[number] if self.folder is None else load_file(self._path(number))

    def __setitem__(self, number: int, states: Mapping[str, Tensor]) -> None:
        states = {name: state.cpu().contiguous() for name, state in states.items()}
        if self.folder is None:
            self.held[number] = states
        else:
            aside = self._path(number).with_suffix(".new")  # tensors read from the old file may still be in use
            save_file(states, aside)
            os.replace(aside, self._path(number))
        self.count = max(self.count, number + 1)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.safetensors"


class ConvertedInputs:
    """Inputs from the model with the layers below replaced, one decoder layer after the other.

    Args:
        base: the model; its weights may lie on disk.
        text: what it reads, once.
        recipe: batch, context, target, tokens, kept_tokens, seed.
        device: of the training.
        folder: where the hidden states are kept; None: in memory.
        reporter: is told how much of the text is read.

    Raises:
        UnsupportedBlockError: the model's decoder layers cannot be run one by one.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        text: TextStream,
        recipe: Recipe,
        device: torch.device,
        folder: Path | None,
        reporter: Reporter,
    ) -> None:
        self.base, self.recipe, self.device = base, recipe, device
        self.path, self.decoder = decoder_layers(base)
        self.states = HiddenStates(folder)
        self.at = 0  # the decoder layer that the states enter
        self.new: dict[int, tuple[Block, nn.Module]] = {}
        text = dataclasses.replace(text)
        count = kept_batches(recipe)
        with (
            closing(text.batches(recipe.batch // recipe.context)) as batches,
            reporter.progress("embed", "batches") as line,
            _embeddings_resident(base, self.decoder),
        ):
            self.read = Read(batches)
            for number, input_ids in enumerate(itertools.islice(self.read, count)):
                input_ids = my_contexts(input_ids, recipe).to(device, non_blocking=True)
                if number == 0:
                    self.calls = prove_layers(base, self.decoder, input_ids)
                    self.shape = tuple(input_ids.shape)
                elif number == 1:
                    _check_calls(self.calls, prove_layers(base, self.decoder, input_ids))
                self.states[number] = {"converted": _entering(base, self.decoder, input_ids)}
                line.update(number + 1, count)
        self.times_read = text.passes

    @contextmanager
    def feed(self, blocks: Sequence[Block], skip: int = 0) -> Iterator[Feed]:
        """Goes on to the decoder layer of a block, which has to be above all that were fed before; see `OriginalInputs`."""
        (block,) = blocks
        while self.at < block.layer:
            self._advance()
        with resident(self.decoder[self.at]):
            if self.recipe.target == "stream":
                self._prove_stream(block)
            sample = ({block.layer: self._activations(block, number)} for number in range(_STATISTICS_BATCHES))
            statistics = statistics_of(sample)
            for mean in statistics[block.layer][:2]:
                agree(mean, text_shares(self.recipe), mean=True)
            yield Feed(statistics, self._batches(block, skip), self.read)

    def replace(self, layers: Mapping[LayerPlan, nn.Module]) -> None:
        """From here on the model has these layers, in the base model's dtype, in place of their blocks."""
        self.new |= {plan.block.layer: (plan.block, layer) for plan, layer in layers.items()}

    @torch.no_grad()
    def _advance(self) -> None:
        """Runs one decoder layer: the states then enter the next one."""
        block, new = self.new.get(self.at, (None, None))
        if new is not None:
            move(new, self.device)
        with resident(self.decoder[self.at]):
            for number in range(len(self.states)):
                states = self.states[number]
                if new is None:
                    self.states[number] = {name: self._run(state) for name, state in states.items()}
                    continue
                with replaced(self.base, [block], {block.layer: new}):
                    after = {"converted": self._run(states["converted"])}
                if self.recipe.target != "own":
                    after["original"] = self._run(states.get("original", states["converted"]))
                self.states[number] = after
        if new is not None:
            move(new, "cpu")
        self.at += 1

    def _run(self, state: Tensor) -> Tensor:
        """The output of the decoder layer that the states enter, for one of them: (B, T, D) -> (B, T, D)."""
        args, kwargs = self.calls[self.at]
        return hidden_of(self.decoder[self.at](state.to(self.device), *args, **kwargs))

    def _activations(self, block: Block, number: int) -> Activations:
        """A block's inputs in the converted model and its targets, each (B, T, D), on one batch of the text."""
        states = self.states[number % len(self.states)]
        if self.recipe.target == "stream" and "original" in states:
            return self._toward_stream(block, states)
        x, y = record_layer(self.base, block, self.shape, lambda: self._run(states["converted"]))
        if "original" in states:
            y = record_layer(self.base, block, self.shape, lambda: self._run(states["original"])).y
        return Activations(x, y)

    @torch.no_grad()
    def _prove_stream(self, block: Block) -> None:
        """Raises UnsupportedBlockError unless the decoder layer adds its block's output, unchanged, to the hidden states."""

        def single(value: Any) -> Any:
            return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

        layer, (args, kwargs) = copy.deepcopy(self.decoder[self.at]).float(), tree_map(single, self.calls[self.at])
        state = self.states[0]["converted"].to(self.device).float()
        outputs: list[Tensor] = []
        once = hidden_of(layer(state, *args, **kwargs))
        module = layer.get_submodule(block.output_path.removeprefix(f"{self.path}.{self.at}."))
        with hooked(module.register_forward_hook(lambda _m, _a, y: outputs.append(y) or 2 * y)):
            twice = hidden_of(layer(state, *args, **kwargs))
        y = outputs[0].view_as(once)
        if not (twice - once - y).norm() <= _STREAM_TOLERANCE * y.norm():
            raise UnsupportedBlockError(
                f"decoder layer {self.at} does something to its block's output before it adds it to the hidden states",
                expected="a layer whose output is the hidden states plus the block's output, for target: stream",
                fix="learn toward the block's output: --target own, or --target original",
            )

    @torch.no_grad()
    def _toward_stream(self, block: Block, states: Mapping[str, Tensor]) -> Activations:
        """The target is the block's own output, plus the original decoder layer's output minus the converted model's."""
        with recording(self.base, [block], shape=self.shape) as recorded:
            own = self._run(states["converted"])
            x, y = recorded[block.layer]
            return Activations(x, y + (self._run(states["original"]) - own))

    def _batches(self, block: Block, skip: int) -> Iterator[dict[int, Activations]]:
        """All batches again and again, from the second pass on in random order; without the first ``skip`` of them."""
        for number in itertools.islice(self._order(), skip, None):
            x, y = self._activations(block, number)
            yield {block.layer: Activations(x.flatten(0, 1), y.flatten(0, 1))}

    def _order(self) -> Iterator[int]:
        """The batches' numbers in the order of training, endless."""
        count = len(self.states)
        yield from range(count)
        for times in itertools.count(1):
            generator = torch.Generator().manual_seed(self.recipe.seed + times)
            yield from torch.randperm(count, generator=generator).tolist()


def _embeddings_resident(base: PreTrainedModel, decoder: nn.ModuleList) -> ExitStack:
    """Keeps in memory what the base model holds beside the decoder layers: embeddings and last norm, for example."""
    stack = ExitStack()
    for child in base.base_model.children():
        if all(module is not decoder for module in child.modules()):
            stack.enter_context(resident(child))
    return stack


# What a decoder layer is called with beside the hidden states.
_Call = tuple[tuple[Any, ...], dict[str, Any]]


def prove_layers(base: PreTrainedModel, decoder: nn.ModuleList, input_ids: Tensor) -> list[_Call]:
    """What each decoder layer is called with on a batch (B, T); checks that nothing happens between two of them.

    Raises:
        UnsupportedBlockError: what enters a layer is not what came out of the one below, or another number of layers ran.
    """
    calls: list[_Call] = []
    below: list[Tensor] = []

    def enter(_layer: nn.Module, args: tuple, kwargs: dict) -> None:
        args, kwargs = list(args), dict(kwargs)
        state = args.pop(0) if args else kwargs.pop("hidden_states")
        if below and not torch.equal(state, below[0]):
            raise _not_one_by_one(base, f"what enters layer {len(calls)} is not what leaves layer {len(calls) - 1}")
        calls.append((tuple(args), kwargs))

    def leave(_layer: nn.Module, _args: tuple, output: object) -> None:
        below[:] = [hidden_of(output)]

    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in decoder]
    handles += [layer.register_forward_hook(leave) for layer in decoder]
    with hooked(*handles), torch.no_grad():
        run_base(base, input_ids)
    if len(calls) != len(decoder):
        raise _not_one_by_one(base, f"{len(calls)} decoder layers ran instead of {len(decoder)}")
    return calls


def _check_calls(calls: list[_Call], others: list[_Call]) -> None:
    """Raises UnsupportedBlockError if the layers are given something that depends on the text."""
    for layer, (mine, theirs) in enumerate(zip(calls, others, strict=True)):
        for one, other in zip(tree_leaves(mine), tree_leaves(theirs), strict=True):
            equal = torch.equal(one, other) if isinstance(one, Tensor) else one == other
            if not equal:
                raise _not_one_by_one(None, f"layer {layer} is given something else on each text")


def _not_one_by_one(base: PreTrainedModel | None, reason: str) -> UnsupportedBlockError:
    what = "this model" if base is None else type(base).__name__
    return UnsupportedBlockError(
        f"the decoder layers of {what} cannot be run one by one: {reason}",
        expected="layers that depend on nothing but the hidden states of the layer below",
        fix="convert with --inputs original",
    )


class _Entered(Exception):
    """Ends a forward pass before the first decoder layer; ``args[0]`` is what would have entered it."""


def _entering(base: PreTrainedModel, decoder: nn.ModuleList, input_ids: Tensor) -> Tensor:
    """The hidden states (B, T, D) that enter the first decoder layer."""

    def enter(_layer: nn.Module, args: tuple, kwargs: dict) -> None:
        raise _Entered(args[0] if args else kwargs["hidden_states"])

    with hooked(decoder[0].register_forward_pre_hook(enter, with_kwargs=True)), torch.no_grad():
        try:
            run_base(base, input_ids)
        except _Entered as entered:
            return entered.args[0]
    raise _not_one_by_one(base, "the first of them did not run")
