"""Distillation: each new layer learns its block's output from its block's input. `inputs` says where both come from.

Source of loss and schedule: arXiv 2505.21364.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mxdsurgery.base.activations import Activations, ShuffledPositions
from mxdsurgery.errors import DivergedError
from mxdsurgery.hardware.device import widest
from mxdsurgery.layers.baselines import TopKSAE, Transforms
from mxdsurgery.layers.layer import Coefficients, Experts, MxDLayer
from mxdsurgery.layers.sparse import sparse_gate
from mxdsurgery.recipe import Recipe
from mxdsurgery.runs.parallel import agree, average_gradients, text_shares
from mxdsurgery.runs.resume import optimizer_state, part, prefixed, restore_optimizer
from mxdsurgery.runs.run_folder import UNKEPT, Keeper
from mxdsurgery.training.accelerator import ranks_in
from mxdsurgery.training.adam import make_adam
from mxdsurgery.training.cost import LayerPlan, first_k
from mxdsurgery.training.losses import distillation_loss, frozen_gain, token_weights, zero_loss
from mxdsurgery.training.share import SHARES, ShareControl, ShareKept, SharesOf, look_steps
from mxdsurgery.training.thresholds import LearnedThresholds

# Losses are looked at every so many steps: looking waits for the device.
_CHECK_EVERY = 20
# A loss has diverged if it is this many times both the first loss and the loss of an output of zero.
_DIVERGED = 10.0
# K has fallen to its final value after this share of the steps.
_K_FALLS_UNTIL = 0.7
# Layers with experts learn best at so many times the recipe's rate (docs/tried.md), but for a Mixture of Decoders that starts
# otherwise than as its block.
_RATE_FACTOR = 4.0
# A gradient longer than this many times its usual length is cut to that; the usual length is a running mean over about so many
# steps. Adam steps the further the more a gradient exceeds those before it: in real models, where a few tokens have huge
# outputs, one batch could otherwise undo a layer (docs/tried.md).
_LONGEST, _REMEMBERED = 2.0, 10
# An expert is dead when it has not fired for this share of the training tokens.
_DEAD_AFTER = 0.1


@dataclass
class Progress:
    """Where a distillation stands; kept up to date while it runs, so that an interrupted one can be described."""

    steps: int
    tokens_per_step: int
    steps_before: int = 0  # of other groups of layers, in the same run
    step: int = 0
    seconds: float = 0.0
    lr: float = 0.0
    loss: dict[LayerPlan, float] = field(default_factory=dict)  # of distillation, over the last steps looked at
    nmse: dict[LayerPlan, float] = field(default_factory=dict)  # ‖ŷ-y‖²/‖y‖² over the same
    dead_share: dict[LayerPlan, float] = field(default_factory=dict)
    # Where a share is asked for, when they were last measured.
    expert_share: dict[LayerPlan, float] = field(default_factory=dict)
    few_experts_share: dict[LayerPlan, float] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Training tokens seen."""
        return self.step * self.tokens_per_step

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step == self.steps

    def by_layer(self) -> dict[str, dict[str, float]]:
        """The figures of each layer, by `layer_key`."""
        figures = {name: getattr(self, name) for name in ("loss", "nmse", "dead_share", *SHARES)}
        return {layer_key(plan): {name: of[plan] for name, of in figures.items() if plan in of} for plan in self.nmse}

    def row(self) -> dict[str, Any]:
        """Where it stands, for a run's metrics."""
        now = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "lr": self.lr}
        return now | {"layers": self.by_layer()}

    def state(self) -> dict[str, Any]:
        """The same, as `restore` wants it."""
        return self.row()

    def restore(self, state: Mapping[str, Any], layers: Iterable[LayerPlan]) -> None:
        """Goes on from a `state`, of these layers."""
        self.step, self.seconds, self.lr = state["step"], state["seconds"], state["lr"]
        for plan in layers:
            for name, value in state["layers"].get(layer_key(plan), {}).items():
                getattr(self, name)[plan] = value


