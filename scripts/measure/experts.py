"""Runs the commands of docs/experts.md on two real models, keeps what they print, and prints that page from it.

    python scripts/measure/experts.py measure --shared ../shared --models DIR [--only search]     # about an hour on two cores
    python scripts/measure/experts.py page > docs/experts.md

DIR is where the converted models are, or will be made: books-mxd (a SwiGLU model), books-transcoder (the same with
transcoders) and tinystories-mxd (a GELU model), as the page's first commands say. What each command prints is kept in
docs/experts/<name>.txt: delete these to run everything again.
"""

from pathlib import Path

import click
from material import shared_option
from pages import DOCS
from steps import SAMPLING, Step, lay_out, run_steps, written

KEPT = DOCS / "experts"

_FIXED = "--batch 2048 --lr 0.002 --specialise 0.003"
_BOOKS = f"--layers all --k 16 --data train.jsonl.gz --eval-data heldout.jsonl.gz --tokens 2M --eval-tokens 20k {_FIXED}"
_STORIES = (
    "--layers all --k 16 --data tinystories-train.txt --eval-data tinystories-heldout.txt --tokens 1M "
    "--batch 2048 --lr 0.002 --specialise 0.01"
)


# The experts here were found with `search`, `effect --sweep` and in the report.
STEPS = (
    Step(
        "convert-books",
        "## The models\n\nA Llama-shaped model of books and Python code with 5.5 M parameters, all six blocks replaced:",
        f"mxdsurgery convert books-llama-6m {_BOOKS} --out books-mxd",
        last=23,
        first=13,
    ),
    Step(
        "convert-transcoder",
        "The same with transcoders of the same size, to compare with:",
        f"mxdsurgery convert books-llama-6m --kind transcoder {_BOOKS} --out books-transcoder",
        last=23,
        first=13,
    ),
    Step(
        "convert-stories",
        "And a GPT-2-shaped one (GELU) of children's stories, 3.4 M parameters, all eight blocks:",
        f"mxdsurgery convert tinystories-chat-gpt2-3M {_STORIES} --out tinystories-mxd",
        last=25,
        first=15,
    ),
    Step(
        "experts-books",
        "## Find\n\nOne pass over a million tokens for all layers. The text has a field `kind`, so kinds are counted, too.",
        "mxdsurgery experts books-mxd --data train.jsonl.gz --tokens 1M --overwrite",
    ),
    Step(
        "bench",
        "What that costs, against a bare forward pass (no language-model head) over the same tokens in the same run:",
        "python scripts/measure/bench_experts.py books-mxd --data train.jsonl.gz --tokens 1000000",
    ),
    Step(
        "search-text",
        "Which experts know what follows? By example text:",
        "mxdsurgery search books-mxd 'you must not' --top 8",
    ),
    Step("search-token", "By token:", "mxdsurgery search books-mxd ' king' --top 8"),
    Step(
        "report",
        "## Look\n\nOne page that opens from disk, without server or network, with all experts to browse and to search.\n\n"
        "![The report: expert 5666 of layer 5, which fires after modal verbs](report.png)",
        "mxdsurgery report books-mxd",
    ),
    Step(
        "effect",
        "## What does an expert do?\n\nAblated, beside five experts that fire as often "
        "([single-experts.md](single-experts.md) has it for many experts, at several shares, beside transcoders and molts):",
        "mxdsurgery effect books-mxd --ablate 5:1835 --tokens 16k --top 6",
    ),
    Step(
        "sweep",
        "All experts of a layer by what ablating each alone does, exactly, in one batched pass:",
        "mxdsurgery effect books-mxd --sweep 5 --tokens 2k --top 10",
    ),
    Step(
        "generate",
        "## Steer\n\nThe same random numbers with and without an expert of film reviews at eight times its maximum:",
        "mxdsurgery generate books-mxd --prompt 'Let us talk about ' --steer 4:2411=8 --unit maximum --samples 3 "
        f"--max-new-tokens 24 {SAMPLING}",
    ),
    Step(
        "score",
        "How far do samples move towards what the expert stands for, beside steering other experts as strongly, and are they "
        "still fluent? Not far, and at a price. [Does share buy control?](single-experts.md) says what of that depends on the "
        "share that the experts carry, and what a transcoder's feature does.",
        f"mxdsurgery generate books-mxd --steer 4:2411=8 --unit maximum --factors 0.25,1,2 --samples 40 {SAMPLING} --score",
    ),
    Step(
        "edit",
        "## Edit for good\n\nInto the weights, and what that changed:",
        "mxdsurgery edit books-mxd --ablate 5:1835 --scale 5:5009=2 --out edited --overwrite",
    ),
    Step("undo", "And back, bit for bit:", "mxdsurgery edit edited --undo --out restored --overwrite"),
    Step("same", "", "diff -r --exclude=experts --exclude=report.html --exclude=effects books-mxd restored && echo identical"),
    Step(
        "refused",
        "What cannot be is refused by name, and nothing is written:",
        "mxdsurgery edit books-mxd --ablate 5:99999 --out nowhere",
    ),
    Step(
        "erase",
        "## Erase a capability\n\n`examples/erase_capability.py` removes the experts of Python code. `experts` has run on "
        "books-transcoder, too. What comes out is selective: Python is lost, other text hardly notices, and random experts do "
        "not do that. Transcoder features are as selective; they start from a model that is further from the original. "
        "How many experts it takes, and what that costs elsewhere, depends on their share "
        "([single-experts.md](single-experts.md)).",
        "python examples/erase_capability.py books-mxd --kind python --data heldout.jsonl.gz --baseline books-transcoder",
    ),
    Step(
        "hooks",
        "## With other tools\n\nPlain PyTorch hooks, on a model that plain transformers has loaded:",
        "python examples/hooks.py books-mxd --layer 5",
    ),
    Step(
        "coefficients",
        "All coefficients on a text as Parquet or safetensors; `mxdsurgery/catalogue/coefficients.py` documents the layout:",
        "mxdsurgery coefficients books-mxd --tokens 20k --out coefficients",
    ),
    Step(
        "stories-experts",
        "## The same on the GELU model",
        "mxdsurgery experts tinystories-mxd --data tinystories-train.txt --tokens 300k --overwrite",
    ),
    Step("stories-search", "", "mxdsurgery search tinystories-mxd 'She was very sad and started to cry.' --top 6"),
    Step("stories-effect", "", "mxdsurgery effect tinystories-mxd --ablate 3:1374 --top 4"),
    Step("stories-sweep", "", "mxdsurgery effect tinystories-mxd --sweep 7 --tokens 1k --top 6"),
    Step(
        "stories-score",
        "",
        "mxdsurgery generate tinystories-mxd --prompt 'Once upon a time' --steer 7:1374=4 --unit maximum --samples 40 "
        f"{SAMPLING} --score",
    ),
    Step("stories-edit", "", "mxdsurgery edit tinystories-mxd --drop 3:1374 --steer 7:12=0.5 --out edited --overwrite"),
)

INTRODUCTION = """\
# Experts at work

Every command of [the README](../README.md) on experts, on two real models, with what it printed.
`scripts/measure/experts.py` ran them and prints this page. Figures leave out position 0 of each context and rest on the
number of tokens that they name.
"""


@click.group()
def main() -> None:
    """See the module."""


@main.command()
@shared_option
@click.option("--models", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--only", help="Names of steps, with commas between them; default: those of which docs/experts/ has nothing.")
def measure(shared: Path, models: Path, only: str | None) -> None:
    """Runs the commands, in MODELS, where the material appears under its plain names."""
    lay_out(models, shared=shared)
    run_steps(STEPS, models, KEPT, only)


@main.command()
def page() -> None:
    """Prints docs/experts.md."""
    click.echo(f"{INTRODUCTION}\n{written(STEPS, KEPT)}", nl=False)


if __name__ == "__main__":
    main()
