"""How much memory a device has free, and how much of it a piece of work took at its peak."""

import re
from pathlib import Path

import psutil
import torch

from mxdsurgery.hardware.device import empty_cache, shares_host_memory

# A container's limit and use, where it has one (Linux, cgroup v2).
_CONTAINER = Path("/sys/fs/cgroup")


def free_memory(device: str) -> int | None:
    """Bytes that are free on a device; on the CPU in a container, of what it may use. None where the device does not say."""
    if device == "cpu":
        return _free_on_host()
    empty_cache(device)
    module = torch.get_device_module(device)
    if device == "mps":
        free = module.recommended_max_memory() - module.driver_allocated_memory()
    elif hasattr(module, "mem_get_info"):
        free = module.mem_get_info()[0]
    else:
        return None
    return max(0, min(free, _free_on_host())) if shares_host_memory(device) else free


def _free_on_host() -> int:
    free = psutil.virtual_memory().available
    try:
        limit, used = ((_CONTAINER / f"memory.{name}").read_text() for name in ("max", "current"))
    except OSError:
        return free
    return min(free, int(limit) - int(used)) if limit.strip().isdigit() else free


class PeakMemory:
    """The most memory that was used at once, above what was used when this was made.

    On an accelerator, what tensors occupied, where torch counts that. On the CPU the process's resident memory, which only
    Linux lets us reset and read.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        try:
            if device == "cpu":
                Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is used now
            else:
                torch.accelerator.reset_peak_memory_stats()
            self._before: int | None = self._peak()
        except (OSError, RuntimeError):
            self._before = None

    def bytes(self) -> int | None:
        """The peak so far; None where it cannot be measured."""
        return None if self._before is None else max(0, self._peak() - self._before)

    def _peak(self) -> int:
        return (
            _resident_peak() if self.device == "cpu" else torch.accelerator.memory_stats().get("allocated_bytes.all.peak", 0)
        )


def _resident_peak() -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    if found is None:
        raise OSError("/proc/self/status has no VmHWM")
    return int(found[1]) * 1024
