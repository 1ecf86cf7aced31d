"""``evaluate``: measures a converted model again, on the same or another text."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxdsurgery.base.dtypes import computed_in
from mxdsurgery.base.lora import healed_maps, with_adapter
from mxdsurgery.base.model import BaseModel, open_model
from mxdsurgery.base.surgery import replaced
from mxdsurgery.checkpoint.converted import (
    EVALUATION_FILE,
    PLAN_FILE,
    RECIPE_FILE,
    Converted,
    load,
    read_config,
    saved_recipe,
    settle,
)
from mxdsurgery.checkpoint.export import write_evaluation
from mxdsurgery.checkpoint.writing import check_file
from mxdsurgery.demo import DEMO_MODELS
from mxdsurgery.errors import BaseModelError, MxDError, UnknownFamilyError
from mxdsurgery.hardware.guard import guarded
from mxdsurgery.measuring.fidelity import Measurement
from mxdsurgery.measuring.held_out import held_out, trained_share
from mxdsurgery.planning.effort import EVALUATION_SHARE, Alone
from mxdsurgery.planning.plan import Plan, read_plan
from mxdsurgery.recipe import Recipe, load_recipe
from mxdsurgery.terminal.console import Reporter
from mxdsurgery.text.places import check_there
from mxdsurgery.training.accelerator import make_accelerator


@guarded
def evaluate(
    folder: str | Path,
    *,
    data: str | None = None,
    tokens: int | None = None,
    tokens_single: int | None = None,
    text_column: str | None = None,
    base: str | None = None,
    device: str | None = None,
    compute: str | None = None,
    trust_remote_code: bool = False,
    contexts: Tensor | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Measures a converted model against its original on held-out text; saves the figures in its folder.

    Contexts that the model was trained on are left out; that is known of every text, whatever it is named, from the record
    that `convert` and `heal` keep in the folder.

    Args:
        folder: what ``convert`` wrote.
        data: the text; default: the recipe's held-out text.
        tokens: how many of its tokens; default: the recipe's ``eval_tokens``.
        tokens_single: on how many each layer alone is measured; default: the recipe's ``eval_tokens_single``, or as many as
            the conversion chose, or else as many as keep the evaluation within a fifth of the training time.
        text_column: column or field with the text; default: the recipe's.
        base: the original model, if it is no longer where the recipe says.
        device: ``auto``, ``cpu``, ``cuda``, ``mps`` or ``xpu``; default: the recipe's.
        compute: dtype to compute in; ``auto``: as stored, or float32 where that is faster here; default: the recipe's.
        trust_remote_code: run the code that came with the base model, where it has its own; see `load`.
        contexts: token ids to measure on in place of those of a text, (S, T); ``data`` is then but the text's name.
        reporter: where progress is reported; default: nowhere.

    Returns:
        The JSON object that evaluation.json holds; ``mxdsurgery.measuring.fidelity.measure`` says what is in it. Besides,
        ``trained_on``: how many of the contexts were trained on after all; None where the folder does not record it.

    Raises:
        NotConvertedError: the folder is not one of ours.
        BaseModelError: the original model is missing, or is not the one that the folder was made from.
        DataError: the text cannot be read, is too short, or all of it was trained on.
        OutputError: the folder cannot be written.
    """
    reporter = reporter or Reporter()
    folder = Path(folder)
    check_before_loading(folder, data if contexts is None else None, base, trust_remote_code)
    check_file(folder / EVALUATION_FILE)
    converted = load(folder, trust_remote_code=trust_remote_code)
    saved = Recipe(**load_recipe(folder / RECIPE_FILE))
    recipe = dataclasses.replace(saved, eval_tokens=tokens or saved.eval_tokens, device=device or saved.device)
    settled = settle(converted, recipe, compute)
    heldout = held_out(converted, saved, data, tokens, text_column) if contexts is None else contexts
    accelerator = make_accelerator(dataclasses.replace(settled, tracker="none"))
    original = load_original(converted, base or recipe.model, settled)
    original.to(accelerator.device)
    for layer in converted.layers.values():
        layer.to(accelerator.device)
    maps = {path: module.to(accelerator.device) for path, module in _changed_maps(converted).items()}
    training = _training_record(folder)
    alone = _alone(converted, recipe, tokens_single, training)
    blocks, layers = converted.plan.blocks, converted.layers
    measurement = Measurement(original, blocks, [layers], heldout, recipe.batch, maps, alone)
    reporter.say(f"evaluate   {measurement.announcement()}")
    with reporter.progress("evaluate", "passes") as line:
        evaluation = measurement.run(line.update)[0]
    evaluation |= trained_share(converted, heldout)
    evaluation["compute"] = settled.compute
    evaluation["data"] = data or recipe.eval_data or recipe.data
    edits = converted.model.config.mxd.get("edits", [])
    evaluation |= {"edits": len(edits)} if edits else {}
    healed = converted.model.config.mxd.get("healed", [])
    evaluation |= {"healed": healed} if healed else {}
    evaluation |= training
    measured_on = recipe if data is None else dataclasses.replace(recipe, eval_data=data)
    write_evaluation(folder, evaluation, converted.plan, measured_on)
    return evaluation


