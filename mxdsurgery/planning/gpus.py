"""``plan --gpu``: what a conversion would take on one to eight GPUs of a kind, by arithmetic alone; nothing of it is measured.

A part of the work takes as long as its FLOPs at the GPU's peak rate, or as its bytes at the peak rate of its memory, whichever
is longer, at a share of these peaks (``efficiency``); and no less than to launch its operations takes. From the parts,
`predicted` makes what `mxdsurgery.planning.calibrate` measures elsewhere, and the plan follows from it in the same way.

Shapes: B tokens of a step, D model width, H hidden width, N experts, K active.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from mxdsurgery.base.model import BaseModel
from mxdsurgery.errors import RecipeError
from mxdsurgery.hardware.gpus import EFFICIENCY, GPUS, Gpu
from mxdsurgery.hardware.guard import guarded_with
from mxdsurgery.planning.budget import BUDGET_SHARE
from mxdsurgery.planning.calibrate import USUAL_START, Calibration, schedule
from mxdsurgery.planning.plan import Plan, as_planned, open_and_plan, timed, with_layers
from mxdsurgery.recipe import RECIPE_KEYS, Recipe
from mxdsurgery.runs.parallel import check_parallel, layer_shares
from mxdsurgery.terminal.console import duration, size
from mxdsurgery.training import adam
from mxdsurgery.training.cost import (
    WEIGHT,
    BaseShape,
    LayerPlan,
    Machine,
    base_forward_flops,
    first_k,
    largest_layer,
    layer_flops,
    tokens_per_step,
)

# So many GPUs are planned for.
COUNTS = (1, 2, 4, 8)
# Seconds to launch an operation; the operations of a layer's step (docs/tried.md), and about those of a decoder layer's pass.
_LAUNCH, _STEP_OPERATIONS, _PASS_OPERATIONS = 5e-6, 226, 40
# Bytes of a gradient: it is set to 0, written, read for its length, then read and written where it may be cut.
_GRADIENT_TRAFFIC = 5 * 4
# Bytes of the K rows of G and C that a token fires: read in fp32, G's once and C's twice; their gradients read and written.
_ROW_TRAFFIC = 3 * 4 + 2 * 8
# Bytes per second that the disk of a rented machine is taken to write.
_DISK = 1e9


@dataclass(frozen=True)
class Rented:
    """A conversion on some GPUs, predicted.

    Attributes:
        gpus: how many.
        parallel: what they share, as the recipe key says; None for a single one.
        layers_at_once: that each trains together, at most.
        passes: over the text, of the one that makes the most.
        peak_bytes: of memory, of the one that takes the most.
        seconds: of training.
        evaluation_seconds: on the first of them, while the others wait.
        export_seconds: the same.
        cost: of all of them for the whole time, in the currency of the price; None without a price.
    """

    gpus: int
    parallel: str | None
    layers_at_once: int
    passes: int
    peak_bytes: int
    seconds: float
    evaluation_seconds: float
    export_seconds: float
    cost: float | None = None

    @property
    def total_seconds(self) -> float:
        """Seconds of training, evaluation and export."""
        return self.seconds + self.evaluation_seconds + self.export_seconds

    @property
    def gpu_hours(self) -> float:
        """Hours, times GPUs."""
        return self.gpus * self.total_seconds / 3600


@dataclass(frozen=True)
class GpuHours:
    """What a conversion takes on GPUs of one kind, predicted.

    Attributes:
        gpu: the kind.
        efficiency: share of the peak figures that is taken to be reached.
        price: of a GPU for an hour; None: not given.
        plan: on one of them.
        recipe: resolved.
        rows: on one and on more, each faster than those before; none where the plan is refused.
        left_out: counts of GPUs that would not be faster than fewer, or that this recipe cannot be shared among.
    """

    gpu: Gpu
    efficiency: float
    price: float | None
    plan: Plan
    recipe: Recipe
    rows: list[Rented]
    left_out: list[int]

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the plan and the recipe."""
        rows = [
            dataclasses.asdict(row) | {"total_seconds": row.total_seconds, "gpu_hours": row.gpu_hours} for row in self.rows
        ]
        given = {"gpu": dataclasses.asdict(self.gpu), "efficiency": self.efficiency, "price": self.price}
        return {"predicted": True, "measured": False} | given | {"rows": rows, "left_out": self.left_out}

    def printed(self) -> list[Table | str]:
        """For a terminal."""
        table = Table(
            title=f"Predicted by arithmetic, not measured: on {self.gpu.name}, at {self.efficiency:.0%} of its peak figures"
        )
        columns = ["GPUs", "share", "layers at once", "passes", "memory of each", "train", "evaluate", "in all", "GPU-hours"]
        for column in columns + ([] if self.price is None else ["cost"]):
            table.add_column(column, justify="right")
        for row in self.rows:
            shared = "-" if row.parallel is None else f"--parallel {row.parallel}"
            times = map(duration, (row.seconds, row.evaluation_seconds, row.total_seconds))
            cost = () if row.cost is None else (f"{row.cost:,.2f}",)
            held = str(row.layers_at_once), str(row.passes), size(row.peak_bytes)
            table.add_row(f"predicted, {row.gpus}", shared, *held, *times, f"{row.gpu_hours:,.2f}", *cost)
        if not self.left_out:
            return [table]
        counts = ", ".join(map(str, self.left_out))
        return [table, f"predicted  {counts} GPUs: no faster than fewer, or refused with this recipe"]


