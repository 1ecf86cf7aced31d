"""The base model, resolved once: its config, its skeleton, its weights and its tokenizer.

Whatever the hub or a folder answers wrongly becomes a named error, here, in `config` or in `examination`.
"""

import copy
import importlib.util
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from mxdsurgery.base.agreement import holds_own_head, make_config_agree, untie
from mxdsurgery.base.blocks import Block
from mxdsurgery.base.config import TOKENIZERS, load_config, model_source, own_code
from mxdsurgery.base.dtypes import compute_in
from mxdsurgery.base.examination import (
    Examination,
    check_causal,
    check_complete,
    check_files,
    check_finite,
    examine,
    other_shape,
    pickled,
)
from mxdsurgery.base.foreign import code_error, forget_code_of
from mxdsurgery.base.offload import compute_on, move
from mxdsurgery.base.running import check_runs
from mxdsurgery.errors import (
    DataError,
    ModelNotFoundError,
    MxDWarning,
    RecipeError,
    UnknownFamilyError,
    WeightsError,
    first_line,
)

# Otherwise transformers asks a server to convert pickled weights, and loads what the server returns.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

# The implementations of attention that need torch alone.
_ATTENTION = ("sdpa", "eager")


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A model to operate on: what is known of it before any weight is read, and the way to its weights. See `open_model`.

    Attributes:
        name: as the user named it.
        revision: the commit on the hub, where that is known; else the revision that was asked for.
        config: as the model's files have it; never changed.
        trust_remote_code: whether code that comes with the model may be run; see `load_config` and `load_tokenizer`.
    """

    name: str
    revision: str | None
    config: PreTrainedConfig
    trust_remote_code: bool = False

    @property
    def commit(self) -> str | None:
        """The commit on the hub; None for a local folder, or where the commit is not known."""
        return getattr(self.config, "_commit_hash", None)

    @property
    def source(self) -> str:
        """What `from_pretrained` takes: a folder or a hub id."""
        return model_source(self.name)

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device, with a head of its own where its files hold one; see `model_skeleton`."""
        config = copy.deepcopy(self.config)
        skeleton = model_skeleton(config)
        if holds_own_head(skeleton, self.source):
            untie(config)
            skeleton = model_skeleton(config)
        return skeleton

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; see `load_tokenizer`."""
        return load_tokenizer(self.name, self.revision, self.trust_remote_code)

    def load(
        self,
        *,
        dtype: str = "auto",
        compute: str | None = None,
        device: str | torch.device = "cpu",
        offload: Path | None = None,
        check: bool = True,
    ) -> PreTrainedModel:
        """The model with its weights, in evaluation mode, its parameters frozen.

        Args:
            dtype: of the weights: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.
            compute: the dtype that it computes in, by name; see `dtypes.compute_in`. Default: the dtype of its weights.
            device: where the weights go.
            offload: a folder; the weights then stay on disk until each is needed. They are read from the checkpoint's own
                files; the few that transformers stores in another form than it computes with are written to the folder.
            check: whether to check that all weights are finite and that no token changes what is predicted before it; this
                reads all weights.

        Raises:
            WeightsError: no safetensors, weights that the config asks for are missing, or one is NaN or infinite.
            NotCausalLMError: its predictions depend on later tokens.
        """
        loaded = self._read(dtype, device, offload)
        if check:
            check_finite(self.name, loaded)
        return self._ready(loaded, compute, device, check)

    def load_examined(
        self,
        blocks: Sequence[Block],
        *,
        dtype: str = "auto",
        compute: str | None = None,
        device: str | torch.device = "cpu",
        offload: Path | None = None,
    ) -> tuple[PreTrainedModel, Examination]:
        """As `load`, and what `examine` finds out about its weights and blocks, in one pass over them.

        Raises:
            WeightsError, NotCausalLMError: see `load`.
            UnsupportedBlockError: see `examine`.
        """
        loaded = self._read(dtype, device, offload)
        examination = examine(self.name, loaded, blocks)
        return self._ready(loaded, compute, device, check=True), examination

    def _read(self, dtype: str, device: str | torch.device, offload: Path | None) -> PreTrainedModel:
        """The model in the dtype asked for: its weights in host memory, or on disk, to be computed with on the device."""
        check_files(self.name, self.source, self.revision, self.skeleton.num_parameters())
        forget_code_of(self.config)
        try:
            loaded, info = AutoModelForCausalLM.from_pretrained(
                self.source,
                config=copy.deepcopy(self.config),
                revision=self.revision,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                use_safetensors=True,
                trust_remote_code=own_code(self.config),
                output_loading_info=True,
                **({} if offload is None else {"device_map": {"": "disk"}, "offload_folder": str(offload)}),
            )
        except Exception as error:  # transformers and safetensors raise a dozen kinds here
            if "does not appear to have a file named model.safetensors" in str(error):
                raise pickled(self.name, "no safetensors") from None
            if "ignore_mismatched_sizes" in str(error) and os.path.isdir(self.source):
                raise other_shape(self.name, Path(self.source), self.skeleton) from None
            raise WeightsError(f"the weights of {self.name!r} cannot be loaded: {first_line(error)}") from None
        check_complete(self.name, info)
        make_config_agree(self.name, loaded, info["unexpected_keys"])
        if offload is not None:
            compute_on(loaded, torch.device(device))
        return loaded.eval().requires_grad_(False)

    def _ready(self, loaded: PreTrainedModel, compute: str | None, device: str | torch.device, check: bool) -> PreTrainedModel:
        """Puts the model on its device and in the dtype that it computes in, and checks, if asked, that it is causal."""
        move(loaded, device)
        if compute is not None:
            compute_in(loaded, getattr(torch, compute))
        if check:
            check_runs(self.name, loaded)
            check_causal(self.name, loaded)
        return loaded


def open_model(name: str, revision: str | None = None, trust_remote_code: bool = False) -> BaseModel:
    """Finds a base model and reads its config, once; no weights.

    Args:
        name: hub id, local folder, ``demo-glu`` or ``demo-mlp``.
        revision: branch, tag or commit on the hub.
        trust_remote_code: see `load_config`.

    Raises:
        ModelNotFoundError, GatedModelError, UnknownFamilyError, NotCausalLMError, WeightsError: see `load_config`.
    """
    config = load_config(name, revision, trust_remote_code)
    _use_attention_that_is_here(name, config)
    return BaseModel(name, getattr(config, "_commit_hash", None) or revision, config, trust_remote_code)


def _use_attention_that_is_here(name: str, config: PreTrainedConfig) -> None:
    """Where a config prefers an implementation of attention that is not installed, chooses one of torch's, and says so."""
    wanted = config._attn_implementation
    if wanted in (None, *_ATTENTION):
        return
    for chosen in (wanted, *_ATTENTION):
        config._attn_implementation = chosen
        try:
            model_skeleton(copy.deepcopy(config))
        except UnknownFamilyError:
            continue
        if chosen != wanted:
            message = f"the config of {name!r} prefers the attention {wanted!r}, which does not run here: it is {chosen!r} now"
            warnings.warn(message, MxDWarning, stacklevel=3)
        return
    config._attn_implementation = wanted  # something else is wrong, and is said where the skeleton is needed


