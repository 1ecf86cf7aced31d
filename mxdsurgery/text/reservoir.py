"""Drawing at random from a text whose length nobody knows yet, in bounded memory."""

import random
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Reservoir(Generic[Item]):
    """Of all items that it was offered, each has the same chance to be held (Vitter's algorithm R).

    Args:
        size: how many are held, at most.
        seed: of the draw.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.offered = size, 0
        self._draw, self._held = random.Random(seed), list[tuple[int, Item]]()

    def offer(self, item: Item) -> None:
        """Takes an item in, or not."""
        place = self._draw.randrange(self.offered + 1)
        if len(self._held) < self.size:
            self._held.append((self.offered, item))
        elif place < self.size:
            self._held[place] = (self.offered, item)
        self.offered += 1

    def held(self, sort: bool = True) -> list[Item]:
        """The items that are held, in the order in which they were offered; unsorted, in that of the places that they took."""
        kept = sorted(self._held, key=lambda pair: pair[0]) if sort else self._held
        return [item for _, item in kept]
