"""Measures the frontiers, probes and dissections of docs/frontier.md, and prints that page from what was measured.

    python scripts/measure/frontiers.py measure --shared ../shared     # an hour and a half on one core
    python scripts/measure/frontiers.py page > docs/frontier.md

What is measured is kept in docs/frontier/. What is in --runs already is not measured again: delete it to begin anew.
The shared folder holds models/, text/ and probing/ (CONTRIBUTING.md says where it is).
"""

import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import material
from material import BOOKS, STORIES, only_option, runs_option, shared_option
from pages import DOCS, cells, machine, read_json, table, unused

import mxdsurgery
from mxdsurgery.checkpoint.writing import write_json
from mxdsurgery.measuring.frontier_table import Frontier
from mxdsurgery.recipe import EXPERT_SHARE
from mxdsurgery.terminal.console import ConsoleReporter, compact
from mxdsurgery.terminal.figures import NONE, legend, range_of, times, with_range
from mxdsurgery.training.share import SHARES

KEPT = DOCS / "frontier"
RIVALS_FOLDER = KEPT / "rivals"
KINDS = ("mxd", "transcoder", "skip-transcoder", "molt", "dense")
# Another gate, at one K, and with which kinds.
RIVAL, RIVAL_KINDS, RIVALS_K = "jumprelu", ("mxd", "transcoder", "molt"), 16
# An autoencoder has an easier task than the others, so it is measured at fewer K.
AUTOENCODER_K = (16, 32)  # of the first model
PROBING = ("ag_news", "languages", "sentiment")
# What experts carry, against what.
CARRIED = (*SHARES, "earned_share")
# Of a frontier's table.
HEADINGS = ("kind", "K", "N", "parameters", "ΔCE", "95 % interval", "KL", "NMSE", "Jacobian NMSE", "expert share")
HEADINGS += ("beyond a few", "earned", "L0", "unused experts")
# Probing and dissection examine the kinds at this K.
LOOKED_AT = 32


@dataclass(frozen=True)
class Subject(material.Subject):
    """Also its middle layer, and the K at which it is measured."""

    layer: int
    k: tuple[int, ...]


SUBJECTS = (
    Subject("books-llama-6m", *BOOKS, 18_432, layer=3, k=(16, 32, 128)),
    Subject("tinystories-chat-gpt2-3M", *STORIES, 18_432, layer=4, k=(16, 64, 256)),
    Subject("stories260K", *STORIES, 18_432, layer=2, k=(16, 64, 256)),
)
TOKENS = 500_000


def trained(subject: Subject, shared: Path, out: Path, kinds: tuple[str, ...], k: tuple[int, ...], **keys: str) -> Frontier:
    """The frontier of one model, on the CPU in fp32."""
    return mxdsurgery.frontier(
        **subject.paths(shared),
        layer=subject.layer,
        k=k,
        kinds=kinds,
        tokens=TOKENS,
        eval_tokens=subject.eval_tokens,
        dtype="float32",
        device="cpu",
        out=str(out),
        reporter=ConsoleReporter(),
        **keys,
    )


def published(made: Frontier) -> dict[str, Any]:
    """What a frontier's folder says, without local paths, and of which machine."""
    read = read_json(made.out / "frontier.json")
    names = {name: Path(value).name for name in ("model", "data", "eval_data") if (value := read["settings"][name])}
    return read | {"settings": read["settings"] | names, "machine": machine()}


def measure_frontier(subject: Subject, shared: Path, runs: Path, kinds: tuple[str, ...], k: tuple[int, ...]) -> Frontier:
    """Measures the frontier of one model; copies what the page needs to docs/frontier."""
    made = trained(subject, shared, runs / subject.model, kinds, k)
    write_json(KEPT / f"{subject.model}.json", published(made))
    shutil.copy(made.out / "frontier.png", KEPT / f"{subject.model}.png")
    return made


def measure_rivals(subject: Subject, shared: Path, runs: Path) -> None:
    """Measures the `RIVAL` gate on one model; keeps its rows in docs/frontier/rivals/."""
    made = trained(subject, shared, runs / f"{subject.model}-{RIVAL}", RIVAL_KINDS, (RIVALS_K,), sparsity=RIVAL)
    write_json(RIVALS_FOLDER / f"{subject.model}.json", published(made))


