"""Training: all new layers of a plan, group after group, each group from one pass over the text."""

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from mxdsurgery.accelerator import choose_kernels
from mxdsurgery.console import ProgressLine, Reporter, compact, duration
from mxdsurgery.cost import LayerPlan, tokens_per_step
from mxdsurgery.distill import Progress, distill
from mxdsurgery.endtoend import VALIDATION_TOKENS, EndToEnd, Settings, train_end_to_end
from mxdsurgery.initialize import initial_layers
from mxdsurgery.inputs import ConvertedInputs, OriginalInputs
from mxdsurgery.offload import execution_device, on_disk
from mxdsurgery.plan import Plan
from mxdsurgery.recipe import Recipe
from mxdsurgery.teacher import original_examples
from mxdsurgery.text import TextStream

# The weight of each layer's own loss beside the KL, where layers are trained jointly from their start.
JOINT_LOCAL = 1.0


@dataclass
class Training:
    """Where the training of all groups stands; kept up to date while it runs, so that an interrupted one can be described.

    Attributes:
        groups: how many there are.
        passes: the progress of each group begun so far; one pass over the text each.
        layers: those that are finished, in the base model's dtype, and those in training, in fp32.
        times_read: how many times a pass began the text, because it is shorter than the training.
        seconds_feeding: spent on statistics and on hidden states, before the layers' own steps.
    """

    groups: int
    passes: list[Progress] = field(default_factory=list)
    layers: dict[LayerPlan, nn.Module] = field(default_factory=dict)
    times_read: int = 0
    seconds_feeding: float = 0.0

    @property
    def seconds(self) -> float:
        """Of all passes so far, and of what had to be run before each."""
        return self.seconds_feeding + sum(progress.seconds for progress in self.passes)

    @property
    def finished(self) -> bool:
        """Whether all groups are trained."""
        return len(self.passes) == self.groups and all(progress.step == progress.steps for progress in self.passes)

    @property
    def nmse(self) -> dict[LayerPlan, float]:
        """Over the last steps looked at."""
        return {layer: value for progress in self.passes for layer, value in progress.nmse.items()}

    @property
    def dead_share(self) -> dict[LayerPlan, float]:
        """Of the experts."""
        return {layer: value for progress in self.passes for layer, value in progress.dead_share.items()}


def train_groups(
    base: PreTrainedModel,
    made: Plan,
    train: TextStream,
    recipe: Recipe,
    accelerator: Accelerator,
    training: Training,
    reporter: Reporter,
    scratch: Path | None = None,
) -> None:
    """Distils group after group and leaves all layers frozen, in the base model's dtype; those of a GPU in host memory.

    Args:
        base: the unmodified model, on the accelerator's device, or with its weights on disk.
        made: which layers, in which groups.
        train: the text; each group reads it from its beginning.
        recipe: how.
        accelerator: device, precision and trackers.
        training: is kept up to date.
        reporter: what to tell.
        scratch: a folder for what the plan keeps on disk, the hidden states or finished layers.

    Raises:
        DivergedError: naming the layer.
        DataError: the text cannot be read to its end.
        UnsupportedBlockError: with inputs: converted, the decoder layers cannot be run one by one.
    """
    if recipe.tracker != "none":
        settings = {name: value for name, value in recipe.to_dict().items() if value is not None}
        accelerator.init_trackers("mxdsurgery", config=settings)
    start_kernels(accelerator, made.layers, tokens_per_step(recipe), reporter)
    start = time.perf_counter()
    folder = scratch if made.states_on_disk else None
    source = _source(base, train, recipe, accelerator.device, reporter, folder)
    training.seconds_feeding += time.perf_counter() - start
    with ExitStack() as stack:
        # One line for all groups; it counts from when the first of them is ready to train.
        line = functools.cache(lambda: stack.enter_context(reporter.progress("distil", "tokens")))
        remaining = iter(made.layers)
        for group in made.groups:
            layers = list(itertools.islice(remaining, len(group.layers)))
            _train_group(base, layers, source, made.steps, recipe, accelerator, training, line)
            source.replace(_finished(layers, base, training, scratch if made.offloaded else None))
    accelerator.end_training()
    dead = sum(training.dead_share.values()) / len(training.dead_share)
    tokens = compact(training.passes[-1].tokens)
    reporter.say(f"distilled  {tokens} tokens in {duration(training.seconds)}, {dead:.1%} of experts dead")
    if training.times_read > 1:
        reporter.say(f"           the text is short: it was read {training.times_read} times over")