class LayerInTraining:
    """A layer with what its training needs: Adam, the firing record and running sums between two looks.

    Args:
        name: for people.
        layer: fp32, on the device of the training.
        recipe: lr, moments, seed, unit_norm, specialise, expert_share, auxk, selection.
        dead_after: tokens without firing after which an expert is dead.
        steps: of the training.
    """

    def __init__(self, name: str, layer: nn.Module, recipe: Recipe, dead_after: float = math.inf, steps: int = 1000) -> None:
        self.name, self.layer, self.auxk, self.dead_after = name, layer, recipe.auxk, dead_after
        self.shares = text_shares(recipe)  # processes that each see a part of a batch
        self.experts: Experts | Transforms | None = getattr(layer, "experts", None)
        self.unit_norm = recipe.unit_norm and self.experts is not None
        self.steered = isinstance(layer, MxDLayer)  # elsewhere the experts multiply nothing
        self.specialise = recipe.penalty if self.steered else 0.0
        self.share: ShareControl | ShareKept | None = None
        if self.steered and recipe.share_target is not None:
            self.share = ShareControl(recipe.share_target, len(layer.bias), steps, layer.bias.device)
        if self.experts is not None:
            layer.gate.selection = ranks_in(recipe)
        jumps = self.experts is not None and layer.gate.sparsity == "jumprelu"
        self.thresholds = LearnedThresholds(layer.gate) if jumps else None
        learned = [] if self.thresholds is None else [self.thresholds.log]
        learned = [p for p in layer.parameters() if p.requires_grad] + learned
        self.optimizer = make_adam(learned, recipe)
        device = layer.bias.device
        # The training tokens seen when each expert last fired.
        n_experts = 0 if self.experts is None else layer.gate.n_experts
        self.last_fired = torch.zeros(n_experts, dtype=torch.int64, device=device)
        # Since the last look: the loss, the loss of an output of zero, ‖ŷ-y‖² and ‖y‖².
        self.sums = torch.zeros(4, dtype=widest(device), device=device)
        self.usual_gradient = torch.zeros((), device=device)  # its length; 0: none was seen yet
        self.first_loss: float | None = None
        self.last_loss, self.diverged = math.nan, False  # over the steps before the last look

    def agree(self) -> None:
        """Merges the firing records and the running sums of all processes that share the text."""
        agree(self.last_fired, self.shares)
        agree(self.sums, self.shares, mean=True)

    def state(self) -> dict[str, Tensor]:
        """All that training goes on from: weights, Adam's state, the firing record and the running sums."""
        first = math.nan if self.first_loss is None else self.first_loss
        record = {"last_fired": self.last_fired, "sums": self.sums, "first_loss": torch.tensor(first, dtype=torch.float64)}
        record["usual_gradient"] = self.usual_gradient
        if self.thresholds is not None:
            record["log_threshold"] = self.thresholds.log.detach()
        record |= {} if self.share is None else {"share": self.share.state()}
        return prefixed(self.layer.state_dict(), "weight") | prefixed(optimizer_state(self.optimizer), "adam") | record

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a `state`."""
        self.layer.load_state_dict(part(state, "weight"))
        restore_optimizer(self.optimizer, part(state, "adam"))
        if self.thresholds is not None:
            self.thresholds.restore(state["log_threshold"])
        self.last_fired.copy_(state["last_fired"])
        self.sums.copy_(state["sums"])
        self.usual_gradient.copy_(state["usual_gradient"])
        first = state["first_loss"].item()
        self.first_loss = None if math.isnan(first) else first
        if self.share is not None:
            self.share.restore(state["share"])

    def finish(self, k: int) -> None:
        """Ends training with K experts: from here on the layer computes as it will when it is reloaded."""
        self.set_k(k)
        if self.experts is not None:
            self.layer.gate.selection = self.layer.gate.learning = None

    @torch.no_grad()
    def shorten_gradient(self) -> None:
        """Cuts the layer's gradient to `_LONGEST` times its usual length, where it is longer."""
        gradients = [parameter.grad for parameter in self.layer.parameters() if parameter.grad is not None]
        length = nn.utils.get_total_norm(gradients)
        usual = torch.where(self.usual_gradient > 0, self.usual_gradient, length)
        kept = length.minimum(_LONGEST * usual)
        if kept.device.type != "cpu" or kept < length:  # to ask a GPU would be to wait for it
            for gradient in gradients:
                gradient.mul_(kept / length.clamp_min(1e-30))
        self.usual_gradient.copy_(usual + (kept - usual) / _REMEMBERED)

    def set_k(self, k: int) -> None:
        """Sets how many experts are active from here on; does nothing without experts."""
        if self.experts is not None:
            self.layer.gate.k = k

    def dead(self, tokens_seen: int) -> Tensor:
        """Which experts have not fired for `dead_after` tokens: (N,) bool. At first no expert is dead."""
        return self.last_fired < tokens_seen - self.dead_after

    def look(self, steps_since: int) -> float:
        """The NMSE since the last look; waits for the device."""
        self.agree()
        loss_sum, zero_sum, error, power = self.sums.tolist()
        self.sums.zero_()
        loss = self.last_loss = loss_sum / steps_since
        if self.first_loss is None:
            self.first_loss = loss
        grown = power > 0 and loss > _DIVERGED * max(self.first_loss, zero_sum / steps_since)
        self.diverged = not math.isfinite(loss) or grown
        return error / max(power, 1e-30)

    def check(self, step: int) -> None:
        """Raises DivergedError if the loss was NaN at the last look, or far above where it began."""
        if self.diverged:
            raise DivergedError(
                f"{self.name}: the loss is {self.last_loss:.3g} at step {step}, after {self.first_loss:.3g} at the start",
                expected="a falling loss",
                fix="lower --lr (a third of it), or raise --warmup, or train with --precision fp32",
            )


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Linear warm-up, constant, linear decay to zero; step counts from 0."""
    warmup, decay = recipe.warmup * steps, recipe.decay * steps
    rise = (step + 1) / warmup if warmup > 0 else 1.0
    fall = (steps - step) / decay if decay > 0 else 1.0
    return recipe.lr * min(1.0, rise, fall)


def rate_factor(plan: LayerPlan) -> float:
    """How many times the recipe's learning rate a layer is trained with."""
    return _RATE_FACTOR if plan.shared or plan.kind not in ("mxd", "dense") else 1.0


