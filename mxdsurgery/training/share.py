"""``expert_share`` as a target: a penalty holds what the experts carry at what is asked for, while a layer learns.

A share can be won by a few directions that all experts lie in. So what is asked for has to be there both against experts that
are frozen at a constant (`expert_share`) and against a few experts, the same for every token, of any size and sign
(`few_experts_share`); the second is the harder, and the one that is trained for.

In each step, the share is known in the units of the distillation loss: how much of the way from an output of zero to the
layer's own is lost with a few experts. What users ask for, and what `evaluate` measures, is the same share of cross-entropy.
It falls faster than the share of the loss, in each layer at its own rate; so it is measured a few times on the way, on text of
its own (in KL: `measuring.shares`), and the layer learns by which power of one it has to ask for the other.

The penalty is small until the layer has learned what its block does; then it grows in layers that fall behind. Where the
experts carry enough nothing is added: a layer is not brought down to the target. docs/tried.md has other ways that were tried.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mxdsurgery.runs.parallel import sum_of_all
from mxdsurgery.training.cost import LayerPlan
from mxdsurgery.training.losses import distillation_loss, few_experts, how_few, zero_loss

# What the experts carry.
SHARES = ("expert_share", "few_experts_share")
# Measures the `expert_share` and `few_experts_share` of layers in training, by name; without those that are no numbers.
SharesOf = Callable[[Mapping[LayerPlan, nn.Module]], dict[LayerPlan, dict[str, float]]]

# The share is measured after these shares of the steps.
LOOKS = (0.08, 0.16, 0.3, 0.5, 0.65, 0.8, 0.9, 0.96)
# The penalty's weight: at first and at least, at most, and how many times it can grow e-fold in a training, from when on.
_LEAST, _MOST, _GROWTH, _GROWS_FROM = 0.3, 1.0, 9.0, 0.1
# A layer falls behind if more than this is missing of the share that is asked for.
_BEHIND = 0.02
# Of the loss's share, that of cross-entropy is about the square; a layer's own power is within these limits.
_POWER, _POWERS = 2.0, (0.5, 8.0)
# Shares of which a logarithm is taken are within these limits.
_SHARES = (0.02, 0.98)
# From this share of the loss on, a power says little.
_NEARLY_ALL = 0.8
# What is asked of the loss's share is at most this. Above 1, a few experts have to do worse than an output of zero: in some
# layers even that costs only half of what the layer is worth in cross-entropy. It grows by at most the root of the second
# number at a time, as what is measured on little text is rough.
_MOST_ASKED, _MOST_AT_ONCE = 3.0, 1.5
# The running figures of the loss are means over about so many steps.
_REMEMBERED = 10
# Where what there is is kept: the penalty's weight; the first few experts are found in so many passes, each of which brings
# them nearer so many more times; the loss that nothing is divided by less than.
_KEEPS, _FINDING, _FINDS, _LEAST_LOSS = 0.1, 10, 3, 1e-6


def look_steps(steps: int) -> list[int]:
    """After which steps, of so many, the share is measured."""
    return sorted({max(1, round(look * steps)) for look in LOOKS})


class ShareControl:
    """What is asked of one layer, and how strongly.

    Args:
        target: of `expert_share` and `few_experts_share`, above 0 and below 1.
        d_model: D.
        steps: of the training.
        device: of the training.

    Attributes:
        asked: share of the loss that is asked for in the end, as far as is known.
        weight: of the penalty, a scalar on the device.
    """

    def __init__(self, target: float, d_model: int, steps: int, device: torch.device) -> None:
        self.target, self.steps = min(target, _SHARES[1]), steps
        self.asked = self.target ** (1 / _POWER)
        self.weight = torch.tensor(_LEAST, device=device)
        # Running means of the loss, of the loss of an output of zero, and of the loss with a few experts.
        self.running = torch.zeros(3, device=device)
        self.few = _first_few(d_model, device)
        self.step = 0

    def penalty(
        self, loss: Tensor, zero: Tensor, scale: Tensor, rest: Tensor, y: Tensor, weights: Tensor, shares: int = 1
    ) -> Tensor:
        """What is added to the loss of a step.

        Args:
            loss: `distillation_loss` of the layer's output ``s * scale + rest``, of this process's tokens.
            zero: `zero_loss` of the same tokens.
            scale: (tokens, D), what the experts' sum is multiplied with.
            rest: (tokens, D), what is added.
            y: (tokens, D), the block's output.
            weights: (tokens, 1), the loss's.
            shares: processes that each have so many tokens of the batch.

        Returns:
            A scalar in the loss's units, of the whole batch.
        """
        said, self.few = few_experts(scale, y - rest, weights, self.few, shares)
        few = sum_of_all(distillation_loss(said * scale + rest, y, weights), shares) / shares
        loss, zero = sum_of_all(torch.stack([loss.detach(), zero]), shares) / shares
        self._follow(torch.stack([loss, zero, few.detach()]))
        return self.weight * torch.relu(self.asked * (zero - loss) - (few - loss))

    @torch.no_grad()
    def _follow(self, now: Tensor) -> None:
        """Remembers a step's loss, that of an output of zero, and that with a few experts; adapts the weight."""
        self.step += 1
        self.running += (now - self.running) / min(self.step, _REMEMBERED)
        if self.step > _GROWS_FROM * self.steps:
            loss, zero, few = self.running
            behind = self.asked * (zero - loss) - (few - loss) > _BEHIND * (zero - loss)
            rate = _GROWTH / self.steps
            self.weight *= torch.where(behind, math.exp(rate), math.exp(-rate / 2))
            self.weight.clamp_(_LEAST, _MOST)

    def share_of_loss(self) -> float:
        """The share that the experts carry of the loss, over the last steps; waits for the device."""
        loss, zero, few = self.running.tolist()
        return (few - loss) / max(zero - loss, 1e-30)

    def learn(self, share: float) -> None:
        """Asks for more or less of the loss, now that the share in the model's predictions was measured.

        By the power that the two shares show; where nearly all of the loss is lost already, of which a power says little, at
        least as if from there on it were `_POWER`.
        """
        reached, found = self.share_of_loss(), _limited(share, _SHARES)
        power = _limited(math.log(found) / math.log(_limited(reached, _SHARES)), _POWERS)
        self.asked = self.target ** (1 / power)
        if reached > _NEARLY_ALL:
            more = min(self.target / found, _MOST_AT_ONCE) ** (1 / _POWER)
            self.asked = min(max(self.asked, reached * more), _MOST_ASKED)

    def state(self) -> Tensor:
        """All that it goes on from, float64."""
        own = torch.tensor([self.asked, self.step, self.weight.item()], dtype=torch.float64)
        return torch.cat([own, self.running.double().cpu(), self.few.double().cpu().flatten()])

    def restore(self, state: Tensor) -> None:
        """Goes on from a `state`."""
        self.asked, self.step = state[0].item(), int(state[1])
        self.weight.fill_(state[2].item())
        self.running.copy_(state[3:6])
        self.few.copy_(state[6:].view_as(self.few))


