"""``convert``: the whole job, from a model's name to a folder that transformers loads."""

import dataclasses
import functools
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import save_file
from transformers import PreTrainedModel

from mxdsurgery.accelerator import choose_kernels, make_accelerator
from mxdsurgery.blocks import prove_block
from mxdsurgery.checkpoint import PLAN_FILE, RECIPE_FILE
from mxdsurgery.console import ProgressLine, Reporter, compact, duration, size
from mxdsurgery.cost import LayerPlan, tokens_per_step
from mxdsurgery.distill import Progress, distill
from mxdsurgery.errors import ExportError, OutputError
from mxdsurgery.export import check_output, export, write_json
from mxdsurgery.initialize import initial_layers
from mxdsurgery.layer import MxDLayer
from mxdsurgery.measure import measure
from mxdsurgery.memory import PeakMemory
from mxdsurgery.model import load_model, load_tokenizer
from mxdsurgery.plan import Plan, plan, with_time
from mxdsurgery.recipe import Recipe
from mxdsurgery.text import TextStream, open_texts

# The statistics that layers start from rest on so many batches of the training text.
_STATISTICS_BATCHES = 4
# A run that takes fewer seconds, at the rate of a matrix product, starts at once: its time is not predicted.
_WORTH_PREDICTING = 60.0
# Contexts on which the reloaded checkpoint is compared with the model in memory.
_CHECK_CONTEXTS = 2


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while training; ``str()`` says where it stood and what was kept."""


@dataclass(frozen=True)
class Conversion:
    """What ``convert`` made.

    Attributes:
        out: the folder.
        plan: what was converted.
        recipe: how, resolved.
        evaluation: the figures, as in evaluation.json.
        seconds: of training.
    """

    out: Path
    plan: Plan
    recipe: Recipe
    evaluation: dict[str, Any]
    seconds: float


def convert(model: str, *, recipe: str | Path | None = None, reporter: Reporter | None = None, **overrides: Any) -> Conversion:
    """Replaces MLP blocks by Mixture-of-Decoders layers, distils them, measures the cost and exports the result.

    Args:
        model: hub id, local folder, ``demo-glu`` or ``demo-mlp``.
        recipe: a recipe file or the name of one that comes with mxdsurgery; default: the one made for the model.
        reporter: what to tell while working; default: nothing.
        **overrides: recipe keys, for example ``layers="2-5"``, ``tokens=2_000_000``, ``k=16``, ``out="folder"``.

    Returns:
        The folder and the figures.

    Raises:
        MxDError: one of its named kinds; the output folder is not there then.
        Interrupted: Ctrl-C while training; the layers so far are kept in ``<out>.interrupted``.
    """
    reporter = reporter or Reporter()
    made, resolved = plan(model, recipe=recipe, **overrides)
    out = check_output(resolved.out, resolved.overwrite)
    made.check_budget()
    made = with_time(made, resolved, _WORTH_PREDICTING)
    for line in (f"recipe     {made.recipe_file}", *made.summary(resolved)):
        reporter.say(line)
    accelerator = make_accelerator(resolved)
    tokenizer = load_tokenizer(model, resolved.revision)
    train, heldout = open_texts(resolved, tokenizer)

    memory = PeakMemory(accelerator.device.type)
    base = load_model(model, revision=resolved.revision, dtype=made.dtype, device=accelerator.device)
    worst = max(prove_block(base, block) for block in made.blocks)
    reporter.say(f"proof      {len(made.blocks)} blocks recomputed from their weights, largest relative error {worst:.1e}")
    training = Training(len(made.groups))
    with _kept(out, made, resolved, training):
        _train(base, made, train, resolved, accelerator, training, reporter)
        record = _training_record(made, training, memory.bytes())
        for line in _comparison(record):
            reporter.say(line)
        for layer in training.layers.values():
            layer.to(accelerator.device)
        with reporter.progress("evaluate", "passes") as line:
            evaluation = measure(base, made.blocks, training.layers, heldout, resolved.batch, line.update)
        evaluation |= {"data": resolved.eval_data or resolved.data, "training": record}
        check_ids = heldout[:_CHECK_CONTEXTS]
        differences = export(base, training.layers, made, resolved, evaluation, tokenizer, check_ids, out)
    reporter.say(
        f"exported   {resolved.out}; reloaded without mxdsurgery, logits differ by at most {differences['logits']:.1g}"
    )
    return Conversion(out, made, resolved, evaluation, training.seconds)


@dataclass
class Training:
    """Where the training of all groups stands; kept up to date while it runs, so that an interrupted one can be described.

    Attributes:
        groups: how many there are.
        passes: the progress of each group begun so far; one pass over the text each.
        layers: by index: those that are finished, in the base model's dtype, and those in training, in fp32.
        times_read: how many times a pass began the text, because it is shorter than the training.
    """

    groups: int
    passes: list[Progress] = field(default_factory=list)
    layers: dict[int, MxDLayer] = field(default_factory=dict)
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
    def nmse(self) -> dict[int, float]:
        """By layer."""
        return {layer: value for progress in self.passes for layer, value in progress.nmse.items()}

    @property
    def dead_share(self) -> dict[int, float]:
        """By layer."""
        return {layer: value for progress in self.passes for layer, value in progress.dead_share.items()}


def _train(
    base: PreTrainedModel,
    made: Plan,
    train: TextStream,
    recipe: Recipe,
    accelerator: Accelerator,
    training: Training,
    reporter: Reporter,
) -> None:
    """Distils group after group and leaves all layers frozen, in the base model's dtype; those of a GPU in host memory."""
    if recipe.tracker != "none":
        settings = {name: value for name, value in recipe.to_dict().items() if value is not None}
        accelerator.init_trackers("mxdsurgery", config=settings)
    by_index = {layer.block.layer: layer for layer in made.layers}
    largest = max(made.layers, key=lambda layer: layer.n_experts)
    kernels = choose_kernels(
        accelerator, d_model=largest.block.d_model, n_experts=largest.n_experts, k=largest.k, tokens=tokens_per_step(recipe)
    )
    if kernels is not None:
        reporter.say(f"kernels    {kernels}")
    with ExitStack() as stack:
        # One line for all groups; it counts from when the first of them is ready to train.
        line = functools.cache(lambda: stack.enter_context(reporter.progress("distil", "tokens")))
        for group in made.groups:
            layers = [by_index[index] for index in group.layers]
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
        started = initial_layers(base, layers, sample, init=recipe.init, seed=recipe.seed)
        training.layers |= started
        training.passes.append(Progress(steps, tokens_per_step(recipe), steps * len(training.passes)))
        every, blocks = itertools.chain(sample, batches), [layer.block for layer in layers]
        distill(base, blocks, started, every, recipe, accelerator, training.passes[-1], _report_to(line(), training))
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


