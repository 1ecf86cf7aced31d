"""A converted model: its classes, what its config says, and reading its folder back without running any code in it."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from mxdsurgery.accelerator import compute_device
from mxdsurgery.adapter import Adapter, is_adapter, merged, read_adapter, right_base
from mxdsurgery.errors import NotConvertedError, WeightsError
from mxdsurgery.initialize import layer_shape
from mxdsurgery.model import check_complete, model_name
from mxdsurgery.plan import Plan, read_plan
from mxdsurgery.recipe import Recipe, load_recipe
from mxdsurgery.replacement import MxDSurgeryMixin

# Of the `mxd` entry in an exported config.json and of the weights' names. Raised when either changes.
FORMAT_VERSION = 3
# Version 1 knew one kind of layer, and did not name it; version 2 knew no edits.
_READ_VERSIONS = (1, 2, 3)

PLAN_FILE, RECIPE_FILE, EVALUATION_FILE = "plan.json", "recipe.yaml", "evaluation.json"

_CONVERTED = "a folder that mxdsurgery convert wrote"


def converted_config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The config class of a family's converted models: the family's own, with one more entry, ``mxd``."""
    fields = {"model_type": f"mxd-{base.model_type}", "mxd": None, "__annotations__": {"mxd": dict | None}}
    return type(f"MxD{base.__name__}", (base,), fields | {"__module__": __name__})


def converted_model_class(base: type[PreTrainedModel], config: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """The class of a family's converted models: a subclass of the family's own."""
    return type(f"MxD{base.__name__}", (MxDSurgeryMixin, base), {"config_class": config, "__module__": __name__})


def converted_config(base: PreTrainedConfig, plan: Plan) -> PreTrainedConfig:
    """The config of a converted model: the base model's, and what stands where."""
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
        plan: what was converted.
        layers: the new layers in the model, by layer index.
    """

    folder: Path
    model: PreTrainedModel
    plan: Plan
    layers: dict[int, nn.Module]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer in the folder."""
        return AutoTokenizer.from_pretrained(self.folder, config=self.model.config, trust_remote_code=False)


def read_config(folder: str | Path, *, of_adapter: bool = False) -> dict[str, Any]:
    """The config.json of a converted model, checked.

    Args:
        folder: the model's.
        of_adapter: whether an adapter's is good, too.

    Raises:
        NotConvertedError: the folder is not there, is not one of ours, is an adapter, or was written by a newer version.
    """
    if is_adapter(folder) and not of_adapter:
        adapter = read_adapter(folder)
        raise NotConvertedError(
            f"{str(folder)!r} is an adapter: it holds only what differs from {adapter.origin()}",
            expected=_CONVERTED,
            fix=f"write that folder with 'mxdsurgery apply {folder} --base \"{adapter.base_flag()}\" --out DIR'; "
            f"in Python, load(..., base=...) has the model in memory",
        )
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise NotConvertedError(f"{str(folder)!r} is not a folder with a config.json", expected=_CONVERTED)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NotConvertedError(f"{path} is not JSON: {error}", expected=_CONVERTED) from None
    mxd = values.get("mxd") if isinstance(values, dict) else None
    if not isinstance(mxd, dict) or mxd.get("family") not in CONFIG_MAPPING:
        kind = values.get("model_type") if isinstance(values, dict) else type(values).__name__
        raise NotConvertedError(
            f"{str(folder)!r} holds an ordinary model ({kind})",
            expected=_CONVERTED,
            fix="run mxdsurgery convert on it first",
        )
    if mxd.get("format_version") not in _READ_VERSIONS:
        raise NotConvertedError(
            f"{str(folder)!r} has format version {mxd.get('format_version')}",
            expected=f"version {FORMAT_VERSION} or older",
            fix="upgrade mxdsurgery",
        )
    return values


def load_with_recipe(folder: str | Path, device: str | None = None, dtype: str = "auto") -> tuple[Converted, Recipe]:
    """A converted model on the device that it is asked for on, and the recipe it was made by, with that device.

    Args:
        folder: what ``convert`` or ``edit`` wrote.
        device: ``auto``, ``cpu`` or ``cuda``; default: the recipe's.
        dtype: as `load`'s.

    Raises:
        NotConvertedError, WeightsError: as `load`.
        DeviceError: the device is not there.
    """
    read_config(folder)
    saved = Recipe(**load_recipe(Path(folder) / RECIPE_FILE))
    recipe = dataclasses.replace(saved, device=device or saved.device, tracker="none")
    return load(folder, device=compute_device(recipe), dtype=dtype), recipe


def fingerprint(converted: Converted) -> str:
    """16 hexadecimal digits that tell converted models apart: of the gates' weights, which no edit changes."""
    digest = hashlib.sha256()
    for layer in sorted(converted.layers):
        if hasattr(converted.layers[layer], "gate"):
            digest.update(converted.layers[layer].gate.weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def load(folder: str | Path, *, base: str | None = None, device: str | torch.device = "cpu", dtype: str = "auto") -> Converted:
    """Loads a converted model. Only its weights and data are read: the Python files in the folder are not run.

    Args:
        folder: what ``convert`` wrote; with ``base``, an adapter.
        base: the base model of an adapter: hub id, local folder or demo model. Nothing is written.
        device: where the weights go.
        dtype: ``auto`` (as saved), ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        NotConvertedError: the folder is not there or not one of ours, or it is an adapter and there is no ``base``, or it is
            none and there is one.
        BaseModelError: ``base`` is not there, or not the model that the adapter was made from.
        WeightsError: weights are missing or cannot be read.
    """
    folder = Path(folder)
    adapter = None if base is None else read_adapter(folder)
    values = read_config(folder, of_adapter=adapter is not None)
    base_config = CONFIG_MAPPING[values["mxd"]["family"]]
    config_class = converted_config_class(base_config)
    model_class = converted_model_class(MODEL_FOR_CAUSAL_LM_MAPPING[base_config], config_class)
    source, weights = (folder, {}) if adapter is None else (None, _adapter_weights(folder, adapter, base))
    try:
        config = config_class.from_pretrained(folder)
        model, info = model_class.from_pretrained(
            source,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            **weights,
        )
        plan = read_plan(folder / PLAN_FILE)
    except Exception as error:  # transformers, safetensors and json raise a dozen kinds here
        raise WeightsError(f"{str(folder)!r} cannot be loaded: {error}", expected="the folder as it was written") from None
    check_complete(str(folder), info)
    model.to(device).eval().requires_grad_(False)
    layers = {block.layer: model.base_model.get_submodule(block.path) for block in plan.blocks}
    return Converted(folder, model, plan, layers)


def _adapter_weights(folder: Path, adapter: Adapter, base: str) -> dict[str, Any]:
    """What ``from_pretrained`` is given in place of a folder: an adapter's weights, with its base model's."""
    with right_base(folder, adapter, base) as weights_of_base:
        weights: dict[str, Any] = {"state_dict": merged(folder, adapter, weights_of_base)}
    if (folder / "generation_config.json").is_file():
        weights["generation_config"] = GenerationConfig.from_pretrained(folder)
    return weights
