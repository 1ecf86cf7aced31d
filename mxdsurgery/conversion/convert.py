"""``convert``: the whole job, from a model's name to a folder that transformers loads."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxdsurgery.base.blocks import Block
from mxdsurgery.base.config import own_code
from mxdsurgery.base.model import BaseModel
from mxdsurgery.base.offload import move
from mxdsurgery.base.terms import terms_of
from mxdsurgery.checkpoint.converted import PLAN_FILE, RECIPE_FILE
from mxdsurgery.checkpoint.export import check_reload, write_converted, write_evaluation, written_as
from mxdsurgery.checkpoint.trained_on import TrainedOn, text_used
from mxdsurgery.checkpoint.writing import check_output, check_room, write_json
from mxdsurgery.conversion.shared_run import shared_run
from mxdsurgery.conversion.train import Training, check_cache, collect, train_groups
from mxdsurgery.errors import CheckpointError, RecipeError, first_line
from mxdsurgery.hardware.guard import guarded_with
from mxdsurgery.hardware.memory import PeakMemory
from mxdsurgery.measuring.fidelity import Measurement
from mxdsurgery.measuring.shares import warn_of_shortfalls
from mxdsurgery.planning.effort import EVALUATION_SHARE, Alone
from mxdsurgery.planning.plan import WORTH_PREDICTING, Plan, open_and_plan, read_plan, with_layers, with_time
from mxdsurgery.planning.resolve import saying_whose
from mxdsurgery.planning.summary import leaves, summary
from mxdsurgery.recipe import RECIPE_KEYS, Recipe
from mxdsurgery.runs.parallel import layer_shares, rank
from mxdsurgery.runs.run_folder import RunFolder
from mxdsurgery.terminal.console import Reporter, duration, size
from mxdsurgery.text.sources import TextStream, open_texts
from mxdsurgery.training.accelerator import make_accelerator
from mxdsurgery.training.cost import LayerPlan

# Contexts on which the reloaded checkpoint is compared with the model in memory.
_CHECK_CONTEXTS = 2


@dataclass(frozen=True)
class Conversion:
    """What ``convert`` made.

    Attributes:
        out: the folder.
        plan: which layers were converted, and into what.
        recipe: the resolved recipe.
        evaluation: the figures, as in evaluation.json.
        seconds: training time.
    """

    out: Path
    plan: Plan
    recipe: Recipe
    evaluation: dict[str, Any]
    seconds: float


@guarded_with(*RECIPE_KEYS)
def convert(
    model: str,
    *,
    recipe: str | Path | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
    **overrides: Any,
) -> Conversion | None:
    """Replaces MLP blocks by Mixture-of-Decoders layers, distils them, measures the cost and exports the result.

    Args:
        model: hub id, local folder, ``demo-glu`` or ``demo-mlp``.
        recipe: a recipe file or the name of one that comes with mxdsurgery; default: the one made for the model.
        resume: go on with the unfinished run in ``<out>.run``, if there is one, as if it had not been interrupted.
        reporter: where progress is reported; default: nowhere.
        **overrides: recipe keys, for example ``layers="2-5"``, ``tokens=2_000_000``, ``k=16``, ``out="folder"``.

    Returns:
        The folder and the figures; where several processes were launched, None in all but the first.

    Raises:
        MxDError: one of its subclasses; the output folder is then as it was before. OutputError if there is an unfinished run
            and neither resume nor overwrite is given; CheckpointError if that run cannot be resumed.
        Interrupted: Ctrl-C; while training, a checkpoint is written first.
    """
    made, resolved, base_model = open_and_plan(model, recipe, overrides)
    out = check_output(resolved.out, resolved.overwrite)
    check_cache(made, resolved)
    if not resume:
        made.check_budget()
        check_room(out, made.disk_bytes)
    reporter = reporter or Reporter()
    with shared_run(out, resolved, {}, resume, resolved.overwrite, reporter) as (run, reporter):
        settled = run.as_begun(made.settled(resolved), reporter.say)
        accelerator = make_accelerator(settled)
        made = _settled(made.computing_as(settled), resolved, base_model, run, reporter, resume)
        mine, shares = _my_share(made, resolved, base_model, run)
        for line in leaves(made):
            reporter.say(line)
        tokenizer = base_model.tokenizer()
        with saying_whose(resolved.to_dict(), overrides, made.recipe_file):
            texts = open_texts(resolved, tokenizer)
        memory = PeakMemory(accelerator.device.type)
        training = Training(len(mine.groups))
        base = _loaded(base_model, mine.blocks, made, settled.compute, accelerator.device, run, reporter)
        train_groups(base, mine, texts, settled, accelerator, training, reporter, run)
        collect(training, shares, base, accelerator.device)
        if rank():
            accelerator.end_training()
            return None
        peak = memory.bytes()
        layers = {planned.block.layer: layer for planned, layer in training.layers.items()}
        for layer in layers.values():
            move(layer, accelerator.device)
        made, evaluation, seconds = _evaluated(base, layers, texts.heldout, made, resolved, training.seconds, run, reporter)
        record = _training_record(made, training, peak, seconds)
        evaluation |= {"compute": settled.compute, "data": resolved.eval_data or resolved.data, "training": record}
        trained_on = _trained_on(training, texts.train)
        if trained_on is not None:
            evaluation |= trained_on.share_of(texts.heldout)
        check, terms = texts.heldout[:_CHECK_CONTEXTS], terms_of(base_model.source, base_model.commit)
        # An adapter rebuilds to a checkpoint; and nothing that was learned depends on what was kept.
        start, whole = time.perf_counter(), dataclasses.replace(resolved, format="checkpoint", cache_activations=None)
        with written_as(out, resolved.format, made.model, made.revision, run.scratch, own_code(base.config)) as staging:
            reference = write_converted(staging, base, layers, made, whole, tokenizer, check, terms, trained_on)
            del base, layers
            training.layers.clear()  # what is written is loaded in another process, with no model beside it
            differences = check_reload(staging, reference)
            record["measured"]["export_seconds"] = round(time.perf_counter() - start, 1)
            write_evaluation(staging, evaluation, made, whole)
        reporter.say(
            f"exported   {resolved.out}; reloaded without mxdsurgery, logits differ by at most {differences['logits']:.1g}"
        )
        if terms:
            reporter.say(f"terms      {', '.join(path.name for path in terms)} of the base model go with it")
        for line in _comparison(record):
            reporter.say(line)
    accelerator.end_training()
    return Conversion(out, made, resolved, evaluation, training.seconds)


def _settled(made: Plan, recipe: Recipe, base_model: BaseModel, run: RunFolder, reporter: Reporter, resume: bool) -> Plan:
    """The plan to carry out: that of the resumed run, or else ``made``, which must fit the memory budget. Reports it."""
    if (run.path / PLAN_FILE).is_file():
        begun = _read_plan(run.path / PLAN_FILE)
        step = 0 if run.resumed is None else run.resumed.state["step"]
        reporter.say(f"resume     from step {step}, in {run.path}")
        if begun.machine is not None and run.resumed is None:  # a checkpoint was asked already
            run.keep_threads(begun.machine.threads, reporter.say)
        made = begun.computing_as(made.settled(recipe))
    elif rank() == 0:
        made.check_budget()  # with ``resume``, this was not checked before
        made = with_time(made, recipe, base_model, WORTH_PREDICTING)
        (run.path / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
        write_json(run.path / PLAN_FILE, made.to_dict())
        if resume:
            reporter.say(f"resume     no checkpoint in {run.path}: it begins at the start")
    for line in (f"recipe     {made.recipe_file}", *summary(made, recipe)):
        reporter.say(line)
    return made


def _read_plan(path: Path) -> Plan:
    """A plan that the resumed run wrote; CheckpointError if it cannot be read."""
    try:
        return read_plan(path)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {first_line(error)}", fix="begin anew: --overwrite") from None


def _my_share(made: Plan, recipe: Recipe, base_model: BaseModel, run: RunFolder) -> tuple[Plan, list[list[LayerPlan]]]:
    """The plan of what this process trains (a resumed run keeps its groups), and the layers of each process.

    Where all processes train the same layers, there is one list for all of them.
    """
    shares = layer_shares(made.layers, recipe)
    if not all(shares):
        raise RecipeError(
            f"{len(shares)} processes were launched for {len(made.layers)} layers, with parallel: layers",
            expected="a layer for each process at least",
            fix="launch fewer, or --parallel data",
        )
    if len(shares[0]) == len(made.layers):
        return made, shares[:1]
    kept = run.path / f"share.{rank()}.json"
    if kept.is_file():
        return _read_plan(kept), shares
    mine = with_layers(made, shares[rank()], recipe, base_model)
    write_json(kept, mine.to_dict())
    return mine, shares


def _loaded(
    base_model: BaseModel,
    blocks: Sequence[Block],
    made: Plan,
    compute: str,
    device: torch.device,
    run: RunFolder,
    reporter: Reporter,
) -> PreTrainedModel:
    """The model to convert, with the blocks to convert proven; a resumed run refuses another than it began with."""
    offload = run.scratch if made.offloaded else None
    base, found_out = base_model.load_examined(blocks, dtype=made.dtype, compute=compute, device=device, offload=offload)
    run.confirm(base=found_out.digest)
    proven = f"{len(blocks)} blocks recomputed from their weights, largest relative error {found_out.error:.1e}"
    reporter.say(f"proof      {proven}")
    return base


def _evaluated(
    base: PreTrainedModel,
    layers: dict[int, nn.Module],
    heldout: Tensor,
    made: Plan,
    recipe: Recipe,
    training_seconds: float,
    run: RunFolder,
    reporter: Reporter,
) -> tuple[Plan, dict[str, Any], float]:
    """The plan with the number of tokens that single layers were measured on, the figures, and the seconds they took.

    That number is decided once: a run resumed from here uses the same.
    """
    start = time.perf_counter()
    alone = Alone(recipe.eval_tokens_single or made.eval_tokens_single, EVALUATION_SHARE * training_seconds)
    measurement = Measurement(base, made.blocks, [layers], heldout, recipe.batch, alone=alone)
    made = dataclasses.replace(made, eval_tokens_single=measurement.tokens_alone)
    write_json(run.path / PLAN_FILE, made.to_dict())
    reporter.say(f"evaluate   {measurement.announcement()}")
    with reporter.progress("evaluate", "passes") as line:
        evaluation = measurement.run(line.update)[0]
    if recipe.kind == "mxd" and recipe.share_target is not None:
        warn_of_shortfalls(evaluation, recipe.share_target)
    return made, evaluation, time.perf_counter() - start


def _training_record(made: Plan, training: Training, peak_bytes: int | None, evaluation_seconds: float) -> dict[str, Any]:
    """For evaluation.json: what was trained, and planned beside measured values (None: not planned, or not measured).

    `convert` adds how long the export took.
    """

    def rounded(seconds: float | None) -> float | None:
        return None if seconds is None else round(seconds, 1)

    return {
        "tokens": training.passes[-1].tokens,
        "steps": training.passes[-1].steps,
        "seconds": round(training.seconds, 1),
        "groups": [group.layers for group in made.groups],
        "passes_over_the_text": training.times_read,
        # Experts that had not fired for the last tenth of the training tokens, by layer.
        "dead_share": {str(planned.block.layer): share for planned, share in training.dead_share.items()},
        "planned": {
            "seconds": rounded(made.seconds),
            "evaluation_seconds": rounded(made.evaluation_seconds),
            "export_seconds": rounded(made.export_seconds),
            "peak_bytes": made.peak_bytes,
        },
        "measured": {
            "seconds": rounded(training.seconds),
            "evaluation_seconds": rounded(evaluation_seconds),
            "export_seconds": None,
            "peak_bytes": peak_bytes,
        },
    }


def _trained_on(training: Training, text: TextStream) -> TrainedOn | None:
    """The record of what the layers were trained on; None where the run was begun by a version that kept none."""
    if training.trained_on is None:
        return None
    return TrainedOn(training.trained_on, [text_used(text, training.contexts, training.times_read)])


def _comparison(record: dict[str, Any]) -> list[str]:
    """The plan's predictions beside the measured values, for a terminal."""
    planned, measured = record["planned"], record["measured"]
    stages = {"seconds": "train", "evaluation_seconds": "evaluate", "export_seconds": "export"}
    took = ", ".join(f"{duration(measured[name])} to {stage}" for name, stage in stages.items())
    wanted = [planned[name] for name in stages]
    words = "not predicted" if None in wanted else f"{', '.join(map(duration, wanted))} planned"
    peak = "not measured here" if measured["peak_bytes"] is None else f"{size(measured['peak_bytes'])} measured"
    return [f"time       {took} measured; {words}", f"memory     {peak}, {size(planned['peak_bytes'])} planned"]
