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
# Outputs of more than so many times the mean size are uncommon.
_MOST_SIZE = 8.0
_LEAST_SIZE = 1e-6


def how_few(d_model: int) -> int:
    """r: how many experts, the same for every token, a choice among N is compared with."""
    return max(1, min(_FEW, int(_FEW_OF_D * d_model)))


@torch.no_grad()
def token_weights(y: Tensor, shares: int = 1) -> Tensor:
    """How much the squared errors of tokens count: y (n, D) -> w (n, 1).

    It is ``1 / ‖y‖``, as in arXiv 2505.21364: the larger an output, the more does its relative error count. In real models a
    few tokens, the first of a context most of all, have outputs tens of times as large as the others': they would be most of
    the loss. So no relative error counts more than that of an output of `_MOST_SIZE` times the mean size.

    Args:
        y: the block's output.
        shares: processes that each have so many tokens of the batch.
    """
    size = y.norm(dim=-1, keepdim=True).clamp_min(_LEAST_SIZE)
    mean = sum_of_all(size.mean(), shares) / shares
    return (1.0 / size).minimum(_MOST_SIZE * mean / size.square())


def common_size(y: Tensor) -> Tensor:
    """The root mean square of y (n, D), where uncommon sizes count as the largest common one -> scalar."""
    size = y.norm(dim=-1)
    return (size.minimum(_MOST_SIZE * size.mean()).square().mean() / y.shape[-1]).sqrt()


def distillation_loss(y_hat: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    """``mean(w ‖ŷ - y‖²)`` over tokens -> scalar fp32.

    Args:
        y_hat: (n, D), what is learned.
        y: (n, D), what is to be learned.
        weights: w (n, 1); default: the `token_weights` of y.
    """
    weights = token_weights(y) if weights is None else weights
    return (weights[:, 0] * (y_hat.float() - y).square().sum(-1)).mean()


def zero_loss(y: Tensor, weights: Tensor) -> Tensor:
    """The `distillation_loss` of an output of zero, with weights (n, 1)."""
    return (weights[:, 0] * y.square().sum(-1)).mean()


def frozen_gain(scale: Tensor, target: Tensor, weights: Tensor, shares: int = 1) -> Tensor:
    """How much the experts would take off the loss if their sum were the best constant, the same for every token.

    With ``m`` = scale, ``t`` = target and the loss's weights ``w``, the best constant of dimension d is
    ``c_d = Σ w m_d t_d / Σ w m_d²`` over the batch, and it takes ``(Σ w m_d t_d)² / Σ w m_d²`` off the loss. Kept small, it
    leaves work to the choice of experts: `expert_share` measures the same on held-out text, in nats.

    Args:
        scale: (n, D), what the experts' sum is multiplied with.
        target: (n, D), what the product should be.
        weights: (n, 1), the loss's.
        shares: processes that each have so many tokens of the batch.

    Returns:
        A scalar in the loss's units, of the whole batch.
    """
    scale = scale.float()
    product = sum_of_all((weights * scale * target).sum(0), shares)
    power = sum_of_all((weights * scale.square()).sum(0), shares)
    return (product.square() / power.clamp_min(1e-9)).sum() / (len(weights) * shares)


@torch.no_grad()
def few_experts(scale: Tensor, target: Tensor, weights: Tensor, few: Tensor, shares: int = 1) -> tuple[Tensor, Tensor]:
    """What a few experts would say best, the same for every token, in the amounts that suit each token best.

    A loss with this in place of the experts' sum has the gradient, in all that the layer learns, of the least loss that the
    few can reach: they are at their best, so a change of theirs does not count.

    Args:
        scale: (n, D), m: what the experts' sum is multiplied with.
        target: (n, D), t: what the product should be.
        weights: (n, 1), the loss's.
        few: V, the experts' rows, as columns (D, r).
        shares: processes that each have so many tokens of the batch.

    Returns:
        Their sums (n, D); and other such experts (D, r), nearer to the best: with a token's amounts α and weight w,
        ``v_d = (Σ w m_d² α αᵀ)⁻¹ Σ w m_d t_d α``, one step of alternating least squares, made orthonormal.
    """
    scale = scale.float()
    square, r = scale.square(), few.shape[1]
    amounts = best_amounts(square, (scale * target) @ few, few)
    pairs = (amounts[:, :, None] * amounts[:, None, :]).flatten(1)
    normal = sum_of_all((weights * square).T @ pairs, shares).unflatten(1, (r, r))
    nearer = _solved(normal, sum_of_all((weights * scale * target).T @ amounts, shares))
    sizes = nearer.norm(dim=0)
    nearer = torch.where(sizes > 0, nearer / sizes, few)  # while the dense path is 0, as it starts, they say nothing yet
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
