"""How long a call takes, by torch's own benchmark timer."""

import statistics
import time
from collections.abc import Callable

import torch

from mxdsurgery.hardware.device import devices, synchronise


def median_seconds(function: Callable[[], object], min_run_time: float = 1.0) -> float:
    """The median seconds of a call, the accelerator synchronised, on as many threads as torch has; the first is not counted.

    Args:
        function: what to call.
        min_run_time: seconds that the calls take together; at least one is counted.
    """
    return statistics.median(_times(function, min_run_time))


def best_seconds(function: Callable[[], object], min_run_time: float = 1.0) -> float:
    """As `median_seconds`, the shortest time: other work on the machine only adds to it."""
    return min(_times(function, min_run_time))


def _times(function: Callable[[], object], min_run_time: float) -> list[float]:
    from torch.utils.benchmark import Timer

    function()
    timer = Timer("function()", globals={"function": function}, timer=_now, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=min_run_time).times


def _now() -> float:
    """The time once the device has done everything; torch's own clock waits for some devices only, in its older versions."""
    synchronise(devices()[-1])
    return time.perf_counter()
