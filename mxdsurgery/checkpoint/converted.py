"""A converted model: its classes, what its config says, and reading its folder back without running any code in it."""

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from mxdsurgery.base.config import model_name, model_source, own_code
from mxdsurgery.base.dtypes import compute_in
from mxdsurgery.base.examination import check_complete
from mxdsurgery.base.foreign import code_error
from mxdsurgery.base.model import read_tokenizer
from mxdsurgery.base.running import check_runs
from mxdsurgery.checkpoint.adapter import Adapter, is_adapter, merged, read_adapter, right_base
from mxdsurgery.errors import NotConvertedError, WeightsError, as_typed, first_line
from mxdsurgery.hardware.compute import model_dtype
from mxdsurgery.hardware.device import check_device
from mxdsurgery.hardware.guard import guarded
from mxdsurgery.layers.peft_targets import FamilyTargets
from mxdsurgery.layers.replacement import LAYER_KINDS, MxDSurgeryMixin
from mxdsurgery.outside import check_folder, check_types, fix_of, foreign_code, read_json, shown, stored_shapes
from mxdsurgery.planning.machine import model_shape
from mxdsurgery.planning.plan import Plan
from mxdsurgery.recipe import Recipe, load_recipe
from mxdsurgery.training.cost import DTYPE_BYTES
from mxdsurgery.training.initialize import layer_shape

# Version of the `mxd` entry in an exported config.json and of the weights' names; raised when either changes.
FORMAT_VERSION = 3
# Version 1 knew one kind of layer, and did not name it; version 2 knew no edits.
_READ_VERSIONS = (1, 2, 3)

PLAN_FILE, RECIPE_FILE, EVALUATION_FILE = "plan.json", "recipe.yaml", "evaluation.json"

_CONVERTED = "a folder that mxdsurgery convert wrote"
_MODULE_PATH = re.compile(r"[A-Za-z_]\w*(\.\w+)*", re.ASCII)
# The code that travels with a checkpoint; whatever else a config names is not our code.
_CODE = {"AutoConfig": "configuration_mxd", "AutoModel": "modeling_mxd", "AutoModelForCausalLM": "modeling_mxd"}
_BASE_CODE = ("AutoConfig", "AutoModelForCausalLM")
# Attributes of the classes made here: they keep transformers from copying this file beside a model whose base came with code
# of its own.
_OURS = {"__module__": __name__, "_auto_class": None}


def converted_config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The config class of a family's converted models: the family's own, with one more entry, ``mxd``."""
    fields = {"model_type": f"mxd-{base.model_type}", "mxd": None, "__annotations__": {"mxd": dict | None}}
    return type(f"MxD{base.__name__}", (FamilyTargets, base), fields | _OURS)


def converted_model_class(base: type[PreTrainedModel], config: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """The class of a family's converted models: a subclass of the family's own."""
    return type(f"MxD{base.__name__}", (MxDSurgeryMixin, base), {"config_class": config} | _OURS)


def converted_config(base: PreTrainedConfig, plan: Plan) -> PreTrainedConfig:
    """The config of a converted model: the base model's, with the entry ``mxd`` that describes the new layers."""
    mxd = {
        "format_version": FORMAT_VERSION,
        "family": base.model_type,
        "base_model": model_name(plan.model),
        "base_revision": plan.revision,
        "layers": [
            {
                "layer": layer.block.layer,
                "path": layer.block.path,
                "bypass": list(layer.block.bypass),
                "kind": layer.kind,
                "shape": layer_shape(layer),
            }
            for layer in plan.layers
        ],
    }
    if own_code(base):  # the base model's code travels with the checkpoint
        mxd["code"] = {auto: base.auto_map[auto].split("--")[-1] for auto in _BASE_CODE}
    values = base.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "auto_map"):
        values.pop(name, None)
    return converted_config_class(type(base))(**values, mxd=mxd)


