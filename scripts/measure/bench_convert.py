"""Times `mxdsurgery convert` of all layers of a model in one pass against one run for each layer, as whole commands.

    python scripts/measure/bench_convert.py MODEL --data TRAIN --eval-data HELDOUT --tokens 500k --json

Every run is a process of its own and does the whole job: reading the text, training, evaluation, export and the reload check.
One line of JSON, in seconds; `training` is the part that the runs spent in distillation, by their own account.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import torch

import mxdsurgery


def timed_run(model: str, layers: str, out: Path, options: tuple[str, ...]) -> tuple[float, float]:
    """Seconds of the whole command, and of its training."""
    command = [sys.executable, "-m", "mxdsurgery", "convert", model, "--layers", layers, "--out", str(out), *options]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    return seconds, json.loads((out / "evaluation.json").read_text())["training"]["seconds"]


@click.command(help=__doc__, context_settings={"ignore_unknown_options": True})
@click.argument("model")
@click.option("--json", "as_json", is_flag=True)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(model: str, as_json: bool, options: tuple[str, ...]) -> None:
    n_layers = len(mxdsurgery.analyze(model).layers)
    with tempfile.TemporaryDirectory() as folder:
        together, training = timed_run(model, "all", Path(folder) / "all", options)
        single = [timed_run(model, str(layer), Path(folder) / str(layer), options) for layer in range(n_layers)]
    apart, apart_training = (sum(values) for values in zip(*single, strict=True))
    result = {
        "model": Path(model).name,
        "options": [Path(option).name for option in options],
        "threads": torch.get_num_threads(),
        "one_pass": {"seconds": round(together, 1), "training": training},
        "layer_after_layer": {"seconds": round(apart, 1), "training": round(apart_training, 1)},
        "ratio": round(together / apart, 3),
        "training_ratio": round(training / apart_training, 3),
    }
    if as_json:
        click.echo(json.dumps(result))
    else:
        click.echo("\n".join(f"{name:20}{value}" for name, value in result.items()))


if __name__ == "__main__":
    main()
