"""Controls of `expert_share`: what is lost if the choice of experts is there but says nothing, or if nothing is chosen.

Training sees none of them. Each stands in a layer's place as a variant of its own:

    permuted       each coefficient goes to another expert, always the same one
    shuffled       each token gets the choice of another token whose gate is about as large
    random gate    each token draws its experts by chance, each as often as it fires, and as strongly as it then does
    few experts    the same few experts for every token, each times the number that suits the token's own choice best
    retrained      the experts say the same for every token, and the dense path is fitted anew to the block's output

The first three leave the choice its statistics and take its meaning: what depends on any choice breaks under them. The others
ask what could do as well. If all experts are alike but for size and sign, or sums of a few, a few experts do. In particular
they do where the choice is a sign bit: ``y = s (D z)`` with ``s`` = 1 or -1 as a random hyperplane has it. There
`expert_share` is 1, and the shares of the first three are no less: with wrong signs the layer is worse than none. Retraining
the dense path asks whether anything had to be chosen at all.

Shapes: B contexts of T tokens, n tokens, D model width, F features of the dense path, N experts, K active ones.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mxdsurgery.base.surgery import FrozenExperts
from mxdsurgery.hardware.device import widest
from mxdsurgery.layers.baselines import SkipTranscoder
from mxdsurgery.layers.layer import Coefficients, MxDLayer
from mxdsurgery.training.losses import best_amounts, how_few

# The share of a layer's worth that is lost under each control.
SHARES = {
    "permuted": "permuted_share",
    "shuffled": "shuffled_share",
    "random_gate": "random_gate_share",
    "few_experts": "few_experts_share",
    "retrained": "earned_share",
}
# Choices are shuffled among so many tokens that are neighbours in gate size.
_NEIGHBOURS = 16
# Ridges that are tried, as shares of a feature's sum of squares.
_RIDGES = tuple(10.0**power for power in range(-5, 1))


@dataclass(frozen=True)
class Usage:
    """How one layer uses its experts on original inputs, position 0 left out."""

    best_constant: Tensor  # (D,), in place of their term Cᵀ a
    few: Tensor | None  # (D, r), the directions that most of Cᵀ a lies in, seen through what it is multiplied with
    fired: Tensor  # (N,), tokens on which each expert fired
    amount: Tensor  # (N,), the sum of each expert's coefficients
    tokens: int
    median_error: float = math.nan  # over tokens, of ‖ŷ - y‖² / ‖y‖²


class PermutedExperts(nn.Module):
    """A layer whose coefficients go to other experts than their own, among those that fire: one cycle through all of them.

    Args:
        layer: with experts.
        usage: which of them fire.
        seed: of the order of the cycle.
    """

    def __init__(self, layer: nn.Module, usage: Usage, seed: int) -> None:
        super().__init__()
        self.layer = layer
        firing = usage.fired.nonzero()[:, 0]
        cycle = firing[torch.randperm(len(firing), generator=torch.Generator().manual_seed(seed)).to(firing.device)]
        goes_to = torch.arange(len(usage.fired), device=firing.device)
        goes_to[cycle] = cycle.roll(1)
        self.register_buffer("goes_to", goes_to)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        a = self.layer.coefficients(x)
        return self.layer.combine(Coefficients(a.values, self.goes_to[a.indices]), x)


class ShuffledTokens(nn.Module):
    """A layer in which each token gets the experts of another token of the batch, whose gate is about as large.

    Which experts, and in which proportion, comes from the other token; the size, the sum of the coefficients, is the token's
    own. Position 0 keeps its choice.

    Args:
        layer: with experts.
        length: T.
        seed: of the order among neighbours in size.
    """

    def __init__(self, layer: nn.Module, length: int, seed: int) -> None:
        super().__init__()
        self.layer, self.length = layer, length
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), of whole contexts."""
        a = self.layer.coefficients(x)
        kept = torch.arange(a.values[..., 0].numel(), device=x.device).view(-1, self.length)
        values, indices = (part.reshape(kept.numel(), -1).clone() for part in a)
        takes = kept[:, 1:].flatten()
        size = values[takes].sum(-1)
        partners = self._partners(size)
        gives, scale = takes[partners], torch.where(size[partners] > 0, size / size[partners], 0.0)
        values[takes], indices[takes] = values[gives] * scale[:, None], indices[gives]
        return self.layer.combine(Coefficients(values.view(a.values.shape), indices.view(a.indices.shape)), x)

    def _partners(self, size: Tensor) -> Tensor:
        """For each of n tokens another one, a neighbour in size (n,)."""
        n = len(size)
        places = torch.arange(n) // _NEIGHBOURS + torch.rand(n, generator=self.generator, dtype=torch.float64)
        order = size.argsort(stable=True)[places.argsort().to(size.device)]
        partners = torch.empty_like(order)
        partners[order] = order.roll(-1)
        return partners


