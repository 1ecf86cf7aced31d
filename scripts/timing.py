"""How long a call takes, by torch's own benchmark timer: warmed up, synchronised with a GPU, the median of many."""

from collections.abc import Callable

import torch
from torch.utils.benchmark import Timer


def median_seconds(function: Callable[[], object], min_run_time: float = 1.0) -> float:
    """The median time of a call, from calls that take ``min_run_time`` seconds together, on as many threads as torch has."""
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    function()
    return timer.blocked_autorange(min_run_time=min_run_time).median
