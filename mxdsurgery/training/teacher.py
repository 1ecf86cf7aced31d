"""What the original model predicts at every position, for another model to learn: in full, or its likeliest tokens, kept.

Predictions over a large vocabulary are never held for a whole batch. The hidden states before the language-model head are
held instead, and go through it some tokens at a time.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from mxdsurgery.base.activations import recording
from mxdsurgery.base.blocks import Block
from mxdsurgery.base.decoder import vocabulary_size
from mxdsurgery.base.offload import execution_device
from mxdsurgery.base.running import hidden_states, predict
from mxdsurgery.layers.sparse import without_autocast

# Logits (tokens, V) are computed for as many tokens at a time as take so many bytes in fp32.
_LOGITS_BYTES = 2**26


class Targets(Protocol):
    """What the original says about a batch of contexts (B, T), and its blocks' outputs where they are known."""

    y: dict[int, Tensor]

    def kl(self, logits: Tensor, rows: slice) -> Tensor:
        """KL(original ‖ logits) in nats, summed over ``rows`` of the B (T - 1) positions after 0: (n, V) -> scalar fp32."""


class Example(NamedTuple):
    """Contexts (B, T) int64 on the device, and what the original says about them."""

    ids: Tensor
    targets: Targets


def parts(tokens: int, vocabulary: int, size: int = _LOGITS_BYTES) -> Iterator[slice]:
    """Slices of ``tokens`` tokens; each goes through the head together, and its logits take about ``size`` bytes in fp32."""
    rows = max(1, size // (4 * vocabulary))
    return (slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows))


class FullTargets:
    """The original's predictions, made from its hidden states when they are asked for.

    Args:
        model: the original.
        hidden: its `hidden_states`, (B, T, D).
        y: its blocks' outputs (B, T, D), by layer.
    """

    def __init__(self, model: PreTrainedModel, hidden: Tensor, y: dict[int, Tensor]) -> None:
        self.model, self.hidden, self.y = model, hidden[:, 1:].flatten(0, 1), y

    def kl(self, logits: Tensor, rows: slice) -> Tensor:
        """See `Targets`."""
        with torch.no_grad(), without_autocast(logits.device.type):
            log_p = F.log_softmax(predict(self.model, self.hidden[rows]).float(), dim=-1)
        return F.kl_div(F.log_softmax(logits.float(), dim=-1), log_p, reduction="sum", log_target=True)


def original_examples(model: PreTrainedModel, blocks: Sequence[Block], batches: Iterable[Tensor]) -> Iterator[Example]:
    """Each batch of contexts (B, T) with what the model, as it is at that moment, says about it.

    Args:
        model: the original.
        blocks: those whose outputs are wanted.
        batches: int64, on any device.
    """
    device = execution_device(model)
    for batch in batches:
        ids = batch.to(device, non_blocking=True)
        watched = recording(model, blocks, shape=ids.shape) if blocks else nullcontext({})
        with torch.no_grad(), watched as recorded:
            hidden = hidden_states(model, ids)
        yield Example(ids, FullTargets(model, hidden, {layer: pair.y for layer, pair in recorded.items()}))


