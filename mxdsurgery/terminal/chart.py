"""The figures: what is lost at each K, for each kind of layer, and how a training went."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from mxdsurgery.terminal.console import compact
from mxdsurgery.terminal.figures import SHARES, SHORT_SHARES, interval

# Colours that are told apart in greyscale and by the colour-blind (Okabe and Ito), and marks beside them.
_STYLES = {
    "mxd": ("#0072B2", "o"),
    "transcoder": ("#D55E00", "s"),
    "skip-transcoder": ("#009E73", "^"),
    "topk-sae": ("#CC79A7", "D"),
    "molt": ("#E69F00", "v"),
    "dense": ("#555555", "."),
}


def frontier_chart(rows: list[dict[str, Any]], model: str, original_ce: float, tokens: int) -> Figure:
    """Against K, with 95 % intervals: ΔCE, with the original model as the dashed line; below it what the experts can claim.

    One column of panels per layer. The experts' share is drawn as far as its controls let it stand, where they were measured.

    Args:
        rows: of a frontier.
        model: its name, for the title.
        original_ce: nats per token.
        tokens: held-out tokens that the figures rest on.
    """
    layers = sorted({row["layer"] for row in rows})
    shares = [share for share in SHORT_SHARES if any(row.get(share) is not None for row in rows)]
    heights = [4.6, *(2.2 for _ in shares)]
    figure = Figure(figsize=(1.2 + 4.8 * len(layers), sum(heights)), layout="constrained")
    figure.suptitle(f"{model}: one MLP block replaced, {tokens:,} held-out tokens", fontsize=11)
    panels = figure.subplots(len(heights), len(layers), squeeze=False, sharex="col", height_ratios=heights)
    for column, layer in zip(panels.T, layers, strict=True):
        mine = [row for row in rows if row["layer"] == layer]
        ticks = sorted({row["k"] for row in mine if row["k"] is not None})
        column[0].axhline(0.0, color="black", linestyle="--", linewidth=1, label=f"original model (CE {original_ce:.3f})")
        column[0].set_title(f"layer {layer}", fontsize=10)
        names = {"delta_ce": "ΔCE, nats per token"} | {share: f"expert share,\n{SHARES[share]}" for share in shares}
        for axes, (name, label) in zip(column, names.items(), strict=True):
            for kind, (colour, mark) in _STYLES.items():
                _curve(axes, name, [row for row in mine if row["kind"] == kind], kind, colour, mark)
            if ticks:
                axes.set_xscale("log", base=2)
                axes.set_xticks(ticks, [str(k) for k in ticks])
                axes.minorticks_off()
            axes.set_ylabel(label)
            axes.grid(alpha=0.25)
        for axes in column[1:]:
            axes.axhline(0.0, color="black", linestyle="--", linewidth=1)
        column[-1].set_xlabel("K, active experts or features per token")
        drawn, below = column[0].get_legend_handles_labels(), -0.4 if shares else -0.16
        column[-1].legend(*drawn, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, below), frameon=False)
    return figure


def _curve(axes: Any, name: str, rows: list[dict[str, Any]], kind: str, colour: str, mark: str) -> None:
    """One kind's values of a figure with their intervals, where it has any; a band over all K for a kind that has none."""
    rows = [row for row in rows if row.get(name) is not None]
    if not rows:
        return
    label = f"{kind} ({compact(rows[0]['params'])} parameters)"
    values = [row[name] for row in rows]
    if rows[0]["k"] is None:
        axes.axhline(values[0], color=colour, linewidth=1, label=label)
        if ends := interval(rows[0], name):
            axes.axhspan(*ends, color=colour, alpha=0.15, linewidth=0)
        return
    ends = [interval(row, name) or (value, value) for value, row in zip(values, rows, strict=True)]
    reach = [[max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)]]
    reach += [[max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)]]
    axes.errorbar([row["k"] for row in rows], values, yerr=reach, color=colour, marker=mark, capsize=3, label=label)


# Of a training: each figure's name, its axis label, and whether the axis is logarithmic.
_PANELS = {
    "loss": ("loss", True),
    "nmse": ("NMSE", True),
    "dead_share": ("dead experts", False),
    "kl": ("KL, nats per token", True),
}
_KL_STYLES = {"kl": ("#0072B2", "-", "training text"), "validation_kl": ("#D55E00", "--", "validation text")}
# For more layers than this, a colour bar beside the figure replaces the legend below it.
_MOST_LISTED = 12


