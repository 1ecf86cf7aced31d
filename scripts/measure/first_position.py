"""What a converted model's outputs at position 0 do to all later predictions.

Real models build an attention sink at the first position, by a few early layers with huge outputs there. Figures leave out the
prediction at position 0, but hold what those outputs do to the others.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mxdsurgery
from mxdsurgery.base.running import hidden_states
from mxdsurgery.base.surgery import ConstantOutput, FirstKept, replaced
from mxdsurgery.measuring.evaluate import load_original
from mxdsurgery.measuring.held_out import held_out
from mxdsurgery.measuring.intervals import scored_predictions
from mxdsurgery.measuring.scoring import prediction_sums, run_original
from mxdsurgery.recipe import Recipe, load_recipe
from mxdsurgery.text.packing import in_batches


def first_position(folder: Path, original: Path, tokens: int) -> list[dict[str, Any]]:
    """KL (nats per token) by context: without and with BOS, and with the original's outputs at position 0 as well.

    Args:
        folder: a model whose blocks alone are converted.
        original: the one that it was made from.
        tokens: of its recipe's held-out text.

    Returns:
        Rows with ``bos``, the number of ``contexts``, and ``kl``, ``median_kl`` and ``largest_kl`` of a context;
        ``kept_kl``: the mean with position 0 as in the original.
    """
    converted, recipe = mxdsurgery.load(folder), Recipe(**load_recipe(folder / "recipe.yaml"))
    model = load_original(converted, str(original), recipe)
    contexts = held_out(converted, recipe, tokens=tokens)
    bos = torch.full_like(contexts[:, :1], model.config.bos_token_id)
    return [
        {"bos": begun, "contexts": len(ids)} | _by_context(model, converted, ids)
        for begun, ids in ((False, contexts), (True, torch.cat([bos, contexts[:, :-1]], dim=1)))
    ]


@torch.no_grad()
def _by_context(model: nn.Module, converted: mxdsurgery.Converted, contexts: Tensor) -> dict[str, float]:
    blocks, length, layers = converted.plan.blocks, contexts.shape[1], converted.layers
    firsts = {index: ConstantOutput(torch.zeros(model.config.hidden_size)) for index in layers}
    kept_first = {index: FirstKept(layer, firsts[index], length) for index, layer in layers.items()}
    variants, found = {"converted": layers, "kept": kept_first}, {"converted": [], "kept": []}
    for ids in in_batches(contexts, 4 * length):
        before, states = run_original(model, blocks, ids), {}
        for index, module in firsts.items():
            module.first = before.y[index][:, :1]
        for name, modules in variants.items():
            with replaced(model, blocks, modules):
                states[name] = hidden_states(model, ids)
        for name, sums in prediction_sums(model, ids, before.hidden, states.items()):
            if name != "original":
                found[name].append(sums["kl"] / scored_predictions(ids))
    kl, kept = (torch.cat(parts) for parts in found.values())
    figures = {"kl": kl.mean(), "median_kl": kl.median(), "largest_kl": kl.max(), "kept_kl": kept.mean()}
    return {name: value.item() for name, value in figures.items()}
