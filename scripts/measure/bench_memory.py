"""Converts a randomly initialised model with one decoder layer of it in memory, and with all of it: the peak memory of each.

    python scripts/measure/bench_memory.py > docs/all-layers/memory.jsonl
    python scripts/measure/bench_memory.py --model tiny --layers all

The model has a real config and random weights, in safetensors files on disk. Each way is a process of its own and one line of
JSON: `way`, `peak_bytes` (resident memory of the whole conversion, training, evaluation and export, above what the process had
before it), `training_bytes` (of the training alone), `reload_bytes` (of the fresh process that reloads the result, in all),
`planned_bytes`, `seconds`, and `shape`. The text is Python source: what it says does not matter here.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from real_configs import config_named
from transformers import AutoModelForCausalLM

import mxdsurgery
from mxdsurgery.base.model import load_tokenizer
from mxdsurgery.hardware.memory import PeakMemory
from mxdsurgery.terminal.console import ConsoleReporter

WAYS = {
    "all layers together, the whole model in memory": {"inputs": "original", "memory": 1000.0},
    "one after the other, the whole model in memory": {"inputs": "converted", "offload": "none"},
    "one after the other, one decoder layer in memory": {"inputs": "converted", "offload": "disk"},
}


def build(model: str, folder: Path) -> None:
    """Writes random weights in bf16, in shards of at most 1 GB, with a tokenizer."""
    tokenizer, config = load_tokenizer("demo-glu"), config_named(model)
    config.vocab_size = max(config.vocab_size, len(tokenizer))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="1GB")
    tokenizer.save_pretrained(folder)


def convert(folder: Path, way: str, options: dict[str, Any]) -> dict[str, Any]:
    """One conversion, in this process."""
    memory, start = PeakMemory("cpu"), time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        keys = {"data": "stdlib:train", "eval_data": "stdlib:heldout", "device": "cpu", "out": f"{out}/converted"}
        keys |= {"shuffle": 100_000, "warmup": 0.0, "decay": 0.0}
        made = mxdsurgery.convert(str(folder), **keys, **options, **WAYS[way], reporter=ConsoleReporter())
    block = made.plan.blocks[0]
    shape = {"D": block.d_model, "H": block.d_hidden, "N": made.plan.layers[0].n_experts, "layers": len(made.plan.layers)}
    return {
        "way": way,
        "peak_bytes": memory.bytes(),
        "training_bytes": made.evaluation["training"]["measured"]["peak_bytes"],
        "reload_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "planned_bytes": made.plan.peak_bytes,
        "seconds": round(time.perf_counter() - start, 1),
        "shape": shape | {"parameters": made.plan.original_parameters, "dtype": made.plan.dtype},
    }


@click.command(help=__doc__)
@click.option("--model", default="EleutherAI/pythia-1.4b", show_default=True, help="A name in real_configs.py, or tiny.")
@click.option("--layers", default="0,8,16,23", show_default=True)
@click.option("--n-experts", default=4096, show_default=True)
@click.option("--batch", default=512, show_default=True)
@click.option("--tokens", default=2048, show_default=True)
@click.option("--eval-tokens", default=512, show_default=True)
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Of the random model; made if it is not there. Default: a temporary one."
)
@click.option("--way", type=click.Choice(list(WAYS)), help="In this process; default: each in one of its own.")
def main(model: str, folder: Path | None, way: str | None, **options: Any) -> None:
    if way is not None:
        click.echo(json.dumps(convert(folder, way, options)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = folder or Path(scratch) / "model"
        if not folder.is_dir():
            build(model, folder)
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        for each in WAYS:
            command = [sys.executable, __file__, "--folder", str(folder), "--way", each, *flags]
            made = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            click.echo(made.stdout.strip())


if __name__ == "__main__":
    main()
