"""Where a text is: on this machine, and then in which files, or on the hub.

A SPEC that names something on this machine means that, also where it looks like a data set's name. The files of a folder or
of a pattern are read in natural order: ``part-2`` comes before ``part-10``.
"""

import glob
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

from mxdsurgery.errors import DataError, MxDWarning, first_line
from mxdsurgery.outside import MOST_FILES, inside, is_local, read_json

FORMS = (
    "a .txt, .jsonl, .json, .csv, .tsv or .parquet file (also packed: .gz, .bz2, .zst), a folder of such files or of "
    "save_to_disk, a pattern (*.jsonl), a data set on the hub (user/name[:config[:split]]), or stdlib"
)
_SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
PACKED = (".gz", ".bz2", ".zst")
# What `datasets` writes beside a data set's rows.
_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
# Files that describe a folder of texts and are no part of it.
_ABOUT = re.compile(r"readme|licen[cs]e|notice|dataset_infos?\.json|state\.json|dataset_dict\.json", re.IGNORECASE)
# The part of a data set that a file or folder says it is; only where a folder holds several.
_SPLIT = re.compile(r"(?:^|[-_.])(train|validation|valid|val|dev|test|eval|heldout)(?=[-_.0-9]|$)")


def plain_suffix(path: Path) -> str:
    """What a file's name ends with, in lower case, without that of its packing."""
    name = path.name.lower()
    return Path(name.removesuffix(next((end for end in PACKED if name.endswith(end)), ""))).suffix


def is_pattern(spec: str) -> bool:
    """Whether a SPEC is a pattern that files match."""
    return re.search(r"[*?\[]", spec) is not None and not os.path.exists(spec)


def on_hub(spec: str) -> bool:
    """Whether a SPEC names a data set on the hub: it is nothing on this machine, and is not written like a file."""
    return not (is_local(spec) or spec == "-" or is_pattern(spec) or plain_suffix(Path(spec)) in _SUFFIXES)


def text_name(spec: str) -> str:
    """How a text is named where others read it: a local one without its path."""
    return Path(os.path.abspath(spec)).name if os.path.exists(spec) or is_pattern(spec) else spec


def lasting(spec: str) -> str:
    """A SPEC that means the same text in another working folder: the path of what is on this machine, from the root."""
    here = spec.partition(":")[0] != "stdlib" and (os.path.exists(spec) or is_pattern(spec))
    return os.path.abspath(spec) if here else spec


def check_there(spec: str | None) -> None:
    """Raises DataError if a text, where one is given, is none on this machine; what is on the hub is not asked for."""
    if spec is not None and not (spec.startswith("stdlib") or on_hub(spec)):
        text_files(spec)


def text_files(spec: str) -> list[Path]:
    """The files of a text on this machine, in their order: one, a folder's, or those that a pattern matches.

    Raises:
        DataError: there are none, a pipe cannot be read again, or a folder holds several parts and no training part.
    """
    try:
        if os.path.isfile(spec):
            return [Path(spec)]
        if os.path.isdir(spec):
            return _of_folder(Path(spec))
        if spec == "-" or os.path.exists(spec):
            raise DataError(
                f"the text {spec!r} is a pipe or a device",
                expected="a file: a text is read more than once, at first for what is held out",
                fix="write it to a file first, and name that",
            )
        if is_pattern(spec):
            return _matching(spec)
    except OSError as error:
        raise DataError(f"{spec!r} cannot be read: {error.strerror or first_line(error)}") from None
    raise DataError(f"no text file {spec!r}", expected=FORMS)


def _natural(path: Path) -> list[int | str]:
    return [int(part) if part.isdecimal() else part for part in re.split("([0-9]+)", str(path))]


def _matching(pattern: str) -> list[Path]:
    found = sorted(map(Path, glob.iglob(pattern, recursive=True)), key=_natural)
    files = [path for path in found if path.is_file()]
    if not files:
        files = [file for folder in found if folder.is_dir() for file in _of_folder(folder)]
    if not files:
        raise DataError(f"no file matches {pattern!r}", expected=FORMS)
    return files


