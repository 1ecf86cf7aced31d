"""Selects experts in bf16 and in fp32: how often the chosen sets differ, and what training with one or the other leads to.

    python scripts/measure/bench_selection.py MODEL --layer 3 --data TRAIN --eval-data HELDOUT --tokens 500k --json

The layer is trained twice from the same start, on the same text, with `selection: fp32` and with `bf16`. On the inputs that
held-out text gives it, the fp32-trained layer then selects with 0, 2, 4, 8 and 16 candidates beyond K: `same_set` is the share
of tokens whose K experts are fp32's, `same_experts` the share of chosen experts that are, and `mass_lost` the part of
their summed coefficients that the choice misses. Extra candidates -1: no ranking in fp32 at all, the bf16 product's first K.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

import mxdsurgery
from mxdsurgery.base.activations import record_activations
from mxdsurgery.layers import sparse
from mxdsurgery.layers.layer import Gate
from mxdsurgery.measuring.evaluate import load_original
from mxdsurgery.text.sources import Packing, TextStream

_EXTRA = (-1, 0, 2, 4, 8, 16)
FIGURES = ("delta_ce", "delta_ce_ci", "nmse", "expert_share")


def disagreement(gate: Gate, x: Tensor, extra: int) -> dict[str, float]:
    """How a bf16 selection with some extra candidates differs from the fp32 one: x (n, D)."""
    pre = gate.pre_activations(x)
    wanted = torch.topk(pre, gate.k).indices
    if extra < 0:
        low = torch.nn.functional.linear(x.bfloat16(), gate.weight.bfloat16(), gate.bias.bfloat16())
        chosen = torch.topk(low, gate.k).indices
    else:
        before, sparse.EXTRA_CANDIDATES = sparse.EXTRA_CANDIDATES, extra
        try:
            _, chosen = sparse.select(x, gate.weight, gate.bias, gate.k, torch.bfloat16)
        finally:
            sparse.EXTRA_CANDIDATES = before
    is_wanted = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, wanted, True).gather(1, chosen)
    mass, kept = (pre.gather(1, indices).relu().sum().item() for indices in (wanted, chosen))
    return {
        "same_set": round(is_wanted.all(1).float().mean().item(), 5),
        "same_experts": round(is_wanted.float().mean().item(), 6),
        "mass_lost": 1 - kept / mass,
    }


@click.command(help=__doc__)
@click.argument("model")
@click.option("--layer", default=3, show_default=True)
@click.option("--k", default=32, show_default=True)
@click.option("--data", required=True)
@click.option("--eval-data", required=True)
@click.option("--tokens", default="500k", show_default=True)
@click.option("--eval-tokens", default="18k", show_default=True)
@click.option("--json", "as_json", is_flag=True)
@torch.no_grad()
def main(model: str, layer: int, as_json: bool, **options: Any) -> None:
    result: dict[str, Any] = {"model": Path(model).name, "layer": layer, "k": options["k"], "trained_with": {}}
    with tempfile.TemporaryDirectory() as folder:
        for selection in ("bf16", "fp32"):
            with torch.enable_grad():
                made = mxdsurgery.convert(
                    model,
                    layers=str(layer),
                    selection=selection,
                    dtype="float32",
                    out=f"{folder}/{selection}",
                    **options,
                )
            figures = made.evaluation["all"]
            result["trained_with"][selection] = {name: figures[name] for name in FIGURES}
        converted = mxdsurgery.load(made.out)
        original = load_original(converted, made.recipe.model, made.recipe)
        packing = Packing(converted.tokenizer(), made.recipe.context, made.recipe.prepend_bos)
    ids = TextStream(made.recipe.eval_data, packing, made.recipe.text_column).spread(made.recipe.eval_tokens)
    x = record_activations(original, converted.plan.blocks, ids)[layer].x[:, 1:].flatten(0, 1)
    gate = converted.layers[layer].gate
    result |= {"n_experts": gate.weight.shape[0], "tokens": len(x), "steps": made.plan.steps}
    result["extra_candidates"] = {extra: disagreement(gate, x, extra) for extra in _EXTRA}
    click.echo(json.dumps(result) if as_json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
