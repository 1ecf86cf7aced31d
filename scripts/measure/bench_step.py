"""Times one training step of one layer, and beside it the same step with every expert computed densely (a yardstick).

    python scripts/measure/bench_step.py --d 768 --h 3072 --n 21490 --k 32 --batch 4096 --steps 20 --yardstick PATH --json

The yardstick is a Python file with `make_problem`, `make_params` and `step` (the training step as it was published, in plain
tensor code). Both sides start from the same weights, see the same batch and take the same number of Adam steps, each in a
process of its own, in turn, `--rounds` times; times are medians over all steps but the first two of each round.

Units: seconds, tokens/s, MiB. `peak_mib` is the most memory used at once, the batch and the program not counted,
`above_state_mib` what of it goes beyond parameters and Adam's moments; on a CPU they come from the process's resident set.
`floor_seconds` is the arithmetic that cannot be avoided (the gate's product and those of encoder and decoder, forward and
backward) at the best rate measured here in the precision of our step; `floor_ratio` is our step over it.
"""

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import torch
from torch import Tensor

from mxdsurgery.hardware.device import hardware, synchronise
from mxdsurgery.hardware.memory import PeakMemory
from mxdsurgery.hardware.timing import median_seconds
from mxdsurgery.layers.layer import MxDLayer
from mxdsurgery.recipe import RECIPE_KEYS, Recipe
from mxdsurgery.training.accelerator import choose_kernels, computes_in_bf16, make_accelerator, ranks_in
from mxdsurgery.training.distill import LayerInTraining, train_step

LR = 4e-4
_WARM_UP = 2