@dataclass
class Converted:
    """A converted model in memory.

    Attributes:
        folder: where it was read from.
        model: the whole model.
        plan: which layers were converted, and into what.
        layers: the new layers in the model, by layer index.
        trust_remote_code: whether code in the folder, and of its base model, may be run.
    """

    folder: Path
    model: PreTrainedModel
    plan: Plan
    layers: dict[int, nn.Module]
    trust_remote_code: bool = False

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer in the folder.

        Raises:
            ModelNotFoundError: there is none, or it cannot be read without running code of its own.
        """
        options = {"config": self.model.config, "trust_remote_code": self.trust_remote_code}
        return read_tokenizer(self.folder, str(self.folder), **options)


def read_config(folder: str | Path, *, of_adapter: bool = False) -> dict[str, Any]:
    """The config.json of a converted model, checked.

    Args:
        folder: the model's.
        of_adapter: whether the config of an adapter is accepted, too.

    Raises:
        NotConvertedError: the folder is not there, is not one of ours, is an adapter, or was written by a newer version.
    """
    if is_adapter(folder) and not of_adapter:
        adapter = read_adapter(folder)
        raise NotConvertedError(
            f"{str(folder)!r} is an adapter: it holds only what differs from {adapter.origin()}",
            expected=_CONVERTED,
            fix=f"write that folder: mxdsurgery apply {as_typed(folder)} --base {as_typed(adapter.base_flag())} --out DIR; "
            "in Python, load(..., base=...) has the model in memory",
        )
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise NotConvertedError(f"{str(folder)!r} {_instead(Path(folder))}", expected=_CONVERTED)
    try:
        check_folder(Path(folder), deep=True)
    except (ValueError, OSError) as error:
        raise NotConvertedError(
            f"{str(folder)!r} cannot be read: {first_line(error)}", expected=_CONVERTED, fix=fix_of(error)
        ) from None
    try:
        values = read_json(path)
    except (ValueError, OSError) as error:
        raise NotConvertedError(f"{path} is not JSON: {first_line(error)}", expected=_CONVERTED) from None
    mxd = values.get("mxd") if isinstance(values, dict) else None
    known = isinstance(mxd, dict) and isinstance(mxd.get("family"), str) and (mxd["family"] in CONFIG_MAPPING or "code" in mxd)
    if not known:
        kind = values.get("model_type") if isinstance(values, dict) else None
        if not isinstance(kind, str):
            raise NotConvertedError(f"{path} is the config of no model", expected=_CONVERTED)
        raise NotConvertedError(
            f"{str(folder)!r} holds an ordinary model ({kind})",
            expected=_CONVERTED,
            fix="run mxdsurgery convert on it first",
        )
    if mxd.get("format_version") not in _READ_VERSIONS:
        raise NotConvertedError(
            f"{str(folder)!r} has format version {shown(mxd.get('format_version'))}",
            expected=f"version {FORMAT_VERSION} or older",
            fix="upgrade mxdsurgery",
        )
    try:
        _check_config(Path(folder), values)
        for entry in mxd["layers"]:
            _check_entry(entry)
    except ValueError as error:
        raise NotConvertedError(f"{path} says what no conversion wrote: {first_line(error)}", expected=_CONVERTED) from None
    return values


def _instead(folder: Path) -> str:
    """What a folder without a config.json is, in words."""
    if not os.path.isdir(folder):
        return "is a file, not a folder" if os.path.isfile(folder) else "is not there"
    if (folder / "frontier.json").is_file():
        return "is what frontier wrote: single layers to compare, no model"
    return "is not a folder with a config.json"


def _check_config(folder: Path, values: dict[str, Any]) -> None:
    """Raises ValueError for entries of a config.json that are not ours, or would make foreign code or weights be loaded."""
    mxd, code = values["mxd"], values.get("auto_map", {})
    if values.get("model_type") != f"mxd-{mxd['family']}":
        raise ValueError(f"model_type is {shown(values.get('model_type'))}, of a {mxd['family']} model")
    good = isinstance(code, dict) and all(isinstance(named, str) for named in code.values())
    if not good or any(not re.fullmatch(rf"{_CODE.get(auto)}\.MxD\w+", named) for auto, named in code.items()):
        raise ValueError(f"auto_map names other code than mxdsurgery's: {shown(code)}")
    base_code = mxd.get("code", dict.fromkeys(_BASE_CODE, "a.B"))
    check_types(base_code, dict[str, str], "code")
    if set(base_code) != set(_BASE_CODE) or not all(re.fullmatch(r"\w+\.\w+", named) for named in base_code.values()):
        raise ValueError(f"code is {shown(base_code)}")
    if foreign_code(values) is not None:
        raise ValueError(f"it asks for code from elsewhere: {foreign_code(values)}")
    if values.get("quantization_config") or values.get("transformers_weights") or (folder / "adapter_config.json").exists():
        raise ValueError("weights that are quantised, elsewhere, or an adapter's (adapter_config.json)")
    if values.get("dtype", values.get("torch_dtype", "float32")) not in list(DTYPE_BYTES):
        raise ValueError("dtype is none of " + ", ".join(DTYPE_BYTES))
    hidden = [name for name in values if callable(getattr(PreTrainedConfig, name, None))]
    if hidden:
        raise ValueError(f"there is no setting {hidden[0]!r}")
    for name in ("layers", "edits", "healed"):
        check_types(mxd.get(name, []), list[dict[str, Any]], name)
    numbers = [entry.get("layer") for entry in mxd.get("layers", [])]
    if not numbers or any(not isinstance(number, int) for number in numbers) or len(set(numbers)) < len(numbers):
        raise ValueError("mxd does not say which layers were converted, each once")


def _check_entry(entry: dict[str, Any]) -> None:
    """Raises ValueError if an entry of a config's ``mxd["layers"]`` describes no layer."""
    kind, shape = entry.get("kind", "mxd"), entry.get("shape")
    paths = [entry.get("path"), *(entry["bypass"] if isinstance(entry.get("bypass"), list) else [None])]
    if not all(isinstance(path, str) and _MODULE_PATH.fullmatch(path) for path in paths):
        raise ValueError(f"path or bypass of layer {entry['layer']} is no module's: {shown(paths)[:100]}")
    if not isinstance(kind, str) or kind not in LAYER_KINDS:
        raise ValueError(f"kind of layer {entry['layer']} is {shown(kind)[:100]}")
    check_types(shape, dict[str, int | str | bool], f"shape of layer {entry['layer']}")
    counts = [value for value in shape.values() if isinstance(value, int) and not isinstance(value, bool)]
    if any(count < 1 for count in counts) or not shape.get("k", 1) <= shape.get("n_experts", 1):
        raise ValueError(f"shape of layer {entry['layer']} is {shown(shape)[:200]}")


