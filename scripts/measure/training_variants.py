"""Faithful and specialised at once? Ways of training a Mixture of Decoders, on one layer of one model, side by side.

    python scripts/measure/training_variants.py measure --shared ../shared  # 2 M tokens, about 40 minutes on two cores
    python scripts/measure/training_variants.py measure --shared ../shared --only "default;encoder"
    python scripts/measure/training_variants.py page > docs/training.md

Variants are trained side by side on the same activations. Each is judged by ΔCE, NMSE and expert_share on held-out text, and
by the F1 of its best single experts for six languages and four kinds of news. What is measured is kept in
docs/frontier/training.jsonl, a line per variant, which takes the place of an earlier one of the same name.
"""

import itertools
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from material import BOOKS, STEPS, Subject, shared_option
from matplotlib.figure import Figure
from pages import DOCS, read_lines, table, unused, write_lines
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxdsurgery.base.activations import record_activations
from mxdsurgery.base.model import load_tokenizer, open_model
from mxdsurgery.layers.layer import MxDLayer
from mxdsurgery.measuring.fidelity import Measurement
from mxdsurgery.measuring.probe import pool, probe_units
from mxdsurgery.planning.plan import plan, plan_layer
from mxdsurgery.recipe import Recipe
from mxdsurgery.terminal.console import ConsoleReporter, compact
from mxdsurgery.terminal.figures import range_of, value_of, with_range
from mxdsurgery.text.labelled import read_labelled, token_batches
from mxdsurgery.text.sources import Packing, open_texts
from mxdsurgery.training.accelerator import make_accelerator
from mxdsurgery.training.cost import LayerPlan, first_k, tokens_per_step
from mxdsurgery.training.distill import LayerInTraining, active_experts, learning_rate, train_step
from mxdsurgery.training.initialize import Statistics, initial_layer, measure_statistics

KEPT = DOCS / "frontier"
RESULTS = KEPT / "training.jsonl"
MODEL, LAYER, K = "books-llama-6m", 3, 16
PROBING = {"languages": 2000, "ag_news": 2000}


@dataclass(frozen=True)
class Variant:
    """One way of training.

    Attributes:
        why: what the variant tries.
        recipe: recipe keys; the rest is as in the recipe for small models, with K = 16.
        rates: factors of the learning rate, by the first part of a parameter's name; 0 freezes.
        gate_rows: ``data``: gate rows are sampled inputs instead of random.
        resample: every so many steps, dead experts start anew at tokens with a large error.
        hidden: share of the hidden units that are kept, the strongest ones.
        centre: keep the mean of ``Cᵀ a`` at zero, by shifting all rows of C after each step.
        penalty_until: share of the steps with the penalty.
        falls_until: share of the steps in which K falls.
        beta2: Adam's.
    """

    why: str
    recipe: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    gate_rows: str = "random"
    resample: int = 0
    hidden: float = 1.0
    centre: bool = False
    penalty_until: float = 1.0
    falls_until: float = 0.7
    beta2: float = 0.999


