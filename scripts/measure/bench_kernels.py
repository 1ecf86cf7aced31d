"""Times the parts of a training step that choose experts and touch their rows: each Triton kernel beside plain torch.

    python scripts/measure/bench_kernels.py --d 3072 --n 86015 --k 32 --batch 4096 --device cuda --json
    TRITON_INTERPRET=1 python scripts/measure/bench_kernels.py --d 32 --n 656 --k 2 --batch 32 --seconds 0.1  # that it runs

One line of JSON with milliseconds (medians). Random data, but experts are used unevenly, as in training: some by every
hundredth token, most by few. On a CPU the plain side stands alone, but in Triton's interpreter, whose times say nothing.
"""

import importlib.util
import json
import os
from collections.abc import Callable
from typing import Any

import click
import torch

from mxdsurgery.hardware.timing import median_seconds
from mxdsurgery.layers import sparse
from mxdsurgery.recipe import RECIPE_KEYS


def milliseconds(functions: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median time of a call of each, called for some seconds."""
    return {name: round(1000 * median_seconds(function, seconds), 3) for name, function in functions.items()}


def selections(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int) -> dict[str, Callable[[], Any]]:
    """The gate's product in both precisions, ways to find the top, and the whole selection."""
    low = weight.bfloat16()
    pre = torch.nn.functional.linear(x.bfloat16(), low)
    candidates = k + sparse.EXTRA_CANDIDATES
    return choices(x, weight, bias, k) | {
        "gate_product_fp32": lambda: x @ weight.T,
        "gate_product_bf16": lambda: x.bfloat16() @ low.T,
        "cast_weight_to_bf16": lambda: weight.bfloat16(),
        "torch_topk": lambda: torch.topk(pre, candidates, sorted=False),
        "top_k": lambda: sparse.top_k(pre, candidates),
    }


def choices(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int) -> dict[str, Callable[[], Any]]:
    """The whole selection, by whatever is installed."""
    return {
        "select_fp32": lambda: sparse.select(x, weight, bias, k),
        "select_bf16": lambda: sparse.select(x, weight, bias, k, torch.bfloat16),
    }


def selections_in_triton(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int) -> dict[str, Callable[[], Any]]:
    """The best of groups, in place of the gate's product and its top, and the whole selection."""
    from mxdsurgery.training.gate_kernels import TILES, best_of_groups

    low = x.bfloat16(), weight.bfloat16()
    return choices(x, weight, bias, k) | {
        "best_of_groups_fp32": lambda: best_of_groups(x, weight, bias, TILES[4]),
        "best_of_groups_bf16": lambda: best_of_groups(*low, bias, TILES[2]),
    }


def products(
    x: torch.Tensor, weight: torch.Tensor, values: torch.Tensor, indices: torch.Tensor
) -> dict[str, Callable[[], Any]]:
    """The three sparse products."""
    return {
        "mix": lambda: sparse.mix(values, indices, weight),
        "dots": lambda: sparse.dots(x, indices, weight),
        "scatter": lambda: sparse.scatter(values, indices, x, weight),
    }


@click.command(help=__doc__)
@click.option("--d", default=768, show_default=True)
@click.option("--n", default=21490, show_default=True)
@click.option("--k", default=32, show_default=True)
@click.option("--batch", default=4096, show_default=True)
@click.option("--device", type=click.Choice(RECIPE_KEYS["device"].choices[1:]), default="cpu", show_default=True)
@click.option("--seconds", default=1.0, show_default=True, help="That each part is measured for.")
@click.option("--json", "as_json", is_flag=True)
def main(d: int, n: int, k: int, batch: int, device: str, seconds: float, as_json: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(batch, d, generator=generator).to(device), torch.randn(n, d, generator=generator).to(device)
    weight /= d**0.5
    # Biases spread the experts' use over some decades.
    bias = (0.5 * torch.randn(n, generator=generator)).to(device)
    values, indices = sparse.select(x, weight, bias, k)
    used = torch.bincount(indices.flatten(), minlength=n)
    result: dict[str, Any] = {"d": d, "n": n, "k": k, "batch": batch, "device": device}
    result |= {"experts_used": (used > 0).sum().item(), "most_used": used.max().item()}
    parts = products(x, weight, values, indices)
    result["plain"] = milliseconds(parts | selections(x, weight, bias, k), seconds)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if (device != "cpu" or interpreted) and importlib.util.find_spec("triton") is not None:
        from mxdsurgery.training import trial

        trials = [trial.install_if_faster(d, n, k, batch, device, selection) for selection in (None, torch.bfloat16)]
        result["trials"] = [[str(tried) for tried in some] for some in trials]
        if all(tried.triton is not None for some in trials for tried in some):
            trial.install(device)
            result["triton"] = milliseconds(parts | selections_in_triton(x, weight, bias, k), seconds)
    if as_json:
        click.echo(json.dumps(result))
    else:
        for side in ("plain", "triton"):
            for name, value in result.get(side, {}).items():
                click.echo(f"{side:8}{name:24}{value:10.3f} ms")


if __name__ == "__main__":
    main()
