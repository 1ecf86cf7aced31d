"""Training end to end: all new layers together, toward the original model's predictions of the next token.

A layer that was trained alone never saw what the layers below it get wrong. Here the whole model runs with the new layers in
it, and the loss is KL(original ‖ converted), in nats per token; each layer's own distance from its block's output and the
penalty on what frozen experts could do (mxdsurgery.training.distill) may be added. Only the new layers learn, and adapters of
the attention where there are any; everything else is frozen.
"""

import contextlib
import copy
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mxdsurgery.base.decoder import decoder_layers, vocabulary_size
from mxdsurgery.base.dtypes import stored_in
from mxdsurgery.base.lora import Adapters
from mxdsurgery.base.running import hidden_states, predict
from mxdsurgery.base.surgery import answering, replaced
from mxdsurgery.errors import DivergedError
from mxdsurgery.hardware.device import widest
from mxdsurgery.recipe import Recipe
from mxdsurgery.runs.parallel import agree, average_gradients, first_ones, rank, text_shares
from mxdsurgery.runs.resume import optimizer_state, part, prefixed, restore_optimizer
from mxdsurgery.runs.run_folder import UNKEPT, Keeper
from mxdsurgery.training.cost import LayerPlan, first_k
from mxdsurgery.training.distill import LayerInTraining, Progress, active_experts, layer_key, learning_rate, tracked
from mxdsurgery.training.share import ShareKept
from mxdsurgery.training.standing import Standing
from mxdsurgery.training.teacher import Example, parts

# Losses are looked at every so many steps: looking waits for the device.
_CHECK_EVERY = 10
# An expert is dead when it has not fired for this share of the training tokens.
_DEAD_AFTER = 0.1
# Gradients are clipped: the norm of all of them together is at most this.
_LONGEST_GRADIENT = 1.0


@dataclass(frozen=True)
class Settings:
    """How to train end to end, beside the recipe's keys.

    Attributes:
        local: weight of each layer's own loss, its squared distance from the block's output over the output's size.
        accumulate: examples per optimiser step; each is a forward and a backward pass.
        checkpointing: gradient checkpointing: keep each decoder layer's input only, and compute the rest again in the backward
            pass.
        anneal: K falls from the recipe's ``k_start``, as for layers that start fresh; else it is k throughout.
        validations: how many times KL on the validation text is measured, beside once at the start.
        patience: stop after so many validations without a new best, in the second half of the steps: layers that are good at
            the start get worse at first. None: never.
        keeps_shares: hold what each layer's experts carry at what it is at the start.
    """

    local: float = 0.0
    accumulate: int = 1
    checkpointing: bool = False
    anneal: bool = False
    validations: int = 10
    patience: int | None = None
    keeps_shares: bool = False


@dataclass
class EndToEnd(Progress):
    """Where the training stands; kept up to date while it runs, so that an interrupted one can be described.

    Attributes:
        kl: KL(original ‖ converted) on the training text since the last look, nats per token.
        validation: (step, KL) on the validation text, of the layers as they would be written; the first is of the start.
        best_step: the step at which KL on the validation text was lowest; 0 is the start.
        best: while it trains, the layers' weights at that step, rounded as they will be stored, on the CPU.
        best_adapters: while it trains, the adapters' weights at that step, on the CPU.
        stopped: whether it ended early, because no new best came.
    """

    kl: float = math.nan
    validation: list[tuple[int, float]] = field(default_factory=list)
    best_step: int = 0
    best: dict[LayerPlan, dict[str, Tensor]] = field(default_factory=dict, repr=False)
    best_adapters: dict[str, Tensor] = field(default_factory=dict, repr=False)
    stopped: bool = False

    def row(self) -> dict[str, Any]:  # noqa: D102
        looked = bool(self.validation) and self.validation[-1][0] == self.step
        return super().row() | {"kl": self.kl} | ({"validation_kl": self.validation[-1][1]} if looked else {})

    def state(self) -> dict[str, Any]:  # noqa: D102
        return self.row() | {"validation": self.validation, "best_step": self.best_step, "stopped": self.stopped}

    def restore(self, state: Mapping[str, Any], layers: Iterable[LayerPlan]) -> None:  # noqa: D102
        super().restore(state, layers)
        self.kl, self.best_step, self.stopped = state["kl"], state["best_step"], state["stopped"]
        self.validation = [(step, kl) for step, kl in state["validation"]]

    @property
    def best_tokens(self) -> int:
        """Training tokens seen at the best step."""
        return self.best_step * self.tokens_per_step

    @property
    def best_kl(self) -> float:
        """The lowest KL on the validation text."""
        return min(kl for _, kl in self.validation)


