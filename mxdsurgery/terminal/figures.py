"""How measured figures are written in tables: with their intervals, and what is no number as such.

``row`` is a JSON object with figures and, for each, the ends of its interval as ``<figure>_ci``; ``form`` a format
specification such as ``+.4f``.
"""

from collections.abc import Collection, Mapping
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
# Those of them that a terminal and a chart show beside the first.
SHORT_SHARES = ("few_experts_share", "earned_share")

# What a column says, by its heading.
EXPLAINED = {
    "ΔCE": "nats per token that next-token prediction got worse by",
    "ΔCE if zeroed": "the same with the block removed, but for position 0",
    "ΔCE, experts frozen": "the same with the layer in place and its experts' say a constant, the best one",
    "KL": "from the original's predictions, in nats per token",
    "same top-1": "how often the likeliest next token is the original's",
    "NMSE": "squared error of the block's output over its squared size (all: the mean over layers, all in place)",
    "median error": "the median over tokens of that ratio, which a few huge outputs do not decide (all: the mean over layers, "
    "each alone)",
    "Jacobian NMSE": "NMSE of how the output changes with the input, in random directions (1: as a constant; all: the "
    "mean over layers, each alone)",
    "loss recovered": "the part that the layer keeps of what is lost if the block is zeroed (n/a: it is not certain, by the "
    "95 % interval, that anything is)",
    "expert share": "how much of the layer's worth the token-by-token choice of experts carries (0: the dense path does it "
    "all; measured by freezing the experts' say at its best constant; n/a: it is not certain, by the 95 % interval, that the "
    "model predicts better with the layer than without any)",
    "beyond a few": "what is left of the expert share against a few experts, the same for every token, of any size and sign "
    "(near 0: this choice of experts was not needed)",
    "earned": "what is left of it against a dense path fitted anew (near 0: as before)",
    "unused experts": "never fired on these tokens",
}


def legend(headings: Collection[str], words: Mapping[str, str] = EXPLAINED, more: str = "In brackets: 95 % intervals.") -> str:
    """What the columns of these headings say, a sentence each, and ``more``; those not among ``words`` say it themselves."""
    said = [f"{heading[0].upper()}{heading[1:]}: {text}." for heading, text in words.items() if heading in headings]
    return " ".join([*said, more]).strip()


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
