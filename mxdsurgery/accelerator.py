"""Where a run computes: Accelerate on the recipe's device, with its precision and tracker."""

import importlib.util
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from mxdsurgery.compute import training_dtype
from mxdsurgery.errors import DeviceError, RecipeError
from mxdsurgery.parallel import processes
from mxdsurgery.recipe import Recipe

# Processes wait so long for each other: one may have more to do. The launcher ends them when one dies.
_PATIENCE = timedelta(days=7)


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Accelerate, on the recipe's device, with its precision and tracker.

    Raises:
        DeviceError: the device is not there.
        RecipeError: the tracker is not installed.
    """
    _check_tracker(recipe)
    start_processes(recipe)
    AcceleratorState._reset_state()  # a second conversion in the same process may want another precision
    accelerator = Accelerator(
        cpu=not _on_gpu(recipe),
        mixed_precision="bf16" if computes_in_bf16(recipe) else "no",
        log_with=None if recipe.tracker == "none" else recipe.tracker,
        project_dir=None if recipe.tracker == "none" else f"{recipe.out}.runs",
    )
    torch.manual_seed(recipe.seed)
    return accelerator


def start_processes(recipe: Recipe) -> None:
    """Lets the processes that were launched together know of each other; one alone has nothing to do.

    Raises:
        DeviceError: the recipe's device is not there.
    """
    compute_device(recipe)
    PartialState(cpu=not _on_gpu(recipe), timeout=_PATIENCE)


def alone(what: str) -> None:
    """Raises DeviceError where several processes were launched for something that one does."""
    if processes() > 1:
        raise DeviceError(
            f"{processes()} processes were launched for {what}", expected="one", fix="run it without accelerate launch"
        )


def compute_device(recipe: Recipe) -> str:
    """``cuda`` or ``cpu``: what the recipe's ``device`` means on this machine.

    Raises:
        DeviceError: it is not there.
    """
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("recipe key 'device' is 'cuda', which this machine does not have", expected="cpu")
    return "cuda" if _on_gpu(recipe) else "cpu"


def choose_kernels(accelerator: Accelerator, *, d_model: int, n_experts: int, k: int, tokens: int) -> str | None:
    """Puts the Triton kernels to use on a GPU if they beat plain torch on a step of this shape; says so in a line.

    Args:
        accelerator: of the run.
        d_model: D of the largest layer.
        n_experts: its N; 0 where nothing has experts.
        k: its K.
        tokens: per step.
    """
    if accelerator.device.type != "cuda" or n_experts == 0:
        return None
    if importlib.util.find_spec("triton") is None:
        return "plain torch: triton is not installed"
    from mxdsurgery.kernels import install_if_faster

    return str(install_if_faster(d_model, n_experts, k, tokens))


def computes_in_bf16(recipe: Recipe, d_model: int = 512, d_hidden: int = 2048) -> bool:
    """Whether training computes under bf16 autocast: as asked, or where products of D and H are faster so on the device."""
    return _in_bf16(recipe.precision, recipe, d_model, d_hidden)


def selects_in_bf16(recipe: Recipe, d_model: int = 512, n_experts: int = 4096) -> bool:
    """Whether training ranks all N experts in bf16: as asked, or where products of D and N are faster so on the device."""
    return _in_bf16(recipe.selection, recipe, d_model, n_experts)


def _in_bf16(asked: str, recipe: Recipe, d_in: int, d_out: int) -> bool:
    if asked != "auto":
        return asked == "bf16"
    if recipe.compute != "auto":
        return recipe.compute == "bfloat16"
    return training_dtype(compute_device(recipe), recipe.batch, d_in, max(1, d_out)).dtype == "bfloat16"


def _on_gpu(recipe: Recipe) -> bool:
    return recipe.device != "cpu" and torch.cuda.is_available()


def _check_tracker(recipe: Recipe) -> None:
    """Raises RecipeError for a tracker that is not installed: Accelerate would only warn and log nothing."""
    if recipe.tracker != "none" and importlib.util.find_spec(recipe.tracker) is None:
        raise RecipeError(
            f"recipe key 'tracker' is {recipe.tracker!r}, which is not installed",
            fix=f"pip install 'mxdsurgery[{recipe.tracker}]'",
        )
