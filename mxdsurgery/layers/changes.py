"""What one change does to the coefficients of a gate, or to the rows of C. Travels with every exported checkpoint.

Which changes are in force where, in_force.py knows; interventions.py makes them from what a user says.

Shapes: B batch, T tokens, D model width, M changed experts; a gate gives (..., K) coefficients of K chosen experts.
"""

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .layer import Coefficients, Experts, Gate
from .sparse import mix

Positions = Iterable[int] | slice | Tensor


class InterventionError(ValueError):
    """An invalid layer, expert or number; the message says what was found and what is possible."""


class RunningPass:
    """Where in the text the tokens of this thread's running forward pass stand; hooks on the model say it."""

    # batch: B; tokens: T; start: the first token's position, after those in a KV cache. Nothing outside of a forward pass.
    _here = threading.local()

    @staticmethod
    @torch.compiler.disable(reason="where the tokens stand is kept by thread, outside of compiled code")
    def begins(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook of the model."""
        given = next(v for v in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if v is not None)
        cache = kwargs.get("past_key_values")
        here = RunningPass._here
        here.batch, here.tokens = given.shape[:2]
        here.start = 0 if cache is None else int(cache.get_seq_length())

    @staticmethod
    @torch.compiler.disable(reason="where the tokens stand is kept by thread, outside of compiled code")
    def ends(*_) -> None:
        """A forward hook of the model."""
        RunningPass._here.start = None

    @staticmethod
    def chosen(positions: Positions, like: Tensor) -> Tensor:
        """Which tokens are at the positions: bool, like (..., K) without its last dimension."""
        here = RunningPass._here
        if getattr(here, "start", None) is None:
            raise InterventionError(
                "positions are known inside the model's own forward pass only, and not where torch.compile skips its hooks: "
                "open the context before the model is compiled, or leave positions out"
            )
        places = torch.arange(here.start, here.start + here.tokens, device=like.device)
        if isinstance(positions, Tensor) and positions.dtype == torch.bool:
            if len(positions) == 0 or here.batch % len(positions):
                raise InterventionError(f"a mask of {len(positions)} rows for a batch of {here.batch}")
            # generate() runs each row so many times, one after the other: beams, or several sequences.
            positions = positions.repeat_interleave(here.batch // len(positions), dim=0)
            inside = places < positions.shape[1]
            mask = positions.to(like.device)[:, places.clamp_max(positions.shape[1] - 1)] & inside
        elif isinstance(positions, slice):
            step = positions.step or 1
            mask = (places >= (positions.start or 0)) & ((places - (positions.start or 0)) % step == 0)
            mask = mask if positions.stop is None else mask & (places < positions.stop)
        else:
            mask = torch.isin(places, torch.as_tensor(positions, device=like.device))
        return mask.expand(here.batch, here.tokens).reshape(like.shape[:-1])


@dataclass(frozen=True, eq=False)
class Change:
    """One kind of change to some experts of a layer.

    Attributes:
        kind: ``drop``, ``ablate``, ``scale``, ``steer``, ``clamp``, ``copy`` or ``merge``.
        experts: (M,) int64.
        amounts: (M,) float32, the numbers of ``scale``, ``steer`` and ``clamp``; (M,) int64, the source experts of ``copy``;
            int64, the group sizes of ``merge``, whose groups follow each other in ``experts``.
        when: for ``steer`` and ``clamp``: ``always``, or where the gate chose the expert (``firing``) or not (``silent``).
        positions: where in the text; None: everywhere.
    """

    kind: str
    experts: Tensor
    amounts: Tensor | None = None
    when: str = "always"
    positions: Positions | None = None

    def here(self, like: Tensor) -> Tensor | None:
        """The tokens that it changes: bool, like (..., K) without its last dimension; None: all of them."""
        return None if self.positions is None else RunningPass.chosen(self.positions, like)

    def on(self, device: torch.device) -> "Change":
        """The same with its tensors on a device."""
        if self.experts.device == device:
            return self
        amounts = None if self.amounts is None else self.amounts.to(device)
        return replace(self, experts=self.experts.to(device), amounts=amounts)

    def apply(self, a: Coefficients, chosen: Coefficients) -> Coefficients:
        """The changed coefficients; ``chosen`` are those that the gate gave."""
        here = self.here(a.values)
        if self.kind == "copy":
            which, mine = find(self.experts, a.indices)
            return Coefficients(a.values, torch.where(mine & _every(here), self.amounts[which], a.indices))
        if self.kind == "merge":
            return self._merged(a, here)
        if self.kind in ("ablate", "scale"):
            which, mine = find(self.experts, a.indices)
            factors = 0 if self.kind == "ablate" else self.amounts.to(a.values)[which]
            return Coefficients(a.values * torch.where(mine & _every(here), factors, 1), a.indices)
        fires = ((chosen.indices[..., None] == self.experts) & (chosen.values > 0)[..., None]).any(-2)  # (..., M)
        told = {"always": torch.ones_like(fires), "firing": fires, "silent": ~fires}[self.when]
        told = told if here is None else told & here[..., None]
        values = a.values
        if self.kind == "clamp":
            values = values.masked_fill(((a.indices[..., None] == self.experts) & told[..., None, :]).any(-1), 0)
        added = self.amounts.to(values.dtype) * told
        indices = self.experts.expand_as(added)
        return Coefficients(torch.cat([values, added], -1), torch.cat([a.indices, indices], -1))

    def _merged(self, a: Coefficients, here: Tensor | None) -> Coefficients:
        """Splits each coefficient of a group's expert equally among all experts of the group."""
        values, indices = [a.values], [a.indices]
        for group in self.experts.split(self.amounts.tolist()):
            member = torch.isin(a.indices, group) & _every(here)
            summed = (a.values * member).sum(-1, keepdim=True) / len(group)  # (..., 1)
            values[0] = values[0].masked_fill(member, 0)
            values.append(summed.expand(*summed.shape[:-1], len(group)))
            indices.append(group.expand_as(values[-1]))
        return Coefficients(torch.cat(values, -1), torch.cat(indices, -1))


def change_coefficients(gate: Gate, x: Tensor, changes: Sequence[Change]) -> Coefficients:
    """Chooses for x (..., D) without the experts that are dropped, and changes the coefficients of the chosen ones."""
    changes = [change.on(x.device) for change in changes]  # an offloaded gate is on a device only while it runs
    drops = [change for change in changes if change.kind == "drop"]
    everywhere = [change.experts for change in drops if change.positions is None]
    somewhere = [change for change in drops if change.positions is not None]
    bias = gate.bias.index_fill(0, torch.cat(everywhere), -math.inf) if everywhere else gate.bias
    chosen = gate.choose(x, bias, spare=sum(len(change.experts) for change in somewhere))
    if somewhere:
        values = chosen.values
        for change in somewhere:
            out = torch.isin(chosen.indices, change.experts) & change.here(values)[..., None]
            values = values.masked_fill(out, 0)
        values, best = values.topk(min(gate.active, values.shape[-1]), dim=-1)
        chosen = Coefficients(values, chosen.indices.gather(-1, best))
    a = chosen
    for change in changes:
        a = a if change.kind == "drop" else change.apply(a, chosen)
    return a


def mix_with_rows(experts: Experts, a: Coefficients, rows: Mapping[int, Tensor]) -> Tensor:
    """``Cᵀ a`` (..., D) with other rows (D,) in the place of some experts': a (..., K)."""
    weight = experts.weight
    place, mine = find(torch.tensor(list(rows), device=weight.device), a.indices)
    others = torch.stack([row.to(weight) for row in rows.values()])
    active = a.values.shape[-1]
    theirs = a.values.masked_fill(~mine, 0).reshape(-1, active)
    mixed = mix(theirs, place.reshape(-1, active), others).view(*a.values.shape[:-1], -1)
    return experts.mix(Coefficients(a.values.masked_fill(mine, 0), a.indices)) + mixed


def find(experts: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """For each of the indices (..., K): its place in ``experts`` (M,), and whether it is among them at all; both (..., K)."""
    order = experts.sort()
    place = torch.searchsorted(order.values, indices).clamp_max(len(experts) - 1)
    return order.indices[place], order.values[place] == indices


def _every(here: Tensor | None) -> Tensor | bool:
    return torch.tensor(True) if here is None else here[..., None]
