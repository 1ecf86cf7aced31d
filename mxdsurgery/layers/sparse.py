"""Sparse products with the rows of a matrix: all that an MxD layer does with its experts, without a (tokens, N) gradient.

Three functions are closed under differentiation: `mix` adds up weighted rows, `dots` takes inner products with rows, `scatter`
adds weighted vectors to rows. The gradients of `mix` are `dots` and `scatter`; those of a gate's kept coefficients are `mix`
and `scatter`. `select` says which rows: it ranks all N in low precision, and the candidates near the top exactly.

This file travels with every exported checkpoint: it imports torch only. Faster kernels for a device enter `KERNELS`
(mxdsurgery.training.kernels does); without them everything runs in plain torch, on any device that torch knows.

Shapes: n tokens, D model width, N rows (experts), K chosen rows per token; weight (N, D), indices (n, K) int64 in [0, N).
"""

import functools
import warnings
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

# By device type, a module with `mix`, `dots` and `scatter` of its own.
KERNELS: dict[str, ModuleType] = {}

# Pre-activations (tokens, N) are computed for as many tokens at a time as take so many bytes, by device type: on a CPU, as
# much as stays near its cores; elsewhere, enough to keep the device busy.
CHUNK_BYTES = {"cpu": 2**24}
_CHUNK_BYTES_ELSEWHERE = 2**28
# In low precision, so many more candidates than K are ranked again exactly. docs/performance.md has the measurement.
EXTRA_CANDIDATES = 8
# Elements per group where the top is found by group maxima.
TOP_K_GROUP = 4
# Elements of rows gathered at once where there is no better way: 64 MiB in fp32.
_GATHERED_ELEMENTS = 2**24


