"""The plan's arithmetic for models that are too large for most machines, from their configs alone: docs/scale.md's tables.

    python scripts/measure/scale.py table        # Markdown; `page` prints all of docs/scale.md

No weights are loaded and nothing is measured: the shapes are those of the models' published configs, written here.
"""

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import click
from pages import DOCS, table
from transformers import LlamaConfig

from mxdsurgery import gpu_hours, plan
from mxdsurgery.hardware.gpus import EFFICIENCY, GIB, GPUS
from mxdsurgery.terminal.console import compact, duration, size

INTRODUCTION, RENTED_INTRODUCTION = (DOCS / "scale" / name for name in ("introduction.md", "gpus.md"))


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a model of Llama's family."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    tied: bool = False
    num_key_value_heads: int = 8
    vocab_size: int = 128_256


SHAPES = (
    Shape("Llama-3.2-3B", 3072, 8192, 28, 24, tied=True),
    Shape("Llama-3.1-8B", 4096, 14336, 32, 32),
    Shape("Llama-3.1-70B", 8192, 28672, 80, 64),
)
# The experts of a layer as the paper has them, for the first of these.
_MANY = 86_016
# GiB that a conversion may take, one decoder layer at a time: hidden states that do not fit as well are kept on disk.
_SMALL = 32
NAMES = "model | N | moments | parameters | become | all layers together: peak | checkpoint | one at a time: peak | checkpoint"
RENTED = "GPUs | moments | share | layers at once | passes | memory of each | train | evaluate | in all | GPU-hours"
PEAKS = "`--gpu` | kind | bf16, TFLOP/s | fp32 | fp64 | memory, GB/s | GiB | link, GB/s each way"


@contextmanager
def written(shape: Shape) -> Iterator[str]:
    """A folder with the model's config, while open."""
    values = {name: value for name, value in dataclasses.asdict(shape).items() if name not in ("name", "tied")}
    config = LlamaConfig(**values, tie_word_embeddings=shape.tied, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        yield folder


def rows() -> Iterator[str]:
    """Of the memory: some for each model."""
    for shape, n_experts in ((SHAPES[0], None), (SHAPES[0], _MANY), (SHAPES[1], None), (SHAPES[2], None)):
        with written(shape) as folder:
            for moments in ("float32", "bfloat16"):
                options = {"layers": "all", "device": "cpu", "data": "stdlib", "compute": "bfloat16", "moments": moments}
                options["n_experts"] = n_experts
                whole, recipe = plan(folder, **options, memory=10**6, inputs="original")
                single, one = plan(folder, **options, memory=_SMALL, inputs="converted", offload="disk")
                yield (
                    f"{shape.name} | {whole.layers[0].n_experts:,} | {moments} | {compact(whole.original_parameters)} "
                    f"| {compact(whole.parameters)} | {size(whole.peak_bytes)} | {size(whole.resume_bytes(recipe))} "
                    f"| {size(single.peak_bytes)} | {size(single.resume_bytes(one))}"
                )


def rented_rows() -> Iterator[str]:
    """Of the time: the first model with as many experts as the paper's, on some kinds of GPU."""
    with written(SHAPES[0]) as folder:
        for gpu in ("h100", "h200"):
            for moments in ("float32", "bfloat16"):
                options = {"layers": "all", "data": "stdlib", "n_experts": _MANY, "tokens": "20M", "inputs": "original"}
                for row in gpu_hours(folder, gpu=gpu, moments=moments, **options).rows:
                    times = " | ".join(map(duration, (row.seconds, row.evaluation_seconds, row.total_seconds)))
                    yield (
                        f"{row.gpus} {GPUS[gpu].name}, predicted | {moments} | {row.parallel or '-'} | {row.layers_at_once} "
                        f"| {row.passes} | {size(row.peak_bytes)} | {times} | {row.gpu_hours:.1f}"
                    )


def peak_rows() -> Iterator[str]:
    """The peak figures that the times rest on."""
    for name, gpu in GPUS.items():
        rates = " | ".join(f"{rate / 1e12:g}" for rate in (gpu.bfloat16, gpu.float32, gpu.float64))
        yield f"{name} | {gpu.name} | {rates} | {gpu.bandwidth / 1e9:g} | {gpu.memory / GIB:g} | {gpu.link / 1e9:g}"


def tables() -> str:
    """All three, with what they show."""
    return (
        table(NAMES, rows())
        + RENTED_INTRODUCTION.read_text(encoding="utf-8").replace("EFFICIENCY", f"{EFFICIENCY:.0%}")
        + table(RENTED, rented_rows())
        + "\n\nThe peak figures, as published:\n\n"
        + table(PEAKS, peak_rows())
    )


@click.group()
def main() -> None:
    """Prints what large models take."""


@main.command("table")
def print_table() -> None:
    """Print the tables."""
    click.echo(tables())


@main.command()
def page() -> None:
    """Print docs/scale.md."""
    click.echo(INTRODUCTION.read_text(encoding="utf-8") + tables())


if __name__ == "__main__":
    main()