class TopTargets:
    """The original's likeliest tokens at each position, and the probability that it leaves for all others together.

    Args:
        log_p: (n, top) log-probabilities, and one column more for the others, unless there are none.
        tokens: (n, top) their ids.
    """

    y: dict[int, Tensor] = {}

    def __init__(self, log_p: Tensor, tokens: Tensor) -> None:
        self.log_p, self.tokens = log_p, tokens

    def kl(self, logits: Tensor, rows: slice) -> Tensor:
        """See `Targets`; the others count as one token, so this KL is at most the full one."""
        tokens = self.tokens[rows].to(torch.int64)
        # Kept in half precision: normalised to sum to one again.
        log_p = F.log_softmax(self.log_p[rows].float(), dim=-1)
        log_q = F.log_softmax(logits.float(), dim=-1)
        known = log_q.gather(1, tokens)
        if log_p.shape[1] > tokens.shape[1]:
            others = log_q.scatter(1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
            known = torch.cat([known, others], dim=1)
        return F.kl_div(known, log_p, reduction="sum", log_target=True)


class KeptPredictions:
    """The original's ``top_n`` likeliest tokens at every position of some contexts, in files: the original need not stay.

    Six bytes per token and position: 1M tokens with 64 take 0.4 GB of disk, and no memory.

    Args:
        folder: an empty one for the files; it has to exist as long as this object.
        contexts: S, the most that can be added.
        length: T.
        top_n: how many tokens are kept of each position.
        vocabulary: V.
    """

    @staticmethod
    def bytes(contexts: int, length: int, top_n: int) -> int:
        """How much disk that takes at most."""
        return contexts * (4 * length + (length - 1) * (4 * top_n + 2 * (top_n + 1)))

    def __init__(self, folder: Path, contexts: int, length: int, top_n: int, vocabulary: int) -> None:
        self.top_n, columns = min(top_n, vocabulary), min(top_n + 1, vocabulary)

        def kept(name: str, dtype: torch.dtype, *shape: int) -> Tensor:
            count = torch.Size(shape).numel()
            return torch.from_file(str(folder / name), shared=True, size=count, dtype=dtype).view(shape)

        self._ids = kept("ids", torch.int32, contexts, length)
        self._tokens = kept("tokens", torch.int32, contexts, length - 1, self.top_n)
        self._log_p = kept("log_p", torch.float16, contexts, length - 1, columns)
        self.contexts = 0

    @torch.no_grad()
    def add(self, model: PreTrainedModel, batch: Tensor) -> None:
        """Keeps what the original says about contexts (B, T)."""
        ids = batch.to(execution_device(model))
        hidden = hidden_states(model, ids)[:, 1:].flatten(0, 1)
        here = slice(self.contexts, self.contexts + len(ids))
        self._ids[here] = ids.to("cpu", torch.int32)
        tokens, log_p = self._tokens[here].flatten(0, 1), self._log_p[here].flatten(0, 1)
        for rows in parts(len(hidden), vocabulary_size(model)):
            every = F.log_softmax(predict(model, hidden[rows]).float(), dim=-1)
            top, chosen = every.topk(self.top_n, dim=-1)
            if log_p.shape[1] > self.top_n:
                top = torch.cat([top, every.scatter(1, chosen, -torch.inf).logsumexp(-1, keepdim=True)], dim=1)
            tokens[rows], log_p[rows] = chosen.to("cpu", torch.int32), top.to("cpu", torch.float16)
        self.contexts += len(ids)

    def examples(
        self, size: int, device: torch.device, seed: int = 0, mine: Callable[[Tensor], Tensor] = lambda rows: rows
    ) -> Iterator[Example]:
        """Endless batches of ``size`` contexts: all of them, again and again, each time in a new random order.

        Args:
            size: B.
            device: where they go.
            seed: of the order.
            mine: what of a batch's numbers (B,) is wanted: a process's share, where several have the same orders.
        """
        generator = torch.Generator().manual_seed(seed)
        orders = (torch.randperm(self.contexts, generator=generator).tolist() for _ in itertools.count())
        drawn = itertools.chain.from_iterable(orders)
        while True:
            yield self._example(mine(torch.tensor(list(itertools.islice(drawn, size)))), device)

    def in_order(self, size: int, device: torch.device) -> Iterator[Example]:
        """Batches of ``size`` contexts: all of them once, in the order in which they were added."""
        return (self._example(rows, device) for rows in torch.arange(self.contexts).split(size))

    def _example(self, rows: Tensor, device: torch.device) -> Example:
        log_p, tokens = (kept[rows].flatten(0, 1).to(device) for kept in (self._log_p, self._tokens))
        return Example(self._ids[rows].to(device, torch.int64), TopTargets(log_p, tokens))
