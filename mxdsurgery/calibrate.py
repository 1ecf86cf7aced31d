"""How fast this machine trains: a few measured steps of one new layer, and a measured pass of the base model.

Weights, inputs and targets are random: what is computed, and so its time, does not depend on their values.
"""

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from mxdsurgery.accelerator import choose_kernels, make_accelerator
from mxdsurgery.activations import record_activations
from mxdsurgery.cost import BaseModel, Group, LayerPlan, Machine, base_forward_flops, first_k, layer_flops, tokens_per_step
from mxdsurgery.device import empty_cache
from mxdsurgery.distill import LayerInTraining, active_experts, train_step
from mxdsurgery.initialize import layer_shape
from mxdsurgery.recipe import Recipe
from mxdsurgery.replacement import LAYER_KINDS
from mxdsurgery.timing import median_seconds

# A measurement is repeated for so many seconds.
_SECONDS = 2.0
# A single step or pass takes at most about so many; where the whole batch would take longer, fewer tokens are measured.
_LONGEST = 4.0
# Tokens of the step that shows what a step costs whatever the batch: Adam, dense gradients, copies of the weights.
_FEW_TOKENS = 16
# Tokens of the step that tells how many more can be afforded.
_PROBE_TOKENS = 256
# A matrix product that takes so long is no matter of launching it.
_BUSY = 2e-3
# Base models whose weights take more than this are not built: their pass is computed from the rate of a matrix product.
_LARGEST_BUILT = 2 * 2**30


@dataclass(frozen=True)
class Calibration:
    """What was measured, for one batch of the recipe's size.

    Attributes:
        step_seconds: one training step of the largest new layer.
        step_flops: of that layer, per token.
        step_tokens: that were measured; where fewer than the batch, ``step_seconds`` is extrapolated.
        base_seconds: the base model's pass up to the last layer in training.
        base_flops: of that pass, per token.
        base_from: ``forward pass``, of the base model's shape with random weights, or ``matrix product``: FLOPs at the rate
            of one product in the base model's dtype, so that the true time is longer.
    """

    step_seconds: float
    step_flops: int
    step_tokens: int
    base_seconds: float
    base_flops: int
    base_from: str

    def seconds(self, group: Group, steps: int) -> float:
        """Of training a group; other layers and shorter passes scaled by their FLOPs."""
        layers = self.step_seconds * group.step_flops / self.step_flops
        base = self.base_seconds * group.flops["base_forward"] / self.base_flops
        return steps * (layers + base)


def calibrate(
    layers: list[LayerPlan], base: BaseModel, config: PreTrainedConfig, recipe: Recipe, machine: Machine
) -> Calibration:
    """Measures, in seconds.

    Args:
        layers: that are planned.
        base: the base model's shape.
        config: its config.
        recipe: batch, context, precision, device.
        machine: as the plan sees it.
    """
    largest = max(layers, key=lambda layer: sum(layer_flops(layer).values()))
    step_seconds, step_tokens = _measure_step(largest, recipe, machine.device)
    last = max(layer.block.layer for layer in layers)
    built = base.weight_bytes <= _LARGEST_BUILT
    flops = base_forward_flops(base, last, recipe.context)
    if built:
        base_seconds = _measure_pass(layers, base, config, recipe, machine.device)
    else:
        base_seconds = flops * tokens_per_step(recipe) / matmul_rate(machine.device, base.dtype)
    empty_cache(machine.device)
    return Calibration(
        step_seconds=step_seconds,
        step_flops=sum(layer_flops(largest).values()),
        step_tokens=step_tokens,
        base_seconds=base_seconds,
        base_flops=flops,
        base_from="forward pass" if built else "matrix product",
    )


def matmul_rate(device: str, dtype: str) -> float:
    """FLOPs per second of one matrix product, as large as it takes to keep the device busy."""
    for side in (1024, 8192):
        a = torch.randn(side, side, device=device, dtype=getattr(torch, dtype))
        seconds = median_seconds(lambda a=a: a @ a, 0.2)
        if seconds > _BUSY:
            break
    return 2 * side**3 / seconds


def _measure_step(layer: LayerPlan, recipe: Recipe, device: str) -> tuple[float, int]:
    """Seconds of one training step on a whole batch, and the tokens that were measured for it."""
    batch = tokens_per_step(recipe)
    step = _training_step(layer, recipe, batch, device)
    if batch > _PROBE_TOKENS:
        few = median_seconds(lambda: step(_FEW_TOKENS), 0.5)
        probe = median_seconds(lambda: step(_PROBE_TOKENS), 0.5)
        per_token = max(probe - few, 1e-9) / (_PROBE_TOKENS - _FEW_TOKENS)
        affordable = int((_LONGEST - few) / per_token)
        if affordable < batch:
            tokens = max(_PROBE_TOKENS, affordable)
            many = median_seconds(lambda: step(tokens), _SECONDS)
            return few + max(many - few, 0.0) * (batch - _FEW_TOKENS) / (tokens - _FEW_TOKENS), tokens
    return median_seconds(lambda: step(batch), _SECONDS), batch


def _training_step(layer: LayerPlan, recipe: Recipe, batch: int, device: str) -> Callable[[int], None]:
    """Takes a step of a new layer of this shape, on the given number of tokens."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        accelerator = make_accelerator(dataclasses.replace(recipe, tracker="none"))
        made = LAYER_KINDS[layer.kind](**layer_shape(layer))
        x, y = torch.randn(2, batch, layer.block.d_model)
    choose_kernels(accelerator, d_model=layer.block.d_model, n_experts=layer.n_experts, k=layer.k, tokens=batch)
    job = LayerInTraining(layer.name, made, recipe)
    job.set_k(round(statistics.mean(active_experts(step, 100, layer.k, first_k(layer, recipe)) for step in range(100))))
    return lambda tokens: train_step(job, x[:tokens], y[:tokens], recipe.lr, tokens, accelerator)


def _measure_pass(layers: list[LayerPlan], base: BaseModel, config: PreTrainedConfig, recipe: Recipe, device: str) -> float:
    """Seconds of the base model's pass over a whole batch; over fewer contexts, and scaled, where that takes too long."""
    blocks = [layer.block for layer in layers]
    contexts = recipe.batch // recipe.context
    with torch.random.fork_rng(devices=[]), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, base.dtype)).eval()
        input_ids = torch.randint(base.vocabulary, (contexts, recipe.context))

    def forward(count: int) -> None:
        record_activations(model, blocks, input_ids[:count])

    one = median_seconds(lambda: forward(1), 0.2)
    count = max(1, min(contexts, int(_LONGEST / 2 / one)))
    return median_seconds(lambda: forward(count), _SECONDS) * contexts / count
