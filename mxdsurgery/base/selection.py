"""The syntax of ``--layers``, and which layers of a model it names."""

import re
from collections.abc import Sequence
from pathlib import Path

from mxdsurgery.errors import LayerSelectionError
from mxdsurgery.keys import parse_layers
from mxdsurgery.outside import shown

_ALLOWED = "all, one layer (3, or -1 for the last), a range (2-5), or several of these with commas (0,4,7-9)"
_PART = re.compile(r"(-?[0-9]{1,100})(?:-([0-9]{1,100}))?")


def select_layers(selection: str | int | Sequence[int | str], n_layers: int) -> list[int]:
    """The layers that a selection names, ascending, each once.

    Args:
        selection: ``all``, ``3``, ``-1`` (counted from the end), ``2-5`` (both ends included), or several of these.
        n_layers: how many decoder layers the model has.

    Raises:
        LayerSelectionError: it cannot be read, is empty, or names a layer that is not there.
    """
    if n_layers == 0:
        raise LayerSelectionError(f"layers {shown(selection)}: the model has no decoder layers")
    text = parse_layers(selection)
    if text is None:
        raise LayerSelectionError(f"layers {shown(selection)}: cannot read it", expected=_ALLOWED)
    selection = text
    if selection.strip() == "all":
        return list(range(n_layers))
    chosen: set[int] = set()
    for part in selection.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise LayerSelectionError(f"layers {shown(selection)}: cannot read {shown(part.strip())}", expected=_ALLOWED)
        first = _layer(int(match[1]), n_layers, selection)
        last = first if match[2] is None else _layer(int(match[2]), n_layers, selection)
        if last < first:
            raise LayerSelectionError(f"layers {shown(selection)}: {part.strip()!r} runs backwards", expected=_ALLOWED)
        chosen.update(range(first, last + 1))
    return sorted(chosen)


def write_layers(numbers: Sequence[int]) -> str:
    """Ascending layers as a selection: 0, 1, 2, 5 as ``0-2,5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def one_layer(layer: int, there: Sequence[int], folder: str | Path, n_layers: int | None = None) -> int:
    """A layer that is among those in a folder; a negative number counts from the end of the model's layers.

    Args:
        layer: as it was asked for.
        there: the layers in the folder.
        folder: for people.
        n_layers: the model's; None where they are not known: negative numbers are then none of them.

    Raises:
        LayerSelectionError: it is none of them.
    """
    found = layer + n_layers if layer < 0 and n_layers is not None else layer
    if found not in there:
        from_end = "" if n_layers is None else f"; or, from the end, {', '.join(str(one - n_layers) for one in there)}"
        raise LayerSelectionError(
            f"{str(folder)!r} holds no experts in layer {layer}", expected=f"one of {', '.join(map(str, there))}{from_end}"
        )
    return found


def _layer(number: int, n_layers: int, selection: str) -> int:
    if not -n_layers <= number < n_layers:
        raise LayerSelectionError(
            f"layers {shown(selection)}: the model has no layer {number}",
            expected=f"layers from 0 to {n_layers - 1}, or -{n_layers} to -1 from the end",
        )
    return number % n_layers
