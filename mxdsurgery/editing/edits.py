"""Edits of experts: read from a file or from flags, checked against a model, in force for a while or in the weights.

An edit file is YAML:

    model: 3f1c09a2b7d4e856            # optional: the fingerprint of the model it is for; another one is refused
    layers:
      12:
        ablate: [4031, 77]             # c_n = 0: it fires as before, without effect
        drop: [5]                      # never chosen: the next expert takes its place
        scale: {9: 0.5}                # its coefficient, times this
        steer: {14: 8.0}               # its coefficient, plus this, on every token
        replace: {20: [0.1, ...]}      # other numbers (D of them) in place of c_n
        copy: {30: 31}                 # 30 does what 31 does: c_30 = c_31; it still fires when it did
        merge: [[40, 41]]              # each does the mean of what they do
        clamp: {50: 3.0}               # its coefficient is this on every token; only while running, not in weights

No expert is named twice in a layer.
"""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mxdsurgery.errors import EditError, first_line
from mxdsurgery.hardware.guard import guarded
from mxdsurgery.outside import read_yaml, shown

if TYPE_CHECKING:  # flags and files are checked without torch
    from torch import nn

    from mxdsurgery.checkpoint.converted import Converted
    from mxdsurgery.layers.interventions import Interventions

# They are applied in this order.
KINDS = ("replace", "drop", "ablate", "scale", "copy", "merge", "clamp", "steer")
LISTED, NUMBERED = ("ablate", "drop"), ("scale", "steer", "clamp")
_FILE = "an edit file: see docs/guide/edit.md"
# Of an edit file: about 500 experts' rows of 4,096 numbers. More of them are better given in Python.
_MOST_BYTES = 16 * 2**20


# Layers and experts are numbered below this, and no number is larger than fp32's.
_MOST_INDEX, _MOST_VALUE = 2**31, 3.4e38


