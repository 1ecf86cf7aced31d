"""The embedded demo: two small language models of Python source, and the text they were trained on.

The models are trained by ``scripts/train_demo_models.py`` and committed beside this file. The text is the standard
library of the Python that is running: nothing to download, nothing to ship.
"""

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
    root = Path(sysconfig.get_path("stdlib"))
    paths = [
        path.relative_to(root)
        for path in root.rglob("*.py")
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    ]
    # Ordered by hash: neighbours in a folder are spread out, and the order is the same on every machine.
    for digest, path in sorted((zlib.crc32(path.as_posix().encode()), path) for path in paths):
        heldout = digest % _HELDOUT_ONE_IN == 0
        if heldout == (split == "heldout"):
            yield (root / path).read_text(encoding="utf-8", errors="replace")