@guarded_with(*RECIPE_KEYS)
def gpu_hours(
    model: str,
    *,
    gpu: str,
    price: float | None = None,
    efficiency: float = EFFICIENCY,
    recipe: str | Path | None = None,
    **overrides: Any,
) -> GpuHours:
    """Predicts by arithmetic what a conversion takes on 1, 2, 4 and 8 GPUs of a kind. Nothing is measured, and none is needed.

    Of several GPUs each has a process, all on one machine. They share the text or the layers, as ``parallel`` says, or in
    whichever of the two ways is faster where it is not given.

    Args:
        model: see `mxdsurgery.plan`.
        gpu: the kind: a name in `mxdsurgery.hardware.gpus.GPUS`.
        price: of a GPU for an hour; the cost is in the same currency.
        efficiency: share of the published peak figures that is taken to be reached.
        recipe: see `mxdsurgery.plan`.
        **overrides: recipe keys; those that are None count as not given. ``memory`` is of each GPU; default: 90 % of it.

    Raises:
        RecipeError: an unknown kind of GPU, or a device that is none.
        MxDError: see `mxdsurgery.plan`.
    """
    kind = _kind(gpu, overrides.get("device"))
    made, resolved, base_model = open_and_plan(model, recipe, overrides | {"device": "cuda"})
    made = with_layers(dataclasses.replace(made, machine=_machine(kind, resolved, made)), made.layers, resolved, base_model)
    if made.refusal is not None:
        made = dataclasses.replace(made, unmeasured="it does not fit the memory budget")
        return GpuHours(kind, efficiency, price, made, resolved, [], [])
    settled, base = as_planned(made, resolved, base_model)
    calibration = predicted(made.layers, base, settled, made.machine, kind, efficiency)
    made = timed(made, calibration, resolved, base_model)
    given = overrides.get("parallel")
    rows: list[Rented] = []
    for count in COUNTS:
        found = [
            _rented(made, count, parallel, base, settled, base_model, kind, efficiency)
            for parallel in ([given] if given else RECIPE_KEYS["parallel"].choices)
            if _shareable(resolved, len(made.layers), count, parallel)
        ]
        best = min(found, key=lambda row: row.total_seconds, default=None)
        if best is not None and (not rows or best.total_seconds < rows[-1].total_seconds):
            cost = None if price is None else price * best.gpu_hours
            rows.append(dataclasses.replace(best, cost=cost))
    left_out = [count for count in COUNTS if count not in [row.gpus for row in rows]]
    return GpuHours(kind, efficiency, price, made, resolved, rows, left_out)


