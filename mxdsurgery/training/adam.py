"""Adam whose moments are held in bfloat16, rounded at random: 4 bytes a parameter instead of 8.

In a step, Adam's second moment falls by a thousandth of itself at most, and neighbours in bfloat16 lie a 256th to a 128th
apart: rounded to the nearest, it would never fall. Here a moment is rounded up or down with the probabilities that make it
right on average (stochastic rounding). The step itself is torch's, in fp32, from moments that are widened a part at a time.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from mxdsurgery.hardware.randomness import generator_on
from mxdsurgery.layers.sparse import chunk_bytes
from mxdsurgery.recipe import Recipe

# What torch's Adam does by default.
_USUAL = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False, "maximize": False}
_MOMENTS = ("exp_avg", "exp_avg_sq")
# Bytes of an element that is worked on: both moments in fp32, and a random number for each.
_IN_WORK = 16
# One element is worked on at a time for so many bytes of a chunk: fewer than fit it, since random numbers are drawn for each.
_CHUNK_SHARE = 64


def make_adam(parameters: Iterable[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """Adam with moments as the recipe has them: torch's own in float32, or `RoundedAdam`.

    Args:
        parameters: fp32.
        recipe: lr, moments, seed.
    """
    if recipe.moments == "float32":
        return torch.optim.Adam(parameters, lr=recipe.lr, fused=True)
    return RoundedAdam(parameters, recipe.lr, recipe.seed)


def moment_bytes(recipe: Recipe) -> int:
    """Bytes of a parameter's two moments."""
    return len(_MOMENTS) * getattr(torch, recipe.moments).itemsize


def traffic_bytes(recipe: Recipe) -> int:
    """Bytes that a step reads and writes for a parameter: weight, gradient, moments, and what these become on the way."""
    usual = 4 * 4 + 3 * 4  # weight, gradient and moments are read in fp32; but for the gradient, they are written
    widened = 2 * (2 + 4)
    rounded = 2 * ((4 + 4 + 4) + (4 + 4) + (4 + 2))  # the noise is added, the lower half is set to 0, what is left is copied
    return usual if recipe.moments == "float32" else usual + widened + rounded


def step_bytes(recipe: Recipe, elements: int, device: str) -> int:
    """Bytes that a step takes beside weights, gradients and moments.

    Args:
        recipe: moments.
        elements: of the largest parameter, at most.
        device: its type, as ``cpu`` or ``cuda``.
    """
    return 0 if recipe.moments == "float32" else _IN_WORK * _worked_on(elements, device)


def _worked_on(elements: int, device: str) -> int:
    """As many elements as are worked on at a time, of a largest parameter of so many."""
    return min(elements, chunk_bytes(device) // _CHUNK_SHARE)


class RoundedAdam(torch.optim.Optimizer):
    """Adam with moments in bfloat16, rounded at random.

    The random numbers follow from the seed and the step alone: a training that is resumed, and each of several processes that
    train the same layers, draws the same. They are drawn anew at each step, for as many elements as are worked on at a time,
    and used for all of these in turn: each is right on average all the same, and drawing takes longer than all the rest.

    Args:
        parameters: fp32, contiguous; their gradients, too.
        lr: learning rate.
        seed: of the rounding.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, seed: int) -> None:
        super().__init__(parameters, {"lr": lr})
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of all parameters that have a gradient."""
        for group in self.param_groups:
            learning = [parameter for parameter in group["params"] if parameter.grad is not None]
            if learning:
                noise = self._noise(learning)
                for parameter in learning:
                    self._step(parameter, group["lr"], noise)

    def _noise(self, learning: Sequence[nn.Parameter]) -> Tensor:
        """Random numbers below 2^16 for both moments of the elements that are worked on at a time: (2, elements) int32."""
        device, done = learning[0].device, max(int(self.state[parameter].get("step", 0)) for parameter in learning)
        draw = generator_on(device)
        draw.manual_seed(int(np.random.SeedSequence([self.seed, done]).generate_state(1)[0]))
        size = 2, _worked_on(max(parameter.numel() for parameter in learning), device.type)
        return torch.randint(0, 2**16, size, dtype=torch.int32, device=draw.device, generator=draw).to(device)

    def _step(self, parameter: nn.Parameter, lr: float, noise: Tensor) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # on the CPU: it is asked for at every step
            state |= {name: torch.zeros_like(parameter, dtype=torch.bfloat16) for name in _MOMENTS}
        done = torch.full((), float(state["step"]), device=parameter.device)
        flat = (tensor.view(-1).split(noise.shape[1]) for tensor in (parameter, parameter.grad, *map(state.get, _MOMENTS)))
        for part, gradient, *moments in zip(*flat, strict=True):
            wide = [moment.float() for moment in moments]
            adam([part], [gradient], [wide[0]], [wide[1]], [], [done.clone()], fused=True, lr=lr, **_USUAL)
            for moment, exact, drawn in zip(moments, wide, noise, strict=True):
                moment.copy_(round_at_random(exact, drawn[: len(exact)]))
        state["step"] += 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state; torch takes all of it to be of the parameters' dtype."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state |= {name: state[name].bfloat16() for name in _MOMENTS if name in state}


def round_at_random(values: Tensor, noise: Tensor) -> Tensor:
    """Values that bfloat16 has, next to those given, up or down such that they are these on average.

    A bfloat16 is the upper half of a float32: it is rounded away from zero with the probability that the lower half, as a
    fraction, says. Source: Gupta et al., arXiv 1502.02551.

    Args:
        values: fp32; overwritten.
        noise: int32 of the same shape, evenly drawn from 0 to 2^16 - 1.
    """
    values.view(torch.int32).add_(noise).bitwise_and_(-(2**16))
    return values
