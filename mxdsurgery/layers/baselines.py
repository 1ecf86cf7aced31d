"""The layers that a Mixture of Decoders is compared with. They travel with a checkpoint that holds them: torch only.

All of them are what a user would otherwise put in a block's place, with the same gate and the same sparse products:

    transcoder         y = Cᵀ a + b            a = TopK(relu(G x + b_g))     features of the block's input (arXiv 2406.11944)
    skip-transcoder    y = Cᵀ a + S x + b                                    and a dense map beside them (arXiv 2501.18823)
    topk-sae           y = Cᵀ a + b            a = TopK(relu(G y + b_g))     of the block's own output (arXiv 2406.04093)
    molt               y = Σ a_n U_n V_n x + b a = TopK(relu(G x + b_g))     a sparse mixture of linear transforms of several
                                                                             ranks (Transformer Circuits, 2025)

Row n of C (N, D) is what feature n writes, row n of G (N, D) what it reads. "Experts", "features" and "transforms" are the
same thing here: what the gate chooses among.

Shapes: x and y (..., D); S (D, D); U_n (D, r), V_n (r, D) for rank r; N features, K of them active.
"""

import torch
from torch import Tensor, nn

from .layer import Coefficients, DenseLayer, Experts, Gate
from .low_rank import transform, transform_ranks


class Transcoder(nn.Module):
    """``y = Cᵀ a + b``: a sparse dictionary from a block's input x (..., D) to its output (..., D).

    Args:
        d_model: D.
        n_experts: N, features.
        k: K, features active per token, at most N.
        sparsity: ``topk``, ``batchtopk`` or ``jumprelu``; see `Gate`.
        expert_bias: see `Experts`.
    """

    def __init__(self, *, d_model: int, n_experts: int, k: int, sparsity: str = "topk", expert_bias: bool = False) -> None:
        super().__init__()
        self.gate = Gate(d_model, n_experts, k, sparsity)
        self.experts = self._new_experts(d_model, n_experts, expert_bias)
        self.bias = nn.Parameter(torch.empty(d_model))  # b
        self.reset_parameters()

    @staticmethod
    def _new_experts(d_model: int, n_experts: int, expert_bias: bool) -> nn.Module:
        return Experts(d_model, n_experts, expert_bias)

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
        return self.mixture(a, x) + self.dense_path(x)[1]

    def mixture(self, a: Coefficients, x: Tensor) -> Tensor:
        """The features' sum ``Cᵀ a`` (..., D), for the block's input x (..., D)."""
        return self.experts(a)

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
        sparsity: ``topk``, ``batchtopk`` or ``jumprelu``; see `Gate`.
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


class Transforms(nn.Module):
    """Linear maps ``U_n V_n`` of x (D,), of the ranks that `transform_ranks` says: N of them, the widest first.

    ``weight`` (R, D) holds the columns of all U, what is written, and ``reads`` (R, D) the rows of all V, one transform after
    the other; R is the sum of the ranks.
    """

    def __init__(self, d_model: int, n_experts: int) -> None:
        super().__init__()
        self.ranks = transform_ranks(d_model, n_experts)
        total = sum(rank * count for rank, count in self.ranks)
        self.weight = nn.Parameter(torch.empty(total, d_model))  # Uᵀ
        self.reads = nn.Parameter(torch.empty(total, d_model))  # V
        self.bias = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """V as a default linear layer, columns of U random and of unit length."""
        bound = self.reads.shape[1] ** -0.5
        nn.init.uniform_(self.reads, -bound, bound)
        nn.init.uniform_(self.weight, -1.0, 1.0)
        self.normalize()

    normalize = Experts.normalize

    def forward(self, a: Coefficients, x: Tensor) -> Tensor:
        """``Σ a_n U_n V_n x``: coefficients (..., K), x (..., D) -> (..., D)."""
        active = a.values.shape[-1]
        flat = a.values.reshape(-1, active), a.indices.reshape(-1, active), x.reshape(-1, x.shape[-1])
        return transform(*flat, self.reads, self.weight, self.ranks).view(x.shape)

    def rows(self, n: int) -> slice:
        """Which rows of ``weight`` and ``reads`` are transform n's: as many as its rank."""
        start = 0
        for rank, count in self.ranks:
            if n < count:
                return slice(start + n * rank, start + (n + 1) * rank)
            n, start = n - count, start + rank * count
        raise IndexError(n)

    def term(self, n: Tensor, said: Tensor) -> Tensor:
        """``U_n V_n said``, transform n (E,) on its own said (E, ..., D) = ``a_n x``: (E, ..., D)."""
        maps = ((self.weight[rows], self.reads[rows]) for rows in map(self.rows, n.tolist()))
        return torch.stack([some.to(write.dtype) @ read.T @ write for some, (write, read) in zip(said, maps, strict=True)])


class Molt(Transcoder):
    """``y = Σ a_n U_n V_n x + b``: a sparse mixture of linear transforms (MOLT) of a block's input x (..., D).

    Where a transcoder's feature writes one direction, a transform maps x by a matrix of low rank, with the gate's coefficient
    as its weight. Source: Lindsey, Chen, Pearce, Hydrie, Conerly, "Sparse mixtures of linear transforms", Transformer
    Circuits, 2025, who train it with a penalty on the coefficients; here the gate is that of the other kinds. Arguments as
    `Transcoder`'s, without ``expert_bias``: a transform steered for good is a dense map of x, no constant.
    """

    def __init__(self, *, d_model: int, n_experts: int, k: int, sparsity: str = "topk") -> None:
        super().__init__(d_model=d_model, n_experts=n_experts, k=k, sparsity=sparsity)

    @staticmethod
    def _new_experts(d_model: int, n_experts: int, expert_bias: bool) -> nn.Module:
        return Transforms(d_model, n_experts)

    def mixture(self, a: Coefficients, x: Tensor) -> Tensor:
        """``Σ a_n U_n V_n x`` (..., D)."""
        return self.experts(a, x)
