"""``plan``: what a conversion would make of a model, and what it would take, before any weight is read."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mxdsurgery.base.analyze import analysis_of
from mxdsurgery.base.blocks import Block, distinct
from mxdsurgery.base.model import BaseModel, check_context
from mxdsurgery.errors import MemoryBudgetError, RecipeError
from mxdsurgery.hardware.device import devices
from mxdsurgery.hardware.guard import guarded_with
from mxdsurgery.hardware.memory import free_memory
from mxdsurgery.hardware.threads import use_threads
from mxdsurgery.planning.budget import needed_bytes, refusal, stored
from mxdsurgery.planning.calibrate import Calibration, calibrate, matmul_rate
from mxdsurgery.planning.effort import look_tokens
from mxdsurgery.planning.host import host_bytes, host_refusal
from mxdsurgery.planning.machine import this_machine
from mxdsurgery.planning.resolve import base_shape, open_base, resolve_recipe, saying_whose
from mxdsurgery.recipe import RECIPE_KEYS, Recipe
from mxdsurgery.terminal.console import Cost
from mxdsurgery.training.activation_cache import batch_bytes
from mxdsurgery.training.adam import moment_bytes
from mxdsurgery.training.cost import (
    DTYPE_BYTES,
    WEIGHT,
    BaseShape,
    Group,
    LayerPlan,
    Machine,
    checkpoint_bytes,
    evaluation_bytes,
    make_groups,
    states_bytes,
    tokens_per_step,
)
from mxdsurgery.training.parameters import layer_parameters, matched_n_experts, transcoder_parameters

# A run that takes fewer seconds, at the rate of a matrix product, starts at once: its time is not predicted.
WORTH_PREDICTING = 2.0
# For a run that takes fewer seconds than this, the machine is measured for a shorter time.
_WORTH_ALL_OF_IT = 60.0


@dataclass(frozen=True)
class Plan:
    """A conversion, resolved: which blocks become what. Plain data: `to_dict` and `from_dict` convert it for JSON.

    Attributes:
        model: the base model, as it was named.
        revision: the commit on the hub, if it came from there.
        model_type: transformers' name of the architecture.
        architecture: the causal language model's class.
        dtype: the one that the base model and the result are stored in.
        original_parameters: number of parameters of the base model.
        recipe_file: the recipe that the settings came from.
        steps: optimiser steps of each layer.
        layers: in order.
        machine: what it was planned for.
        groups: the layers that are trained together, in order; each group is one pass over the text. Empty in what an older
            version wrote, as are the entries below.
        evaluation_bytes: peak of evaluation and export.
        host_bytes: peak of host memory beside a device that has its own, of training or loading; 0 where it shares the host's.
        disk_bytes: needed on disk while the result is written; with ``overwrite``, that includes an old result of this size.
        calibration: the measurements that the times rest on.
        unmeasured: why there is no time.
        refusal: what was found, what was expected and what to do, if the conversion does not fit the memory budget.
        offloaded: whether the base model's weights stay on disk, except those of the decoder layer at work.
        states_bytes: size of the text's hidden states that are kept from layer to layer.
        states_on_disk: whether they are kept on disk, for as long as the conversion lasts.
        left: the layers that ``layers: all`` leaves unconverted: by reason, the layers as a selection.
        evaluation_seconds: None where it was not measured; so is the next one.
        export_seconds: of writing the result and reloading it.
        eval_tokens_single: held-out tokens that each layer alone is measured on; None until training has shown how many.
        cache_bytes: size of all activations that ``cache_activations`` keeps on disk; 0 where it keeps none.
        look_tokens: tokens of other text on which it is measured, while the layers learn, what their experts carry; 0 where no
            share is asked for, and in what an older version wrote.
    """

    model: str
    revision: str | None
    model_type: str
    architecture: str
    dtype: str
    original_parameters: int
    recipe_file: str
    steps: int
    layers: list[LayerPlan]
    machine: Machine | None = None
    groups: list[Group] = field(default_factory=list)
    evaluation_bytes: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0
    calibration: Calibration | None = None
    unmeasured: str | None = None
    refusal: dict[str, str] | None = None
    offloaded: bool = False
    states_bytes: int = 0
    states_on_disk: bool = False
    left: dict[str, str] = field(default_factory=dict)
    evaluation_seconds: float | None = None
    export_seconds: float | None = None
    eval_tokens_single: int | None = None
    look_tokens: int = 0
    cache_bytes: int = 0

    @property
    def blocks(self) -> list[Block]:
        """The blocks that are replaced, in order."""
        return [layer.block for layer in self.layers]

    @property
    def trained_parameters(self) -> int:
        """Number of parameters of all new layers."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Number of parameters of the converted model."""
        return self.original_parameters + sum(layer.all_parameters - layer.block.parameters for layer in self.layers)

    @property
    def checkpoint_bytes(self) -> int:
        """Size of the converted model's weights on disk."""
        return DTYPE_BYTES[self.dtype] * self.parameters

    @property
    def peak_bytes(self) -> int:
        """Peak memory of training, on the device that trains."""
        return max((group.peak_bytes for group in self.groups), default=0)

    @property
    def flops(self) -> dict[str, int]:
        """FLOPs per token of the text, by part, of all passes over the text together."""
        names = self.groups[0].flops if self.groups else ()
        return {name: sum(group.flops[name] for group in self.groups) for name in names}

    @property
    def seconds(self) -> float | None:
        """Seconds to train all groups; None where it was not measured."""
        if not self.groups or any(group.seconds is None for group in self.groups):
            return None
        return sum(group.seconds for group in self.groups)

    @property
    def total_seconds(self) -> float | None:
        """Seconds of training, evaluation and export; None where one of them was not measured."""
        stages = (self.seconds, self.evaluation_seconds, self.export_seconds)
        return None if None in stages else sum(stages)

    def resume_bytes(self, recipe: Recipe) -> int:
        """Size of the largest checkpoint to resume from: layers in training with Adam's moments, and finished ones."""
        in_training = WEIGHT + moment_bytes(recipe)
        if recipe.inputs == "joint":  # also as they were at the best step so far
            in_training += DTYPE_BYTES[self.machine.compute or self.dtype]
        finished, largest = 0, 0
        for group in self.groups:
            largest = max(largest, finished + in_training * group.parameters)
            finished += DTYPE_BYTES[self.dtype] * group.parameters
        return max(largest, finished)

    def training_cost(self, recipe: Recipe) -> Cost | None:
        """What `Calibration.cost` gives, to predict the time that is left; None where nothing was measured."""
        if self.calibration is None:
            return None
        return self.calibration.cost(self.groups, self.steps, tokens_per_step(recipe))

    def settled(self, recipe: Recipe) -> Recipe:
        """The recipe with what was chosen for this machine in place of each ``auto``: compute, precision, selection."""
        precision, selection = ("bf16" if chosen else "fp32" for chosen in (self.machine.bf16, self.machine.selection))
        return dataclasses.replace(
            recipe, compute=self.machine.compute or self.dtype, precision=precision, selection=selection
        )

    def computing_as(self, settled: Recipe) -> "Plan":
        """The plan with the dtypes that a settled recipe computes in."""
        if self.machine is None:  # of an older version
            return self
        chosen = {"compute": settled.compute, "bf16": settled.precision == "bf16", "selection": settled.selection == "bf16"}
        if self.machine.compute != settled.compute:
            chosen["compute_why"] = "as the run began"
        return dataclasses.replace(self, machine=dataclasses.replace(self.machine, **chosen))

    def check_budget(self) -> None:
        """Raises MemoryBudgetError if the conversion does not fit the memory budget."""
        if self.refusal is not None:
            raise MemoryBudgetError(**self.refusal)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields, and the totals that follow from them."""
        totals = {
            "trained_parameters": self.trained_parameters,
            "parameters": self.parameters,
            "passes": len(self.groups),
            "peak_bytes": self.peak_bytes,
            "checkpoint_bytes": self.checkpoint_bytes,
            "flops": self.flops,
            "seconds": self.seconds,
            "total_seconds": self.total_seconds,
        }
        groups = [dataclasses.asdict(group) | {"peak_bytes": group.peak_bytes} for group in self.groups]
        return dataclasses.asdict(self) | {"groups": groups, "totals": totals}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Plan":
        """The plan from what `to_dict` gave, also in an older version, which had no groups."""
        read = {name: value for name, value in values.items() if name != "totals"}
        read["layers"] = [LayerPlan(**row | {"block": Block.from_dict(row["block"])}) for row in values["layers"]]
        names = [f.name for f in dataclasses.fields(Group)]
        read["groups"] = [Group(**{name: row[name] for name in names if name in row}) for row in values.get("groups", ())]
        for name, kind in (("machine", Machine), ("calibration", Calibration)):
            read[name] = kind(**values[name]) if values.get(name) is not None else None
        return cls(**read)


@guarded_with(*RECIPE_KEYS)
def plan(model: str, *, recipe: str | Path | None = None, measure: bool = False, **overrides: Any) -> tuple[Plan, Recipe]:
    """Resolves a conversion without reading any weights, and says what it takes.

    Args:
        model: hub id, local folder, ``demo-glu`` or ``demo-mlp``.
        recipe: a recipe file or the name of one that comes with mxdsurgery; default: the one made for the model.
        measure: whether to measure this machine for some seconds, to predict the time of the conversion.
        **overrides: recipe keys; those that are None count as not given. ``threads`` applies from here on to all that this
            process computes.

    Returns:
        The plan and the resolved recipe. Where it does not fit the memory budget, the plan's ``refusal`` says so.

    Raises:
        RecipeError: an unknown key, a wrong value, a dtype that is not supported, or more active experts than experts.
        LayerSelectionError: a layer that the model does not have.
        UnsupportedBlockError: a chosen layer's block cannot be converted.
        ModelNotFoundError, GatedModelError, UnknownFamilyError, NotCausalLMError: see `mxdsurgery.base.model.open_model`.
    """
    made, resolved, _ = open_and_plan(model, recipe, overrides, measure)
    return made, resolved


def open_and_plan(
    model: str, recipe: str | Path | None, overrides: dict[str, Any], measure: bool = False
) -> tuple[Plan, Recipe, BaseModel]:
    """As `plan`; also returns the opened base model, for the next steps."""
    base = open_base(model, recipe, overrides)
    resolved, recipe_file = resolve_recipe(base, recipe, overrides)
    use_threads(resolved.threads)
    analysis = analysis_of(base)
    blocks, left = analysis.select(resolved.layers)
    with saying_whose(resolved.to_dict(), overrides, recipe_file.name):
        check_context(base.config, resolved.context)
        layers = [plan_layer(block, resolved) for block in blocks]
    dtype = resolved.dtype if resolved.dtype != "auto" else str(base.config.dtype or "float32").removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise RecipeError(
            f"recipe key 'dtype' is 'auto', and the dtype of {model!r} is {dtype}",
            expected="one of " + ", ".join(DTYPE_BYTES),
            fix="name one of them with --dtype",
        )
    made = Plan(
        model=resolved.model,  # of a folder, the whole path: it is looked for from other folders, too
        revision=analysis.revision,
        model_type=analysis.model_type,
        architecture=analysis.architecture,
        dtype=dtype,
        original_parameters=analysis.parameters,
        recipe_file=recipe_file.name,
        steps=max(1, resolved.tokens // tokens_per_step(resolved)),
        layers=[],
        machine=this_machine(resolved, layers, base.config, dtype),
        unmeasured="it was not measured",
        left=left,
    )
    made = with_layers(made, layers, resolved, base)
    return (with_time(made, resolved, base) if measure else made), resolved, base


def with_layers(made: Plan, layers: list[LayerPlan], recipe: Recipe, base_model: BaseModel) -> Plan:
    """The plan with other layers, several of which may replace the same block, and what they take."""
    base = stored(layers, base_shape(base_model, made.dtype, made.machine.compute), recipe, made.machine)
    groups = make_groups(layers, base, recipe, made.machine)
    host = host_bytes(layers, base, recipe, made.machine)
    refused = refusal(layers, groups, base, recipe, made.machine) or host_refusal(host, base, recipe, made.machine)
    states = states_bytes(base, recipe)
    blocks = distinct(layer.block for layer in layers)
    on_disk = dataclasses.replace(base, dtype=made.dtype)
    finished = on_disk.element_bytes * sum(layer.all_parameters for layer in layers) if base.offloaded else 0
    made = dataclasses.replace(
        made,
        layers=layers,
        groups=groups,
        evaluation_bytes=evaluation_bytes(layers, base, recipe, made.machine),
        host_bytes=host,
        disk_bytes=checkpoint_bytes(layers, on_disk) * (2 if recipe.overwrite else 1)
        + (states if base.states_on_disk else 0)
        + finished,
        cache_bytes=made.steps * batch_bytes(blocks, recipe, base.element_bytes) if recipe.cache_activations else 0,
        refusal=refused and {"found": refused.found, "expected": refused.expected, "fix": refused.fix},
        offloaded=base.offloaded,
        states_bytes=states,
        states_on_disk=base.states_on_disk,
    )
    return dataclasses.replace(made, look_tokens=look_tokens(layers, base, recipe, sum(made.flops.values())))


def with_time(made: Plan, recipe: Recipe, base_model: BaseModel, worth_it: float = 0.0) -> Plan:
    """The plan with a predicted time, from some seconds of measurement on this machine; or with the reason why there is none.

    Args:
        made: a plan without a time.
        recipe: resolved.
        base_model: the model that the plan is for.
        worth_it: measure only if the run takes more seconds than this at the rate of a matrix product.
    """
    machine, (recipe, base) = made.machine, as_planned(made, recipe, base_model)
    if made.refusal is not None:
        return dataclasses.replace(made, unmeasured="it does not fit the memory budget")
    if machine.device not in devices():
        return dataclasses.replace(made, unmeasured=f"there is no {machine.device} here")
    free = free_memory(machine.device)
    if free is not None and needed_bytes(made.layers, base, recipe, machine) > free:
        return dataclasses.replace(made, unmeasured="this machine has not enough memory free to measure one layer's step")
    share = 1.0
    if worth_it > 0.0:
        rate = matmul_rate(machine.device, "bfloat16" if machine.bf16 else "float32")
        least = sum(made.flops.values()) * made.steps * tokens_per_step(recipe) / rate
        if least < worth_it:
            short = f"too short a run to measure first, at least {max(1.0, least):.0f} s by the rate of a matrix product"
            return dataclasses.replace(made, unmeasured=short)
        share = min(1.0, least / _WORTH_ALL_OF_IT)
    return timed(made, calibrate(made.layers, base, base_model.config, recipe, machine, share), recipe, base_model)


def as_planned(made: Plan, recipe: Recipe, base_model: BaseModel) -> tuple[Recipe, BaseShape]:
    """The recipe with what was chosen for this machine, and the base model's shape as the plan has it."""
    base = base_shape(base_model, made.dtype, made.machine.compute)
    base = dataclasses.replace(base, offloaded=made.offloaded, states_on_disk=made.states_on_disk)
    return made.settled(recipe), base


