"""Where a run computes: Accelerate on the recipe's device, with its precision and tracker."""

import importlib.util

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from mxdsurgery.errors import DeviceError, RecipeError
from mxdsurgery.recipe import Recipe


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Accelerate, on the recipe's device, with its precision and tracker.

    Raises:
        DeviceError: the device is not there, or several processes were launched.
        RecipeError: the tracker is not installed.
    """
    _check_tracker(recipe)
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("recipe key 'device' is 'cuda', which this machine does not have", expected="cpu")
    AcceleratorState._reset_state()  # a second conversion in the same process may want another precision
    accelerator = Accelerator(
        cpu=not _on_gpu(recipe),
        mixed_precision="bf16" if _uses_bf16(recipe) else "no",
        log_with=None if recipe.tracker == "none" else recipe.tracker,
        project_dir=None if recipe.tracker == "none" else f"{recipe.out}.runs",
    )
    if accelerator.num_processes > 1:
        raise DeviceError(
            f"{accelerator.num_processes} processes were launched", expected="one", fix="run without accelerate launch"
        )
    torch.manual_seed(recipe.seed)
    return accelerator


def _uses_bf16(recipe: Recipe) -> bool:
    """Whether training computes under bf16 autocast: as asked, or where the device multiplies bf16 matrices itself."""
    if recipe.precision != "auto":
        return recipe.precision == "bf16"
    if _on_gpu(recipe):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # On a CPU with AMX a step takes about half as long, and the layers come out as good.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # newer than torch 2.9
    return bool(capabilities.get("amx_bf16"))


def _on_gpu(recipe: Recipe) -> bool:
    return recipe.device != "cpu" and torch.cuda.is_available()


def _check_tracker(recipe: Recipe) -> None:
    """Raises RecipeError for a tracker that is not installed: Accelerate would only warn and log nothing."""
    if recipe.tracker != "none" and importlib.util.find_spec(recipe.tracker) is None:
        raise RecipeError(
            f"recipe key 'tracker' is {recipe.tracker!r}, which is not installed",
            fix=f"pip install 'mxdsurgery[{recipe.tracker}]'",
        )
