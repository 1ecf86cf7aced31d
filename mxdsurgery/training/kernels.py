"""Triton kernels for the three sparse products of `mxdsurgery.layers.sparse`, on CUDA and wherever else Triton compiles.

`install_if_faster` puts them to use where they agree with plain torch and beat it, on the device and at the sizes of the run.
Plain torch is the fallback and the reference. Every sum runs in float32 in a fixed order: the same inputs give the same bits.

Shapes: n tokens, D model width, N rows (experts), K chosen rows per token.
"""

import sys
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxdsurgery.errors import first_line
from mxdsurgery.hardware.timing import median_seconds
from mxdsurgery.layers import sparse

# Largest |difference| / largest |value| between two float32 sums of the same terms in another order.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Trial:
    """The kernels beside plain torch on random data: `mix`, `dots` and `scatter` together.

    Attributes:
        plain: milliseconds in plain torch.
        triton: milliseconds with the kernels; None where they do not run here.
        error: largest |difference| / largest |value|; infinite where they do not run.
        failure: why they do not run.
    """

    plain: float
    triton: float | None
    error: float
    failure: str | None = None

    @property
    def worthwhile(self) -> bool:
        """Whether the kernels are right and faster."""
        return self.triton is not None and self.error <= _TOLERANCE and self.triton < self.plain

    def __str__(self) -> str:
        if self.triton is None:
            return f"plain torch: the Triton kernels do not run here ({self.failure})"
        if self.error > _TOLERANCE:
            return f"plain torch: the Triton kernels are {self.error:.0e} off here, relative"
        chosen = "Triton" if self.worthwhile else "plain torch"
        return f"{chosen}: the sparse products take {self.triton:.3g} ms in Triton, {self.plain:.3g} ms in plain torch"


def install(device: str = "cuda") -> None:
    """Makes `mxdsurgery.layers.sparse` use these kernels for tensors on a type of device."""
    sparse.KERNELS[device] = sys.modules[__name__]


def install_if_faster(d_model: int, n_experts: int, k: int, tokens: int, device: str = "cuda") -> Trial:
    """Tries the kernels at a run's sizes, leaves them installed if they are worthwhile, and says what was found."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, d_model, generator=generator).to(device) for rows in (tokens, n_experts))
    # Some experts are used far more than others, as in training.
    bias = torch.randn(n_experts, generator=generator).mul_(0.5 * d_model**0.5).to(device)
    sparse.KERNELS.pop(device, None)
    values, indices = sparse.select(x, weight, bias, k)

    def products() -> list[Tensor]:
        given = (values, indices, weight), (x, indices, weight), (values, indices, x, weight)
        functions = (sparse.mix, sparse.dots, sparse.scatter)
        return [function(*arguments) for function, arguments in zip(functions, given, strict=True)]

    wanted, plain = products(), 1000 * median_seconds(products, 0.1)
    install(device)
    try:
        errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(products(), wanted, strict=True)]
        trial = Trial(
            plain, 1000 * median_seconds(products, 0.1), max(errors) if all(e == e for e in errors) else float("inf")
        )
    except Exception as error:  # Triton compiles here, with whatever compiler and driver there are
        trial = Trial(plain, None, float("inf"), f"{type(error).__name__}: {first_line(error)}")
    if not trial.worthwhile:
        del sparse.KERNELS[device]
    return trial


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
