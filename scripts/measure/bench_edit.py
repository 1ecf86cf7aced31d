"""Edits a converted model with random weights, and takes the edit back: the peak memory of each.

    python scripts/measure/bench_edit.py                                 # pythia-410m with two MxD layers: 900 MB in bf16
    python scripts/measure/bench_edit.py --model tiny --layers all

Each step is a process of its own and one line of JSON: `step`, `weights_bytes` (of the folder's files), `peak_bytes` (resident
memory of the step, above what the process had before it), `together_bytes` (the most that it and the fresh process which
reloads the result had at once, above the same), `compute` (the dtype that it computed in) and `seconds`.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import click
import psutil
from bench_memory import build

import mxdsurgery
from mxdsurgery.hardware.memory import PeakMemory
from mxdsurgery.outside import weight_files
from mxdsurgery.terminal.console import ConsoleReporter

STEPS = ("edit", "undo")


class Together:
    """The most resident memory of this process and its children together, as it is while the context is open."""

    def __enter__(self) -> "Together":
        self._own, self._ended = psutil.Process(), threading.Event()
        self._before = self.bytes = self._own.memory_info().rss
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self.bytes -= self._before

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            held = 0
            for process in (self._own, *self._own.children(recursive=True)):
                try:
                    held += process.memory_info().rss
                except psutil.Error:  # it has ended meanwhile
                    continue
            self.bytes = max(self.bytes, held)


def run(folder: Path, step: str, compute: str) -> dict[str, Any]:
    """One step, in this process."""
    source, start = (folder / "converted" if step == "edit" else folder / "edited"), time.perf_counter()
    layer = mxdsurgery.Plan.from_dict(json.loads((source / "plan.json").read_text())).layers[0].block.layer
    what: dict[str, Any] = {"undo": True}
    if step == "edit":
        edits = mxdsurgery.edits_from_flags(ablate=f"{layer}:3,{layer}:4", scale=f"{layer}:5=2", steer=f"{layer}:6=1")
        what = {"edits": edits, "compute": compute, "tokens": 1024}
    memory = PeakMemory("cpu")
    with Together() as together:
        mxdsurgery.edit(source, out=folder / ("edited" if step == "edit" else "undone"), overwrite=True, **what)
    return {
        "step": step,
        "weights_bytes": sum(path.stat().st_size for path in weight_files(source)),
        "peak_bytes": memory.bytes(),
        "together_bytes": together.bytes,
        "compute": compute,
        "seconds": round(time.perf_counter() - start, 1),
    }


def convert(folder: Path, model: str, layers: str, n_experts: int) -> None:
    """Writes a model with random weights, and the same converted after next to no training."""
    build(model, folder / "model")
    keys = {"data": "stdlib:train", "eval_data": "stdlib:heldout", "device": "cpu", "out": str(folder / "converted")}
    keys |= {"tokens": 2048, "eval_tokens": 1024, "batch": 512, "shuffle": 100_000, "warmup": 0.0, "decay": 0.0}
    keys |= {"layers": layers, "n_experts": n_experts, "inputs": "converted", "memory": 1000.0}
    mxdsurgery.convert(str(folder / "model"), **keys, reporter=ConsoleReporter())


@click.command(help=__doc__)
@click.option("--model", default="EleutherAI/pythia-410m", show_default=True, help="A name in real_configs.py, or tiny.")
@click.option("--layers", default="0,12", show_default=True)
@click.option("--n-experts", default=4096, show_default=True)
@click.option("--compute", default="float32", show_default=True)
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where the models are; made if not there. Default: a temporary one."
)
@click.option("--step", type=click.Choice(STEPS), help="In this process; default: each in one of its own.")
def main(model: str, layers: str, n_experts: int, compute: str, folder: Path | None, step: str | None) -> None:
    if step is not None:
        click.echo(json.dumps(run(folder, step, compute)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = folder or Path(scratch)
        if not (folder / "converted").is_dir():
            convert(folder, model, layers, n_experts)
        for each in STEPS:
            command = [sys.executable, __file__, "--folder", str(folder), "--step", each, "--compute", compute]
            click.echo(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip())


if __name__ == "__main__":
    main()