class RandomGate(nn.Module):
    """A layer whose experts are drawn by chance for each token: each as often as it fires, with its mean coefficient.

    With the firing frequencies (N,) laid end to end, a token draws one point from each unit of length.

    Args:
        layer: with experts.
        usage: how often and how strongly they fire.
        seed: of the drawing.
    """

    def __init__(self, layer: nn.Module, usage: Usage, seed: int) -> None:
        super().__init__()
        self.layer = layer
        self.generator = torch.Generator().manual_seed(seed)
        fired = usage.fired.cpu().double()
        order = fired.argsort(descending=True, stable=True)  # experts that always fire come first: each fills a unit
        ends = fired[order].cumsum(0) / usage.tokens
        self.ends, self.order = ends, order  # on the CPU, where the drawing is
        self.strength = usage.amount.cpu().double() / fired.clamp_min(1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        units = torch.arange(max(1, int(torch.ceil(self.ends[-1] - 1e-9))))
        drawn = units + torch.rand(*x.shape[:-1], len(units), generator=self.generator, dtype=torch.float64)
        place = torch.searchsorted(self.ends, drawn, right=True)
        indices = self.order[place.clamp_max(len(self.order) - 1)]
        values = self.strength[indices] * (place < len(self.order))
        dtype = torch.promote_types(x.dtype, torch.float32)
        return self.layer.combine(Coefficients(values.to(x.device, dtype), indices.to(x.device)), x)


class FewExperts(nn.Module):
    """A layer in which the experts' sum of each token is replaced by the nearest sum of a few, the same for all tokens.

    Near in the output, where they are multiplied with the dense path. Each has the number that suits the token best, of any
    size and sign.

    Args:
        layer: with experts.
        few: the experts' rows, as columns (D, r).
    """

    def __init__(self, layer: nn.Module, few: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("few", few)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        scale, rest = self.layer.dense_path(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        s, few, square = self.layer.mixture(self.layer.coefficients(x), x).to(wide), self.few.to(wide), scale.to(wide).square()
        with torch.autocast(x.device.type, enabled=False):
            nearest = best_amounts(square.expand_as(s), (square * s) @ few, few) @ few.T
        return nearest.to(scale.dtype) * scale + rest


def main_directions(products: Tensor, mean_square: Tensor) -> Tensor:
    """The few directions (D, r) whose sums come nearest to vectors s, in the mean square of ``s * m``.

    Args:
        products: ``Σ s sᵀ``, (D, D).
        mean_square: of m, (D,).
    """
    size = mean_square.cpu().sqrt().clamp_min(1e-12)
    _, vectors = torch.linalg.eigh(products.cpu() * size[:, None] * size)
    found = vectors[:, -how_few(len(size)) :] / size[:, None]
    return (found / found.norm(dim=0)).to(products.device)


def dense_features(layer: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What a layer's dense path is linear in: x (..., D) -> (..., F). None where it is a constant, as a transcoder's."""
    if isinstance(layer, MxDLayer):
        return layer.hidden
    return (lambda x: x) if isinstance(layer, SkipTranscoder) else None


class RetrainedDensePath(nn.Module):
    """A layer with its experts frozen, and a linear map of its dense path's features that mends what such a map can.

    Args:
        frozen: the layer with a constant in place of its experts' sum.
        maps: one to score each half of the text with, fitted on the *other* half: (F + 1, D); the last row is a constant.

    Attributes:
        half: 0 or 1, the half of the text that is scored.
    """

    def __init__(self, frozen: FrozenExperts, maps: Sequence[Tensor]) -> None:
        super().__init__()
        self.frozen, self.half, self.maps = frozen, 0, list(maps)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        added = self.maps[self.half].to(x.dtype)
        return self.frozen(x) + dense_features(self.frozen.layer)(x) @ added[:-1] + added[-1]


class DenseFit:
    """Sums over tokens that the maps of a `RetrainedDensePath` are fitted from, for each quarter of the text.

    Ridge least squares; what the frozen layer leaves is fitted, so that with few tokens it stays as it is. The ridge is the
    one with which fits on one quarter do best on the other quarter of the same half; if none does any good there, nothing is
    changed.

    Args:
        frozen: the layer with a constant in place of its experts' sum.
    """

    def __init__(self, frozen: FrozenExperts) -> None:
        self.frozen = frozen
        self.sums: dict[int, _Products] = {}

    @torch.no_grad()
    def add(self, quarter: int, x: Tensor, y: Tensor) -> None:
        """Counts tokens in: the block's x and y (n, D)."""
        z = dense_features(self.frozen.layer)(x).float()
        z = torch.cat([z, torch.ones_like(z[:, :1])], dim=1)
        error, wide = (y - self.frozen(x)).float(), widest(x.device)
        self.sums[quarter] = _Products((z.T @ z).to(wide), (z.T @ error).to(wide)) + self.sums.get(quarter)

    def retrained(self, dtype: torch.dtype) -> RetrainedDensePath:
        """The layer that scores each half of the text with the map from the other half; maps are kept in ``dtype``."""
        return RetrainedDensePath(self.frozen, [self._map(2, 3).to(dtype), self._map(0, 1).to(dtype)])

    def _map(self, one: int, other: int) -> Tensor:
        """From two quarters; zero if one of them is empty."""
        if one not in self.sums or other not in self.sums:
            return torch.zeros_like(next(iter(self.sums.values())).cross)
        first, second = self.sums[one], self.sums[other]
        both = first + second
        unit = both.gram.diagonal()[:-1].mean().item()

        def judged(ridge: float) -> float:
            return second.loss(first.solved(ridge)) + first.loss(second.solved(ridge))

        losses = {ridge: judged(ridge) for ridge in (share * unit for share in _RIDGES)}
        best = min(losses, key=losses.get)
        return both.solved(best) if losses[best] < 0 else torch.zeros_like(both.cross)


@dataclass
class _Products:
    """Sums over tokens of features z, the last of which is 1, and errors e."""

    gram: Tensor  # Σ z zᵀ, (F + 1, F + 1)
    cross: Tensor  # Σ z eᵀ, (F + 1, D)

    def __add__(self, other: "_Products | None") -> "_Products":
        return self if other is None else _Products(self.gram + other.gram, self.cross + other.cross)

    def solved(self, ridge: float) -> Tensor:
        """The map W (F + 1, D) with the least ``Σ ‖Wᵀz - e‖² + ridge ‖W‖²``, but for its last row; zero if there is none."""
        gram = self.gram.clone()
        gram.diagonal()[:-1] += ridge
        factor, failed = torch.linalg.cholesky_ex(gram)
        return torch.zeros_like(self.cross) if failed else torch.cholesky_solve(self.cross, factor)

    def loss(self, w: Tensor) -> float:
        """``Σ ‖Wᵀz - e‖²``, less what does not depend on W."""
        return ((self.gram @ w - 2 * self.cross) * w).sum().item()


def kind_of(layer: nn.Module) -> str:
    """The kind of a layer, as far as it matters which controls it has."""
    if not hasattr(layer, "gate"):
        return "dense"
    return "mxd" if isinstance(layer, MxDLayer) else "skip-transcoder" if isinstance(layer, SkipTranscoder) else "transcoder"


def stand_ins(layer: nn.Module, usage: Usage, length: int, seed: int) -> dict[str, nn.Module]:
    """The controls of a layer with experts, by name, but for ``retrained``; for contexts of T = ``length``."""
    return {
        "permuted": PermutedExperts(layer, usage, seed),
        "shuffled": ShuffledTokens(layer, length, seed),
        "random_gate": RandomGate(layer, usage, seed),
        "few_experts": FewExperts(layer, usage.few),
    }


def quarters(contexts: int) -> Tensor:
    """Which quarter of the text each of the contexts is in: (S,), 0 to 3. The first half is quarters 0 and 1."""
    return torch.arange(contexts) * 4 // contexts
