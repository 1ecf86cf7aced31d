"""What a conversion is based on: the base model and its shape, and the recipe, from defaults, a file and overrides."""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mxdsurgery.base.decoder import decoder_layers, layer_count, vocabulary_size, width
from mxdsurgery.base.dtypes import in_memory
from mxdsurgery.base.model import BaseModel, open_model
from mxdsurgery.demo import DEMO_MODELS
from mxdsurgery.errors import MxDError, RecipeError
from mxdsurgery.recipe import Recipe, check_names, find_recipe, load_recipe
from mxdsurgery.text.places import lasting
from mxdsurgery.training.cost import BaseShape


def open_base(model: str, recipe: str | Path | None, overrides: dict[str, Any]) -> BaseModel:
    """The base model, at the revision that the overrides or the recipe's file name; no file can allow its code to run."""
    revision = overrides.get("revision") or (None if recipe is None else load_recipe(recipe).get("revision"))
    return open_model(model, revision, overrides.get("trust_remote_code") or False)


def resolve_recipe(base: BaseModel, recipe: str | Path | None, overrides: dict[str, Any]) -> tuple[Recipe, Path]:
    """The recipe, from defaults, then its file, then the overrides; and the path of that file."""
    given = {name: value for name, value in overrides.items() if value is not None}
    check_names(given, "among the options")
    model = base.name
    if recipe is None:
        recipe = find_recipe(model, base.config.model_type, width(base.skeleton), layer_count(base.skeleton))
    values = load_recipe(recipe) | given
    # A recipe's held-out text belongs to the recipe's training text.
    if "data" in given and "eval_data" not in given:
        values.pop("eval_data", None)
    # Where a count of experts is set, `expansion` does nothing: who asks for it does not want a recipe's count.
    if "expansion" in given:
        if "n_experts" in given:
            raise RecipeError(
                f"recipe keys 'n_experts' and 'expansion' are {given['n_experts']} and {given['expansion']}",
                expected="one of them: a number of experts, or the size of a transcoder that they are matched to",
                fix="leave out --expansion, or leave out --n-experts",
            )
        values.pop("n_experts", None)
    values["model"] = os.path.abspath(model) if model not in DEMO_MODELS and os.path.isdir(model) else model
    values.setdefault("out", f"./{Path(values['model']).name}-mxd")
    with saying_whose(values, given, Path(recipe).name):
        resolved = Recipe(**values)
    if resolved.data is None:
        raise RecipeError("recipe key 'data' is not set", expected="a text to train on", fix="give --data")
    # The recipe is saved with the result, which may be evaluated from another folder.
    texts = {name: getattr(resolved, name) for name in ("data", "eval_data")}
    lasts = {name: lasting(text) for name, text in texts.items() if text is not None}
    return dataclasses.replace(resolved, revision=base.revision, **lasts), Path(recipe)


@contextmanager
def saying_whose(values: dict[str, Any], given: dict[str, Any], recipe_file: str) -> Iterator[None]:
    """While open, an error about recipe keys also says which of their values nobody gave: whose they are.

    Args:
        values: of the recipe's keys; for those that are missing, the defaults count.
        given: the values that the user gave; None counts as not given.
        recipe_file: the name of the file that the others may come from.

    Raises:
        MxDError: as inside.
    """
    try:
        yield
    except MxDError as error:
        defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
        whose = []
        for name in error.keys:
            if given.get(name) is None:
                value = values.get(name, defaults[name])
                whose.append(
                    f"{name} {value}: {'the default' if value == defaults[name] else f'from the recipe {recipe_file}'}"
                )
        if not whose:
            raise
        raise type(error)(f"{error.found} ({', '.join(whose)})", expected=error.expected, fix=error.fix) from None


def base_shape(base: BaseModel, stored: str, compute: str | None) -> BaseShape:
    """What the cost arithmetic needs to know of a base model that is stored in one dtype and computes in another."""
    _, layers = decoder_layers(base.skeleton)
    return BaseShape(
        parameters=base.skeleton.num_parameters(),
        layer_parameters=tuple(sum(weight.numel() for weight in layer.parameters()) for layer in layers),
        d_model=width(base.skeleton),
        vocabulary=vocabulary_size(base.skeleton),
        dtype=in_memory(stored, compute),
    )
