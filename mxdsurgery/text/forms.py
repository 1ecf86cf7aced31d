"""What a text's file holds, told from its content: rows with columns, or plain documents. All is read within bounds.

A name's ending only decides where the content can be several things: comma-separated values are plain text, too.
"""

import bz2
import csv
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mxdsurgery.errors import DataError, first_line
from mxdsurgery.text.fields import has_column, no_column, top_columns
from mxdsurgery.text.places import plain_suffix

# A .txt file is cut into documents where a line holds nothing but this mark.
_TXT_DOCUMENT_END = "<|endoftext|>"
# Characters that are in memory at a time: a document of a .txt file that is longer is read as several; a longer line or entry
# of other files is refused.
_MOST_CHARACTERS = 64 * 2**20
# Rows of a .parquet or .arrow file that are in memory at a time.
_ROWS = 256
# Bytes that are looked at to tell what a file holds.
_HEAD = 4096
# Characters that are read at a time of a list in JSON.
_CHUNK = 2**16
_JSON_LINES, _TABLES = (".jsonl", ".ndjson", ".json"), (".csv", ".tsv")
_DELIMITERS = {".csv": ",\t;|", ".tsv": "\t,;|"}

_GZIP, _BZ2, _ZST = b"\x1f\x8b", b"BZh", b"\x28\xb5\x2f\xfd"
_PARQUET, _ARROW, _ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
# How files begin that hold no text, and what to do with them.
_NO_TEXT = {
    b"\xff\xfe": ("text in UTF-16", "write it in UTF-8"),
    b"\xfe\xff": ("text in UTF-16", "write it in UTF-8"),
    b"PK\x03\x04": ("a zip archive", "unpack it"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it"),
    b"Rar!": ("a rar archive", "unpack it"),
    b"\xfd7zXZ\x00": ("a file packed by xz", "unpack it"),
    b"%PDF-": ("a PDF document", "give its text"),
    b"\x93NUMPY": ("a NumPy array", "give the text that it was made from"),
    b"\x89HDF": ("an HDF5 file", "give the text that it was made from"),
    b"SQLite format 3": ("a database", "write its texts to a .jsonl file"),
    b"\x80\x02": ("a pickle, which is never read", "write its texts to a .jsonl file"),
    b"\x80\x03": ("a pickle, which is never read", "write its texts to a .jsonl file"),
    b"\x80\x04": ("a pickle, which is never read", "write its texts to a .jsonl file"),
    b"\x80\x05": ("a pickle, which is never read", "write its texts to a .jsonl file"),
}


class Entry(NamedTuple):
    """A row, or a document that has no columns.

    Attributes:
        where: file and line, for people.
        row: its columns; empty for a document.
        document: of plain text; None for a row.
    """

    where: str
    row: dict[str, Any]
    document: str | None = None


def entries(path: Path, columns: Sequence[str]) -> Iterator[Entry]:
    """The rows or documents of a file, in their order.

    Args:
        path: the file.
        columns: those that are wanted, by dotted names, the text's first; others may be left out.

    Raises:
        DataError: the file cannot be read, holds no text, or has no such column.
    """
    if not os.path.isfile(path):
        raise DataError(f"{str(path)!r} is no plain file")
    try:
        yield from _entries(path, columns)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{str(path)!r} is not a whole gzip file: {first_line(error)}") from None
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error.strerror or first_line(error)}") from None


def _entries(path: Path, columns: Sequence[str]) -> Iterator[Entry]:
    with path.open("rb") as file:
        head = file.read(_HEAD)
    suffix = plain_suffix(path)
    if head.startswith(_PARQUET) or (suffix == ".parquet" and not _packing(head)):
        yield from _parquet_rows(path, columns)
    elif head.startswith((_ARROW, _ARROW_STREAM)) or (suffix == ".arrow" and not _packing(head)):
        yield from _arrow_rows(path, columns, head.startswith(_ARROW))
    else:
        yield from _text_entries(path, _packing(head), suffix, columns)


def _packing(head: bytes) -> str:
    """How a file is packed, by its first bytes; empty if it is not."""
    return next((name for magic, name in ((_GZIP, ".gz"), (_BZ2, ".bz2"), (_ZST, ".zst")) if head.startswith(magic)), "")


def _bytes_of(path: Path, packing: str) -> Any:
    """A file's content, unpacked as it is read."""
    if packing == ".gz":
        return gzip.open(path, "rb")
    if packing == ".bz2":
        return bz2.open(path, "rb")
    if packing == ".zst":
        import pyarrow as pa

        return pa.input_stream(str(path), compression="zstd")
    return path.open("rb")


