"""``plot``: draws how a training went, from the metrics.jsonl that it left, and names the layer that went wrong first."""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from mxdsurgery.aside import file_aside
from mxdsurgery.errors import MetricsError, OutputError, first_line
from mxdsurgery.hardware.guard import guarded
from mxdsurgery.runs.journal import LOG_FILE, METRICS_FILE
from mxdsurgery.terminal.console import Reporter, compact

# A layer went wrong if its last NMSE is over so many times its lowest: noise and the fall of K raise it by a few per cent.
_GREW = 2.0
_FIGURES = ("loss", "nmse", "dead_share")
_SUFFIXES = (".png", ".svg")
# Stands near the beginning of every figure, in the format's own field for it: such a figure may be drawn anew.
_DRAWN_BY, _FIELDS, _MARK_WITHIN = "mxdsurgery plot", {".png": "Software", ".svg": "Creator"}, 4096
# More than any run writes; a file beyond these limits was not written by one.
_LONGEST_LINE, _MOST_LAYERS = 16 * 2**20, 1024
# Bytes at the end of a log that are read.
_LOOKED_BACK = 65536


@dataclass
class Stretch:
    """A part of a training whose steps count from 0: a stage and, where layers are trained in groups, one of these.

    Attributes:
        stage: ``distil`` or ``heal``.
        group: its number; None where there are no groups.
        looks: by step, what was written then: ``tokens`` since the stretch began, ``seconds``, ``kl``, ``validation_kl``, and
            by layer its ``loss``, ``nmse`` and ``dead_share``. A value that was not finite is NaN; what was not
            measured is not there.
    """

    stage: str
    group: int | None
    looks: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For people."""
        return self.stage if self.group is None else f"{self.stage}, group {self.group}"

    @property
    def tokens(self) -> float:
        """Tokens at its end."""
        return max(look["tokens"] for look in self.looks.values())

    def curve(self, layer: str, figure: str) -> list[tuple[int, float]]:
        """A layer's figure by step, in order."""
        values = ((step, look["layers"].get(layer, {}).get(figure)) for step, look in sorted(self.looks.items()))
        return [(step, value) for step, value in values if value is not None]

    def layers(self) -> list[str]:
        """The layers that have figures, in order."""
        return sorted({layer for look in self.looks.values() for layer in look["layers"]}, key=_in_order)


@guarded
def plot(folder: str | Path, *, out: str | Path | None = None, reporter: Reporter | None = None) -> dict[str, Any]:
    """Draws loss, NMSE and share of dead experts of each layer against the tokens of training, and the KL where there is one.

    Args:
        folder: what ``convert``, ``heal`` or ``frontier`` wrote, or the folder of a run that is not finished.
        out: one of the figures, PNG or SVG; the other is written beside it. Default: metrics.png and metrics.svg beside
            metrics.jsonl.
        reporter: what to tell while working; default: nothing.

    Returns:
        ``metrics``: the file; ``figures``: those written; ``looks``: how many were drawn; ``cut_line``: whether the last line
        was left unfinished and skipped; ``went_wrong``: of the layer whose NMSE first grew or stopped being finite, a
        sentence, or None; ``ended_with``: the error that ended the run, as log.txt has it, or None; ``stretches``: of each
        stage and group its last ``step``, ``tokens``, ``kl`` and ``validation_kl``, and by layer its last ``loss``, ``nmse``
        and ``dead_share`` with ``lowest_nmse`` and ``lowest_step``. None stands for what was not measured or not finite.

    Raises:
        MetricsError: there is no metrics.jsonl, or a line in it cannot be read.
        OutputError: the figures cannot be written.
    """
    reporter = reporter or Reporter()
    path = _metrics_of(Path(folder))
    figures = _places(path.with_suffix(".png") if out is None else Path(out))
    if out is not None:
        _check_ours(figures)
    stretches, cut_line = read_metrics(path)
    if cut_line:
        reporter.say(f"plot       the last line of {path} is cut off: it was skipped")
    wrong = first_wrong(stretches)
    sentence = None if wrong is None else _sentence(*wrong, of_several=len(stretches) > 1)
    title = "\n".join([path.resolve().parent.name, *([sentence] if sentence else [])])
    from mxdsurgery.terminal.chart import training_chart  # imports matplotlib: the errors above come without that

    figure = training_chart(_curves(stretches), _beginnings(stretches), title, marked=wrong and wrong[1])
    for place in figures:
        try:
            with file_aside(place) as new:
                figure.savefig(new, format=place.suffix[1:], dpi=150, metadata={_FIELDS[place.suffix]: _DRAWN_BY})
        except OSError as error:
            raise OutputError(
                f"{str(place)!r} cannot be written: {error.strerror or first_line(error)}", fix="give another --out"
            ) from None
    return {
        "metrics": str(path),
        "figures": [str(place) for place in figures],
        "looks": sum(len(stretch.looks) for stretch in stretches),
        "cut_line": cut_line,
        "went_wrong": sentence,
        "ended_with": _error_at_end(path.with_name(LOG_FILE)),
        "stretches": [_described(stretch) for stretch in stretches],
    }


