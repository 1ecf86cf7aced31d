"""Warnings that one call or command gives once, however often it comes upon their cause."""

import threading
import warnings
from collections.abc import Hashable

from mxdsurgery.errors import MxDWarning


class _Call:
    """What was said since the outermost call began, in all threads: texts are read in threads of their own."""

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.said: set[Hashable] = set()

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.said.clear()

    def is_new(self, what: Hashable) -> bool:
        """Whether this was not said yet; outside of any call, everything is new."""
        with self.lock:
            new = what not in self.said
            if self.inside:
                self.said.add(what)
            return new


one_call = _Call()


def warn_once(what: Hashable, words: str) -> None:
    """Gives an `MxDWarning`, unless ``what`` it is about was warned of in the same call."""
    if one_call.is_new(what):
        warnings.warn(words, MxDWarning, stacklevel=3)
