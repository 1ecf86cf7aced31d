"""Paths as users write them: ``~`` is their home folder, wherever a path can be given.

Recipe keys (`mxdsurgery.keys`) and the arguments of the public functions (`mxdsurgery.hardware.guard`) are expanded here; the
command line hands its flags on to both.
"""

import os
import re
import sys
from pathlib import Path
from typing import TypeVar

from mxdsurgery.errors import PathError

# Recipe keys and arguments of public functions that may name a file or folder.
PATH_NAMES = frozenset(
    {"model", "folder", "adapter", "base", "recipe", "data", "eval_data", "cache_activations", "out", "edits", "path"}
)

# What Python makes of bytes of a file's name that are no text in the encoding of this environment.
_NO_TEXT = re.compile(r"[\udc80-\udcff]")

Given = TypeVar("Given")


def given_path(name: str, value: Given) -> Given:
    """A path with the home folder in place of a leading ``~`` or ``~user``; anything else as it is.

    Args:
        name: of the recipe key or argument.
        value: a text or path is expanded where the name is in `PATH_NAMES`; the result is of the same type.

    Raises:
        PathError: there is no home folder to put in its place; or the path has bytes that are no text here, which neither
            transformers nor a recipe can hold.
    """
    if name not in PATH_NAMES or not isinstance(value, str | Path):
        return value
    if _NO_TEXT.search(str(value)):
        raise PathError(
            f"{name} is {str(value)!r}, which is no text in this environment's encoding ({sys.getfilesystemencoding()})",
            expected="a name that can be read as text",
            fix="set PYTHONUTF8=1 and repeat the command, or rename the file or folder",
        )
    if not str(value).startswith("~"):
        return value
    expanded = os.path.expanduser(value)
    if expanded.startswith("~"):
        raise PathError(
            f"{name} is {str(value)!r}, and the home folder is not known",
            expected="a path without ~, or an environment with HOME",
            fix=f"write the folder's whole path, or ./{value} for one that is named so",
        )
    return type(value)(expanded)


def check_working_folder() -> None:
    """Raises PathError if the folder that this process works in was deleted: no relative path leads anywhere then."""
    try:
        os.getcwd()
    except OSError as error:
        raise PathError(
            f"the folder that this command was started in is gone: {error.strerror}",
            expected="a working folder that exists",
            fix="cd to another folder (or the same one, made anew), and repeat the command",
        ) from None