def _kind(gpu: str, device: str | None) -> Gpu:
    if gpu not in GPUS:
        raise RecipeError(f"gpu is {gpu!r}", expected="one of " + ", ".join(GPUS))
    if device not in (None, "auto", "cuda"):
        raise RecipeError(f"gpu is {gpu!r}, and device is {device!r}", expected="cuda", fix="leave out --device")
    return GPUS[gpu]


def _machine(gpu: Gpu, recipe: Recipe, made: Plan) -> Machine:
    """A GPU as plans see it: what is computed in is as stored and in bf16, unless the recipe says otherwise."""
    compute = made.dtype if recipe.compute == "auto" else recipe.compute
    memory, source = int(BUDGET_SHARE * gpu.memory), f"{BUDGET_SHARE:.0%} of the memory of the {gpu.name}"
    if recipe.memory is not None:
        memory, source = made.machine.memory, made.machine.memory_source
    why = "as stored, not measured" if recipe.compute == "auto" else "recipe key 'compute'"
    bf16, selection = (key != "fp32" for key in (recipe.precision, recipe.selection))
    return Machine("cuda", bf16, selection, memory, source, None, compute, why)


def _shareable(recipe: Recipe, layers: int, count: int, parallel: str) -> bool:
    """Whether so many processes can share the work in this way."""
    try:
        check_parallel(dataclasses.replace(recipe, parallel=parallel), count)
    except RecipeError:
        return False
    return parallel == "data" or count <= layers


def _rented(
    made: Plan,
    count: int,
    parallel: str,
    base: BaseShape,
    recipe: Recipe,
    base_model: BaseModel,
    gpu: Gpu,
    efficiency: float,
) -> Rented:
    """The plan on so many GPUs. The slowest counts, and evaluation and export are the work of the first."""
    recipe = dataclasses.replace(recipe, parallel=parallel)
    single = made.calibration
    shares = [made]
    seconds = made.seconds
    if count > 1 and parallel == "layers":
        parts = [with_layers(made, share, recipe, base_model) for share in layer_shares(made.layers, recipe, count)]
        shares = [timed(part, single, recipe, base_model) for part in parts]
        seconds = max(share.seconds for share in shares)
    elif count > 1:
        shared = predicted(made.layers, base, recipe, made.machine, gpu, efficiency, count)
        training = sum(group.seconds - single.seconds(group, made.steps) for group in made.groups)  # the looks, by one for all
        seconds = training + sum(shared.seconds(group, made.steps) for group in made.groups)
    return Rented(
        gpus=count,
        parallel=parallel if count > 1 else None,
        layers_at_once=max(len(group.layers) for share in shares for group in share.groups),
        passes=max(len(share.groups) for share in shares),
        peak_bytes=max(max(share.peak_bytes for share in shares), made.evaluation_bytes),
        seconds=seconds,
        evaluation_seconds=single.evaluation_seconds(made.layers, base, recipe, seconds),
        export_seconds=made.export_seconds,
    )


@dataclass(frozen=True)
class _Roof:
    """How long work takes on a GPU at a share of its peaks."""

    gpu: Gpu
    efficiency: float

    def seconds(self, flops: float, moved: float, dtype: str) -> float:
        """Of so many FLOPs in a dtype, and so many bytes from and to memory."""
        rate = self.gpu.float32 if dtype == "float32" else self.gpu.bfloat16
        return max(flops / rate, moved / self.gpu.bandwidth) / self.efficiency


