"""How long a call takes, by torch's own benchmark timer, and on what."""

from collections.abc import Callable

import torch


def median_seconds(function: Callable[[], object], min_run_time: float = 1.0) -> float:
    """The median time of a call, a GPU waited for, on as many threads as torch has; the first call is not counted.

    Args:
        function: what to call.
        min_run_time: seconds that the calls take together; at least one is counted.
    """
    from torch.utils.benchmark import Timer

    function()
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=min_run_time).median


def hardware(device: str) -> str:
    """What ``cpu`` or ``cuda`` is here, in words."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
