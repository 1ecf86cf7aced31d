"""Trains all layers of a randomly initialised model at once, from one pass, and compares with what `plan` predicted.

    python scripts/measure/bench_pass.py --model meta-llama/Llama-3.2-3B --device cuda --json
    python scripts/measure/bench_pass.py --model tiny --device cpu --json

The model has the real config and random weights: speed and memory do not depend on them. Token ids are random too.
One line of JSON: tokens per second and peak memory of the first group's pass, measured over all steps but the first
`--warm-up`, beside the plan's predictions. Units: seconds, tokens/s, bytes. On a CPU the peak is resident memory above what
the process had before.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import click
import torch
from real_configs import config_named
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

import mxdsurgery
from mxdsurgery.base.activations import stream_activations
from mxdsurgery.hardware.device import hardware, synchronise
from mxdsurgery.hardware.memory import PeakMemory
from mxdsurgery.planning.plan import Plan
from mxdsurgery.recipe import RECIPE_KEYS, Recipe
from mxdsurgery.training.accelerator import choose_kernels, make_accelerator, ranks_in
from mxdsurgery.training.cost import tokens_per_step
from mxdsurgery.training.distill import Progress, distill
from mxdsurgery.training.initialize import initial_layers, measure_statistics


def random_batches(recipe: Recipe, vocabulary: int) -> Iterator[Tensor]:
    """Batches of random token ids, (B, T) int64, without end."""
    generator = torch.Generator().manual_seed(recipe.seed)
    while True:
        yield torch.randint(vocabulary, (recipe.batch // recipe.context, recipe.context), generator=generator)


def train_first_group(config: PreTrainedConfig, plan: Plan, recipe: Recipe, steps: int, warm_up: int) -> dict[str, Any]:
    """Steps of the first group's pass: its speed and its peak memory."""
    accelerator = make_accelerator(recipe)
    memory = PeakMemory(accelerator.device.type)
    with accelerator.device:
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, plan.dtype)).eval().requires_grad_(False)
    chosen = [layer for layer in plan.layers if layer.block.layer in plan.groups[0].layers]
    batches = random_batches(recipe, config.vocab_size)
    sample = [next(batches).to(accelerator.device)]
    blocks = [layer.block for layer in chosen]
    layers = initial_layers(model, chosen, measure_statistics(model, blocks, sample), recipe)
    first = chosen[0]
    shape = {"d_model": first.block.d_model, "n_experts": first.n_experts, "k": first.k}
    kernels = choose_kernels(accelerator, **shape, tokens=recipe.batch, selection=ranks_in(recipe))
    times: list[float] = []

    def timed(source: Iterator[Tensor]) -> Iterator[Tensor]:
        for batch in source:
            synchronise(accelerator.device.type)
            times.append(time.perf_counter())
            yield batch

    progress = Progress(steps, tokens_per_step(recipe))
    feed = stream_activations(model, blocks, timed(batches), accelerator.device)
    distill(layers, feed, recipe, accelerator, progress, lambda _: None)
    synchronise(accelerator.device.type)
    seconds = (time.perf_counter() - times[warm_up]) / (steps - warm_up)
    return {"seconds_per_step": seconds, "peak_bytes": memory.bytes(), "kernels": kernels}


@click.command(help=__doc__)
@click.option("--model", default="meta-llama/Llama-3.2-3B", show_default=True, help="A name in real_configs.py, or tiny.")
@click.option("--device", type=click.Choice(RECIPE_KEYS["device"].choices[1:]), default="cuda", show_default=True)
@click.option("--n-experts", type=int, help="N; default: the recipe's.")
@click.option("--batch", type=int, help="Tokens per step; default: the recipe's.")
@click.option("--steps", default=12, show_default=True)
@click.option("--warm-up", default=4, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="bfloat16", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(model: str, device: str, steps: int, warm_up: int, as_json: bool, **overrides: Any) -> None:
    config = config_named(model)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        plan, recipe = mxdsurgery.plan(folder, device=device, layers="all", measure=True, **overrides)
    measured = train_first_group(config, plan, recipe, steps, warm_up)
    group = plan.groups[0]
    tokens = tokens_per_step(recipe)
    result = {
        "model": model,
        "device": device,
        "hardware": hardware(device),
        "dtype": plan.dtype,
        "n_experts": plan.layers[0].n_experts,
        "k": plan.layers[0].k,
        "batch": tokens,
        "layers_at_once": len(group.layers),
        "groups": len(plan.groups),
        "trained_parameters": group.parameters,
        "tokens_per_second": round(tokens / measured["seconds_per_step"]),
        "planned_tokens_per_second": group.seconds and round(tokens * plan.steps / group.seconds),
        "peak_bytes": measured["peak_bytes"],
        "planned_peak_bytes": group.peak_bytes - group.text_bytes,  # no text is shuffled here
        "kernels": measured["kernels"],
    }
    if measured["peak_bytes"]:
        result["planned_over_measured"] = round(result["planned_peak_bytes"] / measured["peak_bytes"], 3)
    if as_json:
        click.echo(json.dumps(result))
    else:
        click.echo("\n".join(f"{name:28}{value}" for name, value in result.items()))


if __name__ == "__main__":
    main()