def model_skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device: every module and shape, no weights.

    Code that comes with the model was trusted when its config was read.

    Raises:
        UnknownFamilyError: transformers cannot build it from this config.
    """
    forget_code_of(config)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=own_code(config))
    except Exception as error:  # an inconsistent config can make a model's __init__ raise anything
        if own_code(config):
            raise code_error(f"the code that came with this {config.model_type} model", error) from None
        raise UnknownFamilyError(
            f"transformers cannot build a {config.model_type} model from this config: {first_line(error)}",
            expected="a config.json as transformers wrote it",
        ) from None


def load_tokenizer(model: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The base model's tokenizer; with ``trust_remote_code``, code that comes with it may be run.

    Raises:
        ModelNotFoundError: the model has no tokenizer, or it cannot be reached.
    """
    return read_tokenizer(model_source(model), model, revision=revision, trust_remote_code=trust_remote_code)


def read_tokenizer(source: str | Path, name: str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of any model, converted or not.

    Args:
        source: a folder or a hub id.
        name: of the model, for people.
        **options: of transformers' ``from_pretrained``.

    Raises:
        ModelNotFoundError: the model has no tokenizer, or it cannot be reached.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # transformers and tokenizers raise a dozen kinds here
        raise _tokenizer_error(Path(source), name, error) from None
    # Documents are longer than the model's context on purpose: they are packed. Not worth a warning per document.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    return tokenizer


def _tokenizer_error(folder: Path, name: str, error: Exception) -> ModelNotFoundError:
    """The named error for what was raised when a tokenizer was loaded."""
    words, fix = first_line(error), None
    if "custom code" in str(error):
        words, fix = "it is code of its own", "read that code, and give --trust-remote-code if you trust it"
    elif folder.is_dir() and not any((folder / file).is_file() for file in TOKENIZERS):
        words, fix = "the folder holds no tokenizer", "copy its tokenizer's files beside it from where the model came from"
    elif (folder / "tokenizer.model").is_file() and importlib.util.find_spec("sentencepiece") is None:
        words, fix = "its tokenizer.model needs a package that is not installed here", "pip install sentencepiece"
    expected = "a tokenizer.json beside the model"
    return ModelNotFoundError(f"the tokenizer of {name!r} cannot be loaded: {words}", expected=expected, fix=fix)


def check_fits(model: PreTrainedModel, input_ids: Tensor) -> None:
    """Checks, before a model runs, that it can read some contexts.

    Args:
        model: any.
        input_ids: (B, T) int64.

    Raises:
        DataError: they are empty, or hold a token that the model does not have.
        RecipeError: they are longer than the model can read.
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
            fix=f"--context {most}, or a smaller one",
            keys=("context",),
        )