def load_with_recipe(
    folder: str | Path,
    device: str | None = None,
    compute: str | None = None,
    *,
    rows: int | None = None,
    trust_remote_code: bool = False,
) -> tuple[Converted, Recipe]:
    """A converted model on the chosen device, and the recipe that it was made with, settled: see `settle`.

    Args:
        folder: what ``convert`` or ``edit`` wrote.
        device: ``auto``, ``cpu``, ``cuda``, ``mps`` or ``xpu``; default: the recipe's.
        compute: see `settle`.
        rows: see `settle`.
        trust_remote_code: see `load`.

    Raises:
        NotConvertedError, WeightsError: as `load`.
        DeviceError: the device is not there.
    """
    read_config(folder)
    recipe = saved_recipe(folder, device)
    converted = load(folder, device=check_device(recipe.device), trust_remote_code=trust_remote_code)
    return converted, settle(converted, recipe, compute, rows=rows)


def saved_recipe(folder: str | Path, device: str | None = None) -> Recipe:
    """The recipe that a converted model was made with, to use it again: without its tracker; on ``device`` if given."""
    _check_there(Path(folder), RECIPE_FILE)
    saved = Recipe(**load_recipe(Path(folder) / RECIPE_FILE))
    return dataclasses.replace(saved, device=device or saved.device, tracker="none")


