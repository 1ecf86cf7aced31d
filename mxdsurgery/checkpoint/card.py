"""The model card, and the short table of figures that ends a conversion and an evaluation."""

import textwrap
from collections.abc import Sequence
from typing import Any

import yaml
from rich.table import Table

from mxdsurgery.base.config import came_from_here, model_name
from mxdsurgery.checkpoint.readme import whole_card
from mxdsurgery.planning.plan import Plan
from mxdsurgery.recipe import Recipe
from mxdsurgery.terminal.console import compact, duration, size
from mxdsurgery.terminal.figures import SHARES, SHORT_SHARES, legend, range_of, value_of, with_range
from mxdsurgery.text.fingerprints import tokens_in_words
from mxdsurgery.text.places import text_name
from mxdsurgery.training.cost import LayerPlan

# The figures of the card: JSON name, heading, how to print it.
FIGURES = (
    ("delta_ce", "ΔCE", "+.4f"),
    ("kl", "KL", ".4f"),
    ("top1_agreement", "same top-1", ".1%"),
    ("nmse", "NMSE", ".4f"),
    ("median_error", "median error", ".4f"),
    ("jacobian_nmse", "Jacobian NMSE", ".3f"),
    ("zero_delta_ce", "ΔCE if zeroed", "+.4f"),
    ("loss_recovered", "loss recovered", ".1%"),
    ("constant_gate_delta_ce", "ΔCE, experts frozen", "+.4f"),
    ("expert_share", "expert share", ".2f"),
    ("dead_share", "unused experts", ".1%"),
)
# Those that are printed with their intervals: what the conversion cost, and the shares.
_WITH_RANGE = ("delta_ce", "loss_recovered", "expert_share")
# The figures that a terminal shows: enough to see whether a layer is faithful and its experts matter.
_SHORT = ("delta_ce", "kl", "nmse", "jacobian_nmse", "zero_delta_ce", "expert_share", "dead_share")

# Lines of text on the card.
_WIDTH = 125

# In a heading, and in a sentence.
_KINDS = {
    "mxd": ("Mixtures of Decoders", "Mixture-of-Decoders layers (arXiv 2505.21364)"),
    "transcoder": ("transcoders", "transcoders"),
    "skip-transcoder": ("skip transcoders", "transcoders with a dense linear map beside them"),
    "topk-sae": ("autoencoded outputs", "themselves and a sparse autoencoder of their output"),
    "molt": ("mixtures of linear transforms", "sparse mixtures of linear transforms of several ranks (MOLT)"),
    "dense": ("retrained dense layers", "dense layers of the same width, retrained"),
}

_SHARES_LEGEND = """\
Each is the part of the layer's worth (what it predicts better by than no block) that is lost if the choice of experts is
replaced: by a constant (expert share); by the same choice with each expert another one (permuted), that of another token with
as large a gate (shuffled), or one drawn by chance (random gate); by the same few for every token, of any size and sign
(beyond a few); by a constant, with the dense path fitted anew (earned: near 0 where the hidden units hold the block's own,
which need no experts). What the experts carry in this layer is the least of expert share and beyond a few."""


def figure_rows(evaluation: dict[str, Any]) -> list[list[str]]:
    """One row per converted layer and one for all together, as printed."""
    entries = [(str(entry["layer"]), entry) for entry in evaluation["layers"]] + [("all", evaluation["all"])]
    rows = [
        [name, *((with_range if key in _WITH_RANGE else value_of)(entry, key, form) for key, _, form in FIGURES)]
        for name, entry in entries
    ]
    if len(rows) > 2 and "nmse_together" not in evaluation["layers"][0]:  # older versions: Σ error of all layers / Σ size
        rows[-1][1 + [key for key, _, _ in FIGURES].index("nmse")] += " (pooled)"
    return rows


def share_rows(evaluation: dict[str, Any]) -> list[list[str]]:
    """As `figure_rows`, of the shares; none if an older version measured, or if there are no experts."""
    entries = [(str(entry["layer"]), entry) for entry in evaluation["layers"]] + [("all", evaluation["all"])]
    if entries[-1][1].get("permuted_delta_ce") is None:
        return []
    return [[name, *(with_range(entry, key, ".2f") for key in SHARES)] for name, entry in entries]


def computed_in(figures: dict[str, Any]) -> str:
    """The dtype that figures were computed in, for a sentence; empty if an older version wrote them."""
    return f", computed in {figures['compute']}" if "compute" in figures else ""


