"""Putting other modules where MLP blocks are, for a while or for good."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from mxdsurgery.base.blocks import Block


@contextmanager
def modules_replaced(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """While open, other modules stand at some paths from the base model; afterwards its own again, whatever happened."""
    removed: dict[str, nn.Module] = {}
    try:
        for path, module in modules.items():
            removed[path] = model.base_model.get_submodule(path)
            model.base_model.set_submodule(path, module)
        yield
    finally:
        for path, module in removed.items():
            model.base_model.set_submodule(path, module)


@contextmanager
def replaced(model: PreTrainedModel, blocks: Sequence[Block], modules: Mapping[int, nn.Module]) -> Iterator[None]:
    """While open, modules (by layer) stand where blocks are, and identities where their bypassed neighbours are.

    Args:
        model: the model.
        blocks: to replace; those without a module are left alone.
        modules: the new modules, by layer.
    """
    new: dict[str, nn.Module] = {}
    for block in blocks:
        if block.layer in modules:
            new |= {block.path: modules[block.layer]} | {path: nn.Identity() for path in block.bypass}
    with modules_replaced(model, new):
        yield


@contextmanager
def answering(module: nn.Module, forward: Callable) -> Iterator[None]:
    """While open, a module runs another ``forward``; afterwards it is as it was, also where Accelerate dispatched it."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def resumed_at(layers: nn.ModuleList, index: int, outputs: Sequence[object]) -> Iterator[None]:
    """While open, the decoder layers below ``index`` return what they returned before, without computing it.

    Args:
        layers: the model's decoder layers.
        index: the first layer that computes.
        outputs: what each layer returned for the same batch.
    """
    with ExitStack() as stack:
        for layer, output in zip(layers[:index], outputs, strict=False):
            stack.enter_context(answering(layer, lambda *_, _output=output, **__: _output))
        yield


class ConstantOutput(nn.Module):
    """An ablated block: the same output (D,) for every token but the first of each context, which keeps its own.

    Attributes:
        first: what the block gives at position 0 of the contexts (B, T) that are run, (B, 1, D); None: the same as elsewhere.
    """

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)
        self.first: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D), or their tokens one after the other -> the same, a copy: later modules may change it in place."""
        y = self.value.to(x.dtype).expand_as(x).clone()
        if self.first is not None:
            y.view(len(self.first), -1, x.shape[-1])[:, :1] = self.first
        return y


class FirstKept(nn.Module):
    """A variant of a layer that gives at position 0 what the layer itself gives.

    Args:
        variant: stands in the layer's place at all other positions.
        layer: itself.
        length: T.
    """

    def __init__(self, variant: nn.Module, layer: nn.Module, length: int) -> None:
        super().__init__()
        self.variant, self.layer, self.length = variant, layer, length

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D), or their tokens one after the other -> the same."""
        contexts = (-1, self.length, x.shape[-1])
        first = self.layer(x.reshape(contexts)[:, :1])
        return torch.cat([first, self.variant(x).reshape(contexts)[:, 1:]], dim=1).view_as(x)


class FrozenExperts(nn.Module):
    """A layer with a constant (D,), the same for every token, in place of its experts' sum: only its dense path is left.

    With the best constant this is what the layer could do without choosing experts.
    """

    def __init__(self, layer: nn.Module, constant: torch.Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("constant", constant)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        scale, rest = self.layer.dense_path(x)
        return (self.constant.to(x.dtype) * scale + rest).expand_as(x)
