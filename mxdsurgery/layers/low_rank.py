"""Sums of low-rank maps, of which each token has a few: all that a mixture of linear transforms does with its experts.

Transform t has rank r and is ``U_t V_t``, a map of x by way of r numbers. Transforms of one rank form a group. Its pairs of a
token and a transform are sorted by transform, so that each transform takes all of its tokens at once; memory holds the r
numbers of every pair, nothing of all N transforms.

Three functions are closed under differentiation, as in sparse.py: `enter` takes tokens in, `leave` adds them up, `outer` is
the gradient of either by the weights. Under torch.func.vmap, and where torch compiles, which transform takes which token must
not decide shapes: there every pair has its own copy of its matrices, which is slow.

Travels with every exported checkpoint: torch only.

Shapes: n tokens, D model width, K transforms of a token, P pairs; G transforms of rank r in a group, weight (G, r, D).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .sparse import is_transformed, without_autocast

# Elements of matrices that are copied for pairs at once: 64 MiB in fp32.
_COPIED_ELEMENTS = 2**24
# The widest transforms have D / 2 dimensions, the narrowest D / 32.
_HALVINGS = 5


def transform_ranks(d_model: int, n_experts: int) -> tuple[tuple[int, int], ...]:
    """The ranks of N transforms, the largest first, and how many have each: (rank, number).

    D / 2, D / 4, ..., D / 32, as far as they are 1 or more, in numbers that double from rank to rank, so that each rank has
    the same share of the parameters. So do Lindsey et al., "Sparse mixtures of linear transforms", Transformer Circuits, 2025.
    """
    ranks = [rank for rank in (d_model >> halvings for halvings in range(1, _HALVINGS + 1)) if rank] or [1]
    whole = 2 ** len(ranks) - 1
    ends = [n_experts * (2 ** (place + 1) - 1) // whole for place in range(len(ranks))]
    starts = [0, *ends[:-1]]
    return tuple((rank, end - start) for rank, start, end in zip(ranks, starts, ends, strict=True) if end > start)


def total_rank(d_model: int, n_experts: int) -> int:
    """R, the sum of the ranks of N transforms."""
    return sum(rank * count for rank, count in transform_ranks(d_model, n_experts))


def transform(
    values: Tensor, indices: Tensor, x: Tensor, reads: Tensor, writes: Tensor, ranks: tuple[tuple[int, int], ...]
) -> Tensor:
    """``Σ_k values_k U_k V_k x`` over each token's transforms ``indices``.

    Args:
        values: (n, K), of any sign.
        indices: (n, K) int64 in [0, N), in any order.
        x: (n, D).
        reads: (R, D), the rows of all V, one transform after the other.
        writes: (R, D), the columns of all U.
        ranks: (rank, number) of the groups, in order.

    Returns:
        (n, D), in writes' dtype, summed in float32 or wider.
    """
    wide = torch.promote_types(writes.dtype, torch.float32)
    total = x.new_zeros(x.shape, dtype=wide)
    sizes = [rank * count for rank, count in ranks]
    groups = zip(ranks, reads.split(sizes), writes.split(sizes), _pairs(values, indices, ranks), strict=True)
    with without_autocast(x.device.type):
        for (rank, count), read, write, (pairs, weights) in groups:
            if pairs.token.shape[0]:  # len() would be a constant of an exported program
                h = enter(x, read.view(count, rank, -1), pairs).to(wide) * weights.to(wide)[:, None]
                total = total + leave(h, write.view(count, rank, -1), pairs, x.shape[0])
    return total.to(writes.dtype)


class Pairs(NamedTuple):
    """The pairs of a group: ``transform[p]`` (P,), from 0 on, takes ``token[p]`` (P,).

    ``sizes`` says how many tokens each transform takes, where the pairs are sorted by transform; None where they are not.
    """

    token: Tensor
    transform: Tensor
    sizes: list[int] | None

    def segments(self, *tensors: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """Each transform that takes any tokens, with its share of tensors (P, ...)."""
        parts = zip(*(tensor.split(self.sizes) for tensor in tensors), strict=True)
        return ((number, some) for number, some in enumerate(parts) if self.sizes[number])


def enter(x: Tensor, weight: Tensor, pairs: Pairs) -> Tensor:
    """``weight[transform] x[token]`` of each pair: (n, D), (G, r, D) -> (P, r) in weight's dtype."""
    return (_enter if _follows(pairs, x, weight) else _Enter.apply)(x, weight, pairs)


def leave(h: Tensor, weight: Tensor, pairs: Pairs, n: int) -> Tensor:
    """``Σ weight[transform]ᵀ h`` over each token's pairs: (P, r), (G, r, D) -> (n, D) in float32 or wider."""
    return (_leave if _follows(pairs, h, weight) else _Leave.apply)(h, weight, pairs, n)


def outer(h: Tensor, x: Tensor, pairs: Pairs, like: Tensor) -> Tensor:
    """``Σ h xᵀ`` over each transform's pairs: (P, r), (n, D) -> (G, r, D), as ``like``."""
    return (_outer if _follows(pairs, h, x) else _Outer.apply)(h, x, pairs, like)