def active_experts(step: int, steps: int, k: int, first_k: int) -> int:
    """K at a step (from 0): it falls linearly from ``first_k`` to k over the first 70 % of the steps.

    Early on, more experts see more tokens, so that fewer die and all learn sooner; EleutherAI's sparsify anneals K too.
    """
    left = max(0.0, 1.0 - step / (_K_FALLS_UNTIL * steps))
    return k + round((first_k - k) * left)


def train_step(job: LayerInTraining, x: Tensor, y: Tensor, lr: float, tokens_seen: int, accelerator: Accelerator) -> None:
    """One Adam step of one layer on x, y (tokens, D) in fp32; ``tokens_seen`` counts the training's, these included."""
    layer, a = job.layer, None
    if isinstance(layer, TopKSAE):
        x = y
    with accelerator.autocast():
        scale, rest = layer.dense_path(x)
        if job.experts is None:
            y_hat = scale + rest
        else:
            a = layer.gate(x)
            y_hat = layer.mixture(a, x) * scale + rest
    weights = token_weights(y, job.shares)
    loss, zero = distillation_loss(y_hat, y, weights), zero_loss(y, weights)
    objective = loss
    if job.specialise > 0:
        objective = objective + job.specialise * frozen_gain(scale, y - rest, weights, job.shares)
    if job.share is not None:
        objective = objective + job.share.penalty(loss, zero, scale, rest, y, weights, job.shares)
    if job.auxk > 0 and a is not None:
        agree(job.last_fired, job.shares)
        objective = objective + job.auxk * _auxk_loss(job, x, scale.detach(), (y - y_hat).detach(), weights, tokens_seen)
    accelerator.backward(objective)
    average_gradients(layer.parameters(), job.shares)
    if job.unit_norm:
        _remove_radial_gradient(layer.experts.weight)
    job.shorten_gradient()
    for group in job.optimizer.param_groups:
        group["lr"] = lr
    if job.thresholds is not None:
        job.thresholds.charge()
    job.optimizer.step()
    if job.thresholds is not None:
        job.thresholds.follow()
    job.optimizer.zero_grad(set_to_none=True)  # at once: only one of the layers in training holds gradients at a time
    if job.unit_norm:
        layer.experts.normalize()
    with torch.no_grad():
        if a is not None:
            fired = (a.values > 0).flatten() * tokens_seen
            job.last_fired.scatter_reduce_(0, a.indices.flatten(), fired, "amax")
        error, power = (y_hat - y).square().sum(), y.square().sum()
        job.sums += torch.stack([loss.detach(), zero, error, power])