def _alone(converted: Converted, recipe: Recipe, tokens: int | None, training: dict[str, Any]) -> Alone:
    """On how much of the text single layers are measured: ``tokens``, or else as the recipe or the conversion has it."""
    seconds = training.get("training", {}).get("seconds")
    tokens = tokens or recipe.eval_tokens_single or converted.plan.eval_tokens_single
    return Alone(tokens, None if seconds is None else EVALUATION_SHARE * seconds)


def _changed_maps(converted: Converted) -> dict[str, nn.Module]:
    """The modules that healing changed besides the layers, by path from the base model; loads an adapter in the folder."""
    mxd = converted.model.config.mxd
    merged, beside = (healed_maps(mxd, kept) for kept in ("merged", "adapter"))
    if beside:
        with_adapter(converted.model, converted.folder)
    return {path: converted.model.base_model.get_submodule(path) for path in {*merged, *beside}}


def _training_record(folder: Path) -> dict[str, Any]:
    """The entry ``training`` of the conversion's own evaluation.json, as a dict; an empty one if it cannot be read."""
    try:
        record = json.loads((folder / EVALUATION_FILE).read_text(encoding="utf-8"))
        return {"training": record["training"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def check_before_loading(folder: str | Path, data: str | None, base: str | None, trust_remote_code: bool) -> None:
    """Looks for what a command will need beside a converted model, before any weights are read.

    Args:
        folder: what ``convert`` wrote.
        data: a text that was given, or None.
        base: where the original model is said to be, or None: where the recipe says.
        trust_remote_code: whether its code may be run.

    Raises:
        NotConvertedError: the folder is not one of ours.
        DataError: the text is not on this machine.
        BaseModelError: the original model is not there, or is of another family.
    """
    folder = Path(folder)
    read_config(folder)
    check_there(data)
    try:
        plan = read_plan(folder / PLAN_FILE)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return  # `load` says what is wrong with it
    saved = saved_recipe(folder)
    _open_original(folder, plan, base or saved.model, saved, trust_remote_code)


def _open_original(folder: Path, plan: Plan, name: str, recipe: Recipe, trust_remote_code: bool) -> BaseModel:
    """The model that a converted one was made from, by its config; its weights may still be others. Raises BaseModelError."""
    revision = None if Path(name).is_dir() or name in DEMO_MODELS else plan.revision or recipe.revision
    try:
        opened = open_model(name, revision, trust_remote_code)
    except MxDError as error:
        raise _original_needed(folder, plan, error) from None
    if opened.config.model_type != plan.model_type:
        raise _another_model(folder, name, f"it is a {opened.config.model_type} model, not {plan.model_type}")
    return opened


def _original_needed(folder: Path, plan: Plan, error: MxDError) -> BaseModelError:
    return BaseModelError(
        f"the original model of {str(folder)!r} is needed to compare with: {error.found}",
        expected=f"the model that it was made from, {plan.model}",
        # One that is there and is not run, as its code is not trusted, is not mended by another place.
        fix=(error.fix if isinstance(error, UnknownFamilyError) else None) or "say where it is now with --base",
    )


def _another_model(folder: Path, name: str, difference: str) -> BaseModelError:
    return BaseModelError(
        f"{name!r} is not the model that {str(folder)!r} was made from: {difference}",
        expected="the same weights outside the converted blocks",
        fix="name the right one with --base",
    )


def load_original(converted: Converted, name: str, recipe: Recipe) -> PreTrainedModel:
    """Loads the model that a converted one was made from, with the same compute dtype, and checks that it is the right one.

    Raises:
        BaseModelError: it is not there, or its weights differ elsewhere than in converted blocks and merged adapters' maps.
    """
    opened = _open_original(converted.folder, converted.plan, name, recipe, converted.trust_remote_code)
    compute = str(computed_in(converted.model)).removeprefix("torch.")
    try:
        original = opened.load(dtype=converted.plan.dtype, compute=compute)
    except MxDError as error:
        raise _original_needed(converted.folder, converted.plan, error) from None
    other = _difference(converted, original)
    if other is not None:
        raise _another_model(converted.folder, name, other)
    return original


def _difference(converted: Converted, original: PreTrainedModel) -> str | None:
    """The first difference between an original and the model that was converted, in words; None if there is none."""
    merged = healed_maps(converted.model.config.mxd, "merged")
    changed = tuple(f"{converted.model.base_model_prefix}.{path}." for path in merged)
    mine = {key: tensor for key, tensor in converted.model.state_dict().items() if not key.startswith(changed)}
    try:
        with replaced(original, converted.plan.blocks, converted.layers):
            theirs = original.state_dict()
    except AttributeError:
        return "it has fewer layers"

    def differs(key: str) -> bool:  # one of the models may be on a GPU already
        return key not in theirs or not torch.equal(mine[key], theirs[key].to(mine[key].device))

    return next((f"{key} differs" for key in mine if differs(key)), None)
