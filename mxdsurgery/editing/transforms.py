"""Edits of a mixture of linear transforms in its weights: of kind ``molt``, where an expert is ``U_n V_n``, no vector c_n."""

import torch
from torch import Tensor

from mxdsurgery.checkpoint.converted import Converted
from mxdsurgery.editing.edits import Edits
from mxdsurgery.errors import EditError
from mxdsurgery.layers.baselines import Molt, Transforms

# Edits that would need other weights than a MOLT has, and why.
_IMPOSSIBLE = {
    "replace": "a transform has no c_n, but matrices of its own",
    "merge": "the mean of some transforms is of a higher rank than theirs",
    "steer": "a transform that is added to every token is a dense map of it, which has no place there",
}


def check_transforms(edits: Edits, converted: Converted) -> None:
    """Raises EditError where an edit of a MOLT cannot stand in its weights."""
    for layer in edits.layers:
        module = converted.layers[layer]
        if not isinstance(module, Molt):
            continue
        for kind, why in _IMPOSSIBLE.items():
            if layer in getattr(edits, kind):
                live = "" if kind == "replace" else f", or {kind} while the model runs: with model.mxd.{kind}(...)"
                raise EditError(
                    f"layer {layer} is a molt: {kind} cannot stand in its weights, as {why}",
                    expected="ablate, drop, scale or copy",
                    fix=f"give other edits{live}",
                )
        for expert, source in edits.copy.get(layer, {}).items():
            mine, theirs = (rank_of(module.experts, n) for n in (expert, source))
            if mine != theirs:
                raise EditError(
                    f"layer {layer}: transform {expert} has rank {mine}, and {source}, which it is to copy, rank {theirs}",
                    expected="a transform of the same rank",
                    fix="name another one, or copy while the model runs: with model.mxd.copy(...)",
                )


def baked_transforms(edits: Edits, layer: int, held: dict[str, Tensor], experts: Transforms) -> dict[str, Tensor]:
    """As `mxdsurgery.editing.baking.baked`, of a MOLT.

    Args:
        edits: what to do, checked by `check_transforms`.
        layer: its index.
        held: the layer's tensors by name.
        experts: where its transforms' rows are.

    Returns:
        Only the tensors that changed, new: ``experts.weight``, ``experts.reads``, ``gate.bias``.
    """
    old = {name: held[name] for name in ("experts.weight", "experts.reads", "gate.bias")}
    new = {name: tensor.clone() for name, tensor in old.items()}
    writes = new["experts.weight"]
    dropped = torch.tensor(edits.drop.get(layer, []), dtype=torch.int64, device=writes.device)
    new["gate.bias"].index_fill_(0, dropped, torch.finfo(writes.dtype).min)
    for expert in edits.ablate.get(layer, []):
        writes[experts.rows(expert)] = 0
    for expert, factor in edits.scale.get(layer, {}).items():
        rows = experts.rows(expert)
        writes[rows] = (writes[rows].float() * factor).to(writes.dtype)
    for expert, source in edits.copy.get(layer, {}).items():
        for name in ("experts.weight", "experts.reads"):
            new[name][experts.rows(expert)] = old[name][experts.rows(source)]
    return {name: tensor for name, tensor in new.items() if not torch.equal(tensor, old[name])}


def rank_of(experts: Transforms, n: int) -> int:
    """The rank of transform n."""
    rows = experts.rows(n)
    return rows.stop - rows.start