# As training was before: K constant, no penalty.
PLAIN = {"init": "encoder", "k_start": K, "specialise": 0.0}
# K falls from 4 K over the first half of the steps.
EARLY = {"init": "encoder", "k_start": 4 * K, "specialise": 0.003}
# K falls from 8 K.
LATE = {"init": "encoder"}
VARIANTS = {
    "default": Variant("K falls from 8 K over 70 % of the steps; penalty .003", LATE | {"specialise": 0.003}),
    "encoder": Variant("as before: the block's encoder at the start, K constant, no penalty", PLAIN),
    "random": Variant("the paper's start", PLAIN | {"init": "random"}),
    "pretrained": Variant("the whole block at the start", PLAIN | {"init": "pretrained"}),
    "transcoder": Variant("the baseline: K falls, at the rate that is best for it (4e-3)", {"kind": "transcoder", "lr": 4e-3}),
    "transcoder, K constant": Variant("rate 4e-3", PLAIN | {"kind": "transcoder", "lr": 4e-3}),
    "transcoder, lr 2e-3": Variant("K constant, rate as mxd's", PLAIN | {"kind": "transcoder"}),
    "transcoder, lr 8e-3": Variant("K constant, four times mxd's rate", PLAIN | {"kind": "transcoder", "lr": 8e-3}),
    "transcoder, gate rows from the data": Variant("K constant, rate 2e-3", PLAIN | {"kind": "transcoder"}, gate_rows="data"),
    "topk-sae, lr 2e-3": Variant("K falls, rate as mxd's", {"kind": "topk-sae"}),
    "topk-sae, lr 1e-3": Variant("K falls", {"kind": "topk-sae", "lr": 1e-3}),
    "topk-sae, lr 5e-4": Variant("K falls", {"kind": "topk-sae", "lr": 5e-4}),
    "penalty .001": Variant("weaker penalty", LATE | {"specialise": 0.001}),
    "penalty .002": Variant("weaker penalty", LATE | {"specialise": 0.002}),
    "penalty .01": Variant("stronger penalty", LATE | {"specialise": 0.01}),
    "K falls": Variant("no penalty", LATE | {"specialise": 0.0}),
    "16 K, penalty .005": Variant("K falls from 16 K", LATE | {"k_start": 16 * K, "specialise": 0.005}),
    "4 K": Variant("K falls from 4 K, over half of the steps; no penalty", EARLY | {"specialise": 0.0}, falls_until=0.5),
    "4 K, penalty .001": Variant("the same, penalty .001", EARLY | {"specialise": 0.001}, falls_until=0.5),
    "4 K, penalty .003": Variant("the same, penalty .003", EARLY, falls_until=0.5),
    "4 K, penalty .01": Variant("the same, penalty .01", EARLY | {"specialise": 0.01}, falls_until=0.5),
    "4 K, penalty .03": Variant("the same, penalty .03", EARLY | {"specialise": 0.03}, falls_until=0.5),
    "4 K until 80 %, penalty .01": Variant("falls for longer", EARLY | {"specialise": 0.01}, falls_until=0.8),
    "4 K, lr 4e-3, penalty .003": Variant("twice the learning rate", EARLY | {"lr": 4e-3}, falls_until=0.5),
    "4 K, encoder x3": Variant(
        "learning rate x3 for E, no penalty", EARLY | {"specialise": 0.0}, {"encoder": 3.0}, falls_until=0.5
    ),
    "K constant, penalty .01": Variant("penalty alone", PLAIN | {"specialise": 0.01}),
    "K constant, penalty .1": Variant("penalty alone", PLAIN | {"specialise": 0.1}),
    "K constant, penalty .01 at first": Variant("until 60 % of the steps", PLAIN | {"specialise": 0.01}, penalty_until=0.6),
    "centred C": Variant("what the experts say has mean zero", PLAIN, centre=True),
    "gate rows from the data": Variant("sampled inputs", PLAIN, gate_rows="data"),
    "half the hidden units": Variant("the strongest ones; N as matched for all", PLAIN, hidden=0.5),
    "batchtopk": Variant(
        "the default, with a batch's budget of K per token", LATE | {"specialise": 0.003, "sparsity": "batchtopk"}
    ),
    "unit-norm C": Variant("radial gradient removed", PLAIN | {"unit_norm": True}),
    "AuxK": Variant("dead experts learn the error, weight 1/32", PLAIN | {"auxk": 0.03125}),
    "resampled": Variant("every 50 steps, dead experts start anew where the error is large", PLAIN, resample=50),
    "4 K, resampled, penalty .01": Variant("both", EARLY | {"specialise": 0.01}, resample=50, falls_until=0.5),
    "encoder frozen": Variant("learning rate 0 for E", PLAIN, {"encoder": 0.0}),
    "encoder x3": Variant("learning rate x3 for E", PLAIN, {"encoder": 3.0}),
    "gate x3": Variant("learning rate x3 for G", PLAIN, {"gate": 3.0}),
    "decoder x0.3": Variant("learning rate x0.3 for D", PLAIN, {"decoder": 0.3}),
    "long decay": Variant("learning rate falls over 95 % of the steps", PLAIN | {"decay": 0.95}),
    "long decay, lr 4e-3": Variant("the same, from twice as high", PLAIN | {"decay": 0.95, "lr": 4e-3}),
    "Adam's beta2 .99": Variant("instead of .999", PLAIN, beta2=0.99),
    "encoder, 6 M tokens": Variant("three times as long", PLAIN | {"tokens": 6_000_000}),
    "4 K, penalty .0015, 6 M tokens": Variant(
        "three times as long", EARLY | {"specialise": 0.0015, "tokens": 6_000_000}, falls_until=0.5
    ),
    "transcoder, 6 M tokens": Variant("three times as long, rate 2e-3", PLAIN | {"kind": "transcoder", "tokens": 6_000_000}),
}


