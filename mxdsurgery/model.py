"""The base model: finding it, reading its config, building its skeleton, loading its weights and tokenizer.

Everything that the hub or a folder can answer wrongly becomes a named error here.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mxdsurgery.demo import DEMO_MODELS
from mxdsurgery.errors import (
    ModelNotFoundError,
    NotCausalLMError,
    UnknownFamilyError,
    WeightsError,
    first_line,
)
from mxdsurgery.hub import MODEL_KINDS, reading_error
from mxdsurgery.offload import compute_on


def model_source(model: str) -> str:
    """What to hand to ``from_pretrained`` for a model as the user names it."""
    return str(DEMO_MODELS.get(model, model))


def model_name(model: str) -> str:
    """A model as it may be told to others: of a local folder, its name only."""
    return Path(model).name if Path(model).is_dir() else model


def load_config(model: str, revision: str | None = None) -> PreTrainedConfig:
    """The config of a causal language model of a family that transformers knows.

    Args:
        model: hub id, local folder or demo model.
        revision: branch, tag or commit on the hub.

    Raises:
        ModelNotFoundError: no such model, or it cannot be reached.
        GatedModelError: access has to be asked for, or no token was given.
        UnknownFamilyError: its ``model_type`` is missing or not transformers' own.
        NotCausalLMError: it is no decoder-only next-token model.
    """
    source = model_source(model)
    there = os.path.exists(source)  # where Path.exists() raises, for a name too long to be a file's, this is False
    if there and not (Path(source) / "config.json").is_file():
        raise ModelNotFoundError(f"{model!r} is there, but holds no config.json", expected=MODEL_KINDS)
    if not there and _looks_like_path(model):
        raise ModelNotFoundError(f"no folder {model!r}", expected=MODEL_KINDS)
    model_type = _config_dict(model, revision)["model_type"]
    if model_type not in CONFIG_MAPPING_NAMES:
        if model_type.startswith("mxd-"):
            raise NotCausalLMError(
                f"{model!r} is already a converted model (model_type {model_type!r})",
                expected="an original model",
                fix="name the original model that it was made from",
            )
        raise UnknownFamilyError(
            f"{model!r} has model_type {model_type!r}, which this transformers does not know",
            expected="one of transformers' own architectures, not one that needs code from its repository",
            fix="upgrade transformers if the architecture is newer than it",
        )
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # whatever a malformed config makes of transformers' checks
        raise UnknownFamilyError(f"the config of {model!r} is not valid: {first_line(error)}") from None
    _check_causal(model, config)
    return config


def _config_dict(model: str, revision: str | None) -> dict[str, Any]:
    """The raw config.json, before any class looks at it; it names a ``model_type``."""
    source = model_source(model)
    try:
        if Path(source).is_dir():
            declared = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
        else:
            declared, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelNotFoundError(
            f"the config.json of {model!r} is not JSON: {error}", expected="a config.json as transformers wrote it"
        ) from None
    except Exception as error:
        raise reading_error(model, error) from None
    if not isinstance(declared, dict) or not isinstance(declared.get("model_type"), str):
        raise UnknownFamilyError(
            f"{model!r} has no config.json that names a model_type", expected="a config.json as transformers wrote it"
        )
    return declared


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~", "\\")) or model.count("/") > 1 or model.endswith("/")


def _check_causal(model: str, config: PreTrainedConfig) -> None:
    """Raises NotCausalLMError unless the config describes a decoder-only next-token model."""
    kind = f"{model!r} ({config.model_type}, {', '.join(config.architectures or ['no architecture named'])})"
    expected = "a decoder-only causal language model"
    if getattr(config, "is_encoder_decoder", False):
        raise NotCausalLMError(f"{kind} is an encoder-decoder", expected=expected)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise NotCausalLMError(f"{kind} has no causal language model in transformers", expected=expected)
    causal = {
        name for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in ([names] if isinstance(names, str) else names)
    }
    architectures = config.architectures or []
    if architectures and not causal.intersection(architectures):
        raise NotCausalLMError(f"{kind} was not trained to predict next tokens", expected=expected)


def model_skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device: every module and shape, no weights."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever an inconsistent config makes of a model's __init__
        raise UnknownFamilyError(
            f"transformers cannot build a {config.model_type} model from this config: {first_line(error)}",
            expected="a config.json as transformers wrote it",
        ) from None


def load_model(
    model: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    offload: Path | None = None,
) -> PreTrainedModel:
    """The base model with its weights, in evaluation mode, its parameters frozen.

    Args:
        model: hub id, local folder or demo model.
        revision: branch, tag or commit on the hub.
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.
        device: where the weights go.
        offload: a folder, where the weights are to stay on disk until each is needed. They are read from the checkpoint's own
            files; the few that transformers stores otherwise than it computes with them are written to the folder.

    Raises:
        WeightsError: no safetensors, or weights that the config asks for are missing.
        ModelNotFoundError, GatedModelError, UnknownFamilyError, NotCausalLMError: see `load_config`.
    """
    load_config(model, revision)
    source = model_source(model)
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        found = ", ".join(sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth"})) or "no weights"
        raise WeightsError(
            f"{model!r} holds {found}",
            expected="weights as .safetensors (pickled weights can run code and are never opened)",
            fix="load it where you trust it and save_pretrained() it",
        )
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **({} if offload is None else {"device_map": {"": "disk"}, "offload_folder": str(offload)}),
        )
    except Exception as error:  # transformers and safetensors raise a dozen kinds here
        raise WeightsError(f"the weights of {model!r} cannot be loaded: {first_line(error)}") from None
    check_complete(model, info)
    if offload is None:
        loaded.to(device)
    else:
        compute_on(loaded, torch.device(device))
    return loaded.eval().requires_grad_(False)


def check_complete(model: str, info: dict[str, Any]) -> None:
    """Raises WeightsError if transformers' loading info says that weights were missing or of another shape."""
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise WeightsError(
            f"{len(missing)} weights of {model!r} are missing or of another shape: {', '.join(missing[:3])} ...",
            expected="a complete checkpoint of this architecture",
        )


def load_tokenizer(model: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The base model's tokenizer.

    Raises:
        ModelNotFoundError: it has none, or it cannot be reached.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_source(model), revision=revision, trust_remote_code=False)
    except Exception as error:
        raise ModelNotFoundError(
            f"the tokenizer of {model!r} cannot be loaded: {first_line(error)}",
            expected="a tokenizer.json beside the model",
        ) from None
    # Documents are longer than the model's context on purpose: they are packed. Not worth a warning per document.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    return tokenizer


def decoder_layers(model: PreTrainedModel) -> tuple[str, torch.nn.ModuleList]:
    """The list of decoder layers and its path from the base model: the outermost one of the config's length."""
    wanted = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.base_model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == wanted
    ]
    if not lists:
        raise UnknownFamilyError(
            f"{type(model).__name__} holds no list of {wanted} decoder layers",
            expected="decoder layers in one torch.nn.ModuleList",
        )
    return min(lists, key=lambda item: item[0].count("."))
