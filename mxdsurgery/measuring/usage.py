"""How a layer does on a text, and how it uses its experts: how often each fires, how strongly, what their sum looks like.

Shapes: n tokens, D model width, N experts.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mxdsurgery.hardware.device import widest
from mxdsurgery.layers.layer import Coefficients
from mxdsurgery.measuring import controls
from mxdsurgery.measuring.controls import Usage
from mxdsurgery.measuring.intervals import frequency_decades


class UsageSums:
    """Sums over the tokens of a text of how one layer uses its experts on original inputs.

    The best constant for the experts' term s of a layer ``s * m + r`` is the least-squares one of each dimension,
    ``c = Σ m (y - r) / Σ m²``; in a Mixture of Decoders, ``s = Cᵀ a``, ``m = D z`` and ``r = b``.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.sums: dict[str, Tensor | int] = defaultdict(int)
        self.errors: list[Tensor] = []  # ‖ŷ - y‖² / ‖y‖² of each token

    @torch.no_grad()
    def add(self, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        """Counts tokens in: the block's x and y (n, D), y in the widest dtype."""
        m, r = (part.to(y.dtype).expand_as(y) for part in layer.dense_path(x))
        s, used = use(layer, x)
        error = (m if s is None else s * m) + r - y
        self.errors.append(error.square().sum(-1) / y.square().sum(-1).clamp_min(1e-30))
        new = {"my": (m * (y - r)).sum(0), "mm": m.square().sum(0)} | used
        for name, value in new.items():
            self.sums[name] = self.sums[name] + value
        self.tokens += len(x)

    def usage(self) -> Usage:
        """What they say of the layer."""
        my, mm, fired, amount, ss = (self.sums[name] for name in ("my", "mm", "fired", "amount", "ss"))
        few = controls.main_directions(ss, mm) if len(fired) else None
        median = torch.cat(self.errors).median().item()
        return Usage(my / mm.clamp_min(1e-30), few, fired, amount, self.tokens, median)


@torch.no_grad()
def use(layer: nn.Module, x: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The experts' term ``s = Cᵀ a`` on tokens x (n, D), None without experts; `firings`, sums of coefficients, ``Σ s sᵀ``."""
    if not hasattr(layer, "gate"):
        return None, dict.fromkeys(("fired", "amount", "ss"), firings(layer, x))
    a, wide = layer.coefficients(x), widest(x.device)
    s = layer.mixture(a, x).to(wide)
    fired = _fired(a, layer.gate.n_experts)
    amount = torch.bincount(a.indices.flatten(), a.values.flatten().to(wide), minlength=len(fired))
    return s, {"fired": fired, "amount": amount, "ss": s.T @ s}


def firings(layer: nn.Module, x: Tensor) -> Tensor:
    """On how many of the tokens x (n, D) each expert fires: (N,) int64; empty without experts."""
    if not hasattr(layer, "gate"):
        return torch.zeros(0, dtype=torch.int64, device=x.device)
    return _fired(layer.coefficients(x), layer.gate.n_experts)


def _fired(a: Coefficients, n_experts: int) -> Tensor:
    """How many of the coefficients of each expert are above zero: (N,) int64."""
    return torch.bincount(a.indices[a.values > 0], minlength=n_experts)


def usage_figures(usage: Sequence[Usage]) -> dict[str, Any]:
    """The median error, the mean over layers; and how the experts are used on these tokens: L0, the share that never fired,
    firing frequencies by decade. These are None where there are no experts.
    """
    frequency = torch.cat([layer.fired.cpu().double() / layer.tokens for layer in usage])
    median = {"median_error": sum(layer.median_error for layer in usage) / len(usage)}
    if len(frequency) == 0:
        return median | {"l0": None, "dead_share": None, "firing_frequency": None}
    return median | {
        "l0": sum(layer.fired.sum().item() / layer.tokens for layer in usage) / len(usage),
        "dead_share": (frequency == 0).double().mean().item(),
        "firing_frequency": frequency_decades(frequency),
    }
