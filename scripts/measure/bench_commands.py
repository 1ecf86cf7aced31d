"""Times commands on the demo model in the dtype that is chosen for this machine, and in float32 and bfloat16.

    python scripts/measure/bench_commands.py [--rounds 2] [--only heal] [--json]

Each command runs in this process, in turn in each dtype, `rounds` times over, and the fastest counts. `ratio` is the chosen
dtype's time over the better of the other two. One that has bf16 instructions can be made to look as if it had not:

    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 python scripts/measure/bench_commands.py
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

import mxdsurgery
from mxdsurgery.hardware.device import hardware

SETTINGS = ("auto", "float32", "bfloat16")
CONVERT = {"layers": "all", "tokens": 40_000, "eval_tokens": 4_000, "device": "cpu", "shuffle": 100_000, "overwrite": True}


def commands(folder: Path, place: Path) -> dict[str, Callable[[str], Any]]:
    """What runs, by name, in a dtype: on a converted model in a folder, with results in a place."""
    labelled = place / "labelled.jsonl"
    rows = [{"text": f"def f{n}(x):\n    return x + {n}\n" * 8, "label": "odd" if n % 2 else "even"} for n in range(200)]
    labelled.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    ablate, steer = mxdsurgery.edits_from_flags(ablate="1:3"), mxdsurgery.edits_from_flags(steer="1:3=1")
    text = {"prompt": "import os\n", "max_new_tokens": 60}
    frontier = {name: value for name, value in CONVERT.items() if name != "layers"}
    m = mxdsurgery
    return {
        "convert": lambda c: m.convert("demo-glu", out=str(place / "made"), compute=c, **CONVERT),
        "frontier": lambda c: m.frontier("demo-glu", layer=1, k=(16,), out=str(place / "f"), compute=c, **frontier),
        "heal": lambda c: m.heal(folder, out=place / "healed", tokens=20_000, overwrite=True, compute=c),
        "evaluate": lambda c: m.evaluate(folder, tokens=4_000, compute=c),
        "evaluate --growth": lambda c: m.growth(folder, tokens=4_000, compute=c),
        "experts": lambda c: m.experts(folder, tokens=50_000, overwrite=True, compute=c),
        "search": lambda c: m.search(folder, "raise ValueError(", by="text", compute=c),
        "coefficients": lambda c: m.coefficients(folder, out=Path(tempfile.mkdtemp(dir=place)) / "c", tokens=4_000, compute=c),
        "generate": lambda c: m.generate(folder, compute=c, **text),
        "generate --samples 16": lambda c: m.generate(folder, samples=16, compute=c, **text),
        "generate --score": lambda c: m.steering(folder, edits=steer, factors=(1.0,), controls=1, compute=c),
        "effect": lambda c: m.effect(folder, edits=ablate, tokens=4_000, compute=c),
        "effect --sweep": lambda c: m.sweep(folder, layer=1, tokens=2_000, compute=c),
        "edit": lambda c: m.edit(folder, edits=ablate, out=place / "edited", tokens=4_000, overwrite=True, compute=c),
        "probe": lambda c: m.probe(folder, data=str(labelled), compute=c),
    }


def seconds(call: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@click.command(help=__doc__)
@click.option("--rounds", default=2, show_default=True, help="Times that each is run in each dtype.")
@click.option("--only", default="", help="Commands whose names contain this.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def main(rounds: int, only: str, as_json: bool) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        made = mxdsurgery.convert("demo-glu", out=str(place / "converted"), **CONVERT)
        mxdsurgery.experts(made.out, tokens=20_000)
        times: dict[str, dict[str, float]] = {}
        for name, run in commands(made.out, place).items():
            if only in name:
                found = {setting: [] for setting in SETTINGS}
                for _ in range(rounds):
                    for setting in SETTINGS:
                        found[setting].append(seconds(lambda run=run, setting=setting: run(setting)))
                times[name] = {setting: round(min(values), 3) for setting, values in found.items()}
                times[name]["ratio"] = round(times[name]["auto"] / min(times[name]["float32"], times[name]["bfloat16"]), 2)
                click.echo(f"{name:24}" + "".join(f"{key} {value:<10}" for key, value in times[name].items()), err=True)
    machine = made.plan.machine
    result = {
        "hardware": hardware("cpu"),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "emulated": "ONEDNN_MAX_CPU_ISA" in os.environ,
        "torch": torch.__version__,
        "compute": f"{machine.compute}: {machine.compute_why}",
        "commands": times,
    }
    click.echo(json.dumps(result) if as_json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
