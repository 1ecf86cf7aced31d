"""What a conversion is based on: the base model and its shape, and the recipe, from defaults, a file and overrides."""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mxdsurgery.base.decoder import decoder_layers
from mxdsurgery.base.dtypes import in_memory
from mxdsurgery.base.model import BaseModel, open_model
from mxdsurgery.demo import DEMO_MODELS
from mxdsurgery.errors import MxDError, RecipeError
from mxdsurgery.recipe import Recipe, check_names, find_recipe, load_recipe
from mxdsurgery.training.cost import BaseShape


def open_base(model: str, recipe: str | Path | None, overrides: dict[str, Any]) -> BaseModel:
    """The base model, at the revision that the overrides or the recipe's file name; no file can allow its code to run."""
    revision = overrides.get("revision") or (None if recipe is None else load_recipe(recipe).get("revision"))
    return open_model(model, revision, overrides.get("trust_remote_code") or False)


def resolve_recipe(base: BaseModel, recipe: str | Path | None, overrides: dict[str, Any]) -> tuple[Recipe, Path]:
    """The recipe, from defaults, then its file, then the overrides; and the path of that file."""
    given = {name: value for name, value in overrides.items() if value is not None}
    check_names(given, "among the options")
    model, text_config = base.name, base.config.get_text_config(decoder=True)
    if recipe is None:
        recipe = find_recipe(model, base.config.model_type, text_config.hidden_size, text_config.num_hidden_layers)
    values = load_recipe(recipe) | given
    # A recipe's held-out text belongs to the recipe's training text.
    if "data" in given and "eval_data" not in given:
        values.pop("eval_data", None)
    values["model"] = os.path.abspath(model) if model not in DEMO_MODELS and os.path.isdir(model) else model
    values.setdefault("out", f"./{Path(values['model']).name}-mxd")
    with saying_whose(values, given, Path(recipe).name):
        resolved = Recipe(**values)
    if resolved.data is None:
        raise RecipeError("recipe key 'data' is not set", expected="a text to train on", fix="give --data")
    # The recipe is saved with the result, which may be evaluated from another folder.
    texts = {name: getattr(resolved, name) for name in ("data", "eval_data")}
    files = {name: os.path.abspath(text) for name, text in texts.items() if text is not None and os.path.isfile(text)}
    return dataclasses.replace(resolved, revision=base.revision, **files), Path(recipe)


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
    text_config = base.config.get_text_config(decoder=True)
    return BaseShape(
        parameters=base.skeleton.num_parameters(),
        layer_parameters=tuple(sum(weight.numel() for weight in layer.parameters()) for layer in layers),
        d_model=text_config.hidden_size,
        vocabulary=text_config.vocab_size,
        dtype=in_memory(stored, compute),
    )