def _text_entries(path: Path, packing: str, suffix: str, columns: Sequence[str]) -> Iterator[Entry]:
    with _bytes_of(path, packing) as file:
        head = file.read(_HEAD)
    _check_is_text(path, head, bool(packing))
    with _text_of(path, packing) as file:
        form = _form(file, suffix)
    with _text_of(path, packing) as file:
        if form == "list":
            yield from _list_rows(file, path)
        elif form == "lines":
            yield from _json_rows(_lines(file, path))
        elif form == "table":
            yield from _table_rows(_lines(file, path), path, suffix, columns[0])
        else:
            yield from (Entry(str(path), {}, document) for document in _documents(file))


def _text_of(path: Path, packing: str) -> io.TextIOWrapper:
    """A file's text; Windows' line ends are as all others, and a byte order mark is left out."""
    return io.TextIOWrapper(_bytes_of(path, packing), encoding="utf-8-sig", errors="replace")


def _form(file: io.TextIOBase, suffix: str) -> str:
    """What a text is: JSON's ``lines`` or ``list``, a ``table`` of comma-separated values, or plain ``text``."""
    lines = itertools.islice(iter(lambda: file.readline(_MOST_CHARACTERS), ""), _ROWS)
    start = next((line for line in lines if line.strip()), "").lstrip()
    if start.startswith("[") and (suffix in _JSON_LINES or re.match(r'\[\s*\{\s*"', start + file.read(_HEAD))):
        return "list"
    if suffix in _JSON_LINES or _is_object(start):
        return "lines"
    return "table" if suffix in _TABLES else "text"


def _is_object(line: str) -> bool:
    if not line.startswith("{"):
        return False
    try:
        return bool(json.loads(line))
    except (ValueError, RecursionError):
        return False


def _check_is_text(path: Path, head: bytes, packed: bool) -> None:
    """Raises DataError for what holds no text, by its first bytes."""
    known = next(((what, fix) for magic, (what, fix) in _NO_TEXT.items() if head.startswith(magic)), None)
    if packed and (_packing(head) or head.startswith((_PARQUET, _ARROW))):
        known = ("a packed file inside a packed one", "unpack it")
    elif head[257:262] == b"ustar":
        known = ("a tar archive", "unpack it")
    elif known is None and 8 * head.count(0) > len(head) or head[4:10] == b'\0\0\0\0{"':
        known = ("bytes that are no text in UTF-8", "give the text itself, in UTF-8")
    if known is not None:
        raise DataError(f"{str(path)!r} holds {known[0]}", expected="text, or rows with a column of text", fix=known[1])


def _documents(file: io.TextIOBase) -> Iterator[str]:
    """The documents of plain text; one that is too long is read as several."""
    lines: list[str] = []
    held = 0
    while line := file.readline(_MOST_CHARACTERS):
        if line.strip() == _TXT_DOCUMENT_END or held + len(line) > _MOST_CHARACTERS:
            yield "".join(lines)
            lines, held = [], 0
        if line.strip() != _TXT_DOCUMENT_END:
            lines.append(line)
            held += len(line)
    yield "".join(lines)


def _lines(file: io.TextIOBase, path: Path) -> Iterator[tuple[str, str]]:
    """Each line, and where it stands."""
    for number in itertools.count(1):
        line = file.readline(_MOST_CHARACTERS + 1)
        if not line:
            return
        where = f"{path}, line {number}"
        if len(line) > _MOST_CHARACTERS:
            raise _too_long(where)
        yield where, line


def _too_long(where: str) -> DataError:
    return DataError(f"{where}: longer than {_MOST_CHARACTERS} characters", fix="cut the text up")


def _not_json(where: str, error: Exception) -> DataError:
    return DataError(f"{where}: not JSON ({first_line(error)})", expected="one JSON object per line, or one list of objects")


def _json_rows(lines: Iterator[tuple[str, str]]) -> Iterator[Entry]:
    for where, line in lines:
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # the former also for a number of thousands of digits
                raise _not_json(where, error) from None
            yield _json_entry(where, row, documents=False)


def _json_entry(where: str, row: object, documents: bool) -> Entry:
    """A row of JSON; a string by itself is a document where there may be some."""
    if isinstance(row, dict):
        return Entry(where, row)
    if isinstance(row, str) and documents:
        return Entry(where, {}, row)
    raise DataError(f"{where}: no object but {type(row).__name__}", expected="objects with a field that holds the text")


