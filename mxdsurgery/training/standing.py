"""A layer in training, in its block's place in the model that is trained end to end."""

import torch
from torch import Tensor, nn

from mxdsurgery.layers.sparse import without_autocast
from mxdsurgery.runs.parallel import sum_of_all
from mxdsurgery.training.distill import LayerInTraining
from mxdsurgery.training.losses import distillation_loss, frozen_gain, token_weights, zero_loss


class Standing(nn.Module):
    """A layer in training, in fp32, in a block's place in a model of another dtype; it computes its own part of the loss.

    Args:
        job: the layer, and what it is asked for.
        local: weight of its squared distance from the block's output, over the output's size.

    Attributes:
        target: the block's output in the original model (B, T, D), to be set before each pass; None: its own.
        tokens_seen: of the training, those of the pass included.
        loss: after a pass, its part of the objective.
        watched: whether a pass counts in the statistics; recomputing it in the backward pass does not.
    """

    def __init__(self, job: LayerInTraining, local: float) -> None:
        super().__init__()
        self.job, self.local = job, local
        self.target: Tensor | None = None
        self.tokens_seen = 0
        self.loss: Tensor | None = None
        self.watched = True

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output in place of its block's: (B, T, D) -> (B, T, D), in x's dtype."""
        job, layer, dtype = self.job, self.job.layer, x.dtype
        x = x.float()
        (scale, rest), a = layer.dense_path(x), None
        if job.experts is None:
            y_hat = scale + rest
        else:
            a = layer.coefficients(x)
            y_hat = layer.mixture(a, x) * scale + rest
        flat = y_hat.flatten(0, -2)
        y = flat.detach().float() if self.target is None else self.target.flatten(0, -2).float()
        weights = token_weights(y, job.shares)
        size = self._size(y, weights)
        loss = distillation_loss(flat, y, weights)
        self.loss = self.local * loss / size
        if job.specialise > 0 or job.share is not None:
            self.loss = self.loss + self._without_choice(flat, scale.flatten(0, -2), rest.expand_as(y_hat).flatten(0, -2))
        if self.watched:
            with torch.no_grad():
                error, power = (flat - y).square().sum(), y.square().sum()
                job.sums += torch.stack([loss.detach(), size, error, power])
                if a is not None:
                    fired = (a.values > 0).flatten() * self.tokens_seen
                    job.last_fired.scatter_reduce_(0, a.indices.flatten(), fired, "amax")
        return y_hat.to(dtype)

    def _size(self, y: Tensor, weights: Tensor) -> Tensor:
        """The loss of an output of zero in place of y (tokens, D), over the tokens of all processes that share the text."""
        return sum_of_all(zero_loss(y, weights), self.job.shares).div(self.job.shares).clamp_min(1e-6)

    def _without_choice(self, now: Tensor, scale: Tensor, rest: Tensor) -> Tensor:
        """The penalty on what experts could do without choosing, of the present output (tokens, D): the input changes."""
        job, now, rest = self.job, now.detach().float(), rest.detach().float()
        penalty = torch.zeros((), device=now.device)
        with without_autocast(now.device.type):
            weights = token_weights(now, job.shares)
            if job.specialise > 0:
                gain = frozen_gain(scale, now - rest, weights, job.shares)
                penalty = penalty + job.specialise * gain / self._size(now, weights)
            if job.share is not None:
                again = not self.watched
                penalty = penalty + job.share.penalty(scale.float(), rest, now, weights, job.shares, again)
        return penalty
