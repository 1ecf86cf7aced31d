"""The base model: finding it, reading its config, building its skeleton, loading its weights and tokenizer.

Everything that the hub or a folder can answer wrongly becomes a named error here.
"""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.peft_utils import find_adapter_config_file

from mxdsurgery.base.dtypes import compute_in
from mxdsurgery.base.families import family_of
from mxdsurgery.base.hub import MODEL_KINDS, reading_error
from mxdsurgery.base.offload import compute_on, execution_device
from mxdsurgery.demo import DEMO_MODELS
from mxdsurgery.errors import (
    DataError,
    ModelNotFoundError,
    MxDError,
    NotCausalLMError,
    RecipeError,
    UnknownFamilyError,
    WeightsError,
    first_line,
)
from mxdsurgery.outside import check_folder, foreign_code, read_json, stored_shapes

# More decoder layers than any model has; each is built, if only without weights, before anything else is known of it.
_MOST_LAYERS = 4096
# So many tokens show whether a model reads those to come.
_CAUSAL_TOKENS = 6
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Elsewhere transformers asks a server to convert pickled weights, and loads what that one answers.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")


def model_source(model: str) -> str:
    """What to hand to ``from_pretrained`` for a model as the user names it."""
    return str(DEMO_MODELS.get(model, model))


def model_name(model: str) -> str:
    """A model as it may be told to others: of a local folder, its name only."""
    return Path(model).name if os.path.isdir(model) else model


def load_config(model: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a causal language model of a family that transformers knows, or whose code comes with it.

    Args:
        model: hub id, local folder or demo model.
        revision: branch, tag or commit on the hub.
        trust_remote_code: whether Python code that comes with the model may be run. It is only where transformers has none.

    Raises:
        ModelNotFoundError: no such model, or it cannot be reached.
        GatedModelError: access has to be asked for, or no token was given.
        UnknownFamilyError: its ``model_type`` is missing, or not transformers' own and its code is not trusted.
        NotCausalLMError: it is no decoder-only next-token model.
        WeightsError: it is quantised.
    """
    source = model_source(model)
    there = os.path.exists(source)  # where Path.exists() raises, for a name too long to be a file's, this is False
    if there and not (Path(source) / "config.json").is_file():
        raise ModelNotFoundError(f"{model!r} is there, but holds no config.json", expected=MODEL_KINDS)
    if not there and _looks_like_path(model):
        raise ModelNotFoundError(f"no folder {model!r}", expected=MODEL_KINDS)
    declared = _config_dict(model, revision)
    needs_code = _needs_own_code(model, declared)
    if needs_code and not trust_remote_code:
        raise UnknownFamilyError(
            f"{model!r} has model_type {declared['model_type']!r}, which transformers knows only by code that comes with it",
            expected="one of transformers' own architectures, or your word that this code may be run",
            fix="read the code, and give --trust-remote-code if you trust it",
        )
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=needs_code)
        _check_causal(model, config)
        _check_buildable(model, config)
    except MxDError:
        raise
    except Exception as error:  # whatever a malformed config makes of transformers' checks and ours
        raise UnknownFamilyError(f"the config of {model!r} is not valid: {first_line(error)}") from None
    return config


def _needs_own_code(model: str, declared: dict[str, Any]) -> bool:
    """Whether transformers knows an architecture only by code that comes with the model.

    Raises:
        UnknownFamilyError: nothing knows it.
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
    if os.path.isdir(source):  # where Path.is_dir() raises, for a name too long to be a folder's, this is False
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
            f"{model!r} cannot be read: {error}", expected="the model's own files in one folder"
        ) from None
    try:
        return read_json(folder / "config.json")
    except (ValueError, OSError) as error:
        raise ModelNotFoundError(
            f"the config.json of {model!r} is not JSON: {error}", expected="a config.json as transformers wrote it"
        ) from None


def own_code(config: PreTrainedConfig) -> bool:
    """Whether a config's class is code that came with its model, and was trusted."""
    return type(config).__module__.startswith("transformers_modules.")


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
    if not isinstance(count, int) or not 0 <= count <= _MOST_LAYERS:
        raise UnknownFamilyError(
            f"the config of {model!r} is not valid: num_hidden_layers is {count!r}",
            expected=f"a number of layers, at most {_MOST_LAYERS}",
        )