class ShareKept:
    """Holds what a layer's experts carry at what it is, while the layer learns something else than its block's output.

    In units of the loss toward the layer's own output as it is now: the loss with a few experts, over that of an output of
    zero. In the first passes it is measured; from then on, what is missing of it is the penalty.

    Args:
        d_model: D.
        device: of the training.

    Attributes:
        asked: what a few experts have to lose, a scalar on the device; 0 while it is measured.
        lost: what they lost over the last passes, likewise.
    """

    def __init__(self, d_model: int, device: torch.device) -> None:
        self.few = self.used = _first_few(d_model, device)
        self.asked, self.lost = torch.zeros(2, device=device)
        self.passes = 0

    def penalty(
        self, scale: Tensor, rest: Tensor, now: Tensor, weights: Tensor, shares: int = 1, again: bool = False
    ) -> Tensor:
        """What is added to the objective of a pass.

        Args:
            scale: (tokens, D) fp32, what the experts' sum is multiplied with.
            rest: (tokens, D), what is added, without a gradient.
            now: (tokens, D), the layer's output, without a gradient.
            weights: (tokens, 1), the loss's.
            shares: processes that each have so many tokens of the batch.
            again: the same pass is computed a second time (gradient checkpointing): it has the same few, and teaches nothing.

        Returns:
            A scalar, of the whole batch.
        """
        if not again:
            self.used = self.few
        said, nearer = few_experts(scale, now - rest, weights, self.used, shares)
        few = sum_of_all(distillation_loss(said * scale + rest, now, weights), shares)
        lost = few / sum_of_all(zero_loss(now, weights), shares).clamp_min(_LEAST_LOSS)
        if not again:
            for _ in range(_FINDS if self.passes < _FINDING else 0):
                _, nearer = few_experts(scale, now - rest, weights, nearer, shares)
            self._follow(lost.detach(), nearer)
        return _KEEPS * torch.where(self.lost < self.asked, self.asked - lost, 0.0)

    def _follow(self, lost: Tensor, few: Tensor) -> None:
        """Remembers what the few lost in a pass, and better ones."""
        self.few, self.passes = few, self.passes + 1
        since = self.passes - _FINDING
        if since > 0:
            self.lost = self.lost + (lost - self.lost) / min(since, _REMEMBERED)
        if since == _REMEMBERED:
            self.asked = self.lost

    def state(self) -> Tensor:
        """All that it goes on from, float64."""
        own = torch.stack([torch.tensor(float(self.passes)), self.asked.cpu(), self.lost.cpu()])
        return torch.cat([own, self.few.cpu().flatten()]).double()

    def restore(self, state: Tensor) -> None:
        """Goes on from a `state`."""
        self.passes = int(state[0])
        self.asked, self.lost = state[1:3].to(self.few)
        self.few = self.used = state[3:].to(self.few).view_as(self.few)


def _first_few(d_model: int, device: torch.device) -> Tensor:
    """A few experts (D, r) to begin with, as columns: the same in every process."""
    start = torch.randn(d_model, how_few(d_model), generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(start)[0].to(device)


def _limited(value: float, limits: tuple[float, float]) -> float:
    return min(max(value, limits[0]), limits[1])