def read_metrics(path: Path) -> tuple[list[Stretch], bool]:
    """What a metrics.jsonl says, in its order, and whether its last line is cut off.

    Where a run was resumed, a step may be there twice: what was written last counts, layer by layer.

    Raises:
        MetricsError: a line before the last is no look at a training, or no line holds a figure of one.
    """
    stretches: dict[tuple[str, int | None], Stretch] = {}
    cut_line = False
    for number, line, last in _lines(path):
        try:
            stage, group, step, look = _look(line)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            if last:
                cut_line = True
                break
            raise MetricsError(
                f"line {number} of {str(path)!r} is no look at a training: {first_line(error)}",
                expected="one JSON object on each line, as convert, heal and frontier write them",
                fix="delete the line",
            ) from None
        looks = stretches.setdefault((stage, group), Stretch(stage, group)).looks
        earlier = looks.get(step, {"layers": {}})
        looks[step] = earlier | look | {"layers": earlier["layers"] | look["layers"]}
    if not _curves(list(stretches.values())):
        raise MetricsError(f"{str(path)!r} holds no figure of a training", expected="a training that has begun")
    _shorten(list(stretches.values()))
    return list(stretches.values()), cut_line


def _shorten(stretches: list[Stretch]) -> None:
    """Names layers by their index alone, where nothing else stands for the same block."""
    names = {name for stretch in stretches for look in stretch.looks.values() for name in look["layers"]}
    if len({name.split()[0] for name in names}) == len(names):
        for stretch in stretches:
            for look in stretch.looks.values():
                look["layers"] = {name.split()[0]: figures for name, figures in look["layers"].items()}


def first_wrong(stretches: list[Stretch]) -> tuple[Stretch, str] | None:
    """The layer whose NMSE was the first to stay far above its lowest, or not to be finite, and in which stretch it was."""
    for stretch in stretches:
        found = [
            (step, layer) for layer in stretch.layers() if (step := _wrong_from(stretch.curve(layer, "nmse"))) is not None
        ]
        if found:
            return stretch, min(found, key=lambda one: one[0])[1]
    return None


