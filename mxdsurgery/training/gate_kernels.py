"""Triton kernels for the gate's choice, `mxdsurgery.layers.sparse.select`: pre-activations of all N experts stay on the chip.

`_best` computes a tile of them, and keeps the best three of each group of columns: 12 bytes a group are in memory, the (n, N)
matrix never is. The best C of what was kept are the best C of all, unless all three of a group are among them, which may hide
more: `_hidden` then computes the rest of the group, which is rare. Candidates are computed again in float32, and the best K of
them are chosen, as in plain torch.

Groups are of columns that lie eight apart in a tile: so a thread that reads a tensor core's sums holds all of a group.

Shapes: n tokens, D model width, N rows (experts), K chosen rows per token, C candidates, g columns in a group.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxdsurgery.layers import sparse

# Groups in a tile, and how many of the best of each are kept.
_GROUPS, _BEST = 8, 3
# Blocks of tokens that use a tile of rows one after the other, while it is in the cache.
_SPAN = 32
# Of D at a time, in `_hidden`.
_HIDDEN_DEPTH = 128
# A key that no pre-activation has: that of a column beyond N.
_NONE = tl.constexpr(-(2**31))


class Tile(NamedTuple):
    """How `best_of_groups` goes about it.

    Attributes:
        tokens: rows of a tile.
        experts: columns of a tile; g of them are a group.
        depth: of D at a time.
        warps: of 32 threads, per tile.
        stages: blocks of D that are under way at a time.
        precision: of products of float32.
    """

    tokens: int
    experts: int
    depth: int
    warps: int
    stages: int
    precision: str

    @property
    def group(self) -> int:
        """g."""
        return self.experts // _GROUPS


# By bytes of a number. Three products of TF32 are one of float32, to rounding.
TILES = {2: Tile(128, 256, 64, 8, 3, "tf32"), 4: Tile(128, 128, 16, 8, 3, "tf32x3")}


def select(x: Tensor, weight: Tensor, bias: Tensor, k: int, selection: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """As `sparse.select`; where there is nothing to gain, in plain torch.

    Pre-activations are compared in float32, without the last bits of the mantissa, whatever the dtype of their factors: so C
    is larger than K with all dtypes.
    """
    selection = selection or weight.dtype
    if len(x) == 0 or weight.dtype == torch.float64 or not applies(len(weight), k, selection):
        return sparse.select_plain(x, weight, bias, k, selection)
    tile, candidates = TILES[selection.itemsize], k + sparse.EXTRA_CANDIDATES
    # A low-precision copy of a float32 matrix lives as long as this call.
    ranking, offset = weight.to(selection).contiguous(), bias.float()
    rows = max(1, sparse.chunk_bytes(x.device.type) // (4 * _BEST * _groups(len(weight), tile)))
    chosen = [_choose(some, weight, ranking, offset, k, candidates, tile) for some in x.contiguous().split(rows)]
    values, indices = zip(*chosen, strict=True)
    return torch.cat(values), torch.cat(indices)


def applies(n_experts: int, k: int, selection: torch.dtype) -> bool:
    """Whether the kernels choose K of N in a dtype: float32 or coarser, with at least twice as many groups as candidates."""
    tile = TILES.get(selection.itemsize)
    return tile is not None and n_experts >= 2 * (k + sparse.EXTRA_CANDIDATES) * tile.group


def _groups(rows: int, tile: Tile) -> int:
    return _GROUPS * triton.cdiv(rows, tile.experts)


def _choose(
    x: Tensor, weight: Tensor, ranking: Tensor, bias: Tensor, k: int, candidates: int, tile: Tile
) -> tuple[Tensor, Tensor]:
    """`select` of x (n, D), with weight in the dtype of its ranking, and the bias in float32."""
    best = best_of_groups(x.to(ranking.dtype), ranking, bias, tile)
    groups = best.shape[2]
    keys, places = sparse.top_k(best.flatten(1), candidates)
    group, columns = places % groups, _columns(places % groups, keys & (tile.group - 1), tile)
    values = sparse.dots(x, columns, weight) + bias[columns]
    # All that was kept of such a group is better than the worst candidate: what was not kept may be as well.
    full = (places >= (_BEST - 1) * groups) & (keys > keys.amin(1, keepdim=True))
    full = torch.where(full, group, -1).topk(max(1, candidates // _BEST)).values
    hidden = hidden_in_groups(x, weight, bias, best, full, tile)
    members = torch.arange(tile.group, device=x.device)
    columns = torch.cat([columns, _columns(full[:, :, None], members, tile).flatten(1)], dim=1)
    # What is not there is -inf, and comes after all that is.
    chosen = torch.cat([values.clamp_min(torch.finfo(values.dtype).min), hidden], dim=1).topk(k, sorted=False).indices
    return torch.cat([values, hidden], dim=1).gather(1, chosen), columns.gather(1, chosen)


def _columns(group: Tensor, member: Tensor, tile: Tile) -> Tensor:
    """Which of N the members of groups are."""
    return group // _GROUPS * tile.experts + member * _GROUPS + group % _GROUPS


def best_of_groups(x: Tensor, weight: Tensor, bias: Tensor, tile: Tile) -> Tensor:
    """The best three pre-activations of each group: (n, D), (N, D) of one dtype, (N,) float32 -> (n, 3, groups) int32.

    Each as a key: an integer that grows with it, whose lowest bits say which of the group's columns it is of.
    """
    (n, d), rows = x.shape, len(weight)
    groups = _groups(rows, tile)
    out = torch.empty(n, _BEST, groups, dtype=torch.int32, device=x.device)
    grid = (triton.cdiv(n, tile.tokens) * groups // _GROUPS,)
    numbers = (n, rows, d, groups)
    shape = {"GROUPS": _GROUPS, "GROUP": tile.group, "BEST": _BEST, "SPAN": _SPAN}
    blocks = {"BLOCK_N": tile.tokens, "BLOCK_D": tile.depth, "num_warps": tile.warps, "num_stages": tile.stages}
    wide = not isinstance(_best, triton.JITFunction)  # Triton's interpreter knows no products of bfloat16
    _best[grid](x, weight, bias, out, *numbers, **shape, **blocks, PRECISION=tile.precision, WIDE=wide)
    return out


def hidden_in_groups(x: Tensor, weight: Tensor, bias: Tensor, best: Tensor, full: Tensor, tile: Tile) -> Tensor:
    """What `best_of_groups` did not keep, of groups (n, S), -1 after the last: (n, S g) float32, -inf for all else."""
    (n, d), slots = x.shape, full.shape[1]
    out = torch.full((n, slots * tile.group), -torch.inf, device=x.device)
    numbers = (len(weight), d, best.shape[2], weight.stride(0))
    shape = {"GROUPS": _GROUPS, "GROUP": tile.group, "BEST": _BEST, "SLOTS": slots, "BLOCK_D": _HIDDEN_DEPTH}
    _hidden[(n,)](x, weight, bias, best, full.contiguous(), out, *numbers, **shape)
    return out


@triton.jit
def _best(
    x,
    weight,
    bias,
    out,
    n,
    rows,
    d,
    groups,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BEST: tl.constexpr,
    SPAN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_N tokens and GROUPS x GROUP rows: walks over D."""
    WIDTH: tl.constexpr = GROUPS * GROUP
    program, in_span = tl.program_id(0), SPAN * tl.cdiv(rows, WIDTH)
    first = program // in_span * SPAN
    span = tl.minimum(tl.cdiv(n, BLOCK_N) - first, SPAN)
    tokens = (first + program % in_span % span) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = program % in_span // span
    columns = tile * WIDTH + tl.arange(0, WIDTH)
    # What is beyond the last token or row is computed from the last, and left out in the end.
    x_rows = x + tl.minimum(tokens, n - 1).to(tl.int64)[:, None] * d
    weight_rows = weight + tl.minimum(columns, rows - 1).to(tl.int64)[:, None] * d
    total = tl.zeros([BLOCK_N, WIDTH], dtype=tl.float32)
    for start in range(0, d, BLOCK_D):
        depth = start + tl.arange(0, BLOCK_D)
        inside = (depth < d)[None, :]
        some = tl.load(x_rows + depth[None, :], mask=inside, other=0.0)
        w = tl.load(weight_rows + depth[None, :], mask=inside, other=0.0)
        if WIDE:
            some, w = some.to(tl.float32), w.to(tl.float32)
        total = tl.dot(some, tl.trans(w), total, input_precision=PRECISION)
    total += tl.load(bias + columns, mask=columns < rows, other=0.0)[None, :]
    # As integers, numbers are in order once the negative ones are turned round.
    bits = total.to(tl.int32, bitcast=True)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (keys & -GROUP) | (tl.arange(0, WIDTH) // GROUPS)[None, :]
    keys = tl.where((columns < rows)[None, :], keys, _NONE)
    keys = tl.reshape(keys, [BLOCK_N, GROUP, GROUPS])
    places = out + tokens.to(tl.int64)[:, None] * (BEST * groups) + (tile * GROUPS + tl.arange(0, GROUPS))[None, :]
    for i in tl.static_range(BEST):
        best = tl.max(keys, axis=1)
        tl.store(places + i * groups, best, mask=(tokens < n)[:, None])
        keys = tl.where(keys < best[:, None, :], keys, _NONE)


@triton.jit
def _hidden(
    x,
    weight,
    bias,
    best,
    full,
    out,
    rows,
    d,
    groups,
    stride,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BEST: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token: walks over its full groups, and over D."""
    token = tl.program_id(0).to(tl.int64)
    members = tl.arange(0, GROUP)
    slot = 0
    group = tl.load(full + token * SLOTS)
    while group >= 0:
        columns = group // GROUPS * (GROUPS * GROUP) + members * GROUPS + group % GROUPS
        wanted = columns < rows
        for i in tl.static_range(BEST):
            wanted = wanted & (members != (tl.load(best + (token * BEST + i) * groups + group) & (GROUP - 1)))
        total = tl.zeros([GROUP, BLOCK_D], dtype=tl.float32)
        for start in range(0, d, BLOCK_D):
            depth = start + tl.arange(0, BLOCK_D)
            inside = depth < d
            part = tl.load(x + token * d + depth, mask=inside, other=0.0).to(tl.float32)
            there = wanted[:, None] & inside[None, :]
            w = tl.load(weight + columns[:, None] * stride + depth[None, :], mask=there, other=0.0)
            total += w.to(tl.float32) * part[None, :]
        value = tl.sum(total, axis=1) + tl.load(bias + columns, mask=wanted, other=0.0)
        tl.store(out + (token * SLOTS + slot) * GROUP + members, value, mask=wanted)
        slot += 1
        group = tl.load(full + token * SLOTS + slot, mask=slot < SLOTS, other=-1)
