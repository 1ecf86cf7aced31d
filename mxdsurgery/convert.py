"""``convert``: the whole job, from a model's name to a folder that transformers loads."""

import dataclasses
import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from mxdsurgery.accelerator import make_accelerator
from mxdsurgery.blocks import prove_block
from mxdsurgery.checkpoint import PLAN_FILE, RECIPE_FILE
from mxdsurgery.console import ProgressLine, Reporter, compact, duration
from mxdsurgery.distill import Progress, distill
from mxdsurgery.errors import ExportError, OutputError
from mxdsurgery.export import check_output, export, write_json
from mxdsurgery.initialize import initial_layer, measure_statistics
from mxdsurgery.layer import MxDLayer
from mxdsurgery.measure import measure
from mxdsurgery.model import load_model, load_tokenizer
from mxdsurgery.plan import Plan, plan
from mxdsurgery.recipe import Recipe
from mxdsurgery.text import TextStream, open_texts

# The statistics that layers start from rest on so many batches of the training text.
_STATISTICS_BATCHES = 4
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
    for line in (f"recipe     {made.recipe_file}", *made.summary(resolved)):
        reporter.say(line)
    accelerator = make_accelerator(resolved)
    tokenizer = load_tokenizer(model, resolved.revision)
    train, heldout = open_texts(resolved, tokenizer)

    base = load_model(model, revision=resolved.revision, dtype=made.dtype, device=accelerator.device)
    worst = max(prove_block(base, block) for block in made.blocks)
    reporter.say(f"proof      {len(made.blocks)} blocks recomputed from their weights, largest relative error {worst:.1e}")
    contexts = resolved.batch // resolved.context
    batches = train.batches(contexts)
    sample = [batch.to(accelerator.device) for batch in itertools.islice(batches, _STATISTICS_BATCHES)]
    layers = _initial_layers(base, made, resolved, sample)
    progress = Progress(made.steps, contexts * resolved.context)
    with _kept(out, layers, made, resolved, progress):
        _train(base, made, layers, itertools.chain(sample, batches), resolved, accelerator, progress, reporter)
        if train.passes > 1:
            reporter.say(f"           the text is short: it was read {train.passes} times over")
        with reporter.progress("evaluate", "passes") as line:
            evaluation = measure(base, made.blocks, layers, heldout, resolved.batch, line.update)
        evaluation |= {"data": resolved.eval_data or resolved.data, "training": _training_record(progress, train)}
        differences = export(base, layers, made, resolved, evaluation, tokenizer, heldout[:_CHECK_CONTEXTS], out)
    reporter.say(
        f"exported   {resolved.out}; reloaded without mxdsurgery, logits differ by at most {differences['logits']:.1g}"
    )
    return Conversion(out, made, resolved, evaluation, progress.seconds)


def _initial_layers(base: PreTrainedModel, made: Plan, recipe: Recipe, sample: list[Tensor]) -> dict[int, MxDLayer]:
    """New layers by index, fp32, started from the base model and the statistics of a sample of the text."""
    statistics = measure_statistics(base, made.blocks, sample)
    return {
        layer.block.layer: initial_layer(
            base,
            layer.block,
            n_experts=layer.n_experts,
            k=layer.k,
            init=recipe.init,
            statistics=statistics[layer.block.layer],
            seed=recipe.seed,
        )
        for layer in made.layers
    }


def _train(
    base: PreTrainedModel,
    made: Plan,
    layers: dict[int, MxDLayer],
    batches: Iterator[Tensor],
    recipe: Recipe,
    accelerator: Accelerator,
    progress: Progress,
    reporter: Reporter,
) -> None:
    """Distils the layers in place and leaves them frozen, in the base model's dtype."""
    if recipe.tracker != "none":
        settings = {name: value for name, value in recipe.to_dict().items() if value is not None}
        accelerator.init_trackers("mxdsurgery", config=settings)
    with reporter.progress("distil", "tokens") as line:
        distill(base, made.blocks, layers, batches, recipe, accelerator, progress, _report_to(line))
    accelerator.end_training()
    for layer in layers.values():
        layer.to(base.dtype).eval().requires_grad_(False)
    dead = sum(progress.dead_share.values()) / len(progress.dead_share)
    reporter.say(f"distilled  {compact(progress.tokens)} tokens in {duration(progress.seconds)}, {dead:.1%} of experts dead")


def _report_to(line: ProgressLine) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        mean = sum(progress.nmse.values()) / len(progress.nmse)
        line.update(progress.tokens, progress.steps * progress.tokens_per_step, f"NMSE {mean:.4f}")

    return report


def _training_record(progress: Progress, train: TextStream) -> dict[str, Any]:
    return {
        "tokens": progress.tokens,
        "steps": progress.steps,
        "seconds": round(progress.seconds, 1),
        "passes_over_the_text": train.passes,
        # Experts that had not fired for the last tenth of the training tokens, by layer.
        "dead_share": {str(layer): share for layer, share in progress.dead_share.items()},
    }


@contextmanager
def _kept(out: Path, layers: dict[int, MxDLayer], made: Plan, recipe: Recipe, progress: Progress) -> Iterator[None]:
    """Keeps the layers when the work inside is interrupted, or when its result cannot be written.

    Raises:
        Interrupted: Ctrl-C.
        OutputError, ExportError: as inside, telling what was kept.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"Interrupted. {_keep_layers(out, layers, made, recipe, progress)}") from None
    except (OutputError, ExportError) as error:
        try:
            kept = _keep_layers(out, layers, made, recipe, progress)
        except OSError:  # the same disk is full
            raise error from None
        raise type(error)(f"{error.found}\n{kept}", expected=error.expected, fix=error.fix) from None


def _keep_layers(out: Path, layers: dict[int, MxDLayer], made: Plan, recipe: Recipe, progress: Progress) -> str:
    """Writes the layers as far as they are trained, and says so. Replaces what an earlier run left there."""
    folder = out.with_name(out.name + ".interrupted")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tensors = {f"{i}.{name}": t.contiguous() for i, layer in layers.items() for name, t in layer.state_dict().items()}
    save_file(tensors, folder / "layers.safetensors")
    (folder / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
    write_json(folder / PLAN_FILE, made.to_dict())
    finished = progress.step == progress.steps
    write_json(folder / "state.json", dataclasses.asdict(progress) | {"tokens": progress.tokens, "finished": finished})
    return (
        f"No model was written to {out}. The layers after step {progress.step} of {progress.steps} "
        f"({compact(progress.tokens)} tokens) are in {folder}: layers.safetensors, state.json (where training stood), "
        "recipe.yaml and plan.json."
    )