def _auxk_loss(
    job: LayerInTraining, x: Tensor, scale: Tensor, error: Tensor, weights: Tensor, tokens_seen: int
) -> Tensor | float:
    """The loss of the dead experts, D/2 of them per token, in predicting the error (tokens, D) that the living ones leave.

    It gives a gradient to experts that never fire. Source: Gao et al., arXiv 2406.04093, appendix A.2; scaled down
    where fewer than D/2 experts are dead, as EleutherAI's sparsify does.
    """
    dead = job.dead(tokens_seen).nonzero()[:, 0]
    if len(dead) == 0:
        return 0.0
    gate, most = job.layer.gate, x.shape[1] // 2
    values, chosen = sparse_gate(x, gate.weight[dead], gate.bias[dead], min(most, len(dead)), gate.selection)
    makes_up = job.layer.mixture(Coefficients(values, dead[chosen]), x) * scale
    return distillation_loss(makes_up, error, weights) * min(1.0, len(dead) / most)


def _remove_radial_gradient(weight: Tensor) -> None:
    """Removes the radial part of the gradient of C (N, D): it would only change the length of the rows, which is one."""
    with torch.no_grad():
        radial = torch.einsum("nd,nd->n", weight.grad, weight)
        weight.grad.addcmul_(weight, radial[:, None], value=-1)


