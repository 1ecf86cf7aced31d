"""Sparse products with the rows of a matrix: all that an MxD layer does with its experts, without a (tokens, N) gradient.

Three functions are closed under differentiation: `mix` adds up weighted rows, `dots` takes inner products with rows, `scatter`
adds weighted vectors to rows. The gradients of each are the other two, so that there are derivatives of any order; those of a
gate's kept coefficients are `mix` and `scatter`. `select` says which rows: it ranks all N in low precision, and the candidates
near the top exactly. Inside torch.func's transforms (vmap, jvp, jacrev, ...) and forward-mode differentiation, all of it is
computed with gathered rows instead, (n, K, D), by operations that torch can transform.

This file travels with every exported checkpoint: it imports torch only. Faster kernels for a device enter `KERNELS`
(mxdsurgery.training.trial does); without them everything runs in plain torch, on any device that torch knows.

Shapes: n tokens, D model width, N rows (experts), K chosen rows per token; weight (N, D), indices (n, K) int64 in [0, N).
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

# By device type, what is done by functions of its own there: any of "mix", "dots", "scatter" and "select".
KERNELS: dict[str, Mapping[str, Callable]] = {}

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
# The two derivatives of `F.embedding_bag`, which are `dots` and `scatter`: operations of `torch.ops.aten`. Called by name they
# work in inference mode too, where autograd does not.
_BAG_DOTS = "_embedding_bag_per_sample_weights_backward"
_BAG_SCATTER = "_embedding_bag_dense_backward"
_SUM = 0  # their number for mode="sum"


def sparse_gate(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, selection: torch.dtype | None = None, relu: bool = True
) -> tuple[Tensor, Tensor]:
    """``TopK(relu(G x + b_g))``, its K kept coefficients, with a backward that touches only the chosen rows of G.

    Args:
        x: (n, D).
        weight: G (N, D).
        bias: b_g (N,).
        k: K, at most N.
        selection: see `select`.
        relu: False: ``TopK(G x + b_g)``.

    Returns:
        values (n, K), with ``relu`` non-negative, in float32 or wider; indices (n, K), each at most once per token, in no
        order.
    """
    if not is_transformed():
        return _SparseGate.apply(x, weight, bias, k, selection, relu)
    indices = select(x, weight, bias, k, selection)[1]
    kept = dots(x, indices, weight) + bias[indices]
    return kept.relu() if relu else kept, indices


def mix(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """``Σ_k values_k weight[indices_k]``: (n, K), (n, K), (N, D) -> (n, D) in weight's dtype."""
    return (_mix_gathered if is_transformed(values, weight) else _Mix.apply)(values, indices, weight)


