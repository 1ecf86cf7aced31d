"""The terms under which a model is given: its licence and what belongs to it, which travel with what is made from it."""

import os
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from huggingface_hub import snapshot_download

# Of names in capitals, without their ending.
_NAMES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "COPYRIGHT*", "*_LICENSE", "*_NOTICES", "*USE[_-]POLICY*")
_ENDINGS = ("", ".TXT", ".MD", ".RST", ".PDF", ".HTML")
# A file of terms is smaller.
_MOST_BYTES = 4 * 2**20


def is_terms(name: str) -> bool:
    """Whether a file of this name in a model's folder is its licence, or a notice or policy that belongs to it."""
    path = PurePosixPath(name.upper())
    ending = path.suffix if path.suffix in _ENDINGS else "" if path.suffix[1:].isdigit() else None  # LICENSE-2.0
    return "/" not in name and ending is not None and any(fnmatchcase(path.name.removesuffix(ending), one) for one in _NAMES)


def terms_of(source: str, commit: str | None) -> list[Path]:
    """The files of terms that a base model has.

    Args:
        source: a folder or a hub id.
        commit: on the hub; those files are fetched, or, without a connection, those that were fetched before are taken.
    """
    if not os.path.isdir(source):
        try:
            names = [f"{form(name)}*" for name in _NAMES for form in (str.upper, str.lower, str.title)]
            source = snapshot_download(source, revision=commit, allow_patterns=names)
        except Exception:  # huggingface_hub raises two dozen kinds here: the card's link to the terms is left, see `push`
            return []
    files = sorted(path for path in Path(source).iterdir() if is_terms(path.name) and path.is_file())
    return [path for path in files if path.stat().st_size <= _MOST_BYTES]