def load_yardstick(path: Path) -> ModuleType:
    """The yardstick's functions; its command line does not run."""
    spec = importlib.util.spec_from_file_location("yardstick", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def our_layer(params: dict[str, Tensor], k: int) -> MxDLayer:
    """Our layer with the yardstick's start: E (d, h), [E_up], D (h, d), G and C (n, d), biases."""
    glu = "E_up" in params
    with torch.device("meta"):
        layer = MxDLayer(
            d_model=params["D"].shape[1],
            d_hidden=params["D"].shape[0],
            n_experts=len(params["G"]),
            k=k,
            kind="glu" if glu else "mlp",
            activation="silu" if glu else "gelu",
            encoder_bias=True,
        )
    state = {
        "gate.weight": params["G"],
        "gate.bias": params["b_g"],
        "experts.weight": params["C"],
        "encoder.weight": params["E"].T.contiguous(),
        "encoder.bias": params["b_e"],
        "decoder.weight": params["D"].T.contiguous(),
        "bias": params["b"],
    }
    if glu:
        state |= {"encoder_up.weight": params["E_up"].T.contiguous(), "encoder_up.bias": params["b_up"]}
    layer.load_state_dict({name: value.detach() for name, value in state.items()}, assign=True)
    return layer.requires_grad_()


def our_steps(options: dict[str, Any], params: dict[str, Tensor], x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """Our training step, as `convert` runs it."""
    recipe = Recipe(
        k=options["k"],
        lr=LR,
        unit_norm=True,
        specialise=0.0,
        device=options["device"],
        precision=options["precision"],
        selection=options["selection"],
    )
    accelerator = make_accelerator(recipe)
    shape = {"d_model": options["d"], "n_experts": options["n"], "k": options["k"]}
    choose_kernels(accelerator, **shape, tokens=options["batch"], selection=ranks_in(recipe))
    job = LayerInTraining("the layer", our_layer(params, options["k"]), recipe)
    # The yardstick's loss is a mean over D as well, ours a sum: Adam's steps are the same if its epsilon grows with it.
    job.optimizer.param_groups[0]["eps"] *= x.shape[1]
    params.clear()
    seen = torch.zeros((), dtype=torch.float64, device=x.device)

    def step() -> Tensor:
        seen.copy_(job.sums[0])
        train_step(job, x, y, LR, 1, accelerator)
        return (job.sums[0] - seen) / x.shape[1]

    return step


def yardstick_steps(
    options: dict[str, Any], yardstick: ModuleType, params: dict[str, Tensor], x: Tensor, y: Tensor
) -> Callable[[], Tensor]:
    """The yardstick's step."""
    optimizer = torch.optim.Adam(params.values(), lr=LR)

    def step() -> Tensor:
        with torch.autocast(options["device"], torch.bfloat16, enabled=options["bf16"]):
            return yardstick.step(params, optimizer, x, y, options["k"])

    return step


def run_side(side: str, options: dict[str, Any], yardstick: ModuleType) -> dict[str, Any]:
    """One side's steps in this process."""
    device = options["device"]
    shape = options["d"], options["h"]
    x, y = yardstick.make_problem(*shape, options["batch"], options["glu"], device)
    size = y.norm(dim=-1, keepdim=True)
    y = y * size.mean() / size  # all of one size: the published loss knows no bound for uncommon ones
    params = yardstick.make_params(*shape, options["n"], options["glu"], device)
    adam_mib = 2 * 4 * sum(p.numel() for p in params.values()) / 2**20
    if side == "yardstick":
        step = yardstick_steps(options, yardstick, params, x, y)
    else:
        step = our_steps(options, params, x, y)
    memory = PeakMemory(device)  # of what is used now: the batch and the parameters, Adam's moments come with the first step
    seconds = []
    for _ in range(options["steps"]):
        synchronise(device)
        start = time.perf_counter()
        loss = step()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    above_state = memory.bytes() / 2**20 - adam_mib
    return {
        "seconds": seconds[_WARM_UP:],
        "peak_mib": above_state + 1.5 * adam_mib,
        "above_state_mib": above_state,
        "loss": loss.item(),
    }


def best_rate(products: list[tuple[int, int, int]], dtype: torch.dtype, device: str) -> float:
    """The highest rate of the products (m, k) x (k, n), in FLOP/s, on random data."""
    rates = []
    for m, inner, n in products:
        a = torch.randn(m, inner, device=device, dtype=dtype)
        b = torch.randn(n, inner, device=device, dtype=dtype)
        rates.append(2 * m * inner * n / median_seconds(lambda a=a, b=b: a @ b.T))
    return max(rates)


def floor_seconds(options: dict[str, Any], bf16: bool) -> float:
    """What the unavoidable products take at the best rate measured in the given precision."""
    batch, d, h, n = (options[name] for name in ("batch", "d", "h", "n"))
    dtype = torch.bfloat16 if bf16 else torch.float32
    products = [(batch, d, min(n, 16384)), (batch, d, h), (batch, h, d)]
    products += [(8192, 8192, 8192)] if options["device"] != "cpu" else []
    rate = best_rate(products, dtype, options["device"])
    factor = 7 if options["glu"] else 5  # forward E (E_up) D; backward dD dz dE (dE_up); x needs no gradient
    return (2 * batch * d * n + factor * 2 * batch * d * h) / rate


def summary(rounds: list[dict[str, Any]], batch: int) -> dict[str, Any]:
    """A side's figures over its rounds."""
    seconds = statistics.median(second for one in rounds for second in one["seconds"])
    return {
        "seconds_per_step": round(seconds, 6),
        "tokens_per_second": round(batch / seconds),
        "peak_mib": round(max(one["peak_mib"] for one in rounds)),
        "above_state_mib": round(max(one["above_state_mib"] for one in rounds)),
        "loss": rounds[0]["loss"],
    }


def compare(options: dict[str, Any]) -> dict[str, Any]:
    """Both sides, in turn, each round in processes of its own."""
    sides = ["ours", "yardstick"] if options["compare"] else ["ours"]
    rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(options["rounds"]):
        for side in sides:
            command = [sys.executable, __file__, "--side", side, *sys.argv[1:]]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rounds[side].append(json.loads(done.stdout.splitlines()[-1]))
    recipe = Recipe(device=options["device"], precision=options["precision"])
    bf16 = computes_in_bf16(recipe)
    floor = floor_seconds(options, bf16)
    names = ("d", "h", "n", "k", "batch", "steps", "glu", "device", "bf16", "selection")
    result = {name: options[name] for name in names}
    result |= {
        "our_precision": "bf16" if bf16 else "fp32",
        "hardware": hardware(options["device"]),
        "torch": torch.__version__,
    }
    result |= {side: summary(rounds[side], options["batch"]) for side in sides}
    ours = result["ours"]["seconds_per_step"]
    result |= {"floor_seconds": round(floor, 6), "floor_ratio": round(ours / floor, 2)}
    if options["compare"]:
        dense = result["yardstick"]
        result["speedup"] = round(dense["seconds_per_step"] / ours, 2)
        result["memory_ratio"] = round(result["ours"]["above_state_mib"] / max(dense["above_state_mib"], 1), 3)
        result["loss_difference"] = round(abs(result["ours"]["loss"] / dense["loss"] - 1), 7)
    return result


def readable(result: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{'':12}{'s/step':>10}{'tokens/s':>12}{'peak MiB':>10}{'above state':>13}{'loss':>12}"]
    for side in ("ours", "yardstick"):
        if side in result:
            row = result[side]
            lines.append(
                f"{side:12}{row['seconds_per_step']:>10.4f}{row['tokens_per_second']:>12,}{row['peak_mib']:>10,}"
                f"{row['above_state_mib']:>13,}{row['loss']:>12.6f}"
            )
    names = ("speedup", "memory_ratio", "loss_difference", "floor_seconds", "floor_ratio")
    return "\n".join([*lines, *(f"{name:16}{result[name]}" for name in names if name in result)])


@click.command(help=__doc__)
@click.option("--d", default=768, show_default=True, help="D, model width.")
@click.option("--h", default=3072, show_default=True, help="H, hidden width.")
@click.option("--n", default=21490, show_default=True, help="N, experts.")
@click.option("--k", default=32, show_default=True, help="K, active experts.")
@click.option("--batch", default=4096, show_default=True, help="Tokens per step.")
@click.option("--steps", default=20, show_default=True)
@click.option("--rounds", default=1, show_default=True, help="Times each side runs, in turn.")
@click.option("--glu", is_flag=True)
@click.option("--device", type=click.Choice(RECIPE_KEYS["device"].choices[1:]), default="cpu", show_default=True)
@click.option("--bf16", is_flag=True, help="Autocast the yardstick to bf16 too.")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", help="Ours, as the recipe key.")
@click.option("--selection", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", help="Ours, as the recipe key.")
@click.option("--yardstick", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--compare/--alone", default=True, help="Run the yardstick too, or our side only.")
@click.option("--side", type=click.Choice(["ours", "yardstick"]), hidden=True)
@click.option("--json", "as_json", is_flag=True, help="One line of JSON.")
def main(yardstick: Path, side: str | None, as_json: bool, **options: Any) -> None:
    if side is not None:
        click.echo(json.dumps(run_side(side, options, load_yardstick(yardstick))))
        return
    result = compare(options)
    click.echo(json.dumps(result) if as_json else readable(result))


if __name__ == "__main__":
    main()
