"""Who works in a run folder: one process, or several launched together, and no other at the same time.

``owner.json`` in the folder names it: host, process, when both were started. On the same machine, whether that process still
runs is looked up. What another machine or container cannot look up shows in the file's age: its owner touches it every few
seconds, and both times are the file server's. No lock of the file system is relied on: network file systems lack them.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict
from pathlib import Path

from mxdsurgery.errors import RunInUseError
from mxdsurgery.outside import check_types, read_json
from mxdsurgery.processes import Owner, started, this_process

OWNER_FILE = "owner.json"
# Seconds between two signs of life, and without any until an owner on another machine counts as gone.
_BEAT, _SILENCE = 10.0, 60.0
# A file that cannot be read is as old as this before it counts as damaged: its owner may be writing it.
_UNREADABLE = 2.0
# After taking over from an owner that is gone, so many seconds pass until it is clear that nobody else did so, too.
_CONTEST = 0.3
# Between two looks whether it is one's turn.
_TURN = 0.05
_MOST_BYTES = 2**14


def _in_use(folder: Path, owner: Owner, how: str) -> RunInUseError:
    """The error that names who works in a folder."""
    return RunInUseError(
        f"{owner} works in {str(folder)!r}, since {owner.since}",
        expected="one process at a time",
        fix=f"wait until it has ended, or {how}; or give another --out",
    )


def _created(aside: Path, file: Path) -> bool:
    """Gives a file its name, unless something has that name; in one step, on network file systems too.

    Raises:
        FileNotFoundError: there is no such file any more.
    """
    try:
        os.link(aside, file)
        return True
    except FileExistsError:
        return False
    except (OSError, NotImplementedError):  # a file system without hard links
        content = aside.read_bytes()
        try:
            with open(file, "xb") as made:
                made.write(content)
            return True
        except FileExistsError:
            return False


def read_owner(folder: Path) -> Owner | None:
    """Who has a folder; None where nobody has, or where no version of ours wrote the file."""
    try:
        owner = Owner(**read_json(folder / OWNER_FILE, _MOST_BYTES))
        check_types(owner, Owner)
        return owner
    except (OSError, ValueError, TypeError):
        return None


# By folder, the ownership that this process has of it.
_held: dict[str, "Ownership"] = {}
_lock = threading.RLock()


class Ownership:
    """A folder that this process works in, once it has taken it, until it gives it back.

    Args:
        folder: made when it is taken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file, self.key = folder, folder / OWNER_FILE, os.path.realpath(folder)
        self.me, self.thread = this_process(), threading.get_ident()
        self.ended = threading.Event()
        self.depth = 0  # how often it was taken and not given back: what takes it may use others that do
        self.lost = False  # another process has taken it over
        self.before: Owner | None = None  # who had it and is gone, without having given it back
        # The folder, unless it was there and empty, and parents that were not there, the lowest first.
        self.made: list[Path] = []

    def take(self) -> "Ownership":
        """Makes the folder this process's own; returns what holds it, which is another one if this thread has it already.

        Raises:
            RunInUseError: another process works in it, or another thread of this one.
            OSError: it cannot be written.
        """
        with _lock:
            held = _held.get(self.key)
            if held is not None and held.me.process == os.getpid():  # a forked process holds nothing
                if held.thread != threading.get_ident():
                    raise _in_use(self.folder, held.me, "end that call")
                held.depth += 1
                return held
            places = self.folder.parents if self._is_empty() else (self.folder, *self.folder.parents)
            self.made = [place for place in places if place == self.folder or not place.exists()]
            self._write()
            self.depth = 1
            _held[self.key] = self
        threading.Thread(target=self._beat, name="mxdsurgery owner", daemon=True).start()
        return self

    def _is_empty(self) -> bool:
        return self.folder.is_dir() and not any(self.folder.iterdir())

    def _write(self) -> None:
        """Puts owner.json there, whole or not at all; see `take`."""
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            before = self._read()
            there = before is not None or self.file.exists()
            if before is not None:
                self._check_gone(before)
            elif there and self._silence() < _UNREADABLE:
                time.sleep(_CONTEST)
                continue
            aside = self.folder / f".{OWNER_FILE}.{self.me.token}"
            try:
                aside.write_text(json.dumps(asdict(self.me), indent=2), encoding="utf-8")
                if not there:
                    if _created(aside, self.file):
                        return
                elif self._read() == before and self.file.exists():
                    os.replace(aside, self.file)
                    time.sleep(_CONTEST)
                    if self._read() == self.me:
                        self.before = before
                        return
            except FileNotFoundError:
                pass  # the one before ended meanwhile, and emptied or removed the folder
            finally:
                aside.unlink(missing_ok=True)

    def _read(self) -> Owner | None:
        return read_owner(self.folder)

    def _check_gone(self, owner: Owner) -> None:
        """Raises RunInUseError unless an owner is gone."""
        if owner.machine == self.me.machine:
            if owner.process != self.me.process and started(owner.process) == owner.process_started:
                raise _in_use(self.folder, owner, f"end it (kill {owner.process})")
            return  # where it is this very process, an earlier call of it is meant: it is over
        left = _SILENCE - self._silence()
        if left > 0:
            gone = f"if that host or process is gone, repeat the command in {left:.0f} s"
            raise _in_use(self.folder, owner, f"end it there; {gone}")

    def _silence(self) -> float:
        """Seconds since the last sign of life, by the clock of who keeps the files."""
        probe = self.folder / f".now.{self.me.token}"
        try:  # opened, since a network file system may remember an old time, and the owner may remove the probe
            with open(probe, "wb") as now, open(self.file, "rb") as file:
                return os.fstat(now.fileno()).st_mtime - os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return _SILENCE
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self.ended.wait(_BEAT):
            with contextlib.suppress(OSError):  # a server that is away for a moment
                if self._taken_over():
                    return
                os.utime(self.file)

    def _taken_over(self) -> bool:
        owner = self._read()
        self.lost = self.lost or (owner is not None and owner != self.me)
        return self.lost

    def check(self, now: bool = False) -> None:
        """Raises RunInUseError if another process has taken the folder over, as it does where this one seemed gone.

        Args:
            now: look, and do not rely on the last sign of life.
        """
        if self.lost or (now and self._taken_over()):
            owner = self._read()
            raise RunInUseError(
                f"{owner or 'another process'} took {str(self.folder)!r} over: this one had given no sign of life",
                expected="one process at a time",
                fix="let the other one go on, or end it and repeat this command with --resume",
            )

    def give_back(self, beside: Collection[str] = ()) -> None:
        """Ends the ownership; removes the folder, and parents that were made for it, where nothing is in them.

        Args:
            beside: names of files that say nothing once all others are gone.
        """
        with _lock:
            self.depth -= 1
            if self.depth > 0:
                return
            self.ended.set()
            _held.pop(self.key, None)
            with contextlib.suppress(OSError):  # something is in one of them
                if not self._taken_over():
                    if {path.name for path in self.folder.iterdir()} <= {OWNER_FILE, *beside}:
                        for name in beside:
                            (self.folder / name).unlink(missing_ok=True)
                    self.file.unlink(missing_ok=True)
                for folder in self.made:
                    folder.rmdir()


@contextlib.contextmanager
def my_turn(folder: Path) -> Iterator[None]:
    """While open, no other process or thread is in here with the same folder, which is there for that: it waits. For moments.

    Raises:
        RunInUseError: it is not free after the time in which an owner that is gone is known to be gone.
        OSError: it cannot be written.
    """
    until, turn = time.monotonic() + 2 * _SILENCE, None
    while turn is None:
        try:
            turn = Ownership(folder).take()
        except RunInUseError:
            if time.monotonic() > until:
                raise
            time.sleep(_TURN)
    try:
        yield
    finally:
        turn.give_back()
        with contextlib.suppress(OSError):  # the next one has it, or removed it
            folder.rmdir()