def start_kernels(accelerator: Accelerator, layers: Sequence[LayerPlan], tokens: int, reporter: Reporter) -> None:
    """Puts the Triton kernels to use if they are faster for the largest of some layers on so many tokens, and says so."""
    largest = max(layers, key=lambda layer: layer.n_experts)
    shape = {"d_model": largest.block.d_model, "n_experts": largest.n_experts, "k": largest.k}
    kernels = choose_kernels(accelerator, **shape, tokens=tokens)
    if kernels is not None:
        reporter.say(f"kernels    {kernels}")


def _source(
    base: PreTrainedModel,
    train: TextStream,
    recipe: Recipe,
    device: torch.device,
    reporter: Reporter,
    folder: Path | None,
) -> OriginalInputs | ConvertedInputs:
    """Where the layers' inputs come from, by the recipe. Trained jointly, they start from statistics of the original's."""
    if recipe.inputs == "converted":
        return ConvertedInputs(base, train, recipe, device, folder, reporter)
    return OriginalInputs(base, train, recipe, device)


def _train_group(
    base: PreTrainedModel,
    layers: Sequence[LayerPlan],
    source: OriginalInputs | ConvertedInputs,
    steps: int,
    recipe: Recipe,
    accelerator: Accelerator,
    training: Training,
    line: Callable[[], ProgressLine],
) -> None:
    """Some layers on the same text as all others: a layer learns the same in whatever group it is."""
    start = time.perf_counter()
    blocks = list({layer.block.layer: layer.block for layer in layers}.values())
    with source.feed(blocks) as feed:
        started = initial_layers(base, layers, feed.statistics, recipe)
        training.seconds_feeding += time.perf_counter() - start
        training.layers |= started
        if recipe.inputs == "joint":
            training.passes.append(EndToEnd(steps, tokens_per_step(recipe)))
            _train_jointly(base, started, source, recipe, accelerator, training, line())
        else:
            training.passes.append(Progress(steps, tokens_per_step(recipe), steps * len(training.passes)))
            distill(started, feed.batches, recipe, accelerator, training.passes[-1], _report_to(line(), training))
    training.times_read = source.times_read


def _train_jointly(
    base: PreTrainedModel,
    layers: dict[LayerPlan, nn.Module],
    source: OriginalInputs,
    recipe: Recipe,
    accelerator: Accelerator,
    training: Training,
    line: ProgressLine,
) -> None:
    """All layers at once, end to end, each also toward its block's output: at their start they say nothing."""
    contexts = recipe.batch // recipe.context
    blocks = [layer.block for layer in layers]
    validation, text = source.text.split(VALIDATION_TOKENS)
    settings = Settings(local=JOINT_LOCAL, anneal=True)
    with closing(text.batches(contexts)) as batches:
        examples = original_examples(base, blocks, batches)
        looked_at = list(original_examples(base, (), validation.split(contexts)))
        report = _report_to(line, training)
        train_end_to_end(base, layers, examples, looked_at, recipe, settings, accelerator, training.passes[-1], report)


def _finished(
    layers: Sequence[LayerPlan], base: PreTrainedModel, training: Training, folder: Path | None
) -> dict[LayerPlan, nn.Module]:
    """Freezes trained layers, in the base model's dtype, and takes them off the device: to host memory, or to a folder."""
    device = execution_device(base)
    for planned in layers:
        layer = training.layers[planned].to(device="cpu", dtype=base.dtype).eval().requires_grad_(False)
        if folder is not None:
            on_disk(layer, folder / f"layer_{planned.block.layer}.safetensors", device)
    return {planned: training.layers[planned] for planned in layers}


def _report_to(line: ProgressLine, training: Training) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        mean = sum(progress.nmse.values()) / max(1, len(progress.nmse))
        group = f"group {len(training.passes)} of {training.groups}, " if training.groups > 1 else ""
        done = sum(begun.tokens for begun in training.passes)
        line.update(done, training.groups * progress.steps * progress.tokens_per_step, f"{group}NMSE {mean:.4f}")

    return report