def training_chart(
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    beginnings: Mapping[str, float],
    title: str,
    marked: str | None = None,
) -> Figure:
    """What was measured while training, against its tokens: a panel for each figure, a line for each layer.

    Args:
        curves: by figure (`loss`, `nmse`, `dead_share`, `kl`) and layer, points (tokens, value); NaN interrupts a line.
        beginnings: where each stage or group of layers begins, in tokens.
        title: of the whole.
        marked: a layer whose line is drawn thicker.
    """
    panels = [name for name in _PANELS if name in curves]
    columns = min(len(panels), 2 if len(panels) == 4 else 3)
    size = (1.6 + 4.6 * columns, 1.4 + 3.4 * (-(-len(panels) // columns)))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    names = list(dict.fromkeys(layer for panel in panels if panel != "kl" for layer in curves[panel]))
    colours = _colours(names)
    axes = list(figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flat)
    for ax, panel in zip(axes, panels, strict=False):
        for name, points in curves[panel].items():
            colour, line, label = _KL_STYLES[name] if panel == "kl" else (colours[name], "-", None)
            mark = "." if len(points) <= 3 else None  # two looks and the gap after them: too few to be seen as a line
            width = 3.0 if name == marked else 1.2
            ax.plot(*zip(*points, strict=True), color=colour, linestyle=line, label=label, linewidth=width, marker=mark)
        _dress(ax, panel, beginnings)
    for ax in axes[len(panels) :]:
        ax.remove()
    _explain(figure, axes[: len(panels)], names, colours)
    return figure


def _dress(axes: Any, panel: str, beginnings: Mapping[str, float]) -> None:
    """Scales, names and the borders of groups; on a logarithmic scale only what is above 0 can be seen."""
    name, logarithmic = _PANELS[panel]
    axes.set_ylabel(name)
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    axes.grid(alpha=0.25)
    if logarithmic and any((line.get_ydata() > 0).any() for line in axes.lines):
        axes.set_yscale("log")
    if panel == "dead_share":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(bottom=0)
    if panel == "kl":
        axes.legend(fontsize=8, frameon=False)
    for label, start in beginnings.items() if len(beginnings) > 1 else ():
        axes.axvline(start, color="black", linewidth=0.6, linestyle=":")
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top"}
        axes.annotate(
            label, (start, 1.0), (3, -3), fontsize=7, rotation=90 if len(beginnings) > 3 else 0, parse_math=False, **place
        )


def _colours(names: Sequence[str]) -> dict[str, Any]:
    """By layer: from dark to light in their order; where kinds are compared, each kind's own, lighter for fewer experts."""
    kinds = {name: next((part for part in name.split()[1:] if part in _STYLES), None) for name in names}
    if not names or None in kinds.values():
        return {name: colormaps["viridis"](0.92 * i / max(1, len(names) - 1)) for i, name in enumerate(names)}
    colours = {}
    for kind in dict.fromkeys(kinds.values()):
        alike = [name for name in names if kinds[name] == kind]
        for i, name in enumerate(alike):
            weight = 1.0 if len(alike) == 1 else 0.35 + 0.65 * i / (len(alike) - 1)
            colours[name] = tuple(1.0 - weight * (1.0 - part) for part in to_rgb(_STYLES[kind][0]))
    return colours


def _explain(figure: Figure, axes: Sequence[Any], names: Sequence[str], colours: Mapping[str, Any]) -> None:
    """Which colour is which layer: a legend below, or, for many layers with numbers, a colour bar."""
    if len(names) > _MOST_LISTED and all(name.isdecimal() for name in names):
        numbers = [int(name) for name in names]
        scale = Normalize(min(numbers), max(numbers))
        ordered = ListedColormap([colours[name] for name in sorted(names, key=int)])
        bar = figure.colorbar(ScalarMappable(scale, ordered), ax=list(axes), label="layer", fraction=0.03, pad=0.01)
        bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        return
    lines = [Line2D([], [], color=colours[name]) for name in names]
    labels = [f"layer {name}".replace("$", r"\$") for name in names]  # a $ would begin a formula
    if names:
        figure.legend(lines, labels, loc="outside lower center", ncols=min(6, len(names)), fontsize=8, frameon=False)
