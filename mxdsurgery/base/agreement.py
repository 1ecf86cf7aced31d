"""Where a model's config and its files do not say the same: the files decide, and the config then says so."""

import os
import re
import warnings
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.accelerate import load_offloaded_parameter

from mxdsurgery.errors import MxDWarning
from mxdsurgery.outside import weight_files

# Settings that count layers beside the decoder's, for predicting several tokens ahead.
_AHEAD = re.compile(r"nextn|(^|_)mtp(_|$)")
# Rows of two weights that are compared before the weights are read.
_ROWS = 64


def make_config_agree(name: str, model: PreTrainedModel, unused: Collection[str]) -> None:
    """Makes a model's config say what the model is: what is made from the config, as the exported model, is then the same.

    A fine-tune or a merge may hold a head of its own under a config that ties it to the embeddings: transformers loads both.
    Layers for predicting several tokens ahead are in many files, and transformers does not build them.

    Args:
        name: of the model, for people.
        model: as it was loaded; its weights may lie on disk.
        unused: the weights in its files that it has no place for.
    """
    configs = _configs(model.config)
    if _has_two(model):
        untie(model.config)
    ahead = [] if any(_AHEAD.search(path) for path, _ in model.named_modules()) else _counted_ahead(configs)
    for config, setting in ahead:
        setattr(config, setting, 0)
    if unused:
        listed = ", ".join(sorted(unused)[:3]) + (" ..." if len(unused) > 3 else "")
        settings = "".join(f"; {setting} is 0 in the converted model's config" for _, setting in ahead)
        warnings.warn(
            f"{len(unused)} weights of {name!r} are left out, as transformers' {type(model).__name__} has no place for them: "
            f"{listed}{settings}",
            MxDWarning,
            stacklevel=2,
        )


def untie(config: PreTrainedConfig) -> None:
    """Makes a config say that the head is not the embeddings."""
    for one in _configs(config):
        one.tie_word_embeddings = False


def holds_own_head(skeleton: PreTrainedModel, source: str) -> bool:
    """Whether a model's files hold two different weights where its config ties one to the other, by some of their rows.

    Args:
        skeleton: what its config makes.
        source: a folder. Of a hub id, nothing is known before it is fetched: False.
    """
    tied = skeleton.get_expanded_tied_weights_keys(all_submodels=True)
    if not tied or not os.path.isdir(source):
        return False
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(path, "pt")) for path in weight_files(Path(source))]
            held = {name: file for file in files for name in file.keys() if name in {*tied, *tied.values()}}
            pairs = [pair for pair in tied.items() if held.keys() >= {*pair}]
            return any(not _equal(*(_some_rows(held[name], name) for name in pair)) for pair in pairs)
    except (ValueError, OSError, SafetensorError):  # said where the weights are read
        return False


def _some_rows(file: safe_open, name: str) -> Tensor:
    weight = file.get_slice(name)
    count = weight.get_shape()[0]
    return torch.cat([weight[row : row + 1] for row in range(0, count, max(1, count // _ROWS))])


def _configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """A config, and that of its text model where that is another."""
    return list({id(one): one for one in (config, config.get_text_config(decoder=True))}.values())


def _counted_ahead(configs: list[PreTrainedConfig]) -> list[tuple[PreTrainedConfig, str]]:
    """Settings of configs that say that there are layers for predicting several tokens ahead."""
    return [
        (config, setting)
        for config in configs
        for setting, value in vars(config).items()
        if _AHEAD.search(setting) and type(value) is int and value > 0
    ]


def _has_two(model: PreTrainedModel) -> bool:
    """Whether weights that the config ties to each other are two, as where the files held both."""
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        one, other = (model.get_parameter_or_buffer(name) for name in (target, source))
        if one is not other and not _equal(_read(model, target, one), _read(model, source, other)):
            return True
    return False


def _read(model: PreTrainedModel, name: str, tensor: Tensor) -> Tensor:
    return load_offloaded_parameter(model, name) if tensor.is_meta else tensor


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)
