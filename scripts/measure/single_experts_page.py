"""The tables and the figure of docs/single-experts.md, from what single_experts.py kept."""

from collections.abc import Iterator
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pages import carried, cells, table

from mxdsurgery.measuring.intervals import with_interval
from mxdsurgery.terminal.console import compact
from mxdsurgery.terminal.figures import interval, value_of, with_range

Row = dict[str, Any]
# Colours of the kinds beside mxd, and what a figure calls its control.
OTHERS = {"transcoder": "#009E73", "molt": "#D55E00"}
MXD = "#0072B2"
# Of fewer experts nothing is said.
_FEWEST = 8


def mean(name: str, values: list[float]) -> Row:
    """A mean over experts with its interval."""
    return with_interval(name, torch.tensor(values).double(), torch.ones(len(values)).double())


def ablated(rows: list[Row]) -> Row:
    """Figures of ablation, over experts: means, and as a share of what removing the layer does at the same places."""
    kl = {who: [row["ablated"][who]["kl"] for row in rows] for who in ("itself", "other", "layer")}
    found: Row = {"places": sum(row["ablated"]["fired"] for row in rows)} | mean("kl", kl["itself"])
    for who in ("itself", "other"):
        found |= with_interval(f"{who}_part", torch.tensor(kl[who]).double(), torch.tensor(kl["layer"]).double())
        found |= mean(f"{who}_own", [-row["ablated"][who]["own"] for row in rows])
    return found


def steered(rows: list[Row], kl: float) -> Row:
    """Figures of steering at one KL, over the experts that reach it: the strength; own tokens, beside steering by others."""
    some = [entry for row in rows for entry in row["steered"] if entry["kl"] == kl and "own" in entry]
    if not some:
        return {"reached": 0}
    found: Row = {"reached": len(some), "strength": torch.tensor([entry["strength"] for entry in some]).median().item()}
    for name in ("own", "others", "above"):
        found |= mean(name, [entry[name] for entry in some])
    found |= mean("gain", [entry["own"] - entry["others"] for entry in some])
    return found | mean("mass", [entry["own_mass"] - entry["others_mass"] for entry in some])


def by_random(row: Row) -> Row:
    """The same of random experts: mean ΔCE of the labelled predictions, and KL elsewhere for each nat of KL there."""
    if not row["random"]:
        return {}
    total = {name: sum(draw[name] for draw in row["random"]) for name in ("damage", "kl", "rest_kl")}
    return {"random_damage": total["damage"] / len(row["random"]), "random_kl": total["rest_kl"] / total["kl"]}


def layers_table(rows: list[Row]) -> str:
    """What was converted, at what cost."""
    names = "layer | experts | training tokens | ΔCE | KL | expert share | beyond a few | earned"
    return table(
        names,
        (
            cells(
                row["variant"],
                f"{row['n_experts']:,}",
                compact(row["train_tokens"]),
                with_range(row, "delta_ce", "+.4f"),
                f"{row['kl']:.4f}",
                *(with_range(row, share, ".2f") for share in ("expert_share", "few_experts_share", "earned_share")),
            )
            for row in rows
        ),
    )


def ablated_table(groups: list[tuple[str, str, list[Row]]]) -> str:
    """By layer and band: what ablating one expert does where it fires."""
    names = "layer | experts fire on | experts | places | KL | of the layer's | another's | own tokens | by another"
    return table(names, (cells(*of) for of in _ablated_cells(groups)))


def _ablated_cells(groups: list[tuple[str, str, list[Row]]]) -> Iterator[tuple[object, ...]]:
    for variant, band, rows in groups:
        if len(rows) < _FEWEST:
            yield (variant, band, len(rows), *["-"] * 6)
            continue
        found = ablated(rows)
        yield (
            variant,
            band,
            len(rows),
            f"{found['places']:,}",
            with_range(found, "kl", ".2g"),
            with_range(found, "itself_part", ".2%"),
            value_of(found, "other_part", ".2%"),
            with_range(found, "itself_own", "+.3f"),
            value_of(found, "other_own", "+.3f"),
        )


def steered_table(groups: list[tuple[str, str, list[Row]]], every: list[float]) -> str:
    """By layer, band and KL: what steering by one expert does to its own tokens."""
    names = "layer | experts fire on | KL | experts | strength | own tokens | by others | difference | probability | above"
    rows = []
    for variant, band, some in groups:
        for kl in every:
            found = steered(some, kl)
            if found["reached"] < _FEWEST:
                rows.append(cells(variant, band, kl, f"{found['reached']} of {len(some)}", *["-"] * 6))
                continue
            rows.append(
                cells(
                    variant,
                    band,
                    kl,
                    f"{found['reached']} of {len(some)}",
                    f"{found['strength']:.1f}",
                    f"{found['own']:+.2f}",
                    f"{found['others']:+.2f}",
                    with_range(found, "gain", "+.2f"),
                    with_range(found, "mass", "+.1%"),
                    with_range(found, "above", ".0%"),
                )
            )
    return table(names, rows)


