"""Where a model's config and its files do not say the same: the files decide, and the config then says so."""

import re
import warnings
from collections.abc import Collection

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.accelerate import load_offloaded_parameter

from mxdsurgery.errors import MxDWarning

# Settings that count layers beside the decoder's, for predicting several tokens ahead.
_AHEAD = re.compile(r"nextn|(^|_)mtp(_|$)")


def make_config_agree(name: str, model: PreTrainedModel, unused: Collection[str]) -> None:
    """Makes a model's config say what the model is: what is made from the config, as the exported model, is then the same.

    A fine-tune or a merge may hold a head of its own under a config that ties it to the embeddings: transformers loads both.
    Layers for predicting several tokens ahead are in many files, and transformers does not build them.

    Args:
        name: of the model, for people.
        model: as it was loaded; its weights may lie on disk.
        unused: the weights in its files that it has no place for.
    """
    configs = list({id(config): config for config in (model.config, model.config.get_text_config(decoder=True))}.values())
    if _has_two(model):
        for config in configs:
            config.tie_word_embeddings = False
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
