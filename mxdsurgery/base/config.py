"""The base model's config: reads it from a folder or the hub, and checks that such a model can be converted at all."""

import itertools
import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mxdsurgery.base.families import family_of
from mxdsurgery.base.foreign import came_with_the_model, code_error
from mxdsurgery.base.hub import MODEL_KINDS, reading_error
from mxdsurgery.demo import DEMO_MODELS
from mxdsurgery.errors import ModelNotFoundError, MxDError, NotCausalLMError, UnknownFamilyError, WeightsError, first_line
from mxdsurgery.outside import check_folder, check_pointer, fix_of, foreign_code, read_json

# Files of a tokenizer that may be large enough for git-lfs.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json")
# More decoder layers than any model has. A config is checked for it first: the skeleton builds each layer, if without weights.
_MOST_LAYERS = 4096


def model_source(model: str) -> str:
    """What to hand to ``from_pretrained`` for a model as the user names it."""
    return str(DEMO_MODELS.get(model, model))


def model_name(model: str) -> str:
    """A model's name as others may see it: of a local folder, the folder's name without its path."""
    return Path(model).name if os.path.isdir(model) or os.path.isabs(model) else model


def came_from_here(model: str, revision: str | None) -> bool:
    """Whether the base model that a plan or an adapter names is of this machine: of one on the hub, the commit is known."""
    return revision is None or model in DEMO_MODELS or os.path.isabs(model) or os.path.isdir(model)


