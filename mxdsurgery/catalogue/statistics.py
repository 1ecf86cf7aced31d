"""What is kept of every expert while text runs through a model: counts and sums, and a few of the places where it fired.

All of it is tensors of a fixed size, so memory does not grow with the text: per expert some counts, one vector (D,), and its
best places so far. A new place that falls short of the weakest of these is dismissed at once.

Shapes: B batch, T tokens, D model width, N experts, K active, C classes, W positions in a window.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from mxdsurgery.layers.layer import Coefficients
from mxdsurgery.layers.sparse import scatter

# Positions before and after a place that are kept with it.
BEFORE, AFTER = 15, 8
# Lower edges of the coefficients' bins, half an octave apart; the first bin holds everything below the second edge.
BINS = [0.0, *(2.0 ** (half / 2) for half in range(-11, 12))]
# Windows looked up at a time.
_WINDOWS = 4096


@dataclass
class Places:
    """For each expert the M places with the largest keys so far, in descending order; keys of empty places are 0.

    Attributes:
        key: (N, M) float32.
        context: (N, M) int32.
        position: (N, M) int32.
        coefficient: (N, M) float32.
        window: (N, M, W) float16, the expert's coefficients around the place.
    """

    key: Tensor
    context: Tensor
    position: Tensor
    coefficient: Tensor
    window: Tensor

    @classmethod
    def none(cls, n_experts: int, places: int) -> "Places":
        """Empty, with room for M places of each of N experts."""
        return cls(
            key=torch.zeros(n_experts, places),
            context=torch.zeros(n_experts, places, dtype=torch.int32),
            position=torch.zeros(n_experts, places, dtype=torch.int32),
            coefficient=torch.zeros(n_experts, places),
            window=torch.zeros(n_experts, places, BEFORE + 1 + AFTER, dtype=torch.float16),
        )

    def offer(self, fired: "Firings", key: Tensor, one_a_context: bool) -> None:
        """Takes in the firings whose keys are among the largest.

        Args:
            fired: n firings.
            key: (n,) positive.
            one_a_context: keep at most one place of an expert in each context, the one with the largest key.
        """
        better = (key > self.key[fired.expert, -1]).nonzero()[:, 0]
        if len(better) == 0:
            return
        places = self.key.shape[1]
        by_key = better[key[better].argsort(descending=True)]
        if one_a_context:
            context_first = _first_of_each(fired.expert[by_key] * fired.contexts + fired.row[by_key])
            by_key = by_key[context_first]
        by_expert = by_key[fired.expert[by_key].argsort(stable=True)]  # by expert, and then by falling key
        experts, counts = fired.expert[by_expert].unique_consecutive(return_counts=True)
        group = torch.arange(len(experts)).repeat_interleave(counts)
        rank = torch.arange(len(by_expert)) - (counts.cumsum(0) - counts)[group]
        kept = rank < places
        taken, group, rank = by_expert[kept], group[kept], rank[kept]
        offered = torch.zeros(len(experts), places)
        which = torch.zeros(len(experts), places, dtype=torch.int64)
        offered[group, rank], which[group, rank] = key[taken], taken
        self.key[experts], order = torch.cat([self.key[experts], offered], 1).topk(places)
        old, new = order.clamp_max(places - 1), order >= places
        for name in ("context", "position", "coefficient", "window"):
            held = getattr(self, name)
            rows = held[experts]
            held[experts] = rows.gather(1, old[..., None].expand_as(rows) if rows.ndim == 3 else old)
        at, slot = new.nonzero().unbind(1)
        chosen = which[at, order[at, slot] - places]
        rows = experts[at]
        self.context[rows, slot] = (fired.first_context + fired.row[chosen]).int()
        self.position[rows, slot] = fired.position[chosen].int()
        self.coefficient[rows, slot] = fired.value[chosen]
        self.window[rows, slot] = fired.windows(chosen).half()


def _first_of_each(group: Tensor) -> Tensor:
    """Indices of the first element of each group of equal numbers, in ascending order: (n,) -> (groups,)."""
    order = group.argsort(stable=True)
    ordered = group[order]
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return order[first].sort().values


class Firings:
    """All firings in a batch of contexts, position 0 left out.

    Args:
        a: the coefficients, (B, T, K), on the CPU.
        first_context: number of the batch's first context.

    Attributes:
        expert, row, position, value: (n,) of the n firings; rows are contexts of the batch.
    """

    def __init__(self, a: Coefficients, first_context: int) -> None:
        self.first_context, self.contexts, self.tokens, active = first_context, *a.values.shape
        self.all_values = a.values.float().view(-1, active)  # (B T, K)
        self.all_experts = a.indices.int().view(-1, active)
        fires = a.values > 0
        fires[:, 0] = False
        self.row, self.position, slot = fires.nonzero(as_tuple=True)
        self.expert = a.indices[self.row, self.position, slot]
        self.value = a.values[self.row, self.position, slot].float()

    def windows(self, chosen: Tensor) -> Tensor:
        """Coefficients of each chosen firing's expert around it: (q,) -> (q, W); 0 at position 0 and beyond the context."""
        around = torch.arange(-BEFORE, AFTER + 1)
        parts = [torch.zeros(0, len(around))]
        for some in chosen.split(_WINDOWS):
            places = self.position[some][:, None] + around  # (q, W)
            inside = (places >= 1) & (places < self.tokens)
            at = (self.row[some][:, None] * self.tokens + places.clamp(0, self.tokens - 1)).flatten()
            mine = self.all_experts[at] == self.expert[some].int().repeat_interleave(len(around))[:, None]  # (q W, K)
            parts.append((self.all_values[at] * mine).sum(-1).view(places.shape) * inside)
        return torch.cat(parts)


