"""Times `frontier` without `cache_activations`, with a new folder for it (writing), and with that folder again (reading).

    python scripts/measure/bench_cache.py MODEL --layer 3 --data TRAIN --eval-data HELDOUT --tokens 60k --rounds 3 --json

One layer of kind `mxd` is trained, the three runs of a round one after the other, each a process of its own with one thread.
`steps`: the training's steps, what feeds them included; `train`: the same and what comes before the first step, which is the
text, read until its shuffling buffer is full; `command`: all of it, with the base model loaded and the layer measured. Seconds
by the clock (`wall`) and of computing (`cpu`), which does not count what other jobs do meanwhile; medians over the rounds. The
trained weights have to be the same to the bit, or the script fails.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from pages import SCRIPTS

from mxdsurgery.terminal.console import ProgressLine, Reporter

RUNS = ("without", "writing", "reading")


class _Stopwatch(Reporter):
    """Knows when each line was said, by its first word, and when the steps of the training began and ended."""

    def __init__(self) -> None:
        self.at: dict[str, dict[str, float]] = {}

    def note(self, what: str) -> None:
        """Remembers the time of both clocks."""
        self.at[what] = {"wall": time.perf_counter(), "cpu": time.process_time()}

    def between(self, first: str, last: str) -> dict[str, float]:
        """Seconds from one moment to another."""
        return {clock: self.at[last][clock] - self.at[first][clock] for clock in self.at[first]}

    def say(self, line: str) -> None:
        self.note(line.split(" ")[0])

    @contextlib.contextmanager
    def progress(self, label: str, _unit: str, _cost: object = None) -> Iterator[ProgressLine]:
        self.note(f"{label} begins")
        line = ProgressLine()
        line.update = lambda *_: self.note(f"{label} ends")
        yield line


def train(model: str, layer: int, k: int, out: str, options: dict[str, Any]) -> dict[str, Any]:
    """Makes a frontier of one layer in this process, and measures the time."""
    from safetensors.torch import load_file

    import mxdsurgery
    from mxdsurgery.base.digest import tensor_digest
    from mxdsurgery.measuring.frontier_table import layer_file

    watch = _Stopwatch()
    watch.note("start")
    made = mxdsurgery.frontier(model, layer=layer, k=(k,), kinds=("mxd",), out=out, threads=1, reporter=watch, **options)
    watch.note("end")
    path = layer_file(made.out, made.rows[0]["layer"], "mxd", k)
    moments = {"steps": ("distil begins", "distil ends"), "train": ("proof", "distilled"), "command": ("start", "end")}
    return {
        "seconds": {what: watch.between(*both) for what, both in moments.items()},
        "weights": {name: tensor_digest(tensor) for name, tensor in sorted(load_file(path).items())},
        "tokens": made.rows[0]["train_tokens"],
        "batch": made.settings["batch"],
    }


def measured(*arguments: Any) -> dict[str, Any]:
    """`train` in a process of its own."""
    code = "import json, sys, bench_cache; print(json.dumps(bench_cache.train(*json.loads(sys.argv[1]))))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPTS), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(model: str, layer: int, k: int, rounds: int, options: dict[str, Any]) -> dict[str, Any]:
    """All rounds; RuntimeError where the trained weights differ."""
    from mxdsurgery.hardware.device import hardware

    found: dict[str, list[dict[str, Any]]] = {name: [] for name in RUNS}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            kept = Path(folder) / "activations"
            for name in RUNS:
                keys = options | ({} if name == "without" else {"cache_activations": str(kept)})
                found[name].append(measured(model, layer, k, f"{folder}/{name}", keys))
            held = sum(path.stat().st_size for path in kept.rglob("*.safetensors"))
            written = json.loads((kept / "cache.json").read_text())
    if len({json.dumps(run["weights"]) for runs in found.values() for run in runs}) > 1:
        raise RuntimeError("the trained weights differ")
    tokens = found["without"][0]["tokens"]
    result = {"model": Path(model).name, "layer": layer, "k": k, "tokens": tokens, "batch": found["without"][0]["batch"]}
    result |= {"compute": written["compute"], "hardware": hardware("cpu"), "torch": written["circumstances"]["torch"]}
    result |= {"rounds": rounds, "kept_bytes": held, "bytes_per_token": round(held / tokens)}
    for name, runs in found.items():
        result[name] = {
            f"{what}_{clock}": round(statistics.median(run["seconds"][what][clock] for run in runs), 1)
            for what, both in runs[0]["seconds"].items()
            for clock in both
        }
    return result


@click.command(help=__doc__)
@click.argument("model")
@click.option("--layer", default=3, show_default=True)
@click.option("--k", default=32, show_default=True)
@click.option("--data", required=True)
@click.option("--eval-data", required=True)
@click.option("--tokens", default="60k", show_default=True)
@click.option("--eval-tokens", default="2k", show_default=True)
@click.option("--shuffle", default="500k", show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One line of JSON.")
def main(model: str, layer: int, k: int, rounds: int, as_json: bool, **options: Any) -> None:
    result = compare(model, layer, k, rounds, options | {"device": "cpu"})
    click.echo(json.dumps(result) if as_json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