def evaluation_table(evaluation: dict[str, Any]) -> Table:
    """For a terminal."""
    ce = evaluation["original"]["ce"]
    rests_on = f"{tokens_in_words(evaluation)}{_alone(evaluation)}{computed_in(evaluation)}"
    title = f"On {rests_on};\noriginal cross-entropy {ce:.4f} nats per token"
    table = Table("layer", title=title)
    shown = [0, *(1 + column for column, (name, _, _) in enumerate(FIGURES) if name in _SHORT)]
    for column in shown[1:]:
        table.add_column(FIGURES[column - 1][1], justify="right", no_wrap=FIGURES[column - 1][0] in _WITH_RANGE)
    rows = [[row[column] for column in shown] for row in figure_rows(evaluation)]
    for column in SHORT_SHARES if share_rows(evaluation) else ():
        table.add_column(SHARES[column], justify="right")
        for row, entry in zip(rows, [*evaluation["layers"], evaluation["all"]], strict=True):
            row.append(with_range(entry, column, ".2f"))
    table.caption, table.caption_justify = legend([str(column.header) for column in table.columns]), "left"
    *single, every = rows
    for row in single:
        table.add_row(*row)
    table.add_section()
    table.add_row(*every)
    return table


def _alone(evaluation: dict[str, Any]) -> str:
    """On how much of the text single layers were measured, if on less than all layers together."""
    tokens = {entry.get("tokens", evaluation["tokens"]) for entry in evaluation["layers"]} - {evaluation["tokens"]}
    return f", each layer alone on {tokens.pop():,} of them" if tokens else ""


def model_card(plan: Plan, recipe: Recipe, evaluation: dict[str, Any], edits: Sequence[dict[str, Any]] = ()) -> str:
    """A new README.md of an exported folder, see `whole_card`; ``edits`` are the steps of `edit`, as config.json has them."""
    base = model_name(plan.model)
    header = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if not came_from_here(plan.model, plan.revision):  # the hub takes it for a name there
        header["base_model"] = plan.model
    header |= {"tags": ["mixture-of-decoders", "mxdsurgery", "interpretability"]}
    columns = ["layer", *(heading for _, heading, _ in FIGURES)]
    table = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    table += ["| " + " | ".join(row) + " |" for row in figure_rows(evaluation)]
    settings = {name: value for name, value in recipe.to_dict().items() if name not in ("model", "out", "overwrite")}
    settings = {name: text_name(value) if isinstance(value, str) else value for name, value in settings.items()}
    first = plan.layers[0]
    revision = f" (revision {plan.revision})" if plan.revision else ""
    body = "\n".join(
        [
            f"# {base}, {len(plan.layers)} MLP blocks as {_KINDS[first.kind][0]}",
            "",
            f"Made from `{base}`{revision} by mxdsurgery. The MLP blocks of layers "
            f"{', '.join(str(layer.block.layer) for layer in plan.layers)} are replaced by {_KINDS[first.kind][1]}"
            f"{_sparsity(first)}. {compact(plan.original_parameters)} parameters became {compact(plan.parameters)}.",
            "",
            *(f"Layers {layers} are as they were: {reason}.\n" for reason, layers in plan.left.items()),
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("this folder", trust_remote_code=True)',
            'tokenizer = AutoTokenizer.from_pretrained("this folder", trust_remote_code=True)',
            "```",
            "",
            *_gate_lines(plan),
            *_edit_lines(edits),
            *_healed_lines(evaluation.get("healed", [])),
            "## What it cost",
            "",
            *_unedited(edits, evaluation),
            f"Measured on {tokens_in_words(evaluation)} ({evaluation['sequences']} contexts of "
            f"{evaluation['context']}, position 0 left out){_alone(evaluation)}{computed_in(evaluation)}, against the "
            f"original model, whose cross-entropy there is {evaluation['original']['ce']:.4f} nats per token. Intervals of "
            "all figures are in evaluation.json.",
            "",
            *table,
            "",
            *textwrap.wrap(legend(columns), _WIDTH),
            "",
            *_share_lines(evaluation, recipe),
            "",
            "## How it was made",
            "",
            *_training_lines(evaluation.get("training", {})),
            "```yaml",
            yaml.safe_dump(settings, sort_keys=False).rstrip(),
            "```",
            "",
        ]
    )
    return whole_card(header, body)


def _share_lines(evaluation: dict[str, Any], recipe: Recipe) -> list[str]:
    """The controls of the expert share, where they were measured."""
    rows = share_rows(evaluation)
    if not rows:
        return []
    columns = ["layer", *SHARES.values()]
    target = recipe.share_target if recipe.kind == "mxd" else None
    asked = f"Training asked for {target or 0:.2f} of each layer, of the first and of *{SHARES['few_experts_share']}*."
    return [
        "## What the experts' share is worth",
        "",
        *([asked, ""] if target else []),
        "| " + " | ".join(columns) + " |",
        "|" + " --- |" * len(columns),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        *textwrap.wrap(_SHARES_LEGEND, _WIDTH),
        "",
    ]


