"""``edit``: puts edits of experts into the weights of a converted model, in a new folder, and takes them back."""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table as RichTable
from rich.text import Text
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from mxdsurgery.aside import is_aside
from mxdsurgery.base.digest import file_digest
from mxdsurgery.base.running import logits_of
from mxdsurgery.checkpoint.adapter import ABOUT
from mxdsurgery.checkpoint.converted import (
    EVALUATION_FILE,
    FORMAT_VERSION,
    Converted,
    fingerprint,
    load_with_recipe,
    read_config,
)
from mxdsurgery.checkpoint.export import (
    check_reload,
    reference_outputs,
    write_code,
    write_evaluation,
    written_as,
)
from mxdsurgery.checkpoint.readme import keep_words
from mxdsurgery.checkpoint.writing import check_apart, check_output, check_room_for_copy, write_json, written_whole
from mxdsurgery.editing.baking import Change, Rows, changes, in_weights, put_in_files
from mxdsurgery.editing.edits import Edits, check_for
from mxdsurgery.editing.predictions import fewer_for_logits
from mxdsurgery.editing.sampling import Sampling, sample
from mxdsurgery.errors import DataError, EditError, MxDWarning, UnsupportedModelError, first_line
from mxdsurgery.hardware.guard import guarded
from mxdsurgery.measuring.held_out import held_out, trained_share
from mxdsurgery.measuring.intervals import Table, next_token_sums, scored_predictions, with_interval
from mxdsurgery.planning.plan import Plan
from mxdsurgery.recipe import Recipe
from mxdsurgery.terminal.console import Reporter
from mxdsurgery.terminal.figures import range_of, value_of
from mxdsurgery.text.fingerprints import tokens_in_words
from mxdsurgery.text.packing import in_batches
from mxdsurgery.text.places import check_there, text_name

EDITS_FOLDER, EDITS_FILE = "edits", "edits.yaml"
# Files of the folder that a step keeps as they were, so that it can be undone bit for bit.
_KEPT_FILES = ("config.json", "README.md", EVALUATION_FILE)
_ROWS_FILE, _DIGESTS_FILE = "before.safetensors", "digests.json"
# What is in the first of them, of each tensor: that there was none, or the rows that changed and their values.
_ABSENT, _ROWS, _VALUES = "absent", "rows", "values"
_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 3, 24, 32
_CHECKED = 4  # contexts, at most, on which what was written is compared


