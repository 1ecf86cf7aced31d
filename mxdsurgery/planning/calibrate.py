"""How fast this machine trains, evaluates and exports: each of their parts is measured for a moment.

Weights, inputs and targets are random, because the operations, and so their time, do not depend on the values. Of several
times the shortest counts: whatever else the machine does only adds to it.
"""

import dataclasses
import functools
import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from mxdsurgery.base.activations import record_activations
from mxdsurgery.base.blocks import distinct
from mxdsurgery.base.scores import known_predictions, next_token_scores
from mxdsurgery.hardware.device import empty_cache, widest
from mxdsurgery.hardware.randomness import OwnNumbers
from mxdsurgery.hardware.timing import best_seconds
from mxdsurgery.layers.replacement import LAYER_KINDS
from mxdsurgery.layers.sparse import chunk_bytes
from mxdsurgery.planning.effort import (
    EVALUATION_SHARE,
    Alone,
    Rates,
    evaluation_runs,
    fitted_per_scored,
    looking_runs,
    solving_seconds,
)
from mxdsurgery.recipe import Recipe
from mxdsurgery.training.accelerator import choose_kernels, make_accelerator, ranks_in
from mxdsurgery.training.cost import (
    BaseShape,
    Group,
    LayerPlan,
    Machine,
    base_forward_flops,
    first_k,
    fit_flops,
    largest_layer,
    layer_flops,
    steered,
    tokens_per_step,
)
from mxdsurgery.training.distill import LayerInTraining, active_experts, train_step
from mxdsurgery.training.initialize import layer_shape
from mxdsurgery.training.share import LOOKS

# A measurement is repeated for so many seconds.
_SECONDS = 2.0
# The training is divided into so many parts, in each of which K is taken as constant.
_PARTS = 100
# A single measured step or pass takes at most about so many seconds; if a whole batch would take longer, fewer tokens are run.
_LONGEST = 4.0
# Tokens of the step that shows the cost that does not depend on the batch: Adam, dense gradients, copies of the weights.
_FEW_TOKENS = 16
# Tokens of the step that shows how many tokens can be afforded.
_PROBE_TOKENS = 256
# How much is written to measure the disk's speed.
_WRITTEN_BYTES = 2**26
# What a process imports to reload a checkpoint, and the seconds assumed for that where measuring is not worth it.
_RELOADS = "import torch; from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM"
USUAL_START = 6.0
# In a matrix product that takes so many seconds, launching it does not matter.
_BUSY = 2e-3
# Base models whose weights take more than this are not built: their pass is computed from the rate of a matrix product.
_LARGEST_BUILT = 2 * 2**30


