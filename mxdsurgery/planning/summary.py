"""What ``plan`` and ``convert`` print of a plan: tables of the layers and of the groups, and the plan in a few lines."""

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from mxdsurgery.base.config import model_name
from mxdsurgery.base.selection import write_layers
from mxdsurgery.planning.plan import Plan
from mxdsurgery.recipe import Recipe
from mxdsurgery.terminal.console import compact, duration, size
from mxdsurgery.training.activation_cache import kept_bytes
from mxdsurgery.training.cost import tokens_per_step
from mxdsurgery.training.share import LOOKS


def layer_table(plan: Plan) -> Table:
    """For a terminal."""
    title = f"Plan for {escape(model_name(plan.model))} (recipe {Path(plan.recipe_file).stem})"
    table = Table("layer", "block", "kind", "H", "N", "K", "parameters", "was", title=title)
    for layer in plan.layers:
        row = (
            layer.block.layer,
            layer.block.path,
            layer.block.kind,
            layer.block.d_hidden,
            layer.n_experts or "-",
            layer.k if layer.n_experts else "-",
        )
        table.add_row(*map(str, row), compact(layer.parameters), compact(layer.block.parameters))
    return table


def group_table(plan: Plan) -> Table:
    """For a terminal: the groups, and what each takes."""
    sequential = plan.states_bytes > 0
    title = (
        "Layers trained one after the other" if sequential else "Layers trained together, one pass over the text for each row"
    )
    columns = {
        "weights": "weight_bytes",
        "gradients": "gradient_bytes",
        "Adam": "adam_bytes",
        "activations": "activation_bytes",
        "text": "text_bytes",
        **({"states": "state_bytes"} if sequential else {}),
        "peak": "peak_bytes",
    }
    table = Table(title=title)
    table.add_column("layers")
    predicted = plan.calibration is not None and plan.calibration.predicted
    for column in ("parameters", *columns, "time, predicted" if predicted else "time"):
        table.add_column(column, justify="right")
    for group in plan.groups:
        held = (size(getattr(group, name)) for name in columns.values())
        time = "-" if group.seconds is None else duration(group.seconds)
        table.add_row(write_layers(group.layers), compact(group.parameters), *held, time)
    return table


def leaves(plan: Plan) -> list[str]:
    """For a terminal: which layers are left as they are, and why."""
    return [f"left       layers {layers} as they are: {reason}" for reason, layers in plan.left.items()]


def summary(plan: Plan, recipe: Recipe) -> list[str]:
    """For a terminal: what the conversion takes, in a few lines."""
    passes = "1 pass" if len(plan.groups) == 1 else f"{len(plan.groups)} passes"
    over = f"{passes} over the text" if recipe.inputs != "converted" else "layer after layer"
    flops, total = plan.flops, sum(plan.flops.values())
    shares = ", ".join(f"{flops[name] / total:.0%} {name.replace('_', ' ')}" for name in flops)
    budget = "no budget" if plan.machine.memory is None else f"budget {size(plan.machine.memory)}"
    return [
        *leaves(plan),
        f"model      {compact(plan.original_parameters)} parameters become {compact(plan.parameters)}, {plan.dtype}",
        f"training   {compact(recipe.tokens)} tokens of {recipe.data}: {plan.steps} steps of {recipe.batch}, {over}",
        *_asked(plan, recipe),
        f"work       {compact(total)} FLOPs per token: {shares}",
        f"compute    {_compute(plan)}",
        *_time(plan),
        f"memory     {size(plan.peak_bytes)} to train, {size(plan.evaluation_bytes)} to evaluate and export; {budget}, "
        f"{plan.machine.memory_source}",
        *([f"host       {size(plan.host_bytes)} of host memory beside that"] if plan.host_bytes else []),
        *_kept_lines(plan, recipe),
        *_resume_line(plan, recipe),
        f"checkpoint {size(plan.checkpoint_bytes)}; {size(plan.disk_bytes)} of disk while it is written",
    ]


def _compute(plan: Plan) -> str:
    training, ranking = ("bf16" if chosen else "fp32" for chosen in (plan.machine.bf16, plan.machine.selection))
    ranked = "" if ranking == training else f", their experts are ranked in {ranking}"
    return f"{plan.machine.compute}: {plan.machine.compute_why}; new layers train in {training}{ranked}"


def _kept_lines(plan: Plan, recipe: Recipe) -> list[str]:
    """Where the base model, hidden states and activations are kept, if not just in memory."""
    lines = []
    if plan.states_bytes:
        where = "on disk" if plan.states_on_disk else "in memory"
        lines.append(f"states     {size(plan.states_bytes)} of hidden states are kept {where} from layer to layer")
    if plan.cache_bytes and recipe.cache_activations:
        per_token = plan.cache_bytes // (plan.steps * tokens_per_step(recipe))
        there = kept_bytes(Path(recipe.cache_activations), sorted({block.layer for block in plan.blocks}))
        of_it = f"; {size(there)} are there already, so it takes less time than predicted" if there else ""
        lines.append(
            f"cache      {size(plan.cache_bytes)} of activations, {per_token:,} bytes of a token, in "
            f"{recipe.cache_activations}{of_it}"
        )
    if plan.offloaded:
        lines.append("offload    the base model's weights stay on disk; one decoder layer at a time is in memory")
    return lines


def _resume_line(plan: Plan, recipe: Recipe) -> list[str]:
    if not recipe.keep_checkpoints:
        return []
    kept = f"{recipe.keep_checkpoints} are kept, and one more is on disk while it is written"
    return [f"resume     from checkpoints of up to {size(plan.resume_bytes(recipe))}; {kept}"]


def _time(plan: Plan) -> list[str]:
    if plan.seconds is None:
        return [f"time       not predicted: {plan.unmeasured}"]
    stages = (("train", plan.seconds), ("evaluate", plan.evaluation_seconds), ("export", plan.export_seconds))
    words = ", ".join(f"{duration(seconds)} to {stage}" for stage, seconds in stages if seconds is not None)
    total = f": {duration(plan.total_seconds)}" if plan.total_seconds is not None else ""
    if plan.calibration.predicted:
        return [f"time       predicted, not measured: about {words}{total}", f"           by {plan.calibration.base_from}"]
    step = f"one layer's step on {plan.calibration.step_tokens} tokens"
    return [
        f"time       about {words}{total}",
        f"           from {step} and a {plan.calibration.base_from} for the base model",
    ]


def _asked(plan: Plan, recipe: Recipe) -> list[str]:
    """What the experts are to carry, where that is steered."""
    if not plan.look_tokens:
        return []
    looks = f"measured {len(LOOKS)} times while they learn, on {compact(plan.look_tokens)} tokens of other text"
    return [f"experts    are to carry {recipe.share_target:.2f} of each layer's worth (expert_share); {looks}"]
