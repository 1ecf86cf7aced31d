"""``plan --hours``: the conversion that fits the time that there is, and the command for it."""

import dataclasses
from pathlib import Path
from typing import Any

from mxdsurgery.errors import RecipeError, as_typed
from mxdsurgery.hardware.guard import guarded_with
from mxdsurgery.planning.plan import Plan, open_and_plan, timed, with_time
from mxdsurgery.recipe import RECIPE_KEYS, Recipe
from mxdsurgery.terminal.console import compact, duration

# A proposal takes so much of the time: no less, if more would fit, and no more, as plans are only predictions.
_LEAST, _MOST = 0.8, 0.95
# It is planned with so many tokens first, and at most so many times again.
_FIRST_TOKENS, _TIMES = 500_000, 4
# Held-out text is cut where evaluation would take more than this share of the time, but not below so many tokens.
_EVALUATION_SHARE, _FEWEST_HELD_OUT = 0.25, 8_192
# With fewer tokens a layer learns next to nothing; with more, this is not what limits it.
_FEWEST_TOKENS, _MOST_TOKENS = 32_768, 1_000_000_000
# An expert is to fire so often in training, on average: with less, a layer of fewer experts is the better one.
_FIRINGS = 200


@dataclasses.dataclass(frozen=True)
class Proposal:
    """What fits a time.

    Attributes:
        hours: that there are.
        keys: recipe keys that are proposed, beside those that were given.
        plan: with these.
        recipe: with these.
    """

    hours: float
    keys: dict[str, Any]
    plan: Plan
    recipe: Recipe

    def command(self, model: str, given: dict[str, Any]) -> str:
        """The command that does it, beside the flags that were given."""
        flags = {name: value for name, value in given.items() if value is not None} | self.keys
        words = ["mxdsurgery convert", as_typed(model)]
        for name, value in flags.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", compact(value) if name in self.keys else as_typed(value)]
        return " ".join(words)


@guarded_with(*RECIPE_KEYS)
def propose(model: str, *, hours: float, recipe: str | Path | None = None, **overrides: Any) -> Proposal:
    """Finds how many tokens to train on, so that training, evaluation and export fit a time; and how many experts and held-out
    tokens, where those of the recipe would be too many for it and nobody gave them.

    This machine is measured for about ten seconds, and again for each other batch or number of experts that is considered.

    Args:
        model: see `mxdsurgery.plan`.
        hours: that the conversion may take.
        recipe: a recipe file, or the name of one that comes with mxdsurgery; default: the one made for the model.
        **overrides: recipe keys that are given; those that are None count as not given.

    Raises:
        RecipeError: tokens are given, too; nothing worth training fits the time; or the time cannot be predicted here.
        MxDError: see `mxdsurgery.plan`.
    """
    if overrides.get("tokens") is not None:
        raise RecipeError(
            f"tokens are {overrides['tokens']}, and hours are {hours:g}",
            expected="one of them: how much to train on follows from the time, or the time from that",
            fix="leave out --tokens, or leave out --hours",
        )
    budget, keys, best = 3600 * hours, {"tokens": _FIRST_TOKENS}, None
    measured: tuple[int, Plan] | None = None  # with which batch
    for _ in range(1 + _TIMES):
        made, resolved, base_model = open_and_plan(model, recipe, overrides | keys)
        if made.refusal is not None:
            return Proposal(hours, keys, made, resolved)
        if measured is not None and measured[0] == resolved.batch and measured[1].layers == made.layers:
            made = timed(made, measured[1].calibration, resolved, base_model)
        else:
            made = with_time(made, resolved, base_model)
            measured = resolved.batch, made
        found = Proposal(hours, keys, made, resolved)
        if made.total_seconds is None:
            raise RecipeError(
                f"hours are {hours:g}, and the time that a conversion takes is not predicted: {made.unmeasured}",
                expected="a machine that can be measured",
                fix="give --tokens",
            )
        fits = made.total_seconds <= _MOST * budget
        if fits and (best is None or resolved.tokens > best.recipe.tokens):
            best = found
        if fits and made.total_seconds >= _LEAST * budget:
            break
        keys = _nearer(found, budget, overrides)
        if keys == found.keys:
            break
    if best is None:
        raise RecipeError(
            f"hours are {hours:g}, and {compact(resolved.tokens)} tokens take {duration(made.total_seconds)}, evaluation and "
            "export included",
            expected=f"time for at least {compact(_FEWEST_TOKENS)} tokens",
            fix="raise --hours, or choose fewer --layers, or lower --n-experts, or lower --eval-tokens",
        )
    return best


def _nearer(found: Proposal, budget: float, overrides: dict[str, Any]) -> dict[str, Any]:
    """The keys that come nearer to the time, by what a plan with others takes."""
    made, recipe, keys = found.plan, found.recipe, dict(found.keys)
    evaluation = made.evaluation_seconds
    if evaluation > _EVALUATION_SHARE * budget and overrides.get("eval_tokens") is None:
        fewer = int(recipe.eval_tokens * _EVALUATION_SHARE * budget / evaluation)
        keys["eval_tokens"] = min(recipe.eval_tokens, _round(max(_FEWEST_HELD_OUT, fewer)))
        evaluation *= keys["eval_tokens"] / recipe.eval_tokens
    left = (_LEAST + _MOST) / 2 * budget - evaluation - made.export_seconds
    tokens = int(recipe.tokens * left / made.seconds)
    keys["tokens"] = _round(min(max(tokens, _FEWEST_TOKENS), _MOST_TOKENS))
    most = max((layer.n_experts for layer in made.layers), default=0)
    enough = keys["tokens"] * recipe.k // _FIRINGS
    if most > enough and overrides.get("n_experts") is None and overrides.get("expansion") is None:
        keys["n_experts"] = _round(max(enough, 8 * recipe.k))
    return keys


def _round(count: int) -> int:
    """A count with two digits, not more than it was."""
    unit = 10 ** max(0, len(str(count)) - 2)
    return count // unit * unit
