"""Labelled text: pieces of text with a class each, for probing and for seeing what experts prefer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mxdsurgery.errors import DataError
from mxdsurgery.text.fields import dotted_names, no_column, text_in, value_in
from mxdsurgery.text.packing import Packing
from mxdsurgery.text.reservoir import Reservoir
from mxdsurgery.text.sources import rows, say_empty

# So many texts are drawn where nobody says how many: what is found of them is kept in memory.
MOST_TEXTS = 20_000
# Of a data set on the hub so many rows are read.
_MOST_ROWS = 1_000_000
# Progress is reported after so many rows.
_REPORTED = 4096


@dataclass(frozen=True)
class Labelled:
    """Pieces of text, each with its class.

    Attributes:
        texts: in their order.
        labels: the class of each text, by name.
        drawn_from: how many texts they were drawn from at random; as many as there are: these are all.
    """

    texts: list[str]
    labels: list[str]
    drawn_from: int

    @property
    def classes(self) -> list[str]:
        """The classes' names, in alphabetical order."""
        return sorted(set(self.labels))


def read_labelled(
    spec: str,
    text_column: str = "text",
    label_column: str = "label",
    samples: int | None = None,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    report: Callable[[int, int], None] = lambda _done, _total: None,
) -> Labelled:
    """Draws labelled texts at random from a whole text, which may be sorted: by class, or by date.

    Rows without text or class (null) are left out, and an `MxDWarning` says how many. Of a data set on the hub with more than
    a million rows, so many are read, from files that are spread over it, which an `MxDWarning` says, too.

    Args:
        spec: a text with columns; see `mxdsurgery.text.sources`.
        text_column: column or field that holds the text.
        label_column: column or field that holds the class.
        samples: how many texts to draw; default: all, but ``MOST_TEXTS`` at most.
        seed: of the draw.
        tokenizer: has the template by which chats are written out; None: chats are refused.
        report: called with the rows that were read, and how many there may be.

    Raises:
        DataError: it cannot be read, lacks a column, or fewer than two classes were drawn.
    """
    drawn: Reservoir[tuple[str, str]] = Reservoir(samples or MOST_TEXTS, seed)
    read, names, has_labels = 0, [], False
    empty = {text_column: 0, label_column: 0}
    for entry in rows(spec, text_column, (label_column,), _MOST_ROWS):
        if entry.document is not None:
            raise DataError(f"{spec!r} is plain text", expected="rows with a column of text and one of classes")
        read += 1
        if read % _REPORTED == 0:
            report(read, max(read, _MOST_ROWS))
        text = text_in(entry.row, text_column, entry.where, tokenizer)
        names = names or list(dotted_names(entry.row))
        try:
            label = value_in(entry.row, label_column)
            has_labels = True
        except KeyError:
            label = None
        if label != label:  # a number that is none, as pandas writes null
            label = None
        if text is None or label is None:
            empty[text_column if text is None else label_column] += 1
        elif text.strip():
            drawn.offer((text, str(label)))
    if read:
        report(read, read)
    if read and not has_labels:
        raise no_column(label_column, names, repr(spec), "--label-column")
    for column, count in empty.items():
        say_empty(count, read, spec, column)
    held = drawn.held()
    found = Labelled([text for text, _ in held], [label for _, label in held], drawn.offered)
    if not held:
        raise DataError(f"{spec!r} holds no labelled text", expected="rows with a text and a class", fix="give another --data")
    if len(found.classes) < 2:
        among = f", {len(held):,} drawn of {drawn.offered:,} texts," if len(held) < drawn.offered else ""
        raise DataError(
            f"{spec!r}{among} has {len(found.classes)} classes in its column {label_column!r}",
            expected="texts of at least two classes",
            fix="name the right column with --label-column" + (", or raise --samples" if among else ""),
        )
    return found


@dataclass(frozen=True)
class TokenBatch:
    """Some texts as token ids, padded on the right.

    Attributes:
        rows: (B,) int64, the texts' places in the list.
        input_ids: (B, T) int64.
        counted: (B, T) bool, True at neither padding nor position 0.
    """

    rows: Tensor
    input_ids: Tensor
    counted: Tensor


def token_batches(texts: list[str], packing: Packing, batch: int) -> list[TokenBatch]:
    """All texts of two tokens or more, the longest first, each cut after one context; ``batch`` tokens at a time.

    Args:
        texts: to be read.
        packing: tokenizer, context, and whether a text begins with the beginning-of-text token.
        batch: tokens, padding included.
    """
    first, tokenizer, context = packing.first_tokens(), packing.tokenizer, packing.context
    every = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    every = [(first + ids)[:context] for ids in every]
    order = sorted((row for row, ids in enumerate(every) if len(ids) > 1), key=lambda row: -len(every[row]))
    batches, start = [], 0
    while start < len(order):
        longest = len(every[order[start]])
        rows = order[start : start + max(1, batch // longest)]
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        counted = torch.zeros(len(rows), longest, dtype=torch.bool)
        for at, row in enumerate(rows):
            ids[at, : len(every[row])] = torch.tensor(every[row])
            counted[at, 1 : len(every[row])] = True
        batches.append(TokenBatch(torch.tensor(rows), ids, counted))
        start += len(rows)
    return batches
