"""What comes from outside: files that others may have written are read within bounds, and nothing in them is ever run.

Every reader here limits a file's size, its nesting and its numbers, and says in a `ValueError` of one line what is wrong;
the caller says what the file should have been. Weights are safetensors, and no path leaves the folder that names it.
"""

import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from safetensors import SafetensorError, safe_open

from mxdsurgery.errors import as_typed, first_line

# The largest settings file.
MOST_BYTES = 16 * 2**20
# The deepest nesting of mappings and lists, and the most characters of one value.
_MOST_DEPTH, _MOST_CHARACTERS = 32, 2**16
# Whole numbers have to be smaller than this, as every real count is.
_MOST_NUMBER = 2**63
# Files and folders of a model, with all that was found out about it.
MOST_FILES = 100_000

# The index of weights in several files.
INDEX_FILE = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"
_FETCH = "fetch it again: a download that was broken off goes on with 'hf download'"
# How a file begins that git holds in place of a large one.
_POINTER = b"version https://git-lfs"

_DECIMAL = re.compile(r"[+-]?(?:0|[1-9][0-9_]{0,63})")

_C_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_text(path: str | Path, most: int = MOST_BYTES) -> str:
    """The text of a file of at most so many bytes.

    Raises:
        ValueError: it is larger, not UTF-8, or no plain file.
        OSError: it is not there or may not be read.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe would block
        raise ValueError("is no plain file")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"is larger than {most} bytes")
    return content.decode("utf-8-sig")


def read_json(path: str | Path, most: int = MOST_BYTES) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it is not JSON, too large, too deeply nested, or holds a number that is too large.
        OSError: as `read_text`.
    """
    try:
        values = json.loads(read_text(path, most))
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    _check_values(values)
    return values


def _check_values(values: Any) -> None:
    """Raises ValueError for a number that is too large or nesting that is too deep; without recursion."""
    pending = [(values, 0)]
    while pending:
        value, depth = pending.pop()
        if depth > _MOST_DEPTH:
            raise ValueError("is nested too deeply")
        if isinstance(value, int) and abs(value) >= _MOST_NUMBER:
            raise ValueError("holds a whole number that is too large")
        if isinstance(value, dict):
            pending += ((inner, depth + 1) for inner in value.values())
        elif isinstance(value, list):
            pending += ((inner, depth + 1) for inner in value)


class _PlainLoader(_C_LOADER):
    """YAML's safe loader, but stricter: a key that stands twice is an error; only plain decimal numbers are whole numbers.

    What is too large, or what YAML 1.1 would read as octal (010) or to the base of 60 (2:30), stays the text that it is.
    """

    def construct_mapping(self, node, deep=False):
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        seen = set()
        for name in names:
            if isinstance(name, str | int | float) and name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} stands twice", node.start_mark)
            if isinstance(name, str | int | float):
                seen.add(name)
        return super().construct_mapping(node, deep)


def _whole_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | str:
    number = int(node.value) if _DECIMAL.fullmatch(node.value) else None
    return node.value if number is None or abs(number) >= _MOST_NUMBER else number


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float | str:
    return node.value if ":" in node.value else loader.construct_yaml_float(node)


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _whole_number)
_PlainLoader.add_constructor("tag:yaml.org,2002:float", _number)


def read_yaml(path: str | Path, most: int = MOST_BYTES) -> Any:
    """What a YAML file holds. Whole numbers from 2^63 on are given as the text that stands there.

    Raises:
        ValueError: it is not YAML, has a key twice, is too large or too deeply nested, has tags, or has aliases (``*name``),
            which can stand for more than any memory holds.
        OSError: as `read_text`.
    """
    text = read_text(path, most)
    try:
        _check_events(text)
        return yaml.load(text, Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError) as error:  # the latter: invalid numbers and dates
        raise ValueError(f"is not valid YAML: {_in_one_line(error)}") from None


def _in_one_line(error: Exception) -> str:
    """What is wrong in a YAML text, and in which line."""
    mark = getattr(error, "problem_mark", None)
    return first_line(error) if mark is None else f"{error.problem}, line {mark.line + 1}"


def _check_events(text: str) -> None:
    """Raises ValueError for what a YAML text should not hold, before anything is built from it; without recursion."""
    depth = 0
    for event in yaml.parse(text, Loader=_C_LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_DEPTH:
            raise ValueError("it is nested too deeply")
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("aliases (*name) are not allowed: write out what they stand for")
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"the tag {shown(event.tag)} is not allowed")
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > _MOST_CHARACTERS:
            raise ValueError(f"it holds a value of more than {_MOST_CHARACTERS} characters")


def shown(value: object, most: int = 1000) -> str:
    """A value as an error quotes it: as Python writes it, cut after so many characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more digits than Python writes
        text = f"a {type(value).__name__} that is too long to be written"
    return text if len(text) <= most else text[:most] + "..."


class FileFault(ValueError):
    """What is wrong with a file, and what the user can do about it.

    Attributes:
        fix: in words.
    """

    def __init__(self, found: str, fix: str) -> None:
        super().__init__(found)
        self.fix = fix


def fix_of(error: Exception) -> str | None:
    """What to do about an error, where its reader knew."""
    return error.fix if isinstance(error, FileFault) else None


def check_pointer(path: Path) -> None:
    """Raises FileFault if a file is what git holds in place of a large one, because git-lfs was not there to fetch it."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                fix = "git lfs install && git lfs pull, in the folder that git cloned"
                raise FileFault(f"{path.name} is a pointer of git-lfs, not the file itself", fix)


