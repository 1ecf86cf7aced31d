"""Text: where it comes from, and the streams of packed contexts that it becomes.

A text is named by a SPEC: a local ``.txt``, ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` file; ``stdlib`` or
``stdlib:heldout``, the source of the running Python's standard library; or a data set on the hub as
``user/name[:config[:split]]``, which is streamed, never downloaded whole.
"""

import dataclasses
import gzip
import itertools
import json
import os
import queue
import random
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mxdsurgery.demo import stdlib_documents
from mxdsurgery.errors import DataError, first_line
from mxdsurgery.hardware.device import copies_from_pinned_memory
from mxdsurgery.recipe import Recipe
from mxdsurgery.text.packing import Packing

Item = TypeVar("Item")

_FORMS = "a .txt, .jsonl, .jsonl.gz or .parquet file, a data set on the hub (user/name[:config[:split]]), or stdlib"
_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
# A .txt file is cut into documents where a line holds nothing but this mark.
_TXT_DOCUMENT_END = "<|endoftext|>"
# Characters that are in memory at a time: a document of a .txt file that is longer is read as several; a longer line of a
# .jsonl file is refused.
_MOST_CHARACTERS = 64 * 2**20
# Rows of a .parquet file that are in memory at a time.
_ROWS = 256
# Held-out contexts are spread over so many times their own amount of text.
_SPREAD = 32


def text_name(spec: str) -> str:
    """How a text is named where others read it: a local file without its path."""
    return Path(spec).name if os.path.exists(spec) else spec


