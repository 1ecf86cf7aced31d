"""Puts the Triton kernels to use where they agree with plain torch and beat it, on the device and at the sizes of a run.

There are two trials: of the gate's choice (`gate_kernels`), and of the sparse products (`kernels`). Each decides for its own.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxdsurgery.errors import first_line
from mxdsurgery.hardware.timing import median_seconds
from mxdsurgery.layers import sparse
from mxdsurgery.training import gate_kernels, kernels

# Largest |difference| / largest |value| between two float32 sums of the same terms in another order.
_TOLERANCE = 1e-4
# Where the kernels are, by the name in `mxdsurgery.layers.sparse` of what they stand in for.
_PRODUCTS, _CHOICE = ("mix", "dots", "scatter"), ("select",)
_MODULES = dict.fromkeys(_PRODUCTS, kernels) | dict.fromkeys(_CHOICE, gate_kernels)


@dataclass(frozen=True)
class Trial:
    """Kernels beside plain torch on random data.

    Attributes:
        what: they compute.
        plain: milliseconds in plain torch.
        triton: milliseconds with the kernels; None where they do not run here.
        error: largest |difference| / largest |value|; infinite where they do not run.
        failure: why they do not run.
    """

    what: str
    plain: float
    triton: float | None
    error: float
    failure: str | None = None

    @property
    def worthwhile(self) -> bool:
        """Whether the kernels are right and faster."""
        return self.triton is not None and self.error <= _TOLERANCE and self.triton < self.plain

    def __str__(self) -> str:
        if self.triton is None:
            return f"{self.what} in plain torch: Triton's do not run here ({self.failure})"
        if self.error > _TOLERANCE:
            return f"{self.what} in plain torch: Triton's are {self.error:.0e} off here, relative"
        chosen = "Triton" if self.worthwhile else "plain torch"
        return f"{self.what} in {chosen}: {self.triton:.3g} ms in Triton, {self.plain:.3g} ms in plain torch"


def install(device: str = "cuda", names: Iterable[str] = tuple(_MODULES)) -> None:
    """Makes `mxdsurgery.layers.sparse` use kernels, all or those of some names, for tensors on a type of device."""
    sparse.KERNELS[device] = {name: getattr(_MODULES[name], name) for name in names}


def install_if_faster(
    d_model: int, n_experts: int, k: int, tokens: int, device: str = "cuda", selection: torch.dtype | None = None
) -> list[Trial]:
    """Tries the kernels at a run's sizes, leaves those installed that are worthwhile, and says what was found.

    Args:
        d_model: D.
        n_experts: N.
        k: K.
        tokens: n, of a step.
        device: a type.
        selection: as of `sparse.select`.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, d_model, generator=generator).to(device) for rows in (tokens, n_experts))
    # Some experts are used far more than others, as in training.
    bias = torch.randn(n_experts, generator=generator).mul_(0.5 * d_model**0.5).to(device)
    sparse.KERNELS.pop(device, None)
    values, indices = sparse.select(x, weight, bias, k, selection)

    def products() -> list[Tensor]:
        given = (values, indices, weight), (x, indices, weight), (values, indices, x, weight)
        functions = (sparse.mix, sparse.dots, sparse.scatter)
        return [function(*arguments) for function, arguments in zip(functions, given, strict=True)]

    def choice() -> tuple[Tensor, Tensor]:
        return sparse.select(x, weight, bias, k, selection)

    def choice_error(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> float:
        return _choice_error(*found, wanted[0], sparse.dots(x, found[1], weight) + bias[found[1]])

    trials = [_tried("the sparse products", _PRODUCTS, products, _products_error, device)]
    if gate_kernels.applies(n_experts, k, selection or weight.dtype):  # it computes products too, in the better way
        trials.append(_tried("the gate's choice", _CHOICE, choice, choice_error, device))
    return trials


def _tried(
    what: str, names: tuple[str, ...], compute: Callable[[], Any], error_of: Callable[[Any, Any], float], device: str
) -> Trial:
    """A trial of some kernels, which stay installed if they are worthwhile."""
    before = sparse.KERNELS.get(device, {})
    wanted, plain = compute(), 1000 * median_seconds(compute, 0.1)
    install(device, (*before, *names))
    try:
        error = error_of(compute(), wanted)
        trial = Trial(what, plain, 1000 * median_seconds(compute, 0.1), error if error == error else float("inf"))
    except Exception as error:  # Triton compiles here, with whatever compiler and driver there are
        trial = Trial(what, plain, None, float("inf"), f"{type(error).__name__}: {first_line(error)}")
    if not trial.worthwhile:
        install(device, before)
        if not before:
            del sparse.KERNELS[device]
    return trial


def _products_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    return torch.stack([(a - b).abs().max() / b.abs().max() for a, b in zip(found, wanted, strict=True)]).max().item()


def _choice_error(values: Tensor, indices: Tensor, wanted: Tensor, exact: Tensor) -> float:
    """How far values are from the exact ones of their indices, or a token's are in sum below those that were wanted.

    To choose others than were wanted is no error: either choice is one of candidates that were ranked in low precision.
    """
    if (indices.sort().values.diff() == 0).any():  # an expert twice
        return float("inf")
    missed = (wanted.sum(1) - values.sum(1)) / wanted.abs().sum(1)
    return torch.stack([(values - exact).abs().max() / exact.abs().max(), missed.max()]).max().item()