def kl_and_gradient(
    model: PreTrainedModel, hidden: Tensor, example: Example, accelerator: Accelerator
) -> tuple[Tensor, Tensor]:
    """KL(original ‖ model) per token over positions but 0, and its gradient with respect to the hidden states.

    The gradient is computed part by part, so that the logits of a few tokens exist at a time.

    Args:
        model: whose frozen head is used.
        hidden: (B, T, D), what its head is given.
        example: what the original says.
        accelerator: for its precision.

    Returns:
        A scalar fp32, and (B, T, D) like hidden, zero at position 0.
    """
    flat = hidden.detach()[:, 1:].flatten(0, 1)
    total, gradient = torch.zeros((), device=hidden.device), torch.zeros_like(hidden)
    pieces = []
    for rows in parts(len(flat), vocabulary_size(model)):
        part = flat[rows].requires_grad_()
        with torch.enable_grad():
            with accelerator.autocast():
                logits = predict(model, part)
            kl = example.targets.kl(logits, rows)
        pieces.append(torch.autograd.grad(kl, part)[0])
        total += kl.detach()
    gradient[:, 1:] = (torch.cat(pieces) / len(flat)).view_as(hidden[:, 1:])
    return total / len(flat), gradient


@torch.no_grad()
def validation_kl(model: PreTrainedModel, examples: Iterable[Example]) -> float:
    """KL(original ‖ model as it is), nats per token over positions but 0."""
    total, tokens = 0.0, 0
    for example in examples:
        flat = hidden_states(model, example.ids)[:, 1:].flatten(0, 1)
        for rows in parts(len(flat), vocabulary_size(model)):
            total += example.targets.kl(predict(model, flat[rows]), rows).item()
        tokens += len(flat)
    return total / tokens


