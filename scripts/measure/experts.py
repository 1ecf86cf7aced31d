"""Runs the commands of docs/experts.md on SmolLM2-135M-Instruct, keeps what they print, and prints that page from it.

    python scripts/measure/experts.py measure --shared ../shared --models DIR [--only search-text]   # half an hour
    python scripts/measure/experts.py page > docs/experts.md

DIR is where scripts/measure/smollm2.py has converted and healed all layers. What each command prints is kept in
docs/experts/<name>.txt: delete these to run everything again.
"""

from pathlib import Path

import click
from material import BOOKS, shared_option
from pages import DOCS
from smollm2_steps import HEALED
from steps import Step, lay_out, run_steps

KEPT = DOCS / "experts"

CODE, STEERED = "27:1000", "20:1000"
SAMPLING = "--temperature 0.7 --top-k 50 --top-p 0.95"

# An expert of Python code and one of film reviews; found with `search`, `effect --sweep` and in the report.
STEPS = (
    Step(
        "experts",
        "## Find\n\nOne pass over the text for all layers. The text has a field `kind`, so kinds are counted, too.",
        f"mxdsurgery experts {HEALED} --data {BOOKS[0]} --tokens 100k --overwrite",
    ),
    Step(
        "bench",
        "What that costs, against a bare forward pass (no language-model head) over the same tokens in the same run:",
        f"python scripts/measure/bench_experts.py {HEALED} --data {BOOKS[0]} --tokens 20000",
    ),
    Step(
        "search",
        "Which experts does a reader understand at once? Of each token, the one that it tells most about:",
        f"mxdsurgery search {HEALED} --top 20",
    ),
    Step("search-class", "Which fire on one kind of text?", f"mxdsurgery search {HEALED} python --by class --top 10"),
    Step(
        "search-text",
        "Which experts know what follows? By example text:",
        f"mxdsurgery search {HEALED} 'def __init__(self, name):' --top 10",
    ),
    Step("search-token", "By token:", f"mxdsurgery search {HEALED} ' king' --top 10"),
    Step(
        "report",
        "## Look\n\nOne page that opens from disk, without server or network, with all experts to browse and to search.\n\n"
        "![The report: an expert and the places where it fires](report.png)",
        f"mxdsurgery report {HEALED}",
    ),
    Step(
        "bench-report",
        "How quick it is, in Chromium:",
        f"python scripts/measure/bench_report.py {HEALED}/report.html --search king --shows {STEERED} --picture report.png",
    ),
    Step(
        "effect",
        "## What does an expert do?\n\nAblated, beside five experts that fire as often "
        "([single-experts.md](single-experts.md) has it for many experts, at several shares, beside transcoders and molts):",
        f"mxdsurgery effect {HEALED} --ablate {CODE} --tokens 4k --top 6",
    ),
    Step(
        "sweep",
        "All experts of a layer by what ablating each alone does, exactly, in one batched pass:",
        f"mxdsurgery effect {HEALED} --sweep 29 --tokens 1k --contexts-per-expert 1 --top 10",
    ),
    Step(
        "chat",
        "## Steer\n\nThe same random numbers with and without an expert:",
        f"mxdsurgery generate {HEALED} --chat --prompt 'Tell me about the sea.' --steer {STEERED}=2 --unit maximum "
        "--max-new-tokens 40 --temperature 0",
    ),
    Step(
        "score",
        "How far do samples move towards what the expert stands for, beside steering other experts as strongly, and are they "
        "still fluent? [Does share buy control?](single-experts.md) says what of that depends on the share that the experts "
        "carry, and what a transcoder's feature does.",
        f"mxdsurgery generate {HEALED} --steer {STEERED}=2 --unit maximum --factors 0.5,1,2 --samples 20 {SAMPLING} --score",
    ),
    Step(
        "edit",
        "## Edit for good\n\nInto the weights, and what that changed:",
        f"mxdsurgery edit {HEALED} --ablate {CODE} --scale {STEERED}=2 --out edited --overwrite",
    ),
    Step("undo", "And back, bit for bit:", "mxdsurgery edit edited --undo --out restored --overwrite"),
    Step(
        "same",
        "",
        f"diff -r --exclude=experts --exclude=report.html --exclude=effects {HEALED} restored && echo identical",
    ),
    Step(
        "refused",
        "What cannot be is refused by name, and nothing is written:",
        f"mxdsurgery edit {HEALED} --ablate 5:99999 --out nowhere",
    ),
    Step(
        "erase",
        "## Erase a capability\n\n`examples/erase_capability.py` removes the experts of Python code, and as many random "
        "ones that fire as often. How many experts it takes, and what that costs elsewhere, depends on their share "
        "([single-experts.md](single-experts.md)).",
        f"python examples/erase_capability.py {HEALED} --kind python --data {BOOKS[1]} --experts 100,1000,10000 "
        "--tokens 8000 --random 2",
    ),
    Step(
        "hooks",
        "## With other tools\n\nPlain PyTorch hooks, on a model that plain transformers has loaded:",
        f"python examples/hooks.py {HEALED} --layer 15",
    ),
    Step(
        "coefficients",
        "All coefficients on a text as Parquet or safetensors; `mxdsurgery/catalogue/coefficients.py` documents the layout:",
        f"mxdsurgery coefficients {HEALED} --tokens 5k --out coefficients",
    ),
)

INTRODUCTION = """\
# Experts at work

Every command of [the README](../README.md) on experts, on a model that people use: SmolLM2-135M-Instruct, all thirty layers
converted and healed on two cores, as [smollm2.md](smollm2.md) says, with what it printed.
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
    click.echo("\n".join([INTRODUCTION, *(step.markdown(KEPT) for step in STEPS)]), nl=False)


if __name__ == "__main__":
    main()