def dots(x: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """``weight[indices_k] · x``: (n, D), (n, K), (N, D) -> (n, K), summed in float32 or wider."""
    return (_dots_gathered if is_transformed(x, weight) else _Dots.apply)(x, indices, weight)


def scatter(values: Tensor, indices: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Row i: ``Σ values x`` over the tokens that chose i: (n, K), (n, K), (n, D) -> (N, D), like weight."""
    return (_scatter_gathered if is_transformed(values, x) else _Scatter.apply)(values, indices, x, weight)


def _mix(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    kernel = _kernel("mix", weight)
    if kernel is not None:
        return kernel(values, indices, weight)
    if not _sums_rows(weight.device.type, weight.dtype):
        return _mix_gathered(values, indices, weight)
    return _mix_bags(values.to(weight.dtype), indices, weight)


def _dots(x: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    kernel = _kernel("dots", weight)
    if kernel is not None:
        return kernel(x, indices, weight)
    wide = torch.promote_types(weight.dtype, torch.float32)
    if weight.device.type == "cpu" and (_any_number() or indices.numel() > len(weight)):
        weight = weight.to(wide)  # less work than widening every row that is taken
    if weight.dtype != wide or not _sums_rows(weight.device.type, wide):
        return _dots_gathered(x, indices, weight)
    return _dots_bags(x.to(wide), indices, weight)


def _scatter(values: Tensor, indices: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    kernel = _kernel("scatter", weight)
    if kernel is not None:
        return kernel(values, indices, x, weight)
    if not _sums_rows(weight.device.type, weight.dtype):
        return _scatter_gathered(values, indices, x, weight)
    values, x = values.to(weight.dtype), x.to(weight.dtype)
    sparse = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)
    if not sparse or torch.compiler.is_compiling() or not torch.backends.mkl.is_available():  # no sparse tensors are compiled
        return _scatter_bags(values, indices, x, len(weight))
    out = torch.empty_like(weight)  # given, for otherwise torch makes and fills two
    return torch.addmm(out, _transposed_coefficients(values, indices, len(weight)), x, beta=0, out=out)


def _mix_gathered(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    pairs = zip(*_parts(weight, indices, values.to(weight.dtype), indices), strict=True)
    with without_autocast(weight.device.type):
        return torch.cat([torch.bmm(some[:, None], weight[chosen]).squeeze(1) for some, chosen in pairs])


def _dots_gathered(x: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    pairs = zip(*_parts(weight, indices, x.to(wide), indices), strict=True)
    with without_autocast(weight.device.type):
        return torch.cat([torch.bmm(weight[chosen].to(wide), some[:, :, None]).squeeze(2) for some, chosen in pairs])


def _scatter_gathered(values: Tensor, indices: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    out = torch.zeros_like(weight, dtype=wide)
    for value, chosen, some in zip(*_parts(weight, indices, values.to(wide), indices, x.to(wide)), strict=True):
        out = out.index_add(0, chosen.flatten(), (value[:, :, None] * some[:, None]).reshape(-1, weight.shape[1]))
    return out.to(weight.dtype)


def _mix_bags(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    return F.embedding_bag(indices, weight, per_sample_weights=values, mode="sum")


def _dots_bags(x: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """On a CPU ten times as fast as with gathered rows."""
    starts = torch.arange(0, indices.numel(), indices.shape[1], device=indices.device)
    return getattr(torch.ops.aten, _BAG_DOTS)(x, weight, indices.flatten(), starts, _tokens(indices), _SUM).view(indices.shape)


def _scatter_bags(values: Tensor, indices: Tensor, x: Tensor, n_rows: int) -> Tensor:
    tokens = _tokens(indices)  # the sizes of bags and their maxima are for other modes than sums
    return getattr(torch.ops.aten, _BAG_SCATTER)(
        x, indices.flatten(), tokens, tokens, tokens, n_rows, False, _SUM, values.flatten()
    )


def _tokens(indices: Tensor) -> Tensor:
    """Which token each of the flattened indices (n, K) is of: (n K,) int64."""
    return torch.arange(indices.numel(), device=indices.device) // indices.shape[1]


def _parts(weight: Tensor, indices: Tensor, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Tensors of n tokens each in parts, for which the chosen rows are gathered at once."""
    parts = 1 if _any_number() else max(1, indices.numel() * weight.shape[1] // _GATHERED_ELEMENTS)
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
        Pre-activations (n, k) in float32 or wider, and their indices (n, k), in no order. Of several equal ones, any may be
        chosen.
    """
    kernel = None if _any_number() or is_transformed(x, weight, bias) else _kernel("select", weight)
    return (kernel or select_plain)(x, weight, bias, k, selection)


def select_plain(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, selection: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`select` in plain torch, for some tokens at a time."""
    selection = selection or weight.dtype
    coarse = torch.finfo(selection).bits < 32
    candidates = min(k + EXTRA_CANDIDATES, len(weight)) if coarse else k
    with without_autocast(x.device.type):
        # A low-precision copy of a float32 matrix lives as long as this call.
        ranking, offset = weight.to(selection), bias.to(selection)
        rows = max(1, chunk_bytes(x.device.type) // (len(weight) * ranking.element_size()))
        chunks = [x] if _any_number() else x.split(rows)
        chosen = [top_k(F.linear(chunk.to(selection), ranking, offset), candidates) for chunk in chunks]
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
    if stride < 2 * k or (not _any_number() and tokens < 16):  # too few to gain anything
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


def _any_number() -> bool:
    """Whether what is computed now is exported, and has to do for any number of tokens: no step may depend on it."""
    return torch.compiler.is_exporting()


def is_transformed(*tensors: Tensor) -> bool:
    """Whether vmap, torch.func or forward-mode differentiation follows what is computed now: only what torch knows itself."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    # Autograd's `is_grads_batched` has another kind of vmap, which only its tensors tell of.
    return not torch.compiler.is_compiling() and any(map(torch._C._functorch.is_legacy_batchedtensor, tensors))


def _sums_rows(device: str, dtype: torch.dtype) -> bool:
    """Whether torch's own `F.embedding_bag` and its derivatives do what `mix` is there for on a type of device."""
    if not hasattr(torch.ops.aten, _BAG_DOTS) or not hasattr(torch.ops.aten, _BAG_SCATTER):
        return False  # a torch that has them no longer
    return device in ("cpu", "cuda") or _tried_to_sum_rows(device, dtype)


@functools.cache
def _tried_to_sum_rows(device: str, dtype: torch.dtype) -> bool:
    try:
        with torch.inference_mode(False), torch.enable_grad(), without_autocast(device):  # as in training
            indices = torch.tensor([[0, 2], [2, 1]], device=device)
            values = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).to(device, dtype)
            rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).to(device, dtype)
            ones = torch.ones_like(values)
            mixed = _mix_bags(values, indices, rows.clone().requires_grad_()).detach()
            tried = mixed, _dots_bags(ones, indices, rows), _scatter_bags(values, indices, ones, 3)
        found = [part.tolist() for part in tried]
    except RuntimeError:  # it has no kernel for one of the three
        return False
    return found == [[[11, 14], [27, 34]], [[3, 11], [11, 7]], [[1, 1], [4, 4], [5, 5]]]


def _kernel(name: str, weight: Tensor) -> Callable | None:
    return KERNELS.get(weight.device.type, {}).get(name)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, weight)
        return _mix(values, indices, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        values, indices, weight = ctx.saved_tensors
        grad_values = dots(grad, indices, weight).to(values.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = scatter(values, indices, grad, weight) if ctx.needs_input_grad[2] else None
        return grad_values, None, grad_weight


class _Dots(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, indices, weight)
        return _dots(x, indices, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        x, indices, weight = ctx.saved_tensors
        grad_x = mix(grad, indices, weight).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = scatter(grad, indices, x, weight) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_weight


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, indices: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, x)
        return _scatter(values, indices, x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        values, indices, x = ctx.saved_tensors
        grad_values = dots(x, indices, grad).to(values.dtype) if ctx.needs_input_grad[0] else None
        grad_x = mix(values, indices, grad).to(x.dtype) if ctx.needs_input_grad[2] else None
        return grad_values, None, grad_x, None


class _SparseGate(torch.autograd.Function):
    """The derivative of a kept coefficient is that of one row's inner product with x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, k: int, selection: torch.dtype | None, relu: bool):
        values, indices = select(x, weight, bias, k, selection)
        values, ctx.relu = values.relu_() if relu else values, relu
        ctx.save_for_backward(x, weight, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx, grad_values: Tensor, _):
        x, weight, values, indices = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad = grad_values.to(weight.dtype)
        grad = grad * (values > 0) if ctx.relu else grad
        grad_x = mix(grad, indices, weight).to(x.dtype) if needs_x else None
        grad_weight = scatter(grad, indices, x, weight) if needs_weight else None
        grad_bias = torch.zeros_like(weight[:, 0]).index_add(0, indices.flatten(), grad.reshape(-1)) if needs_bias else None
        return grad_x, grad_weight, grad_bias, None, None, None
