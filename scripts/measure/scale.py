"""The plan's arithmetic for models that are too large for most machines, from their configs alone: docs/scale.md's last part.

    python scripts/measure/scale.py table        # Markdown; `page` prints all of docs/scale.md

No weights are loaded and nothing is measured: the shapes are those of the models' published configs, written here.
"""

import dataclasses
import tempfile
from collections.abc import Iterator

import click
from pages import DOCS, table
from transformers import LlamaConfig

from mxdsurgery import plan
from mxdsurgery.terminal.console import compact, size

INTRODUCTION = DOCS / "scale" / "introduction.md"


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
# GiB that a conversion may take, one decoder layer at a time: hidden states that do not fit as well are kept on disk.
_SMALL = 32
NAMES = "model | parameters | N | become | all layers together: peak | checkpoint | one at a time: peak | checkpoint"


def rows() -> Iterator[str]:
    """One for each model."""
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            values = {name: value for name, value in dataclasses.asdict(shape).items() if name not in ("name", "tied")}
            config = LlamaConfig(
                **values, tie_word_embeddings=shape.tied, dtype="bfloat16", architectures=["LlamaForCausalLM"]
            )
            config.save_pretrained(folder)
            options = {"layers": "all", "device": "cpu", "data": "stdlib", "compute": "bfloat16"}
            whole, _ = plan(folder, **options, memory=10**6)
            single, _ = plan(folder, **options, memory=_SMALL, inputs="converted", offload="disk")
        adam, finished = 12 * whole.trained_parameters, 2 * whole.trained_parameters
        yield (
            f"{shape.name} | {compact(whole.original_parameters)} | {whole.layers[0].n_experts:,} "
            f"| {compact(whole.parameters)} | {size(whole.peak_bytes)} | {size(adam)} "
            f"| {size(single.peak_bytes)} | {size(adam / shape.num_hidden_layers + finished)}"
        )


@click.group()
def main() -> None:
    """Prints what large models take."""


@main.command("table")
def print_table() -> None:
    """Print the table."""
    click.echo(table(NAMES, rows()))


@main.command()
def page() -> None:
    """Print docs/scale.md."""
    click.echo(INTRODUCTION.read_text(encoding="utf-8") + table(NAMES, rows()))


if __name__ == "__main__":
    main()