def is_local(name: str) -> bool:
    """Whether a name means something on this machine and nothing on the hub: it is there, or is written as a path."""
    return os.path.exists(name) or name.startswith((".", "/", "~", os.sep))


def inside(folder: Path, name: str) -> bool:
    """Whether a name leads to something inside a folder, links followed; in the hub's cache, links to its blobs count."""
    pure = PurePosixPath(name)
    if not name or "\0" in name or "\\" in name or pure.is_absolute() or ".." in pure.parts:
        return False
    return _leads_inside(folder.resolve(), folder / name)


def _leads_inside(root: Path, path: Path) -> bool:
    """Whether a path, links followed, is in ``root``, a resolved path, or among the hub's blobs that belong to it."""
    try:
        found = path.resolve()
    except (OSError, RuntimeError):  # a circle of links
        return False
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    return root in (found, *found.parents) or (blobs is not None and blobs in found.parents)


def check_folder(folder: Path, deep: bool = False) -> None:
    """Raises ValueError if something in a folder (``deep``: or below it) leads out of it, or is no file or folder."""
    root = folder.resolve()
    for path in _entries(folder, deep):
        if path.is_symlink() and not _leads_inside(root, path):
            name = path.relative_to(folder)
            fix = (
                f"if that link is yours, put the file in its place: 'cp -RL {as_typed(folder)} NEW' copies the folder "
                "and all that its links lead to; a hard link ('ln -f') does as well, and takes no space"
            )
            raise FileFault(f"{name} is a link that leaves the folder", fix)
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path.relative_to(folder)} is neither a file nor a folder")


def _entries(folder: Path, deep: bool) -> Iterator[Path]:
    count = 0
    for where, folders, files in os.walk(folder):
        for name in (*folders, *files):
            count += 1
            if count > MOST_FILES:
                raise ValueError(f"it holds more than {MOST_FILES} files")
            yield Path(where) / name
        if not deep:
            return


def foreign_code(config: dict[str, Any]) -> str | None:
    """The entry of a config that would make transformers fetch code from the hub and run it: a kernel; None without one."""
    pending: list[Any] = [config]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        elif isinstance(value, dict):
            pending += value.values()
            for key, named in value.items():
                kernels = named.values() if isinstance(named, dict) else (named,)
                if "_implementation" in str(key) and any("/" in kernel for kernel in kernels if isinstance(kernel, str)):
                    return f"{key} is {shown(named)}"
    return None


def check_types(value: Any, wanted: Any, where: str = "it") -> None:
    """Raises ValueError if a value, or a part of it in dataclasses, lists, tuples or dicts, is not of a type."""
    origin, inner = get_origin(wanted), get_args(wanted)
    if wanted is Any:
        return
    if origin in (Union, UnionType):
        good = any(_has_type(value, one) for one in inner)
    elif is_dataclass(wanted):
        good = isinstance(value, wanted)
        for name, kind in get_type_hints(wanted).items() if good else ():
            check_types(getattr(value, name), kind, name)
    elif origin in (list, tuple):
        good = isinstance(value, origin)
        kinds = itertools.repeat(inner[0]) if origin is list or inner[-1] is ... else inner
        for one, kind in zip(value, kinds, strict=False) if good else ():
            check_types(one, kind, where)
    elif origin is dict:
        good = isinstance(value, dict)
        for key, one in value.items() if good else ():
            check_types(key, inner[0], where)
            check_types(one, inner[1], where)
    elif wanted is float:
        good = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        good = isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))
    if not good:
        raise ValueError(f"{where} is {shown(value)[:100]}")


def _has_type(value: Any, wanted: Any) -> bool:
    try:
        check_types(value, wanted)
        return True
    except ValueError:
        return False


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: model.safetensors or, without it, those that the index names.

    Raises:
        ValueError: the index cannot be read, names a file outside the folder, or one that is not safetensors.
        OSError: as `read_text`.
    """
    if (folder / _WEIGHTS).is_file() or not (folder / INDEX_FILE).is_file():
        return [folder / _WEIGHTS]
    index = read_json(folder / INDEX_FILE, 4 * MOST_BYTES)
    named = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise ValueError(f"{INDEX_FILE} has no weight_map that says which file each weight is in")
    files = sorted(set(named.values()))
    for name in files:
        if not inside(folder, name):
            raise ValueError(f"{INDEX_FILE} names a file outside the folder: {name!r}")
        if not name.endswith(".safetensors"):
            raise ValueError(f"{INDEX_FILE} names {name!r}, which is not safetensors")
    return [folder / name for name in files]


def stored_shapes(folder: Path) -> dict[str, list[int]]:
    """Name and shape of every tensor that a folder's weights hold, from the headers alone.

    Raises:
        ValueError: as `weight_files`, or a file is not there or not whole.
        OSError: as `read_text`.
    """
    shapes: dict[str, list[int]] = {}
    files = weight_files(folder)
    absent = [path.name for path in files if not path.is_file()]
    if absent:
        names = ", ".join(absent[:3]) + (" ..." if len(absent) > 3 else "")
        raise FileFault(f"{len(absent)} of its {len(files)} files of weights are not there: {names}", _FETCH)
    for path in files:
        check_pointer(path)
        try:
            with safe_open(path, "pt") as opened:
                shapes |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}
        except (SafetensorError, OSError) as error:
            raise FileFault(f"{path.name} is damaged or only a part of the file: {first_line(error)}", _FETCH) from None
    return shapes
