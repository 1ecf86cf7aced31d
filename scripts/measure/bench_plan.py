"""Converts a model and puts the plan's times beside the measured ones: training, evaluation and export.

    python scripts/measure/bench_plan.py [demo-glu] [--tokens 500k] [--eval-tokens 20k] [--compute auto] [--json]

The plan measures this machine first, however short the run is.
"""

import json
import tempfile
from typing import Any

import click
import torch

import mxdsurgery
from mxdsurgery.hardware.device import hardware

STAGES = {"train": "seconds", "evaluate": "evaluation_seconds", "export": "export_seconds"}


@click.command(help=__doc__)
@click.argument("model", default="demo-glu")
@click.option("--tokens", default="500k", show_default=True)
@click.option("--eval-tokens", default="20k", show_default=True)
@click.option("--data", help="Default: the recipe's.")
@click.option("--compute", default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def main(model: str, as_json: bool, **given: Any) -> None:
    keys = {"layers": "all", "device": "cpu", **given}
    planned, _ = mxdsurgery.plan(model, measure=True, **keys)
    with tempfile.TemporaryDirectory() as folder:
        made = mxdsurgery.convert(model, out=f"{folder}/out", **keys)
        record = json.loads((made.out / "evaluation.json").read_text(encoding="utf-8"))["training"]["measured"]
    result = {
        "model": model,
        "hardware": hardware("cpu"),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "compute": made.plan.machine.compute,
        "layers": len(made.plan.layers),
        "tokens": made.evaluation["training"]["tokens"],
        "eval_tokens": made.evaluation["tokens"],
        "eval_tokens_single": made.evaluation["layers"][0]["tokens"],
        "planned": {stage: round(getattr(planned, name), 1) for stage, name in STAGES.items()},
        "measured": {stage: record[name] for stage, name in STAGES.items()},
    }
    click.echo(json.dumps(result) if as_json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
