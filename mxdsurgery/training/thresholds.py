"""How the thresholds of a `jumprelu` gate are learned, one for each expert, so that a token has K experts on average.

Source: Rajamanoharan et al., arXiv 2407.14435, and Gemma Scope's transcoders. A coefficient is ``z H(z - θ)``, whose
derivative by θ is zero almost everywhere. In its place stands that of a kernel, a rectangle of width ``ε = _WIDTH θ`` around
θ: a firing on the brink counts for what it is worth. What is learned is ``log θ``. Against that worth stands a price for
every firing, the weight of an L0 penalty. There it is a setting; here K is, and the price is steered: it is what a firing on
the brink is worth on average over all experts, so that thresholds move against each other. All of them together follow the L0
of the last batch.

Shapes: n tokens, N experts; a gate gives ``active`` coefficients of a token.
"""

import torch
from torch import Tensor

from mxdsurgery.layers.layer import Gate
from mxdsurgery.layers.sparse import select

# The kernel's width, as a share of θ.
_WIDTH = 0.1
# All thresholds move by this share of the way to those with which the last batch would have had K per token.
_FOLLOWS = 0.3
# No threshold is less than this share of the mean coefficient: in shares of itself, it would take long to grow again.
_LEAST = 0.1


class LearnedThresholds:
    """The thresholds of one gate while it trains; the gate asks for them, and has its own brought up to date.

    Args:
        gate: with ``sparsity: jumprelu``. Where its thresholds are zero, they begin where the first batch has K per token.

    Attributes:
        log: ``log θ`` (N,) fp32, with the gradient of what is learned; an optimiser is to step along it.
    """

    def __init__(self, gate: Gate) -> None:
        self.gate, gate.learning = gate, self
        self.begun = bool(gate.threshold.any())
        self.log = gate.threshold.clamp_min(torch.finfo(torch.float32).tiny).log().requires_grad_()
        self.near = torch.zeros_like(gate.threshold)  # since the last step, as what follows: firings on the brink
        self.off, self.fired, self.total = (self.near.new_zeros(()) for _ in range(3))
        self.passes = 0

    @torch.no_grad()
    def begin(self, x: Tensor) -> None:
        """Sets all thresholds to the pre-activation that K per token of x (n, D) reach."""
        values, _ = select(x, self.gate.weight, self.gate.bias, self.gate.active, self.gate.selection)
        kept = values.flatten().topk(self.gate.k * len(x), sorted=False).values
        self.log.copy_(torch.maximum(kept.min(), _LEAST * kept.relu().mean()).clamp_min(1e-30).log())
        self.gate.threshold.copy_(self.log.exp())
        self.begun = True

    def watched(self, values: Tensor, margins: Tensor, indices: Tensor) -> Tensor:
        """The coefficients with the kernel's derivative by ``log θ``: all (n, ``active``); margins are ``z - θ``."""
        thresholds = self.log.exp()[indices]
        with torch.no_grad():
            near = (margins.abs() < _WIDTH / 2 * thresholds).to(values.dtype) / _WIDTH
            self.near.index_add_(0, indices.flatten(), near.flatten().to(self.near.dtype))
            exceeds = 1 + margins / thresholds  # by this factor; K per token would exceed this by the least of:
            least = exceeds.flatten().topk(self.gate.k * len(values), sorted=False).values.min()
            self.off += least.clamp_min(_LEAST).log()
            self.fired += (margins > 0).sum()
            self.total += values.sum()
            self.passes += 1
        return values - near * (thresholds - thresholds.detach())

    @torch.no_grad()
    def charge(self) -> None:
        """After the backward pass: takes the price of a firing off what each is worth."""
        if self.log.grad is not None:
            price = (self.log.grad.sum() / self.near.sum().clamp_min(1)).clamp_min(0)
            self.log.grad -= price * self.near

    @torch.no_grad()
    def follow(self) -> None:
        """After the optimiser's step: moves all thresholds toward K per token, and tells the gate.

        A gate in evaluation mode, as in healing, asks for nothing: its thresholds stay.
        """
        if not self.passes:
            return
        self.log += _FOLLOWS * self.off / self.passes
        self.log.clamp_min_((_LEAST * self.total / self.fired.clamp_min(1)).clamp_min(1e-30).log())
        self.gate.threshold.copy_(self.log.exp())
        for record in (self.near, self.off, self.fired, self.total):
            record.zero_()
        self.passes = 0

    def restore(self, log: Tensor) -> None:
        """Goes on from thresholds ``log θ`` (N,) of a run that was stopped."""
        self.log.detach().copy_(log)
        self.begun = True
