"""The table that ``frontier`` makes: its rows, its files and its verdict in a sentence."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mxdsurgery.base.dtypes import rounded
from mxdsurgery.checkpoint.converted import RECIPE_FILE
from mxdsurgery.checkpoint.writing import write_json
from mxdsurgery.errors import OutputError, first_line
from mxdsurgery.layers.replacement import LAYER_KINDS
from mxdsurgery.recipe import Recipe
from mxdsurgery.runs.journal import METRICS_FILE
from mxdsurgery.terminal.console import compact
from mxdsurgery.terminal.figures import SHARES, SHORT_SHARES, interval, legend, times, value_of, with_range
from mxdsurgery.training.cost import LayerPlan
from mxdsurgery.training.initialize import layer_shape

FRONTIER_FILE = "frontier.json"
_LAYERS_FOLDER = "layers"
_WRITTEN = ("frontier.csv", "frontier.png", "frontier.svg")

# frontier.csv: what a row is, its figures, and after them the ends of the figures' intervals.
_COLUMNS = ("layer", "kind", "k", "sparsity", "n_experts", "params", "train_tokens")
_FIGURES = (
    "delta_ce", "kl", "nmse", "expert_share", "top1_agreement", "fvu", "constant_gate_delta_ce", "constant_gate_nmse",
    "zero_delta_ce", "mean_delta_ce", "loss_recovered", "jacobian_nmse", *(name for name in SHARES if name != "expert_share"),
)  # fmt: skip
_WITHOUT_INTERVAL = ("l0", "dead_share")


@dataclass(frozen=True)
class Frontier:
    """What ``frontier`` measured.

    Attributes:
        out: the folder.
        rows: one for each layer, kind and K, in that order: ``layer``, ``kind``, ``k`` (None for the dense control),
            ``sparsity``, ``n_experts``, ``params`` (trained), ``train_tokens``, and the figures of `evaluate` with
            their intervals.
        tokens: held-out tokens that the figures rest on.
        original: ``ce`` of the original model there, with its interval.
        settings: recipe keys that all rows share.
    """

    out: Path
    rows: list[dict[str, Any]]
    tokens: int
    original: dict[str, Any]
    settings: dict[str, Any]

    @property
    def verdicts(self) -> list[str]:
        """One sentence per layer: who wins where, and by how much."""
        layers = sorted({row["layer"] for row in self.rows})
        return [f"Layer {layer}: {verdict([row for row in self.rows if row['layer'] == layer])}" for layer in layers]

    def table(self) -> Table:
        """For a terminal."""
        title = f"On {self.tokens:,} held-out tokens; original cross-entropy {self.original['ce']:.4f} nats per token"
        shares = ("expert_share", *SHORT_SHARES)
        table = Table("layer", "kind", title=title, caption_justify="left")
        headings = ("K", "N", "parameters", "ΔCE", "KL", "NMSE", "Jacobian NMSE", *map(SHARES.get, shares), "unused experts")
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=heading in ("ΔCE", "expert share"))
        table.caption = legend(headings)
        for row in self.rows:
            cells = [str(row["k"] or "-"), str(row["n_experts"] or "-"), compact(row["params"])]
            cells += [with_range(row, "delta_ce", "+.4f"), f"{row['kl']:.4f}", value_of(row, "nmse", ".4f")]
            cells += [value_of(row, "jacobian_nmse", ".3f")]
            cells += [with_range(row, share, ".2f") for share in shares]
            cells += ["-" if row["dead_share"] is None else f"{row['dead_share']:.1%}"]
            table.add_row(str(row["layer"]), row["kind"], *cells)
        return table

    @property
    def recipe(self) -> Recipe:
        """What all rows were made with; k is the smallest of theirs."""
        return Recipe(**self.settings | {"k": min((row["k"] for row in self.rows if row["k"] is not None), default=1)})

    def write(self) -> None:
        """Writes frontier.json, frontier.csv, recipe.yaml and the figure, frontier.png and frontier.svg."""
        kept = {"rows": self.rows, "tokens": self.tokens, "original": self.original, "settings": self.settings}
        write_json(self.out / FRONTIER_FILE, kept | {"verdicts": self.verdicts})
        ends = {f"{name}_{end}": (name, at) for name in _FIGURES for at, end in enumerate(("low", "high"))}
        with (self.out / "frontier.csv").open("w", newline="", encoding="utf-8") as file:
            columns = (*_COLUMNS, *_FIGURES, *_WITHOUT_INTERVAL, *ends)
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            for row in self.rows:
                found = {name: interval(row, name) or (None, None) for name in _FIGURES}
                writer.writerow(row | {column: found[name][at] for column, (name, at) in ends.items()})
        from mxdsurgery.terminal.chart import frontier_chart  # imports matplotlib, which reading a frontier does not need

        figure = frontier_chart(self.rows, Path(self.settings["model"]).name, self.original["ce"], self.tokens)
        for suffix in ("png", "svg"):
            figure.savefig(self.out / f"frontier.{suffix}", dpi=150, bbox_inches="tight")
        (self.out / RECIPE_FILE).write_text(self.recipe.to_yaml(), encoding="utf-8")


def remove_frontier(folder: Path) -> None:
    """Removes what `frontier` wrote into a folder; what others put there stays. OSError if it cannot."""
    ours = [folder / name for name in (*_WRITTEN, RECIPE_FILE, METRICS_FILE)]
    for path in (*ours, *(folder / _LAYERS_FOLDER).glob("layer*.safetensors"), folder / FRONTIER_FILE):
        path.unlink(missing_ok=True)
    if (folder / _LAYERS_FOLDER).is_dir() and not any((folder / _LAYERS_FOLDER).iterdir()):
        (folder / _LAYERS_FOLDER).rmdir()


def read_frontier(folder: str | Path) -> Frontier:
    """The table in a folder that ``frontier`` wrote.

    Raises:
        OutputError: it holds none.
    """
    path = Path(folder) / FRONTIER_FILE
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        return Frontier(Path(folder), read["rows"], read["tokens"], read["original"], read["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        raise OutputError(
            f"{str(folder)!r} holds no {FRONTIER_FILE} that can be read",
            expected="a folder that mxdsurgery frontier wrote, or for a new one none",
            fix="give another folder",
        ) from None


def verdict(rows: list[dict[str, Any]]) -> str:
    """Who loses the least at which K, by intervals that do not overlap, and by how much. Kinds without K take no part.

    Args:
        rows: of one layer.
    """
    by_k: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if row["k"] is not None:
            by_k.setdefault(row["k"], []).append(row)
    compared = {k: sorted(some, key=lambda row: row["delta_ce"]) for k, some in sorted(by_k.items()) if len(some) > 1}
    if not compared:
        return "there is nothing to compare yet."
    wins: dict[str, list[int]] = {}
    for k, (best, second, *_) in compared.items():
        who = f"{best['kind']} loses the least" if _apart(second, best) else "none loses the least for certain"
        wins.setdefault(who, []).append(k)
    who = "; ".join(f"{words} at K = {', '.join(map(str, ks))}" for words, ks in wins.items())
    ends = dict.fromkeys((min(compared), max(compared)))
    return f"{who}. " + " ".join(f"At K = {k}: {_ranking(compared[k])}." for k in ends)


def _ranking(ranked: list[dict[str, Any]]) -> str:
    """The kinds at one K, the best first, each with its loss and the ratio of that to the best one's."""
    best, *others = ranked
    words = [f"{best['kind']} {best['delta_ce']:+.4f} nats per token"]
    for row in others:
        words.append(f"{row['kind']} {row['delta_ce']:+.4f} ({_over(row, best)})")
    return ", ".join(words)


