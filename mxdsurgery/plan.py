"""``plan``: what a conversion would make of a model, and what it would take, from the config alone."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedConfig

from mxdsurgery.analyze import Analysis, analyze
from mxdsurgery.blocks import Block, Part
from mxdsurgery.console import compact, size
from mxdsurgery.demo import DEMO_MODELS
from mxdsurgery.errors import RecipeError, UnsupportedBlockError
from mxdsurgery.model import load_config
from mxdsurgery.recipe import Recipe, check_names, find_recipe, load_recipe
from mxdsurgery.selection import select_layers

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# fp32 parameters, their gradients and Adam's two moments.
_TRAINING_BYTES = 16


@dataclass(frozen=True)
class LayerPlan:
    """One layer's conversion.

    Attributes:
        block: what is replaced.
        n_experts: N.
        k: K.
        parameters: of the new layer.
    """

    block: Block
    n_experts: int
    k: int
    parameters: int


@dataclass(frozen=True)
class Plan:
    """A conversion, resolved: which blocks become what. Plain data: `to_dict` and `from_dict` go through JSON.

    Attributes:
        model: as it was named.
        revision: the commit on the hub, where it came from there.
        model_type: transformers' name of the architecture.
        architecture: the causal language model's class.
        dtype: of the base model and of the result.
        original_parameters: of the base model.
        recipe_file: the recipe that the settings came from.
        steps: optimiser steps.
        layers: in order.
    """

    model: str
    revision: str | None
    model_type: str
    architecture: str
    dtype: str
    original_parameters: int
    recipe_file: str
    steps: int
    layers: list[LayerPlan]

    @property
    def blocks(self) -> list[Block]:
        """The blocks that are replaced, in order."""
        return [layer.block for layer in self.layers]

    @property
    def trained_parameters(self) -> int:
        """Of all new layers."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Of the converted model."""
        return self.original_parameters + sum(layer.parameters - layer.block.parameters for layer in self.layers)

    @property
    def training_bytes(self) -> int:
        """The base model's weights, and parameters, gradients and Adam state of the new layers; activations not counted."""
        return _BYTES[self.dtype] * self.original_parameters + _TRAINING_BYTES * self.trained_parameters

    @property
    def checkpoint_bytes(self) -> int:
        """The converted model's weights on disk."""
        return _BYTES[self.dtype] * self.parameters

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields, and the totals that follow from them."""
        totals = {
            "trained_parameters": self.trained_parameters,
            "parameters": self.parameters,
            "training_bytes": self.training_bytes,
            "checkpoint_bytes": self.checkpoint_bytes,
        }
        return dataclasses.asdict(self) | {"totals": totals}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Plan":
        """Back from `to_dict`."""
        values = {name: value for name, value in values.items() if name != "totals"}
        return cls(**values | {"layers": [_layer_plan(row) for row in values["layers"]]})

    def table(self) -> Table:
        """For a terminal."""
        title = f"Plan for {self.model} (recipe {Path(self.recipe_file).stem})"
        table = Table("layer", "block", "kind", "H", "N", "K", "parameters", "was", title=title)
        for layer in self.layers:
            row = (
                layer.block.layer,
                layer.block.path,
                layer.block.kind,
                layer.block.d_hidden,
                layer.n_experts,
                layer.k,
            )
            table.add_row(*map(str, row), compact(layer.parameters), compact(layer.block.parameters))
        return table

    def summary(self, recipe: Recipe) -> list[str]:
        """For a terminal: what it takes, in a few lines."""
        return [
            f"model      {compact(self.original_parameters)} parameters become {compact(self.parameters)}, {self.dtype}",
            f"training   {compact(recipe.tokens)} tokens of {recipe.data}: {self.steps} steps of {recipe.batch}",
            f"memory     about {size(self.training_bytes)} for weights, gradients and Adam state, plus activations",
            f"checkpoint {size(self.checkpoint_bytes)}",
        ]


def _layer_plan(row: dict[str, Any]) -> LayerPlan:
    block = dict(row["block"])
    for name in ("encoder", "encoder_up", "decoder"):
        part = block[name]
        if part is not None:
            outputs = part["outputs"]
            block[name] = Part(part["path"], part["transposed"], outputs and tuple(outputs))
    block["bypass"] = tuple(block["bypass"])
    return LayerPlan(Block(**block), row["n_experts"], row["k"], row["parameters"])


def plan(model: str, *, recipe: str | Path | None = None, **overrides: Any) -> tuple[Plan, Recipe]:
    """Resolves a conversion without reading any weights.

    Args:
        model: hub id, local folder, ``demo-glu`` or ``demo-mlp``.
        recipe: a recipe file or the name of one that comes with mxdsurgery; default: the one made for the model.
        **overrides: recipe keys; those that are None count as not given.

    Returns:
        The plan and the resolved recipe.

    Raises:
        RecipeError: an unknown key, a wrong value, a dtype that is not supported, or more active experts than experts.
        LayerSelectionError: a layer that the model does not have.
        UnsupportedBlockError: a chosen layer's block cannot be converted.
        ModelNotFoundError, GatedModelError, UnknownFamilyError, NotCausalLMError: see `mxdsurgery.model.load_config`.
    """
    config = load_config(model, overrides.get("revision"))
    resolved, recipe_file = resolve_recipe(model, config, recipe, overrides)
    analysis = analyze(model, revision=resolved.revision)
    chosen = select_layers(resolved.layers, len(analysis.layers))
    layers = [_plan_layer(_block_of(analysis, index), resolved) for index in chosen]
    dtype = resolved.dtype if resolved.dtype != "auto" else str(config.dtype or "float32").removeprefix("torch.")
    if dtype not in _BYTES:
        raise RecipeError(
            f"recipe key 'dtype' is 'auto', and the dtype of {model!r} is {dtype}",
            expected="one of " + ", ".join(_BYTES),
            fix="name one of them with --dtype",
        )
    made = Plan(
        model=model,
        revision=analysis.revision,
        model_type=analysis.model_type,
        architecture=analysis.architecture,
        dtype=dtype,
        original_parameters=analysis.parameters,
        recipe_file=recipe_file.name,
        steps=max(1, resolved.tokens // (resolved.batch // resolved.context * resolved.context)),
        layers=layers,
    )
    return made, dataclasses.replace(resolved, revision=made.revision or resolved.revision)


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


def _block_of(analysis: Analysis, index: int) -> Block:
    finding = analysis.layers[index]
    if finding.block is None:
        able = [str(other.layer) for other in analysis.layers if other.block is not None]
        raise UnsupportedBlockError(
            f"layer {index} ({finding.path}) of {analysis.model!r} cannot be converted: {finding.reason}",
            expected="an MLP (out act(in x)) or GLU (down (act(gate x) * up x)) block whose output can be recomputed",
            fix=f"choose among the others: --layers {','.join(able)}" if able else None,
        )
    return finding.block


def _plan_layer(block: Block, recipe: Recipe) -> LayerPlan:
    n_experts = recipe.n_experts or matched_n_experts(block, recipe.expansion)
    if recipe.k > n_experts:
        raise RecipeError(
            f"recipe key 'k' is {recipe.k}, more than the {n_experts} experts of layer {block.layer}",
            expected="k of at most n_experts",
            fix="lower --k, or raise --n-experts or --expansion",
        )
    return LayerPlan(block, n_experts, recipe.k, layer_parameters(block, n_experts))


def layer_parameters(block: Block, n_experts: int) -> int:
    """Parameters of the `MxDLayer` for a block: encoder, decoder, bias, gate with biases, experts."""
    d, h = block.d_model, block.d_hidden
    encoder = h * (d + block.encoder_bias) * (2 if block.kind == "glu" else 1)
    return encoder + h * d + d + n_experts * (2 * d + 1)


def matched_n_experts(block: Block, expansion: float) -> int:
    """N such that the layer has the parameters of a transcoder with ``expansion * D`` features.

    Solves ``P = enc + H D + D + N (2D + 1)`` for ``P = m D (2D + 1) + D``, ``enc = H (D + 1)`` for an MLP and twice that for
    a GLU, as arXiv 2505.21364 does. At least 1.
    """
    d, h = block.d_model, block.d_hidden
    budget = expansion * d * (2 * d + 1) + d
    encoder = h * (d + 1) * (2 if block.kind == "glu" else 1)
    return max(1, int((budget - encoder - h * d - d) / (2 * d + 1)))


def read_plan(path: Path) -> Plan:
    """The plan saved beside a converted model."""
    return Plan.from_dict(json.loads(path.read_text(encoding="utf-8")))