def _pairs(values: Tensor, indices: Tensor, ranks: tuple[tuple[int, int], ...]) -> Iterator[tuple[Pairs, Tensor]]:
    """For each group its pairs and their values (P,)."""
    n, k = indices.shape
    flat, said = indices.flatten(), values.flatten()
    counts = [count for _, count in ranks]
    order, sizes = _sorted(flat, said, sum(counts))
    if sizes is None:
        token, start = torch.arange(n * k, device=flat.device) // k, 0
        for count in counts:
            place = flat - start
            mine = (place >= 0) & (place < count)
            yield Pairs(token, place.clamp(0, count - 1), None), said * mine
            start += count
        return
    token, sorted_values, at, first = order // k, said[order], 0, 0
    transforms = flat[order]
    for count in counts:
        of_group = sizes[first : first + count]
        here = slice(at, at + sum(of_group))
        yield Pairs(token[here], transforms[here] - first, of_group), sorted_values[here]
        at, first = here.stop, first + count


def _sorted(flat: Tensor, said: Tensor, n_experts: int) -> tuple[Tensor, list[int] | None]:
    """An order of the pairs by transform, and how many each has; None where shapes must not depend on the numbers."""
    flat = flat.detach()
    if torch.compiler.is_compiling() or not _can_be_read(flat):
        return flat, None
    if not said.requires_grad and not is_transformed(said):  # what adds nothing is left out; a gradient may be asked of it
        flat = torch.where(said == 0, n_experts, flat)
    sizes = torch.bincount(flat, minlength=n_experts).tolist()[:n_experts]
    return flat.argsort(stable=True)[: sum(sizes)], sizes


def _can_be_read(tensor: Tensor) -> bool:
    """Whether its numbers can be looked at: not inside of vmap."""
    try:
        tensor[:0].tolist()
    except RuntimeError:
        return False
    return True


def _follows(pairs: Pairs, *tensors: Tensor) -> bool:
    """Whether torch itself differentiates, by operations that it can transform."""
    return pairs.sizes is None or is_transformed(*tensors)


def _enter(x: Tensor, weight: Tensor, pairs: Pairs) -> Tensor:
    x = x.to(weight.dtype)
    if pairs.sizes is not None:
        return torch.cat([x[token] @ weight[number].T for number, (token,) in pairs.segments(pairs.token)])
    parts = zip(*_parts(weight, pairs.token, pairs.transform), strict=True)
    return torch.cat([torch.bmm(weight[number], x[token][:, :, None]).squeeze(2) for token, number in parts])


def _leave(h: Tensor, weight: Tensor, pairs: Pairs, n: int) -> Tensor:
    h, wide = h.to(weight.dtype), torch.promote_types(weight.dtype, torch.float32)
    if pairs.sizes is not None:
        made = torch.cat([some @ weight[number] for number, (some,) in pairs.segments(h)])
    else:
        parts = zip(*_parts(weight, h, pairs.transform), strict=True)
        made = torch.cat([torch.bmm(some[:, None], weight[number]).squeeze(1) for some, number in parts])
    return made.new_zeros(n, made.shape[1], dtype=wide).index_add(0, pairs.token, made.to(wide))


def _outer(h: Tensor, x: Tensor, pairs: Pairs, like: Tensor) -> Tensor:
    wide = torch.promote_types(like.dtype, torch.float32)
    out = torch.zeros_like(like, dtype=wide)
    parts = _parts(like, h.to(wide), pairs.token, pairs.transform)
    for some, token, number in zip(*parts, strict=True):
        out = out.index_add(0, number, some[:, :, None] * x.to(wide)[token][:, None])
    return out.to(like.dtype)


def _parts(weight: Tensor, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Tensors of P pairs in parts, for which matrices are copied at once."""
    if torch.compiler.is_exporting():  # for any number of tokens
        return [(tensor,) for tensor in tensors]
    parts = max(1, tensors[0].shape[0] * weight[0].numel() // _COPIED_ELEMENTS)
    return [tensor.chunk(parts) for tensor in tensors]


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.pairs = pairs
        x, h = x.to(weight.dtype), weight.new_empty(len(pairs.token), weight.shape[1])
        for number, (token, out) in pairs.segments(pairs.token, h):
            torch.mm(x.index_select(0, token), weight[number].T, out=out)
        return h

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad_x = leave(grad, weight, ctx.pairs, len(x)).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = outer(grad, x, ctx.pairs, weight) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, pairs: Pairs, n: int) -> Tensor:
        ctx.save_for_backward(h, weight)
        ctx.pairs = pairs
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = weight.new_zeros(n, weight.shape[2], dtype=wide)
        for number, (some, token) in pairs.segments(h.to(weight.dtype), pairs.token):
            total.index_add_(0, token, torch.mm(some, weight[number]).to(wide))
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        h, weight = ctx.saved_tensors
        grad_h = enter(grad, weight, ctx.pairs).to(h.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = outer(h, grad, ctx.pairs, weight) if ctx.needs_input_grad[1] else None
        return grad_h, grad_weight, None, None


class _Outer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor, x: Tensor, pairs: Pairs, like: Tensor) -> Tensor:
        ctx.save_for_backward(h, x)
        ctx.pairs = pairs
        h, x, total = h.to(like.dtype), x.to(like.dtype), torch.zeros_like(like)
        for number, (some, token) in pairs.segments(h, pairs.token):
            torch.mm(some.T, x.index_select(0, token), out=total[number])
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        h, x = ctx.saved_tensors
        grad_h = enter(x, grad, ctx.pairs).to(h.dtype) if ctx.needs_input_grad[0] else None
        grad_x = leave(h, grad, ctx.pairs, len(x)).to(x.dtype) if ctx.needs_input_grad[1] else None
        return grad_h, grad_x, None, None