def load_config(model: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a causal language model of a family that transformers knows, or whose code comes with it.

    Args:
        model: hub id, local folder or demo model.
        revision: branch, tag or commit on the hub.
        trust_remote_code: whether Python code that comes with the model may be run. It is run only where transformers
            does not have the architecture.

    Raises:
        ModelNotFoundError: no such model, or it cannot be reached.
        GatedModelError: access has to be asked for, or no token was given.
        UnknownFamilyError: its ``model_type`` is missing, or not transformers' own and its code is not trusted.
        NotCausalLMError: it is no decoder-only next-token model.
        WeightsError: it is quantised.
    """
    source = model_source(model)
    there = os.path.exists(source)  # False for a name too long to be a file's, where Path.exists() raises
    if there and not (Path(source) / "config.json").is_file():
        raise ModelNotFoundError(
            f"{model!r} is there, but holds no config.json", expected=MODEL_KINDS, fix=_folders_inside(Path(source))
        )
    if not there and _looks_like_path(model):
        raise ModelNotFoundError(f"no folder {model!r}", expected=MODEL_KINDS)
    declared = _config_dict(model, revision)
    needs_code = _needs_own_code(model, declared)
    if needs_code and not trust_remote_code:
        raise UnknownFamilyError(
            f"{model!r} has model_type {declared['model_type']!r}, which transformers knows only by code that comes with it",
            expected="one of transformers' own architectures, or your word that this code may be run",
            fix="read the code, and if you trust it, give --trust-remote-code",
        )
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=needs_code)
        _check_causal(model, config)
        _check_buildable(model, config)
    except MxDError:
        raise
    except Exception as error:  # a malformed config can make transformers' checks and ours raise anything
        if needs_code:
            raise code_error(f"the code of {model!r}", error) from None
        raise UnknownFamilyError(f"the config of {model!r} is not valid: {first_line(error)}") from None
    return config


def _folders_inside(folder: Path) -> str | None:
    """The advice for a folder without a config.json that holds folders with one."""
    if not folder.is_dir():
        return None
    try:
        found = sorted(str(path.parent) for path in itertools.islice(folder.glob("*/config.json"), 100))
    except OSError:
        return None
    return f"name one of the models in it: {', '.join(found[:5])}" if found else None


def _needs_own_code(model: str, declared: dict[str, Any]) -> bool:
    """Whether transformers knows an architecture only by code that comes with the model.

    Raises:
        UnknownFamilyError: neither transformers nor code that comes with the model knows it.
        NotCausalLMError: it is a converted model.
    """
    model_type = declared["model_type"]
    if model_type in CONFIG_MAPPING_NAMES:
        return False
    if model_type.startswith("mxd-"):
        made_from = declared.get("mxd") if isinstance(declared.get("mxd"), dict) else {}
        name = made_from.get("base_model", "the original model that it was made from")
        raise NotCausalLMError(
            f"{model!r} is already a converted model (model_type {model_type!r})",
            expected="an original model",
            fix=f"name the original model: {name}; 'mxdsurgery heal' and 'mxdsurgery edit' go on from a converted one",
        )
    code = declared.get("auto_map")
    if isinstance(code, dict) and {"AutoConfig", "AutoModelForCausalLM"} <= code.keys():
        return True
    raise UnknownFamilyError(
        f"{model!r} has model_type {model_type!r}, which this transformers does not know",
        expected="one of transformers' own architectures",
        fix="upgrade transformers if the architecture is newer than it",
    )


def _config_dict(model: str, revision: str | None) -> dict[str, Any]:
    """The raw config.json, before any class looks at it; it names a ``model_type``, and no code that loads by itself."""
    source = model_source(model)
    if os.path.isdir(source):  # False for a name too long to be a folder's, where Path.is_dir() raises
        declared = _local_config_dict(model, Path(source))
    else:
        try:
            declared, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
        except Exception as error:
            raise reading_error(model, error) from None
    if not isinstance(declared, dict) or not isinstance(declared.get("model_type"), str):
        raise UnknownFamilyError(
            f"{model!r} has no config.json that names a model_type", expected="a config.json as transformers wrote it"
        )
    if foreign_code(declared) is not None:
        raise UnknownFamilyError(
            f"the config of {model!r} asks for code from elsewhere: {foreign_code(declared)}",
            expected="a config that names none of the hub's kernels",
            fix="take that entry out of its config.json, if you do not need it",
        )
    return declared


def _local_config_dict(model: str, folder: Path) -> Any:
    try:
        check_folder(folder)
    except (ValueError, OSError) as error:
        raise ModelNotFoundError(
            f"{model!r} cannot be read: {first_line(error)}", expected="the model's own files in one folder", fix=fix_of(error)
        ) from None
    try:
        for name in ("config.json", *TOKENIZERS):
            check_pointer(folder / name)
        return read_json(folder / "config.json")
    except (ValueError, OSError) as error:
        raise ModelNotFoundError(
            f"the config.json of {model!r} is not JSON: {first_line(error)}"
            if fix_of(error) is None
            else f"{model!r} cannot be read: {first_line(error)}",
            expected="a config.json as transformers wrote it" if fix_of(error) is None else "the model's own files",
            fix=fix_of(error),
        ) from None


def own_code(config: PreTrainedConfig) -> bool:
    """Whether a config's class is code that came with its model, and was trusted."""
    return came_with_the_model(type(config))


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~", "\\")) or model.count("/") > 1 or model.endswith("/")


def _check_causal(model: str, config: PreTrainedConfig) -> None:
    """Raises NotCausalLMError unless the config describes a decoder-only next-token model."""
    kind = f"{model!r} ({config.model_type}, {', '.join(config.architectures or ['no architecture named'])})"
    expected = "a decoder-only causal language model"
    if getattr(config, "is_encoder_decoder", False):
        raise NotCausalLMError(f"{kind} is an encoder-decoder", expected=expected)
    if family_of(config.model_type).refused is not None:
        raise NotCausalLMError(f"{kind} {family_of(config.model_type).refused}", expected=expected)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not own_code(config):
        raise NotCausalLMError(f"{kind} has no causal language model in transformers", expected=expected)
    causal = {
        name for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in ([names] if isinstance(names, str) else names)
    }
    architectures = config.architectures or []
    if architectures and not causal.intersection(architectures) and not own_code(config):
        raise NotCausalLMError(f"{kind} was not trained to predict next tokens", expected=expected)


def _check_buildable(model: str, config: PreTrainedConfig) -> None:
    """Raises WeightsError for a quantised model, UnknownFamilyError for one of more layers than any model has."""
    text_config = config.get_text_config(decoder=True)
    if getattr(config, "quantization_config", None) or getattr(text_config, "quantization_config", None):
        held = getattr(config, "quantization_config", None) or text_config.quantization_config
        method = held.get("quant_method", "unknown") if isinstance(held, dict) else "unknown"
        raise WeightsError(
            f"{model!r} is quantised ({method}): its blocks are not the linear maps that it was trained with",
            expected="weights in float32, bfloat16 or float16",
            fix="convert the model that it was quantised from, and quantise the result if you like",
        )
    count = getattr(text_config, "num_hidden_layers", None)
    if count is None and own_code(config):  # the modules tell how many there are
        return
    if not isinstance(count, int) or not 0 <= count <= _MOST_LAYERS:
        raise UnknownFamilyError(
            f"the config of {model!r} is not valid: num_hidden_layers is {count!r}",
            expected=f"a number of layers, at most {_MOST_LAYERS}",
        )