def _of_folder(folder: Path) -> list[Path]:
    try:
        if (folder / _SPLITS).is_file():
            return _of_folder(folder / _training_split(folder))
        if (folder / _STATE).is_file() and (folder / _INFO).is_file():
            return _saved_files(folder)
    except ValueError as error:
        raise DataError(f"{str(folder)!r} is no whole folder of save_to_disk: {first_line(error)}") from None
    texts: dict[str | None, list[Path]] = {}
    others = []
    for path in sorted(_files_below(folder), key=_natural):
        if plain_suffix(path) in _SUFFIXES:
            texts.setdefault(_split_of(path.relative_to(folder)), []).append(path)
        else:
            others.append(path)
    if not texts:
        has = f", but {_listed(folder, others)}" if others else ""
        raise DataError(f"{str(folder)!r} holds no text{has}", expected=FORMS, fix="name the text itself")
    if len(texts.keys() - {None}) > 1:
        others += [path for split, paths in texts.items() if split != "train" for path in paths]
        texts = {"train": texts["train"]} if "train" in texts else _refuse(folder, (name for name in texts if name))
    if others:
        _say_left_out(folder, _listed(folder, others))
    return sorted((path for paths in texts.values() for path in paths), key=_natural)


def _files_below(folder: Path) -> list[Path]:
    """The files in a folder and below it; not hidden ones, those that begin with _, nor those about the folder."""

    def fail(error: OSError) -> None:
        raise error

    found: list[Path] = []
    for where, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        found += (Path(where) / name for name in files if not name.startswith((".", "_")) and not _ABOUT.match(name))
        if len(found) > MOST_FILES:
            raise DataError(f"{str(folder)!r} holds more than {MOST_FILES} files", fix="name the text itself")
    return found


def _split_of(path: Path) -> str | None:
    """The part of a data set that a path says it is of; None where it says nothing."""
    *folders, name = path.parts
    found = [match[1] for match in map(_SPLIT.fullmatch, folders) if match] or _SPLIT.findall(name)
    return {"valid": "validation", "val": "validation"}.get(found[0], found[0]) if found else None


def _training_split(folder: Path) -> str:
    """The part to read of a `DatasetDict`: the only one, or ``train``."""
    held = read_json(folder / _SPLITS)
    splits = held.get("splits") if isinstance(held, dict) else None
    if not isinstance(splits, list) or not all(isinstance(s, str) and s and Path(s).name == s for s in splits):
        raise ValueError(f"{_SPLITS} names no parts in the folder")
    if len(splits) == 1:
        return splits[0]
    if "train" not in splits:
        _refuse(folder, splits)
    _say_left_out(folder, ", ".join(name for name in splits if name != "train"))
    return "train"


def _saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a `Dataset` that was saved: not those that it cached beside them."""
    held = read_json(folder / _STATE)
    files = held.get("_data_files") if isinstance(held, dict) else None
    names = [entry.get("filename") for entry in files if isinstance(entry, dict)] if isinstance(files, list) else [None]
    for name in names:
        if not isinstance(name, str) or not inside(folder, name):
            raise ValueError(f"{_STATE} names no files in the folder")
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
    return [folder / name for name in names]


def _refuse(folder: Path, splits: Iterable[str]) -> dict:
    raise DataError(
        f"{str(folder)!r} holds several parts of a data set: {', '.join(sorted(splits))}",
        expected="one part, or a part named train",
        fix="name one of them: its folder, or a pattern that its files match",
    )


def _listed(folder: Path, paths: list[Path]) -> str:
    names = [str(path.relative_to(folder)) for path in paths]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _say_left_out(folder: Path, what: str) -> None:
    warnings.warn(f"left out of the text {str(folder)!r}: {what}", MxDWarning, stacklevel=2)
