"""What a command says while it works: stages, progress and tables. On a terminal with bars, elsewhere with plain lines."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from mxdsurgery.errors import MxDError

# Without a terminal, a progress line every so many seconds.
_LINE_EVERY = 15.0


class Reporter:
    """Says nothing; the base of what does. Every stage function takes one."""

    def say(self, text: str) -> None:
        """One line about what happens or was found."""

    @contextmanager
    def progress(self, label: str, unit: str) -> Iterator["ProgressLine"]:
        """A long piece of work, counted in ``unit``s."""
        yield ProgressLine()


class ProgressLine:
    """A piece of work under way; says nothing."""

    def update(self, done: float, total: float, note: str = "") -> None:
        """Where the work stands."""


class ConsoleReporter(Reporter):
    """Speaks to a console (standard error by default, so that standard output holds results only).

    Args:
        console: which.
        level: the lowest level of what is said, as `logging` names them: ``warning`` is nothing, for all that is said is
            information; ``info``; ``debug`` is one line per event, with its time, level and stage, and no bars.
    """

    def __init__(self, console: Console | None = None, level: str = "info") -> None:
        self.console = console or Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
        self.level, self.stage = level, "start"

    def say(self, text: str) -> None:  # noqa: D102
        if self.level == "debug":
            self.stage, text = stage_and_text(text, self.stage)
            self._event("info", self.stage, text)
        elif self.level == "info":
            self._print(text)

    @contextmanager
    def progress(self, label: str, unit: str) -> Iterator[ProgressLine]:  # noqa: D102
        if self.level == "debug":
            with timed(self._event, label):
                yield _PlainLine(self, label, unit)
            return
        if self.level != "info":
            yield ProgressLine()
            return
        if not self.console.is_terminal:
            yield _PlainLine(self, label, unit)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            _Rate(unit),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console) as bar:
            yield _BarLine(bar, label)

    def _event(self, level: str, stage: str, text: str) -> None:
        self._print(event_line(level, stage, text))

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False)


class _PlainLine(ProgressLine):
    def __init__(self, reporter: ConsoleReporter, label: str, unit: str) -> None:
        self.reporter, self.label, self.unit = reporter, label, unit
        self.start = time.monotonic()
        self.last = self.start

    def update(self, done: float, total: float, note: str = "") -> None:
        now = time.monotonic()
        if now - self.last < _LINE_EVERY and done < total:
            return
        self.last = now
        rate = done / max(now - self.start, 1e-9)
        remaining = (total - done) / max(rate, 1e-9)
        self.reporter.say(
            f"{self.label} {done / total:4.0%}  {compact(rate)} {self.unit}/s  {duration(remaining)} left  {note}".rstrip()
        )


class _BarLine(ProgressLine):
    def __init__(self, bar: Progress, label: str) -> None:
        self.bar = bar
        self.task = bar.add_task(label, total=None, note="")

    def update(self, done: float, total: float, note: str = "") -> None:
        self.bar.update(self.task, completed=done, total=total, note=note)


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{compact(task.speed or 0)} {self.unit}/s")


def event_line(level: str, stage: str, text: str) -> str:
    """One line about an event: UTC time, level, stage and text; line breaks and what else cannot be printed are escaped."""
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    return f"{now} {level:<7} {stage:<10} {shown}".rstrip()


def stage_and_text(line: str, before: str) -> tuple[str, str]:
    """A line's stage, its first word, and the rest; a line that begins with blanks goes on with the stage before."""
    stage, _, text = line.partition(" ") if line[:1].strip() else (before, "", line)
    return stage, text.strip()


@contextmanager
def timed(event: Callable[[str, str, str], None], stage: str) -> Iterator[None]:
    """Tells when a piece of work begins, and when it ends: well, or with an error.

    Args:
        event: is told: level, stage, text.
        stage: the work.
    """
    event("info", stage, "begins")
    start = time.monotonic()
    try:
        yield
    except BaseException as error:
        with suppress(MxDError):  # what stopped it says more
            event("error", stage, f"stopped after {time.monotonic() - start:.1f} s: {type(error).__name__}")
        raise
    event("info", stage, f"ended after {time.monotonic() - start:.1f} s")


def compact(number: float) -> str:
    """1234567 as 1.23M; for parameters, tokens and rates."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def size(count: float) -> str:
    """Bytes in binary units."""
    for power, suffix in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 2**power:
            return f"{count / 2**power:.3g} {suffix}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Seconds as 42 s, 3.5 min or 2.1 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
