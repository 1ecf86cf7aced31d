"""The embedded demo: two small language models of Python source, and the text they were trained on.

The models are trained by ``scripts/measure/train_demo_models.py`` and committed beside this file. The text is the standard
library of the Python that is running: nothing to download, nothing to ship.
"""

import functools
import os
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

# Public names of the demo models, and the folder that holds each.
DEMO_MODELS: dict[str, Path] = {name: Path(__file__).parent / name for name in ("demo-glu", "demo-mlp")}

# Tests and third-party packages are not the library's own prose.
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
_HELDOUT_ONE_IN = 12


def stdlib_documents(split: str) -> Iterator[str]:
    """Yields the standard library's source files, one document each, in a fixed shuffled order.

    Args:
        split: ``train`` or ``heldout``. Files are split by a hash of their path, so a file is always on one side.
    """
    root = sysconfig.get_path("stdlib")
    for digest, path in _source_files(root):
        heldout = digest % _HELDOUT_ONE_IN == 0
        if heldout == (split == "heldout"):
            yield Path(root, path).read_text(encoding="utf-8", errors="replace")


@functools.cache  # a text is begun several times in a conversion
def _source_files(root: str) -> list[tuple[int, str]]:
    """A hash of each file's path, and the path in the library's folder, in the order of the hashes.

    By that order neighbours in a folder are spread out, and it is the same on every machine.
    """
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]  # packages beside the library are many files
        paths = (Path(folder, file).relative_to(root).as_posix() for file in files if file.endswith(".py"))
        found += [(zlib.crc32(path.encode()), path) for path in paths]
    return sorted(found)
