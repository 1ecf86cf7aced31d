"""Converts small models in all layers, for each `init` and K, and prints the tables of docs/results.md.

    python scripts/measure/results.py --shared ../shared --runs runs/results > docs/results.md

Each conversion is kept under --runs and not repeated: delete its folder to measure it again. The shared folder holds
models/ and text/ (CONTRIBUTING.md says where it is); two CPU cores take about an hour for everything.
"""

import textwrap
from pathlib import Path

import click
from material import BOOKS, STEPS, STORIES, Subject, only_option, runs_option, shared_option
from pages import cells, machine, read_json, table

import mxdsurgery
from mxdsurgery.checkpoint.card import FIGURES, figure_rows
from mxdsurgery.terminal.console import ConsoleReporter, compact
from mxdsurgery.terminal.figures import legend, with_range

INITS, KS = ("encoder", "random", "pretrained"), (16, 64)
SUBJECTS = (
    Subject("books-llama-6m", *BOOKS, 18_432),
    Subject("tinystories-chat-gpt2-3M", *STORIES, 18_432),
    Subject("stories260K", *STORIES, 18_432),
)
TOKENS = 500_000
# K constant and no penalty, so that the starts alone are compared; docs/training.md has what these two change.
PLAIN = STEPS | {"k_start": 1, "specialise": 0.0}
# One middle layer, trained longer and measured on more text. Over more steps a constant learning rate kills experts.
LONG = {"layers": "3", "k": 16, "init": "encoder", "tokens": 3_600_000, "decay": 0.9, "eval_tokens": 55_296}


def converted(subject: Subject, shared: Path, out: Path, **options: object) -> dict:
    """The evaluation of a conversion, made now if it is not there yet."""
    if not (out / "evaluation.json").is_file():
        click.echo(f"-- {out.name}", err=True)
        mxdsurgery.convert(
            **subject.paths(shared),
            dtype="float32",
            device="cpu",
            out=str(out),
            reporter=ConsoleReporter(),
            **PLAIN,
            **{"tokens": TOKENS, "eval_tokens": subject.eval_tokens, **options},
        )
    return read_json(out / "evaluation.json") | {"plan": read_json(out / "plan.json")}


def by_layer(evaluation: dict) -> str:
    """A row per layer and one for all."""
    return table(cells("layer", *(heading for _, heading, _ in FIGURES)), (cells(*row) for row in figure_rows(evaluation)))


def spent(evaluation: dict) -> str:
    """What a conversion was trained and measured on, in one line."""
    training, layers = evaluation["training"], evaluation["plan"]["layers"]
    return (
        f"N = {layers[0]['n_experts']:,}; trained on {compact(training['tokens'])} tokens "
        f"in {training['seconds'] / 60:.1f} minutes ({training['passes_over_the_text']} passes over the text); "
        f"measured on {evaluation['tokens']:,} held-out tokens, original CE {evaluation['original']['ce']:.4f}."
    )


@click.command(help=__doc__)
@shared_option
@runs_option("results")
@only_option
def main(shared: Path, runs: Path, only: str | None) -> None:
    subjects = [subject for subject in SUBJECTS if only is None or only in subject.model]
    results = {
        (subject.model, init, k): converted(subject, shared, runs / f"{subject.model}_{init}_k{k}", init=init, k=k)
        for subject in subjects
        for k in KS
        for init in INITS
    }
    click.echo("# Results on small models\n")
    click.echo("Printed by `python scripts/measure/results.py --shared ../shared > docs/results.md`")
    click.echo(f"({machine()}; base models and all figures in fp32; layers trained under bf16 autocast if the CPU has AMX).\n")
    click.echo("K is constant and the penalty `specialise` is 0: docs/training.md has what these two change.\n")
    click.echo(textwrap.fill(legend([heading for _, heading, _ in FIGURES]), 127) + "\n")
    click.echo("## All layers at once, by `init` and K\n")
    rows = []
    for (model, init, k), evaluation in results.items():
        every, training = evaluation["all"], evaluation["training"]
        rows.append(
            f"{model} | {init} | {k} | {with_range(every, 'delta_ce', '+.4f')} | {every['kl']:.4f} "
            f"| {every['top1_agreement']:.1%} | {every['nmse']:.4f} | {every['zero_delta_ce']:+.4f} "
            f"| {with_range(every, 'expert_share', '.2f')} | {compact(training['tokens'])} | {training['seconds'] / 60:.1f}"
        )
    names = "model | init | K | ΔCE | KL | same top-1 | NMSE | ΔCE if zeroed | expert share | tokens | minutes"
    click.echo(table(names, rows))
    if any(subject.model == "books-llama-6m" for subject in subjects):
        long = converted(SUBJECTS[0], shared, runs / "books-llama-6m_layer3_long", **LONG)
        click.echo("\n## One middle layer, trained longer: books-llama-6m, layer 3, K = 16, `encoder`, decay 0.9\n")
        click.echo(by_layer(long) + "\n\n" + spent(long))
    for (model, init, k), evaluation in results.items():
        click.echo(f"\n## {model}, `{init}`, K = {k}\n")
        click.echo(by_layer(evaluation) + "\n\n" + spent(evaluation))


if __name__ == "__main__":
    main()
