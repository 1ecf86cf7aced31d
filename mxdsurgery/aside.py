"""Writing beside a place, so that a file or folder is there whole or not at all: all that is written goes this way.

What is being written is in a new folder ``.NAME.xxxxxxxx.aside`` beside its place, and a marker in it says which process made
it. Names prove nothing: nothing without a marker of ours is ever removed, and with one only when its process is gone.
"""

import ctypes
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from mxdsurgery.outside import check_types, read_json
from mxdsurgery.processes import Owner, machine, started, this_process

# Says that a folder was made by mxdsurgery and may be removed by it.
MARKER = ".mxdsurgery.json"
_END = ".aside"
# In such a folder: what had the place before.
_BEFORE = "before"
# What a process wrote that cannot be looked up, since it is another machine's or before a restart, counts as left after this.
_FORGOTTEN = 7 * 24 * 3600.0


def mark(folder: Path, name: str) -> None:
    """Writes the marker of this process into a folder that it made for what is to be called ``name``; OSError if it cannot."""
    (folder / MARKER).write_text(json.dumps(asdict(this_process()) | {"name": name}), encoding="utf-8")


@contextmanager
def aside(place: Path, within: Path | None = None) -> Iterator[Path]:
    """A new folder to write in what is to be at ``place``; removed at the end. What a dead process left there goes first.

    Args:
        place: the final place.
        within: where the folder is, on the same file system; default: the parent of ``place``.

    Raises:
        OSError: it cannot be written.
    """
    clear_left_overs(place)
    made = Path(tempfile.mkdtemp(dir=within or place.parent, prefix=_beginning(place), suffix=_END))
    try:
        mark(made, place.name)
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def file_aside(place: Path) -> Iterator[Path]:
    """A path to write a file to, of the same name; on success it becomes ``place``, in one step. OSError as in `aside`."""
    with aside(place) as folder:
        yield folder / place.name
        sync(folder / place.name)
        os.replace(folder / place.name, place)


def put_in_place(made: Path, place: Path) -> None:
    """Gives a finished folder its place, on the same file system; the folder that was there is removed.

    Whatever ends the process, ``place`` is the earlier folder or the new one. Only on systems that cannot swap two names at
    once, it may be neither: then `clear_left_overs`, with which all writing begins, puts the earlier one back.

    Raises:
        OSError: it cannot be written.
    """
    if not place.exists():
        os.replace(made, place)
    else:
        with aside(place) as beside:
            if _swapped(made, place):
                os.replace(made, beside / _BEFORE)
            else:
                os.replace(place, beside / _BEFORE)
                try:
                    os.replace(made, place)
                except OSError:
                    os.replace(beside / _BEFORE, place)
                    raise
    sync(place.parent)


def clear_left_overs(place: Path) -> None:
    """Removes what processes that are gone left aside when they wrote to ``place``; first, puts back what they took away."""
    with suppress(OSError):  # the folder is not there, or cannot be read: then nothing is
        for path in place.parent.iterdir():
            if path.name.startswith(_beginning(place)) and path.name.endswith(_END) and _is_left_over(path, place.name):
                with suppress(OSError):
                    if (path / _BEFORE).is_dir() and not os.path.lexists(place):
                        os.replace(path / _BEFORE, place)
                shutil.rmtree(path, ignore_errors=True)


def is_aside(folder: Path) -> bool:
    """Whether something is being, or was, written in a folder: it belongs to nothing yet."""
    return folder.name.endswith(_END) and (folder / MARKER).is_file()


def _is_left_over(folder: Path, name: str) -> bool:
    """Whether a folder has a marker of ours, for what is called ``name``, and the process in it is gone."""
    try:
        values = read_json(folder / MARKER)
        if folder.is_symlink() or values.pop("name") != name:
            return False
        owner = Owner(**values)
        check_types(owner, Owner)
        if owner.machine == machine():
            return started(owner.process) != owner.process_started
        return time.time() - (folder / MARKER).stat().st_mtime > _FORGOTTEN
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _beginning(place: Path) -> str:
    """How the names of folders begin: short, since transformers makes longer names of what is in them."""
    return f".{place.name[:40]}."


def sync(path: Path) -> None:
    """Flushes a file or folder to the disk: a rename is only safe once the content is there."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swapped(first: Path, second: Path) -> bool:
    """Swaps the names of two folders atomically, by Linux's renameat2; False where that is not possible."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0
