"""Measures `expert_share` and its controls on trained layers and on built ones, and prints docs/controls.md.

    python scripts/measure/controls.py measure --shared ../shared --runs runs/controls   # two hours on two cores
    python scripts/measure/controls.py page > docs/controls.md

What is measured is kept in docs/controls/. Layers that are in --runs already are not trained again: delete them to begin anew.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from constructed_layers import BUILDERS
from material import BOOKS, FIXED, STEPS, STORIES, runs_option, shared_option
from matplotlib.figure import Figure
from pages import DOCS, carried, cells, machine, read_json, read_lines, table, write_lines

import mxdsurgery
from mxdsurgery.base.activations import record_activations
from mxdsurgery.base.finding import find_blocks
from mxdsurgery.base.model import load_tokenizer, open_model
from mxdsurgery.checkpoint.writing import write_json
from mxdsurgery.measuring.fidelity import measure as measured
from mxdsurgery.recipe import Recipe
from mxdsurgery.terminal.console import ConsoleReporter, compact
from mxdsurgery.terminal.figures import with_range
from mxdsurgery.text.sources import open_texts

KEPT = DOCS / "controls"
RESULTS, SETTINGS = KEPT / "rows.jsonl", KEPT / "settings.json"
K, TOKENS, LONG, EVAL_TOKENS = 16, 500_000, 2_000_000, 12_288
# The former steps of the other kinds: they train at four times the rate that is given, and did at 4e-3.
RIVALS = {"batch": 2048, "lr": 1e-3}
# Model, its texts, a middle layer.
SUBJECTS = (
    ("books-llama-6m", BOOKS, 3),
    ("tinystories-chat-gpt2-3M", STORIES, 4),
    ("stories260K", STORIES, 2),
)
ALL = tuple(model for model, _, _ in SUBJECTS)
# Where the front is measured, and where layers are trained in the former steps, too.
FRONT, FORMER = ("stories260K",), ("tinystories-chat-gpt2-3M", "stories260K")


@dataclass(frozen=True)
class Variant:
    """What is trained.

    Attributes:
        name: on the page, after the kind.
        kinds: of layers.
        changes: what differs from the default.
        models: where.
        rate: times the rate that the model's recipe gives.
    """

    name: str
    kinds: tuple[str, ...]
    changes: dict[str, Any]
    models: tuple[str, ...] = ALL
    rate: float = 1.0


VARIANTS = (
    Variant("", ("mxd", "dense"), FIXED, FORMER),
    Variant("", ("transcoder", "skip-transcoder", "topk-sae"), RIVALS, FORMER),
    Variant(", init shared, specialise 0", ("mxd",), STEPS | {"init": "shared", "specialise": 0.0}, FORMER),
    Variant(", init random, specialise 0", ("mxd",), STEPS | {"init": "random", "specialise": 0.0}, FORMER),
    *(Variant(f", specialise {weight:g}", ("mxd",), STEPS | {"specialise": weight}, FRONT) for weight in (0.01, 0.03, 0.1)),
    Variant(", defaults", ("mxd", "transcoder"), {}),
    *(Variant(f", defaults, expert_share {share:g}", ("mxd",), {"expert_share": share}, FRONT) for share in (0.25, 0.75, 0.9)),
    *(
        Variant(
            f", defaults, init encoder, expert_share {share:g}", ("mxd",), {"init": "encoder", "expert_share": share}, FRONT
        )
        for share in (0.25, 0.5, 0.75)
    ),
    # The transcoder also at other rates, and in the steps of the first rows, lest it be held back by ours.
    Variant(", defaults, 2M tokens", ("mxd", "transcoder"), {"tokens": LONG}),
    Variant(", half the rate, 2M tokens", ("transcoder",), {"tokens": LONG}, FORMER, rate=0.5),
    Variant(", twice the rate, 2M tokens", ("transcoder",), {"tokens": LONG}, rate=2.0),
    Variant(", 2M tokens", ("transcoder",), RIVALS | {"tokens": LONG}, FORMER),
    Variant(", defaults, 8M tokens", ("mxd",), {"tokens": 4 * LONG}, FRONT),
    *(
        Variant(f", defaults but --batch {batch}, 2M tokens", ("mxd",), {"tokens": LONG, "batch": batch}, FRONT)
        for batch in (1024, 4096)
    ),
)
# Built layers stand where a block is worth the most.
BUILT_ON, BUILT_LAYER, BUILT_CONTEXTS = "demo-glu", 0, 96
SHARES = ("expert_share", "permuted_share", "shuffled_share", "random_gate_share", "few_experts_share", "earned_share")


def trained(shared: Path, runs: Path, only: str | None) -> None:
    """Rows of all models."""
    for model, (data, eval_data), layer in SUBJECTS:
        if only is not None and only not in model:
            continue
        path = str(shared / "models" / model)
        rate = mxdsurgery.plan(path, measure=False)[1].lr
        for variant in VARIANTS:
            if model not in variant.models:
                continue
            keys = {"tokens": TOKENS, "lr": variant.rate * rate} | variant.changes
            out = runs / re.sub("[^a-z0-9.]+", "-", f"{model}{variant.name} {' '.join(variant.kinds)}".lower())
            made = mxdsurgery.frontier(
                path,
                layer=layer,
                k=(K,),
                kinds=variant.kinds,
                data=str(shared / "text" / data),
                eval_data=str(shared / "text" / eval_data),
                eval_tokens=EVAL_TOKENS,
                dtype="float32",
                device="cpu",
                out=str(out),
                reporter=ConsoleReporter(),
                **keys,
            )
            keep({"model": model, "name": row["kind"] + variant.name, **row} for row in made.rows)


def built() -> None:
    """Rows of the layers that are built."""
    model = open_model(BUILT_ON).load(dtype="float32", compute="float32")
    recipe = Recipe(model=BUILT_ON, data="stdlib:train", eval_data="stdlib:heldout", eval_tokens=BUILT_CONTEXTS * 128)
    ids = open_texts(recipe, load_tokenizer(BUILT_ON))[1]
    block = find_blocks(model)[BUILT_LAYER].block
    x = record_activations(model, [block], ids[:64])[BUILT_LAYER].x[:, 1:].flatten(0, 1)
    with torch.no_grad():
        for name, build in BUILDERS.items():
            figures = measured(model, [block], {BUILT_LAYER: build(model, block, x)}, ids, recipe.batch)
            keep([{"model": BUILT_ON, "name": name, "built": True, "train_tokens": None, **figures["layers"][0]}])


def keep(rows) -> None:
    """Adds rows to those that are kept, in place of earlier ones of the same model and name."""
    known = {(row["model"], row["name"]): row for row in read_lines(RESULTS)}
    for row in rows:
        known[row["model"], row["name"]] = row
        click.echo(f"{row['model']:26} {row['name']:24} " + "  ".join(with_range(row, name, ".2f") for name in SHARES))
    write_lines(RESULTS, known.values())
    write_json(SETTINGS, {"machine": machine()})


def figure(rows: list[dict[str, Any]]) -> Figure:
    """What a share costs: ΔCE of one layer by the least of `expert_share` and `few_experts_share`, before and now."""
    drawn = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = drawn.add_subplot()
    of = [row for row in rows if row["model"] == FRONT[0] and not row.get("built") and "tokens" not in row["name"]]
    mine = [row for row in of if row["kind"] in ("mxd", "transcoder", "skip-transcoder", "topk-sae")]
    for name, mark, belongs in (
        ("before: init encoder, a fixed weight (specialise)", "^-", lambda name: re.fullmatch("mxd(, specialise .*)?", name)),
        ("init encoder, a share asked for", "s-", lambda name: "encoder, expert_share" in name),
        ("now: init shared, a share asked for", "o-", lambda name: re.fullmatch("mxd, defaults(, expert_share .*)?", name)),
        ("other kinds, in the steps of before and of now", "x", lambda name: not name.startswith("mxd")),
    ):
        points = sorted((carried(row), row["delta_ce"]) for row in mine if belongs(row["name"]))
        if points:
            axes.plot(*zip(*points, strict=True), mark, label=name)
    for row in mine:
        if row["kind"] != "mxd":
            axes.annotate(row["name"], (carried(row), row["delta_ce"]), fontsize=7)
    axes.set_xlabel("carried by the experts: the least of expert_share and few_experts_share")
    axes.set_ylabel("ΔCE, nats per token")
    axes.set_title(f"{FRONT[0]}, layer {mine[0]['layer']}, K = {K}, {compact(TOKENS)} tokens", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0.08, 0.93))
    return drawn


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@shared_option
@runs_option("controls")
@click.option("--only", help="Only models whose name contains this; 'built': only the layers that are built.")
def measure(shared: Path, runs: Path, only: str | None) -> None:
    """Train and measure."""
    if only in (None, "built"):
        built()
    if only != "built":
        trained(shared, runs, only)


@main.command()
def page() -> None:
    """Print docs/controls.md."""
    rows = read_lines(RESULTS)
    figure(rows).savefig(KEPT / "front.png", dpi=150)
    heading = "layer | ΔCE | KL | ΔCE if zeroed | NMSE | expert share | permuted | shuffled | random gate | a few | earned"
    order = [model for model, _, _ in SUBJECTS]
    click.echo((KEPT / "introduction.md").read_text(encoding="utf-8").replace("MACHINE", read_json(SETTINGS)["machine"]))
    for title, some in (
        (f"Built layers, in place of layer {BUILT_LAYER} of {BUILT_ON}", [row for row in rows if row.get("built")]),
        *((model, [row for row in rows if row["model"] == model and not row.get("built")]) for model in order),
    ):
        if not some:
            continue
        first = some[0]
        how = (
            "" if first.get("built") else f"Layer {first['layer']}, K = {K}, {compact(TOKENS)} training tokens unless stated; "
        )
        click.echo(f"\n## {title}\n\n{how}{first['tokens']:,} held-out tokens.\n")
        click.echo(
            table(
                heading,
                (
                    cells(
                        row["name"],
                        with_range(row, "delta_ce", "+.4f"),
                        f"{row['kl']:.4f}",
                        f"{row['zero_delta_ce']:+.4f}",
                        f"{row['nmse']:.3f}",
                        *(with_range(row, name, ".2f") for name in SHARES),
                    )
                    for row in some
                ),
            )
        )


if __name__ == "__main__":
    main()