def _training_lines(record: dict[str, Any]) -> list[str]:
    """What training took, beside what the plan said; empty if an older version wrote the evaluation."""
    if "measured" not in record:
        return []
    took, planned = record["measured"], record["planned"]
    lines = ["| training | planned | measured |", "| --- | --- | --- |"]
    rows = (
        ("time", "seconds", duration),
        ("time to evaluate", "evaluation_seconds", duration),
        ("time to export", "export_seconds", duration),
        ("peak memory", "peak_bytes", size),
    )
    for label, name, form in rows:
        if name not in took:  # of an older version
            continue
        cells = ("n/a" if row[name] is None else form(row[name]) for row in (planned, took))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return [*lines, ""]


def before_last_edit(evaluation: dict[str, Any], edits: Sequence[dict[str, Any]]) -> bool:
    """Whether the figures were measured before the last of the model's edits."""
    return evaluation.get("edits", 0) < len(edits)


def _unedited(edits: Sequence[dict[str, Any]], evaluation: dict[str, Any]) -> list[str]:
    if not before_last_edit(evaluation, edits):
        return []
    return ["Before the last edit above; `mxdsurgery evaluate` measures the model as it is now.", ""]


def _edit_lines(edits: Sequence[dict[str, Any]]) -> list[str]:
    """What was done to single experts, and what that changed."""
    if not edits:
        return []
    lines = ["## Edited experts", ""]
    for number, step in enumerate(edits, start=1):
        lines += [f"Step {number}:", "", *(f"- {line}" for line in step["edits"]), ""]
        if "ce_before" not in step:
            lines += ["What this changed was not measured: there was no text to measure on.", ""]
            continue
        lines += [
            f"On {step['tokens']:,} tokens of {step['data']}, cross-entropy went from {step['ce_before']:.4f} to "
            f"{step['ce_after']:.4f} nats per token (difference {step['delta_ce']:+.3g}, 95 % interval "
            f"{range_of(step, 'delta_ce', '+.3g')}); KL(before ‖ after) {step['kl']:.3g}.",
            "",
        ]
        for sample in step["samples"]:  # by repr: one line each, whatever they hold
            lines += ["    " + f"{name:<7}{sample[name]!r}" for name in ("prompt", "before", "after")] + [""]
    return lines


def _healed_lines(steps: Sequence[dict[str, Any]]) -> list[str]:
    """What was trained end to end after the conversion, and what that changed."""
    if not steps:
        return []
    lines = ["## Healed", ""]
    for number, step in enumerate(steps, start=1):
        what = {"mxd": "the new layers", "lora": "LoRA", "both": "the new layers and LoRA"}[step["mode"]]
        lora = {"merged": ", merged into the weights", "adapter": ", kept as a PEFT adapter in `lora`"}.get(step["lora"], "")
        if step["lora"]:
            what += f" of rank {step['lora_rank']} on {len(step['maps'])} linear maps of the attention{lora}"
        lines += [
            f"Step {number}: {what}, trained end to end toward the original's predictions on {step['tokens']:,} tokens of "
            f"{step['data']} in {duration(step['seconds'])}. KL(original ‖ converted) on {_reported_on(step)} went from "
            f"{step['kl_before']:.4f} to {step['kl_after']:.4f} nats per token.",
            "",
        ]
    if any(step["lora"] == "adapter" for step in steps):
        lines += [
            'The figures below are with the adapter: `PeftModel.from_pretrained(model, "this folder/lora")`. Without it the '
            "attention is the original's.",
            "",
        ]
    return lines


def _reported_on(step: dict[str, Any]) -> str:
    """The text that the KL of a healing was measured on; older versions reported the best of several looks at one text."""
    if "heldout_tokens" in step:
        return f"{step['heldout_tokens']:,} tokens, on which nothing was trained or chosen,"
    return f"{step['validation_tokens']:,} tokens, on which the weights were chosen and the conversion may have been trained,"


def _sparsity(layer: LayerPlan) -> str:
    """N and K of a layer that has experts."""
    if not layer.n_experts:
        return ""
    active = "per token" if layer.sparsity == "topk" else "per token on average"
    return f" with N = {layer.n_experts:,} experts each, K = {layer.k} of them active {active}"


def _gate_lines(plan: Plan) -> list[str]:
    """How to read the experts' coefficients, where there are any."""
    first = plan.layers[0]
    if not first.n_experts:
        return []
    return [
        f"The coefficients of the experts of layer {first.block.layer} are the output of "
        f"`model.base_model.{first.block.path}.gate`: values and expert indices, (batch, tokens, K). A forward hook there "
        f"reads and changes them. So does `with model.mxd.ablate({{{first.block.layer}: [0]}}):`, and `scale`, `steer`, "
        "`clamp`, `drop`, `copy`, `merge` and `replace` beside it, for as long as the block lasts.",
        "",
    ]
