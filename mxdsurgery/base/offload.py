"""A model whose weights stay on disk, in its safetensors files, and come into memory module by module when they are needed.

Accelerate does it: each module has a hook that reads its weights before it computes and forgets them afterwards. Here is what
surgery needs beside that: a part of the model that stays in memory for a while, and new layers that lie on disk like the rest.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import dispatch_model
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from accelerate.utils import has_offloaded_params
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

# Size of a checkpoint's shards where it is written from offloaded weights: one shard is in memory at a time.
SHARD_BYTES = 2**30


def is_offloaded(model: nn.Module) -> bool:
    """Whether any weights of a model lie on disk."""
    return any(has_offloaded_params(module) for module in model.modules())


def execution_device(model: nn.Module) -> torch.device:
    """Where a model computes, also where its weights lie on disk until they are needed."""
    hook = getattr(model, "_hf_hook", None)
    found = None if hook is None else getattr(hook, "execution_device", None)
    return next(model.parameters()).device if found is None else torch.device(found)


def compute_on(model: nn.Module, device: torch.device) -> None:
    """Lets a model whose weights lie on disk compute on a device."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        if hook is not None:
            hook.execution_device = str(device)
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                module.register_buffer(name, buffer.to(device), name not in module._non_persistent_buffers_set)


@contextmanager
def resident(module: nn.Module) -> Iterator[None]:
    """While open, all weights of a module are in memory; those that lie on disk are read to the device where it computes."""
    offloaded = [(part, part._hf_hook) for part in module.modules() if has_offloaded_params(part)]
    try:
        for part, hook in offloaded:
            hook.pre_forward(part)
            _unhooked(part, hook.execution_device)
        yield
    finally:
        for part, hook in offloaded:
            add_hook_to_module(part, hook)  # which forgets the weights


def on_disk(layer: nn.Module, path: Path, device: torch.device) -> nn.Module:
    """Moves a new layer's weights to a safetensors file: it computes as before, and each of its parts reads what it needs.

    Vectors stay in memory, on the device: they are small, and code outside the layer's own ``forward`` reads them.

    Args:
        layer: frozen.
        path: of the file.
        device: where it computes.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in layer.state_dict().items()}
    save_file(weights, path)
    index = {
        name: {"safetensors_file": str(path), "weight_name": name, "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in weights.items()
    }
    dispatch_model(layer, {"": "disk"}, main_device=str(device), offload_index=index, force_hooks=True)
    for part in layer.modules():
        if has_offloaded_params(part) and all(weight.dim() < 2 for weight in part.parameters(recurse=False)):
            part._hf_hook.pre_forward(part)
            _unhooked(part, device)
    return layer


def _unhooked(part: nn.Module, device: torch.device | str) -> None:
    """Takes the hook of a module whose weights were read just now, and leaves them on a device."""
    remove_hook_from_module(part)  # which puts the weights back where they were
    for name, weight in part.named_parameters(recurse=False):
        if weight.device != torch.device(device):
            part.register_parameter(name, nn.Parameter(weight.to(device), requires_grad=False))


def weights_of(layer: nn.Module) -> dict[str, Tensor]:
    """A layer's state dict, in memory, wherever the weights lie."""
    with resident(layer):
        return {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}


def move(layer: nn.Module, device: torch.device | str) -> None:
    """Moves a layer to a device; one whose weights lie on disk stays where it is."""
    if not is_offloaded(layer):
        layer.to(device)


def adopt_hooks(model: PreTrainedModel, like: PreTrainedModel) -> None:
    """Gives ``model`` the disk hooks of ``like``, of the same modules, so that transformers can save it by shards."""
    for name, module in like.named_modules():
        if hasattr(module, "_hf_hook"):
            model.get_submodule(name)._hf_hook = module._hf_hook
    model.hf_device_map = {"": "disk"}
