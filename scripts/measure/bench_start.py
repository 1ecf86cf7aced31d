"""What a conversion does before its first step: how long it takes, and how often it opens what.

    python scripts/measure/bench_start.py ../shared/models/SmolLM2-135M-Instruct --data ../shared/text/train.jsonl.gz
    python scripts/measure/bench_start.py 1b --data TEXT --inputs converted --offload disk      # random weights of that shape

Reads of config.json are counted by Python's own audit hook; skeletons as `from_config` is called; bytes of weights as they are
read from where they lie on disk. A number is one run's.
"""

import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import torch
from accelerate.utils.offload import OffloadedWeightsLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import mxdsurgery
from mxdsurgery.conversion import train
from mxdsurgery.demo import DEMO_MODELS
from mxdsurgery.hardware.device import hardware
from mxdsurgery.terminal.console import duration, size

# Llama-3.2-1B's, with the demo model's tokenizer.
ONE_BILLION = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
ONE_BILLION |= {"num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 4096, "tie_word_embeddings": True}


class FirstStep(Exception):
    """Here the conversion would begin to train."""


def random_model(folder: Path) -> Path:
    """A model of 1 B's shape with random weights in bfloat16."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**ONE_BILLION), dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_MODELS["demo-glu"]).save_pretrained(folder)
    return folder


def count(counted: Counter[str]) -> None:
    """From here on, reads and skeletons are counted."""

    def opened(event: str, arguments: tuple) -> None:
        if event == "open" and str(arguments[0]).endswith("/config.json"):
            counted["config reads"] += 1

    sys.addaudithook(opened)
    from_config, getitem = AutoModelForCausalLM.from_config, OffloadedWeightsLoader.__getitem__

    def built(*arguments: Any, **named: Any) -> Any:
        counted["skeletons"] += 1
        return from_config(*arguments, **named)

    def read(self: OffloadedWeightsLoader, key: str) -> torch.Tensor:
        tensor = getitem(self, key)
        counted["bytes read again"] += tensor.numel() * tensor.element_size()
        return tensor

    AutoModelForCausalLM.from_config, OffloadedWeightsLoader.__getitem__ = built, read


def first_step(*_: Any, **__: Any) -> None:
    """In place of the training."""
    raise FirstStep


@click.command(help=__doc__)
@click.argument("model")
@click.option("--data", required=True, help="The text.")
@click.option("--layers", default="all", show_default=True)
@click.option("--inputs", default="original", show_default=True)
@click.option("--offload", default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(model: str, data: str, layers: str, inputs: str, offload: str, as_json: bool) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(random_model(Path(scratch) / "1b")) if model == "1b" else model
        counted: Counter[str] = Counter()
        count(counted)
        train.distill = first_step
        start = time.perf_counter()
        options = {"layers": layers, "inputs": inputs, "offload": offload, "data": data, "tokens": 50_000, "memory": 1000.0}
        try:
            mxdsurgery.convert(folder, out=f"{scratch}/out", n_experts=1024, **options)
        except FirstStep:
            seconds = time.perf_counter() - start
    result = {"model": Path(model).name, "hardware": hardware("cpu"), "inputs": inputs, "offload": offload, **options}
    result = {name: value for name, value in result.items() if name not in ("data", "memory")}
    result |= {"seconds": round(seconds, 1)} | dict(counted)
    if as_json:
        click.echo(json.dumps(result))
    else:
        again = size(counted["bytes read again"])
        click.echo(f"{counted['config reads']} config reads, {counted['skeletons']} skeletons, {again} of weights read again")
        click.echo(f"{duration(seconds)} until the first step")


if __name__ == "__main__":
    main()
