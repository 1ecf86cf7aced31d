"""The layers whose experts are examined, one of a converted folder or all that a frontier kept, with the original model."""

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mxdsurgery.base.activations import record_activations
from mxdsurgery.base.blocks import Block
from mxdsurgery.base.decoder import layer_count
from mxdsurgery.base.model import check_context
from mxdsurgery.base.selection import one_layer
from mxdsurgery.checkpoint.converted import RECIPE_FILE, load, saved_recipe, settle
from mxdsurgery.checkpoint.writing import check_file, write_json
from mxdsurgery.errors import DataError, LayerSelectionError
from mxdsurgery.measuring.evaluate import check_before_loading, load_original
from mxdsurgery.measuring.frontier_table import FRONTIER_FILE, layer_file, load_layer, read_frontier
from mxdsurgery.planning.plan import open_and_plan
from mxdsurgery.recipe import Recipe
from mxdsurgery.text.labelled import Labelled, TokenBatch, token_batches
from mxdsurgery.text.packing import Packing
from mxdsurgery.text.places import check_there, text_name
from mxdsurgery.training.accelerator import make_accelerator

# The original block's own units, which experts are compared with.
HIDDEN_UNITS = "hidden units"


@dataclass(frozen=True)
class ExpertLayers:
    """Layers with experts in place of one block.

    Attributes:
        model: the original model, on the device.
        tokenizer: the model's.
        block: the block that the layers replace.
        layers: by name, in the model's dtype and on its device.
        recipe: the one that they were made with.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    block: Block
    layers: dict[str, nn.Module]
    recipe: Recipe

    def batches(self, labelled: Labelled, context: int | None) -> list[TokenBatch]:
        """The texts as the model reads them, each cut after ``context`` tokens; default: the recipe's.

        Raises:
            RecipeError: the model reads no contexts of so many tokens.
            DataError: no text has a token that counts.
        """
        if context is not None:
            check_context(self.model.config, context)
        packing = Packing(self.tokenizer, context or self.recipe.context, self.recipe.prepend_bos)
        batches = token_batches(labelled.texts, packing, self.recipe.batch)
        if not any(batch.counted.any() for batch in batches):
            raise DataError(
                "no text has two tokens or more, the beginning-of-text token included where there is one",
                expected="texts with a token that something is predicted from",
                fix="give longer texts with --data",
            )
        return batches


def open_expert_layers(
    folder: str | Path,
    layer: int | None = None,
    *,
    data: str | None = None,
    kept_in: str | None = None,
    base: str | None = None,
    device: str | None = None,
    compute: str | None = None,
    trust_remote_code: bool = False,
) -> ExpertLayers:
    """Opens what ``convert`` or ``frontier`` wrote.

    Args:
        folder: what one of them wrote.
        layer: default: the first that has experts.
        data: a text that will be read, looked for before any weights are.
        kept_in: the folder within it where a result will be kept (`keep_beside`), checked before, too.
        base: the original model, if it is no longer where the recipe says.
        device: ``auto``, ``cpu``, ``cuda``, ``mps`` or ``xpu``; default: the recipe's.
        compute: dtype to compute in; ``auto``: as stored, or float32 where that is faster here; default: the recipe's.
        trust_remote_code: run the code that came with the base model, where it has its own; see `load`.

    Raises:
        NotConvertedError, OutputError: the folder is neither, or the result could not be kept.
        DataError: the text is not on this machine.
        LayerSelectionError: it has no such layer, or none with experts.
        BaseModelError, ModelNotFoundError: the original model is missing, or is not the one that the folder was made from.
    """
    folder = Path(folder)
    if (folder / FRONTIER_FILE).is_file():
        check_there(data)
        opener = _of_frontier
    else:
        check_before_loading(folder, data, base, trust_remote_code)
        opener = _of_converted
    if kept_in is not None:
        check_file(folder / kept_in / "result.json")
    return opener(folder, layer, base, device, compute, trust_remote_code)


def block_inputs(
    model: PreTrainedModel,
    block: Block,
    batches: Sequence[TokenBatch],
    report: Callable[[int, int], None] = lambda _done, _total: None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The inputs of a block of the model on texts, batch by batch.

    Args:
        model: the model.
        block: one of its blocks.
        batches: the texts.
        report: called with the texts done and to do.

    Yields:
        x (n, D) of the n tokens that count, on the model's device; and the index of each token's text, (n,) int64.
    """
    done, total = 0, sum(len(batch.rows) for batch in batches)
    for batch in batches:
        x = record_activations(model, [block], batch.input_ids.to(model.device))[block.layer].x
        yield x[batch.counted.to(x.device)], batch.rows[:, None].expand_as(batch.counted)[batch.counted]
        done += len(batch.rows)
        report(done, total)


def keep_beside(folder: str | Path, what: str, data: str | None, layer: int, result: dict[str, Any]) -> None:
    """Keeps a result as ``<folder>/<what>/<data>-layer<layer>.json``."""
    name = f"layer{layer}.json"
    if data is not None:
        text = text_name(data).split(".")[0] if os.path.exists(data) else text_name(data)
        name = re.sub(r"[^\w.-]", "_", text) + "-" + name
    write_json(Path(folder) / what / name, result)


def _of_converted(
    folder: Path, layer: int | None, base: str | None, device: str | None, compute: str | None, trusted: bool
) -> ExpertLayers:
    converted = load(folder, trust_remote_code=trusted)
    recipe = settle(converted, saved_recipe(folder, device), compute)
    planned = {entry.block.layer: entry for entry in converted.plan.layers if entry.n_experts}
    index = _chosen(layer, list(planned), folder, layer_count(converted.model))
    accelerator = make_accelerator(recipe)
    model = load_original(converted, base or recipe.model, recipe).to(accelerator.device)
    layers = {planned[index].what: converted.layers[index].to(accelerator.device)}
    return ExpertLayers(model, converted.tokenizer(), planned[index].block, layers, recipe)


def _of_frontier(
    folder: Path, layer: int | None, base: str | None, device: str | None, compute: str | None, trusted: bool
) -> ExpertLayers:
    found = read_frontier(folder)
    rows = [row for row in found.rows if row["k"] is not None]
    index = _chosen(layer, sorted({row["layer"] for row in rows}), folder)
    recipe = found.recipe
    recipe = dataclasses.replace(recipe, device=device or recipe.device, model=base or recipe.model)
    asked = {"layers": str(index), "k": 1, "device": recipe.device, "compute": compute or recipe.compute}
    asked["trust_remote_code"] = trusted
    made, _, base_model = open_and_plan(recipe.model, folder / RECIPE_FILE, asked)
    recipe = made.settled(recipe)
    accelerator = make_accelerator(recipe)
    how = {"dtype": made.dtype, "compute": recipe.compute, "device": accelerator.device}
    model = base_model.load(**how)
    paths = {f"{row['kind']}, K = {row['k']}": (row["kind"], row["k"]) for row in rows if row["layer"] == index}
    kept = {name: load_layer(layer_file(folder, index, *which)) for name, which in paths.items()}
    layers = {name: layer.to(accelerator.device, model.dtype) for name, layer in kept.items()}
    return ExpertLayers(model, base_model.tokenizer(), made.blocks[0], layers, recipe)


def _chosen(layer: int | None, there: list[int], folder: Path, n_layers: int | None = None) -> int:
    if not there:
        raise LayerSelectionError(f"{str(folder)!r} holds no experts", expected="a layer of another kind than dense")
    return there[0] if layer is None else one_layer(layer, there, folder, n_layers)