@guarded
def edit(
    folder: str | Path,
    *,
    out: str | Path,
    edits: Edits | None = None,
    undo: bool = False,
    data: str | None = None,
    tokens: int | None = None,
    text_column: str | None = None,
    overwrite: bool = False,
    device: str | None = None,
    compute: str | None = None,
    trust_remote_code: bool = False,
    format: str = "checkpoint",
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Writes a converted model with edited experts; or, with ``undo``, as it was before the last edit, bit for bit.

    An edit in the weights gives the same logits as the same edit live, to rounding. ``out`` appears whole or not at all, after
    it was reloaded without mxdsurgery.

    Args:
        folder: what ``convert`` or ``edit`` wrote; it is left as it is.
        out: the folder to write.
        edits: what to do; all kinds but ``clamp``, which weights cannot express.
        undo: undo the last edit instead.
        data: the text to compare on; default: the recipe's held-out text. Where that cannot be read and no other is given,
            nothing is compared.
        tokens: how many of its tokens; default: the recipe's ``eval_tokens``.
        text_column: column or field with the text; default: the recipe's.
        overwrite: replace an earlier folder that mxdsurgery wrote.
        device: ``auto``, ``cpu``, ``cuda``, ``mps`` or ``xpu``; default: the recipe's.
        compute: dtype to compute in; ``auto``: as stored, or float32 where that is faster here; default: the recipe's.
        trust_remote_code: run the code that came with the base model, where it has its own; see `load`.
        format: ``checkpoint``, or ``adapter``: only what differs from the base model.
        reporter: where progress is reported; default: nowhere.

    Returns:
        ``edits`` (in words), ``tokens``, ``sequences``, ``trained_on`` (as `evaluate`), ``ce_before``, ``ce_after``,
        ``delta_ce`` and ``kl`` (before ‖ after) in nats per token, each with its interval, ``samples`` (prompt, before,
        after), ``fingerprint`` and ``out``; without a text to compare on, ``unmeasured`` says why, in place of the figures;
        with ``undo``, ``undone`` and ``out``.

    Raises:
        NotConvertedError: the folder is not one of ours.
        EditError: there is nothing to do or undo, or the edits do not fit this model.
        OutputError: ``out`` cannot be written.
        DataError: the text cannot be read.
    """
    reporter, folder = reporter or Reporter(), Path(folder)
    check_apart(out, folder, "the folder to edit")
    if undo:
        return _undo(folder, out, overwrite)
    _check_bakeable(edits)
    read_config(folder)
    check_there(data)
    target = check_output(out, overwrite)
    check_room_for_copy(target, folder)
    before, recipe = load_with_recipe(folder, device, compute, trust_remote_code=trust_remote_code)
    check_for(edits, before)
    ids, unmeasured = _text(before, recipe, data, tokens, text_column)
    steps = before.model.config.mxd.get("edits", [])
    named = dataclasses.replace(edits, model=fingerprint(before))
    plan = before.plan
    with written_as(target, format, plan.model, plan.revision, trust_remote_code=trust_remote_code) as staging:
        _copy(folder, staging)
        made = changes(before, named)
        _bake(before, named, made, staging, len(steps) + 1)
        result: dict[str, Any] = {"edits": edits.words()}
        if unmeasured is None:
            result |= {"data": text_name(data or recipe.eval_data or recipe.data)}
            result |= _compared(before, made, ids, recipe.batch, reporter)
        _note(staging, [*steps, result], plan, recipe)
        with in_weights(made):
            reference = reference_outputs(before.model, ids[:_CHECKED])
        del before, made  # what is written is loaded in another process, with no model beside it
        check_reload(staging, reference)
    why = {} if unmeasured is None else {"unmeasured": unmeasured}
    return result | why | {"out": str(target), "fingerprint": named.model}


def _check_bakeable(edits: Edits | None) -> None:
    """Raises EditError where there are no edits, or some that weights cannot express."""
    if not edits:
        raise EditError(
            "no edits were given", expected="an edit", fix="give --edits, or --ablate, or --drop, or --scale, or --steer"
        )
    if edits.clamp:
        raise EditError(
            "clamp cannot stand in the weights: it depends on whether the expert fires",
            expected="ablate, drop, scale, steer, replace, copy or merge",
            fix="clamp while the model runs: with model.mxd.clamp(...)",
        )


def _text(
    before: Converted, recipe: Recipe, data: str | None, tokens: int | None, text_column: str | None
) -> tuple[Tensor, str | None]:
    """Contexts to compare on, (S, T), and None; or any ids, and why there is no text: the recipe's cannot be read."""
    try:
        return held_out(before, recipe, data, tokens, text_column), None
    except DataError as error:
        if data is not None or tokens is not None:
            raise
        some = torch.arange(recipe.context)[None] % before.model.get_input_embeddings().weight.shape[0]
        return some, error.found


def _copy(folder: Path, staging: Path) -> None:
    """Copies all that belongs to the model; not what other commands found out about it, which the edits make outdated."""
    for path in folder.iterdir():
        if path.name not in ABOUT and not is_aside(path):
            copy = shutil.copytree if path.is_dir() else shutil.copy2
            copy(path, staging / path.name)


def _bake(before: Converted, edits: Edits, made: Sequence[Change], staging: Path, step: int) -> None:
    """Puts the edits in the files of weights and in the config; keeps what was there before."""
    kept = staging / EDITS_FOLDER / str(step)
    kept.mkdir(parents=True)
    for path in _small_files(staging):
        shutil.copy2(path, kept / path.name)
    write_json(kept / _DIGESTS_FILE, _digests(staging))
    (kept / EDITS_FILE).write_text(edits.to_yaml(), encoding="utf-8")
    config = json.loads((staging / "config.json").read_text(encoding="utf-8"))
    shapes = {entry["layer"]: entry["shape"] for entry in config["mxd"]["layers"]}
    rows: dict[str, Tensor] = {}
    for change in made:
        if change.old is None:  # experts.bias
            shapes[change.layer]["expert_bias"] = True
            rows[f"{change.name}:{_ABSENT}"] = torch.zeros(1)
        else:
            rows |= {f"{change.name}:{_ROWS}": change.old.numbers, f"{change.name}:{_VALUES}": change.old.values.contiguous()}
    save_file(rows, kept / _ROWS_FILE)
    put_in_files(staging, {change.name: change.new for change in made})
    config["mxd"]["format_version"] = FORMAT_VERSION
    write_json(staging / "config.json", config)
    write_code(before.model, staging)


def _small_files(folder: Path) -> list[Path]:
    """The files besides the weights that an edit may rewrite."""
    return [folder / name for name in _KEPT_FILES if (folder / name).is_file()] + sorted(folder.glob("*.py"))


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the weights' files."""
    return {path.name: file_digest(path) for path in sorted(folder.glob("*.safetensors*"))}


def _undo(folder: Path, out: str | Path, overwrite: bool) -> dict[str, Any]:
    steps = read_config(folder)["mxd"].get("edits", [])
    kept = folder / EDITS_FOLDER / str(len(steps))
    if not steps or not (kept / _ROWS_FILE).is_file():
        raise EditError(f"{str(folder)!r} holds no edit to take back", expected="what mxdsurgery edit wrote")
    target = check_output(out, overwrite)
    with written_whole(target) as staging:
        _copy(folder, staging)
        if not _put_back(kept, staging):
            raise EditError(
                f"{str(folder)!r} cannot be taken back: without its last edit its weights are not those it was made from",
                expected="a folder as mxdsurgery edit wrote it",
                fix="use the folder that it was made from",
            )
        for path in _small_files(staging):
            path.unlink()
        for path in _small_files(kept):
            shutil.copy2(path, staging / path.name)
        for earlier in (folder, target):
            keep_words(earlier, staging)
        shutil.rmtree(staging / EDITS_FOLDER / str(len(steps)))
        if len(steps) == 1:
            (staging / EDITS_FOLDER).rmdir()
    return {"undone": steps[-1]["edits"], "out": str(target)}


def _put_back(kept: Path, staging: Path) -> bool:
    """Puts what a step kept back into the files of weights; whether they are then, bit for bit, what they were before it."""
    tensors: dict[str, Rows | None] = {}
    try:
        rows = load_file(kept / _ROWS_FILE)
        for key in rows:
            name, _, what = key.rpartition(":")
            if what == _ABSENT:
                tensors[name] = None
            elif what == _ROWS:
                tensors[name] = Rows(rows[key], rows[f"{name}:{_VALUES}"])
        put_in_files(staging, tensors)
        return _digests(staging) == json.loads((kept / _DIGESTS_FILE).read_text(encoding="utf-8"))
    except (ValueError, KeyError, SafetensorError):  # files that others have changed
        return False


def _compared(before: Converted, made: Sequence[Change], ids: Tensor, batch: int, reporter: Reporter) -> dict[str, Any]:
    """What edits do to the predictions of contexts (S, T), and some continuations before and after."""
    with reporter.progress("compare", "contexts") as line:
        figures = _compare(before.model, made, ids, batch, line.update)
    rests_on = trained_share(before, ids) | {"sequences": len(ids)}
    return rests_on | figures | {"samples": _samples(before, made, ids)}


@torch.no_grad()
def _compare(
    model: PreTrainedModel, made: Sequence[Change], ids: Tensor, batch: int, report: Callable[[int, int], None]
) -> dict[str, Any]:
    """What changes of a model's weights do to the predictions of contexts (S, T)."""
    table, done = Table(), 0
    for part in in_batches(ids.to(model.device), fewer_for_logits(batch, model)):
        old = logits_of(model, part)
        with in_weights(made):
            new = logits_of(model, part)
        table.add("before", next_token_sums(old, old, part))
        table.add("after", next_token_sums(new, old, part))
        done += len(part)
        report(done, len(ids))
    columns = table.columns()
    scored = scored_predictions(ids)
    columns["tokens"] = torch.full((len(ids),), float(scored), dtype=torch.float64)
    result: dict[str, Any] = {"tokens": scored * len(ids)}
    for name, sums in (
        ("ce_before", columns["before.ce"]),
        ("ce_after", columns["after.ce"]),
        ("delta_ce", columns["after.ce"] - columns["before.ce"]),
        ("kl", columns["after.kl"]),
    ):
        result |= with_interval(name, sums, columns["tokens"])
    return result


@torch.no_grad()
def _samples(before: Converted, made: Sequence[Change], ids: Tensor) -> list[dict[str, str]]:
    """Greedy continuations of some held-out contexts, before and after; none, and a warning, where it cannot generate."""
    tokenizer = before.tokenizer()
    prompts = ids[: _PROMPTS * 7 : 7, :_PROMPT_TOKENS].to(before.model.device)
    texts = []
    for changed in ([], made):
        try:
            with in_weights(changed):
                written = sample(before.model, tokenizer, prompts, Sampling(_NEW_TOKENS, temperature=0))
        except UnsupportedModelError as error:
            warnings.warn(f"no samples of text: {error.found}", MxDWarning, stacklevel=2)
            return []
        texts.append(tokenizer.batch_decode(written[:, prompts.shape[1] :], skip_special_tokens=True))
    shown = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    return [{"prompt": p, "before": b, "after": a} for p, b, a in zip(shown, *texts, strict=True)]


def _note(staging: Path, steps: list[dict[str, Any]], plan: Plan, recipe: Recipe) -> None:
    """Writes the edits into config.json and the model card."""
    config = json.loads((staging / "config.json").read_text(encoding="utf-8"))
    config["mxd"]["edits"] = steps
    write_json(staging / "config.json", config)
    try:
        evaluation = json.loads((staging / EVALUATION_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EditError(
            f"{EVALUATION_FILE} cannot be read: {first_line(error)}", fix="write it anew: mxdsurgery evaluate"
        ) from None
    write_evaluation(staging, evaluation, plan, recipe)


def edit_table(result: dict[str, Any]) -> list[Any]:
    """For a terminal."""
    if "undone" in result:
        return [Text("\n".join(["Taken back:", *result["undone"]]))]
    if "unmeasured" in result:
        why = f"What this changed was not measured: {result['unmeasured']}. Another text can be given with --data."
        return [Text("\n".join([*result["edits"], "", why]))]
    table = RichTable(title=f"On {tokens_in_words(result)}")
    for heading in ("", "value", "95 % interval"):
        table.add_column(heading, justify="right" if heading else "left")
    for label, name, form in (
        ("cross-entropy before", "ce_before", ".4f"),
        ("cross-entropy after", "ce_after", ".4f"),
        ("ΔCE", "delta_ce", "+.3g"),
        ("KL(before ‖ after)", "kl", ".3g"),
    ):
        table.add_row(label, value_of(result, name, form), range_of(result, name, form))
    samples = []
    for one in result["samples"]:
        samples += ["", f"prompt: {one['prompt']!r}", f"before: {one['before']!r}", f"after:  {one['after']!r}"]
    return [*(Text(line) for line in result["edits"]), table, Text("\n".join(samples))]
