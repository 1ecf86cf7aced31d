"""What a command says while it works: stages, progress and tables. On a terminal with bars, elsewhere with plain lines."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from mxdsurgery.errors import MxDError
from mxdsurgery.terminal.streams import hush

# Without a terminal, a progress line every so many seconds.
_LINE_EVERY = 15.0
# The rate of work is measured over the last so many seconds.
_RECENT = 30.0

# From a number of units of work: what the first so many of them cost, in any unit of cost.
Cost = Callable[[float], float]


class Reporter:
    """Says nothing; the base class of reporters that do. Every stage function takes one."""

    def say(self, text: str) -> None:
        """One line about what happens or was found."""

    @contextmanager
    def progress(self, label: str, unit: str, cost: Cost | None = None) -> Iterator["ProgressLine"]:
        """A long piece of work, counted in ``unit``s; ``cost`` where not all of them take equally long."""
        yield ProgressLine()


class ProgressLine:
    """A piece of work under way; says nothing."""

    def update(self, done: float, total: float, note: str = "") -> None:
        """Where the work stands."""


class ConsoleReporter(Reporter):
    """Speaks to a console (standard error by default, so that standard output holds results only).

    Args:
        console: which.
        level: the lowest level of what is said, as `logging` names them: ``warning``: nothing, since all that is said
            is information; ``info``: all of it; ``debug``: one line per event, with its time, level and stage, and no bars.
    """

    def __init__(self, console: Console | None = None, level: str = "info") -> None:
        self.console = console or _Errors(stderr=True, highlight=False, emoji=False, soft_wrap=True)
        self.level, self.stage = level, "start"

    def say(self, text: str) -> None:  # noqa: D102
        if self.level == "debug":
            self.stage, text = stage_and_text(text, self.stage)
            self._event("info", self.stage, text)
        elif self.level == "info":
            self._print(text)

    @contextmanager
    def progress(self, label: str, unit: str, cost: Cost | None = None) -> Iterator[ProgressLine]:  # noqa: D102
        pace = Pace(cost)
        if self.level == "debug":
            with timed(self._event, label):
                yield _PlainLine(self, label, unit, pace)
            return
        if self.level != "info":
            yield ProgressLine()
            return
        if not self.console.is_terminal:
            yield _PlainLine(self, label, unit, pace)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console) as bar:
            yield _BarLine(bar, label, unit, pace)

    def _event(self, level: str, stage: str, text: str) -> None:
        self._print(event_line(level, stage, text))

    def _print(self, text: str) -> None:
        try:
            self.console.print(text, markup=False)
        except OSError:  # a terminal that is gone, a log on a full disk
            self.console.quiet = True


class _Errors(Console):
    """Standard error. Work goes on when nobody reads it any more, as in ``2>&1 | head``."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        hush(self.file)


class Pace:
    """How fast a piece of work goes and how long the rest of it takes, judged by the most recent part and not by all of it.

    Args:
        cost: of the first so many units of the work; default: all of them cost the same.
        clock: seconds.
    """

    def __init__(self, cost: Cost | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.cost, self.clock, self.total = cost or (lambda done: done), clock, 0.0
        self.begun = (clock(), 0.0)
        self.seen: deque[tuple[float, float]] = deque()  # (time, units done)

    def update(self, done: float, total: float) -> None:
        """Notes that ``done`` of ``total`` units are done now."""
        self.total = total
        self.seen.append((self.clock(), done))
        while len(self.seen) > 2 and self.seen[1][0] <= self.seen[-1][0] - _RECENT:
            self.seen.popleft()

    def _span(self) -> tuple[float, float, float]:
        """The most recent part: its seconds, and the units done at its beginning and its end."""
        # Not from the beginning, if possible: machines warm up, and a resumed run begins with much done already.
        (start, before), (end, done) = (self.seen[0] if len(self.seen) > 1 else self.begun), self.seen[-1]
        return max(end - start, 1e-9), before, done

    @property
    def rate(self) -> float:
        """Units per second."""
        seconds, before, done = self._span()
        return (done - before) / seconds

    @property
    def left(self) -> float:
        """Seconds until all is done."""
        seconds, before, done = self._span()
        return (self.cost(self.total) - self.cost(done)) * seconds / max(self.cost(done) - self.cost(before), 1e-9)

    def words(self, unit: str) -> str:
        """Rate and time left, for people."""
        return f"{compact(self.rate)} {unit}/s  {duration(self.left)} left"


class _PlainLine(ProgressLine):
    def __init__(self, reporter: ConsoleReporter, label: str, unit: str, pace: Pace) -> None:
        self.reporter, self.label, self.unit, self.pace = reporter, label, unit, pace
        self.last = time.monotonic()

    def update(self, done: float, total: float, note: str = "") -> None:
        self.pace.update(done, total)
        now = time.monotonic()
        if now - self.last < _LINE_EVERY and done < total:
            return
        self.last = now
        self.reporter.say(f"{self.label} {done / total:4.0%}  {self.pace.words(self.unit)}  {note}".rstrip())


class _BarLine(ProgressLine):
    def __init__(self, bar: Progress, label: str, unit: str, pace: Pace) -> None:
        self.bar, self.unit, self.pace = bar, unit, pace
        self.task = bar.add_task(label, total=None, note="")

    def update(self, done: float, total: float, note: str = "") -> None:
        self.pace.update(done, total)
        self.bar.update(self.task, completed=done, total=total, note=f"{self.pace.words(self.unit)}  {note}")


def event_line(level: str, stage: str, text: str) -> str:
    """One line about an event: UTC time, level, stage and text; line breaks and what else cannot be printed are escaped."""
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    return f"{now} {level:<7} {stage:<10} {shown}".rstrip()


def stage_and_text(line: str, before: str) -> tuple[str, str]:
    """A line's stage, its first word, and the rest; a line that begins with blanks belongs to the stage before."""
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
        with suppress(MxDError):  # the error that stopped it says more
            event("error", stage, f"stopped after {time.monotonic() - start:.1f} s: {type(error).__name__}")
        raise
    event("info", stage, f"ended after {time.monotonic() - start:.1f} s")


def compact(number: float) -> str:
    """1234567 as 1.23M; for parameters, tokens and rates."""
    number = float(f"{number:.3g}")  # rounded first: 999,936 is 1M
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def size(count: float) -> str:
    """Bytes in binary units."""
    for power, suffix in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 2**power:
            digits = 4 if count >= 999.5 * 2**power else 3  # 1,010 MiB is not yet a GiB
            return f"{count / 2**power:.{digits}g} {suffix}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Seconds as 42 s, 3.5 min or 2.1 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