def rival_rows(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Rows of a table of gates."""
    for row in sorted(rows, key=lambda row: (KINDS.index(row["kind"]), row["sparsity"] != "topk")):
        yield cells(
            row["kind"] if row["sparsity"] == "topk" else f"{row['kind']}, {row['sparsity']}",
            f"{row['n_experts']:,}",
            compact(row["params"]),
            with_range(row, "delta_ce", "+.4f"),
            f"{row['kl']:.4f}",
            f"{row['nmse']:.4f}",
            with_range(row, "jacobian_nmse", ".3f"),
            *(with_range(row, name, ".2f") for name in CARRIED),
            f"{row['l0']:.1f}",
            unused(row),
        )


def rivals_section(there: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The tables of the models on which the `RIVAL` gate was measured, beside the same kinds with the usual one."""
    yield f"## Another gate, and mixtures of linear transforms: K = {RIVALS_K}\n"
    yield (KEPT / "rivals.md").read_text()
    for path in sorted(RIVALS_FOLDER.glob("*.json")):
        usual = [row for row in there[path.stem]["rows"] if row["k"] == RIVALS_K and row["kind"] in KINDS]
        names = "what | N | parameters | ΔCE | KL | NMSE | Jacobian NMSE | expert share | beyond a few | earned | L0 | unused"
        yield f"{path.stem}, layer {usual[0]['layer']}; the rows without a gate's name are those of the tables above.\n"
        yield table(names, rival_rows(usual + read_json(path)["rows"]))
        yield ""


def look(made: Frontier, shared: Path) -> None:
    """Probes and dissects the kinds at one K."""
    chosen = [row for row in made.rows if row["k"] == LOOKED_AT]
    folder = made.out.with_name(f"{made.out.name}-k{LOOKED_AT}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "layers").symlink_to((made.out / "layers").resolve())
    for name in ("recipe.yaml", "frontier.json"):
        shutil.copy(made.out / name, folder / name)
    write_json(folder / "frontier.json", read_json(folder / "frontier.json") | {"rows": chosen})
    for data in PROBING:
        path = str(shared / "probing" / f"{data}.jsonl")
        for verb, found in (
            ("probe", mxdsurgery.probe(folder, data=path, reporter=ConsoleReporter())),
            ("dissect", mxdsurgery.dissect(folder, data=path, samples=2000, reporter=ConsoleReporter())),
        ):
            found["data"] = Path(found["data"]).name
            write_json(KEPT / f"{made.out.name}-{verb}-{data}.json", found)


def kept(pattern: str) -> dict[str, dict[str, Any]]:
    """What was measured, by file name without its suffix."""
    return {path.stem: read_json(path) for path in sorted(KEPT.glob(pattern))}


def rows_of(measured: Frontier) -> Iterator[str]:
    """Rows of a frontier's table."""
    for row in measured.rows:
        yield cells(
            row["kind"],
            row["k"] or "-",
            row["n_experts"] or "-",
            compact(row["params"]),
            f"{row['delta_ce']:+.4f}",
            range_of(row, "delta_ce", "+.4f"),
            f"{row['kl']:.4f}",
            f"{row['nmse']:.4f}",
            NONE if row["jacobian_nmse"] is None else f"{row['jacobian_nmse']:.3f}",
            *(with_range(row, name, ".2f") for name in CARRIED),
            "-" if row["l0"] is None else f"{row['l0']:.1f}",
            unused(row),
        )


def ratios(measured: Frontier, every: list[int]) -> Iterator[str]:
    """The ratio of the transcoders' ΔCE and KL to MxD's, at each K."""
    for figure, name in (("delta_ce", "ΔCE"), ("kl", "KL")):
        of = {(row["kind"], row["k"]): row for row in measured.rows}
        for other in ("transcoder", "skip-transcoder"):
            found = [times(of[other, k], of["mxd", k], figure) for k in every]
            yield cells(f"{other}'s {name} over mxd's", *(NONE if ratio is None else f"{ratio:.1f}" for ratio in found))


def frontier_section(name: str, read: dict[str, Any]) -> Iterator[str]:
    """One model's figure and tables."""
    measured = Frontier(KEPT, read["rows"], read["tokens"], read["original"], read["settings"])
    layer = measured.rows[0]["layer"]
    yield f"## {name}, layer {layer}\n"
    yield f"![ΔCE against K](frontier/{name}.png)\n"
    used, first = read["settings"], measured.rows[0]
    asked = EXPERT_SHARE if used["expert_share"] is None else used["expert_share"]
    keys = ", ".join(f"{key} {used[key]}" for key in ("batch", "lr", "warmup", "decay")) + f", expert_share {asked}"
    yield (
        f"{compact(first['train_tokens'])} training tokens of {used['data']} ({keys}; {read['machine']}); {measured.tokens:,} "
        f"held-out tokens of {used['eval_data']}, original cross-entropy {measured.original['ce']:.4f}; with the block zeroed "
        f"{first['zero_delta_ce']:+.4f}, with its mean output {first['mean_delta_ce']:+.4f}.\n"
    )
    yield from measured.verdicts
    yield ""
    every = sorted({row["k"] for row in measured.rows if row["kind"] == "mxd"})
    yield table(cells("K", *every), ratios(measured, every))
    yield ""
    yield table(cells(*HEADINGS), rows_of(measured))
    yield ""


def probed(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Its table's rows."""
    names = ("mean_f1", "mean_floor_f1", "mean_balanced_accuracy", "mean_floor_balanced_accuracy", "mean_best_f1")
    for result in found.values():
        for subject in result["subjects"]:
            figures = (f"{subject[name]:.3f}" for name in names)
            yield cells(f"{result['data']} ({result['texts']:,} texts)", subject["name"], f"{subject['units']:,}", *figures)


def probing_section(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """F1 of the best single unit, per data set, per kind."""
    names = "data | what | units | mean F1 | floor | mean balanced accuracy | floor | mean F1 as the paper picks it"
    yield table(names, probed(found))
    yield ""
    yield "The best expert of `mxd` for each class (F1; balanced accuracy):\n"
    for result in found.values():
        best = result["subjects"][0]["classes"]
        words = (f"{c['class']}: {c['unit']} ({c['f1']:.2f}; {c['balanced_accuracy']:.2f})" for c in best)
        yield f"- {result['data']}: " + ", ".join(words)
    yield ""


def dissected(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Its table's rows."""
    for result in found.values():
        for subject in result["subjects"]:
            near, use = subject["similarity"], subject["specialisation"]
            yield (
                f"{result['data']} | {subject['name']} | {subject['rank']['effective']['50%']:.0f} "
                f"| {near['experts']['50%']:.2f} | {near['chance']['50%']:.2f} | {unused(subject['usage'])} "
                f"| {subject['usage']['effective_experts']:,.0f} | {use['information']:.3f} | {use['chance_information']:.3f}"
            )
        hidden = result["hidden_units"]
        information = f"{hidden['information']:.3f} | {hidden['chance_information']:.3f}"
        yield f"{result['data']} | hidden units | - | - | - | - | - | {information}"


def dissection_section(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Rank, similarity, usage and class information."""
    names = "data | what | effective rank | nearest cosine | chance | unused | effective experts | class information | chance"
    yield table(names, dissected(found))
    rank = next(iter(found.values()))["decoder_effective_rank"]
    yield f"\nThe original decoder's effective rank is {rank:.0f}; a transcoder's or autoencoder's feature has rank 1.\n"


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@shared_option
@runs_option("frontiers")
@only_option
def measure(shared: Path, runs: Path, only: str | None) -> None:
    """Measure, some minutes for a small model; gone on with where it stood."""
    chosen = [subject for subject in SUBJECTS if only is None or only in subject.model]
    for subject in chosen:
        measure_frontier(subject, shared, runs, KINDS, subject.k)
        measure_rivals(subject, shared, runs)
        if subject is SUBJECTS[0]:
            look(measure_frontier(subject, shared, runs, ("topk-sae",), AUTOENCODER_K), shared)


@main.command()
def page() -> None:
    """Print docs/frontier.md."""
    click.echo((KEPT / "introduction.md").read_text())
    there = {path.stem: read_json(path) for subject in SUBJECTS if (path := KEPT / f"{subject.model}.json").is_file()}
    for model, read in there.items():
        click.echo("\n".join(frontier_section(model, read)))
    for line in rivals_section(there):
        click.echo(line)
    name = SUBJECTS[0].model
    for heading, pattern, section in (
        ("Probing", f"{name}-probe-*.json", probing_section),
        ("Rank and specialisation", f"{name}-dissect-*.json", dissection_section),
    ):
        click.echo(f"## {heading}: {name}, layer {SUBJECTS[0].layer}, K = {LOOKED_AT}\n")
        click.echo((KEPT / f"{heading.split()[0].lower()}.md").read_text())
        click.echo("\n".join(section(kept(pattern))))
    click.echo(textwrap.fill(legend(HEADINGS, more=""), 127))


if __name__ == "__main__":
    main()
