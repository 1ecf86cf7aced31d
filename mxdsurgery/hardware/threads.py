"""CPU threads: as many as torch chooses, or as a flag or recipe names, whether torch is loaded yet or not."""

import os
import sys

# Environment variables that torch and MKL read when they are loaded, here and in processes that are started from here.
_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Otherwise MKL takes fewer threads where it sees fewer cores, and torch then as many as MKL.
_EXACTLY = {"MKL_DYNAMIC": "FALSE"}

_asked_for: int | None = None


def use_threads(count: int | None) -> None:
    """Sets the number of CPU threads for the rest of the process; None changes nothing."""
    global _asked_for
    if count is not None:
        _asked_for = count
        set_threads(count)


def asked_for() -> int | None:
    """How many threads were asked for; None: nobody asked."""
    return _asked_for


def set_threads(count: int) -> None:
    """As `use_threads`, without counting as asked for."""
    os.environ.update(dict.fromkeys(_COUNTS, str(count)) | _EXACTLY)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(count)