@dataclass
class Tally:
    """All that is kept of one layer's experts.

    Attributes:
        fired: (N,) int64, tokens on which each fired.
        total: (N,) float64, its coefficients' sum.
        maximum: (N,) float32, its largest coefficient.
        histogram: (N, bins) int32.
        class_fired: (N, C) int64.
        contribution: (N, D) float32, the sum of ``a_n m`` over the tokens, where ``a_n c_n * m`` is what the expert adds to
            the layer's output.
        top: where it fired most strongly.
        sample: places drawn evenly at random from all where it fired.
    """

    fired: Tensor
    total: Tensor
    maximum: Tensor
    histogram: Tensor
    class_fired: Tensor
    contribution: Tensor
    top: Places
    sample: Places

    @classmethod
    def none(cls, n_experts: int, d_model: int, classes: int, top: int, sample: int) -> "Tally":
        """Of N experts, before any text."""
        return cls(
            fired=torch.zeros(n_experts, dtype=torch.int64),
            total=torch.zeros(n_experts, dtype=torch.float64),
            maximum=torch.zeros(n_experts),
            histogram=torch.zeros(n_experts, len(BINS), dtype=torch.int32),
            class_fired=torch.zeros(n_experts, classes, dtype=torch.int64),
            contribution=torch.zeros(n_experts, d_model),
            top=Places.none(n_experts, top),
            sample=Places.none(n_experts, sample),
        )

    @classmethod
    def bytes(cls, n_experts: int, d_model: int, classes: int, top: int, sample: int) -> int:
        """The bytes that `none` would allocate."""
        with torch.device("meta"):
            return sum(part.nbytes for part in cls.none(n_experts, d_model, classes, top, sample).state().values())

    def add(self, a: Coefficients, m: Tensor | None, classes: Tensor, first_context: int, random: torch.Generator) -> None:
        """Takes in a batch.

        Args:
            a: the coefficients (B, T, K), on the CPU.
            m: the factor of ``Cᵀ a``, (B, T, D); None: there is none.
            classes: (B, T), each token's class, -1 for none.
            first_context: number of the batch's first context.
            random: draws the sample.
        """
        fired = Firings(a, first_context)
        expert, value = fired.expert, fired.value
        self.fired += torch.bincount(expert, minlength=len(self.fired))
        self.total.index_add_(0, expert, value.double())
        self.maximum.scatter_reduce_(0, expert, value, "amax")
        bins = torch.bucketize(value, torch.tensor(BINS[1:]), right=True)
        flat = self.histogram.view(-1)
        flat.index_add_(0, expert * len(BINS) + bins, torch.ones_like(expert, dtype=torch.int32))
        if self.class_fired.shape[1]:
            of = classes[fired.row, fired.position]
            known = of >= 0
            places = expert[known] * self.class_fired.shape[1] + of[known]
            self.class_fired.view(-1).index_add_(0, places, torch.ones_like(places))
        self._add_contribution(a, m)
        self.top.offer(fired, value, one_a_context=True)
        self.sample.offer(fired, torch.rand(len(value), generator=random).clamp_min(1e-30), one_a_context=False)

    def _add_contribution(self, a: Coefficients, m: Tensor | None) -> None:
        values, indices = a.values[:, 1:].flatten(0, 1).float(), a.indices[:, 1:].flatten(0, 1)
        if m is None:
            self.contribution += torch.zeros(len(self.fired)).index_add_(0, indices.flatten(), values.flatten())[:, None]
            return
        experts, place = indices.unique(return_inverse=True)
        rows = self.contribution.new_empty(len(experts), self.contribution.shape[1])
        self.contribution[experts] += scatter(values, place, m[:, 1:].flatten(0, 1).float(), rows)

    def state(self) -> dict[str, Tensor]:
        """All tensors by name, to be saved."""
        tensors = {}
        for part in fields(self):
            value = getattr(self, part.name)
            if isinstance(value, Places):
                tensors |= {f"{part.name}.{inner.name}": getattr(value, inner.name) for inner in fields(value)}
            else:
                tensors[part.name] = value
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restores saved tensors."""
        for name, mine in self.state().items():
            mine.copy_(tensors[name])
