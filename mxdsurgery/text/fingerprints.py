"""Fingerprints of text: enough to tell later whether a context was met before, and far too little to get the text back.

Of all passages of ``passage`` tokens in a context, each hashed to 64 bits, the smallest hash of every ``window`` neighbouring
ones is kept (winnowing; Schleimer, Wilkerson and Aiken 2003, https://doi.org/10.1145/872757.872770). So of any run of
``passage + window - 1`` tokens that two contexts share, they keep at least one same hash, wherever in them it stands: a text
is known again when its file has another name, its documents another order, or a part of them is missing. A context costs about
a hundred bytes, whatever its length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

# A passage is an eighth of a context, but of so many tokens at most and at least; a window is as long, and one passage more.
_PASSAGE, _SHORTEST, _SHARE = 16, 8, 8
# Odd constants of 64 bits: of the polynomial hash, and of the finaliser of splitmix64.
_BASE = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((30, np.uint64(0xBF58476D1CE4E5B9)), (27, np.uint64(0x94D049BB133111EB)), (31, np.uint64(1)))


@dataclass(frozen=True)
class Fingerprints:
    """Of contexts that were met.

    Attributes:
        context: T, the length of those contexts; it says how long passages are, so others are looked up alike.
        hashes: uint64, sorted, each once.
    """

    context: int
    hashes: np.ndarray

    @classmethod
    def of(cls, contexts: Tensor, context: int) -> "Fingerprints":
        """Of contexts (S, T), as part of contexts of length ``context`` where they are shorter."""
        return cls(context, np.unique(winnowed(contexts, context)))

    @classmethod
    def union(cls, several: Sequence["Fingerprints"]) -> "Fingerprints":
        """Of what any of them met, one at least; all are of contexts of one length."""
        (context,) = {one.context for one in several}
        return cls(context, np.unique(np.concatenate([one.hashes for one in several])))

    @classmethod
    def from_tensor(cls, context: int, hashes: Tensor) -> "Fingerprints":
        """From what `tensor` gave."""
        return cls(context, np.unique(hashes.numpy().view(np.uint64)))

    def tensor(self) -> Tensor:
        """The hashes as int64, to be stored."""
        return torch.from_numpy(self.hashes.view(np.int64).copy())

    def __or__(self, other: "Fingerprints") -> "Fingerprints":
        """Of what either met."""
        return self.union([self, other])

    def known(self, contexts: Tensor) -> Tensor:
        """Which of some contexts (S, T) were met: at least half of what is kept of one was kept before. Bool, (S,)."""
        return torch.from_numpy(_known(self.holds(winnowed(contexts, self.context))))

    def holds(self, kept: np.ndarray) -> np.ndarray:
        """Which of some hashes are among these: bool, of the same shape."""
        if not len(self.hashes):
            return np.zeros(kept.shape, bool)
        return self.hashes[np.searchsorted(self.hashes, kept).clip(max=len(self.hashes) - 1)] == kept

    def leaving_out(self) -> Callable[[Tensor], bool]:
        """Says of one context (T,) after the other whether it is left out where nothing of this is wanted again."""
        return lambda context: bool(self.known(context[None]))


class Apart:
    """Contexts that stay unknown to who is trained on the rest of a text: of each, less than half is met there.

    To leave out the contexts of the text that are known by these is not enough: one that stands in the text across the border
    of two of its contexts, or in pieces all over it, would be met for the most part.

    Args:
        several: contexts (S, T), perhaps of several lengths.
        context: see `Fingerprints`.
        met: what was trained on before; contexts that it knows already can not stay unknown.
    """

    def __init__(self, several: Sequence[Tensor], context: int, met: Fingerprints | None = None) -> None:
        self.all = Fingerprints.union([Fingerprints.of(contexts, context) for contexts in several])
        self._kept = [winnowed(contexts, context) for contexts in several]
        before = met or Fingerprints(context, self.all.hashes[:0])
        self._met = [before.holds(kept) for kept in self._kept]

    def leaving_out(self) -> Callable[[Tensor], bool]:
        """Says of one context (T,) of a text after the other, in its order, whether it is left out."""
        met = [each.copy() for each in self._met]
        lost = [_known(each) for each in met]

        def left_out(context: Tensor) -> bool:
            kept = winnowed(context[None], self.all.context)
            same = self.all.holds(kept)
            if not same.any():
                return False
            shared = Fingerprints(self.all.context, np.unique(kept[same]))
            now = [had | shared.holds(each) for had, each in zip(met, self._kept, strict=True)]
            if _known(same).any() or any((_known(each) & ~gone).any() for each, gone in zip(now, lost, strict=True)):
                return True
            met[:] = now
            return False

        return left_out


def _known(met: np.ndarray) -> np.ndarray:
    """Which contexts are known, of whose windows it is said which were met, bool (S, windows): half of them or more. (S,)."""
    # A hash that stands for several windows counts as often: it stands for as much of the text.
    return met.mean(axis=1) >= 0.5 if met.size else np.zeros(len(met), bool)


def winnowed(contexts: Tensor, context: int) -> np.ndarray:
    """The smallest hash of each window of passages in contexts (S, T): uint64 (S, windows), none where T is too short.

    Args:
        contexts: token ids.
        context: the length of contexts by which passages and windows are measured.
    """
    ids = contexts.cpu().numpy().astype(np.uint64)
    passage = max(min(_SHORTEST, context), min(_PASSAGE, context // _SHARE))
    places = ids.shape[1] - passage + 1
    if places < 1:
        return np.empty((len(ids), 0), np.uint64)
    hashed = np.zeros((len(ids), places), np.uint64)
    for offset in range(passage):
        hashed = hashed * _BASE + ids[:, offset : offset + places] + np.uint64(1)
    for shift, factor in _MIX:
        hashed = (hashed ^ (hashed >> np.uint64(shift))) * factor
    return sliding_window_view(hashed, min(context // _SHARE + 1, places), axis=1).min(axis=-1)


def tokens_in_words(figures: dict[str, Any]) -> str:
    """How many tokens figures rest on, and what is known of whether these were trained on, for a title.

    Args:
        figures: ``tokens``, ``sequences`` (contexts), and ``trained_on``, how many of those were trained on. That is not known
            where it is None, or not there because an older version wrote the figures.
    """
    tokens, trained_on = f"{figures['tokens']:,}", figures.get("trained_on")
    if trained_on == 0:
        return f"{tokens} held-out tokens"
    if trained_on is None:
        return f"{tokens} tokens, held out or not: what was trained on is not recorded"
    return f"{tokens} tokens (of {figures['sequences']} contexts, {trained_on} were trained on)"
