"""Converts models as `mxdsurgery convert MODEL --layers all` does by default, and prints docs/defaults.md.

    python scripts/measure/defaults.py measure --shared ../shared [--only stories]      # about half an hour on two cores
    python scripts/measure/defaults.py page > docs/defaults.md

Beside each stands the same with the former defaults: the block's encoder at the start, a penalty of a fixed weight, batches of
2,048 tokens. What was measured is kept in docs/defaults/.
"""

from pathlib import Path
from typing import Any

import click
from material import BOOKS, FIXED, STORIES, Subject, only_option, runs_option, shared_option
from pages import DOCS, carried, cells, machine, read_json, read_lines, table, unused, write_lines

import mxdsurgery
from mxdsurgery.checkpoint.writing import write_json
from mxdsurgery.measuring.shares import NEAR
from mxdsurgery.recipe import EXPERT_SHARE
from mxdsurgery.terminal.console import ConsoleReporter, compact
from mxdsurgery.terminal.figures import with_range
from mxdsurgery.training.share import SHARES

KEPT = DOCS / "defaults"
RESULTS, SETTINGS = KEPT / "results.jsonl", KEPT / "settings.json"
STDLIB = ("stdlib:train", "stdlib:heldout")
SUBJECTS = (
    Subject("demo-glu", *STDLIB, 20_000),
    Subject("demo-mlp", *STDLIB, 20_000),
    Subject("stories260K", *STORIES, 18_432),
    Subject("tinystories-chat-gpt2-3M", *STORIES, 18_432),
    Subject("books-llama-6m", *BOOKS, 18_432),
)
TOKENS = 300_000
WAYS: dict[str, dict[str, Any]] = {"now": {}, "before": FIXED}
# What is also healed, on so many tokens: does the share stay?
HEALED, HEALING_TOKENS = ("stories260K",), 300_000


def keys(subject: Subject, shared: Path) -> dict[str, Any]:
    """Model, texts and counts."""
    counts = {"tokens": TOKENS, "eval_tokens": subject.eval_tokens}
    if subject.model.startswith("demo"):
        return {"model": subject.model, "data": subject.data, "eval_data": subject.eval_data} | counts
    return subject.paths(shared) | counts


def ways_of(subject: Subject) -> list[str]:
    """The ways in which a model is measured."""
    return [*WAYS, *(["healed"] if subject.model in HEALED else [])]


def flags(way: dict[str, Any]) -> str:
    """As a user types it."""
    return "".join(f" --{name.replace('_', '-')} {value:g}" for name, value in way.items())


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@shared_option
@runs_option("defaults")
@only_option
def measure(shared: Path, runs: Path, only: str | None) -> None:
    """Convert, and keep the figures; what is there already is not converted again."""
    for subject in SUBJECTS:
        if only is not None and only not in subject.model:
            continue
        for name in ways_of(subject):
            out, say = runs / f"{subject.model}-{name}", ConsoleReporter()
            if name == "healed" and not out.is_dir():
                mxdsurgery.heal(runs / f"{subject.model}-now", tokens=HEALING_TOKENS, out=str(out), reporter=say)
            elif not (out / "evaluation.json").is_file():
                way = keys(subject, shared) | WAYS[name]
                mxdsurgery.convert(**way, layers="all", device="cpu", out=str(out), reporter=say)
            found = read_json(out / "evaluation.json")
            counts = {
                "held_out": found["tokens"],
                "steps": read_json(out / "plan.json")["steps"],
                "training": found["training"],
            }
            keep([{"model": subject.model, "way": name, **counts, **row} for row in (*found["layers"], found["all"])])


def keep(rows: list[dict[str, Any]]) -> None:
    """Keeps rows in place of earlier ones of the same model and way."""
    known = [row for row in read_lines(RESULTS) if (row["model"], row["way"]) != (rows[0]["model"], rows[0]["way"])]
    KEPT.mkdir(exist_ok=True)
    write_lines(RESULTS, known + rows)
    write_json(SETTINGS, {"machine": machine()})


@main.command()
def page() -> None:
    """Print docs/defaults.md."""
    rows = read_lines(RESULTS)
    click.echo(introduction(rows))
    for subject in SUBJECTS:
        of = {way: [row for row in rows if (row["model"], row["way"]) == (subject.model, way)] for way in ways_of(subject)}
        if not of["now"]:
            continue
        every = of["now"][-1]
        times = ", ".join(f"{some[-1]['steps']} steps {way}" for way, some in of.items() if some and way in WAYS)
        click.echo(f"\n## {subject.model}\n")
        click.echo(
            f"{compact(TOKENS)} tokens: {times}; "
            f"{every['held_out']:,} held-out tokens, single layers on {of['now'][0]['tokens']:,}.\n"
        )
        names = "layer | defaults | ΔCE | KL | NMSE | expert share | a few | unused"
        pairs = zip(*(some for some in of.values() if some), strict=True)
        click.echo(table(names, (entry(row) for pair in pairs for row in pair)))


def entry(row: dict[str, Any]) -> str:
    """A row of the table."""
    return cells(
        row.get("layer", "**all**"),
        row["way"],
        with_range(row, "delta_ce", "+.4f"),
        f"{row['kl']:.4f}",
        f"{row['nmse']:.3f}",
        *(with_range(row, share, ".2f") for share in SHARES),
        unused(row),
    )


def introduction(rows: list[dict[str, Any]]) -> str:
    """What the page shows, and how many layers have what was asked for."""
    layers = [row for row in rows if row["way"] == "now" and "layer" in row]
    enough = [row for row in layers if carried(row) >= EXPERT_SHARE - NEAR]
    near = [row for row in enough if carried(row) <= EXPERT_SHARE + NEAR]
    return f"""# What a default conversion gives

Printed by `python scripts/measure/defaults.py page > docs/defaults.md` from what `... measure --shared ../shared` measured
({read_json(SETTINGS)["machine"]}). *now*: `mxdsurgery convert MODEL --layers all`, with the recipe that the
model gets, {compact(TOKENS)} tokens; *before*: the same with the former defaults,
`{flags(FIXED)[1:]}`; *healed*: the first, after `mxdsurgery heal` on {compact(HEALING_TOKENS)} tokens.

By default the experts of a layer are asked to carry {EXPERT_SHARE:g} of what it is worth; the least of *expert share*
(held against experts frozen at a constant) and *a few* (against a few experts, the same for every token) counts.
{len(near)} of the {len(layers)} layers here have it, to {NEAR:g}, on held-out text, and {len(enough) - len(near)} have more.
In brackets: 95 % intervals. [controls.md](controls.md) says what the shares mean."""


if __name__ == "__main__":
    main()
