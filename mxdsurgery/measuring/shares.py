"""What the experts of layers carry while they train, each alone, measured again and again on the same text; and in the end.

An evaluation says it in cross-entropy, on much text. Here a share is measured in KL from the original's predictions: on
little text that is known up to four times as well, as which token happened to follow does not count. Where predictions are
wrong about the text it is some hundredths larger. A mean ratio makes up for that, one for all layers: a layer learns the
same whichever others are in training.

What the layers are compared with is fitted on more text than is scored: a few experts would else suit just the tokens that
they are scored on.

Shapes: S contexts, B of them at a time, T tokens, D model width.
"""

import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxdsurgery.base.activations import record_activations
from mxdsurgery.base.blocks import Block
from mxdsurgery.base.decoder import decoder_layers
from mxdsurgery.base.offload import execution_device
from mxdsurgery.base.running import hidden_states
from mxdsurgery.base.surgery import ConstantOutput, FirstKept, FrozenExperts, replaced, resumed_at
from mxdsurgery.errors import MxDWarning
from mxdsurgery.hardware.device import widest
from mxdsurgery.measuring.controls import FewExperts
from mxdsurgery.measuring.intervals import with_interval
from mxdsurgery.measuring.scoring import Original, prediction_sums, run_original
from mxdsurgery.measuring.usage import UsageSums
from mxdsurgery.terminal.figures import with_range
from mxdsurgery.training.cost import LayerPlan
from mxdsurgery.training.share import SHARES

# How near a share has to come to what was asked for.
NEAR = 0.05
# KL of each scored context, by layer and by what stands in its block's place.
_Found = dict[tuple[LayerPlan, str], Tensor]
# A share in cross-entropy over that in KL: .9 to 1 on small models (docs/tried.md).
_RATIO = 0.93


class _Float32(nn.Module):
    """A module in fp32, in a model of another dtype."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.module(x.float()).to(x.dtype)


class Shares:
    """Measures the `expert_share` and `few_experts_share` of layers as `fidelity.measure` does, on little text, of each alone.

    Args:
        model: the original model; it is left as it was.
        contexts: to measure on, (S, T).
        batch: tokens per forward pass.
        fitted: contexts per one that is scored, on which what the layers are compared with is fitted: every so many-th of the
            contexts is scored.
    """

    def __init__(self, model: PreTrainedModel, contexts: Tensor, batch: int, fitted: int = 1) -> None:
        self.model = model
        contexts = contexts.to(execution_device(model))
        self.fitted, self.scored = (part.split(max(1, batch // part.shape[1])) for part in (contexts, contexts[::fitted]))
        self._without: dict[int, Tensor] = {}  # KL without the block, by layer: it does not change

    @torch.no_grad()
    def __call__(self, layers: Mapping[LayerPlan, nn.Module]) -> dict[LayerPlan, dict[str, float]]:
        """By layer, in fp32 and on the model's device; without shares that are no numbers."""
        blocks = list({plan.block.layer: plan.block for plan in layers}.values())
        stand_ins = self._stand_ins(layers, blocks)
        parts: dict[tuple[LayerPlan, str], list[Tensor]] = defaultdict(list)
        for ids in self.scored:
            original = run_original(self.model, blocks, ids)
            runs = self._runs(stand_ins, ids, original)
            for name, sums in prediction_sums(self.model, ids, original.hidden, runs, lambda _name: ("kl",)):
                if name != "original":
                    parts[name].append(sums["kl"])
        kl = {name: torch.cat(sums) for name, sums in parts.items()}
        for plan in layers:
            if (plan, "zero") in kl:
                self._without[plan.block.layer] = kl[plan, "zero"]
        return {plan: self._shares(plan, kl) for plan in layers}

    def _shares(self, plan: LayerPlan, kl: _Found) -> dict[str, float]:
        converted = kl[plan, "converted"]
        worth = self._without[plan.block.layer] - converted
        found = {name: with_interval(name, kl[plan, name] - converted, worth, signed=True)[name] for name in SHARES}
        return {name: _RATIO * share for name, share in found.items() if share is not None}

    def _stand_ins(
        self, layers: Mapping[LayerPlan, nn.Module], blocks: Sequence[Block]
    ) -> dict[LayerPlan, dict[str, nn.Module]]:
        """What each layer is compared with, from its use of experts on this text; without a block only the first time."""
        sums = {plan: UsageSums() for plan in layers}
        for ids in self.fitted:
            recorded = record_activations(self.model, blocks, ids)
            for plan, layer in layers.items():
                x, y = (part[:, 1:].flatten(0, 1).float() for part in recorded[plan.block.layer])
                sums[plan].add(layer, x, y.to(widest(y.device)))
        made, length = {}, self.scored[0].shape[1]
        for plan, layer in layers.items():
            usage = sums[plan].usage()
            made[plan] = {
                "converted": layer,
                "expert_share": FirstKept(FrozenExperts(layer, usage.best_constant), layer, length),
                "few_experts_share": FirstKept(FewExperts(layer, usage.few.to(layer.bias)), layer, length),
            }
            if plan.block.layer not in self._without:
                made[plan]["zero"] = ConstantOutput(torch.zeros_like(layer.bias))
        return made

    def _runs(
        self, stand_ins: Mapping[LayerPlan, Mapping[str, nn.Module]], ids: Tensor, original: Original
    ) -> Iterator[tuple[tuple[LayerPlan, str], Tensor]]:
        """The hidden states (B, T, D) with each layer alone, and with what it is compared with."""
        _, decoder = decoder_layers(self.model)
        for plan, of_layer in stand_ins.items():
            for name, module in of_layer.items():
                if name == "zero":
                    module.first = original.y[plan.block.layer][:, :1]
                with (
                    replaced(self.model, [plan.block], {plan.block.layer: _Float32(module)}),
                    resumed_at(decoder, plan.block.layer, original.layer_outputs),
                ):
                    hidden = hidden_states(self.model, ids)
                yield (plan, name), hidden


def warn_of_shortfalls(evaluation: Mapping[str, Any], target: float) -> None:
    """Warns (MxDWarning) of the layers of an evaluation whose experts carry less than was asked for, by more than `NEAR`."""
    found = []
    for entry in evaluation["layers"]:
        shares = [entry.get(name) for name in SHARES]
        if None in shares:
            found.append(f"no number in layer {entry['layer']}, which may be worth nothing on this text")
        elif min(shares) < target - NEAR:
            name = min(SHARES, key=entry.get)
            found.append(f"{with_range(entry, name, '.2f')} in layer {entry['layer']} ({name})")
    if found:
        warnings.warn(
            f"an expert_share of {target:.2f} was asked for, and held-out text shows less: {'; '.join(found)}. Experts learn "
            "to carry more with more training tokens, a larger k or more experts",
            MxDWarning,
            stacklevel=2,
        )
