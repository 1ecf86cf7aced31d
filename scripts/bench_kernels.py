"""Times the parts of a training step that choose experts and touch their rows: each Triton kernel beside plain torch.

    python scripts/bench_kernels.py --d 3072 --n 86015 --k 32 --batch 4096 --device cuda --json

One line of JSON with milliseconds (medians). Random data, but experts are used unevenly, as in training: some by every
hundredth token, most by few. On a CPU, where there are no kernels, the plain side stands alone.
"""

import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import click
import torch

from mxdsurgery import sparse


def milliseconds(function: Callable[[], Any], device: str, repeats: int) -> float:
    """Median time of a call, after two to warm up."""
    times = []
    for repeat in range(repeats + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        if repeat >= 2:
            times.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(times), 3)


def selections(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int, repeats: int) -> dict[str, float]:
    """The gate's product in both precisions, ways to find the top, and the whole selection."""
    device, low = x.device.type, weight.bfloat16()
    pre = torch.nn.functional.linear(x.bfloat16(), low)
    candidates = k + sparse.EXTRA_CANDIDATES
    todo = {
        "gate_product_fp32": lambda: x @ weight.T,
        "gate_product_bf16": lambda: x.bfloat16() @ low.T,
        "cast_weight_to_bf16": lambda: weight.bfloat16(),
        "torch_topk": lambda: torch.topk(pre, candidates, sorted=False),
        "top_k": lambda: sparse.top_k(pre, candidates),
        "select_fp32": lambda: sparse.select(x, weight, bias, k),
        "select_bf16": lambda: sparse.select(x, weight, bias, k, torch.bfloat16),
    }
    return {name: milliseconds(function, device, repeats) for name, function in todo.items()}


def products(x: torch.Tensor, weight: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, repeats: int) -> dict:
    """The three sparse products, and the backward of `mix` as plain torch does it in one."""
    device = x.device.type
    todo = {
        "mix": lambda: sparse.mix(values, indices, weight),
        "dots": lambda: sparse.dots(x, indices, weight),
        "scatter": lambda: sparse.scatter(values, indices, x, weight),
    }
    return {name: milliseconds(function, device, repeats) for name, function in todo.items()}


@click.command(help=__doc__)
@click.option("--d", default=768, show_default=True)
@click.option("--n", default=21490, show_default=True)
@click.option("--k", default=32, show_default=True)
@click.option("--batch", default=4096, show_default=True)
@click.option("--repeats", default=10, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(d: int, n: int, k: int, batch: int, repeats: int, device: str, as_json: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(batch, d, generator=generator).to(device), torch.randn(n, d, generator=generator).to(device)
    weight /= d**0.5
    # Biases spread the experts' use over some decades.
    bias = (0.5 * torch.randn(n, generator=generator)).to(device)
    values, indices = sparse.select(x, weight, bias, k)
    used = torch.bincount(indices.flatten(), minlength=n)
    result: dict[str, Any] = {"d": d, "n": n, "k": k, "batch": batch, "device": device}
    result |= {"experts_used": (used > 0).sum().item(), "most_used": used.max().item()}
    result["plain"] = products(x, weight, values, indices, repeats) | selections(x, weight, bias, k, repeats)
    if device == "cuda" and importlib.util.find_spec("triton") is not None:
        from mxdsurgery import kernels

        kernels.install()
        result["triton"] = products(x, weight, values, indices, repeats) | selections(x, weight, bias, k, repeats)
    if as_json:
        click.echo(json.dumps(result))
    else:
        for side in ("plain", "triton"):
            for name, value in result.get(side, {}).items():
                click.echo(f"{side:8}{name:24}{value:10.3f} ms")


if __name__ == "__main__":
    main()
