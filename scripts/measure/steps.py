"""Commands as a user types them, what they printed, and Markdown of both: for pages that show the tool at work.

A command runs in a folder where the shared material, scripts/ and examples/ appear under their plain names. What it printed is
kept in KEPT/<name>.txt; how long it took, and the memory of its largest process, in KEPT/costs.json.
"""

import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from pages import ROOT, read_json

from mxdsurgery.checkpoint.writing import write_json

# How small models write what can be read.
SAMPLING = "--temperature 0.7 --top-k 50 --top-p 0.95"


@dataclass(frozen=True)
class Step:
    """A command, the text before it, and where its output is kept.

    Attributes:
        name: of the output's file.
        text: Markdown before the command.
        command: as a user types it.
        last: only so many of the last lines are kept; 0: all.
        first: only so many of the first lines of those; 0: all.
    """

    name: str
    text: str
    command: str
    last: int = 0
    first: int = 0

    def markdown(self, kept: Path) -> str:
        """The text, the command and what it printed; nothing if it did not run yet."""
        path = kept / f"{self.name}.txt"
        if not path.is_file():
            return ""
        printed = path.read_text(encoding="utf-8")
        text = "\n".join(line if line.startswith("!") else textwrap.fill(line, 127) for line in self.text.split("\n"))
        return (f"{text}\n\n" if text else "") + f"```\n$ {self.command}\n{printed}```\n"


def written(steps: Sequence[Step], kept: Path) -> str:
    """Markdown of all steps that ran."""
    return "\n".join(filter(None, (step.markdown(kept) for step in steps)))


def lay_out(folder: Path, *others: Path, shared: Path) -> None:
    """Links the shared models and texts, scripts/, examples/ and others into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    material = (path for part in ("models", "text", "probing") for path in (shared / part).iterdir())
    for path in (*material, ROOT / "scripts", ROOT / "examples", *others):
        if not (folder / path.name).exists():
            (folder / path.name).symlink_to(path.resolve())


def run_step(step: Step, folder: Path, kept: Path) -> None:
    """Runs a command in the folder; keeps what it printed, and what it cost if it succeeded."""
    kept.mkdir(exist_ok=True)
    click.echo(f"$ {step.command}")
    began = time.perf_counter()
    printed, code, peak = _ran(step.command, folder)
    seconds = time.perf_counter() - began
    lines = [line.rstrip() for line in printed.replace(str(folder.resolve()) + "/", "").splitlines()]
    lines = lines[-step.last :] if step.last else lines
    lines = lines[: step.first] if step.first else lines
    click.echo("\n".join(lines))
    (kept / f"{step.name}.txt").write_text("\n".join(lines).strip("\n") + "\n", encoding="utf-8")
    costs = costs_of(kept)
    costs.pop(step.name, None)
    if code == 0:
        costs[step.name] = {"seconds": seconds, "peak_bytes": peak, "threads": torch.get_num_threads()}
    write_json(kept / "costs.json", costs)


def run_steps(steps: Sequence[Step], folder: Path, kept: Path, only: str | None) -> None:
    """Runs the steps that are named, with commas between them; by default those of which nothing is kept yet."""
    for step in steps:
        if step.name in only.split(",") if only else not (kept / f"{step.name}.txt").is_file():
            run_step(step, folder, kept)


def costs_of(kept: Path) -> dict[str, dict[str, Any]]:
    """`seconds`, `peak_bytes` and CPU `threads` of each step, by name."""
    return read_json(kept / "costs.json", {})


def _ran(command: str, folder: Path) -> tuple[str, int, int]:
    """What it printed (with its errors if it failed), its exit code, and its largest process's peak memory in bytes."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "127",
        "TRANSFORMERS_VERBOSITY": "error",
        "TQDM_DISABLE": "1",
    }
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said, tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(["bash", "-c", command], cwd=folder, env=environment, stdout=said, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)  # also what the command's own processes used
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        errors.seek(0)
        printed = said.read() + (errors.read() if process.returncode else "")
    return printed, process.returncode, usage.ru_maxrss * 1024
