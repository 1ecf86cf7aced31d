"""What the measuring scripts share: where the docs are, the figures kept there, the machine's description, Markdown tables."""

import json
import math
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parents[1]
DOCS = ROOT / "docs"


def read_json(path: Path, otherwise: Any = None) -> Any:
    """What was measured; ``otherwise`` if nothing was yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else otherwise


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What was measured, from lines of JSON; empty if nothing was yet."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes rows as lines of JSON."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def machine() -> str:
    """The machine that figures are measured on."""
    import torch  # printing a page does not need it

    return f"torch {torch.__version__.split('+')[0]}, {platform.machine()}, CPU threads: {torch.get_num_threads()}"


def table(names: str, rows: Iterable[str], right: Iterable[str] = ()) -> str:
    """Markdown. In names and rows, " | " stands between cells; ``right`` are the names of columns with numbers."""
    rule = "|".join("---:" if name in right else "---" for name in names.split(" | "))
    return "\n".join([f"| {names} |", f"|{rule}|", *(f"| {row} |" for row in rows)])


def cells(*values: object) -> str:
    """A row of a table."""
    return " | ".join(str(value).replace("|", "/") for value in values)


def carried(row: dict[str, Any]) -> float:
    """The share that a layer's experts carry: the least of two; where one is no number, less than any."""
    shares = [row[name] for name in ("expert_share", "few_experts_share")]
    return -math.inf if None in shares else min(shares)


def without_lists(row: dict[str, Any]) -> dict[str, Any]:
    """The figures of layers; not how often each of their experts fires."""
    return {name: value for name, value in row.items() if name != "firing_frequency"}


def unused(row: dict[str, Any]) -> str:
    """The share of experts that never fire; a dense layer has none."""
    return "-" if row["dead_share"] is None else f"{row['dead_share']:.0%}"
