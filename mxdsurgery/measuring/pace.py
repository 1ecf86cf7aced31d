"""How fast this machine evaluates, and how far an evaluation has come. Shapes: B contexts, T tokens."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxdsurgery.base.blocks import Block
from mxdsurgery.base.decoder import decoder_layers
from mxdsurgery.base.running import hidden_states
from mxdsurgery.base.scores import SCORES
from mxdsurgery.base.surgery import replaced
from mxdsurgery.hardware.device import synchronise
from mxdsurgery.measuring.scoring import prediction_sums
from mxdsurgery.planning.effort import Rates, Runs


@torch.no_grad()
def measured_rates(model: PreTrainedModel, blocks: Sequence[Block], layers: dict[int, nn.Module], ids: Tensor) -> Rates:
    """How fast this machine runs the model, measured on one batch (B, T)."""

    def timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
        start = time.perf_counter()
        result = run()
        synchronise(ids.device.type)
        return (time.perf_counter() - start) / len(ids), result

    def predicted(part: slice) -> dict:
        others = [("whole", hidden[part]), ("brief", hidden[part])]
        wanted = {"whole": SCORES, "brief": ("ce",)}
        return dict(prediction_sums(model, ids[part], hidden[part], others, wanted.get))

    hidden_states(model, ids[:1])  # warms up: a first run takes longer
    body, hidden = timed(lambda: hidden_states(model, ids))
    half = max(1, len(ids) // 2)  # of a batch: that of predictions takes several times as long, until its memory is there
    predicted(slice(half))
    heads = timed(lambda: predicted(slice(-half, None)))[0] * len(ids) / half
    with replaced(model, blocks, layers):
        hidden_states(model, ids[:1])
        converted, _ = timed(lambda: hidden_states(model, ids))
    return Rates(body / len(decoder_layers(model)[1]), max(0.0, converted - body) / len(layers), heads / 3)


class Passes:
    """Counts the work, in passes of a whole batch through the whole model.

    Args:
        rates: of this machine.
        size: contexts in a batch.
        depth: decoder layers of the model.
        seconds: of all the work.
        report: called with the passes done and to do.
    """

    def __init__(self, rates: Rates, size: int, depth: int, seconds: float, report: Callable[[float, float], None]) -> None:
        self.rates, self.report = rates, report
        self.whole = size * rates.seconds(Runs(depth, 0, 1))
        self.done, self.total = 0.0, seconds / self.whole

    def add(self, contexts: int, runs: Runs) -> None:
        """Counts so many contexts as having taken part in ``runs``."""
        self.took(contexts * self.rates.seconds(runs))

    def took(self, seconds: float) -> None:
        """Counts work of so many seconds as done."""
        self.done += seconds / self.whole
        self.report(min(self.done, self.total), self.total)
