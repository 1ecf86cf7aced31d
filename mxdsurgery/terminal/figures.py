"""How measured figures are written in tables: with their intervals, and what is no number as such.

``row`` is a JSON object with figures and, for each, the ends of its interval as ``<figure>_ci``; ``form`` a format
specification such as ``+.4f``.
"""

from typing import Any

NONE = "n/a"

# The share of a layer's worth that its experts carry, and those that are lost under its controls: JSON name, heading.
SHARES = {
    "expert_share": "expert share",
    "permuted_share": "permuted",
    "shuffled_share": "shuffled",
    "random_gate_share": "random gate",
    "few_experts_share": "beyond a few",
    "earned_share": "earned",
}
# Those of them that a terminal and a chart show beside the first, with what they say.
SHORT_SHARES = ("few_experts_share", "earned_share")
SHORT_LEGEND = """\
Beyond a few, earned: what is left of the expert share against a few experts, the same for every token, of any size and sign,
and against a dense path fitted anew. Where one of them is near 0, this choice of experts was not needed."""


def value_of(row: dict[str, Any], name: str, form: str) -> str:
    """A figure without its interval; an older version may not have measured it."""
    return NONE if row.get(name) is None else format(row[name], form)


def interval(row: dict[str, Any], name: str) -> tuple[float, float] | None:
    """The ends of a figure's interval; None if it has none."""
    ends = row.get(f"{name}_ci")
    return None if ends is None or None in ends else (ends[0], ends[1])  # older versions wrote [null, null]


def range_of(row: dict[str, Any], name: str, form: str) -> str:
    """The interval alone: ``low to high``."""
    ends = interval(row, name)
    return NONE if ends is None else f"{ends[0]:{form}} to {ends[1]:{form}}"


def with_range(row: dict[str, Any], name: str, form: str, between: str = " ") -> str:
    """A figure and its interval: ``value [low, high]``."""
    ends = interval(row, name)
    return value_of(row, name, form) + ("" if ends is None else f"{between}[{ends[0]:{form}}, {ends[1]:{form}}]")


def times(row: dict[str, Any], other: dict[str, Any], name: str) -> float | None:
    """How many times another row's figure a row's is; None unless the other's is certainly above 0, by its interval."""
    ends = interval(other, name)
    return row[name] / other[name] if ends is not None and ends[0] > 0 else None