def _apart(row: dict[str, Any], best: dict[str, Any]) -> bool:
    """Whether a kind's interval lies above the best one's."""
    mine, least = interval(row, "delta_ce"), interval(best, "delta_ce")
    return mine is not None and least is not None and mine[0] > least[1]


def _over(row: dict[str, Any], best: dict[str, Any]) -> str:
    """How much more a kind loses than the best one; as a ratio only where the best one's loss is certainly one."""
    if not _apart(row, best):
        return "the intervals overlap" if interval(row, "delta_ce") else "no intervals: the text is one context"
    ratio = times(row, best, "delta_ce")
    return "more" if ratio is None else f"{ratio:.1f} times as much"


def row_key(layer: LayerPlan) -> tuple[int, str, int | None]:
    """What identifies a row: layer, kind and K (None without experts)."""
    return layer.block.layer, layer.kind, layer.k if layer.n_experts else None


def layer_file(out: Path, layer: int, kind: str, k: int | None) -> Path:
    """Where the weights of a row's layer are kept."""
    return out / _LAYERS_FOLDER / f"layer{layer}-{kind}{f'-k{k}' if k is not None else ''}.safetensors"


def save_layer(layer: nn.Module, planned: LayerPlan, out: Path, dtype: str) -> None:
    """Saves the weights in ``dtype``, with the layer's kind and shape in the file's header."""
    path = layer_file(out, *row_key(planned))
    path.parent.mkdir(exist_ok=True)
    held = {name: tensor.cpu().contiguous() for name, tensor in layer.state_dict().items()}
    save_file(
        rounded(layer, held, getattr(torch, dtype)),
        path,
        metadata={"kind": planned.kind, "shape": json.dumps(layer_shape(planned))},
    )


def load_layer(path: Path) -> nn.Module:
    """Loads a layer that `save_layer` saved, in evaluation mode, its parameters frozen.

    Raises:
        OutputError: it is not there or cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata()
        state = load_file(path)
        with torch.device("meta"):
            layer = LAYER_KINDS[header["kind"]](**json.loads(header["shape"]))
        layer.load_state_dict(state, assign=True)
    except Exception as error:  # safetensors, json and torch raise half a dozen kinds here
        raise OutputError(
            f"the layer {path} cannot be read: {first_line(error)}", fix="run mxdsurgery frontier again"
        ) from None
    return layer.eval().requires_grad_(False)
