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
from mxdsurgery.base.surgery import FirstKept, replaced
from mxdsurgery.measuring.evaluate import load_original
from mxdsurgery.measuring.held_out import held_out
from mxdsurgery.measuring.intervals import scored_predictions
from mxdsurgery.measuring.scoring import Original, prediction_sums, run_original
from mxdsurgery.recipe import Recipe, load_recipe
from mxdsurgery.text.packing import in_batches


class _Given(nn.Module):
    """Gives what it was told, whatever it gets."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, _: Tensor) -> Tensor:
        return self.output


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
    blocks, length, found = converted.plan.blocks, contexts.shape[1], {"converted": [], "kept": []}

    def states(ids: Tensor, before: Original) -> dict[str, Tensor]:
        layers = dict(converted.layers)
        kept = {index: FirstKept(layer, _Given(before.y[index][:, :1]), length) for index, layer in layers.items()}
        made = {}
        for name, modules in (("converted", layers), ("kept", kept)):
            with replaced(model, blocks, modules):
                made[name] = hidden_states(model, ids)
        return made

    for ids in in_batches(contexts, 4 * length):
        before = run_original(model, blocks, ids)
        for name, sums in prediction_sums(model, ids, before.hidden, states(ids, before).items()):
            if name != "original":
                found[name].append(sums["kl"] / scored_predictions(ids))
    kl, kept = (torch.cat(parts) for parts in found.values())
    figures = {"kl": kl.mean(), "median_kl": kl.median(), "largest_kl": kl.max(), "kept_kl": kept.mean()}
    return {name: value.item() for name, value in figures.items()}
