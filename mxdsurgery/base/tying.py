"""Whether a model's embeddings and language-model head are one tensor: its weights decide, and its config then says so."""

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.accelerate import load_offloaded_parameter


def as_tied(model: PreTrainedModel) -> None:
    """Makes a model's config say that its embeddings and its head are not tied, where its files held two of them.

    A fine-tune or a merge may have a head of its own under a config that says otherwise. transformers loads both; whatever
    else is made from this config, the exported model too, is then built as the model is.

    Args:
        model: as it was loaded; its weights may lie on disk.
    """
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        one, other = (model.get_parameter_or_buffer(name) for name in (target, source))
        if one is not other and not _equal(*(_read(model, name, tensor) for name, tensor in ((target, one), (source, other)))):
            for config in {id(c): c for c in (model.config, model.config.get_text_config(decoder=True))}.values():
                config.tie_word_embeddings = False
            return


def _read(model: PreTrainedModel, name: str, tensor: Tensor) -> Tensor:
    return load_offloaded_parameter(model, name) if tensor.is_meta else tensor


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)
