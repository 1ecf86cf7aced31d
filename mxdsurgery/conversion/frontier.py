"""``frontier``: what sparsity costs. Kinds of layers at several K, trained on the same activations and measured alike."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from mxdsurgery.base.blocks import Block
from mxdsurgery.base.model import BaseModel
from mxdsurgery.checkpoint.writing import check_file, check_room
from mxdsurgery.choices import DEFAULT_K, DEFAULT_KINDS, ONE_LAYER
from mxdsurgery.conversion.train import Training, check_cache, train_groups
from mxdsurgery.errors import Interrupted, OutputError, RecipeError, first_line
from mxdsurgery.hardware.device import check_device
from mxdsurgery.hardware.guard import guarded_with
from mxdsurgery.measuring.fidelity import Measurement
from mxdsurgery.measuring.frontier_table import FRONTIER_FILE, Frontier, read_frontier, remove_frontier, row_key, save_layer
from mxdsurgery.planning.plan import WORTH_PREDICTING, Plan, open_and_plan, plan_layer, with_layers, with_time
from mxdsurgery.planning.resolve import saying_whose
from mxdsurgery.planning.summary import summary
from mxdsurgery.recipe import RECIPE_KEYS, Recipe
from mxdsurgery.runs.run_folder import RunFolder, depends_on
from mxdsurgery.terminal.console import Reporter
from mxdsurgery.text.sources import Texts, open_texts
from mxdsurgery.training.accelerator import alone, make_accelerator, start_processes
from mxdsurgery.training.cost import DTYPE_BYTES, LayerPlan
from mxdsurgery.training.distill import layer_key
from mxdsurgery.training.parameters import layer_parameters, matched_n_experts, transcoder_parameters

# Recipe keys in which the rows of one folder may differ; they share every other key.
_FREE_KEYS = {
    *("layers", "k", "kind", "out", "overwrite", "device", "memory", "threads", "tracker", "cache_activations"),
    *ONE_LAYER,
}


@guarded_with(*(name for name in RECIPE_KEYS if name not in ("layers", *ONE_LAYER)))
def frontier(
    model: str,
    *,
    layer: int,
    k: Sequence[int] = DEFAULT_K,
    kinds: Sequence[str] = DEFAULT_KINDS,
    recipe: str | Path | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
    **overrides: Any,
) -> Frontier:
    """Trains kinds of layers at several K in place of one block, all on the same activations, and measures each.

    Rows that the folder already holds are not trained again, so further layers, kinds and K can be added to the table.

    Args:
        model: hub id, local folder, ``demo-glu`` or ``demo-mlp``.
        layer: the block's layer; negative ones count from the end.
        k: values of K.
        kinds: kinds of layers; ``dense`` has no K and is trained once. All but ``dense`` get as many parameters as a
            transcoder with ``expansion`` times D features, or, where ``n_experts`` is given, as an MxD layer with that many
            experts.
        recipe: a recipe file or the name of one that comes with mxdsurgery; default: the one made for the model.
        resume: go on with the group of layers whose training is unfinished, in ``<out>.run``, if there is one.
        reporter: where progress is reported; default: nowhere.
        **overrides: recipe keys; ``out`` is the folder.

    Returns:
        All rows of the folder, also of earlier runs.

    Raises:
        RecipeError: an unknown kind, a wrong K, or what `plan` raises.
        OutputError: the folder holds rows of other settings or something else, or cannot be written; or there is an unfinished
            group, and neither ``resume`` nor ``overwrite`` is given.
        CheckpointError: the unfinished group cannot be resumed.
        Interrupted: Ctrl-C; the rows so far are kept, and while training a checkpoint is written.
    """
    reporter = reporter or Reporter()
    kinds, k = _checked(kinds, k)
    made, resolved, base_model = open_and_plan(model, recipe, {"layers": str(layer), "k": min(k), **overrides, **ONE_LAYER})
    if "out" not in overrides or overrides["out"] is None:
        resolved = dataclasses.replace(resolved, out=resolved.out.removesuffix("-mxd") + "-frontier")
    out = Path(resolved.out)
    settings = {name: value for name, value in resolved.to_dict().items() if name not in _FREE_KEYS}
    found = _open_folder(out, settings, resolved.overwrite)
    todo = _todo(made.blocks[0], resolved, kinds, k, found.rows)
    if not todo:
        reporter.say(f"nothing to do: {out} holds all of it")
        return found
    made = with_layers(made, todo, resolved, base_model)
    made.check_budget()
    check_file(out / FRONTIER_FILE)
    check_cache(made, resolved)
    check_room(out, DTYPE_BYTES[made.dtype] * sum(planned.all_parameters for planned in todo))
    run = RunFolder(out, resolved)
    run.check_decision(resume, resolved.overwrite, f"delete {run.path}")
    made = with_time(made, resolved, base_model, WORTH_PREDICTING)
    made = dataclasses.replace(made, export_seconds=None)  # nothing is exported
    for line in (f"recipe     {made.recipe_file}", *summary(made, resolved)[1:-1]):
        reporter.say(line)
    start_processes(resolved)
    alone("a frontier")
    with saying_whose(resolved.to_dict(), overrides, made.recipe_file):
        texts = open_texts(resolved, base_model.tokenizer())
    with RunFolder(out, resolved).owned():
        if _open_folder(out, settings, resolved.overwrite).rows != found.rows:
            raise OutputError(f"another process wrote rows to {str(out)!r} meanwhile", fix="repeat the command")
        return _filled(found, settings, made, todo, resolved, base_model, texts, resume, reporter)


def _filled(
    found: Frontier,
    settings: dict[str, Any],
    made: Plan,
    todo: list[LayerPlan],
    resolved: Recipe,
    base_model: BaseModel,
    texts: Texts,
    resume: bool,
    reporter: Reporter,
) -> Frontier:
    """The table with the rows that it lacked, trained and measured group by group."""
    out = found.out
    settled = RunFolder(out, resolved).as_begun(made.settled(resolved), reporter.say, resume)
    how = {"dtype": made.dtype, "compute": settled.compute, "device": check_device(resolved.device)}
    base, found_out = base_model.load_examined(made.blocks[:1], **how)
    reporter.say(f"proof      the block recomputed from its weights, relative error {found_out.error:.1e}")
    remaining = iter(todo)
    with _kept(out, resolved.overwrite):
        for group in made.groups:
            part = dataclasses.replace(made, layers=[next(remaining) for _ in group.layers], groups=[group])
            run = RunFolder(out, resolved)
            group_is = {"group": [layer_key(planned) for planned in part.layers], "base": found_out.digest}
            run.open(depends_on(settings) | group_is, resume, resolved.overwrite, f"delete {run.path}")
            with run.working(reporter) as recording:
                settled = run.as_begun(settled, recording.say)
                accelerator = make_accelerator(settled)
                found = _run_group(found, base, part, texts, settled, accelerator, recording, run)
                found.write()
            run.finish(out)
    return found


def _checked(kinds: Sequence[str], k: Sequence[int]) -> tuple[list[str], list[int]]:
    """Each kind and K once, in order; RecipeError for one that is not allowed."""
    kinds = list(dict.fromkeys(RECIPE_KEYS["kind"].parse("kind", kind) for kind in kinds))
    k = sorted({RECIPE_KEYS["k"].parse("k", value) for value in k})
    if not kinds or not k:
        raise RecipeError("there is nothing to compare", expected="at least one kind and one K", fix="give --kinds and --k")
    return kinds, k


def _todo(block: Block, recipe: Recipe, kinds: list[str], k: list[int], rows: list[dict[str, Any]]) -> list[LayerPlan]:
    """The layers that the table lacks; all but ``dense`` have as many parameters, as near as whole experts allow."""
    if recipe.n_experts is not None:
        budget = float(layer_parameters(block, recipe.n_experts))
    else:
        budget = transcoder_parameters(block, recipe.expansion)
    wanted = []
    for kind in kinds:
        n_experts = matched_n_experts(block, budget, kind) or None
        for value in k if kind != "dense" else k[:1]:
            wanted.append(plan_layer(block, dataclasses.replace(recipe, kind=kind, k=value, n_experts=n_experts)))
    known = {(row["layer"], row["kind"], row["k"]) for row in rows}
    return [layer for layer in wanted if row_key(layer) not in known]


def _run_group(
    found: Frontier,
    base: PreTrainedModel,
    made: Plan,
    texts: Texts,
    recipe: Recipe,
    accelerator: Accelerator,
    reporter: Reporter,
    run: RunFolder,
) -> Frontier:
    """Trains one group of layers, saves their weights, measures them, and returns the table with their rows."""
    training = Training(1)
    train_groups(base, made, texts, recipe, accelerator, training, reporter, run=run)
    for planned, layer in training.layers.items():
        save_layer(layer.to(accelerator.device), planned, found.out, made.dtype)
    candidates = [{planned.block.layer: layer} for planned, layer in training.layers.items()]
    with reporter.progress("evaluate", "passes") as line:
        evaluations = Measurement(base, made.blocks[:1], candidates, texts.heldout, recipe.batch).run(line.update)
    rows = list(found.rows)
    for planned, evaluation in zip(training.layers, evaluations, strict=True):
        layer, kind, k = row_key(planned)
        row = {"layer": layer, "kind": kind, "k": k, "sparsity": planned.sparsity, "n_experts": planned.n_experts}
        row |= {"params": planned.parameters, "train_tokens": training.passes[0].tokens}
        rows.append(row | evaluation["layers"][0])
    rows.sort(key=lambda row: (row["layer"], RECIPE_KEYS["kind"].choices.index(row["kind"]), row["k"] or 0))
    return dataclasses.replace(found, rows=rows, tokens=evaluations[0]["tokens"], original=evaluations[0]["original"])


def _open_folder(out: Path, settings: dict[str, Any], overwrite: bool) -> Frontier:
    """The table that the folder holds, or an empty one to begin with.

    Raises:
        OutputError: it holds rows of other settings, or is no folder of ours.
    """
    empty = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if empty or (overwrite and (out / FRONTIER_FILE).is_file()):
        return Frontier(out, [], 0, {}, settings)
    found = read_frontier(out)
    was = {field.name: field.default for field in dataclasses.fields(Recipe)} | found.settings  # keys may be newer than it
    other = [name for name in settings if was.get(name) != settings[name]]
    if other:
        differs = ", ".join(f"{name} {was.get(name)!r}, now {settings[name]!r}" for name in other)
        raise OutputError(
            f"{str(out)!r} holds a frontier of other settings: {differs}",
            expected="the same settings: only then its rows can be compared",
            fix="give another --out, or --overwrite to begin anew",
        )
    return found


@contextmanager
def _kept(out: Path, overwrite: bool) -> Iterator[None]:
    """Makes the folder to work in; with ``overwrite``, removes an earlier frontier from it first.

    Raises:
        Interrupted: Ctrl-C.
        OutputError: it cannot be written.
    """
    try:
        if overwrite and (out / FRONTIER_FILE).is_file():
            remove_frontier(out)
        out.mkdir(parents=True, exist_ok=True)
        yield
    except KeyboardInterrupt as interrupt:
        rows = len(read_frontier(out).rows) if (out / FRONTIER_FILE).is_file() else 0
        again = "the same command with --resume, and without --overwrite, goes on from there"
        raise Interrupted(
            f"{getattr(interrupt, 'said', '') or 'Interrupted.'}\n{out} holds {rows} finished rows: {again}."
        ) from None
    except OSError as error:
        raise OutputError(
            f"{str(out)!r} cannot be written: {first_line(error)}", fix="free some space, or give another --out"
        ) from None
