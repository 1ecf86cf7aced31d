"""``convert``: the whole job, from a model's name to a folder that transformers loads."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedModel

from mxdsurgery.accelerator import make_accelerator
from mxdsurgery.blocks import Block, prove_block
from mxdsurgery.checkpoint import PLAN_FILE, RECIPE_FILE
from mxdsurgery.console import Reporter, compact, duration, size
from mxdsurgery.errors import BaseModelError, ExportError, Interrupted, OutputError
from mxdsurgery.export import check_output, export, write_json
from mxdsurgery.measure import measure
from mxdsurgery.memory import PeakMemory
from mxdsurgery.model import decoder_layers, load_model, load_tokenizer
from mxdsurgery.offload import move, resident, weights_of
from mxdsurgery.plan import WORTH_PREDICTING, Plan, plan, with_time
from mxdsurgery.recipe import Recipe
from mxdsurgery.text import open_texts
from mxdsurgery.train import Training, train_groups

# Contexts on which the reloaded checkpoint is compared with the model in memory.
_CHECK_CONTEXTS = 2


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
    made = with_time(made, resolved, WORTH_PREDICTING)
    for line in (f"recipe     {made.recipe_file}", *made.summary(resolved)):
        reporter.say(line)
    accelerator = make_accelerator(resolved)
    tokenizer = load_tokenizer(model, resolved.revision)
    train, heldout = open_texts(resolved, tokenizer)

    memory = PeakMemory(accelerator.device.type)
    training = Training(len(made.groups))
    with _scratch(out, made) as scratch, _kept(out, made, resolved, training):
        offload = scratch if made.offloaded else None
        base = load_model(model, revision=resolved.revision, dtype=made.dtype, device=accelerator.device, offload=offload)
        worst = max(_proof(base, block) for block in made.blocks)
        reporter.say(f"proof      {len(made.blocks)} blocks recomputed from their weights, largest relative error {worst:.1e}")
        train_groups(base, made, train, resolved, accelerator, training, reporter, scratch)
        record = _training_record(made, training, memory.bytes())
        for line in _comparison(record):
            reporter.say(line)
        layers = {planned.block.layer: layer for planned, layer in training.layers.items()}
        for layer in layers.values():
            move(layer, accelerator.device)
        with reporter.progress("evaluate", "passes") as line:
            evaluation = measure(base, made.blocks, layers, heldout, resolved.batch, line.update)
        evaluation |= {"data": resolved.eval_data or resolved.data, "training": record}
        differences = export(base, layers, made, resolved, evaluation, tokenizer, heldout[:_CHECK_CONTEXTS], out)
    reporter.say(
        f"exported   {resolved.out}; reloaded without mxdsurgery, logits differ by at most {differences['logits']:.1g}"
    )
    return Conversion(out, made, resolved, evaluation, training.seconds)


@contextmanager
def _scratch(out: Path, made: Plan) -> Iterator[Path | None]:
    """A folder beside ``out`` for what the plan keeps on disk while it works; None where it keeps nothing there."""
    if not (made.offloaded or made.states_on_disk):
        yield None
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.work.") as folder:
        yield Path(folder)


def _proof(base: PreTrainedModel, block: Block) -> float:
    """The relative error of a block recomputed from its weights, which may lie on disk."""
    _, decoder = decoder_layers(base)
    with resident(decoder[block.layer]):
        return prove_block(base, block)


def _training_record(made: Plan, training: Training, peak_bytes: int | None) -> dict[str, Any]:
    """For evaluation.json: what was trained, and what the plan said beside what was measured (None: it was not)."""
    return {
        "tokens": training.passes[-1].tokens,
        "steps": training.passes[-1].steps,
        "seconds": round(training.seconds, 1),
        "groups": [group.layers for group in made.groups],
        "passes_over_the_text": training.times_read,
        # Experts that had not fired for the last tenth of the training tokens, by layer.
        "dead_share": {str(planned.block.layer): share for planned, share in training.dead_share.items()},
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
        OutputError, ExportError, BaseModelError: as inside, telling what was kept.
    """
    try:
        yield
    except KeyboardInterrupt:
        if not training.passes:
            raise
        raise Interrupted(f"Interrupted. {_keep_layers(out, made, recipe, training)}") from None
    except (OutputError, ExportError, BaseModelError) as error:
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
    states = {planned.block.layer: weights_of(layer) for planned, layer in training.layers.items()}
    tensors = {f"{index}.{name}": tensor.contiguous() for index, state in states.items() for name, tensor in state.items()}
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
    by_layer = {
        name: {planned.block.layer: value for planned, value in figure.items()}
        for name, figure in (("nmse", training.nmse), ("dead_share", training.dead_share))
    }
    place = {"group": len(training.passes), "groups": training.groups, "finished_layers": finished}
    stands = {"steps": last.steps, "tokens_per_step": last.tokens_per_step, "step": last.step, "tokens": last.tokens}
    return stands | {"seconds": training.seconds} | by_layer | place | {"finished": training.finished}
