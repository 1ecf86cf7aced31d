"""How long a call takes, by torch's own benchmark timer, and on what."""

import statistics
from collections.abc import Callable

import torch


def median_seconds(function: Callable[[], object], min_run_time: float = 1.0) -> float:
    """The median time of a call, a GPU waited for, on as many threads as torch has; the first call is not counted.

    Args:
        function: what to call.
        min_run_time: seconds that the calls take together; at least one is counted.
    """
    return statistics.median(_times(function, min_run_time))


def best_seconds(function: Callable[[], object], min_run_time: float = 1.0) -> float:
    """As `median_seconds`, the shortest time: what else a machine does only adds to it."""
    return min(_times(function, min_run_time))


def _times(function: Callable[[], object], min_run_time: float) -> list[float]:
    from torch.utils.benchmark import Timer

    function()
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=min_run_time).times


def hardware(device: str) -> str:
    """What ``cpu`` or ``cuda`` is here, in words."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