class _Dumper(yaml.SafeDumper):
    """Writes repeated values out in full instead of as YAML aliases, as `read_edits` expects."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: D102
        return True


@dataclass(frozen=True)
class Edits:
    """What is to be done to which experts: by kind and layer, as `Interventions`' methods of the same names take it.

    Attributes:
        model: fingerprint of the model that they are for; None: any model.
    """

    ablate: dict[int, list[int]] = field(default_factory=dict)
    drop: dict[int, list[int]] = field(default_factory=dict)
    scale: dict[int, dict[int, float]] = field(default_factory=dict)
    steer: dict[int, dict[int, float]] = field(default_factory=dict)
    clamp: dict[int, dict[int, float]] = field(default_factory=dict)
    replace: dict[int, dict[int, list[float]]] = field(default_factory=dict)
    copy: dict[int, dict[int, int]] = field(default_factory=dict)
    merge: dict[int, list[list[int]]] = field(default_factory=dict)
    model: str | None = None

    def __bool__(self) -> bool:
        return any(getattr(self, kind) for kind in KINDS)

    @property
    def layers(self) -> list[int]:
        """The edited layers, in order."""
        return sorted({layer for kind in KINDS for layer in getattr(self, kind)})

    def experts(self, layer: int) -> list[int]:
        """The edited experts of a layer; sources of copies do not count."""
        found: list[int] = []
        for kind in KINDS:
            given = getattr(self, kind).get(layer, [])
            found += [expert for group in given for expert in group] if kind == "merge" else list(given)
        return found

    def live(self, model: "nn.Module") -> "Interventions":
        """A context manager, in which the model computes with these edits.

        Raises:
            EditError: the model lacks a layer or an expert that is named, or a number is not allowed.
        """
        from mxdsurgery.layers.interventions import InterventionError

        _check_named_once(self)
        made = model.mxd
        try:
            for kind in KINDS:
                if getattr(self, kind):
                    made = getattr(made, kind)(getattr(self, kind))
        except InterventionError as error:
            raise EditError(first_line(error), expected="layers and experts of this model") from None
        return made

    def with_experts(self, exchange: Callable[[int, int], int]) -> "Edits":
        """The same edits of other experts: ``exchange(layer, expert)`` gives their numbers."""

        def exchanged(layer: int, given: Any) -> Any:
            if isinstance(given, dict):
                return {exchange(layer, expert): value for expert, value in given.items()}
            return [[exchange(layer, e) for e in item] if isinstance(item, list) else exchange(layer, item) for item in given]

        kinds = {kind: {layer: exchanged(layer, given) for layer, given in getattr(self, kind).items()} for kind in KINDS}
        return dataclasses.replace(self, **kinds)

    def to_dict(self) -> dict[str, Any]:
        """As an edit file has it."""
        layers = {layer: {k: getattr(self, k)[layer] for k in KINDS if layer in getattr(self, k)} for layer in self.layers}
        return ({"model": self.model} if self.model else {}) | {"layers": layers}

    def to_yaml(self) -> str:
        """The text of an edit file."""
        return yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120)

    def words(self) -> list[str]:
        """A line for each kind and layer."""
        lines = []
        for layer in self.layers:
            for kind in KINDS:
                if layer in getattr(self, kind):
                    given = getattr(self, kind)[layer]
                    if kind == "replace":
                        said = ", ".join(f"{expert} by {len(row)} numbers" for expert, row in given.items())
                    elif isinstance(given, dict):
                        sign = " from " if kind == "copy" else " by " if kind in ("scale", "steer") else " at "
                        said = ", ".join(f"{expert}{sign}{value:g}" for expert, value in given.items())
                    else:
                        said = ", ".join("+".join(map(str, e)) if isinstance(e, list) else str(e) for e in given)
                    lines.append(f"layer {layer}: {kind} {said}")
        return lines


def check_for(edits: Edits, converted: "Converted") -> None:
    """Raises EditError if the edits are for another model, or name what this one does not have."""
    from mxdsurgery.checkpoint.converted import fingerprint

    own = fingerprint(converted) if edits.model is not None else None
    if edits.model != own:
        raise EditError(
            f"the edits are for the model with the fingerprint {edits.model}; {str(converted.folder)!r} has {own}",
            expected="edits of this model: experts of another one have nothing in common with its own",
            fix="take the line 'model' out of the edit file if you do mean it",
        )
    edits.live(converted.model)


@guarded
def read_edits(path: str | Path) -> Edits:
    """Reads an edit file.

    Raises:
        EditError: it is not there, not YAML, or says something that is no edit.
    """
    try:
        values = read_yaml(path, _MOST_BYTES)
    except (OSError, ValueError) as error:
        raise EditError(f"{str(path)!r} cannot be read: {first_line(error)}", expected=_FILE) from None
    return edits_from(values, str(path))


def edits_from(values: Any, where: str) -> Edits:
    """Edits from what an edit file holds; ``where`` names it in errors.

    Raises:
        EditError: it says something that is no edit.
    """
    if not isinstance(values, dict) or not isinstance(values.get("layers"), dict) or set(values) - {"model", "layers"}:
        raise EditError(f"{where} is not a mapping with the keys 'layers' and, if wanted, 'model'", expected=_FILE)
    if not isinstance(values.get("model"), str | None):
        raise EditError(
            f"{where}: 'model' is {shown(values['model'])}", expected="a fingerprint, in quotes if it is all digits"
        )
    kinds: dict[str, dict] = {kind: {} for kind in KINDS}
    for number, given in values["layers"].items():
        layer = _index(number)
        if layer is None or not isinstance(given, dict) or not given:
            raise EditError(
                f"{where}: 'layers' has {shown(number)}: {shown(given)}", expected="a layer's number, and edits by kind"
            )
        for kind, what in given.items():
            if kind not in KINDS:
                raise EditError(
                    f"{where}, layer {layer}: no edit is named {shown(kind)}", expected="one of " + ", ".join(KINDS)
                )
            if layer in kinds[kind]:
                raise EditError(f"{where}: layer {layer} stands twice, once as text", expected="one entry for each layer")
            kinds[kind][layer] = _checked(kind, what, f"{where}, layer {layer}, {kind}")
    return Edits(**kinds, model=values.get("model"))


@guarded
def edits_from_flags(
    edits: str | Path | None = None,
    *,
    ablate: Sequence[str] | str = (),
    drop: Sequence[str] | str = (),
    scale: Sequence[str] | str = (),
    steer: Sequence[str] | str = (),
    clamp: Sequence[str] | str = (),
) -> Edits:
    """Edits from a file and from flags: ``12:4031,12:77`` of experts, ``12:4031=8,9:77=-2`` of experts with numbers.

    Raises:
        EditError: a value cannot be read, or an expert is named twice.
    """
    made = Edits() if edits is None else read_edits(edits)
    kinds = {kind: dict(getattr(made, kind)) for kind in KINDS}
    for kind, texts in (("ablate", ablate), ("drop", drop), ("scale", scale), ("steer", steer), ("clamp", clamp)):
        for text in [texts] if isinstance(texts, str) else texts:
            for part in text.split(","):
                layer, expert, number = _from_flag(kind, part.strip())
                if kind in LISTED:
                    kinds[kind][layer] = [*kinds[kind].get(layer, []), expert]
                elif expert in kinds[kind].get(layer, {}):
                    raise EditError(f"layer {layer}, expert {expert} has two numbers to {kind}", expected="one")
                else:
                    kinds[kind][layer] = kinds[kind].get(layer, {}) | {expert: number}
    made = dataclasses.replace(made, **kinds)
    _check_named_once(made)
    return made


def _check_named_once(edits: Edits) -> None:
    for layer in edits.layers:
        counted = Counter(edits.experts(layer))
        twice = sorted((expert for expert, count in counted.items() if count > 1), key=str)
        twice += [source for source in edits.copy.get(layer, {}).values() if source in counted]
        if twice:
            raise EditError(
                f"layer {layer}: experts {shown(twice)} are named twice",
                expected="every expert in one edit, and no edited one as the source of a copy",
                fix="apply the edits one after the other",
            )


def _from_flag(kind: str, text: str) -> tuple[int, int, float | None]:
    place, sign, number = text.partition("=")
    layer, colon, expert = place.partition(":")
    wanted = "LAYER:EXPERT" if kind in LISTED else "LAYER:EXPERT=NUMBER"
    try:
        found = int(layer), int(expert), float(number) if sign else None
        good = bool(colon) and bool(sign) == (kind not in LISTED) and min(found[:2]) >= 0
        good = good and max(found[:2]) < _MOST_INDEX and (found[2] is None or abs(found[2]) <= _MOST_VALUE)
    except ValueError:
        good = False
    if not good:
        example = "12:4031,12:77" if kind in LISTED else "12:4031=8"
        raise EditError(
            f"{kind} {shown(text)}: this is no edit", expected=f"{wanted}, several between commas; for example {example}"
        )
    return found


def _checked(kind: str, what: Any, where: str) -> Any:
    """What a file says of one kind in one layer, in its own types; numbers may be given as text."""
    if kind in LISTED:
        made, wanted = _list_of(_index, what if isinstance(what, list) else [what]), "an expert, or a list of experts"
    elif kind == "merge":
        made, wanted = _list_of(_group, what), "a list of groups, each a list of two experts or more"
    elif kind == "copy":
        made, wanted = _mapping_to(_index, what), "experts, and the expert that each of them copies"
    elif kind == "replace":
        made = _mapping_to(functools.partial(_list_of, _number), what)
        wanted = "experts, and D finite numbers for each"
    else:
        made, wanted = _mapping_to(_number, what), "experts, and a finite number for each"
    if not made:
        raise EditError(f"{where}: {shown(what)[:80]}", expected=wanted)
    return made


def _index(value: Any) -> int | None:
    """The number of a layer or an expert, also given as text; None where it is none. So for what follows."""
    if isinstance(value, str) and re.fullmatch("[0-9]{1,10}", value.strip()):
        value = int(value)
    good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_INDEX
    return value if good else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) <= _MOST_VALUE else None


def _list_of(read: Callable[[Any], Any], values: Any) -> list | None:
    made = [read(value) for value in values] if isinstance(values, list) else [None]
    return None if None in made else made


def _group(experts: Any) -> list[int] | None:
    made = _list_of(_index, experts)
    return made if made is not None and len(made) > 1 else None


def _mapping_to(read: Callable[[Any], Any], values: Any) -> dict | None:
    if not isinstance(values, Mapping):
        return None
    made = {_index(expert): read(value) for expert, value in values.items()}
    good = len(made) == len(values) and None not in made and None not in made.values()  # "3" and 3 are the same expert
    return made if good else None
