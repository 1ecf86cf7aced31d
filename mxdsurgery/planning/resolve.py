"""What a conversion goes by: the recipe, from defaults, files and what was given besides; and the base model's shape."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from mxdsurgery.base.dtypes import in_memory
from mxdsurgery.base.model import decoder_layers, model_skeleton
from mxdsurgery.demo import DEMO_MODELS
from mxdsurgery.errors import RecipeError
from mxdsurgery.recipe import Recipe, check_names, find_recipe, load_recipe
from mxdsurgery.training.cost import BaseModel


def resolve_recipe(
    model: str, config: PreTrainedConfig, recipe: str | Path | None, overrides: dict[str, Any]
) -> tuple[Recipe, Path]:
    """Defaults, then the recipe's file, then the overrides; and which file that was."""
    given = {name: value for name, value in overrides.items() if value is not None}
    check_names(given, "among the options")
    text_config = config.get_text_config(decoder=True)
    if recipe is None:
        recipe = find_recipe(model, config.model_type, text_config.hidden_size, text_config.num_hidden_layers)
    values = load_recipe(recipe) | given
    # A recipe's held-out text belongs to the recipe's training text.
    if "data" in given and "eval_data" not in given:
        values.pop("eval_data", None)
    values["model"] = os.path.abspath(model) if model not in DEMO_MODELS and os.path.isdir(model) else model
    values.setdefault("out", f"./{Path(values['model']).name}-mxd")
    resolved = Recipe(**values)
    if resolved.data is None:
        raise RecipeError("recipe key 'data' is not set", expected="a text to train on", fix="give --data")
    # The recipe is saved with the result, which may be evaluated from another folder.
    texts = {name: getattr(resolved, name) for name in ("data", "eval_data")}
    files = {name: os.path.abspath(text) for name, text in texts.items() if text is not None and os.path.isfile(text)}
    return dataclasses.replace(resolved, **files), Path(recipe)


def base_model(config: PreTrainedConfig, stored: str, compute: str | None) -> BaseModel:
    """What the arithmetic needs to know of a base model whose weights are stored in one dtype and computed with in another."""
    skeleton = model_skeleton(config)
    _, layers = decoder_layers(skeleton)
    text_config = config.get_text_config(decoder=True)
    return BaseModel(
        parameters=skeleton.num_parameters(),
        layer_parameters=tuple(sum(weight.numel() for weight in layer.parameters()) for layer in layers),
        d_model=text_config.hidden_size,
        vocabulary=text_config.vocab_size,
        dtype=in_memory(stored, compute),
    )
