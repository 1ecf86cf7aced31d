"""The layers that a Mixture of Decoders is compared with. They travel with a checkpoint that holds them: torch only.

All of them are what a user would otherwise put in a block's place, with the same gate and the same sparse products:

    transcoder         y = Cᵀ a + b            a = TopK(relu(G x + b_g))     features of the block's input (arXiv 2406.11944)
    skip-transcoder    y = Cᵀ a + S x + b                                    and a dense map beside them (arXiv 2501.18823)
    topk-sae           y = Cᵀ a + b            a = TopK(relu(G y + b_g))     of the block's own output (arXiv 2406.04093)

Row n of C (N, D) is what feature n writes, row n of G (N, D) what it reads. "Experts" and "features" are the same thing
here: what the gate chooses among.

Shapes: x and y (..., D); S (D, D); N features, K of them active.
"""

import torch
from torch import Tensor, nn

from .layer import Coefficients, DenseLayer, Experts, Gate


class Transcoder(nn.Module):
    """``y = Cᵀ a + b``: a sparse dictionary from a block's input x (..., D) to its output (..., D).

    Args:
        d_model: D.
        n_experts: N, features.
        k: K, features active per token, at most N.
        sparsity: ``topk`` or ``batchtopk``; see `Gate`.
        expert_bias: see `Experts`.
    """

    def __init__(self, *, d_model: int, n_experts: int, k: int, sparsity: str = "topk", expert_bias: bool = False) -> None:
        super().__init__()
        self.gate = Gate(d_model, n_experts, k, sparsity)
        self.experts = Experts(d_model, n_experts, expert_bias)
        self.bias = nn.Parameter(torch.empty(d_model))  # b
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """C and b zero."""
        nn.init.zeros_(self.experts.weight)
        if self.experts.bias is not None:
            nn.init.zeros_(self.experts.bias)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``y = Cᵀ a + b``."""
        return self.combine(self.coefficients(x), x)

    def coefficients(self, x: Tensor) -> Coefficients:
        """The features' coefficients for the block's input x (..., D)."""
        return self.gate(x)

    def combine(self, a: Coefficients, x: Tensor) -> Tensor:
        """The output for given coefficients: a (..., K), x (..., D) -> (..., D)."""
        return self.experts(a) + self.dense_path(x)[1]

    def dense_path(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the features' sum is multiplied with, and what is added to that: one, and ``b``; each (D,)."""
        return torch.ones_like(self.bias), self.bias


class SkipMap(nn.Linear):
    """``S x``; zero at the start."""

    def reset_parameters(self) -> None:
        """S zero."""
        nn.init.zeros_(self.weight)


class SkipTranscoder(Transcoder):
    """``y = Cᵀ a + S x + b``: a transcoder with a dense linear map beside it; its arguments are `Transcoder`'s."""

    def __init__(self, *, d_model: int, **features) -> None:
        super().__init__(d_model=d_model, **features)
        self.skip = SkipMap(d_model, d_model, bias=False)

    def dense_path(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """One (D,), and ``S x + b`` (..., D)."""
        return torch.ones_like(self.bias), self.skip(x) + self.bias


class TopKSAE(Transcoder):
    """A sparse autoencoder of a block's output y, and the block itself, which computes y from x: x (..., D) -> (..., D).

    Its gate takes y; `forward` and `coefficients` take the block's input x.

    Args:
        d_model: D.
        n_experts: N, features.
        k: K, features active per token, at most N.
        sparsity: ``topk`` or ``batchtopk``; see `Gate`.
        expert_bias: see `Experts`.
        block: the remaining arguments of `DenseLayer`, for the block, whose weights are frozen.
    """

    def __init__(
        self, *, d_model: int, n_experts: int, k: int, sparsity: str = "topk", expert_bias: bool = False, **block
    ) -> None:
        super().__init__(d_model=d_model, n_experts=n_experts, k=k, sparsity=sparsity, expert_bias=expert_bias)
        self.block = DenseLayer(d_model=d_model, **block).requires_grad_(False)

    def coefficients(self, x: Tensor) -> Coefficients:
        """The features' coefficients for the block's input x (..., D)."""
        return self.gate(self.block(x))
