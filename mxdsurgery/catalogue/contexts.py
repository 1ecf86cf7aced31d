"""The contexts on which experts are observed: drawn evenly from a text and kept as a file, with each token's class."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mxdsurgery.aside import file_aside
from mxdsurgery.catalogue.files import CONTEXTS_FILE, list_array
from mxdsurgery.checkpoint.writing import write_json
from mxdsurgery.errors import DataError
from mxdsurgery.terminal.console import ProgressLine, Reporter
from mxdsurgery.text.fields import value_in
from mxdsurgery.text.packing import Packing
from mxdsurgery.text.reservoir import Reservoir
from mxdsurgery.text.sources import check_length, documents_with_fields

CLASSES_FILE = "classes.json"
# If no label column is named, the first of these fields that a document has is its class.
_LABEL_FIELDS = ("label", "kind")
_MOST_CLASSES = 1000


@dataclass(frozen=True)
class Source:
    """Where contexts come from.

    Attributes:
        data: the text; see `mxdsurgery.text.sources`.
        tokens: how many of them to draw.
        text_column: column or field with the text.
        label_column: column or field with each document's class; None: ``label`` or ``kind``, where there is one.
        spread: contexts are drawn from so many times as much text.
        seed: of the draw.
    """

    data: str
    tokens: int
    text_column: str
    label_column: str | None
    spread: int
    seed: int


@dataclass(frozen=True)
class Corpus:
    """Contexts.

    Attributes:
        ids: token ids, (S, T) int32.
        classes: each token's class, (S, T) int16; -1 for none.
        names: the classes' names.
    """

    ids: Tensor
    classes: Tensor
    names: list[str]

    @property
    def tokens(self) -> int:
        """The number of tokens that figures rest on: all but position 0 of each context."""
        return self.ids[:, 1:].numel()


def read_corpus(folder: Path, source: Source, packing: Packing, reporter: Reporter) -> Corpus:
    """Draws contexts and keeps them in ``folder``; reads them if they are there already.

    Raises:
        DataError: the text cannot be read, does not hold three tokens, or lacks the class that was asked for.
    """
    path = folder / CONTEXTS_FILE
    if not path.is_file():
        with reporter.progress("read", "contexts") as line:
            drawn = draw_corpus(source, packing, line)
        write_json(folder / CLASSES_FILE, drawn.names)
        columns = {"input_ids": drawn.ids} | ({"classes": drawn.classes} if drawn.names else {})
        table = pa.table({name: list_array(rows) for name, rows in columns.items()})
        with file_aside(path) as new:
            pq.write_table(table, new, compression="zstd")
    table, names = pq.read_table(path), json.loads((folder / CLASSES_FILE).read_text(encoding="utf-8"))
    ids = torch.from_numpy(np.stack(table["input_ids"].to_numpy()))
    classes = torch.from_numpy(np.stack(table["classes"].to_numpy())) if names else torch.full_like(ids, -1)
    return Corpus(ids, classes, names)


def draw_corpus(source: Source, packing: Packing, line: ProgressLine) -> Corpus:
    """Draws contexts by reservoir sampling: each of the first ``spread`` times as many has the same chance to be drawn."""
    names: dict[str, int] = {}
    wanted = max(1, source.tokens // packing.context)
    drawn: Reservoir[tuple[Tensor, Tensor]] = Reservoir(wanted, source.seed)
    for ids, classes in packing.pack_labelled(_classed(source, names, packing), short=True):
        if drawn.offered == wanted * source.spread:
            break
        check_length(ids, source.data)
        drawn.offer((ids.int(), classes.short()))
        if drawn.offered % 256 == 1:
            line.update(drawn.offered - 1, wanted * source.spread)
    line.update(drawn.offered, drawn.offered)
    if not drawn.offered:
        raise DataError(f"the text {source.data!r} holds no text", expected="more text", fix="give a longer text")
    ids, classes = map(torch.stack, zip(*drawn.held(sort=False), strict=True))
    return Corpus(ids, classes, list(names))


def _classed(source: Source, names: dict[str, int], packing: Packing) -> Iterator[tuple[str, int]]:
    """Documents with the number of their class, -1 for none; adds new classes to ``names``."""
    fields = _LABEL_FIELDS if source.label_column is None else (source.label_column,)
    for text, row in documents_with_fields(source.data, source.text_column, fields, packing.tokenizer):
        label = next((str(value) for value in (_value(row, name) for name in fields) if value is not None), None)
        if label is None and source.label_column is not None:
            raise DataError(
                f"{source.data!r} has a text without the field {source.label_column!r}",
                expected="one of " + (", ".join(row) or "no fields: it is plain text"),
                fix="name the right one with --label-column, or leave it out",
            )
        if label is not None and label not in names and len(names) == _MOST_CLASSES:
            raise DataError(
                f"{source.data!r} has more than {_MOST_CLASSES} classes", fix="name another field with --label-column"
            )
        yield text, -1 if label is None else names.setdefault(label, len(names))


def _value(row: Mapping[str, Any], name: str) -> Any:
    """A field's value; None where there is none."""
    try:
        return value_in(row, name)
    except KeyError:
        return None