class _ListText:
    """The text of a list in JSON, of which little more than one entry is in memory."""

    def __init__(self, file: io.TextIOBase) -> None:
        self.file, self.held, self.at, self.ended = file, "", 0, False

    def _more(self) -> None:
        found = self.file.read(max(_CHUNK, len(self.held) - self.at))
        self.held, self.at, self.ended = self.held[self.at :] + found, 0, not found

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            self.at = re.compile(r"\s*").match(self.held, self.at).end()
            if self.at < len(self.held) or self.ended:
                return self.held[self.at : self.at + 1]
            self._more()

    def take(self) -> str:
        """`peek`, and beyond it."""
        mark = self.peek()
        self.at += len(mark)
        return mark

    def value(self, where: str) -> object:
        """The value that begins here."""
        self.peek()
        while True:
            problem = ValueError("it ends in the middle")
            try:
                value, end = json.JSONDecoder().raw_decode(self.held, self.at)
                if end < len(self.held):  # else a number may go on
                    self.at = end
                    return value
            except RecursionError as error:
                raise _not_json(where, error) from None
            except ValueError as error:
                problem = error
            if self.ended:
                raise _not_json(where, problem)
            if len(self.held) - self.at > _MOST_CHARACTERS:
                raise _too_long(where)
            self._more()


def _list_rows(file: io.TextIOBase, path: Path) -> Iterator[Entry]:
    text = _ListText(file)
    text.take()
    for number in itertools.count(1):
        where = f"{path}, entry {number}"
        if number == 1 and text.peek() == "]":
            text.take()
            break
        yield _json_entry(where, text.value(where), documents=True)
        mark = text.take()
        if mark == "]":
            break
        if mark != ",":
            raise _not_json(where, ValueError("no comma after it" if mark else "the list does not end"))
    if text.peek():
        raise _not_json(f"{path}, after its list", ValueError("something follows"))


def _table_rows(lines: Iterator[tuple[str, str]], path: Path, suffix: str, column: str) -> Iterator[Entry]:
    """The rows of comma-separated values; the separator is the one by which the first line has the column."""
    csv.field_size_limit(max(csv.field_size_limit(), _MOST_CHARACTERS))  # this process's; csv has no other
    first = next((line for _, line in lines if line.strip()), "")
    headers = [next(csv.reader([first], delimiter=mark), []) for mark in _DELIMITERS[suffix]]
    header = next((names for names in headers if column in names), headers[0])
    delimiter = _DELIMITERS[suffix][headers.index(header)]
    if first and column not in header:
        raise no_column(column, header, f"{path}, line 1,")
    where = str(path)

    def following() -> Iterator[str]:
        nonlocal where
        for where, line in lines:  # noqa: B007  where the row ends
            yield line

    reader = csv.reader(following(), delimiter=delimiter, strict=True)
    try:
        for values in reader:
            if len(values) > len(header):
                raise DataError(
                    f"{where}: {len(values)} values, and the first line names {len(header)} columns",
                    expected="a value for each column, in quotes where it holds the separator",
                )
            if values:
                yield Entry(where, dict(zip(header, values, strict=False)) | dict.fromkeys(header[len(values) :]))
    except csv.Error as error:
        raise DataError(f"{where}: no comma-separated values: {first_line(error)}") from None


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Entry]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            wanted = _wanted(file.schema_arrow, columns, path)
            for batch in file.iter_batches(_ROWS, columns=wanted):
                yield from (Entry(str(path), row) for row in batch.to_pylist())
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{str(path)!r} is not a whole Parquet file: {first_line(error)}") from None


def _arrow_rows(path: Path, columns: Sequence[str], in_blocks: bool) -> Iterator[Entry]:
    """The rows of an Arrow file, of either of its forms: with an index of its blocks, or without, as a stream."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            opened = pa.ipc.open_file(source) if in_blocks else pa.ipc.open_stream(source)
            wanted = top_columns(_wanted(opened.schema, columns, path), opened.schema.names)
            batches = map(opened.get_batch, range(opened.num_record_batches)) if in_blocks else opened
            for batch in batches:
                for start in range(0, len(batch), _ROWS):
                    part = batch.select(wanted).slice(start, _ROWS)
                    yield from (Entry(str(path), row) for row in part.to_pylist())
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{str(path)!r} is not a whole Arrow file: {first_line(error)}") from None


def _wanted(schema: Any, columns: Sequence[str], path: Path) -> list[str]:
    """Those of the columns that a schema has; the first of them it has to have."""
    names = list(_names(schema))
    if not has_column(columns[0], [*schema.names, *names]):
        raise no_column(columns[0], names, str(path))
    return [name for name in dict.fromkeys(columns) if name in {*schema.names, *names}]


def _names(fields: Iterable[Any]) -> Iterator[str]:
    """Names of columns, those inside others with a dot."""
    import pyarrow as pa

    for field in fields:
        if pa.types.is_struct(field.type):
            yield from (f"{field.name}.{name}" for name in _names(field.type))
        else:
            yield field.name
