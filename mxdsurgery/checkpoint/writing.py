"""Writing a result: where it may go, and a folder that appears whole or not at all."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mxdsurgery.aside import aside, clear_left_overs, file_aside, put_in_place, sync
from mxdsurgery.checkpoint.converted import PLAN_FILE
from mxdsurgery.errors import OutputError, first_line
from mxdsurgery.outside import weight_files
from mxdsurgery.terminal.console import size


def check_output(out: str | Path, overwrite: bool) -> Path:
    """The folder to write, links resolved, after a check that it can be written. Leaves nothing behind.

    Raises:
        OutputError: it exists and ``overwrite`` is not given, or it is no folder of ours; or its parent cannot be written.
    """
    try:
        path = Path(out).resolve()
        clear_left_overs(path)
        if path.exists() and not (path / PLAN_FILE).is_file():
            what = "exists already and was not written by mxdsurgery"
            what += "" if path.is_dir() else ": it is a file"
            raise OutputError(f"{str(out)!r} {what}", expected="a new folder", fix="give another --out")
        if path.exists() and not overwrite:
            raise OutputError(
                f"{str(out)!r} exists already", expected="a new folder", fix="give another --out, or --overwrite"
            )
    except OSError as error:
        raise _unwritable(out, error) from None
    check_place(path)
    return path


def check_place(path: Path, flag: str = "--out") -> None:
    """Raises OutputError if nothing can be written at a path, or its parents cannot be made. Leaves nothing behind.

    Args:
        path: where a file or folder is to be.
        flag: what names it.
    """
    try:
        nearest = next(parent for parent in path.absolute().parents if parent.exists())
        with aside(path, nearest):
            pass
    except OSError as error:
        raise _unwritable(path, error, flag) from None


def check_file(path: Path) -> None:
    """Raises OutputError if a file, in place of an earlier one, cannot be written at a path. Leaves nothing behind."""
    if path.is_dir():
        raise OutputError(f"{str(path)!r} cannot be written: it is a folder", expected="a file, or nothing there yet")
    check_place(path)


def _unwritable(path: str | Path, error: OSError, flag: str = "--out") -> OutputError:
    return OutputError(f"{str(path)!r} cannot be written: {error.strerror or first_line(error)}", fix=f"give another {flag}")


def check_apart(out: str | Path, folder: str | Path, what: str) -> None:
    """Raises OutputError if ``out`` is the folder that is read, ``what`` it is, or inside it, or has it inside."""
    target, source = Path(out).resolve(), Path(folder).resolve()
    if target == source:
        raise OutputError(f"{str(out)!r} is {what}", expected="another one: it is left as it is", fix="give another --out")
    if source in target.parents or target in source.parents:
        where = "inside" if source in target.parents else "around"
        raise OutputError(
            f"{str(out)!r} is {where} {str(folder)!r}, {what}",
            expected="a folder beside it: it is left as it is",
            fix="give another --out",
        )


def check_room(out: str | Path, needed: int, flag: str = "--out") -> None:
    """Raises OutputError if the disk that ``out``, which ``flag`` names, will be on has less room than so many bytes."""
    nearest = next(parent for parent in (Path(out).resolve(), *Path(out).resolve().parents) if parent.exists())
    free = shutil.disk_usage(nearest).free
    if free < needed:
        raise OutputError(
            f"{str(out)!r} takes {size(needed)} of disk while it is written, and {size(free)} are free there",
            expected="room for it",
            fix=f"free some space, or give another {flag}",
        )


def check_room_for_copy(out: str | Path, folder: Path) -> None:
    """As `check_room`, for a result with as many bytes of weights as a converted folder."""
    check_room(out, sum(path.stat().st_size for path in weight_files(folder)))


@contextmanager
def written_whole(out: Path, within: Path | None = None) -> Iterator[Path]:
    """A folder to write into; on success it becomes ``out``, on an error it is removed. Creates parents.

    Whatever ends the process, ``out`` is the earlier folder or the new one; see `put_in_place`.

    Args:
        out: the final place.
        within: where the folder is written until then, on the same file system; default: the parent of ``out``.

    Raises:
        OutputError: the disk is full or the folder cannot be written, or another process wrote ``out`` meanwhile.
    """
    was_there = out.exists()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with aside(out, within) as folder:
            staging = folder / folder.name.strip(".")
            staging.mkdir()
            yield staging
            mode = staging.stat().st_mode & 0o777  # as the process's umask has it
            for file in (staging, *staging.rglob("*")):
                with suppress(PermissionError):  # file systems on which all files have one mode
                    file.chmod(mode if file.is_dir() else mode & 0o666)
                sync(file)
            if out.exists() and not was_there:
                raise OutputError(f"another process wrote {str(out)!r} meanwhile", fix="give another --out, or --overwrite")
            put_in_place(staging, out)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{str(out)!r} cannot be written: {first_line(error)}", fix="free some space, or give another --out"
        ) from None


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON, aside and then renamed; makes the folder if it is not there.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        path.parent.mkdir(exist_ok=True)
        with file_aside(path) as file:
            file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{str(path)!r} cannot be written: {error.strerror or first_line(error)}") from None