def train_end_to_end(
    model: PreTrainedModel,
    layers: Mapping[LayerPlan, nn.Module],
    examples: Iterator[Example],
    validation: Sequence[Example],
    recipe: Recipe,
    settings: Settings,
    accelerator: Accelerator,
    state: EndToEnd,
    report: Callable[[EndToEnd], None],
    adapters: Adapters | None = None,
    keeper: Keeper = UNKEPT,
) -> None:
    """Trains all layers in place, together; they keep their best weights on the validation text; the start counts too.

    Args:
        model: the model whose blocks they stand for; it is left as it was. It may be the original itself: the layers stand in
            it only while it runs for them.
        layers: fp32, on the model's device, those weights frozen that are not to learn.
        examples: endless; where the training resumes from a checkpoint, they begin after those that it took before.
        validation: examples of text that is not trained on.
        recipe: lr, warmup, decay, k_start, unit_norm, specialise, selection.
        settings: what else.
        accelerator: device, precision and trackers.
        state: says how many steps; updated on the way.
        report: called now and then with the state.
        adapters: of the model's attention, that learn with the layers or alone.
        keeper: holds what to resume from, if anything, and is told of every step.

    Raises:
        DivergedError: a loss became NaN or grew without bound.
        Interrupted: the run was asked to stop.
    """
    trainer = _Trainer(model, layers, recipe, settings, accelerator, state, adapters)
    every = max(1, state.steps // settings.validations)
    with _checkpointed(model) if settings.checkpointing else contextlib.nullcontext():
        if keeper.resumed is not None:
            trainer.resume(keeper.resumed)
        else:
            trainer.validate(validation)
            report(state)
        start, before = time.perf_counter(), state.seconds
        for step in range(state.step, state.step if state.stopped else state.steps):
            trainer.step(step, examples)
            state.step, state.seconds = step + 1, before + time.perf_counter() - start
            looks = state.step % every == 0 or state.step == state.steps
            if looks:
                trainer.validate(validation)
            if looks or state.step % _CHECK_EVERY == 0 or state.step == 1:
                trainer.look()
                report(state)
                trainer.check()
            if looks:
                since = sum(at > max(state.best_step, state.steps // 2) for at, _ in state.validation)
                if settings.patience is not None and since >= settings.patience and state.step < state.steps:
                    state.stopped = True
                    break
            keeper.after(trainer.kept)
        keeper.finished(trainer.kept)
    trainer.restore()


class _Trainer:
    """What one step, one look and one validation need."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Mapping[LayerPlan, nn.Module],
        recipe: Recipe,
        settings: Settings,
        accelerator: Accelerator,
        state: EndToEnd,
        adapters: Adapters | None,
    ) -> None:
        self.model, self.recipe, self.settings, self.accelerator = model, recipe, settings, accelerator
        self.state, self.adapters, self.shares = state, adapters, text_shares(recipe)
        dead_after = _DEAD_AFTER * state.steps * state.tokens_per_step
        self.jobs = {plan: LayerInTraining(plan.name, layer, recipe, dead_after) for plan, layer in layers.items()}
        for job in self.jobs.values() if settings.keeps_shares else ():
            if job.steered:
                job.share = ShareKept(len(job.layer.bias), job.layer.bias.device)
        self.blocks = [plan.block for plan in layers]
        self.standing = {plan.block.layer: Standing(job, settings.local) for plan, job in self.jobs.items()}
        self.optimizers = [job.optimizer for job in self.jobs.values()]
        if adapters is not None:
            self.optimizers.append(torch.optim.Adam(adapters.parameters(), lr=recipe.lr, fused=True))
        device = accelerator.device
        self.kl_sum, self.looked_at = torch.zeros((), dtype=widest(device), device=device), 0

    def step(self, step: int, examples: Iterator[Example]) -> None:
        """One optimiser step."""
        for standing in self.standing.values():
            standing.train()
            standing.tokens_seen = (step + 1) * self.state.tokens_per_step
        for plan, job in self.jobs.items():
            start = first_k(plan, self.recipe) if self.settings.anneal else plan.k
            job.set_k(active_experts(step, self.state.steps, plan.k, start))
        for example in itertools.islice(examples, self.settings.accumulate):
            self._backward(example)
        parameters = [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
        average_gradients(parameters, self.shares)
        learned = [job.thresholds for job in self.jobs.values() if job.thresholds is not None]
        for thresholds in learned:
            thresholds.charge()
        nn.utils.clip_grad_norm_(parameters, _LONGEST_GRADIENT)
        lr = self.state.lr = learning_rate(step, self.state.steps, self.recipe)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for thresholds in learned:
            thresholds.follow()
        for job in self.jobs.values():
            if job.unit_norm:
                job.experts.normalize()

    def kept(self) -> Iterator[dict[str, Tensor]]:
        """All that training goes on from: layers and adapters, as they are now and as they were at the best step."""
        agree(self.kl_sum, self.shares, mean=True)
        yield {"kl_sum": self.kl_sum, "looked_at": torch.tensor(self.looked_at)}
        for plan, job in self.jobs.items():
            job.agree()
            yield prefixed(job.state(), f"layer {layer_key(plan)}")
            yield prefixed(self.state.best[plan], f"best {layer_key(plan)}")
        if self.adapters is not None:
            yield prefixed(self.adapters.state(), "adapters") | prefixed(self.state.best_adapters, "best adapters")
            yield prefixed(optimizer_state(self.optimizers[-1]), "adapters' adam")

    def resume(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes on from what `kept` gave."""
        self.kl_sum.copy_(tensors["kl_sum"])
        self.looked_at = int(tensors["looked_at"])
        for plan, job in self.jobs.items():
            job.restore(part(tensors, f"layer {layer_key(plan)}"))
            self.state.best[plan] = part(tensors, f"best {layer_key(plan)}")
        if self.adapters is not None:
            self.adapters.load(part(tensors, "adapters"))
            self.state.best_adapters = part(tensors, "best adapters")
            restore_optimizer(self.optimizers[-1], part(tensors, "adapters' adam"))

    def _backward(self, example: Example) -> None:
        """One example's share of the gradient."""
        for layer, standing in self.standing.items():
            standing.target, standing.watched = example.targets.y.get(layer), True
        share = 1.0 / self.settings.accumulate
        with replaced(self.model, self.blocks, self.standing):
            with self.accelerator.autocast():
                hidden = hidden_states(self.model, example.ids)
            kl, gradient = kl_and_gradient(self.model, hidden, example, self.accelerator)
            for standing in self.standing.values():
                standing.watched = False
            own = [standing.loss for standing in self.standing.values() if standing.loss.requires_grad]
            gradients = [gradient * share, *(torch.full_like(loss, share) for loss in own)]
            torch.autograd.backward([hidden, *own], gradients)
        for standing in self.standing.values():
            standing.target = standing.loss = None
        self.kl_sum += kl.to(self.kl_sum) * share

    def look(self) -> None:
        """Brings the state's figures of the training text up to date; waits for the device."""
        state, since = self.state, self.state.step - self.looked_at
        agree(self.kl_sum, self.shares, mean=True)
        state.kl, self.looked_at = self.kl_sum.item() / since, state.step
        self.kl_sum.zero_()
        for plan, job in self.jobs.items():
            state.nmse[plan] = job.look(since * self.settings.accumulate)
            state.loss[plan] = job.last_loss
            state.dead_share[plan] = job.dead(state.tokens).float().mean().item() if job.experts is not None else 0.0
        figures = {tracked(plan): value for plan, value in state.nmse.items()} | {"kl": state.kl}
        self.accelerator.log(figures, step=state.steps_before + state.step)

    def check(self) -> None:
        """Raises DivergedError if at the last look a loss was NaN or infinite.

        What is merely worse than before is not written, and may get better: the best weights are. A layer's own distance says
        little: one output near zero that it misses is many times as far off, relatively.
        """
        losses = {"the KL": self.state.kl, **{job.name: job.last_loss for job in self.jobs.values()}}
        for name, loss in losses.items():
            if not math.isfinite(loss):
                raise DivergedError(
                    f"training end to end: {name} at step {self.state.step} is {loss}",
                    expected="a loss that falls",
                    fix="lower --lr (a third of it), or raise --warmup, or train with --precision fp32",
                )

    def validate(self, validation: Sequence[Example]) -> None:
        """Looks at the validation text with the layers as they would be written, and keeps them if they are the best."""
        state = self.state
        written = {plan: _as_written(plan, job.layer, self.model) for plan, job in self.jobs.items()}
        merged = contextlib.nullcontext() if self.adapters is None else self.adapters.as_written()
        with replaced(self.model, self.blocks, {plan.block.layer: layer for plan, layer in written.items()}), merged:
            # The first process decides which weights are best, and when to stop: to rounding, the others may find otherwise.
            kl = first_ones(None if rank() else validation_kl(self.model, validation))
        if not state.validation or kl < state.best_kl:
            state.best_step = state.step
            state.best = {plan: _on_cpu(layer.state_dict()) for plan, layer in written.items()}
            state.best_adapters = {} if self.adapters is None else _on_cpu(self.adapters.state())
        state.validation.append((state.step, kl))

    def restore(self) -> None:
        """Puts the best weights back into the layers and adapters, which from here on compute as they will when reloaded."""
        for plan, job in self.jobs.items():
            job.layer.load_state_dict(self.state.best[plan])
            job.layer.eval()
            job.finish(plan.k)
        if self.adapters is not None:
            self.adapters.load(self.state.best_adapters)
        self.state.best, self.state.best_adapters = {}, {}


def _as_written(plan: LayerPlan, layer: nn.Module, model: PreTrainedModel) -> nn.Module:
    """A copy of a layer in training, rounded to the dtype that the model is stored in, ready to compute in the model."""
    made = copy.deepcopy(layer).to(stored_in(model)).to(model.dtype).eval().requires_grad_(False)
    if hasattr(made, "gate"):
        made.gate.k, made.gate.selection, made.gate.learning = plan.k, None, None
    return made


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


@contextmanager
def _checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """While open, each decoder layer keeps its input only and is computed again in the backward pass.

    Not by transformers' ``gradient_checkpointing_enable``: it asks for training mode, which turns dropout on.
    """
    _, layers = decoder_layers(model)
    with contextlib.ExitStack() as stack:
        for layer in layers:
            again = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
            stack.enter_context(answering(layer, again))
        yield
