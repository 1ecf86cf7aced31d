"""Converts all layers of a small model in several ways, heals them, measures what is left, and prints docs/all-layers.md.

    python scripts/measure/all_layers.py measure --shared ../shared --runs DIR  # an hour on one thread
    python scripts/measure/all_layers.py page > docs/all-layers.md

A run is a folder DIR/<model>-<kind>-<way>; what is in DIR is not made again, so an interrupted measurement goes on. What
the page needs is kept in docs/all-layers/; `collect --runs DIR` writes it anew. Peak memory is measured by
scripts/measure/bench_memory.py, whose lines are docs/all-layers/memory.jsonl.
"""

import math
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import material
from continuations import NEW_TOKENS, STORY_PROMPTS, continuations
from material import STORIES, runs_option, shared_option
from pages import DOCS, carried, machine, read_json, read_lines, table, unused, without_lists

import mxdsurgery
from mxdsurgery.base.selection import write_layers
from mxdsurgery.checkpoint.writing import write_json
from mxdsurgery.keys import parse_count
from mxdsurgery.measuring.growth import PARTS, growth, growth_legend
from mxdsurgery.terminal.console import ConsoleReporter, compact, size
from mxdsurgery.terminal.figures import with_range

KEPT = DOCS / "all-layers"


@dataclass(frozen=True)
class Subject(material.Subject):
    """Also the prompts that the model continues."""

    prompts: tuple[str, ...]


SUBJECTS = (Subject("stories260K", *STORIES, 20_000, STORY_PROMPTS),)


@dataclass(frozen=True)
class Way:
    """One way to get a model all of whose layers are converted.

    Attributes:
        name: the end of its runs' names.
        words: what the page says of it.
        kind: of the layers.
        recipe: keys for `convert`; the rest is as the recipe that the model gets has it.
        heals: name of the conversion that this way heals.
        heal: keywords for `heal`.
    """

    name: str
    words: str
    kind: str = "mxd"
    recipe: dict[str, Any] = field(default_factory=dict)
    heals: str | None = None
    heal: dict[str, Any] = field(default_factory=dict)

    def command(self) -> str:
        """As a user types it."""
        if self.heals is None:
            kind = "" if self.kind == "mxd" else f" --kind {self.kind}"
            return f"mxdsurgery convert MODEL --layers all{kind}" + _flags(self.recipe)
        return f"mxdsurgery heal {self.heals} --out {self.name}" + _flags(self.heal)


def _flags(options: dict[str, Any]) -> str:
    return "".join(f" --{name} {compact(value) if isinstance(value, int) else value}" for name, value in options.items())


BEST = "original-heal"  # the way whose curve against tokens, and whose text, is shown
CURVE = (100_000, 1_000_000)  # tokens of healing, besides those of all ways
GROWN = ("original", "converted", BEST)
CONVERTED = {"inputs": "converted"}
WAYS = (
    Way("original", "independent: original inputs"),
    Way("original-more", "the same, on as many tokens as with healing", recipe={"tokens": 600_000}),
    Way("converted", "sequential, toward the decoder layer's output in the original", recipe=CONVERTED),
    Way(
        "converted-block",
        "sequential, toward the block's output in the original",
        recipe=CONVERTED | {"target": "original"},
    ),
    Way("converted-own", "sequential, toward the block's output on its own input", recipe=CONVERTED | {"target": "own"}),
    Way("joint", "all layers together, end to end", recipe={"inputs": "joint"}),
    Way("original-heal", "independent, healed", heals="original"),
    Way("converted-heal", "sequential, healed", heals="converted"),
    Way("original-heal-lora", "independent, healed with LoRA besides", heals="original", heal={"mode": "both"}),
    Way("original", "transcoders, independent", "transcoder"),
    Way("original-heal", "transcoders, independent, healed", "transcoder", heals="original"),
)
CURVE_WAYS = tuple(
    Way(f"{BEST}-{compact(tokens)}", f"{compact(tokens)} tokens", heals="original", heal={"tokens": tokens})
    for tokens in CURVE
)


def run_name(subject: Subject, way: Way, other: str | None = None) -> str:
    """A run's folder; with ``other``, that of the same model and kind made in another way."""
    return f"{subject.model}-{way.kind}-{other or way.name}"


