"""What a run writes down of itself: log.txt, a line per event, and metrics.jsonl, a JSON object per look at the training."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from mxdsurgery.disclosure import masked, secrets_here
from mxdsurgery.errors import OutputError, first_line
from mxdsurgery.terminal.console import Cost, ProgressLine, Reporter, event_line, stage_and_text, timed

LOG_FILE, METRICS_FILE = "log.txt", "metrics.jsonl"


class Journal:
    """Writes the two files of a run folder; each line is in its file when the call returns. Secrets are masked.

    A line that a killed run left unfinished is cut off when the next run opens the files, so that all lines but perhaps the
    last are whole.

    Args:
        folder: made with the first line; None: nothing is written.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        for name in (LOG_FILE, METRICS_FILE):
            if folder is not None and (folder / name).is_file():
                _cut_unfinished(folder / name)

    def event(self, level: str, stage: str, text: str) -> None:
        """Adds a line to log.txt: UTC time, level, stage and text, line breaks escaped.

        Args:
            level: ``debug``, ``info``, ``warning`` or ``error``.
            stage: one word, the first of a line that a command prints.
            text: what happened.

        Raises:
            OutputError: it cannot be written.
        """
        self._append(LOG_FILE, event_line(level, stage, masked(text, secrets_here(None))))

    def metrics(self, stage: str, **row: Any) -> None:
        """Adds an object to metrics.jsonl, with its time and stage; numbers that are not finite become null.

        Raises:
            OutputError: it cannot be written.
        """
        values = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "stage": stage} | row
        self._append(METRICS_FILE, json.dumps(_plain(values, secrets_here(None)), ensure_ascii=False, allow_nan=False))

    def _append(self, name: str, line: str) -> None:
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / name, "ab") as file:
                file.write((line + "\n").encode("utf-8", "backslashreplace"))
        except OSError as error:
            raise _unwritable(self.folder / name, error) from None


class Recording(Reporter):
    """Passes on what is said, and writes it to a journal, with the beginning and end of each long piece of work.

    As a context (``with Recording(...) as reporter``), it also writes down the error that ends the work inside.

    Args:
        reporter: who is told.
        journal: where it is written.
    """

    def __init__(self, reporter: Reporter, journal: Journal) -> None:
        self.reporter, self.journal, self.stage = reporter, journal, "start"

    def say(self, text: str) -> None:  # noqa: D102
        self.reporter.say(text)
        self.stage, text = stage_and_text(text, self.stage)
        self.journal.event("info", self.stage, text)

    @contextlib.contextmanager
    def progress(self, label: str, unit: str, cost: Cost | None = None) -> Iterator[ProgressLine]:  # noqa: D102
        self.stage = label
        with timed(self.journal.event, label), self.reporter.progress(label, unit, cost) as line:
            yield line

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            with contextlib.suppress(OutputError):  # the error that ended the work says more
                self.journal.event("error", self.stage, f"{type(error).__name__}: {error}")


def _plain(value: Any, secrets: set[str]) -> Any:
    """A value as JSON has it: numbers of any library as Python's, what is not finite as None, texts masked."""
    if isinstance(value, Mapping):
        return {masked(str(key), secrets): _plain(held, secrets) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(held, secrets) for held in value]
    if hasattr(value, "item"):  # a number of numpy or torch
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int) else masked(str(value), secrets)


def _cut_unfinished(path: Path) -> None:
    """Cuts off what follows the last line break of a file."""
    try:
        with open(path, "rb+") as file:
            whole = end = file.seek(0, 2)
            while whole > 0:
                start = max(0, whole - 65536)
                file.seek(start)
                found = file.read(whole - start).rfind(b"\n")
                whole = start if found < 0 else start + found + 1
                if found >= 0:
                    break
            if whole < end:
                file.truncate(whole)
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{str(path)!r} cannot be written: {error.strerror or first_line(error)}", fix="free some space, or see who owns it"
    )
