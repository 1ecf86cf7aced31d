"""How much memory a device has free, and how much of it a stretch of work took at most."""

import re
from pathlib import Path

import psutil
import torch

# A container's limit and use, where it has one (Linux, cgroup v2).
_CONTAINER = Path("/sys/fs/cgroup")


def free_memory(device: str) -> int:
    """Bytes that are free on ``cpu`` or ``cuda``; in a container, of what it may use."""
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    free = psutil.virtual_memory().available
    try:
        limit, used = ((_CONTAINER / f"memory.{name}").read_text() for name in ("max", "current"))
    except OSError:
        return free
    return min(free, int(limit) - int(used)) if limit.strip().isdigit() else free


class PeakMemory:
    """The most memory that was used at once, above what was used when this was made.

    On CUDA, what tensors occupied. On the CPU the process's resident memory, which only Linux lets us reset and read.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before: int | None = torch.cuda.memory_allocated()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is used now
            self._before = _resident_peak()
        except OSError:
            self._before = None

    def bytes(self) -> int | None:
        """So far; None where it cannot be measured."""
        if self._before is None:
            return None
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else _resident_peak()
        return max(0, peak - self._before)


def _resident_peak() -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    if found is None:
        raise OSError("/proc/self/status has no VmHWM")
    return int(found[1]) * 1024