def erased_table(rows: list[Row]) -> str:
    """By capability, layer and budget: how many experts it takes, and what that costs elsewhere."""
    names = "erased | layer | budget | experts | ΔCE | elsewhere | for each nat | KL, likewise | random experts | KL, likewise"
    return table(
        names,
        (
            cells(
                row["label"],
                row["variant"],
                f"{row['budget']:.0%}",
                f"{row['experts']:,}" + ("" if row["reached"] else " (all)"),
                f"{row['damage']:+.4f}",
                f"{row['rest']:+.4f}",
                with_range(row, "collateral_ce", ".2f"),
                with_range(row, "collateral_kl", ".2f"),
                value_of(by_random(row), "random_damage", "+.4f"),
                value_of(by_random(row), "random_kl", ".2f"),
            )
            for row in sorted(rows, key=lambda row: row["label"])
        ),
    )


def figure(layers: list[Row], experts: list[Row], erased: list[Row]) -> Figure:
    """Does share buy control? By model a row: ablating, steering, and what erasing costs and how many experts it takes."""
    models = list(dict.fromkeys(row["model"] for row in layers))
    drawn = Figure(figsize=(15, 5 * len(models)), layout="constrained")
    grid = drawn.subplots(len(models), 4, squeeze=False)
    band = max(row["band"] for row in experts)  # in which every kind has experts
    budget = min(row["budget"] for row in erased)
    for line, model in zip(grid, models, strict=True):
        at = {row["variant"]: carried(row) for row in layers if row["model"] == model}
        chosen = [row for row in experts if row["model"] == model and row["band"] == band]
        of = {variant: [row for row in chosen if row["variant"] == variant] for variant in at}
        kl = min(entry["kl"] for row in chosen for entry in row["steered"])
        cut = {variant: ablated(rows) for variant, rows in of.items()}
        _panel(line[0], at, cut, "itself_part", "other_part", "another that fires there")
        line[0].set(title="Ablating one, where it fires", ylabel="KL, as a share of removing the layer there", yscale="log")
        push = {variant: steered(rows, kl) for variant, rows in of.items()}
        _panel(line[1], at, push, "own", "others", "steering by others, as hard")
        line[1].set(title=f"Steering by one, at KL {kl:g}", ylabel="its own tokens' log-probability rises by, nats")
        mine = [row | by_random(row) for row in erased if row["model"] == model and row["budget"] == budget]
        for label, mark in zip(dict.fromkeys(row["label"] for row in mine), ("o", "s"), strict=True):
            found = {row["variant"]: row for row in mine if row["label"] == label}
            control = "random_kl" if mark == "o" else None  # where it takes but a few experts, random ones do next to nothing
            _panel(line[2], at, found, "collateral_kl", control, "random experts", f", {label}", mark)
            _panel(line[3], at, found, "experts", None, "", f", {label}", mark)
        line[2].set(
            title=f"Erasing, {budget:.0%} of the layer's worth", ylabel="KL elsewhere, for each nat of KL there", yscale="log"
        )
        line[3].set(title=f"Erasing, {budget:.0%} of the layer's worth", ylabel="experts that it takes", yscale="log")
        for axes in line:
            axes.set_xlabel(f"share that the experts carry ({model})")
            axes.grid(alpha=0.25)
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    return drawn


def _panel(
    axes: Axes,
    at: dict[str, float],
    found: dict[str, Row],
    name: str,
    control: str | None,
    what: str,
    of: str = "",
    mark: str = "o",
) -> None:
    """mxd by its share as a line, the other kinds as bands; the control dashed; ``of`` what, with which mark."""
    line = "-" if mark == "o" else ":"
    mine = [variant for variant in sorted(at, key=at.get) if variant not in OTHERS and found[variant].get(name) is not None]
    x, y = [at[variant] for variant in mine], [found[variant][name] for variant in mine]
    ends = [interval(found[variant], name) or (value, value) for variant, value in zip(mine, y, strict=True)]
    reach = [[abs(value - end[side]) for value, end in zip(y, ends, strict=True)] for side in (0, 1)]
    axes.errorbar(x, y, yerr=reach, fmt=mark + line, color=MXD, capsize=3, label=f"mxd{of}")
    if control is not None:
        known = [variant for variant in mine if found[variant].get(control) is not None]
        points = [at[variant] for variant in known], [found[variant][control] for variant in known]
        axes.plot(*points, "--", marker=mark, markersize=3, color=MXD, alpha=0.6, label=f"mxd, {what}{of}")
    for kind, colour in OTHERS.items():
        if kind not in found or found[kind].get(name) is None:
            continue
        low, high = interval(found[kind], name) or (found[kind][name],) * 2
        axes.axhspan(low, high, color=colour, alpha=0.15)
        axes.axhline(found[kind][name], color=colour, linestyle=line, label=f"{kind}{of}")
        if control is not None and found[kind].get(control) is not None:
            axes.axhline(found[kind][control], color=colour, linestyle="--", linewidth=0.9, alpha=0.6)
