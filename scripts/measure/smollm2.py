"""Takes SmolLM2-135M-Instruct through the whole tool, keeps what came of it, and prints docs/smollm2.md.

    python ../shared/models/fetch_smollm2.py ~/.cache/smollm2                               # the model, once
    python scripts/measure/smollm2.py measure --shared ../shared --model ~/.cache/smollm2 --runs DIR    # hours on two cores
    python scripts/measure/smollm2.py measure --shared ../shared --model ~/.cache/smollm2 --runs DIR --only kinds   # a part
    python scripts/measure/smollm2.py page > docs/smollm2.md

DIR should lie outside of the repository: models of some hundred megabytes are made in it. The parts are `commands` (or the
names of its steps), `rates`, `kinds`, `first`, `growth`, `texts` and `choices`. What docs/smollm2/ has already is not
measured again: delete it there to begin anew.
"""

import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from choices import TASKS, accuracies
from continuations import BOOK_PROMPTS, NEW_TOKENS, QUESTIONS, continuations
from first_position import first_position
from material import BOOKS, runs_option, shared_option
from pages import DOCS, carried, cells, machine, read_json, table, unused, without_lists
from smollm2_steps import EXPERT_STEPS, HEALED, MODEL, STEPS, WHOLE
from steps import costs_of, lay_out, run_steps, written

import mxdsurgery
from mxdsurgery.checkpoint.writing import write_json
from mxdsurgery.measuring.growth import PARTS, growth
from mxdsurgery.terminal.console import ConsoleReporter, compact, size
from mxdsurgery.terminal.figures import NONE, times, with_range

KEPT = DOCS / "smollm2"
ALL_STEPS = STEPS + EXPERT_STEPS

# Layers with unlike outputs: one with a few huge ones, an ordinary one, a late one.
RATE_LAYERS, RATES, RATE_TOKENS = "2,12,27", (2e-4, 4e-4, 1e-3), 100_000
# One layer: these kinds at every K, others at one; all as large as a transcoder of 32 D features.
KIND_LAYER, KS, KINDS = 15, (16, 32, 64, 128), ("mxd", "transcoder", "skip-transcoder")
OTHER_K, OTHER_KINDS = 32, ("molt", "topk-sae")
KIND_TOKENS, KIND_BATCH = 600_000, 1024
EVAL_TOKENS = 8_000
TEXTS = 400  # of each zero-shot task


def keys(runs: Path) -> dict[str, Any]:
    """What all trainings of this page share."""
    data, eval_data = (str(runs / name) for name in BOOKS)
    return {"model": str(runs / MODEL), "data": data, "eval_data": eval_data, "eval_tokens": EVAL_TOKENS, "device": "cpu"}


def measure_rates(runs: Path) -> list[dict[str, Any]]:
    """Three layers, by learning rate."""
    rows = []
    for lr in RATES:
        made = mxdsurgery.convert(
            **keys(runs),
            layers=RATE_LAYERS,
            tokens=RATE_TOKENS,
            lr=lr,
            out=str(runs / f"rate-{lr:g}"),
            overwrite=True,
            reporter=ConsoleReporter(),
        )
        rows += [{"lr": lr, "steps": made.plan.steps, **without_lists(row)} for row in made.evaluation["layers"]]
    return rows


def measure_kinds(runs: Path) -> dict[str, Any]:
    """One layer, by kind and K."""
    for kinds, k in ((KINDS, KS), (OTHER_KINDS, (OTHER_K,))):
        made = mxdsurgery.frontier(
            **keys(runs),
            layer=KIND_LAYER,
            k=k,
            kinds=kinds,
            tokens=KIND_TOKENS,
            batch=KIND_BATCH,
            expansion=32,
            out=str(runs / "kinds"),
            resume=True,
            reporter=ConsoleReporter(),
        )
    rows = [without_lists(row) for row in made.rows]
    return {"rows": rows, "tokens": made.tokens, "original": made.original, "batch": made.settings["batch"]}


def measure_first(runs: Path) -> dict[str, list[dict[str, Any]]]:
    """What position 0 does to all others."""
    models = {"converted": WHOLE, "healed": HEALED}
    return {name: first_position(runs / folder, runs / MODEL, EVAL_TOKENS) for name, folder in models.items()}