def predicted(
    layers: Sequence[LayerPlan],
    base: BaseShape,
    recipe: Recipe,
    machine: Machine,
    gpu: Gpu,
    efficiency: float,
    shares: int = 1,
) -> Calibration:
    """What `mxdsurgery.planning.calibrate.calibrate` would measure, by arithmetic.

    Args:
        layers: the planned layers.
        base: the base model's shape.
        recipe: settled: batch, context, k_start, moments.
        machine: the dtypes that are computed in.
        gpu: the kind.
        efficiency: share of its peak figures that is taken to be reached.
        shares: processes among which each batch is split; gradients then go from each to all.
    """
    roof, largest, last = _Roof(gpu, efficiency), largest_layer(layers), max(layer.block.layer for layer in layers)
    batch = tokens_per_step(recipe) / shares
    ks = sorted({first_k(largest, recipe), largest.k})
    traffic = 2 * (shares - 1) / shares * WEIGHT * largest.parameters / (gpu.link * efficiency)
    k_seconds = [[k, traffic + step_seconds(largest, k, batch, recipe, machine, roof)] for k in ks]
    held = base.element_bytes * sum(base.layer_parameters[: last + 1])
    flops = base_forward_flops(base, last, recipe.context)
    launched = _LAUNCH * _PASS_OPERATIONS * (last + 1)
    logits = base.vocabulary * (base.element_bytes + 5 * 4)
    head = base.vocabulary * base.d_model
    block = largest.block
    encoders = 2 if block.kind == "glu" else 1
    forward = 2 * (largest.n_experts + (encoders + 1) * largest.hidden) * block.d_model
    return Calibration(
        step_seconds=statistics.mean(schedule(k_seconds)),
        step_flops=sum(layer_flops(largest).values()),
        step_tokens=round(batch),
        base_seconds=max(launched, roof.seconds(flops * batch, held, base.dtype)),
        base_flops=flops,
        base_from=f"arithmetic: {efficiency:.0%} of the peak figures of the {gpu.name}",
        k_seconds=k_seconds,
        head_seconds=roof.seconds(2 * head * batch, base.element_bytes * head + 2 * logits * batch, base.dtype),
        forward_seconds=roof.seconds(forward * batch, base.element_bytes * largest.parameters, base.dtype),
        start_seconds=USUAL_START,
        bytes_per_second=_DISK,
        wide_rate=gpu.float64 * efficiency,
        predicted=True,
    )


def step_seconds(layer: LayerPlan, k: int, batch: float, recipe: Recipe, machine: Machine, roof: _Roof) -> float:
    """Seconds of one training step of a layer with K experts active on B tokens.

    Args:
        layer: the new layer.
        k: K.
        batch: B.
        recipe: moments.
        machine: the dtypes that are computed in.
        roof: the GPU, and what is reached of its peaks.
    """
    flops = layer_flops(dataclasses.replace(layer, k=k))
    d, h, n, active = layer.block.d_model, layer.hidden, layer.n_experts, dataclasses.replace(layer, k=k).active
    encoders = 2 if layer.block.kind == "glu" else 1
    ranked, trained = ("bfloat16" if chosen else "float32" for chosen in (machine.selection, machine.bf16))
    copied = 4 + 2 + 2 if machine.selection else 4  # G is read, rounded, and read again
    activation = 2 if machine.selection else 4
    gate = roof.seconds(flops["gate"] * batch, n * d * copied + 2 * batch * n * activation, ranked)
    width = 2 if machine.bf16 else 4
    hidden = 2 * 2 * (2 * encoders) * batch * h * width  # what the backward pass needs of the hidden units, and as much again
    weights = (encoders + 1) * d * h * (8 if machine.bf16 else 4)
    dense = roof.seconds(flops["encoder_decoder"] * batch, weights + hidden, trained)
    experts = roof.seconds(flops["experts"] * batch, _ROW_TRAFFIC * active * d * batch, "float32")
    update = roof.seconds(0, (_GRADIENT_TRAFFIC + adam.traffic_bytes(recipe)) * layer.parameters, "float32")
    return max(_LAUNCH * _STEP_OPERATIONS, gate + dense + experts + update)
