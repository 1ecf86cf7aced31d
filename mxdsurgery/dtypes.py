"""A model that computes in another dtype than its weights are stored in, and the way back."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxdsurgery.offload import execution_device


def holds(dtype: torch.dtype, stored: torch.dtype) -> bool:
    """Whether a dtype holds every number of another one."""
    return torch.promote_types(stored, dtype) == dtype


def in_memory(stored: str, compute: str | None) -> str:
    """What weights that are stored in a dtype are held in, by name, where a model computes in another one."""
    wider = compute is not None and holds(getattr(torch, compute), getattr(torch, stored))
    return compute if wider else stored


def compute_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Lets a model compute in a dtype.

    Where that holds all that the weights do, they are cast to it, those on disk as they are read, and `as_stored` casts them
    back. Where it does not, they stay what they are, and the model runs under autocast.
    """
    if dtype == computed_in(model):
        return
    model._stored_in = model.dtype
    # Some families keep single weights in float32.
    model._stored_wider = {name: held.dtype for name, held in _floats(model) if held.dtype != model.dtype}
    if not holds(dtype, model.dtype):
        device, model._autocast_dtype = execution_device(model).type, dtype
        # Of a model whose weights lie on disk, they have a forward of their own already.
        model._without_autocast = {module: module.__dict__.get("forward") for module in _entrances(model)}
        for module in model._without_autocast:
            module.forward = torch.autocast(device, dtype)(module.forward)  # one each: they are entered within each other
        return
    for _, held in _floats(model):
        if held.dtype == model._stored_in:
            held.data = held.data.to(dtype)


def computed_in(model: PreTrainedModel) -> torch.dtype:
    """What a model computes in."""
    return model._autocast_dtype if getattr(model, "_without_autocast", None) else model.dtype


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts a module's weights, those on disk as they are read."""
    for _, held in _floats(module):
        held.data = held.data.to(dtype)


def stored_in(model: PreTrainedModel) -> torch.dtype:
    """What a model's weights are stored in, whatever it computes in."""
    return getattr(model, "_stored_in", model.dtype)


def as_stored(model: PreTrainedModel) -> None:
    """Brings a model's weights to what they are stored in, rounding those that were not read from there, and ends autocast."""
    for module, forward in getattr(model, "_without_autocast", {}).items():
        if forward is None:
            del module.forward
        else:
            module.forward = forward
    model._without_autocast = {}
    wider = getattr(model, "_stored_wider", None)
    if wider is None:  # it computes in what it is stored in
        return
    for name, held in _floats(model):
        held.data = held.data.to(wider.get(name, model._stored_in))


def _floats(model: nn.Module) -> list[tuple[str, Tensor]]:
    """What of a model has a floating dtype, by name: parameters and buffers."""
    return [(name, held) for name, held in (*model.named_parameters(), *model.named_buffers()) if held.is_floating_point()]


def _entrances(model: PreTrainedModel) -> Iterator[nn.Module]:
    """What is called from outside: the model, its base model and head, and decoder layers, which may be run alone."""
    listed = (layer for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module)
    yield from dict.fromkeys((model, model.base_model, model.get_output_embeddings(), *listed))