def measure_growth(runs: Path) -> dict[str, Any]:
    """Where errors grow."""
    return growth(runs / HEALED, tokens=EVAL_TOKENS, reporter=ConsoleReporter())


def measure_texts(runs: Path) -> dict[str, Any]:
    """Continuations and answers."""
    original, converted = runs / MODEL, runs / HEALED
    return {
        "continuations": continuations(BOOK_PROMPTS, converted, original)["rows"],
        "answers": continuations(QUESTIONS, converted, original, chat=True)["rows"],
    }


def measure_choices(runs: Path) -> dict[str, Any]:
    """Zero-shot accuracy."""
    models = {"original": MODEL, "converted": WHOLE, "healed": HEALED}
    return {name: accuracies(runs / folder, name != "original", runs, TEXTS, "bfloat16") for name, folder in models.items()}


PARTS_MEASURED: dict[str, Callable[[Path], Any]] = {
    "rates": measure_rates,
    "kinds": measure_kinds,
    "first": measure_first,
    "growth": measure_growth,
    "texts": measure_texts,
    "choices": measure_choices,
}


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@shared_option
@click.option("--model", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@runs_option("smollm2")
@click.option("--only", help="Names of parts, or of steps of `commands`, with commas between them.")
def measure(shared: Path, model: Path, runs: Path, only: str | None) -> None:
    """Measure what is not kept yet; or what is named, anew."""
    lay_out(runs, shared=shared)
    if not (runs / MODEL).exists():
        (runs / MODEL).symlink_to(model.resolve())
    wanted = only.split(",") if only else ["commands", *PARTS_MEASURED]  # some are of the models that commands make
    KEPT.mkdir(exist_ok=True)
    for name in wanted:
        if name in PARTS_MEASURED:
            path = KEPT / f"{name}.json"
            if only or not path.is_file():
                write_json(path, {"machine": machine(), "found": PARTS_MEASURED[name](runs)})
        else:
            run_steps(ALL_STEPS, runs, KEPT, None if name == "commands" else name)
            keep_evaluations(runs)


def keep_evaluations(runs: Path) -> None:
    """Keeps the layers' figures of the conversion and of the healed model."""
    for name, folder in (("converted", WHOLE), ("healed", HEALED)):
        evaluation = read_json(runs / folder / "evaluation.json")
        if evaluation is not None:
            kept = {part: evaluation[part] for part in ("tokens", "original", "training")}
            kept |= {part: evaluation[part] for part in ("healed",) if part in evaluation}
            kept["rows"] = [without_lists(row) for row in (*evaluation["layers"], evaluation["all"])]
            write_json(KEPT / f"{name}.json", {"found": kept})


@main.command()
def page() -> None:
    """Print docs/smollm2.md."""
    of_layers = (rates_section, kinds_section, layers_section, first_section, growth_section)
    sections = (introduction, *of_layers, texts_section, choices_section)
    for part in (part for section in sections for part in section()):
        click.echo(part)
    click.echo(f"## The commands\n\n{written(ALL_STEPS, KEPT)}")
    click.echo("\n".join(costs_section()))


def found(name: str) -> Any:
    """What a part found, and on which machine, if that was written down; None if it was not measured."""
    kept = read_json(KEPT / f"{name}.json", {})
    return kept.get("found"), kept.get("machine")


def say(*sentences: str) -> str:
    """A paragraph."""
    return textwrap.fill(" ".join(sentences), 127) + "\n"


def introduction() -> Iterator[str]:
    """What the page is about."""
    yield "# A model that people use: SmolLM2-135M-Instruct\n"
    yield say(
        "SmolLM2-135M-Instruct (Llama architecture, 30 layers, D 576, H 1536) through the whole tool, on two cores of a",
        "processor with bf16. Printed by `python scripts/measure/smollm2.py page > docs/smollm2.md` from what `... measure`",
        "did. It trains on",
        f"{BOOKS[0]} (35 M characters of books, Python code, Wikipedia and reviews) and is measured on {BOOKS[1]},",
        "other files of these kinds. Figures leave out position 0 of each context of 128 tokens. In brackets: 95 % intervals.",
        "*Carried*: the least of two shares of what a layer is worth, 0.5 of which its experts are asked to carry",
        "([controls.md](controls.md)).",
    )


def rates_section() -> Iterator[str]:
    """The rule for the learning rate."""
    rows, where = found("rates")
    if rows is None:
        return
    yield "## What the defaults rest on\n"
    yield say(
        f"Layers {RATE_LAYERS.replace(',', ', ')} on {compact(RATE_TOKENS)} tokens ({rows[0]['steps']} steps), by learning",
        f"rate, each converted alone; {rows[0]['tokens']:,} held-out tokens ({where}).",
        "The recipe for models of 512 dimensions or more has 4e-4.",
    )
    names = "layer | lr | ΔCE | KL | NMSE | median error | carried | unused"
    in_order = sorted(rows, key=lambda row: row["layer"])
    yield table(names, (cells(row["layer"], f"{row['lr']:g}", *figures(row)) for row in in_order))
    yield ""


def figures(row: dict[str, Any]) -> Iterator[str]:
    """ΔCE, KL, NMSE, median error, share, unused experts."""
    yield with_range(row, "delta_ce", "+.4f")
    yield f"{row['kl']:.4f}"
    yield f"{row['nmse']:.3f}"
    yield f"{row['median_error']:.3f}" if row.get("median_error") is not None else "-"
    yield f"{carried(row):.2f}"
    yield unused(row)


def kinds_section() -> Iterator[str]:
    """One layer, the paper's table."""
    kinds, where = found("kinds")
    if kinds is None:
        return
    rows = kinds["rows"]
    first = rows[0]
    yield f"## One layer: the paper's table, layer {KIND_LAYER}\n"
    yield say(
        f"Kinds of as many parameters as a transcoder with 32 D features ({compact(first['params'])}), all trained on the",
        f"same {compact(first['train_tokens'])} tokens in steps of {kinds['batch']:,} (today's default is 256), transcoders",
        "at half of today's rate, which was too little for them ([tried.md](tried.md));",
        f"{kinds['tokens']:,} held-out tokens ({where}); original cross-entropy {kinds['original']['ce']:.4f},",
        f"with the block zeroed {first['zero_delta_ce']:+.4f}, with its mean output {first['mean_delta_ce']:+.4f}.",
        "The paper's nearest model, GPT-2 124M, after 480 M tokens, at K = 16, 32, 64, 128:",
        "transcoders lose .0341 .0249 .0141 .0090, skip-transcoders .0306 .0211 .0124 .0080,",
        "mxd .0032 .0029 .0022 .0017 nats.",
    )
    names = "kind | K | N | ΔCE | KL | NMSE | median error | carried | unused"
    yield table(names, (cells(row["kind"], row["k"], row["n_experts"], *figures(row)) for row in rows))
    yield ""
    yield table(cells("ΔCE over mxd's", *(f"K = {k}" for k in KS)), ratios(rows))
    yield ""


def ratios(rows: list[dict[str, Any]]) -> Iterator[str]:
    """How many times mxd's ΔCE and KL the others' are, at each K."""
    of = {(row["kind"], row["k"]): row for row in rows}
    for kind in KINDS[1:]:
        for figure, name in (("delta_ce", "ΔCE"), ("kl", "KL")):
            multiples = [times(of[kind, k], of["mxd", k], figure) for k in KS]
            yield cells(f"{kind}, {name}", *(NONE if multiple is None else f"{multiple:.1f}" for multiple in multiples))


def layers_section() -> Iterator[str]:
    """All layers, converted and healed."""
    (converted, _), (healed, _) = found("converted"), found("healed")
    if converted is None:
        return
    yield "## All thirty layers\n"
    of = {"converted": converted} | ({} if healed is None else {"healed": healed})
    yield say(
        f"{converted['tokens']:,} held-out tokens; original cross-entropy {converted['original']['ce']:.4f}.",
        f"Single layers, each converted alone, on {converted['rows'][0]['tokens']:,} of them.",
    )
    for record in (healed or {}).get("healed", []):
        yield say(
            f"Healed on {record['tokens']:,} tokens in {seconds_in_words(record['seconds'])} (`heal {WHOLE} --tokens 60k`):",
            f"KL from {record['kl_before']:.3f} to {record['kl_after']:.3f}, on held-out text that nothing was chosen on.",
        )
    names = "layer | model | ΔCE | KL | NMSE | median error | carried | unused"
    pairs = zip(*([(name, row) for row in some["rows"]] for name, some in of.items()), strict=True)
    yield table(names, (cells(row.get("layer", "**all**"), name, *figures(row)) for pair in pairs for name, row in pair))
    tops = ", ".join(f"{name} {some['rows'][-1]['top1_agreement']:.1%}" for name, some in of.items())
    yield f"\nThe likeliest token is the original's, with all layers in place: {tops}.\n"


def first_section() -> Iterator[str]:
    """What position 0 does to all others."""
    of, where = found("first")
    if of is None:
        return
    yield "### The first position\n"
    yield say(
        "The first token of a context is this model's attention sink: a few layers give it outputs tens of times as large as",
        "any other's. Where a converted layer misses that, every later prediction suffers: by context, KL in nats per token,",
        f"all layers in place; beside it, the mean where position 0 of every layer is the original's ({where}).",
        "These layers were trained when the loss counted no output for more than one of twice the mean size; since then it is",
        "eight times ([tried.md](tried.md)).",
    )
    names = "model | contexts | mean KL | median | largest | mean, position 0 kept"
    figures = ("kl", "median_kl", "largest_kl", "kept_kl")
    rows = (
        cells(name, f"{row['contexts']} {'with' if row['bos'] else 'without'} BOS", *(f"{row[key]:.3f}" for key in figures))
        for name, some in of.items()
        for row in some
    )
    yield table(names, rows)
    yield ""


def growth_section() -> Iterator[str]:
    """Where errors grow."""
    grown, _ = found("growth")
    if grown is None:
        return
    yield "### Where errors grow\n"
    yield "ΔCE of the healed model with only its first or last layers in place.\n"
    for part, words in PARTS[:2]:
        rows = [row for row in grown["predictions"] if row["part"] == part]
        entries = (cells(len(row["layers"]), f"{row['delta_ce']:+.4f}", f"{row['kl']:.4f}") for row in rows)
        yield table(f"layers {words} | ΔCE | KL", entries)
        yield ""


def texts_section() -> Iterator[str]:
    """Continuations and answers."""
    texts, _ = found("texts")
    if texts is None:
        return
    for name, heading in (("answers", "Ten questions in the chat template"), ("continuations", "Ten beginnings of texts")):
        rows = texts[name]
        same = sum(row["chosen"] for row in rows) / sum(row["choices"] for row in rows)
        yield f"### {heading}\n"
        yield say(
            f"The likeliest token at each place, {NEW_TOKENS} at most. Given the original's text so far, the healed model's",
            f"likeliest token is the original's at {same:.0%} of the places.",
        )
        columns = ("prompt", "original", "converted")
        yield table(" | ".join(columns), (cells(*(" ".join(row[column].split()) for column in columns)) for row in rows))
        yield ""


def choices_section() -> Iterator[str]:
    """Zero-shot accuracy."""
    models, where = found("choices")
    if models is None:
        return
    yield "### Zero-shot choices, by lm-evaluation-harness\n"
    yield say(
        f"The likeliest of the classes after {TEXTS} texts of each set, the same for each model ({where}).",
        "scripts/measure/choices.py has the wording. In brackets: standard errors.",
    )
    rows = ([f"{of[task]['acc']:.3f} ({of[task]['acc_stderr']:.3f})" for of in models.values()] for task in TASKS)
    yield table(cells("task", *models), (cells(task, *row) for task, row in zip(TASKS, rows, strict=True)))
    yield ""


def costs_section() -> Iterator[str]:
    """Time and memory of every command."""
    costs = costs_of(KEPT)
    yield "## Time and memory of every command\n"
    yield "Of each from start to end, most with two other jobs on the two cores; memory is that of its largest process.\n"
    rows = (
        cells(f"`{step.command}`", cost["threads"], seconds_in_words(cost["seconds"]), size(cost["peak_bytes"]))
        for step in ALL_STEPS
        if (cost := costs.get(step.name))
    )
    yield table("command | CPU threads | time | peak memory", rows)


def seconds_in_words(seconds: float) -> str:
    """As plans say it."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


if __name__ == "__main__":
    main()