def distill(
    layers: Mapping[LayerPlan, nn.Module],
    batches: Iterator[dict[int, Activations]],
    recipe: Recipe,
    accelerator: Accelerator,
    progress: Progress,
    report: Callable[[Progress], None],
    keeper: Keeper = UNKEPT,
    shares_of: SharesOf | None = None,
) -> None:
    """Trains all layers in place, each on the activations of the block that it stands for.

    Args:
        layers: each with the block that it stands for; several may stand for the same one. fp32, on the activations' device.
        batches: endless, by layer: inputs and targets (B T, D), which are removed as they are used. Where the training
            resumes from a checkpoint, they begin after those that it took before.
        recipe: lr, moments, warmup, decay, k_start, unit_norm, specialise, expert_share, auxk, selection,
            activation_buffer.
        accelerator: device, precision and trackers.
        progress: says how many steps; updated on the way.
        report: called now and then with the progress.
        keeper: holds what to resume from, if anything, and is told of every step.
        shares_of: measures what the layers' experts carry, for those that are to reach a share; default: it is taken to be
            the square of their share of the loss.

    Raises:
        DivergedError: naming the layer.
        Interrupted: the run was asked to stop.
    """
    dead_after = _DEAD_AFTER * progress.steps * progress.tokens_per_step
    jobs = {plan: LayerInTraining(plan.name, layer, recipe, dead_after, progress.steps) for plan, layer in layers.items()}
    blocks = list({plan.block.layer: plan.block for plan in layers}.values())
    wanted = itertools.islice(batches, progress.steps - batches_taken(progress, recipe))
    mixed = ShuffledPositions(wanted, recipe.activation_buffer, progress.tokens_per_step // text_shares(recipe), recipe.seed)
    if keeper.resumed is not None:
        for plan, job in jobs.items():
            job.restore(part(keeper.resumed, layer_key(plan)))
        mixed.restore(part(keeper.resumed, "mixed"), accelerator.device)
    begun, before = time.perf_counter(), progress.seconds
    looked_at = max(progress.step - progress.step % _CHECK_EVERY, min(1, progress.step))

    def state() -> Iterator[dict[str, Tensor]]:
        for name, tensor in mixed.state().items():
            yield {f"mixed.{name}": tensor}
        for plan, job in jobs.items():
            job.agree()
            yield prefixed(job.state(), layer_key(plan))

    looks = look_steps(progress.steps) if shares_of is not None else []
    for step in range(progress.step, progress.steps):
        progress.lr = learning_rate(step, progress.steps, recipe)
        tokens_seen = (step + 1) * progress.tokens_per_step
        activations = next(mixed)
        for block in blocks:
            x, y = (tensor.float() for tensor in activations.pop(block.layer))
            for plan, job in jobs.items():
                if plan.block.layer == block.layer:
                    job.set_k(active_experts(step, progress.steps, plan.k, first_k(plan, recipe)))
                    train_step(job, x, y, progress.lr * rate_factor(plan), tokens_seen, accelerator)
        if step + 1 in looks:
            _learn_shares(jobs, shares_of, progress)
        progress.step, progress.seconds = step + 1, before + time.perf_counter() - begun
        if progress.step % _CHECK_EVERY == 0 or progress.step in (1, progress.steps):
            _look(jobs, progress, progress.step - looked_at)
            looked_at = progress.step
            figures = {tracked(plan): value for plan, value in progress.nmse.items()}
            accelerator.log(figures | {"lr": progress.lr}, step=progress.steps_before + progress.step)
            report(progress)
            for job in jobs.values():
                job.check(progress.step)
        keeper.after(state)
    for plan, job in jobs.items():
        job.finish(plan.k)


def _learn_shares(jobs: Mapping[LayerPlan, LayerInTraining], shares_of: SharesOf, progress: Progress) -> None:
    """Measures what the experts carry, where that is steered, and asks for more or less."""
    steered = {plan: job for plan, job in jobs.items() if job.share is not None}
    found = shares_of({plan: job.layer for plan, job in steered.items()}) if steered else {}
    for plan, shares in found.items():
        if len(shares) == len(SHARES):
            steered[plan].share.learn(min(shares.values()))
        for name, share in shares.items():
            getattr(progress, name)[plan] = share


def batches_taken(progress: Progress, recipe: Recipe) -> int:
    """How many batches a training has taken when it has made this progress."""
    ahead = ShuffledPositions.ahead(recipe.activation_buffer, progress.tokens_per_step) if progress.step else 0
    return min(progress.steps, progress.step + ahead)


def _look(jobs: Mapping[LayerPlan, LayerInTraining], progress: Progress, steps_since: int) -> None:
    """Brings losses, NMSE and the share of dead experts up to date; waits for the device."""
    for plan, job in jobs.items():
        progress.nmse[plan] = job.look(steps_since)
        progress.loss[plan] = job.last_loss
        progress.dead_share[plan] = job.dead(progress.tokens).float().mean().item() if job.experts is not None else 0.0


def layer_key(plan: LayerPlan) -> str:
    """A layer's name in a run's files; several may stand for the same block."""
    return f"{plan.block.layer} {plan.kind} k{plan.k}"


def tracked(plan: LayerPlan) -> str:
    """The name of a layer's NMSE among a tracker's figures."""
    return "nmse/layer_" + layer_key(plan).replace(" ", "_")