def sparse_gate(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, selection: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """``TopK(relu(G x + b_g))``, its K kept coefficients, with a backward that touches only the chosen rows of G.

    Args:
        x: (n, D).
        weight: G (N, D).
        bias: b_g (N,).
        k: K, at most N.
        selection: see `select`.

    Returns:
        values (n, K), non-negative, in float32 or wider; indices (n, K), each at most once per token, in no order.
    """
    return _SparseGate.apply(x, weight, bias, k, selection)


def mix(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """``Σ_k values_k weight[indices_k]``: (n, K), (n, K), (N, D) -> (n, D) in weight's dtype. Differentiable."""
    return _Mix.apply(values, indices, weight)


def dots(x: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """``weight[indices_k] · x``: (n, D), (n, K), (N, D) -> (n, K), summed in float32 or wider. No gradient."""
    kernels = _kernels(weight)
    if kernels is not None:
        return kernels.dots(x, indices, weight)
    if weight.device.type == "cpu" and indices.numel() > len(weight):
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))  # less work than widening every row that is taken
    if weight.dtype in (torch.float32, torch.float64) and _sums_rows(weight.device.type, weight.dtype):
        # The derivative of `mix` by its values; on a CPU eight times as fast as gathering the rows.
        with torch.enable_grad():
            values = torch.zeros(indices.shape, dtype=weight.dtype, device=weight.device, requires_grad=True)
            mixed = F.embedding_bag(indices, weight.detach(), per_sample_weights=values, mode="sum")
            return torch.autograd.grad(mixed, values, x.to(weight.dtype))[0]
    pairs = zip(*_parts(weight, indices, x, indices), strict=True)
    return torch.cat([torch.einsum("nd,nkd->nk", some.float(), weight[chosen].float()) for some, chosen in pairs])


def scatter(values: Tensor, indices: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Row i: ``Σ values x`` over the tokens that chose i: (n, K), (n, K), (n, D) -> (N, D), like weight. No gradient."""
    kernels = _kernels(weight)
    if kernels is not None:
        return kernels.scatter(values, indices, x, weight)
    values, x = values.to(weight.dtype), x.to(weight.dtype)
    if weight.device.type == "cpu" and torch.backends.mkl.is_available() and weight.dtype in (torch.float32, torch.float64):
        out = torch.empty_like(weight)  # given, for otherwise torch makes and fills two
        return torch.addmm(out, _transposed_coefficients(values, indices, len(weight)), x, beta=0, out=out)
    if not _sums_rows(weight.device.type, weight.dtype):
        out = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for value, chosen, some in zip(*_parts(weight, indices, values, indices, x), strict=True):
            out.index_add_(0, chosen.flatten(), (value[:, :, None] * some[:, None]).flatten(0, 1).to(out.dtype))
        return out.to(weight.dtype)
    with torch.enable_grad():  # the derivative of `mix` by its rows
        rows = weight.detach().requires_grad_()
        mixed = F.embedding_bag(indices, rows, per_sample_weights=values, mode="sum")
        return torch.autograd.grad(mixed, rows, x)[0]


def _parts(weight: Tensor, indices: Tensor, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Tensors of n tokens each in parts, for which the chosen rows are gathered at once."""
    parts = max(1, indices.numel() * weight.shape[1] // _GATHERED_ELEMENTS)
    return [tensor.chunk(parts) for tensor in tensors]


def _transposed_coefficients(values: Tensor, indices: Tensor, n_rows: int) -> Tensor:
    """``Aᵀ`` (N, n) in CSR form for the coefficients A (n, N): values and indices (n, K)."""
    tokens, k = indices.shape
    rows, order = indices.flatten().sort(stable=True)
    starts = torch.searchsorted(rows, torch.arange(n_rows + 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, order // k, values.flatten()[order], (n_rows, tokens), check_invariants=False)


@torch.no_grad()
def select(x: Tensor, weight: Tensor, bias: Tensor, k: int, selection: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The k rows with the largest ``weight x + bias`` for each token.

    In a ``selection`` dtype coarser than float32, pre-activations are computed and ranked in it, the best K +
    ``EXTRA_CANDIDATES`` are computed again in float32, and the best K of those are kept: the matrix product, nearly all of the
    cost, runs in low precision, and the choice is float32's.

    Args:
        x: (n, D).
        weight: (N, D).
        bias: (N,).
        k: at most N.
        selection: dtype of the ranking; None: weight's own.

    Returns:
        Pre-activations (n, k) in float32 or wider, and their indices (n, k), in no order.
    """
    selection = selection or weight.dtype
    coarse = torch.finfo(selection).bits < 32
    candidates = min(k + EXTRA_CANDIDATES, len(weight)) if coarse else k
    with without_autocast(x.device.type):
        # A low-precision copy of a float32 matrix lives as long as this call.
        ranking, offset = weight.to(selection), bias.to(selection)
        rows = max(1, chunk_bytes(x.device.type) // (len(weight) * ranking.element_size()))
        chosen = [top_k(F.linear(chunk.to(selection), ranking, offset), candidates) for chunk in x.split(rows)]
    indices = torch.cat([indices for _, indices in chosen])
    if not coarse:
        return torch.cat([values for values, _ in chosen]), indices
    exact = dots(x, indices, weight) + bias[indices].to(torch.promote_types(bias.dtype, torch.float32))
    if candidates > k:
        exact, best = torch.topk(exact, k, dim=-1, sorted=False)
        indices = indices.gather(1, best)
    return exact, indices


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``torch.topk(x, k, sorted=False)`` over the last dimension, by way of group maxima where that is faster.

    The k largest elements lie in the k groups with the largest maxima, which are found the same way: so torch.topk only ever
    compares few. Exact, up to which of several equal elements is taken.

    Args:
        x: (tokens, N).
        k: how many to keep, at most N.

    Returns:
        Values and int64 indices, each (tokens, k), unsorted.
    """
    tokens, n = x.shape
    group = TOP_K_GROUP
    stride = n // group
    if tokens < 16 or stride < 2 * k:  # too few to gain anything
        return torch.topk(x, k, dim=-1, sorted=False)
    # Group j holds the columns j, j + stride, j + 2 stride, ...: the maximum then runs over contiguous rows.
    _, groups = top_k(x[:, : stride * group].unflatten(1, (group, stride)).amax(1), k)
    offsets = torch.arange(group, device=x.device) * stride
    columns = (groups[:, :, None] + offsets).flatten(1)
    if stride * group < n:  # the last columns, which fill no group, all compete
        rest = torch.arange(stride * group, n, device=x.device)
        columns = torch.cat([columns, rest.expand(tokens, -1)], dim=1)
    values, chosen = torch.topk(x.gather(1, columns), k, dim=-1, sorted=False)
    return values, columns.gather(1, chosen)


def chunk_bytes(device: str) -> int:
    """How many bytes of pre-activations are formed at a time, on a type of device."""
    return CHUNK_BYTES.get(device, _CHUNK_BYTES_ELSEWHERE)


def without_autocast(device: str) -> AbstractContextManager:
    """While open, nothing is computed in a lower precision than it comes in, on a type of device; some have no autocast."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _sums_rows(device: str, dtype: torch.dtype) -> bool:
    """Whether torch's own `F.embedding_bag` does what `mix` is there for on a type of device, gradients included."""
    return device in ("cpu", "cuda") or _tried_to_sum_rows(device, dtype)


@functools.cache
def _tried_to_sum_rows(device: str, dtype: torch.dtype) -> bool:
    indices, values = torch.tensor([[0, 2], [2, 1]], device=device), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    values, rows = (part.to(device, dtype).requires_grad_() for part in (values, rows))
    try:
        with torch.enable_grad(), without_autocast(device):
            mixed = F.embedding_bag(indices, rows, per_sample_weights=values, mode="sum")
            by_value, by_row = torch.autograd.grad(mixed.sum(), (values, rows))
        found = [part.tolist() for part in (mixed, by_value, by_row)]
    except RuntimeError:  # it has no kernel for one of the three
        return False
    return found == [[[11, 14], [27, 34]], [[3, 11], [11, 7]], [[1, 1], [4, 4], [5, 5]]]


def _kernels(weight: Tensor) -> ModuleType | None:
    return KERNELS.get(weight.device.type)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, weight)
        kernels = _kernels(weight)
        if kernels is not None:
            return kernels.mix(values, indices, weight)
        values = values.to(weight.dtype)
        if _sums_rows(weight.device.type, weight.dtype):
            return F.embedding_bag(indices, weight, per_sample_weights=values, mode="sum")
        pairs = zip(*_parts(weight, indices, values, indices), strict=True)
        return torch.cat([torch.einsum("nk,nkd->nd", some, weight[chosen]) for some, chosen in pairs])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        values, indices, weight = ctx.saved_tensors
        grad_values = dots(grad, indices, weight).to(values.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = scatter(values, indices, grad, weight) if ctx.needs_input_grad[2] else None
        return grad_values, None, grad_weight


class _SparseGate(torch.autograd.Function):
    """The derivative of a kept coefficient is that of one row's inner product with x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, k: int, selection: torch.dtype | None):
        values, indices = select(x, weight, bias, k, selection)
        values = values.relu_()
        ctx.save_for_backward(x, weight, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_values: Tensor, _):
        x, weight, values, indices = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad = grad_values.to(weight.dtype) * (values > 0)
        grad_x = mix(grad, indices, weight.detach()).to(x.dtype) if needs_x else None
        grad_weight = scatter(grad, indices, x, weight) if needs_weight else None
        grad_bias = torch.zeros_like(weight[:, 0]).index_add_(0, indices.flatten(), grad.flatten()) if needs_bias else None
        return grad_x, grad_weight, grad_bias, None, None
