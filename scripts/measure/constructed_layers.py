"""Layers that are built, not trained, each to win `expert_share` in one way or not at all: what its controls are tried on.

Each takes the place of a GLU block, whose hidden units and decoder it is built from. One expert is active for each token.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxdsurgery.base.blocks import Block
from mxdsurgery.layers.layer import MxDLayer

# Where coefficients are not to differ they are all near this: the pre-activations are small beside it.
_LARGE = 1000.0


class BuiltLayer(MxDLayer):
    """A Mixture of Decoders with any function as its hidden units.

    Args:
        hidden: (..., D) -> (..., H).
        gate: G (N, D) and b_g (N,).
        experts: C (N, D).
        decoder: D (D, H).
    """

    def __init__(
        self, hidden: Callable[[Tensor], Tensor], gate: tuple[Tensor, Tensor], experts: Tensor, decoder: Tensor
    ) -> None:
        n_experts, d_model = experts.shape
        shape = {"kind": "mlp", "activation": "relu", "encoder_bias": False, "d_hidden": decoder.shape[1]}
        super().__init__(d_model=d_model, n_experts=n_experts, k=1, **shape)
        self.built_hidden = hidden
        with torch.no_grad():
            self.gate.weight.copy_(gate[0])
            self.gate.bias.copy_(gate[1])
            self.experts.weight.copy_(experts)
            self.decoder.weight.copy_(decoder)
        self.eval().requires_grad_(False)

    def hidden(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., H)."""
        return self.built_hidden(x)


def _own_units(model: PreTrainedModel, block: Block) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The block's own hidden units, and its decoder."""
    mlp = model.base_model.get_submodule(block.path)
    return (lambda x: mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)), mlp.down_proj.weight


def sign_bit(model: PreTrainedModel, block: Block, x: Tensor) -> BuiltLayer:
    """``y = s (D z)``, ``s`` = 1 on one side of a random hyperplane, else -1; ``D z`` is ``s`` times the block's output."""
    units, decoder = _own_units(model, block)
    normal = nn.functional.normalize(torch.randn(x.shape[1], generator=torch.Generator().manual_seed(0)), dim=0)
    middle = (x @ normal).median()

    def one_side_or_the_other(x: Tensor) -> Tensor:
        side = (x @ normal > middle)[..., None]
        return torch.cat([units(x) * side, units(x) * ~side], dim=-1)

    gate = torch.stack([normal, -normal]), _LARGE + torch.stack([-middle, middle])
    signs = torch.tensor([[1.0], [-1.0]]).expand(2, len(normal))
    return BuiltLayer(one_side_or_the_other, gate, signs / _LARGE, torch.cat([decoder, -decoder], dim=1))


def size_only(model: PreTrainedModel, block: Block, x: Tensor) -> BuiltLayer:
    """``y = a (D z)`` with experts that are all the same: the gate is one number, and the hidden units are divided by it."""
    units, decoder = _own_units(model, block)
    normal = torch.randn(x.shape[1], generator=torch.Generator().manual_seed(0))
    normal /= (x @ normal).std()

    def divided(x: Tensor) -> Tensor:
        return units(x) / ((x @ normal).abs() + 0.2)[..., None]

    return BuiltLayer(divided, (torch.stack([normal, -normal]), torch.full((2,), 0.2)), torch.ones(2, x.shape[1]), decoder)


def decoration(model: PreTrainedModel, block: Block, x: Tensor) -> BuiltLayer:
    """The whole block as the dense path, and experts that hardly differ."""
    units, decoder = _own_units(model, block)
    generator = torch.Generator().manual_seed(0)
    gate = torch.randn(64, x.shape[1], generator=generator), torch.full((64,), _LARGE)
    return BuiltLayer(units, gate, (1 + 0.02 * torch.randn(64, x.shape[1], generator=generator)) / _LARGE, decoder)


def specialised(model: PreTrainedModel, block: Block, x: Tensor) -> BuiltLayer:
    """Each expert writes the block's mean output on the inputs nearest to a centre of its own; the dense path is constant."""
    y = model.base_model.get_submodule(block.path)(x)
    centres = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:256]]
    for _ in range(5):
        nearest = nn.functional.one_hot(torch.cdist(x, centres).argmin(1), len(centres)).to(x.dtype)
        means = nearest.T @ torch.cat([x, y], dim=1) / nearest.sum(0).clamp_min(1.0)[:, None]
        centres, outputs = means.chunk(2, dim=1)
    large = _LARGE * centres.square().sum(1).max()
    gate = centres, large - centres.square().sum(1) / 2
    return BuiltLayer(lambda x: torch.ones_like(x[..., :1]), gate, outputs / large, torch.ones(x.shape[1], 1))


BUILDERS = {"sign bit": sign_bit, "size only": size_only, "decoration": decoration, "specialised": specialised}
