"""A model that computes in another dtype than its weights are stored in, and the way back."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxdsurgery.base.offload import execution_device


def holds(dtype: torch.dtype, stored: torch.dtype) -> bool:
    """Whether a dtype holds every number of another one."""
    return torch.promote_types(stored, dtype) == dtype


def in_memory(stored: str, compute: str | None) -> str:
    """The dtype, by name, of weights in memory that are stored in ``stored``, where a model computes in ``compute``."""
    wider = compute is not None and holds(getattr(torch, compute), getattr(torch, stored))
    return compute if wider else stored


@dataclass
class _Stored:
    """How a model's weights are stored, while it computes in another dtype.

    Attributes:
        dtype: of nearly all of them.
        wider: the dtypes of single weights that have another one, by name: some families keep some in float32.
        autocast: the dtype that it computes in, where that does not hold the weights, which then stay as they are.
        forwards: the modules that run under autocast, each with the ``forward`` that was set on it before, or None; one was
            set where the weights lie on disk.
    """

    dtype: torch.dtype
    wider: dict[str, torch.dtype]
    autocast: torch.dtype | None = None
    forwards: dict[nn.Module, Callable | None] = field(default_factory=dict)


def compute_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Lets a model compute in a dtype.

    Where that dtype holds every number of the stored one, the weights are cast to it, those on disk as they are read, and
    `as_stored` casts them back. Where it does not, the weights stay as they are, and the model runs under autocast.
    """
    if dtype == computed_in(model):
        return
    as_stored(model)
    if dtype == model.dtype:
        return
    wider = {name: held.dtype for name, held in _floats(model) if held.dtype != model.dtype}
    kept = model._stored = _Stored(model.dtype, wider)
    if holds(dtype, kept.dtype):
        for _, held in _floats(model):
            if held.dtype == kept.dtype:
                held.data = held.data.to(dtype)
        return
    device, kept.autocast = execution_device(model).type, dtype
    for module in _entrances(model):
        kept.forwards[module] = module.__dict__.get("forward")
        module.forward = torch.autocast(device, dtype)(module.forward)  # one for each: they are entered within each other


def computed_in(model: PreTrainedModel) -> torch.dtype:
    """The dtype that a model computes in."""
    kept = _kept(model)
    return model.dtype if kept is None or kept.autocast is None else kept.autocast


def stored_in(model: PreTrainedModel) -> torch.dtype:
    """The dtype that a model's weights are stored in, whatever it computes in."""
    kept = _kept(model)
    return model.dtype if kept is None else kept.dtype


def as_stored(model: PreTrainedModel) -> None:
    """Casts a model's weights to the dtype that they are stored in, which rounds new ones, and ends autocast."""
    kept = _kept(model)
    if kept is None:  # it computes in what it is stored in
        return
    for module, forward in kept.forwards.items():
        if forward is None:
            del module.forward
        else:
            module.forward = forward
    for name, held in _floats(model):
        held.data = held.data.to(kept.wider.get(name, kept.dtype))
    del model._stored


def _kept(model: PreTrainedModel) -> _Stored | None:
    return getattr(model, "_stored", None)


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts a module's weights, those on disk as they are read."""
    for _, held in _floats(module):
        held.data = held.data.to(dtype)


def rounded(layer: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A layer's state dict ``tensors`` as it is stored in a dtype: what the layer keeps in float32 stays."""
    exact = _in_float32(layer)
    return {name: tensor if name in exact else tensor.to(dtype) for name, tensor in tensors.items()}


def _floats(model: nn.Module) -> list[tuple[str, Tensor]]:
    """A model's parameters and buffers that have a floating dtype and may get another one, with their names."""
    exact = _in_float32(model)
    held = (*model.named_parameters(), *model.named_buffers())
    return [(name, tensor) for name, tensor in held if tensor.is_floating_point() and name not in exact]


def _in_float32(model: nn.Module) -> set[str]:
    """The names of what our layers keep in float32: see `Gate`."""
    parts = ((path, getattr(part, "IN_FLOAT32", ())) for path, part in model.named_modules())
    return {f"{path}.{name}".lstrip(".") for path, names in parts for name in names}


def _entrances(model: PreTrainedModel) -> Iterator[nn.Module]:
    """What is called from outside: the model, its base model and head, and decoder layers, which may be run alone."""
    listed = (layer for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module)
    yield from dict.fromkeys((model, model.base_model, model.get_output_embeddings(), *listed))
