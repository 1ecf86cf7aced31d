"""Where a run computes: Accelerate on the recipe's device, with its precision and tracker."""

import importlib.util
import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from mxdsurgery.errors import DeviceError, RecipeError
from mxdsurgery.hardware.compute import training_dtype
from mxdsurgery.hardware.device import check_device
from mxdsurgery.layers import sparse
from mxdsurgery.recipe import Recipe
from mxdsurgery.runs.parallel import processes

# Processes wait so long for each other: one may have more to do. The launcher ends them when one dies.
_PATIENCE = timedelta(days=7)
# Types of device that Triton compiles for.
_TRITON_DEVICES = ("cuda", "xpu")


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Accelerate, on the recipe's device, with its precision and tracker.

    Raises:
        DeviceError: the device is not there, or Accelerate takes another one or cannot use it in several processes.
        RecipeError: the tracker is not installed.
    """
    _check_tracker(recipe)
    device = check_device(recipe.device)
    # A second run in the same process may want another precision, or another device.
    AcceleratorState._reset_state(reset_partial_state=processes() == 1)
    start_processes(recipe)
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision="bf16" if computes_in_bf16(recipe) else "no",
        log_with=None if recipe.tracker == "none" else recipe.tracker,
        project_dir=None if recipe.tracker == "none" else f"{recipe.out}.runs",
    )
    _check_agrees(accelerator, device)
    return accelerator


def start_processes(recipe: Recipe) -> None:
    """Connects the processes that were launched together; for a single process there is nothing to connect.

    Raises:
        DeviceError: the recipe's device is not there.
    """
    PartialState(cpu=check_device(recipe.device) == "cpu", timeout=_PATIENCE)


def _check_agrees(accelerator: Accelerator, device: str) -> None:
    """Raises DeviceError where Accelerate chose another device, or where launched processes are not connected.

    Accelerate asks torch and its own environment variables.
    """
    if accelerator.device.type != device:
        raise DeviceError(
            f"accelerate computes on {accelerator.device.type}, not on {device}",
            expected=device,
            fix=f"unset ACCELERATE_TORCH_DEVICE and ACCELERATE_USE_CPU, or --device {accelerator.device.type}",
        )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched > 1 and processes() == 1:
        raise DeviceError(
            f"{launched} processes were launched, and on {device} they do not work together",
            expected="one process, or several that torchrun or accelerate launch started, with a back end for the device",
            fix="run it alone (WORLD_SIZE unset), or with --device cpu",
        )


def alone(what: str) -> None:
    """Raises DeviceError where several processes were launched for something that one does."""
    if processes() > 1:
        raise DeviceError(
            f"{processes()} processes were launched for {what}", expected="one", fix="run it without accelerate launch"
        )


def choose_kernels(
    accelerator: Accelerator, *, d_model: int, n_experts: int, k: int, tokens: int, selection: torch.dtype | None
) -> str | None:
    """Puts Triton kernels to use, on a device for which there are any, where they beat plain torch on a step of this shape.

    Args:
        accelerator: of the run.
        d_model: D of the largest layer.
        n_experts: its N; 0 where nothing has experts.
        k: its K.
        tokens: per step.
        selection: what the step ranks in, as `ranks_in` says.

    Returns:
        What was found, in a line; None where there was nothing to try.
    """
    device = accelerator.device.type
    if device not in _TRITON_DEVICES or n_experts == 0:
        return None
    if importlib.util.find_spec("triton") is None:
        return "plain torch: triton is not installed"
    from mxdsurgery.training.trial import install_if_faster

    return "; ".join(map(str, install_if_faster(d_model, n_experts, k, tokens, device, selection)))


def kernels_used(accelerator: Accelerator) -> list[str]:
    """The names of the Triton kernels that are in use on the run's device."""
    return list(sparse.KERNELS.get(accelerator.device.type, {}))


def use_kernels(accelerator: Accelerator, names: list[str]) -> None:
    """Puts these Triton kernels to use on the run's device, and plain torch for all else, whatever was in use before.

    Raises:
        DeviceError: Triton is not installed here.
    """
    if not names:
        sparse.KERNELS.pop(accelerator.device.type, None)
    elif kernels_used(accelerator) != names:
        if importlib.util.find_spec("triton") is None:
            raise DeviceError(
                "the first process uses Triton kernels, and triton is not installed where another one runs",
                expected="the same packages for all processes",
                fix="install triton there, or uninstall it here",
            )
        from mxdsurgery.training.trial import install

        install(accelerator.device.type, names)


def computes_in_bf16(recipe: Recipe, d_model: int = 512, d_hidden: int = 2048) -> bool:
    """Whether training computes under bf16 autocast: as asked, or where products of D and H are faster in bf16 here."""
    return _in_bf16(recipe.precision, recipe, d_model, d_hidden)


def selects_in_bf16(recipe: Recipe, d_model: int = 512, n_experts: int = 4096) -> bool:
    """Whether training ranks all N experts in bf16: as asked, or where products of D and N are faster in bf16 here."""
    return _in_bf16(recipe.selection, recipe, d_model, n_experts)


def ranks_in(recipe: Recipe) -> torch.dtype | None:
    """What training ranks all N experts in, as `sparse.select` takes it; None: the weights' own."""
    return torch.bfloat16 if selects_in_bf16(recipe) else None


def _in_bf16(asked: str, recipe: Recipe, d_in: int, d_out: int) -> bool:
    if asked != "auto":
        return asked == "bf16"
    if recipe.compute != "auto":
        return recipe.compute == "bfloat16"
    return training_dtype(check_device(recipe.device), recipe.batch, d_in, max(1, d_out)).dtype == "bfloat16"


def _check_tracker(recipe: Recipe) -> None:
    """Raises RecipeError for a tracker that is not installed: Accelerate would only warn and log nothing."""
    if recipe.tracker != "none" and importlib.util.find_spec(recipe.tracker) is None:
        raise RecipeError(
            f"recipe key 'tracker' is {recipe.tracker!r}, which is not installed",
            fix=f"pip install 'mxdsurgery[{recipe.tracker}]'",
        )