def timed(made: Plan, calibration: Calibration, recipe: Recipe, base_model: BaseModel) -> Plan:
    """The plan with the time that it takes by a calibration, which was measured for the same layers and batch."""
    recipe, base = as_planned(made, recipe, base_model)
    groups = []
    for group in made.groups:
        layers = [layer for layer in made.layers if layer.block.layer in group.layers]
        looking = calibration.looking_seconds(layers, base, recipe, made.look_tokens)
        groups.append(dataclasses.replace(group, seconds=calibration.seconds(group, made.steps) + looking))
    made = dataclasses.replace(made, groups=groups, calibration=calibration, unmeasured=None)
    return dataclasses.replace(
        made,
        evaluation_seconds=calibration.evaluation_seconds(made.layers, base, recipe, made.seconds),
        export_seconds=calibration.export_seconds(made.checkpoint_bytes),
    )


def plan_layer(block: Block, recipe: Recipe) -> LayerPlan:
    """The new layer that the recipe gives for a block.

    Raises:
        RecipeError: more active experts than experts.
    """
    shared = recipe.kind == "mxd" and recipe.start == "shared"
    n_experts = matched_n_experts(block, transcoder_parameters(block, recipe.expansion) - shared * block.d_model, recipe.kind)
    if recipe.n_experts is not None and recipe.kind != "dense":
        n_experts = recipe.n_experts
    if recipe.kind != "dense" and recipe.k > n_experts:
        raise RecipeError(
            f"recipe key 'k' is {recipe.k}, more than the {n_experts} experts of layer {block.layer}",
            expected="k of at most n_experts",
            fix="lower --k, or raise --n-experts, or raise --expansion",
            keys=("k", "n_experts" if recipe.n_experts is not None else "expansion"),
        )
    parameters = layer_parameters(block, n_experts, recipe.kind, shared)
    return LayerPlan(block, n_experts, recipe.k, parameters, recipe.kind, recipe.sparsity, shared)


def read_plan(path: Path) -> Plan:
    """Reads a saved plan."""
    return Plan.from_dict(json.loads(path.read_text(encoding="utf-8")))