def model_skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device: every module and shape, no weights. Code of its own was trusted with its config."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=own_code(config))
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
    compute: str | None = None,
    device: str | torch.device = "cpu",
    offload: Path | None = None,
    trust_remote_code: bool = False,
    check: bool = True,
) -> PreTrainedModel:
    """The base model with its weights, in evaluation mode, its parameters frozen.

    Args:
        model: hub id, local folder or demo model.
        revision: branch, tag or commit on the hub.
        dtype: of the weights: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.
        compute: what it computes in, by name; see `mxdsurgery.base.dtypes.compute_in`. Default: the dtype of its weights.
        device: where the weights go.
        offload: a folder, where the weights are to stay on disk until each is needed. They are read from the checkpoint's own
            files; the few that transformers stores otherwise than it computes with them are written to the folder.
        trust_remote_code: see `load_config`.
        check: whether to make sure that all weights are finite; that reads all of them.

    Raises:
        WeightsError: no safetensors, weights that the config asks for are missing, or one is NaN or infinite.
        ModelNotFoundError, GatedModelError, UnknownFamilyError, NotCausalLMError: see `load_config`.
    """
    config = load_config(model, revision, trust_remote_code)
    source = model_source(model)
    _check_weights(model, revision, config)
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=own_code(config),
            output_loading_info=True,
            **({} if offload is None else {"device_map": {"": "disk"}, "offload_folder": str(offload)}),
        )
    except Exception as error:  # transformers and safetensors raise a dozen kinds here
        if "does not appear to have a file named model.safetensors" in str(error):
            raise _pickled(model, "no safetensors") from None
        raise WeightsError(f"the weights of {model!r} cannot be loaded: {first_line(error)}") from None
    check_complete(model, info)
    if check:
        check_finite(model, loaded)
    if offload is None:
        loaded.to(device)
    else:
        compute_on(loaded, torch.device(device))
    if compute is not None:
        compute_in(loaded, getattr(torch, compute))
    if check:
        check_causal(model, loaded.eval())
    return loaded.eval().requires_grad_(False)


def _check_weights(model: str, revision: str | None, config: PreTrainedConfig) -> None:
    """Raises WeightsError for weights that are pickled, an adapter's, outside their folder or far fewer than the config's."""
    source = model_source(model)
    folder = Path(source)
    try:
        if find_adapter_config_file(source, revision=revision) is not None:
            raise WeightsError(
                f"{model!r} is a model with a PEFT adapter beside it",
                expected="a model whole",
                fix="merge the adapter into it: merge_and_unload(), then save_pretrained()",
            )
        if not os.path.isdir(source):
            return
        if not any(folder.glob("*.safetensors")):
            raise _pickled(model, ", ".join(sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLED)) or "no weights")
        held = sum(torch.Size(shape).numel() for shape in stored_shapes(folder).values())
    except (ValueError, OSError) as error:
        raise WeightsError(f"the weights of {model!r} cannot be loaded: {first_line(error)}") from None
    wanted = model_skeleton(config).num_parameters()
    if wanted > 2 * held:  # what is missing would be made up, in memory, before anyone says so
        raise WeightsError(
            f"the weights of {model!r} are missing for the most part: its config asks for {wanted:,}, its files hold {held:,}",
            expected="a complete checkpoint of this architecture",
        )


def _pickled(model: str, found: str) -> WeightsError:
    return WeightsError(
        f"{model!r} holds {found}",
        expected="weights as .safetensors (pickled weights can run code and are never opened)",
        fix="where you trust it, load it with from_pretrained() and save_pretrained() it into a new folder, which writes "
        "safetensors; its tokenizer too",
    )


def check_finite(name: str, model: PreTrainedModel) -> None:
    """Raises WeightsError for the first weight that holds NaN or infinity; those on disk are read one after the other."""
    for key, weight in model.named_parameters():
        value: Tensor = load_offloaded_parameter(model, key) if weight.is_meta else weight
        if value.numel() and not all(bound.isfinite() for bound in value.detach().aminmax()):
            what = "NaN" if value.isnan().any() else "infinity"
            raise WeightsError(
                f"the weight {key} of {name!r} holds {what}",
                expected="finite weights",
                fix="fetch the model again; if it was trained so, take an earlier checkpoint of it",
            )