# expert_share and NMSE of the throw-away prototype from before this project's first line, by tokens.
PROTOTYPE = ((0.30, 0.049, "prototype, 1.6 M"), (0.47, 0.030, "prototype, 3.6 M"), (0.93, 0.179, "prototype, random, 3.6 M"))


# Of the figure: colour, mark, and what they stand for.
STYLES = {
    "falls": ("#0072B2", "o", "mxd, K falls while training"),
    "constant": ("#D55E00", "s", "mxd, K constant"),
    "other": ("#009E73", "^", "transcoders and autoencoders"),
    "prototype": ("#555555", "x", "before this project's first line"),
}


def start(
    variant: Variant, model: PreTrainedModel, made: LayerPlan, recipe: Recipe, known: Statistics, x: Tensor
) -> nn.Module:
    """The variant's layer at step 0; x (n, D) are inputs to sample from."""
    layer = initial_layer(model, made, recipe, known)
    if variant.hidden < 1.0:
        layer = pruned(layer, made, model, x, variant.hidden)
    if variant.gate_rows == "data":
        with torch.no_grad():
            drawn = torch.randint(len(x), (made.n_experts,), generator=torch.Generator().manual_seed(recipe.seed))
            rows = x[drawn] - known.mean_x
            norms = layer.gate.weight.norm(dim=1, keepdim=True)
            layer.gate.weight.copy_(rows / rows.norm(dim=1, keepdim=True) * norms)
            layer.gate.bias.copy_(-layer.gate.weight @ known.mean_x)
    return layer


@torch.no_grad()
def pruned(layer: MxDLayer, made: LayerPlan, model: PreTrainedModel, x: Tensor, share: float) -> MxDLayer:
    """The same layer with only the hidden units that write the most."""
    block, root = made.block, model.base_model
    strength = block.hidden(root, x).square().mean(0) * block.decoder.weight(root).square().sum(0)
    units = strength.topk(int(share * block.d_hidden)).indices
    for name in ("encoder", "encoder_up"):
        linear = getattr(layer, name)
        if linear is not None:
            linear.weight = nn.Parameter(linear.weight[units])
            linear.bias = None if linear.bias is None else nn.Parameter(linear.bias[units])
    layer.decoder.weight = nn.Parameter(layer.decoder.weight[:, units])
    return layer


class Trial:
    """A variant in training."""

    def __init__(self, name: str, made: LayerPlan, layer: nn.Module, recipe: Recipe, steps: int) -> None:
        self.variant, self.made, self.layer, self.recipe, self.steps = VARIANTS[name], made, layer, recipe, steps
        for part, rate in self.variant.rates.items():
            if rate == 0.0:
                getattr(layer, part).requires_grad_(False)
                if part == "encoder" and layer.encoder_up is not None:
                    layer.encoder_up.requires_grad_(False)
        self.job = LayerInTraining(name, layer, recipe, dead_after=0.1 * steps * tokens_per_step(recipe))
        self.job.optimizer.param_groups = [
            self.job.optimizer.param_groups[0]
            | {"params": [weight], "factor": self._factor(weight_name), "betas": (0.9, self.variant.beta2)}
            for weight_name, weight in layer.named_parameters()
            if weight.requires_grad
        ]
        self.job.optimizer.register_step_pre_hook(lambda optimizer, *_: scale_rates(optimizer))

    def _factor(self, name: str) -> float:
        return next((rate for part, rate in self.variant.rates.items() if name.startswith(part)), 1.0)

    def step(self, step: int, x: Tensor, y: Tensor, accelerator: Any) -> None:
        """One step on x, y (tokens, D)."""
        seen = (step + 1) * len(x)
        falls = round(self.steps * self.variant.falls_until / 0.7)  # over 70 % of these
        self.job.set_k(active_experts(step, falls, self.made.k, first_k(self.made, self.recipe)))
        if step >= self.variant.penalty_until * self.steps:
            self.job.specialise = 0.0
        train_step(self.job, x, y, learning_rate(step, self.steps, self.recipe), seen, accelerator)
        if self.variant.centre:
            centre(self.layer, x)
        if self.variant.resample and step % self.variant.resample == 0 and 0 < step < 0.6 * self.steps:
            resample(self.job, x, y, seen)