@dataclass(frozen=True)
class Calibration:
    """What was measured, for one batch of the recipe's size.

    Attributes:
        step_seconds: one training step of the largest new layer, on average over the training, as K falls.
        step_flops: FLOPs of that layer's step, per token.
        step_tokens: tokens that were measured; if fewer than the batch, ``step_seconds`` is extrapolated.
        base_seconds: the base model's pass up to the last layer in training.
        base_flops: FLOPs of that pass, per token.
        base_from: ``forward pass``, of the base model's shape with random weights, or ``matrix product``: FLOPs at the rate
            of one product in the base model's dtype, so that the true time is longer. Where nothing was measured, what all was
            predicted from.
        k_seconds: pairs of a K and the seconds of that step with it, from the K at the end to the K at the start. Empty in
            what an older version wrote; the entries below are then 0.
        head_seconds: of the language-model head, and of comparing its predictions with others.
        forward_seconds: of that layer's forward pass, in the base model's dtype.
        start_seconds: of a new process, until it can load a model.
        bytes_per_second: writing speed of the result's disk; None where it was not measured.
        wide_rate: FLOPs per second of a product in the widest dtype; None where none was needed.
        predicted: whether all of it follows from a GPU's peak figures, and nothing was measured.
    """

    step_seconds: float
    step_flops: int
    step_tokens: int
    base_seconds: float
    base_flops: int
    base_from: str
    k_seconds: list[list[float]] = field(default_factory=list)
    head_seconds: float = 0.0
    forward_seconds: float = 0.0
    start_seconds: float = 0.0
    bytes_per_second: float | None = None
    wide_rate: float | None = None
    predicted: bool = False

    def cost(self, groups: Sequence[Group], steps: int, batch: int) -> Callable[[float], float]:
        """A function from a number of tokens to the seconds they take, from the training's start, all groups in turn.

        K falls in each group.

        Args:
            groups: in order.
            steps: of each.
            batch: tokens per step.
        """
        ends = [0.0]  # of every part of every group
        for group in groups:
            base = self._base_seconds(group)
            layers = self.seconds(group, 1) - base
            each = [base + layers * step / self.step_seconds for step in schedule(self.k_seconds or [[1, self.step_seconds]])]
            ends += [ends[-1] + steps / _PARTS * so_far for so_far in itertools.accumulate(each)]
        tokens = np.linspace(0, len(groups) * steps * batch, len(ends))
        return lambda done: float(np.interp(done, tokens, ends))

    def rates(self, layer: LayerPlan, base: BaseShape, last: int, contexts: int) -> Rates:
        """The seconds that a context takes in each part of evaluation.

        Args:
            layer: the largest new layer.
            base: the base model.
            last: the last decoder layer of the pass that was measured.
            contexts: in a batch.
        """
        decoder_layer = self.base_seconds / (last + 1)
        block = decoder_layer * layer.block.parameters / base.layer_parameters[layer.block.layer]
        return Rates(decoder_layer / contexts, max(0.0, self.forward_seconds - block) / contexts, self.head_seconds / contexts)

    def evaluation_seconds(
        self, layers: Sequence[LayerPlan], base: BaseShape, recipe: Recipe, training_seconds: float
    ) -> float:
        """Seconds to evaluate the layers, several of which may replace the same block, after so many seconds of training."""
        every = distinct(layer.block for layer in layers)
        last, contexts = max(block.layer for block in every), max(1, recipe.eval_tokens // recipe.context)
        kinds = [layer.kind for layer in layers if layer.block.layer == last]
        rates = self.rates(largest_layer(layers), base, last, recipe.batch // recipe.context)
        runs = evaluation_runs(every, len(base.layer_parameters), contexts, recipe.context, kinds)
        together, single = map(rates.seconds, runs)
        once = solving_seconds(every, kinds, lambda: self.wide_rate or math.inf)
        alone = Alone(recipe.eval_tokens_single, EVALUATION_SHARE * training_seconds)
        return once + contexts * together + alone.contexts(together, single, contexts, recipe.context, once) * single

    def looking_seconds(self, layers: Sequence[LayerPlan], base: BaseShape, recipe: Recipe, tokens: int) -> float:
        """Seconds to measure, again and again, what the experts of layers in training carry, on so many tokens each time."""
        blocks = [layer.block for layer in steered(layers, recipe)]
        if not blocks:
            return 0.0
        rates = self.rates(largest_layer(layers), base, max(block.layer for block in blocks), recipe.batch // recipe.context)
        contexts = len(LOOKS) * max(1, tokens // recipe.context)
        fitted = fitted_per_scored(recipe.tokens, tokens)
        return contexts * rates.seconds(looking_runs(blocks, len(base.layer_parameters), fitted))

    def export_seconds(self, checkpoint_bytes: int) -> float:
        """Seconds to write a checkpoint and to load it twice in a new process: as a model, and as a language model."""
        return self.start_seconds + (3 * checkpoint_bytes / self.bytes_per_second if self.bytes_per_second else 0.0)

    def _base_seconds(self, group: Group) -> float:
        return self.base_seconds * group.flops["base_forward"] / self.base_flops

    def seconds(self, group: Group, steps: int) -> float:
        """Seconds to train a group; other layers and shorter passes are scaled by their FLOPs."""
        layers = self.step_seconds * group.step_flops / self.step_flops
        return steps * (layers + self._base_seconds(group))


def calibrate(
    layers: list[LayerPlan],
    base: BaseShape,
    config: PreTrainedConfig,
    recipe: Recipe,
    machine: Machine,
    share: float = 1.0,
) -> Calibration:
    """Measures this machine, in about ten seconds.

    Args:
        layers: the planned layers.
        base: the base model's shape.
        config: its config.
        recipe: batch, context, precision, device.
        machine: as the plan sees it.
        share: share of that time to spend; a short run is not worth all of it.
    """
    largest, seconds = largest_layer(layers), share * _SECONDS
    k_seconds, step_tokens = _measure_step(largest, recipe, machine.device, seconds)
    last = max(layer.block.layer for layer in layers)
    built = base.weight_bytes <= _LARGEST_BUILT
    flops = base_forward_flops(base, last, recipe.context)
    if built:
        base_seconds = _measure_pass(layers, base, config, recipe, machine.device, seconds)
    else:
        base_seconds = flops * tokens_per_step(recipe) / matmul_rate(machine.device, base.dtype)
    head_seconds = _measure_head(base, recipe, machine.device, seconds / 4)
    forward_seconds = _measure_forward(largest, base, recipe, machine.device, seconds / 4)
    empty_cache(machine.device)
    return Calibration(
        step_seconds=statistics.mean(schedule(k_seconds)),
        step_flops=sum(layer_flops(largest).values()),
        step_tokens=step_tokens,
        base_seconds=base_seconds,
        base_flops=flops,
        base_from="forward pass" if built else "matrix product",
        k_seconds=k_seconds,
        head_seconds=head_seconds,
        forward_seconds=forward_seconds,
        start_seconds=_measure_start() if share == 1.0 else USUAL_START,
        bytes_per_second=_measure_disk(Path(recipe.out)),
        wide_rate=wide_rate(machine.device) if any(fit_flops(layer.block, layer.kind) for layer in layers) else None,
    )


def schedule(k_seconds: Sequence[Sequence[float]]) -> list[float]:
    """A step's seconds in every part of the training, by its K; interpolated linearly between those that were measured."""
    ks, seconds = zip(*k_seconds, strict=True)
    parts = (active_experts(part, _PARTS, int(ks[0]), int(ks[-1])) for part in range(_PARTS))
    return [float(np.interp(k, ks, seconds)) for k in parts]


@functools.cache  # a property of the machine, not of the plan
def matmul_rate(device: str, dtype: str) -> float:
    """FLOPs per second of one matrix product, as large as it takes to keep the device busy."""
    for side in (1024, 8192):
        a = torch.randn(side, side, device=device, dtype=getattr(torch, dtype))
        seconds = best_seconds(lambda a=a: a @ a, 0.2)
        if seconds > _BUSY:
            break
    return 2 * side**3 / seconds


def wide_rate(device: str) -> float:
    """As `matmul_rate`, in the widest dtype that the device has."""
    return matmul_rate(device, str(widest(torch.device(device))).removeprefix("torch."))


def _measure_step(layer: LayerPlan, recipe: Recipe, device: str, seconds: float) -> tuple[list[list[float]], int]:
    """Pairs of a K and the seconds of one training step with it on a whole batch; and the number of tokens measured.

    K is that of the first step, that of the last, and one between them, because a step's time is not linear in K.
    """
    batch = tokens_per_step(recipe)
    step = _training_step(layer, recipe, batch, device)
    first, last = first_k(layer, recipe), layer.k
    ks = sorted({first, (first + last) // 2, last})
    seconds, tokens = seconds / len(ks), batch
    if batch > _PROBE_TOKENS:
        few = best_seconds(lambda: step(first, _FEW_TOKENS), seconds / 4)
        probe = best_seconds(lambda: step(first, _PROBE_TOKENS), seconds / 4)
        per_token = max(probe - few, 1e-9) / (_PROBE_TOKENS - _FEW_TOKENS)
        tokens = min(batch, max(_PROBE_TOKENS, int((_LONGEST - few) / per_token)))
    found = []
    for k in ks:
        taken = best_seconds(lambda k=k: step(k, tokens), seconds)
        if tokens < batch:
            few = best_seconds(lambda k=k: step(k, _FEW_TOKENS), seconds / 4)
            taken = few + max(taken - few, 0.0) * (batch - _FEW_TOKENS) / (tokens - _FEW_TOKENS)
        found.append([k, taken])
    return found, tokens


def _training_step(layer: LayerPlan, recipe: Recipe, batch: int, device: str) -> Callable[[int, int], None]:
    """A function that takes a training step of a new layer of this shape, with a given K on a given number of tokens."""
    with OwnNumbers.on(device), torch.device(device):
        accelerator = make_accelerator(dataclasses.replace(recipe, tracker="none"))
        made = LAYER_KINDS[layer.kind](**layer_shape(layer))
        x, y = torch.randn(2, batch, layer.block.d_model)
    shape = {"d_model": layer.block.d_model, "n_experts": layer.n_experts, "k": layer.k}
    choose_kernels(accelerator, **shape, tokens=batch, selection=ranks_in(recipe))
    job = LayerInTraining(layer.name, made, recipe)

    def step(k: int, tokens: int) -> None:
        job.set_k(k)
        train_step(job, x[:tokens], y[:tokens], recipe.lr, tokens, accelerator)

    return step


def _measure_pass(
    layers: list[LayerPlan], base: BaseShape, config: PreTrainedConfig, recipe: Recipe, device: str, seconds: float
) -> float:
    """Seconds of the base model's pass over a whole batch; measured on fewer contexts and scaled where that takes too long."""
    blocks = [layer.block for layer in layers]
    contexts = recipe.batch // recipe.context
    with OwnNumbers.on(device), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, base.dtype)).eval()
        input_ids = torch.randint(base.vocabulary, (contexts, recipe.context))

    def forward(count: int) -> None:
        record_activations(model, blocks, input_ids[:count])

    one = best_seconds(lambda: forward(1), seconds / 10)
    count = max(1, min(contexts, int(_LONGEST / 2 / one)))
    return best_seconds(lambda: forward(count), seconds) * contexts / count


@torch.no_grad()
def _measure_head(base: BaseShape, recipe: Recipe, device: str, seconds: float) -> float:
    """Seconds of the head, and of comparing its predictions, on a whole batch; measured on as many tokens as run together."""
    batch = tokens_per_step(recipe)
    rows = min(batch, max(1, chunk_bytes(device) // (4 * base.vocabulary)))
    with OwnNumbers.on(device), torch.device(device):
        head = nn.Linear(base.d_model, base.vocabulary, bias=False, dtype=getattr(torch, base.dtype))
        hidden, following = torch.randn(rows, base.d_model, dtype=head.weight.dtype), torch.randint(base.vocabulary, (rows,))
    known = known_predictions(head(hidden))
    return best_seconds(lambda: next_token_scores(head(hidden), known, following), seconds) * batch / rows


@torch.no_grad()
def _measure_forward(layer: LayerPlan, base: BaseShape, recipe: Recipe, device: str, seconds: float) -> float:
    """Seconds of a new layer's forward pass on a whole batch; measured on fewer tokens and scaled if that takes too long."""
    batch, dtype = tokens_per_step(recipe), getattr(torch, base.dtype)
    with OwnNumbers.on(device), torch.device(device):
        made = LAYER_KINDS[layer.kind](**layer_shape(layer)).to(dtype).eval()
        x = torch.randn(batch, layer.block.d_model, dtype=dtype)
    few = best_seconds(lambda: made(x[:_PROBE_TOKENS]), seconds / 4)
    tokens = max(1, min(batch, int(_LONGEST / 4 / few * _PROBE_TOKENS)))
    return best_seconds(lambda: made(x[:tokens]), seconds) * batch / tokens


def _measure_start() -> float:
    """Seconds until a new process can load a model."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-I", "-c", _RELOADS], capture_output=True, check=False)
    return time.perf_counter() - start


def _measure_disk(out: Path) -> float | None:
    """Bytes per second that can be written where ``out`` is to be; None where nothing can be written."""
    nearest = next((parent for parent in out.absolute().parents if parent.exists()), Path.cwd())
    block = os.urandom(2**20)
    try:
        with tempfile.TemporaryFile(dir=nearest) as file:
            start = time.perf_counter()
            for _ in range(_WRITTEN_BYTES // len(block)):
                file.write(block)
            os.fsync(file.fileno())
            return _WRITTEN_BYTES / (time.perf_counter() - start)
    except OSError:
        return None