def _check_there(folder: Path, name: str) -> None:
    """Raises NotConvertedError if a converted model's folder lacks what only mxdsurgery writes: a Trainer saves the rest."""
    if (folder / "config.json").is_file() and not (folder / name).is_file():
        raise NotConvertedError(
            f"{str(folder)!r} holds a converted model without its {name}",
            expected="the folder as mxdsurgery wrote it",
            fix=f"if transformers saved it, as Trainer does, copy {PLAN_FILE} and {RECIPE_FILE} there from the model's folder",
        )


def chosen_dtype(converted: Converted, recipe: Recipe, rows: int | None = None) -> str:
    """The dtype for a converted model to compute in on a recipe's device: the recipe's, or the fastest one.

    Args:
        converted: the model.
        recipe: says on which device, and how many tokens at a time.
        rows: how many texts are generated at a time, token by token, if the model is to generate.

    Raises:
        DeviceError: the device is not there.
    """
    plan, config = converted.plan, converted.model.config
    shape = model_shape(config, plan.layers, rows or recipe.batch, 1 if rows else recipe.context)
    return model_dtype(plan.dtype, recipe.compute, check_device(recipe.device), shape).dtype


def settle(converted: Converted, recipe: Recipe, compute: str | None = None, *, rows: int | None = None) -> Recipe:
    """Sets the dtype that a converted model computes in, as asked for or the fastest; returns the recipe with it.

    Args:
        converted: the model.
        recipe: see `chosen_dtype`.
        compute: ``auto``, ``float32``, ``bfloat16`` or ``float16``; default: the recipe's.
        rows: see `chosen_dtype`.

    Raises:
        RecipeError: ``compute`` is none of these.
        DeviceError: the device is not there.
    """
    dtype = chosen_dtype(converted, dataclasses.replace(recipe, compute=compute or recipe.compute), rows)
    compute_in(converted.model, getattr(torch, dtype))
    return dataclasses.replace(recipe, compute=dtype)