def scale_rates(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= group["factor"]


@torch.no_grad()
def centre(layer: MxDLayer, x: Tensor) -> None:
    """Shifts all rows of C by the same vector, so that ``Cᵀ a`` on x (n, D) has mean zero."""
    a = layer.gate(x)
    layer.experts.weight.sub_(layer.experts(a).sum(0) / a.values.sum())


@torch.no_grad()
def resample(job: LayerInTraining, x: Tensor, y: Tensor, seen: int) -> None:
    """Points dead experts at tokens with a large error: they fire there, with little effect at first."""
    layer, dead = job.layer, job.dead(seen)
    count = int(dead.sum())
    if count == 0:
        return
    error = (layer(x) - y).square().sum(-1) / y.norm(dim=-1).clamp_min(1e-6)
    chosen = torch.multinomial(error, count, replacement=count > len(x))
    inputs = x[chosen] - x.mean(0)
    size = layer.gate.weight[~dead].norm(dim=1).mean()
    layer.gate.weight[dead] = 0.5 * size * inputs / inputs.norm(dim=1, keepdim=True)
    threshold = layer.gate(x[chosen]).values.amin(-1)  # the smallest coefficient that is kept there
    layer.gate.bias[dead] = 1.2 * threshold - (layer.gate.weight[dead] * x[chosen]).sum(-1)
    rows = torch.randn(count, x.shape[1])
    layer.experts.weight[dead] = 0.3 * layer.experts.weight[~dead].norm(dim=1).mean() * rows / rows.norm(dim=1, keepdim=True)
    for weight in (layer.gate.weight, layer.gate.bias, layer.experts.weight):
        state = job.optimizer.state[weight]
        state["exp_avg"][dead] = 0
        state["exp_avg_sq"][dead] = state["exp_avg_sq"][~dead].mean(0)
    job.last_fired[dead] = seen


def run(names: list[str], shared: Path, tokens: int, eval_tokens: int) -> Iterator[dict[str, Any]]:
    """Trains the variants side by side and judges each."""
    tokens = VARIANTS[names[0]].recipe.get("tokens", tokens)
    common = {
        "layers": str(LAYER),
        "k": K,
        "tokens": tokens,
        "eval_tokens": eval_tokens,
        "device": "cpu",
        "dtype": "float32",
    } | STEPS
    made, recipe = plan(**Subject(MODEL, *BOOKS, eval_tokens).paths(shared), **common)
    accelerator, tokenizer, block = make_accelerator(recipe), load_tokenizer(recipe.model), made.blocks[0]
    train, heldout, _ = open_texts(recipe, tokenizer)
    base = open_model(recipe.model).load(dtype=made.dtype)
    reporter = ConsoleReporter()
    with closing(train.batches(recipe.batch // recipe.context)) as batches:
        sample = list(itertools.islice(batches, 4))
        known = measure_statistics(base, [block], sample)[LAYER]
        inputs = torch.cat([record_activations(base, [block], ids)[LAYER].x[:, 1:].flatten(0, 1) for ids in sample])
        trials = {}
        for name in names:
            its = Recipe(**recipe.to_dict() | VARIANTS[name].recipe)
            layer_plan = plan_layer(block, its)
            layer = start(VARIANTS[name], base, layer_plan, its, known, inputs)
            trials[name] = Trial(name, layer_plan, layer, its, made.steps)
        with reporter.progress("train", "steps") as line:
            for step, ids in enumerate(itertools.islice(itertools.chain(sample, batches), made.steps)):
                x, y = (part.flatten(0, 1) for part in record_activations(base, [block], ids)[LAYER])
                for trial in trials.values():
                    trial.step(step, x, y, accelerator)
                line.update(step + 1, made.steps)
    layers = {name: trial.layer.eval().requires_grad_(False) for name, trial in trials.items()}
    for trial in trials.values():
        trial.job.set_k(K)
        trial.layer.gate.selection = None
    with reporter.progress("evaluate", "passes") as line:
        figures = Measurement(base, [block], [{LAYER: layer} for layer in layers.values()], heldout, 2048).run(line.update)
    probed = {name: probing(base, block, layers, tokenizer, shared, name, count) for name, count in PROBING.items()}
    for name, evaluation in zip(names, figures, strict=True):
        scores = {f"f1_{data}": found[name] for data, found in probed.items()}
        kept = {"name": name, "train_tokens": made.steps * tokens_per_step(recipe), "tokens": evaluation["tokens"]}
        yield kept | evaluation["layers"][0] | scores


def probing(base: PreTrainedModel, block: Any, layers: dict, tokenizer: Any, shared: Path, data: str, count: int) -> dict:
    """Mean F1 of each layer's best single experts."""
    labelled = read_labelled(str(shared / "probing" / f"{data}.jsonl"), samples=count)
    pooled = pool(base, block, layers, token_batches(labelled.texts, Packing(tokenizer, 128), 2048), len(labelled.texts))
    return {one.name: probe_units(one.features, np.array(labelled.labels), 0)["mean_f1"] for one in pooled}


def results() -> dict[str, dict[str, Any]]:
    """What was measured, in the order of VARIANTS."""
    read = {row["name"]: row for row in read_lines(RESULTS)}
    return {name: read[name] for name in VARIANTS if name in read}


def chart(rows: dict[str, dict[str, Any]]) -> Figure:
    """NMSE against expert_share, with the numbers of the page's rows: what has nothing to its upper left is on the front."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, row) in enumerate(rows.items(), start=1):
        recipe = VARIANTS[name].recipe
        which = "other" if "kind" in recipe else "constant" if recipe.get("k_start") == K else "falls"
        if row["expert_share"] is None:  # not better than no block at all
            continue
        axes.plot(row["nmse"], row["expert_share"], STYLES[which][1], color=STYLES[which][0])
        label = f"{number} {name}" if name in ("default", "encoder", "random", "pretrained", "transcoder") else number
        axes.annotate(label, (row["nmse"], row["expert_share"]), xytext=(4, 3), textcoords="offset points", fontsize=8)
    for share, error, label in PROTOTYPE:
        axes.plot(error, share, "x", color="#555555")
        axes.annotate(label, (error, share), xytext=(4, 3), textcoords="offset points", fontsize=7, color="#555555")
    for colour, mark, label in STYLES.values():
        axes.plot([], [], mark, color=colour, label=label)
    axes.legend(fontsize=8, loc="lower right")
    axes.set_xscale("log")
    ticks = (0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("NMSE on held-out text")
    axes.set_ylabel("expert_share")
    axes.set_title(f"{MODEL}, layer {LAYER}, K = {K}", fontsize=10)
    axes.grid(alpha=0.25)
    return figure


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@shared_option
@click.option("--only", help="Names, between semicolons; default: all.")
@click.option("--tokens", default=2_000_000, show_default=True)
@click.option("--eval-tokens", default=18_432, show_default=True)
@click.option("--at-once", default=7, show_default=True, help="Variants trained side by side in one pass.")
def measure(shared: Path, only: str | None, tokens: int, eval_tokens: int, at_once: int) -> None:
    """Train and judge."""
    names = list(VARIANTS) if only is None else [name.strip() for name in only.split(";")]
    if unknown := [name for name in names if name not in VARIANTS]:
        raise click.BadParameter(f"no variant {unknown[0]!r}; there are: {', '.join(VARIANTS)}")
    for _, alike in itertools.groupby(names, lambda name: VARIANTS[name].recipe.get("tokens")):
        alike = list(alike)
        for part in range(0, len(alike), at_once):
            measure_part(alike[part : part + at_once], shared, tokens, eval_tokens)
    chart(results()).savefig(KEPT / "training.png", dpi=150)


def measure_part(names: list[str], shared: Path, tokens: int, eval_tokens: int) -> None:
    """One pass, kept."""
    for row in run(names, shared, tokens, eval_tokens):
        known = results() | {row["name"]: row}
        write_lines(RESULTS, (known[name] for name in VARIANTS if name in known))
        share = value_of(row, "expert_share", ".2f")
        click.echo(f"{row['name']:30} ΔCE {row['delta_ce']:+.4f} NMSE {row['nmse']:.4f} share {share}")


@main.command()
def page() -> None:
    """Print docs/training.md."""
    click.echo((KEPT / "training.md").read_text())
    names = "# | variant | what | ΔCE | 95 % interval | KL | NMSE | share | unused | F1 languages | F1 news | tokens"
    rows = (
        f"{number} | {name}{' ¹' if row.get('first_form') else ''} | {VARIANTS[name].why} "
        f"| {row['delta_ce']:+.4f} | {range_of(row, 'delta_ce', '+.4f')} "
        f"| {row['kl']:.4f} | {row['nmse']:.4f} | {with_range(row, 'expert_share', '.2f')} | {unused(row)} "
        f"| {row['f1_languages']:.2f} | {row['f1_ag_news']:.2f} | {compact(row['train_tokens'])}, {row['tokens']:,}"
        for number, (name, row) in enumerate(results().items(), start=1)
    )
    click.echo(table(names, rows))


if __name__ == "__main__":
    main()
