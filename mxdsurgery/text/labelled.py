"""Labelled text: pieces of text with a class each, for probing and for seeing what experts prefer."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mxdsurgery.errors import DataError, first_line
from mxdsurgery.text.sources import Packing, hub_rows

if TYPE_CHECKING:  # imported only where labelled text is read
    import pandas

_FORMS = "a .jsonl, .jsonl.gz, .csv or .parquet file, or a data set on the hub (user/name[:config[:split]])"
# By suffix: the name of pandas' reader, and its options.
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("read_json", {"lines": True, "dtype": False}),
    ".jsonl.gz": ("read_json", {"lines": True, "dtype": False, "compression": "gzip"}),
    ".csv": ("read_csv", {"dtype": str, "keep_default_na": False}),
    ".parquet": ("read_parquet", {}),
}


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


def read_labelled(spec: str, text_column: str = "text", label_column: str = "label", limit: int | None = None) -> Labelled:
    """Reads labelled text.

    Args:
        spec: a file or a data set on the hub.
        text_column: column or field that holds the text.
        label_column: column or field that holds the class.
        limit: rows to read of a data set on the hub; default: all.

    Raises:
        DataError: it cannot be read, lacks a column, or has fewer than two classes.
    """
    suffix = next((suffix for suffix in _READERS if spec.endswith(suffix)), None)
    if suffix is not None:
        table = _read_file(Path(spec), suffix)
    elif os.path.exists(spec) or spec.startswith((".", "/", "~")):
        raise DataError(f"{spec!r} is no labelled text", expected=_FORMS)
    else:
        import pandas

        table = pandas.DataFrame(hub_rows(spec, limit))
    for column, flag in ((text_column, "--text-column"), (label_column, "--label-column")):
        if column not in table.columns:
            columns = ", ".join(map(str, table.columns))
            raise DataError(f"{spec!r} has no column {column!r}", expected=f"one of: {columns}", fix=f"name it with {flag}")
    kept = table[[text_column, label_column]].dropna()
    texts, labels = kept[text_column].astype(str).tolist(), kept[label_column].astype(str).tolist()
    pairs = [(text, label) for text, label in zip(texts, labels, strict=True) if text.strip()]
    found = Labelled([text for text, _ in pairs], [label for _, label in pairs])
    if len(found.classes) < 2:
        raise DataError(
            f"{spec!r} has {len(found.classes)} classes in its column {label_column!r}",
            expected="texts of at least two classes",
            fix="name the right column with --label-column",
        )
    return found


def _read_file(path: Path, suffix: str) -> "pandas.DataFrame":
    import pandas

    reader, options = _READERS[suffix]
    if not os.path.isfile(path):
        raise DataError(f"no file {str(path)!r}", expected=_FORMS)
    try:
        return getattr(pandas, reader)(path, **options)
    except Exception as error:  # pandas and pyarrow raise half a dozen kinds here
        raise DataError(f"{str(path)!r} cannot be read: {first_line(error)}", expected=_FORMS) from None


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