def _training_record(made: Plan, training: Training, peak_bytes: int | None) -> dict[str, Any]:
    """For evaluation.json: what was trained, and what the plan said beside what was measured (None: it was not)."""
    return {
        "tokens": training.passes[-1].tokens,
        "steps": training.passes[-1].steps,
        "seconds": round(training.seconds, 1),
        "groups": [group.layers for group in made.groups],
        "passes_over_the_text": training.times_read,
        # Experts that had not fired for the last tenth of the training tokens, by layer.
        "dead_share": {str(layer): share for layer, share in training.dead_share.items()},
        "planned": {"seconds": made.seconds and round(made.seconds, 1), "peak_bytes": made.peak_bytes},
        "measured": {"seconds": round(training.seconds, 1), "peak_bytes": peak_bytes},
    }


def _comparison(record: dict[str, Any]) -> list[str]:
    """The plan's predictions beside the measured values, for a terminal."""
    lines = []
    for label, name, form in (("time", "seconds", duration), ("memory", "peak_bytes", size)):
        planned, measured = (record[kind][name] for kind in ("planned", "measured"))
        words = [f"{form(measured)} measured" if measured is not None else "not measured here"]
        words.append(f"{form(planned)} planned" if planned is not None else "not predicted")
        lines.append(f"{label:10} {', '.join(words)}")
    return lines


@contextmanager
def _kept(out: Path, made: Plan, recipe: Recipe, training: Training) -> Iterator[None]:
    """Keeps the layers when the work inside is interrupted, or when its result cannot be written.

    Raises:
        Interrupted: Ctrl-C.
        OutputError, ExportError: as inside, telling what was kept.
    """
    try:
        yield
    except KeyboardInterrupt:
        if not training.passes:
            raise
        raise Interrupted(f"Interrupted. {_keep_layers(out, made, recipe, training)}") from None
    except (OutputError, ExportError) as error:
        try:
            kept = _keep_layers(out, made, recipe, training)
        except OSError:  # the same disk is full
            raise error from None
        raise type(error)(f"{error.found}\n{kept}", expected=error.expected, fix=error.fix) from None


def _keep_layers(out: Path, made: Plan, recipe: Recipe, training: Training) -> str:
    """Writes the layers as far as they are trained, and says so. Replaces what an earlier run left there."""
    folder = out.with_name(out.name + ".interrupted")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    layers = training.layers.items()
    tensors = {f"{i}.{name}": t.contiguous() for i, layer in layers for name, t in layer.state_dict().items()}
    save_file(tensors, folder / "layers.safetensors")
    (folder / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
    write_json(folder / PLAN_FILE, made.to_dict())
    write_json(folder / "state.json", _state(made, training))
    last = training.passes[-1]
    group = f" of group {len(training.passes)} of {training.groups}" if training.groups > 1 else ""
    return (
        f"No model was written to {out}. The layers after step {last.step} of {last.steps}{group} "
        f"({compact(last.tokens)} tokens) are in {folder}: layers.safetensors, state.json (where training stood), "
        "recipe.yaml and plan.json."
    )


def _state(made: Plan, training: Training) -> dict[str, Any]:
    """For state.json: where the group that was in training stood, and which layers are finished."""
    last = training.passes[-1]
    done = [progress.step == progress.steps for progress in training.passes]
    finished = [i for group, whole in zip(made.groups, done, strict=False) if whole for i in group.layers]
    figures = {"seconds": training.seconds, "nmse": training.nmse, "dead_share": training.dead_share}
    place = {"group": len(training.passes), "groups": training.groups, "finished_layers": finished}
    return dataclasses.asdict(last) | figures | {"tokens": last.tokens} | place | {"finished": training.finished}
