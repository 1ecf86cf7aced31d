"""CPU threads: as many as torch chooses, or as a flag or recipe names, whether torch is loaded yet or not."""

import os
import sys

# What torch and MKL read when they are loaded, here and in processes that are started from here.
_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# MKL would take fewer where it sees fewer cores, and torch then as many as MKL.
_EXACTLY = {"MKL_DYNAMIC": "FALSE"}

_asked_for: int | None = None


def use_threads(count: int | None) -> None:
    """Computes on so many from here on, for as long as the process lives; None: as before."""
    global _asked_for
    if count is not None:
        _asked_for = count
        set_threads(count)


def asked_for() -> int | None:
    """How many were asked for; None: nobody asked."""
    return _asked_for


def set_threads(count: int) -> None:
    """As `use_threads`, where nobody asked."""
    os.environ.update(dict.fromkeys(_COUNTS, str(count)) | _EXACTLY)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(count)