def fingerprint(converted: Converted) -> str:
    """16 hexadecimal digits that identify a converted model: a digest of the gates' weights, which no edit changes."""
    digest = hashlib.sha256()
    for layer in sorted(converted.layers):
        if hasattr(converted.layers[layer], "gate"):
            digest.update(converted.layers[layer].gate.weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@guarded
def load(
    folder: str | Path,
    *,
    base: str | None = None,
    device: str | torch.device = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Converted:
    """Loads a converted model. Only its weights and data are read: the Python files in the folder are not run.

    Args:
        folder: what ``convert`` wrote; with ``base``, an adapter.
        base: the base model of an adapter: hub id, local folder or demo model. Nothing is written.
        device: where the weights go.
        dtype: ``auto`` (as saved), ``float32``, ``bfloat16`` or ``float16``.
        trust_remote_code: run the code that came with the base model, and is in the folder (with ``base``: beside that
            model), if transformers does not know its family.

    Raises:
        NotConvertedError: the folder is not there or not one of ours; or it is an adapter and no ``base`` is given, or the
            reverse; or it needs code that is not trusted.
        BaseModelError: ``base`` is not there, or not the model that the adapter was made from.
        WeightsError: weights are missing or cannot be read.
    """
    folder = Path(folder)
    adapter = None if base is None else read_adapter(folder)
    values = read_config(folder, of_adapter=adapter is not None)
    _check_there(folder, PLAN_FILE)
    config_class, model_class = converted_classes(folder, values["mxd"], trust_remote_code, base)
    source, weights = (folder, {})
    if adapter is not None:
        source, weights = None, _adapter_weights(folder, adapter, base, trust_remote_code)
    try:
        config = config_class.from_pretrained(folder)
        plan = _plan_of(folder, values["mxd"])
        given = weights.get("state_dict")
        _check_shapes(model_class, config, stored_shapes(folder) if given is None else {n: t.shape for n, t in given.items()})
        model, info = model_class.from_pretrained(
            source,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            **weights,
        )
    except Exception as error:  # transformers, safetensors and json raise a dozen kinds here
        raise WeightsError(
            f"{str(folder)!r} cannot be loaded: {first_line(error)}", expected="the folder as it was written"
        ) from None
    check_complete(str(folder), info)
    check_runs(str(folder), model)
    model.to(device).eval().requires_grad_(False)
    layers = {block.layer: model.base_model.get_submodule(block.path) for block in plan.blocks}
    return Converted(folder, model, plan, layers, trust_remote_code)


def converted_classes(
    folder: Path, mxd: dict[str, Any], trusted: bool, base: str | None = None
) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """The classes of a converted model's config and of the model itself.

    Args:
        folder: the model's.
        mxd: the entry of that name in its config.
        trusted: whether code that came with the base model may be run.
        base: of an adapter, the base model, which that code is then beside.

    Raises:
        NotConvertedError: the base model's classes are code that came with it, and that code is not trusted or does not run.
    """
    if "code" not in mxd:
        config = CONFIG_MAPPING[mxd["family"]]
        model = MODEL_FOR_CAUSAL_LM_MAPPING[config]
    elif not trusted:
        raise NotConvertedError(
            f"{str(folder)!r} was made from a {mxd['family']} model, which transformers knows only by code that came with it",
            expected="your word that this code may be run",
            fix="read the Python files in the folder, and if you trust them, give --trust-remote-code",
        )
    else:
        try:
            source = str(folder) if base is None else model_source(base)
            config, model = (get_class_from_dynamic_module(mxd["code"][auto], source) for auto in _BASE_CODE)
        except Exception as error:  # the code may raise anything
            raise code_error(f"the code in {source!r}", error) from None
    config_class = converted_config_class(config)
    return config_class, converted_model_class(model, config_class)


def _plan_of(folder: Path, mxd: dict[str, Any]) -> Plan:
    """The plan in a converted model's folder, which must agree with its config.

    Raises:
        ValueError: it does not agree, or is not a plan.
    """
    try:
        plan = Plan.from_dict(read_json(folder / PLAN_FILE))
        check_types(plan, Plan)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{PLAN_FILE} is no plan: {first_line(error)}") from None
    planned = [(made.block.layer, made.block.path, list(made.block.bypass), made.kind) for made in plan.layers]
    written = [(entry["layer"], entry["path"], entry["bypass"], entry.get("kind", "mxd")) for entry in mxd["layers"]]
    if planned != written or plan.dtype not in DTYPE_BYTES or plan.model_type != mxd["family"]:
        raise ValueError(f"{PLAN_FILE} and config.json do not say the same")
    return plan


def _check_shapes(model_class: type[PreTrainedModel], config: PreTrainedConfig, held: Mapping[str, Sequence[int]]) -> None:
    """Raises ValueError if the config's shapes are not those of the weights, before memory is allocated for the model."""
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    told = layers is not None or "code" not in config.mxd  # code that is trusted may name it otherwise
    if told and not (isinstance(layers, int) and layers <= len(held)):
        raise ValueError(f"num_hidden_layers is {shown(layers)}, and there are {len(held)} weights")
    with torch.device("meta"):
        skeleton = model_class(config)
    for name, tensor in skeleton.state_dict().items():
        if name in held and list(held[name]) != list(tensor.shape):
            raise ValueError(f"{name} has shape {list(held[name])}, and config.json says {list(tensor.shape)}")
    if skeleton.num_parameters() > 2 * sum(torch.Size(shape).numel() for shape in held.values()):
        raise ValueError("config.json says that there are far more weights than there are")


def _adapter_weights(folder: Path, adapter: Adapter, base: str, trusted: bool) -> dict[str, Any]:
    """Arguments for ``from_pretrained`` in place of a folder: an adapter's weights together with its base model's."""
    with right_base(folder, adapter, base, trusted) as weights_of_base:
        weights: dict[str, Any] = {"state_dict": merged(folder, adapter, weights_of_base)}
    if (folder / "generation_config.json").is_file():
        try:
            weights["generation_config"] = GenerationConfig.from_pretrained(folder)
        except Exception as error:  # transformers' checks may raise anything on a malformed file
            raise WeightsError(f"{str(folder)!r}: generation_config.json cannot be read: {first_line(error)}") from None
    return weights
