"""A model's decoder layers, and its sizes.

They are as its config has them or, where code that came with the model names them otherwise, as its modules have them.
"""

import torch
from transformers import PreTrainedModel

from mxdsurgery.base.families import family_of
from mxdsurgery.errors import NotCausalLMError, UnknownFamilyError


def decoder_layers(model: PreTrainedModel) -> tuple[str, torch.nn.ModuleList]:
    """The path, from the base model, and the list of decoder layers: the outermost list of the config's length in its decoder.

    Raises:
        UnknownFamilyError: there is none.
        NotCausalLMError: the layers are an encoder's.
    """
    named = family_of(model.config.model_type).layers
    if named is not None:
        if named not in dict(model.base_model.named_modules()):
            raise UnknownFamilyError(
                f"{type(model).__name__} holds no module {named!r}, where its family is registered to have its decoder layers",
                fix="register the path from the base model",
            )
        return named, model.base_model.get_submodule(named)
    wanted = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    decoder = model.get_decoder()  # without a vision tower beside it, which may have as many layers
    inside = next((name for name, module in model.base_model.named_modules() if module is decoder), "")
    lists = [
        (f"{inside}.{name}".lstrip("."), module)
        for name, module in model.base_model.get_submodule(inside).named_modules()
        if isinstance(module, torch.nn.ModuleList) and (len(module) > 0 if wanted is None else len(module) == wanted)
    ]
    if not lists:
        raise UnknownFamilyError(
            f"{type(model).__name__} holds no list of {'' if wanted is None else f'{wanted} '}decoder layers",
            expected="decoder layers in one torch.nn.ModuleList",
        )
    path, layers = min(lists, key=lambda item: (item[0].count("."), -_parameters(item[1]) if wanted is None else 0))
    # A config's is_decoder counts only where the layers read it: GPT-NeoX's says false.
    if any(getattr(module, "is_decoder", True) is False for layer in layers[:1] for module in layer.modules()):
        raise NotCausalLMError(
            f"{type(model).__name__} is an encoder here: its config says is_decoder: false",
            expected="a decoder-only causal language model",
        )
    return path, layers


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def layer_count(model: PreTrainedModel) -> int:
    """How many decoder layers a model has; raises as `decoder_layers`."""
    return len(decoder_layers(model)[1])


def width(model: PreTrainedModel) -> int:
    """D, the size of a model's hidden states."""
    named = getattr(model.config.get_text_config(decoder=True), "hidden_size", None)
    return model.get_input_embeddings().weight.shape[1] if named is None else named


def vocabulary_size(model: PreTrainedModel) -> int:
    """V, how many tokens a model has."""
    named = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    return model.get_input_embeddings().weight.shape[0] if named is None else named
