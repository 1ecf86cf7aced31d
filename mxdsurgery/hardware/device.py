"""Which device a run computes on, what that device is and can do, for any device that torch's accelerator API knows.

A machine has the CPU and at most one type of accelerator: ``cuda`` (NVIDIA, and AMD under ROCm), ``mps`` (Apple), ``xpu``
(Intel), or another that a plug-in of torch brings. Devices are named by their type.
"""

import ctypes
import functools
import os

import torch

from mxdsurgery.errors import DeviceError


def devices() -> list[str]:
    """What this machine can compute on: ``cpu``, and the accelerator's type if there is one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def meant(name: str) -> str:
    """The type of device that a recipe's ``device`` means, whether or not it is here: ``auto`` is the last of `devices`."""
    return devices()[-1] if name == "auto" else name


def check_device(name: str) -> str:
    """As `meant`, for a device that has to be on this machine.

    Raises:
        DeviceError: it is not.
    """
    there, wanted = devices(), meant(name)
    if wanted not in there:
        raise DeviceError(
            f"recipe key 'device' is {name!r}, which this machine does not have, or this build of torch cannot use",
            expected=" or ".join(there),
            fix=f"--device {there[-1]}, or --device auto",
        )
    return wanted


def shares_host_memory(device: str) -> bool:
    """Whether a type of device uses the CPU's memory."""
    return device in ("cpu", "mps")


def copies_from_pinned_memory() -> bool:
    """Whether batches come faster to this machine's accelerator from memory that cannot be swapped out."""
    return devices()[-1] in ("cuda", "xpu")


def widest(device: torch.device | str) -> torch.dtype:
    """float64 for sums over many tokens, or float32 on a device that has nothing wider, as Apple's and some of Intel's."""
    return torch.float64 if _has_float64(torch.device(device).type) else torch.float32


@functools.cache
def _has_float64(device: str) -> bool:
    try:
        return torch.ones(2, dtype=torch.float64, device=device).sum().item() == 2
    except (TypeError, RuntimeError):  # the first from Apple's, the second from Intel's
        return False


def synchronise(device: str) -> None:
    """Waits until a device has done all that it was given."""
    if device != "cpu":
        torch.get_device_module(device).synchronize()


def empty_cache(device: str) -> None:
    """Gives back memory that is kept without being used: by torch, of a device; of the CPU by the C library, where it can."""
    if device != "cpu":
        getattr(torch.get_device_module(device), "empty_cache", lambda: None)()
    elif os.name == "posix":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _kept: None)(0)


def hardware(device: str) -> str:
    """What a device is here, in words."""
    if device == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    if device == "mps":
        return getattr(torch.backends.mps, "get_name", lambda: "Apple GPU")()
    return getattr(torch.get_device_module(device), "get_device_name", lambda: device)()
