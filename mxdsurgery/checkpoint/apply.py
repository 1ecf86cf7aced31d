"""``apply``: rebuilds the whole checkpoint from an adapter and its base model; also makes an adapter from a checkpoint."""

import os
from pathlib import Path
from typing import Any

import torch

from mxdsurgery.base.config import came_from_here
from mxdsurgery.checkpoint.adapter import (
    damaged,
    differing,
    folder_bytes,
    is_code,
    read_adapter,
    rebuild,
    right_base,
    write_adapter,
)
from mxdsurgery.checkpoint.converted import PLAN_FILE, load, read_config, saved_recipe, settle
from mxdsurgery.checkpoint.export import check_reload, reference_outputs, write_code
from mxdsurgery.checkpoint.readme import CARD, keep_words
from mxdsurgery.checkpoint.writing import check_apart, check_output, check_room, written_whole
from mxdsurgery.demo import DEMO_MODELS
from mxdsurgery.errors import BaseModelError, first_line
from mxdsurgery.hardware.guard import guarded
from mxdsurgery.planning.plan import read_plan
from mxdsurgery.terminal.console import Reporter

# Shape of the token ids that the rebuilt checkpoint is run on: contexts, tokens. The ids themselves do not matter.
_CHECKED = (2, 16)


@guarded
def apply(
    adapter: str | Path,
    *,
    base: str | None = None,
    out: str | Path,
    overwrite: bool = False,
    compute: str | None = None,
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Writes the whole checkpoint that an adapter was made from, bit for bit. ``out`` appears whole or not at all.

    Its Python code is written by this version of mxdsurgery, because code from the adapter's author is not trusted. The code
    is the same, bit for bit, if the same version wrote the adapter.

    Args:
        adapter: what ``convert``, ``heal`` or ``edit`` wrote with ``--format adapter``; it is left as it is.
        base: hub id, local folder or demo model; default: the model that the adapter was made from, at that revision.
        out: the folder to write.
        overwrite: replace an earlier folder that mxdsurgery wrote.
        compute: dtype in which the result is compared with what it should be; as in `evaluate`.
        trust_remote_code: run the code that came with the base model, where it has its own; see `load`.
        reporter: where progress is reported; default: nowhere.

    Returns:
        ``out``, ``base_model``, ``revision``, ``bytes`` of the checkpoint, ``adapter_bytes``, ``tensors_from_base``,
        ``differs`` (files that are not bit for bit as they were: code of another version, an edited card; usually none) and
        ``logits`` and ``hidden``, the largest difference of the reloaded model's from those of the one in memory.

    Raises:
        NotConvertedError: the folder holds no adapter.
        BaseModelError: the base model is missing, of another shape or family, or has other weights.
        WeightsError: the adapter is damaged.
        OutputError: ``out`` cannot be written.
        ExportError: the checkpoint does not load, or computes something else.
    """
    reporter = reporter or Reporter()
    folder = Path(adapter)
    opened = read_adapter(folder)
    check_apart(out, folder, "the adapter")
    target = check_output(out, overwrite)
    check_room(target, opened.checkpoint_bytes)
    try:
        named = base or read_plan(folder / PLAN_FILE).model
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise damaged(folder, f"{PLAN_FILE}: {first_line(error)}") from None
    if base is None and came_from_here(named, opened.revision) and named not in DEMO_MODELS and not os.path.isdir(named):
        raise BaseModelError(
            f"the base model of {str(folder)!r} is needed: a folder {opened.base_model!r}, and it is not at {named!r}",
            expected="the folder of that model on this machine",
            fix="say where it is now with --base",
        )
    with right_base(folder, opened, named, trust_remote_code) as weights, written_whole(target) as staging:
        with reporter.progress("write", "bytes") as line:
            rebuild(folder, opened, weights, staging, line.update)
        write_code(weights.model, staging)
        converted = load(staging, trust_remote_code=trust_remote_code)
        settle(converted, saved_recipe(staging, "cpu"), compute)
        differs = differing(opened, staging)
        wrong = [name for name in differs if name != CARD and not is_code(name)]
        if wrong:
            raise damaged(folder, f"{', '.join(wrong)} would not be what it was")
        vocabulary = converted.model.get_input_embeddings().weight.shape[0]
        ids = (torch.arange(_CHECKED[0] * _CHECKED[1]) * 7919 % vocabulary).view(_CHECKED)
        reference = reference_outputs(converted.model, ids)
        del converted  # what is written is loaded in another process, with no model beside it
        differences = check_reload(staging, reference)
        keep_words(target, staging)
    for name in differs:
        reporter.say(f"differs    {name}: written by another version of mxdsurgery, or edited since")
    return {
        "out": str(target),
        "base_model": opened.base_model,
        "revision": opened.revision,
        "bytes": folder_bytes(target),
        "adapter_bytes": folder_bytes(folder),
        "tensors_from_base": len(opened.from_base),
        "differs": differs,
    } | differences


@guarded
def make_adapter(
    folder: str | Path,
    *,
    base: str | None = None,
    out: str | Path,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Writes an adapter of a converted model's folder: only what differs from its base model.

    Args:
        folder: what ``convert``, ``heal``, ``edit`` or ``apply`` wrote; it is left as it is.
        base: where its base model is now; default: where it was.
        out: the folder to write; it appears whole or not at all.
        overwrite: replace an earlier folder that mxdsurgery wrote.
        trust_remote_code: run the code that came with the base model, where it has its own; see `load`.

    Returns:
        ``out``, ``base_model``, ``revision``, ``adapter_bytes``, ``bytes`` of the checkpoint and ``tensors_from_base``.

    Raises:
        NotConvertedError: the folder is not one of ours, or is an adapter already.
        BaseModelError: the base model is missing, has no safetensors, or no tensor in common with the checkpoint.
        OutputError: ``out`` cannot be written.
    """
    folder = Path(folder)
    read_config(folder)
    check_apart(out, folder, "the converted model")
    target = check_output(out, overwrite)
    plan = read_plan(folder / PLAN_FILE)
    with written_whole(target) as staging:
        made = write_adapter(folder, staging, plan.model, plan.revision, base, trust_remote_code)
        keep_words(target, staging)
    return {
        "out": str(target),
        "base_model": made.base_model,
        "revision": made.revision,
        "adapter_bytes": folder_bytes(target),
        "bytes": made.checkpoint_bytes,
        "tensors_from_base": len(made.from_base),
    }
