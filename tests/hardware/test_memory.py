"""Memory that is kept without being used is given back."""

import ctypes

import psutil
import pytest
import torch

from mxdsurgery.hardware.device import empty_cache


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this C library gives memory back when it likes")
def test_what_was_freed_in_pieces_goes_back_to_the_system():
    def resident():
        return psutil.Process().memory_info().rss

    pieces = [torch.ones(2**14) for _ in range(2_000)]  # 125 MiB
    last = torch.ones(2**14)  # above them, so that they are not at the end
    del pieces
    before = resident()
    empty_cache("cpu")
    assert before - resident() > 100 * 2**20 and last.all()
