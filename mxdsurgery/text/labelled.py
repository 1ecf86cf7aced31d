"""Labelled text: pieces of text with a class each, for probing and for seeing what experts prefer."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mxdsurgery.errors import DataError
from mxdsurgery.text.fields import dotted_names, no_column, text_in, value_in
from mxdsurgery.text.packing import Packing
from mxdsurgery.text.sources import rows, say_empty


@dataclass(frozen=True)
class Labelled:
    """Pieces of text, each with its class.

    Attributes:
        texts: in their order.
        labels: the class of each text, by name.
    """

    texts: list[str]
    labels: list[str]

    @property
    def classes(self) -> list[str]:
        """The classes' names, in alphabetical order."""
        return sorted(set(self.labels))

    def sample(self, count: int | None, seed: int) -> "Labelled":
        """``count`` of the texts, drawn at random; all of them with None, or where there are no more."""
        if count is None or count >= len(self.texts):
            return self
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self.texts))[:count])
        return Labelled([self.texts[i] for i in chosen], [self.labels[i] for i in chosen])


def read_labelled(
    spec: str,
    text_column: str = "text",
    label_column: str = "label",
    limit: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Labelled:
    """Reads labelled text. Rows without text or class (null) are left out, and an `MxDWarning` says how many.

    Args:
        spec: a text with columns; see `mxdsurgery.text.sources`.
        text_column: column or field that holds the text.
        label_column: column or field that holds the class.
        limit: rows to read of a data set on the hub; default: all.
        tokenizer: has the template by which chats are written out; None: chats are refused.

    Raises:
        DataError: it cannot be read, lacks a column, or has fewer than two classes.
    """
    texts, labels, read, names, has_labels = [], [], 0, [], False
    empty = {text_column: 0, label_column: 0}
    for entry in rows(spec, text_column, (label_column,), limit):
        if entry.document is not None:
            raise DataError(f"{spec!r} is plain text", expected="rows with a column of text and one of classes")
        read += 1
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
            texts.append(text)
            labels.append(str(label))
    if read and not has_labels:
        raise no_column(label_column, names, repr(spec), "--label-column")
    for column, count in empty.items():
        say_empty(count, read, spec, column)
    found = Labelled(texts, labels)
    if not texts:
        raise DataError(f"{spec!r} holds no labelled text", expected="rows with a text and a class", fix="give another --data")
    if len(found.classes) < 2:
        raise DataError(
            f"{spec!r} has {len(found.classes)} classes in its column {label_column!r}",
            expected="texts of at least two classes",
            fix="name the right column with --label-column",
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
