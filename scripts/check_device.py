"""Does on a device what it does on the CPU, and prints how far apart the two are: all that computes, in fp32.

    python scripts/check_device.py --device cuda      # needs nothing but the device; some minutes
    python scripts/check_device.py --device mps --tiny

What looks at a converted model is given the one that the CPU trained. `difference` is the largest of |device - CPU| / |CPU|
among a check's figures. Training may differ more than a pass: where two experts are all but equal, rounding decides which of
them learns. Exits with 1 where a check fails or differs by more than it may.
"""

import functools
import math
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

import mxdsurgery
from mxdsurgery import Edits
from mxdsurgery.hardware.device import check_device, hardware
from mxdsurgery.layers.layer import MxDLayer
from mxdsurgery.recipe import RECIPE_KEYS, Recipe
from mxdsurgery.training.accelerator import make_accelerator
from mxdsurgery.training.distill import LayerInTraining, train_step

EXACT = {"dtype": "float32", "precision": "fp32", "selection": "fp32"}
SHAPE = {"n_experts": 64, "batch": 1024, "shuffle": 0, "eval_tokens": 1_000}
CHANGED = Edits(ablate={1: [3]}, drop={2: [1]}, scale={2: {5: 2.0}}, steer={1: {7: 3.0}})
TEXTS = ("def f(x): return x + {}", "class A{}: import os")
# The largest relative difference: after a pass, and after many steps of training.
PASS, TRAINED = 1e-3, 5e-2


def step(device: str, _folder: Path, _out: Path, _tokens: int, **keys: Any) -> dict[str, float]:
    """Three steps of one layer on random numbers: the sparse products, their gradients and Adam."""
    recipe = Recipe(model="demo-glu", device=device, auxk=0.1, specialise=0.1, **EXACT, **keys)
    accelerator, generator = make_accelerator(recipe), torch.Generator().manual_seed(0)
    torch.manual_seed(0)  # of the layer's start
    layer = MxDLayer(n_experts=300, k=6, d_model=48, d_hidden=96, kind="glu", activation="silu", encoder_bias=True)
    x, y = (torch.randn(512, 48, generator=generator).to(accelerator.device) for _ in range(2))
    job = LayerInTraining("layer", layer.to(accelerator.device), recipe, dead_after=600)
    for number in range(3):
        train_step(job, x, y, 1e-2, 512 * (number + 1), accelerator)
    norms = {name: tensor.detach().cpu().norm().item() for name, tensor in layer.state_dict().items()}
    return norms | {"loss": job.sums[0].item(), "output": layer(x).detach().cpu().norm().item()}


def convert(device: str, _folder: Path, out: Path, tokens: int, **keys: Any) -> dict[str, float]:
    keys = {"layers": "1-2", "k": 4, "out": str(out), "tokens": tokens, "device": device} | SHAPE | EXACT | keys
    figures = mxdsurgery.convert("demo-glu", **keys).evaluation["all"]
    return {name: figures[name] for name in ("kl", "nmse", "constant_gate_nmse")}


def kept(device: str, folder: Path, out: Path, tokens: int) -> dict[str, float]:
    """A conversion from the activations that one before it kept; they have to be the device's own, to the bit."""
    keys = {"layers": "2", "cache_activations": str(out.with_name(f"{out.name} kept"))}
    convert(device, folder, out.with_name(f"{out.name} first"), tokens, **keys)
    return convert(device, folder, out, tokens, **keys)


def kinds(device: str, _folder: Path, out: Path, tokens: int) -> dict[str, float]:
    """Every kind of layer, trained and measured side by side."""
    keys = {
        "sparsity": "jumprelu",
        "kinds": RECIPE_KEYS["kind"].choices,
        "k": [4],
        "out": str(out),
        "tokens": tokens,
        "device": device,
    }
    rows = mxdsurgery.frontier("demo-glu", layer=1, **keys, **SHAPE, **EXACT).rows
    return {f"{row['kind']} {name}": row[name] for row in rows for name in ("kl", "nmse")}


def heal(device: str, folder: Path, out: Path, tokens: int, **options: Any) -> dict[str, float]:
    return {"kl": mxdsurgery.heal(folder, out=out, tokens=tokens, device=device, **options)["kl_after"]}


def passes(device: str, folder: Path, out: Path, _tokens: int) -> dict[str, float]:
    """All commands that measure a model or a machine."""
    text = {"tokens": 1_000, "device": device}
    figures = mxdsurgery.evaluate(folder, device=device)["all"]
    found = {name: figures[name] for name in ("kl", "nmse", "constant_gate_delta_ce", "l0")}
    found |= {f"stream {row['layer']}": row["fvu"] for row in mxdsurgery.growth(folder, **text)["stream"]}
    found["effect"] = mxdsurgery.effect(folder, edits=CHANGED, controls=1, **text)["all"]["kl"]
    found["edit"] = mxdsurgery.edit(folder, out=out, edits=CHANGED, **text)["kl"]
    found["flops"] = sum(mxdsurgery.plan("demo-glu", measure=True, device=device, **EXACT)[0].flops.values())
    swept = mxdsurgery.sweep(folder, layer=1, contexts_per_expert=1, **text)["experts"]
    return found | {"sweep": sum(row["kl"] for row in swept)}


