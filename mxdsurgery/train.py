"""Training: all new layers of a plan, group after group, each group from one pass over the text."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from mxdsurgery.accelerator import choose_kernels
from mxdsurgery.console import ProgressLine, Reporter, compact, duration
from mxdsurgery.cost import LayerPlan, tokens_per_step
from mxdsurgery.distill import Progress, distill
from mxdsurgery.initialize import initial_layers
from mxdsurgery.plan import Plan
from mxdsurgery.recipe import Recipe
from mxdsurgery.text import TextStream

# The statistics that layers start from rest on so many batches of the training text.
_STATISTICS_BATCHES = 4


@dataclass
class Training:
    """Where the training of all groups stands; kept up to date while it runs, so that an interrupted one can be described.

    Attributes:
        groups: how many there are.
        passes: the progress of each group begun so far; one pass over the text each.
        layers: those that are finished, in the base model's dtype, and those in training, in fp32.
        times_read: how many times a pass began the text, because it is shorter than the training.
    """

    groups: int
    passes: list[Progress] = field(default_factory=list)
    layers: dict[LayerPlan, nn.Module] = field(default_factory=dict)
    times_read: int = 0

    @property
    def seconds(self) -> float:
        """Of all passes so far."""
        return sum(progress.seconds for progress in self.passes)

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
) -> None:
    """Distils group after group and leaves all layers frozen, in the base model's dtype; those of a GPU in host memory.

    Args:
        base: the unmodified model, on the accelerator's device.
        made: which layers, in which groups.
        train: the text; each group reads it from its beginning.
        recipe: how.
        accelerator: device, precision and trackers.
        training: is kept up to date.
        reporter: what to tell.

    Raises:
        DivergedError: naming the layer.
        DataError: the text cannot be read to its end.
    """
    if recipe.tracker != "none":
        settings = {name: value for name, value in recipe.to_dict().items() if value is not None}
        accelerator.init_trackers("mxdsurgery", config=settings)
    largest = max(made.layers, key=lambda layer: layer.n_experts)
    kernels = choose_kernels(
        accelerator, d_model=largest.block.d_model, n_experts=largest.n_experts, k=largest.k, tokens=tokens_per_step(recipe)
    )
    if kernels is not None:
        reporter.say(f"kernels    {kernels}")
    with ExitStack() as stack:
        # One line for all groups; it counts from when the first of them is ready to train.
        line = functools.cache(lambda: stack.enter_context(reporter.progress("distil", "tokens")))
        remaining = iter(made.layers)
        for group in made.groups:
            layers = list(itertools.islice(remaining, len(group.layers)))
            _train_group(base, layers, train, made.steps, recipe, accelerator, training, line)
    accelerator.end_training()
    dead = sum(training.dead_share.values()) / len(training.dead_share)
    tokens = compact(training.passes[-1].tokens)
    reporter.say(f"distilled  {tokens} tokens in {duration(training.seconds)}, {dead:.1%} of experts dead")
    if training.times_read > 1:
        reporter.say(f"           the text is short: it was read {training.times_read} times over")


def _train_group(
    base: PreTrainedModel,
    layers: Sequence[LayerPlan],
    train: TextStream,
    steps: int,
    recipe: Recipe,
    accelerator: Accelerator,
    training: Training,
    line: Callable[[], ProgressLine],
) -> None:
    """One pass over the text, always the same one: a layer learns the same in whatever group it is."""
    text = dataclasses.replace(train)
    with closing(text.batches(recipe.batch // recipe.context)) as batches:
        sample = [batch.to(accelerator.device) for batch in itertools.islice(batches, _STATISTICS_BATCHES)]
        started = initial_layers(base, layers, sample, recipe)
        training.layers |= started
        training.passes.append(Progress(steps, tokens_per_step(recipe), steps * len(training.passes)))
        every = itertools.chain(sample, batches)
        distill(base, started, every, recipe, accelerator, training.passes[-1], _report_to(line(), training))
    training.times_read = text.passes
    for layer in started.values():
        layer.to(device="cpu", dtype=base.dtype).eval().requires_grad_(False)


def _report_to(line: ProgressLine, training: Training) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        mean = sum(progress.nmse.values()) / len(progress.nmse)
        group = f"group {len(training.passes)} of {training.groups}, " if training.groups > 1 else ""
        done = sum(begun.tokens for begun in training.passes)
        line.update(done, training.groups * progress.steps * progress.tokens_per_step, f"{group}NMSE {mean:.4f}")

    return report