@torch.no_grad()
def check_causal(name: str, model: PreTrainedModel) -> None:
    """Raises NotCausalLMError for a model in which a token changes what is predicted before it."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(2 * _CAUSAL_TOKENS).view(2, -1).remainder(vocabulary)
    ids[1] = ids[0]
    ids[1, -1] = (ids[0, -1] + 1) % vocabulary
    logits = model(input_ids=ids.to(execution_device(model)), use_cache=False).logits[:, :-1].float()
    difference, largest = (logits[0] - logits[1]).abs().max().item(), logits.abs().max().item()
    if difference > torch.finfo(model.dtype).eps ** 0.5 * largest:  # far from rounding
        raise NotCausalLMError(
            f"{name!r} ({model.config.model_type}) reads the tokens to come: the last of {_CAUSAL_TOKENS} tokens changes "
            f"what is predicted before it by {difference / largest:.0e} of the largest logit",
            expected="a decoder-only causal language model",
        )


def check_fits(model: PreTrainedModel, input_ids: Tensor) -> None:
    """Makes sure that a model can read contexts, before it fails in the midst of one.

    Args:
        model: any.
        input_ids: (B, T) int64.

    Raises:
        DataError: there is nothing in them, or a token that the model does not have.
        RecipeError: they are longer than the model's.
    """
    if input_ids.numel() == 0:
        raise DataError(f"there is no text: {tuple(input_ids.shape)} tokens", expected="one context at least")
    check_context(model.config, input_ids.shape[1])
    vocabulary, largest = model.get_input_embeddings().weight.shape[0], int(input_ids.max())
    if largest >= vocabulary:
        raise DataError(
            f"the tokenizer gives token {largest}, and the model has {vocabulary} of them",
            expected="the tokenizer that the model was trained with",
        )


def check_context(config: PreTrainedConfig, context: int) -> None:
    """Raises RecipeError if contexts of so many tokens are longer than what a model can read."""
    most = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(most, int) and context > most:
        raise RecipeError(
            f"recipe key 'context' is {context}, and the model reads at most {most} tokens",
            expected=f"contexts of at most {most} tokens",
            fix=f"--context {most}, or less",
        )


def check_complete(model: str, info: dict[str, Any]) -> None:
    """Raises WeightsError if transformers' loading info says that weights were missing or of another shape."""
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise WeightsError(
            f"{len(missing)} weights of {model!r} are missing or of another shape: {', '.join(missing[:3])} ...",
            expected="a complete checkpoint of this architecture",
        )


def load_tokenizer(model: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The base model's tokenizer; with ``trust_remote_code``, code that comes with it may be run.

    Raises:
        ModelNotFoundError: it has none, or it cannot be reached.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_source(model), revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        needs_code = "trust_remote_code" in str(error)
        raise ModelNotFoundError(
            f"the tokenizer of {model!r} cannot be loaded: {'it is code of its own' if needs_code else first_line(error)}",
            expected="a tokenizer.json beside the model",
            fix="read that code, and give --trust-remote-code if you trust it" if needs_code else None,
        ) from None
    # Documents are longer than the model's context on purpose: they are packed. Not worth a warning per document.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    return tokenizer


def decoder_layers(model: PreTrainedModel) -> tuple[str, torch.nn.ModuleList]:
    """The list of decoder layers and its path from the base model: the outermost one of the config's length in its decoder.

    Raises:
        UnknownFamilyError: there is none.
        NotCausalLMError: they are an encoder's.
    """
    named = family_of(model.config.model_type).layers
    if named is not None:
        if named not in dict(model.base_model.named_modules()):
            raise UnknownFamilyError(
                f"{type(model).__name__} holds no module {named!r}, where its family is registered to have its decoder layers",
                fix="register the path from the base model",
            )
        return named, model.base_model.get_submodule(named)
    wanted = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder = model.get_decoder()  # without a vision tower that may stand beside it, of as many layers
    inside = next((name for name, module in model.base_model.named_modules() if module is decoder), "")
    lists = [
        (f"{inside}.{name}".lstrip("."), module)
        for name, module in model.base_model.get_submodule(inside).named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == wanted
    ]
    if not lists:
        raise UnknownFamilyError(
            f"{type(model).__name__} holds no list of {wanted} decoder layers",
            expected="decoder layers in one torch.nn.ModuleList",
        )
    path, layers = min(lists, key=lambda item: item[0].count("."))
    # What a config says of is_decoder counts only where the layers ask for it: GPT-NeoX's says false.
    if any(getattr(module, "is_decoder", True) is False for layer in layers[:1] for module in layer.modules()):
        raise NotCausalLMError(
            f"{type(model).__name__} is an encoder here: its config says is_decoder: false",
            expected="a decoder-only causal language model",
        )
    return path, layers
