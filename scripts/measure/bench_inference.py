"""Times a converted model against its original: reading a prompt (prefill) and writing one token at a time (decode).

    python scripts/measure/bench_inference.py --model openai-community/gpt2 --n-experts 1024,4096,21504 --device cpu --json

The model has the real config and random weights, all blocks replaced: the time does not depend on them. Both sides run in one
process, in turn, with a KV cache. One line of JSON: tokens per second and bytes of weights of the original
and for each N; the parts of one layer in microseconds per call; and `largest_n_within_1.3x`, from a line fitted through the
decode times. Units: tokens/s, microseconds, bytes.
"""

import json
import statistics
from typing import Any

import click
import torch
from real_configs import config_named
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from mxdsurgery.base.blocks import Block
from mxdsurgery.base.finding import find_blocks
from mxdsurgery.base.surgery import replaced
from mxdsurgery.hardware.device import hardware
from mxdsurgery.hardware.timing import median_seconds
from mxdsurgery.layers.layer import MxDLayer
from mxdsurgery.recipe import RECIPE_KEYS
from mxdsurgery.training.cost import LayerPlan
from mxdsurgery.training.initialize import layer_shape

# How much slower than the original a token may be written.
_ALLOWED = 1.3


@torch.no_grad()
def speeds(model: PreTrainedModel, prompt: Tensor, seconds: float) -> tuple[float, float]:
    """Seconds of a pass over the prompt (1, T), and of one more token after it."""
    prefill = median_seconds(lambda: model(input_ids=prompt, use_cache=True, logits_to_keep=1), seconds)
    cache = model(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values
    last = prompt[:, -1:]
    decode = median_seconds(lambda: model(input_ids=last, past_key_values=cache, use_cache=True), seconds)
    return prefill, decode


@torch.no_grad()
def parts(layer: MxDLayer, block: nn.Module, tokens: int, seconds: float, x: Tensor) -> dict[str, float]:
    """Microseconds of the parts of one layer, and of the block that it replaces, on so many tokens."""
    x = x[:tokens]
    a = layer.gate(x)
    z = layer.hidden(x)
    todo = {
        "original_block": lambda: block(x[None]),
        "layer": lambda: layer(x),
        "gate": lambda: layer.gate(x),
        "gate_product": lambda: layer.gate.pre_activations(x),
        "experts": lambda: layer.experts(a),
        "encoder": lambda: layer.hidden(x),
        "decoder": lambda: layer.decoder(z),
    }
    return {name: round(1e6 * median_seconds(function, seconds / 4), 1) for name, function in todo.items()}


def weight_bytes(model: PreTrainedModel) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def new_layers(blocks: list[Block], n_experts: int, k: int, dtype: torch.dtype, device: str) -> dict[int, MxDLayer]:
    """Random layers, in evaluation mode."""
    with torch.device(device):
        layers = {block.layer: MxDLayer(**layer_shape(LayerPlan(block, n_experts, k, 0))) for block in blocks}
    for layer in layers.values():
        nn.init.normal_(layer.decoder.weight, std=layer.decoder.in_features**-0.5)
        layer.to(dtype).eval().requires_grad_(False)
    return layers


def largest_within(slowdowns: dict[int, float]) -> int:
    """The N at which a straight line through (N, times as slow) reaches what is allowed; 0 where it is above it already."""
    slope, offset = statistics.linear_regression(list(slowdowns), list(slowdowns.values()))
    return max(0, int((_ALLOWED - offset) / slope))


@click.command(help=__doc__)
@click.option("--model", "name", default="openai-community/gpt2", show_default=True, help="In real_configs.py, or tiny.")
@click.option("--n-experts", default="1024,4096,8192,21504", show_default=True, help="N, several.")
@click.option("--k", default=32, show_default=True)
@click.option("--prompt", default=512, show_default=True, help="Tokens of the prompt.")
@click.option("--seconds", default=2.0, show_default=True, help="Of each measurement.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--device", type=click.Choice(RECIPE_KEYS["device"].choices[1:]), default="cpu", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(name: str, n_experts: str, k: int, prompt: int, seconds: float, dtype: str, device: str, as_json: bool) -> None:
    config, wanted = config_named(name), getattr(torch, dtype)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=wanted).eval().requires_grad_(False)
    blocks = [finding.block for finding in find_blocks(model)]
    ids = torch.randint(config.vocab_size, (1, prompt), device=device)
    x = torch.randn(prompt, blocks[0].d_model, device=device, dtype=wanted)
    original_block = model.base_model.get_submodule(blocks[0].path)
    result: dict[str, Any] = {
        "model": name,
        "device": device,
        "hardware": hardware(device),
        "dtype": dtype,
        "k": k,
        "prompt": prompt,
        "by_n": {},
    }
    original: list[tuple[float, float]] = []
    slowdowns: dict[int, float] = {}
    for n in map(int, n_experts.split(",")):
        layers = new_layers(blocks, n, k, wanted, device)
        original.append(speeds(model, ids, seconds))
        with replaced(model, blocks, layers):
            prefill, decode = speeds(model, ids, seconds)
            size = weight_bytes(model)
        original.append(speeds(model, ids, seconds))
        before = [statistics.mean(times) for times in zip(*original[-2:], strict=True)]
        slowdowns[n] = decode / before[1]
        result["by_n"][n] = {
            "prefill_tokens_per_second": round(prompt / prefill),
            "decode_tokens_per_second": round(1 / decode, 1),
            "prefill_slowdown": round(prefill / before[0], 2),
            "decode_slowdown": round(slowdowns[n], 2),
            "weight_bytes": size,
            "microseconds_one_token": parts(layers[blocks[0].layer], original_block, 1, seconds, x),
            "microseconds_prompt": parts(layers[blocks[0].layer], original_block, prompt, seconds, x),
        }
        del layers
    prefill, decode = (statistics.median(times) for times in zip(*original, strict=True))
    result["original"] = {
        "prefill_tokens_per_second": round(prompt / prefill),
        "decode_tokens_per_second": round(1 / decode, 1),
        "weight_bytes": weight_bytes(model),
    }
    result["largest_n_within_1.3x"] = largest_within(slowdowns)
    click.echo(json.dumps(result) if as_json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
