"""What passes over a text hold in memory beside the model, by arithmetic from shapes, and how much passes at a time for that.

Shapes: T tokens of a context, V vocabulary, D model width, H hidden width.
"""

from dataclasses import dataclass

from mxdsurgery.base.decoder import vocabulary_size
from mxdsurgery.editing.predictions import HELD_BYTES, Opened
from mxdsurgery.errors import MemoryBudgetError
from mxdsurgery.hardware.memory import free_memory
from mxdsurgery.planning.budget import BUDGET_SHARE
from mxdsurgery.terminal.console import size


@dataclass(frozen=True)
class SweepBytes:
    """Bytes that a sweep of a layer holds of one position of a context.

    Attributes:
        length: T.
        kept: of a context that ran unedited: logits and their softmax in fp32, keys and values of all layers, module outputs.
        copied: of a pair of an expert and a context, before the position where its pass begins: keys and values of the layers
            that run again.
        run: of a pair, from there on: logits, keys and values, hidden states.
        compared: of the one context whose predictions are being compared: logits, and some of their shape.
    """

    length: int
    kept: int
    copied: int
    run: int
    compared: int

    @classmethod
    def of(cls, opened: Opened, layer: int) -> "SweepBytes":
        """By the shapes in the model's config and of its blocks."""
        config, element = opened.model.config.get_text_config(decoder=True), opened.model.dtype.itemsize
        vocabulary, wide = vocabulary_size(opened.model), max(4, element)
        width = opened.model.get_input_embeddings().weight.shape[1]
        heads = getattr(config, "num_attention_heads", None) or 1
        head = getattr(config, "head_dim", None) or width // heads
        cached = 2 * (getattr(config, "num_key_value_heads", None) or heads) * head * element  # of a layer
        hidden = max((block.d_hidden for block in opened.converted.plan.blocks), default=4 * width)
        again = len(opened.decoder) - layer + (layer > 0)  # the first tells the others how long the past is
        return cls(
            length=opened.input_ids.shape[1],
            kept=vocabulary * (element + 2 * wide) + cached * len(opened.decoder) + 8 * width * element,
            copied=cached * again,
            run=vocabulary * element + cached * again + (8 * width + 4 * hidden) * element,
            compared=6 * vocabulary * wide,
        )

    def contexts(self, batch: int) -> int:
        """How many contexts are kept together, at ``batch`` tokens a pass."""
        return max(1, min(batch // self.length, HELD_BYTES // (self.kept * self.length)))

    def pair_bytes(self, start: int) -> int:
        """Of a pair whose pass begins at a position."""
        return self.copied * start + self.run * (self.length - start)

    def pairs(self, batch: int, start: int) -> int:
        """How many pairs run together from a position on."""
        return max(1, min(batch // (self.length - start), HELD_BYTES // self.pair_bytes(start)))

    def peak(self, batch: int) -> int:
        """The most that is held at once."""
        most = max(self.pairs(batch, start) * self.pair_bytes(start) for start in range(self.length))
        return self.contexts(batch) * self.kept * self.length + most + self.compared * self.length

    def check(self, batch: int, device: str) -> None:
        """Raises MemoryBudgetError if the device has not as much free."""
        free = free_memory(device)
        if free is not None and self.peak(batch) > BUDGET_SHARE * free:
            raise MemoryBudgetError(
                f"a sweep of contexts of {self.length} tokens holds {size(self.peak(batch))} beside the model, and "
                f"{size(free)} are free on {device}",
                expected="room for it",
                fix="a smaller batch: --batch, or another --device",
            )
