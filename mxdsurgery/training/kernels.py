"""Triton kernels for the three sparse products of `mxdsurgery.layers.sparse`, on CUDA and wherever else Triton compiles.

`trial` puts them to use where they are right and faster. Plain torch is the fallback and the reference. Every sum runs in
float32 in a fixed order: the same inputs give the same bits.

Shapes: n tokens, D model width, N rows (experts), K chosen rows per token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def mix(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """``Σ_k values_k weight[indices_k]``: (n, K), (n, K), (N, D) -> (n, D) in weight's dtype."""
    n, k = indices.shape
    d = weight.shape[1]
    out = torch.empty(n, d, dtype=weight.dtype, device=weight.device)
    block = _block(d, 1024)
    grid = (n, triton.cdiv(d, block))
    _mix[grid](values.contiguous(), indices.contiguous(), weight, out, d, weight.stride(0), K=k, BLOCK_D=block)
    return out


def dots(x: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """``weight[indices_k] · x``: (n, D), (n, K), (N, D) -> (n, K) float32."""
    n, k = indices.shape
    d = weight.shape[1]
    out = torch.empty(n, k, dtype=torch.float32, device=weight.device)
    grid = (n, triton.cdiv(k, 8))
    x, indices = x.contiguous(), indices.contiguous()
    _dots[grid](x, indices, weight, out, k, weight.stride(0), D=d, BLOCK_K=8, BLOCK_D=_block(d, 512))
    return out


def scatter(values: Tensor, indices: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Row i: ``Σ values x`` over the tokens that chose i: (n, K), (n, K), (n, D) -> (N, D), shaped and typed like weight."""
    k = indices.shape[1]
    rows, d = weight.shape
    experts, order = indices.flatten().to(torch.int32).sort(stable=True)
    starts = torch.searchsorted(experts, torch.arange(rows + 1, device=weight.device, dtype=torch.int32), out_int32=True)
    out = torch.empty(rows, d, dtype=weight.dtype, device=weight.device)
    block = _block(d, 512)
    grid = (rows, triton.cdiv(d, block))
    _scatter[grid](values.flatten(), order, starts, x.contiguous(), out, k, d, BLOCK_J=8, BLOCK_D=block)
    return out


def _block(d: int, largest: int) -> int:
    return min(largest, triton.next_power_of_2(d))


@triton.jit
def _mix(values, indices, weight, out, d, stride, K: tl.constexpr, BLOCK_D: tl.constexpr):
    """One token, BLOCK_D of its D outputs: walks over its K rows."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < d
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for j in range(K):
        row = tl.load(indices + token * K + j)
        value = tl.load(values + token * K + j).to(tl.float32)
        total += value * tl.load(weight + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * d + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _dots(x, indices, weight, out, k, stride, D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """One token, BLOCK_K of its rows: walks over D."""
    token = tl.program_id(0).to(tl.int64)
    chosen = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = tl.load(indices + token * k + chosen, mask=chosen < k, other=0)
    total = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = columns < D
        part = tl.load(x + token * D + columns, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + rows[:, None] * stride + columns[None, :], mask=inside[None, :], other=0.0)
        total += w.to(tl.float32) * part[None, :]
    tl.store(out + token * k + chosen, tl.sum(total, axis=1), mask=chosen < k)


@triton.jit
def _scatter(values, order, starts, x, out, k, d, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr):
    """One row, BLOCK_D of its columns: walks over the (token, k) pairs that chose it, BLOCK_J at a time."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < d
    first, last = tl.load(starts + row), tl.load(starts + row + 1)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    while first < last:
        pairs = first + tl.arange(0, BLOCK_J)
        there = pairs < last
        pair = tl.load(order + pairs, mask=there, other=0)
        value = tl.load(values + pair, mask=there, other=0.0).to(tl.float32)
        part = tl.load(x + (pair // k)[:, None] * d + columns[None, :], mask=inside[None, :] & there[:, None], other=0.0)
        total += tl.sum(part.to(tl.float32) * value[:, None], axis=0)
        first += BLOCK_J
    tl.store(out + row * d + columns, total.to(out.dtype.element_ty), mask=inside)
