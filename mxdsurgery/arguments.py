"""Numbers that functions and commands take beside the recipe's keys: one rule for the argument and for the flag of its name.

The arguments of public functions are checked by `mxdsurgery.hardware.guard`, flags by `mxdsurgery.options`.
"""

from typing import Any

from mxdsurgery.errors import MxDError, RecipeError
from mxdsurgery.keys import Key
from mxdsurgery.recipe import RECIPE_KEYS

_ONE, _NONE = {"kind": "count", "low": 1}, {"kind": "count", "low": 0}

ARGUMENTS: dict[str, Key] = {
    **{name: RECIPE_KEYS[name] for name in ("tokens", "seed", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints")},
    "hours": Key("number", "that a conversion may take, evaluation and export included", above=0.0, high=100_000.0),
    "price": Key("number", "of a GPU for an hour, in any currency", low=0.0),
    "efficiency": Key("number", "share of a GPU's peak figures that is taken to be reached", above=0.0, high=1.0),
    "tokens_single": Key(doc="of the held-out tokens, those that each layer alone is measured on", **_ONE),
    "samples": Key(doc="texts", **_ONE),
    "context": Key("count", "tokens that each text is cut after", low=2),
    "batch": Key(doc="contexts, or tokens, at a time", **_ONE),
    "top": Key(doc="of what is strongest", **_ONE),
    "sample": Key(doc="places kept at random", **_ONE),
    "spread": Key(doc="times as much text is drawn from", **_ONE),
    "contexts_per_expert": Key(doc="where each expert is measured", **_ONE),
    "max_new_tokens": Key(doc="that are added to a prompt", **_ONE),
    "controls": Key(doc="other experts, to compare with", **_NONE),
    "temperature": Key("number", "of sampling; 0: the likeliest token", low=0.0),
    "top_k": Key(doc="likeliest tokens that are sampled from", **_ONE),
    "top_p": Key("number", "share of the probability that is sampled from", above=0.0, high=1.0),
    "limit_mib": Key("number", "MiB that a page holds at most", low=0.0),
    "accumulate": Key(doc="passes that a step is split into", **_ONE),
    "patience": Key(doc="looks without anything better", **_ONE),
    "lora_rank": Key(doc="of adapters", **_ONE),
    "top_n": Key(doc="likeliest tokens kept of a position", **_ONE),
    "local": Key("number", "weight of each layer's distance from its block's output", low=0.0),
}


def given_number(name: str, value: Any, error: type[MxDError] = RecipeError) -> Any:
    """An argument's value in its own type where its name is in `ARGUMENTS`; anything else, and None, as it is.

    Raises:
        RecipeError, or the error asked for: it is no such number, or out of range.
    """
    if name not in ARGUMENTS or value is None:
        return value
    return ARGUMENTS[name].parse(name, value, what=name, error=error)
