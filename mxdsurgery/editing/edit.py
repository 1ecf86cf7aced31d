"""``edit``: puts edits of experts into the weights of a converted model, in a new folder, and takes them back."""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table as RichTable
from rich.text import Text
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from mxdsurgery.aside import is_aside
from mxdsurgery.base.digest import file_digest
from mxdsurgery.base.dtypes import compute_in, computed_in
from mxdsurgery.base.running import logits_of
from mxdsurgery.checkpoint.adapter import ABOUT
from mxdsurgery.checkpoint.converted import (
    EVALUATION_FILE,
    FORMAT_VERSION,
    Converted,
    fingerprint,
    load,
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
from mxdsurgery.editing.edits import Edits, baked, check_for
from mxdsurgery.editing.predictions import fewer_for_logits
from mxdsurgery.editing.sampling import Sampling, sample
from mxdsurgery.errors import DataError, EditError, MxDWarning, UnsupportedModelError, first_line
from mxdsurgery.hardware.guard import guarded
from mxdsurgery.measuring.held_out import held_out, trained_share
from mxdsurgery.measuring.intervals import Table, next_token_sums, scored_predictions, with_interval
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
_INDEX_FILE = "model.safetensors.index.json"
_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 3, 24, 32


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
    reporter = reporter or Reporter()
    folder = Path(folder)
    check_apart(out, folder, "the folder to edit")
    if undo:
        return _undo(folder, out, overwrite, trust_remote_code)
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
    origin = (before.plan.model, before.plan.revision)
    with written_as(target, format, *origin, trust_remote_code=trust_remote_code) as staging:
        _copy(folder, staging)
        _bake(before, named, staging, len(steps) + 1)
        after = load(staging, device=before.model.device, trust_remote_code=trust_remote_code)
        compute_in(after.model, computed_in(before.model))
        result: dict[str, Any] = {"edits": edits.words()}
        if unmeasured is None:
            result |= {"data": text_name(data or recipe.eval_data or recipe.data)}
            result |= trained_share(before, ids) | {"sequences": len(ids)}
            result |= _compared(before, after, ids, recipe.batch, reporter)
        _note(staging, [*steps, result], after, recipe)
        check = ids[: max(1, min(4, len(ids)))]
        check_reload(staging, reference_outputs(after.model, check))
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


def _bake(before: Converted, edits: Edits, staging: Path, step: int) -> None:
    """Puts the edits in the weights, in the dtype that they are stored in, and in the config; keeps what was there before."""
    stored = getattr(torch, before.plan.dtype)
    kept = staging / EDITS_FOLDER / str(step)
    kept.mkdir(parents=True)
    for path in _small_files(staging):
        shutil.copy2(path, kept / path.name)
    write_json(kept / _DIGESTS_FILE, _digests(staging))
    (kept / EDITS_FILE).write_text(edits.to_yaml(), encoding="utf-8")
    config = json.loads((staging / "config.json").read_text(encoding="utf-8"))
    entries = {entry["layer"]: entry for entry in config["mxd"]["layers"]}
    tensors: dict[str, Tensor | None] = {}
    rows: dict[str, Tensor] = {}
    for layer in edits.layers:
        module = before.layers[layer]
        path = next(name for name, found in before.model.named_modules() if found is module)
        held = {name: tensor.to(stored) for name, tensor in module.state_dict().items()}
        said = (held[name] for name in ("experts.weight", "gate.bias"))
        for name, tensor in baked(edits, layer, *said, held.get("experts.bias")).items():
            old = held.get(name)
            if old is None:  # experts.bias
                entries[layer]["shape"]["expert_bias"] = True
                rows[f"{path}.{name}:absent"] = torch.zeros(1)
            else:
                changed = (old != tensor).reshape(len(old), -1).any(1).nonzero()[:, 0]
                rows |= {f"{path}.{name}:rows": changed, f"{path}.{name}:values": old[changed].contiguous()}
            tensors[f"{path}.{name}"] = tensor.contiguous()
    save_file(rows, kept / _ROWS_FILE)
    _write_tensors(staging, tensors)
    config["mxd"]["format_version"] = FORMAT_VERSION
    write_json(staging / "config.json", config)
    write_code(before.model, staging)


def _small_files(folder: Path) -> list[Path]:
    """The files besides the weights that an edit may rewrite."""
    return [folder / name for name in _KEPT_FILES if (folder / name).is_file()] + sorted(folder.glob("*.py"))


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the weights' files."""
    return {path.name: file_digest(path) for path in sorted(folder.glob("*.safetensors*"))}


def _write_tensors(folder: Path, tensors: dict[str, Tensor | None]) -> None:
    """Replaces, adds or (None) removes tensors in the weights' files; a new one goes into the file with its layer's C."""
    index_path = folder / _INDEX_FILE
    index = json.loads(index_path.read_text(encoding="utf-8")) if index_path.is_file() else None
    by_file: dict[str, dict[str, Tensor | None]] = {}
    for name, tensor in tensors.items():
        beside = name if index is None or name in index["weight_map"] else name.removesuffix("bias") + "weight"
        file = "model.safetensors" if index is None else index["weight_map"][beside]
        by_file.setdefault(file, {})[name] = tensor
    for file, changes in by_file.items():
        with safe_open(folder / file, "pt") as opened:
            metadata = opened.metadata()
        held = load_file(folder / file)
        for name, tensor in changes.items():
            old = held.pop(name, None)
            if tensor is not None:
                held[name] = tensor
            if index is not None and (old is None) != (tensor is None):
                _count(index, name, file if old is None else None, tensor if old is None else old)
        save_file(held, folder / file, metadata=metadata)
    if index is not None:
        index["weight_map"] = dict(sorted(index["weight_map"].items()))
        index_path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _count(index: dict[str, Any], name: str, file: str | None, tensor: Tensor) -> None:
    """Enters a tensor in the index of sharded weights, or (file None) removes it."""
    sign = -1 if file is None else 1
    for key, count in (("total_size", tensor.nbytes), ("total_parameters", tensor.numel())):
        if key in index["metadata"]:
            index["metadata"][key] += sign * count
    index["weight_map"].pop(name, None)
    if file is not None:
        index["weight_map"][name] = file


def _undo(folder: Path, out: str | Path, overwrite: bool, trusted: bool) -> dict[str, Any]:
    steps = read_config(folder)["mxd"].get("edits", [])
    kept = folder / EDITS_FOLDER / str(len(steps))
    if not steps or not (kept / _ROWS_FILE).is_file():
        raise EditError(f"{str(folder)!r} holds no edit to take back", expected="what mxdsurgery edit wrote")
    target = check_output(out, overwrite)
    with written_whole(target) as staging:
        _copy(folder, staging)
        rows = load_file(kept / _ROWS_FILE)
        held = load(folder, trust_remote_code=trusted).model.state_dict()
        tensors: dict[str, Tensor | None] = {}
        for key in rows:
            name, _, what = key.rpartition(":")
            if what == "absent":
                tensors[name] = None
            elif what == "rows":
                tensors[name] = held[name].index_copy(0, rows[key], rows[f"{name}:values"])
        _write_tensors(staging, tensors)
        for path in _small_files(staging):
            path.unlink()
        for path in _small_files(kept):
            shutil.copy2(path, staging / path.name)
        for earlier in (folder, target):
            keep_words(earlier, staging)
        shutil.rmtree(staging / EDITS_FOLDER / str(len(steps)))
        if len(steps) == 1:
            (staging / EDITS_FOLDER).rmdir()
        if _digests(staging) != json.loads((kept / _DIGESTS_FILE).read_text(encoding="utf-8")):
            raise EditError(
                f"{str(folder)!r} cannot be taken back: without its last edit its weights are not those it was made from",
                expected="a folder as mxdsurgery edit wrote it",
                fix="use the folder that it was made from",
            )
    return {"undone": steps[-1]["edits"], "out": str(target)}


def _compared(before: Converted, after: Converted, ids: Tensor, batch: int, reporter: Reporter) -> dict[str, Any]:
    """What edits do to the predictions of contexts (S, T), and some continuations before and after."""
    with reporter.progress("compare", "contexts") as line:
        figures = _compare(before.model, after.model, ids, batch, line.update)
    return figures | {"samples": _samples(before, after, ids)}


@torch.no_grad()
def _compare(
    before: PreTrainedModel, after: PreTrainedModel, ids: Tensor, batch: int, report: Callable[[int, int], None]
) -> dict[str, Any]:
    """What edits do to the predictions of contexts (S, T)."""
    table, done = Table(), 0
    for part in in_batches(ids.to(before.device), fewer_for_logits(batch, before)):
        old, new = (logits_of(model, part) for model in (before, after))
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
def _samples(before: Converted, after: Converted, ids: Tensor) -> list[dict[str, str]]:
    """Greedy continuations of some held-out contexts, before and after; none, and a warning, where it cannot generate."""
    tokenizer = before.tokenizer()
    prompts = ids[: _PROMPTS * 7 : 7, :_PROMPT_TOKENS].to(before.model.device)
    texts = []
    for converted in (before, after):
        try:
            made = sample(converted.model, tokenizer, prompts, Sampling(_NEW_TOKENS, temperature=0))
        except UnsupportedModelError as error:
            warnings.warn(f"no samples of text: {error.found}", MxDWarning, stacklevel=2)
            return []
        texts.append(tokenizer.batch_decode(made[:, prompts.shape[1] :], skip_special_tokens=True))
    shown = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    return [{"prompt": p, "before": b, "after": a} for p, b, a in zip(shown, *texts, strict=True)]


def _note(staging: Path, steps: list[dict[str, Any]], after: Converted, recipe: Recipe) -> None:
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
    write_evaluation(staging, evaluation, after.plan, recipe)


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