def plot_table(result: dict[str, Any]) -> list[Table | str]:
    """For a terminal: how each layer ended, and what went wrong."""
    parts: list[Table | str] = []
    for stretch in result["stretches"]:
        name = stretch["stage"] if stretch["group"] is None else f"{stretch['stage']}, group {stretch['group']}"
        title = f"{name}: step {stretch['step']}, {compact(stretch['tokens'])} tokens"
        title += "".join(
            f", {label} {stretch[key]:.4f}"
            for key, label in (("kl", "KL"), ("validation_kl", "KL on validation text"))
            if stretch[key] is not None
        )
        table = Table(title=title)
        for column in ("layer", "loss", "NMSE", "lowest NMSE", "at step", "dead experts"):
            table.add_column(column, justify="left" if column == "layer" else "right")
        for layer, row in stretch["layers"].items():
            table.add_row(
                layer,
                *(_cell(row[name], "{:.4f}") for name in ("loss", "nmse", "lowest_nmse")),
                _cell(row["lowest_step"], "{}"),
                _cell(row["dead_share"], "{:.1%}"),
            )
        parts.append(table)
    if result["cut_line"]:
        parts.append("The last line of the metrics is cut off: it was skipped.")
    if result["went_wrong"] is not None:
        parts.append(f"Went wrong first: {result['went_wrong']}")
    if result["ended_with"] is not None:
        parts.append(f"The run ended with {result['ended_with']}")
    return parts


def _in_order(layer: str) -> list[Any]:
    """Sorts names like ``3`` and ``3 transcoder k16`` as people do: by the numbers in them, too."""
    return [(len(part), part) if at % 2 else part for at, part in enumerate(re.split(r"(\d+)", layer))]


def _metrics_of(folder: Path) -> Path:
    """A folder's metrics.jsonl, or that of its run, which may not be finished."""
    run = folder.with_name(folder.name + ".run") if folder.name else folder
    for path in (folder / METRICS_FILE, run / METRICS_FILE):
        if path.is_file():
            return path
    ours = (folder / "plan.json").is_file()
    raise MetricsError(
        f"{str(folder)!r} " + (f"holds no {METRICS_FILE}" if folder.is_dir() else "is no folder"),
        expected="a folder that convert, heal or frontier wrote, or is writing",
        fix="convert the model again: an earlier version wrote none" if ours else None,
    )