def all_runs() -> Iterator[tuple[Subject, Way, str]]:
    """Every run, a conversion before its healings."""
    for way in (*WAYS, *CURVE_WAYS):
        for subject in SUBJECTS:
            yield subject, way, run_name(subject, way)


def make(subject: Subject, way: Way, tokens: int, shared: Path, runs: Path) -> None:
    """Converts, or heals a conversion, into the run's folder."""
    out, say = str(runs / run_name(subject, way)), ConsoleReporter()
    if way.heals is not None:
        before = runs / run_name(subject, way, way.heals)
        if not before.is_dir():
            raise mxdsurgery.MxDError(f"{before.name} is not there yet", fix="measure it first, then this")
        mxdsurgery.heal(before, out=out, reporter=say, **({"tokens": tokens} | way.heal))
        return
    keys = {"kind": way.kind, "layers": "all", "tokens": tokens, "eval_tokens": subject.eval_tokens, "out": out}
    mxdsurgery.convert(**(subject.paths(shared) | keys | way.recipe), reporter=say)


def pieces(tokens: int, shared: Path, runs: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """All that is to be measured: each file or folder that will be made, and the function that makes it."""
    for subject, way, name in all_runs():
        yield runs / name, lambda s=subject, w=way: make(s, w, tokens, shared, runs)
    for subject in SUBJECTS:
        for way in WAYS:
            if way.name in GROWN and way.kind == "mxd":
                folder = runs / run_name(subject, way)
                path = runs / f"{folder.name}.growth.json"
                yield path, lambda f=folder, p=path: write_json(p, growth(f, reporter=ConsoleReporter()))
    for subject in SUBJECTS:
        folder, path = runs / f"{subject.model}-mxd-{BEST}", runs / f"{subject.model}.continuations.json"
        texts, original = subject.prompts, shared / "models" / subject.model
        yield path, lambda t=texts, f=folder, p=path, o=original: write_json(p, continuations(t, f, o))


def row_of(subject: Subject, way: Way, runs: Path) -> dict[str, Any]:
    """A run's figures and its cost: that of the conversion, and of the healing if it was healed."""
    evaluation = read_json(runs / run_name(subject, way) / "evaluation.json")
    training, healed = evaluation["training"], evaluation.get("healed", [])
    tokens, seconds = (sum(took[name] for took in (training, *healed)) for name in ("tokens", "seconds"))
    row = {"model": subject.model, "kind": way.kind, "way": way.name, "tokens": tokens, "seconds": seconds}
    row |= {
        "healing_tokens": sum(step["tokens"] for step in healed),
        "eval_data": Path(evaluation["data"]).name,
        "eval_tokens": evaluation["tokens"],
        "least_share": least_share(evaluation["layers"]),
    }
    return row | {"original_ce": evaluation["original"]["ce"]} | without_lists(evaluation["all"])


def least_share(layers: list[dict[str, Any]]) -> float | None:
    """Of the shares that layers' experts carry each alone, the least; None if one is no number."""
    least = min(map(carried, layers))
    return least if math.isfinite(least) else None


def collected(runs: Path) -> None:
    """Writes what the page needs into docs/all-layers."""
    rows = [row_of(s, w, runs) for s, w, name in all_runs() if (runs / name / "evaluation.json").is_file()]
    write_json(KEPT / "runs.json", {"machine": machine(), "rows": rows})
    for what in ("growth", "continuations"):
        found = {path.name.removesuffix(f".{what}.json"): path for path in sorted(runs.glob(f"*.{what}.json"))}
        write_json(KEPT / f"{what}.json", {name: read_json(path) for name, path in found.items()})


def runs_section(rows: list[dict[str, Any]]) -> Iterator[str]:
    """All ways, a table per model."""
    yield "## All ways\n"
    ways = (f"{_label(way.kind, way.name)} | {way.words} | `{way.command()}`" for way in WAYS)
    yield table("way | how | command, before the texts and, where none are given, `--tokens 300k`", ways)
    order = {(way.kind, way.name): number for number, way in enumerate(WAYS)}
    for subject in SUBJECTS:
        mine = [row for row in rows if row["model"] == subject.model and (row["kind"], row["way"]) in order]
        if not mine:
            continue
        first = mine[0]
        yield (
            f"\n### {subject.model}\n\nOn {first['eval_tokens']:,} held-out tokens of {first['eval_data']}; original "
            f"cross-entropy {first['original_ce']:.4f} nats per token.\n"
        )
        yield table(
            "way | ΔCE | KL | same top-1 | least share of a layer | unused | tokens | minutes",
            (
                f"{_label(row['kind'], row['way'])} | {with_range(row, 'delta_ce', '+.4f')} | {row['kl']:.4f} "
                f"| {row['top1_agreement']:.1%} | {with_range(row, 'least_share', '.2f')} | {unused(row)} "
                f"| {compact(row['tokens'])} | {row['seconds'] / 60:.1f}"
                for row in sorted(mine, key=lambda row: order[row["kind"], row["way"]])
            ),
        )
    yield ""


def _label(kind: str, way: str) -> str:
    return f"`{way}`" if kind == "mxd" else f"{kind}s `{way}`"


def curve_section(rows: list[dict[str, Any]]) -> Iterator[str]:
    """ΔCE against tokens of healing."""
    yield "## Against tokens\n"
    yield f"`{BEST}`, by tokens of healing: `mxdsurgery heal DIR --tokens TOKENS --out DIR2`.\n"
    lines = []
    for subject in SUBJECTS:
        mine = [row for row in rows if row["model"] == subject.model and row["kind"] == "mxd"]
        shown = [row for row in mine if row["way"] in {"original", BEST, *(way.name for way in CURVE_WAYS)}]
        lines += [
            f"{subject.model} | {compact(row['healing_tokens'])} | {with_range(row, 'delta_ce', '+.4f')} "
            f"| {row['kl']:.4f} | {row['top1_agreement']:.1%} | {with_range(row, 'least_share', '.2f')} "
            f"| {row['seconds'] / 60:.1f}"
            for row in sorted(shown, key=lambda row: row["healing_tokens"])
        ]
    yield table("model | tokens of healing | ΔCE | KL | same top-1 | least share of a layer | minutes, all", lines)
    yield ""


def growth_section(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """How errors grow with the number of layers."""
    yield "## How the error grows\n\nEach table by `mxdsurgery evaluate DIR --growth`.\n"
    yield textwrap.fill(growth_legend(), 127) + "\n"
    for name, result in found.items():
        yield f"### {name}\n\n{result['verdict']} ({result['tokens']:,} held-out tokens)\n"
        yield table(" | layers in place | ΔCE | KL | same top-1 | sum | difference", _growth_rows(result))
        yield ""
        yield table("decoder layer | stream error, all in place | FVU | own", map(_stream_row, result["stream"]))
        yield ""


def _growth_rows(result: dict[str, Any]) -> Iterator[str]:
    for part, words in PARTS:
        for row in result[part]:
            sums = (
                f"{row['singles_delta_ce']:+.4f} | {with_range(row, 'excess_delta_ce', '+.4f')}" if part != "alone" else " | "
            )
            yield (
                f"{words} | {write_layers(row['layers'])} | {with_range(row, 'delta_ce', '+.4f')} | {row['kl']:.4f} "
                f"| {row['top1_agreement']:.1%} | {sums}"
            )


def _stream_row(row: dict[str, Any]) -> str:
    own = "-" if row["own_error"] is None else f"{row['own_error']:.5f}"
    return f"{row['layer']} | {with_range(row, 'error', '.5f')} | {row['fvu']:.5f} | {own}"


def continuations_section(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Text of both models, side by side."""
    yield "## Does it still say the same?\n"
    yield (
        f"Fixed prompts, {NEW_TOKENS} new tokens, the likeliest one each time. Same: the tokens before the texts part. Once\n"
        "a token differs, those after it differ, too, so this is severe. Same choice: how many tokens of the original's text\n"
        "are the converted model's likeliest when it reads that text. `mxdsurgery generate DIR --prompt PROMPT\n"
        f"--temperature 0 --max-new-tokens {NEW_TOKENS}` prints the converted model's text.\n"
    )
    for result in found.values():
        rows = result["rows"]
        whole = sum(row["same"] == row["of"] for row in rows)
        mean = sum(row["same"] for row in rows) / len(rows)
        chosen = sum(row["chosen"] for row in rows) / sum(row["choices"] for row in rows)
        yield f"### {result['run']}\n"
        yield f"{whole} of {len(rows)} the same to the end, {mean:.1f} tokens on average; {chosen:.0%} the same choice.\n"
        yield table(
            "prompt | original | converted | same | same choice",
            (
                " | ".join(_cell(row[name]) for name in ("prompt", "original", "converted"))
                + f" | {row['same']} of {row['of']} | {row['chosen']} of {row['choices']}"
                for row in rows
            ),
        )
        yield ""


def _cell(text: str) -> str:
    for sign, safe in (("\\", "\\\\"), ("|", "\\|"), ("\n", "⏎ "), ("<", "&lt;"), ("*", "\\*"), ("_", "\\_"), ("`", "\\`")):
        text = text.replace(sign, safe)
    return text.strip()


def memory_section(lines: list[dict[str, Any]]) -> Iterator[str]:
    """Peak memory of ways to convert a model far larger than these."""
    yield "## Peak memory\n"
    if not lines:
        return
    shape = lines[0]["shape"]
    weights = shape["parameters"] * {"bfloat16": 2, "float32": 4}[shape["dtype"]]
    yield (
        f"Converting {shape['layers']} blocks of a model with {compact(shape['parameters'])} parameters and random weights "
        f"({shape['dtype']}: {size(weights)}; D {shape['D']:,}, H {shape['H']:,}, N {shape['N']:,}), each line in a process\n"
        "of its own, above what that process had before. Reload: the fresh process that loads the result and runs it, with\n"
        "its libraries.\n"
        "By `python scripts/measure/bench_memory.py --layers 0,12,23 --batch 256 --tokens 1024 --eval-tokens 256`.\n"
    )
    largest = max(line["peak_bytes"] for line in lines)
    yield table(
        "way | peak | of the largest | training alone | planned for it | reload | minutes",
        (
            f"{line['way']} | {size(line['peak_bytes'])} | {line['peak_bytes'] / largest:.0%} "
            f"| {size(line['training_bytes'])} | {size(line['planned_bytes'])} | {size(line['reload_bytes'])} "
            f"| {line['seconds'] / 60:.1f}"
            for line in lines
        ),
    )
    yield ""


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@shared_option
@runs_option("all-layers")
@click.option("--only", help="Only what has this in its name, for example stories260K-mxd-original, or growth.")
@click.option("--tokens", default="300k", show_default=True, help="Of a conversion, and of healing.")
def measure(shared: Path, runs: Path, only: str | None, tokens: str) -> None:
    """Measure what is not in RUNS yet; what fails is said, and the rest goes on."""
    runs.mkdir(parents=True, exist_ok=True)
    count, failed = parse_count(tokens), []
    if count is None:
        raise click.BadParameter(f"{tokens!r} is not a count such as 1M")
    for path, work in pieces(count, shared.resolve(), runs.resolve()):
        if path.exists() or (only is not None and only not in path.name):
            continue
        click.echo(f"== {path.name}", err=True)
        try:
            work()
        except mxdsurgery.MxDError as error:
            click.echo(f"{path.name}: {error}", err=True)
            failed.append(path.name)
        collected(runs)
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


@main.command()
@click.option("--runs", type=click.Path(path_type=Path, exists=True), required=True)
def collect(runs: Path) -> None:
    """Write what RUNS holds into docs/all-layers."""
    collected(runs)


@main.command()
def page() -> None:
    """Print docs/all-layers.md."""
    found = read_json(KEPT / "runs.json", {"machine": "not measured", "rows": []})
    click.echo((KEPT / "introduction.md").read_text())
    click.echo(f"Measured with {found['machine']}.\n")
    for section, content in (
        (runs_section, found["rows"]),
        (curve_section, found["rows"]),
        (growth_section, read_json(KEPT / "growth.json", {})),
        (continuations_section, read_json(KEPT / "continuations.json", {})),
        (memory_section, read_lines(KEPT / "memory.jsonl")),
    ):
        click.echo("\n".join(section(content)))


if __name__ == "__main__":
    main()
