"""Times the first tokens of the demo's conversion alone and beside one busy process, with one CPU thread and with two.

    python scripts/measure/bench_beside.py                      # about a quarter of an hour on two cores that do nothing else
    python scripts/measure/bench_beside.py --tokens 41k --rounds 3 --json

Two threads wait for each other many times a step. OpenMP's own way is to spin, which takes the core from whoever could work in
the meantime; as mxdsurgery has it unless it is told otherwise (OMP_WAIT_POLICY, GOMP_SPINCOUNT), a waiting thread sleeps
after a moment. Every run is a process of its own, measured from when its layers are ready to train; of several rounds the
median counts. A Markdown table, in seconds; with --json a line for each row.
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
from typing import Any

import click
from pages import SCRIPTS

from mxdsurgery.keys import parse_count
from mxdsurgery.terminal.console import ProgressLine, Reporter

PRECISIONS = {"default": {}, "fp32": {"precision": "fp32", "selection": "fp32"}}
# How threads wait for each other, for each number of them; a single one waits for nobody.
WAITING = {1: ["-"], 2: ["spinning", "asleep"]}
BUSY = "while True: pass"


class Enough(Exception):
    """So many tokens were trained on."""


class _Stopwatch(Reporter):
    """Ends a conversion after so many tokens of its training, and knows how long they took."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.done, self.seconds = tokens, 0, 0.0

    @contextlib.contextmanager
    def progress(self, label: str, unit: str, _cost: object = None) -> Iterator[ProgressLine]:
        start, line = time.perf_counter(), ProgressLine()

        def update(done: float, _total: float, _note: str = "") -> None:
            self.done, self.seconds = int(done), time.perf_counter() - start
            if done >= self.tokens:
                raise Enough

        if label == "distil":
            line.update = update
        yield line


def train(tokens: int, precision: str, threads: int) -> dict[str, Any]:
    """Trains in this process and measures the time."""
    import mxdsurgery

    watch = _Stopwatch(tokens)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Enough):
        keys = PRECISIONS[precision] | {"threads": threads, "out": f"{folder}/out", "device": "cpu"}
        mxdsurgery.convert("demo-glu", **keys, reporter=watch)
    return {"tokens": watch.done, "seconds": watch.seconds}


def measured(tokens: int, precision: str, threads: int, waiting: str, beside: bool) -> dict[str, Any]:
    """`train` in a process of its own, beside a busy one if asked."""
    # Spinning: torch is loaded before mxdsurgery can set the policy.
    load = "import torch; " if waiting == "spinning" else ""
    code = f"{load}import json, bench_beside; print(json.dumps(bench_beside.train({tokens}, {precision!r}, {threads})))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPTS), *sys.path])
    with contextlib.ExitStack() as stack:
        if beside:
            busy = stack.enter_context(subprocess.Popen([sys.executable, "-c", BUSY]))
            stack.callback(busy.kill)
        done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def rows(tokens: int, precisions: list[str], threads: list[int], rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each precision, number of threads and way of waiting: seconds alone and beside, and tokens."""
    for precision in precisions:
        for count in threads:
            for waiting in WAITING[count]:
                row: dict[str, Any] = {"precision": precision, "threads": count, "waiting": waiting}
                for place in ("alone", "beside"):
                    runs = [measured(tokens, precision, count, waiting, place == "beside") for _ in range(rounds)]
                    row |= {"tokens": runs[0]["tokens"], place: round(statistics.median(run["seconds"] for run in runs), 1)}
                yield row


def table(measurements: list[dict[str, Any]]) -> Iterator[str]:
    """In Markdown."""
    yield f"| first {measurements[0]['tokens']:,} tokens | threads | waiting | alone | beside one busy process |"
    yield "|---|--:|---|--:|--:|"
    for row in measurements:
        yield f"| {row['precision']} | {row['threads']} | {row['waiting']} | {row['alone']} s | {row['beside']} s |"


@click.command(help=__doc__)
@click.option("--tokens", default="41k", show_default=True)
@click.option("--precision", "precisions", type=click.Choice(list(PRECISIONS)), multiple=True, default=list(PRECISIONS))
@click.option("--threads", type=click.IntRange(1, 2), multiple=True, default=list(WAITING))
@click.option("--rounds", default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(tokens: str, precisions: list[str], threads: list[int], rounds: int, as_json: bool) -> None:
    found = []
    for row in rows(parse_count(tokens), precisions, threads, rounds):
        found.append(row)
        click.echo(json.dumps(row), err=not as_json)
    if not as_json:
        click.echo("\n".join(table(found)))


if __name__ == "__main__":
    main()