def experts(device: str, folder: Path, out: Path, _tokens: int) -> dict[str, float]:
    """All commands that examine single experts, and text from the model."""
    labelled = folder.parent / "labelled.csv"
    labelled.write_text("label,text\n" + "".join(f"{n % 2},{TEXTS[n % 2].format(n)}\n" for n in range(60)))
    mxdsurgery.experts(folder, data="stdlib:heldout", tokens=3_000, device=device, overwrite=True)
    maximum = mxdsurgery.load(folder).model.mxd.maximum(1)
    mxdsurgery.coefficients(folder, out=out, tokens=1_000, device=device, form="safetensors")
    found = {path.name: load_file(path)["coefficients"].sum().item() for path in out.glob("layer*")}
    text = {"data": str(labelled), "device": device}
    found |= {one["name"]: one["mean_best_f1"] for one in mxdsurgery.probe(folder, **text)["subjects"]}
    looked = mxdsurgery.dissect(folder, **text)["subjects"][0]
    found |= {"rank": looked["rank"]["effective"]["50%"], "information": looked["specialisation"]["information"]}
    text, strongest = {"prompt": "def read(", "max_new_tokens": 8, "device": device}, int(maximum.argmax())
    mxdsurgery.steering(folder, edits=Edits(steer={1: {strongest: 1.0}}), unit="maximum", samples=2, controls=1, **text)
    said = mxdsurgery.generate(folder, edits=CHANGED, temperature=0, **text)
    found |= {"largest coefficients": maximum.sum().item()}
    return found | {f"{when} {at}": ord(c) for when in ("unedited", "edited") for at, c in enumerate(said[when][0])}


CHECKS: dict[str, tuple[Callable[[str, Path, Path, int], dict[str, float]], float]] = {
    "training steps of one layer": (step, PASS),
    "training steps of one layer, moments in bfloat16": (functools.partial(step, moments="bfloat16"), PASS),
    "convert, batchtopk, dead experts helped": (functools.partial(convert, sparsity="batchtopk", auxk=0.03), TRAINED),
    "convert, layer after layer, from disk": (functools.partial(convert, inputs="converted", offload="disk"), TRAINED),
    "convert, from kept activations": (kept, TRAINED),
    "convert, jointly": (functools.partial(convert, inputs="joint"), TRAINED),
    "every kind of layer, jumprelu": (kinds, TRAINED),
    "heal": (functools.partial(heal, checkpointing=True, local=0.1), TRAINED),
    "heal, LoRA too, from kept predictions": (functools.partial(heal, mode="both", teacher="cached"), TRAINED),
    "plan, evaluate, growth, effect, edit, sweep": (passes, PASS),
    "experts, coefficients, probe, dissect, steering, generate": (experts, PASS),
}


def compared(folder: Path, device: str, tokens: int) -> Iterator[dict[str, Any]]:
    """Every check's largest difference, and its figure; or the error that it failed with."""
    source = folder / "converted"
    convert("cpu", folder, source, tokens)
    for number, (name, (check, most)) in enumerate(CHECKS.items()):
        try:
            there, here = (check(where, source, folder / f"{number} {n}", tokens) for n, where in enumerate((device, "cpu")))
        except Exception:  # the others are still worth knowing
            yield {"check": name, "right": False, "failed": traceback.format_exc()}
            continue
        apart = {one: abs(there.get(one, math.nan) - here[one]) / max(abs(here[one]), 1e-9) for one in here}
        of = max(apart, key=lambda one: (apart[one] != apart[one], apart[one]))  # NaN first
        yield {"check": name, "right": apart[of] <= most, "difference": apart[of], "of": of, "allowed": most}


@click.command()
@click.option("--device", default="auto", show_default=True, type=click.Choice(RECIPE_KEYS["device"].choices))
@click.option("--tiny", is_flag=True, help="A few steps of each training only.")
def main(device: str, tiny: bool) -> None:
    """Prints a row for each check."""
    table = Table("check", "difference", "of", "allowed", title=f"{hardware(check_device(device))}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        rows = list(compared(Path(folder), device, 4_096 if tiny else 100_000))
    for row in rows:
        cells = ["failed"] if "failed" in row else [f"{row['difference']:.1e}", row["of"], f"{row['allowed']:.0e}"]
        table.add_row(row["check"], *cells, style=None if row["right"] else "red")
        click.echo(row.get("failed", ""), nl=False)
    Console().print(table)
    sys.exit(not all(row["right"] for row in rows))


if __name__ == "__main__":
    main()
