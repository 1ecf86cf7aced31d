"""The figure of a frontier: what is lost at each K, for each kind of layer."""

from typing import Any

from matplotlib.figure import Figure

from mxdsurgery.console import compact

# Colours that are told apart in greyscale and by the colour-blind (Okabe and Ito), and marks beside them.
_STYLES = {
    "mxd": ("#0072B2", "o"),
    "transcoder": ("#D55E00", "s"),
    "skip-transcoder": ("#009E73", "^"),
    "topk-sae": ("#CC79A7", "D"),
    "dense": ("#555555", "."),
}


def frontier_chart(rows: list[dict[str, Any]], model: str, original_ce: float, tokens: int) -> Figure:
    """ΔCE against K with 95 % intervals, one panel per layer; the original model is the dashed line.

    Args:
        rows: of a frontier.
        model: its name, for the title.
        original_ce: nats per token.
        tokens: held-out tokens that the figures rest on.
    """
    layers = sorted({row["layer"] for row in rows})
    figure = Figure(figsize=(1.2 + 4.8 * len(layers), 4.6), layout="constrained")
    figure.suptitle(f"{model}: one MLP block replaced, {tokens:,} held-out tokens", fontsize=11)
    for axes, layer in zip(figure.subplots(1, len(layers), squeeze=False)[0], layers, strict=True):
        mine = [row for row in rows if row["layer"] == layer]
        ticks = sorted({row["k"] for row in mine if row["k"] is not None})
        axes.axhline(0.0, color="black", linestyle="--", linewidth=1, label=f"original model (CE {original_ce:.3f})")
        for kind, (colour, mark) in _STYLES.items():
            _curve(axes, [row for row in mine if row["kind"] == kind], kind, colour, mark)
        if ticks:
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [str(k) for k in ticks])
            axes.minorticks_off()
        axes.set_title(f"layer {layer}", fontsize=10)
        axes.set_xlabel("K, active experts or features per token")
        axes.set_ylabel("ΔCE, nats per token")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    return figure


def _curve(axes: Any, rows: list[dict[str, Any]], kind: str, colour: str, mark: str) -> None:
    """One kind's losses with their intervals; a band over all K for a kind that has none."""
    if not rows:
        return
    label = f"{kind} ({compact(rows[0]['params'])} parameters)"
    values = [row["delta_ce"] for row in rows]
    if rows[0]["k"] is None:
        axes.axhline(values[0], color=colour, linewidth=1, label=label)
        axes.axhspan(*rows[0]["delta_ce_ci"], color=colour, alpha=0.15, linewidth=0)
        return
    reach = [[max(0.0, value - row["delta_ce_ci"][0]) for value, row in zip(values, rows, strict=True)]]
    reach += [[max(0.0, row["delta_ce_ci"][1] - value) for value, row in zip(values, rows, strict=True)]]
    axes.errorbar([row["k"] for row in rows], values, yerr=reach, color=colour, marker=mark, capsize=3, label=label)
