"""What a layer learns to make small: the distillation loss, and what it could do if its experts chose nothing.

Shapes: n tokens, D model width, r a few experts.
"""

import torch
from torch import Tensor

from mxdsurgery.runs.parallel import sum_of_all

# A few experts: so many, or this share of D where that is fewer. More than a few directions say what a dense path cannot.
_FEW, _FEW_OF_D = 4, 1 / 16
# Makes the small systems of equations solvable, as a share of their mean diagonal.
_RIDGE = 1e-6


def how_few(d_model: int) -> int:
    """r: how many experts, the same for every token, a choice among N is compared with."""
    return max(1, min(_FEW, int(_FEW_OF_D * d_model)))


def distillation_loss(y_hat: Tensor, y: Tensor, size: Tensor | None = None) -> Tensor:
    """``mean(‖ŷ - y‖² / ‖y‖)`` over tokens: y_hat and y (n, D) -> scalar fp32. Source: arXiv 2505.21364.

    Args:
        y_hat: what is learned.
        y: what is to be learned.
        size: the error is divided by the norm of this; default: y.
    """
    error = (y_hat.float() - y).square().sum(-1)
    return (error / (y if size is None else size).norm(dim=-1).clamp_min(1e-6)).mean()


def frozen_gain(scale: Tensor, target: Tensor, y: Tensor, shares: int = 1) -> Tensor:
    """How much the experts would take off the loss if their sum were the best constant, the same for every token.

    With ``m`` = scale, ``t`` = target and the loss's weights ``w = 1 / ‖y‖``, the best constant of dimension d is
    ``c_d = Σ w m_d t_d / Σ w m_d²`` over the batch, and it takes ``(Σ w m_d t_d)² / Σ w m_d²`` off the loss. Kept small, it
    leaves work to the choice of experts: `expert_share` measures the same on held-out text, in nats.

    Args:
        scale: (n, D), what the experts' sum is multiplied with.
        target: (n, D), what the product should be.
        y: (n, D), the block's output.
        shares: processes that each have so many tokens of the batch.

    Returns:
        A scalar in the loss's units, of the whole batch.
    """
    scale, weight = scale.float(), _weights(y)
    product = sum_of_all((weight * scale * target).sum(0), shares)
    power = sum_of_all((weight * scale.square()).sum(0), shares)
    return (product.square() / power.clamp_min(1e-9)).sum() / (len(y) * shares)


@torch.no_grad()
def few_experts(scale: Tensor, target: Tensor, y: Tensor, few: Tensor, shares: int = 1) -> tuple[Tensor, Tensor]:
    """What a few experts would say best, the same for every token, in the amounts that suit each token best.

    A loss with this in place of the experts' sum has the gradient, in all that the layer learns, of the least loss that the
    few can reach: they are at their best, so a change of theirs does not count.

    Args:
        scale: (n, D), m: what the experts' sum is multiplied with.
        target: (n, D), t: what the product should be.
        y: (n, D), the block's output.
        few: V, the experts' rows, as columns (D, r).
        shares: processes that each have so many tokens of the batch.

    Returns:
        Their sums (n, D); and other such experts (D, r), nearer to the best: with a token's amounts α and the loss's weights
        ``w = 1 / ‖y‖``, ``v_d = (Σ w m_d² α αᵀ)⁻¹ Σ w m_d t_d α``, one step of alternating least squares, made orthonormal.
    """
    scale, weight = scale.float(), _weights(y)
    square, r = scale.square(), few.shape[1]
    amounts = best_amounts(square, (scale * target) @ few, few)
    pairs = (amounts[:, :, None] * amounts[:, None, :]).flatten(1)
    normal = sum_of_all((weight * square).T @ pairs, shares).unflatten(1, (r, r))
    nearer = _solved(normal, sum_of_all((weight * scale * target).T @ amounts, shares))
    nearer /= nearer.norm(dim=0).clamp_min(1e-30)
    root, _ = torch.linalg.cholesky_ex(nearer.T @ nearer + _RIDGE * torch.eye(r, device=few.device))
    nearer = torch.linalg.solve_triangular(root.T, nearer, upper=True, left=False)
    return amounts @ few.T, torch.where(nearer.isfinite().all(), nearer, few)


def best_amounts(square: Tensor, product: Tensor, few: Tensor) -> Tensor:
    """The amounts α (..., r) with the least ``‖m (V α) - t‖²``, token by token.

    Args:
        square: (..., D), ``m²``.
        product: (..., r), ``Vᵀ (m t)``.
        few: V, (D, r).
    """
    pairs = (few[:, :, None] * few[:, None, :]).flatten(1)
    return _solved((square @ pairs).unflatten(-1, (few.shape[1],) * 2), product)


def _solved(matrices: Tensor, right: Tensor) -> Tensor:
    """Solves small symmetric systems (..., r, r) for right sides (..., r), also where there is nothing to solve."""
    mean = matrices.diagonal(dim1=-2, dim2=-1).mean(-1)
    ridge = (_RIDGE * mean).clamp_min(torch.finfo(matrices.dtype).tiny)
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return torch.linalg.solve_ex(matrices + ridge[..., None, None] * eye, right)[0]


def _weights(y: Tensor) -> Tensor:
    """The loss's weights of tokens (n, 1): ``1 / ‖y‖``."""
    return 1.0 / y.norm(dim=-1, keepdim=True).clamp_min(1e-6)