def token_strings(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    r"""Each token as it stands in a text, with the space before it if it has one.

    A token that is no text by itself but some bytes of a character is given as ``\xe2\x80``; a token that the tokenizer does
    not know, as its id between angle brackets.
    """
    # Decoded after another token: of a token alone, many tokenizers drop the space before it.
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before = tokenizer.decode(anchor, **options)
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    strings = []
    for token in ids:
        text = tokenizer.decode([*anchor, token], **options)
        text = text[len(before) :] if text.startswith(before) else tokenizer.decode([token], **options)
        if "�" in text:
            piece = str(tokenizer.convert_ids_to_tokens(token))
            bytes_ = [byte_of.get(character) for character in piece]
            text = piece if None in bytes_ else "".join(f"\\x{byte:02x}" if byte > 126 else chr(byte) for byte in bytes_)
        strings.append(text or f"<{token}>")
    return strings


def documents(spec: str, text_column: str = "text") -> Iterator[str]:
    """Yields the documents of a text, in their order; empty ones are left out, and what is no character is replaced by U+FFFD.

    Args:
        spec: see the module.
        text_column: column or field that holds the text, where there are several.

    Raises:
        DataError: no such file or data set, no such column, or a line that cannot be read. Raised at the first document,
            not at the call.
    """
    return (document for document, _ in documents_with_fields(spec, text_column))


def documents_with_fields(
    spec: str, text_column: str = "text", fields: Sequence[str] = ()
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """As `documents`, each with other fields of its row; among them are those of ``fields`` that the row has."""
    if spec in ("stdlib", "stdlib:train", "stdlib:heldout"):
        found = ((document, {}) for document in stdlib_documents(spec.partition(":")[2] or "train"))
    elif spec.startswith("stdlib:"):
        raise DataError(f"no text {spec!r}", expected="stdlib, stdlib:train or stdlib:heldout")
    elif os.path.isfile(spec) or spec.endswith(_SUFFIXES) or spec.startswith((".", "/", "~")):
        found = _file_documents(Path(spec), text_column, fields)
    else:
        found = _hub_documents(spec, text_column)
    return ((_encodable(document), row) for document, row in found if document)


def _encodable(document: str) -> str:
    """A document with its lone surrogates replaced: JSON can hold them, and no tokenizer takes them."""
    try:
        document.encode()
        return document
    except UnicodeEncodeError:
        return document.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _file_documents(path: Path, text_column: str, fields: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not os.path.isfile(path):  # False for a name too long to be a file's, where Path.is_file() raises
        raise DataError(f"no text file {str(path)!r}", expected=_FORMS)
    try:
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            yield from _jsonl_documents(path, text_column)
        elif path.suffix == ".parquet":
            yield from _parquet_documents(path, text_column, fields)
        elif path.suffix == ".txt":
            yield from ((document, {}) for document in _txt_documents(path))
        else:
            raise DataError(f"{str(path)!r} is of an unknown form", expected=_FORMS)
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error.strerror or error}") from None


def _txt_documents(path: Path) -> Iterator[str]:
    lines: list[str] = []
    held = 0
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        while line := file.readline(_MOST_CHARACTERS):
            if line.strip() == _TXT_DOCUMENT_END or held + len(line) > _MOST_CHARACTERS:
                yield "".join(lines)
                lines, held = [], 0
            if line.strip() != _TXT_DOCUMENT_END:
                lines.append(line)
                held += len(line)
    yield "".join(lines)


def _jsonl_documents(path: Path, text_column: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", errors="replace") as file:
            for number in itertools.count(1):
                line = file.readline(_MOST_CHARACTERS + 1)
                if not line:
                    return
                if len(line) > _MOST_CHARACTERS:
                    raise DataError(f"{path}, line {number}: longer than {_MOST_CHARACTERS} characters", fix="cut the text up")
                if line.strip():
                    yield _json_text(line, f"{path}, line {number}", text_column)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{str(path)!r} is not a whole gzip file: {error}") from None


def _json_text(line: str, where: str, text_column: str) -> tuple[str, Mapping[str, Any]]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # the former also for a number of thousands of digits
        raise DataError(f"{where}: not JSON ({error})", expected="one JSON object per line") from None
    if not isinstance(row, dict) or not isinstance(row.get(text_column), str):
        keys = shorten(", ".join(row), 200) if isinstance(row, dict) else type(row).__name__
        raise DataError(
            f"{where}: no text in the field {text_column!r} (it has: {keys})",
            expected="a field that holds a string",
            fix="name the field with --text-column",
        )
    return row[text_column], row


def _parquet_documents(path: Path, text_column: str, fields: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        _check_column(text_column, file.schema_arrow.names, str(path))
        wanted = [text_column, *(name for name in fields if name in file.schema_arrow.names)]
        for batch in file.iter_batches(_ROWS, columns=wanted):
            for row in batch.to_pylist():
                if row[text_column] is not None:
                    yield _column_text(row[text_column], text_column, str(path)), row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{str(path)!r} is not a whole Parquet file: {error}") from None


def _column_text(value: object, text_column: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{where} holds {type(value).__name__} in its column {text_column!r}",
            expected="a column of text",
            fix="name the column with --text-column",
        )
    return value


def _check_column(text_column: str, columns: list[str], where: str) -> None:
    if text_column not in columns:
        raise DataError(
            f"{where} has no column {text_column!r}",
            expected=f"one of its columns: {', '.join(columns)}",
            fix="name the column with --text-column",
        )


def _open_stream(spec: str) -> Iterable[dict]:
    """The rows of a data set on the hub, streamed."""
    from datasets import load_dataset

    name, _, rest = spec.partition(":")
    config, _, split = rest.partition(":")
    options = {"split": split or "train", "streaming": True}
    try:
        return load_dataset(name, config or None, **options)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        # Data sets that come with a loading script: the hub keeps a converted copy of the same rows.
        return load_dataset(name, config or None, revision="refs/convert/parquet", **options)


def _hub_documents(spec: str, text_column: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    where = f"the data set {spec!r}"
    for number, row in enumerate(hub_rows(spec)):
        if number == 0:
            _check_column(text_column, list(row), where)
        if row[text_column] is not None:
            yield _column_text(row[text_column], text_column, where), row


def hub_rows(spec: str, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a data set on the hub, streamed; the first ``limit`` of them.

    Raises:
        DataError: it is not there or cannot be read.
    """
    try:
        yield from itertools.islice(_open_stream(spec), limit)
    except Exception as error:  # each of the library's layers raises its own kinds, also in the middle of the stream
        raise DataError(
            f"the data set {spec!r} cannot be read: {first_line(error)}",
            expected=_FORMS,
            fix="check the spelling and the connection, or give a text that is on this machine with --data",
        ) from None


@dataclass
class TextStream:
    """A text as packed contexts, over and over.

    Attributes:
        spec: see the module.
        packing: how its documents become contexts.
        text_column: see `documents`.
        skip: contexts at the start that are left out in every pass (they are held out).
        shuffle: tokens in the buffer that `batches` draws contexts from at random; 0 keeps the text's order.
        seed: of the shuffling.
        passes: how many times the text was begun for the batches taken so far.
    """

    spec: str
    packing: Packing
    text_column: str = "text"
    skip: int = 0
    shuffle: int = 0
    seed: int = 0
    passes: int = field(default=0, init=False)

    def contexts(self) -> Iterator[Tensor]:
        """One pass over the text: yields int64 (T,).

        Raises:
            DataError: the text does not fill one context.
        """
        filled = False
        packed = self.packing.pack(documents(self.spec, self.text_column))
        for context in itertools.islice(packed, self.skip, None):
            filled = True
            yield context
        if not filled:
            beyond = f" beyond the {self.skip} that are held out" if self.skip else ""
            raise DataError(
                f"the text {self.spec!r} does not fill one context of {self.packing.context} tokens{beyond}",
                expected="more text",
                fix="give a longer text, or a smaller --context" + (", or fewer --eval-tokens" if self.skip else ""),
                keys=("context", "eval_tokens") if self.skip else ("context",),
            )

    def batches(self, size: int) -> Iterator[Tensor]:
        """Batches of shuffled contexts without end, pass after pass: yields int64 (B, T), B = size.

        Reading, tokenising and packing run ahead in their own thread; batches are in pinned memory if a device copies from it
        faster.
        """
        for number, batch in run_ahead(self._batches(size)):
            self.passes = number
            yield batch

    def _batches(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """Each batch with the number of the pass that its last context came from."""
        passes = ((number, context) for number in itertools.count(1) for context in self._shuffled(number))
        while True:
            numbers, contexts = zip(*itertools.islice(passes, size), strict=True)
            batch = torch.stack(contexts)
            yield numbers[-1], batch.pin_memory() if copies_from_pinned_memory() else batch

    def _shuffled(self, number: int) -> Iterator[Tensor]:
        """One pass in random order: each context is drawn from a full buffer, the next of the text takes its place."""
        room = self.shuffle // self.packing.context
        buffer: list[Tensor] = []
        contexts = self.contexts()
        if room < 2:
            yield from contexts
            return
        generator = random.Random(self.seed + number)
        for context in contexts:
            if len(buffer) < room:
                buffer.append(context)
            else:
                position = generator.randrange(room)
                buffer[position], context = context, buffer[position]
                yield context
        generator.shuffle(buffer)
        yield from buffer

    def first(self, tokens: int) -> Tensor:
        """The first contexts, about ``tokens`` tokens of them and at least one: int64 (B, T)."""
        wanted = max(1, tokens // self.packing.context)
        return torch.stack(list(itertools.islice(self.contexts(), wanted)))

    def split(self, tokens: int) -> tuple[Tensor, "TextStream"]:
        """`first`, and the text that leaves these contexts out."""
        first = self.first(tokens)
        return first, dataclasses.replace(self, skip=self.skip + len(first))

    def spread(self, tokens: int) -> Tensor:
        """As `first`, but evenly spread over the first ``_SPREAD`` times as much text: several documents, not one."""
        wanted = max(1, tokens // self.packing.context)
        rows = list(itertools.islice(self.contexts(), wanted * _SPREAD))
        wanted = min(wanted, len(rows))
        return torch.stack([rows[index * len(rows) // wanted] for index in range(wanted)])


def run_ahead(items: Iterator[Item], depth: int = 8) -> Iterator[Item]:
    """The same items, made in a thread up to ``depth`` of them before they are asked for.

    What the thread raises is raised here, in its place; when the consumer stops, so does the thread. A thread and not a
    process: the tokenizer computes without holding the GIL, and must not be forked once it has run.
    """
    made: queue.Queue = queue.Queue(depth)
    stopped = threading.Event()

    def put(entry: tuple[str, Any]) -> bool:
        while not stopped.is_set():
            try:
                made.put(entry, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(("item", item)):
                    return
            put(("end", None))
        except BaseException as error:
            put(("error", error))

    thread = threading.Thread(target=work, name="run_ahead", daemon=True)
    thread.start()
    try:
        while True:
            kind, content = made.get()
            if kind == "end":
                return
            if kind == "error":
                raise content
            yield content
    finally:
        stopped.set()
        thread.join(timeout=5.0)  # it may hang in a connection; a daemon does not keep the process alive


def open_texts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[TextStream, Tensor]:
    """The training text, and the held-out contexts (S, T): of ``eval_data``, or else the first ones of ``data``.

    Raises:
        DataError: either cannot be read or is too short.
    """
    packing = Packing(tokenizer, recipe.context, recipe.prepend_bos)
    train = TextStream(recipe.data, packing, recipe.text_column, shuffle=recipe.shuffle, seed=recipe.seed)
    if recipe.eval_data is not None:
        heldout = TextStream(recipe.eval_data, packing, recipe.text_column).spread(recipe.eval_tokens)
    else:
        heldout, train = train.split(recipe.eval_tokens)
    next(train.contexts())  # fails now, not after the model is loaded
    return train, heldout