def _error_at_end(log: Path) -> str | None:
    """The text of a log's last line if that is an error; None where there is none, or no log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOOKED_BACK))
            last = file.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
    except OSError:
        return None
    _, level, _, text = (last.split(maxsplit=3) + [""] * 4)[:4]
    return text.replace("\\n", "\n") if level == "error" else None


def _places(out: Path) -> list[Path]:
    if out.suffix.lower() not in _SUFFIXES:
        raise OutputError(f"{str(out)!r} is neither PNG nor SVG", expected="a file that ends in .png or .svg")
    return [out.with_suffix(suffix) for suffix in _SUFFIXES]


def _check_ours(figures: list[Path]) -> None:
    """Raises OutputError if there is something that we did not draw, as the figure of the other kind may well be."""
    for place in figures:
        if os.path.lexists(place) and not (place.is_file() and _DRAWN_BY.encode() in place.open("rb").read(_MARK_WITHIN)):
            raise OutputError(
                f"{str(place)!r} exists and was not drawn by mxdsurgery plot: it is left as it is",
                expected=f"a name that is free, with {' and '.join(_SUFFIXES)}",
                fix="give another --out",
            )


def _lines(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """Number, content and whether it is the last, of each line that is not blank."""
    try:
        with path.open("rb") as file:
            number, line = 0, file.readline(_LONGEST_LINE)
            while line:
                number, following = number + 1, file.readline(_LONGEST_LINE)
                if line.strip():
                    yield number, line, not following
                line = following
    except OSError as error:
        raise MetricsError(f"{str(path)!r} cannot be read: {error.strerror or first_line(error)}") from None


def _look(line: bytes) -> tuple[str, int | None, int, dict[str, Any]]:
    """Stage, group, step and figures of a line; raises an error of `json` or Python if the line is not one."""
    row = json.loads(line)
    stage, group, step = row["stage"], row.get("group"), row["step"]
    if not isinstance(stage, str) or not isinstance(step, int) or not isinstance(group, int | None):
        raise TypeError(f"stage {stage!r}, group {group!r} and step {step!r}")
    given = row.get("layers", {})
    if len(given) > _MOST_LAYERS:
        raise ValueError(f"it has {len(given)} layers")
    layers = {name: _numbers(figures, _FIGURES) for name, figures in given.items()}
    look = _numbers(row, ("tokens", "seconds", "kl", "validation_kl"))
    if not math.isfinite(look["tokens"]):
        raise ValueError("its tokens are no number")
    return stage, group, step, look | {"layers": layers}


def _numbers(row: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, float]:
    """Those of the named figures that a row has; null, written for what was not finite, becomes NaN."""
    return {name: math.nan if row[name] is None else float(row[name]) for name in names if name in row}


def _wrong_from(curve: list[tuple[int, float]]) -> int | None:
    """The first step at which an NMSE was not finite, or else far above its lowest if it ends there too; None: neither."""
    bad = next((step for step, value in curve if not math.isfinite(value)), None)
    lowest = _lowest(curve)
    if bad is not None or lowest is None:
        return bad
    grown = [step for step, value in curve if step > lowest[0] and value > _GREW * lowest[1]]
    return grown[0] if grown and grown[-1] == curve[-1][0] else None


def _sentence(stretch: Stretch, layer: str, of_several: bool) -> str:
    """What became of a layer that went wrong."""
    curve = stretch.curve(layer, "nmse")
    lowest = _lowest(curve)
    best = "" if lowest is None else f", lowest {lowest[1]:.3g} at step {lowest[0]}"
    bad = next((step for step, value in curve if not math.isfinite(value)), None)
    now = f"NMSE {curve[-1][1]:.3g} at step {curve[-1][0]}" if bad is None else f"NMSE not finite at step {bad}"
    return f"{stretch.name}: " * of_several + f"layer {layer}: {now}{best}"


def _lowest(curve: list[tuple[int, float]]) -> tuple[int, float] | None:
    return min(((step, value) for step, value in curve if math.isfinite(value)), key=lambda one: one[1], default=None)


def _beginnings(stretches: list[Stretch]) -> dict[str, float]:
    """Where each stretch begins, in tokens, when they stand one after another."""
    begins, reached = {}, 0.0
    for stretch in stretches:
        begins[stretch.name] = reached
        reached += stretch.tokens
    return begins


def _curves(stretches: list[Stretch]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """By figure and layer, points (tokens, value) over all stretches; a NaN between two of them interrupts the line."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    begins = _beginnings(stretches)
    for stretch in stretches:
        start = begins[stretch.name]
        at = {step: start + look["tokens"] for step, look in stretch.looks.items()}
        for figure in _FIGURES:
            for layer in stretch.layers():
                if points := [(at[step], value) for step, value in stretch.curve(layer, figure)]:
                    curves.setdefault(figure, {}).setdefault(layer, []).extend([*points, (points[-1][0], math.nan)])
        for figure in ("kl", "validation_kl"):
            points = [(at[step], look[figure]) for step, look in sorted(stretch.looks.items()) if figure in look]
            if points:
                curves.setdefault("kl", {}).setdefault(figure, []).extend([*points, (points[-1][0], math.nan)])
    return {figure: dict(sorted(named.items(), key=lambda item: _in_order(item[0]))) for figure, named in curves.items()}


def _described(stretch: Stretch) -> dict[str, Any]:
    layers = {}
    for layer in stretch.layers():
        lowest = _lowest(stretch.curve(layer, "nmse")) or (None, None)
        row = {figure: _last(stretch.curve(layer, figure)) for figure in _FIGURES}
        layers[layer] = row | {"lowest_nmse": lowest[1], "lowest_step": lowest[0]}
    kls = {
        name: _last([(step, look[name]) for step, look in sorted(stretch.looks.items()) if name in look])
        for name in ("kl", "validation_kl")
    }
    ends = {"step": max(stretch.looks), "tokens": int(stretch.tokens)}
    return {"stage": stretch.stage, "group": stretch.group} | ends | kls | {"layers": layers}


def _last(curve: list[tuple[int, float]]) -> float | None:
    """A curve's last value; None if it is not finite, or there is none."""
    return curve[-1][1] if curve and math.isfinite(curve[-1][1]) else None


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
