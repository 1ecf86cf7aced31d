"""Trains a layer on the same activations with this package and with others' own trainers, and compares what that took.

    python -m venv PEERS && PEERS/bin/pip install torch==2.13.0
    PEERS/bin/pip install torch==2.13.0 eai-sparsify==1.3.3 sae-lens==6.54.12 dictionary-learning==0.1.0
    PEERS/bin/pip uninstall -y torchvision       # what pip chose for them was built for another torch, and stops transformers
    python scripts/measure/bench_peers.py MODEL --layer 3 --data TRAIN --eval-data HELDOUT --peers PEERS/bin/python --json

What goes into a block and comes out of it is recorded once, in a random order, in fp32; every trainer learns from it, in this
order. Each trains in a process of its own, in turn, with as many features (--expansion times D), the same K and the same
batch. sparsify trains a transcoder, with its defaults and with Adam. SAELens and dictionary_learning can train none: theirs is
a TopK autoencoder of the block's output. `peers_train.py` is what runs them. Ours: a transcoder with a constant K, as theirs
have, and one with ours, which falls; an `mxd` of as many parameters; a `topk-sae`; and two with `convert`'s own small steps.

Figures: `tokens_per_second` of the training, recording and measuring not counted; `peak_mib`, the most memory beyond what the
process used with the activations read; `nmse`, ‖ŷ-y‖²/‖y‖² on held-out activations (position 0 of each context is left out);
`reached`, by another row's name: tokens and seconds when this one first was as good, on the way, as that one was in the end.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mxdsurgery.base.activations import Activations, record_activations
from mxdsurgery.hardware.device import hardware
from mxdsurgery.hardware.memory import PeakMemory
from mxdsurgery.planning.plan import open_and_plan
from mxdsurgery.text.sources import open_texts
from mxdsurgery.training.accelerator import make_accelerator
from mxdsurgery.training.distill import Progress, distill
from mxdsurgery.training.initialize import initial_layer, statistics_of
from mxdsurgery.training.inputs import OriginalInputs

# By name: which of the recipe's keys differ; "k" is K. With the peers' batch and the rate that so large a batch asks for; and
# with the steps and the rate that `convert` has by default.
LARGE = {"lr": 2e-3}
OURS: dict[str, dict[str, Any]] = {
    "transcoder, constant K": {"kind": "transcoder", "k_start": "k"} | LARGE,
    "transcoder": {"kind": "transcoder"} | LARGE,
    "mxd": {"kind": "mxd", "init": "encoder", "expert_share": 0.0} | LARGE,
    "topk-sae": {"kind": "topk-sae"} | LARGE,
    "transcoder, steps of 256": {"kind": "transcoder", "batch": 256},
    "mxd, steps of 256, expert_share 0.5": {"kind": "mxd", "batch": 256},
}
PEERS = ("sparsify", "sparsify, adam", "sae-lens", "dictionary-learning")
# What reconstructs the block's output from itself; the others predict it from the input.
AUTOENCODERS = ("sae-lens", "dictionary-learning", "topk-sae")


def recipe_keys(options: dict[str, Any], name: str) -> dict[str, Any]:
    """The recipe's keys for one of `OURS`."""
    shared = ("data", "eval_data", "tokens", "eval_tokens", "batch", "k", "expansion", "precision")
    keys = {key: options[key] for key in shared} | {"layers": str(options["layer"]), "dtype": "float32", "device": "cpu"}
    return keys | {key: options["k"] if value == "k" else value for key, value in OURS[name].items()}


@torch.no_grad()
def record(options: dict[str, Any], path: Path) -> None:
    """Records the block's activations: x and y (n, D) to train on, x_heldout and y_heldout."""
    made, recipe, base = open_and_plan(options["model"], None, recipe_keys(options, "transcoder"))
    model, texts = base.load(dtype="float32", device="cpu"), open_texts(recipe, base.tokenizer())
    (block,) = made.blocks
    with OriginalInputs(model, texts.train, recipe, torch.device("cpu")).feed([block]) as feed:
        pairs = [next(feed.batches)[block.layer] for _ in range(made.steps)]
    order = torch.randperm(sum(len(pair.x) for pair in pairs), generator=torch.Generator().manual_seed(0))
    x, y = (torch.cat(parts)[order] for parts in zip(*pairs, strict=True))
    heldout = record_activations(model, [block], texts.heldout)[block.layer]
    held = {f"{name}_heldout": part[:, 1:].flatten(0, 1).contiguous() for name, part in heldout._asdict().items()}
    save_file({"x": x, "y": y} | held, path)


def nmse(predicted: Tensor, y: Tensor) -> float:
    """‖ŷ-y‖²/‖y‖²."""
    return ((predicted - y).square().sum() / y.square().sum()).item()


def train_ours(name: str, options: dict[str, Any], path: Path) -> dict[str, Any]:
    """Trains one of `OURS` in this process, as `convert` trains it; measures it some fifty times on the way."""
    made, recipe, base = open_and_plan(options["model"], None, recipe_keys(options, name))
    model, data, recipe = base.load(dtype="float32", device="cpu"), load_file(path), made.settled(recipe)
    (plan,), accelerator = made.layers, make_accelerator(recipe)
    layer_number, batch = plan.block.layer, recipe.batch
    first = {layer_number: Activations(*(data[part][: 8 * batch].view(1, -1, data[part].shape[1]) for part in "xy"))}
    layer = initial_layer(model, plan, recipe, statistics_of([first])[layer_number])
    reads_output = plan.kind == "topk-sae"
    seen: list[tuple[int, float, float]] = []
    clock = {"since": 0.0, "seconds": 0.0}

    def batches() -> Iterator[dict[int, Activations]]:
        pairs = zip(data["x"].split(batch), data["y"].split(batch), strict=True)
        yield from ({layer_number: Activations(x, y)} for x, y in pairs)

    def report(progress: Progress) -> None:
        clock["seconds"] += time.perf_counter() - clock["since"]
        seen.append((progress.tokens, clock["seconds"], heldout_nmse(layer, recipe.k, data, reads_output)))
        clock["since"] = time.perf_counter()

    progress, memory = Progress(len(data["x"]) // batch, batch), PeakMemory("cpu")
    clock["since"] = time.perf_counter()
    distill({plan: layer}, batches(), recipe, accelerator, progress, report)
    return {"seconds": seen[-1][1], "tokens": seen[-1][0], "nmse": seen[-1][2], "peak_bytes": memory.bytes(), "seen": seen}


@torch.no_grad()
def heldout_nmse(layer: nn.Module, k: int, data: dict[str, Tensor], reads_output: bool) -> float:
    """On the held-out activations, with K experts whatever K training has come to."""
    y, gate = data["y_heldout"], layer.gate
    now, gate.k = gate.k, k
    if reads_output:
        scale, rest = layer.dense_path(y)
        found = nmse(layer.mixture(gate(y), y) * scale + rest, y)
    else:
        found = nmse(layer(data["x_heldout"]), y)
    gate.k = now
    return found


def run(name: str, options: dict[str, Any], path: Path) -> dict[str, Any]:
    """One training in a process of its own."""
    if name in OURS:
        command = [sys.executable, __file__, *sys.argv[1:], "--side", name, "--recorded", str(path)]
    else:
        given = ("expansion", "k", "batch", "threads")
        flags = [word for option in given for word in (f"--{option}", str(options[option]))]
        script = str(Path(__file__).with_name("peers_train.py"))
        command = [options["peers"], script, name, str(path), *flags]
    click.echo(f"-- {name}", err=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise click.ClickException(f"{name} failed with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def reached(row: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """When a training first was as good as another was in the end: tokens and seconds, None if never."""
    tokens, seconds, _ = next((seen for seen in row["seen"] if seen[2] <= other["nmse"]), (None, None, None))
    return {"tokens": tokens, "seconds": seconds}


def compare(options: dict[str, Any]) -> dict[str, Any]:
    """All rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recorded.safetensors"
        record(options, path)
        names = [name for name in (*PEERS, *OURS) if options["only"] is None or name in options["only"].split("; ")]
        runs = [{name: run(name, options, path) for name in names} for _ in range(options["rounds"])]
        recorded = load_file(path)
    best = {name: min((one[name] for one in runs), key=lambda row: row["seconds"]) for name in names}
    rows = []
    for name, row in best.items():
        seconds = statistics.median(one[name]["seconds"] for one in runs)
        rows.append(
            {
                "name": name,
                "ours": name in OURS,
                "autoencoder": name in AUTOENCODERS,
                "seconds": round(seconds, 2),
                "tokens_per_second": round(row["tokens"] / seconds),
                "peak_mib": round(row["peak_bytes"] / 2**20),
                "nmse": round(row["nmse"], 5),
            }
        )
        if name in OURS:
            like = [other for other in PEERS if other in best and (other in AUTOENCODERS) == (name in AUTOENCODERS)]
            rows[-1]["reached"] = {other: reached(row, best[other]) for other in like}
    names = ("layer", "k", "batch", "threads", "rounds", "expansion", "precision")
    shape = {"d": recorded["x"].shape[1], "tokens": len(recorded["x"]), "heldout_tokens": len(recorded["x_heldout"])}
    about = {"model": Path(options["model"]).name, "hardware": hardware("cpu"), "torch": torch.__version__}
    return about | {name: options[name] for name in names} | shape | {"rows": rows}


@click.command(help=__doc__)
@click.argument("model")
@click.option("--layer", default=3, show_default=True)
@click.option("--data", required=True)
@click.option("--eval-data", required=True)
@click.option("--tokens", default="400k", show_default=True)
@click.option("--eval-tokens", default="18k", show_default=True)
@click.option("--k", default=32, show_default=True)
@click.option("--expansion", default=32, show_default=True, help="Features of a transcoder, in multiples of D.")
@click.option("--batch", default=2048, show_default=True)
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True, help="Ours.")
@click.option("--threads", default=1, show_default=True)
@click.option("--rounds", default=1, show_default=True, help="Times each trains; seconds are medians.")
@click.option("--peers", required=True, help="Python of the environment with the others' packages.")
@click.option("--only", help="Names of rows, with '; ' between them.")
@click.option("--side", hidden=True)
@click.option("--recorded", type=click.Path(path_type=Path), hidden=True)
@click.option("--json", "as_json", is_flag=True, help="One line of JSON.")
def main(side: str | None, recorded: Path | None, as_json: bool, **options: Any) -> None:
    torch.set_num_threads(options["threads"])
    if side is not None:
        click.echo(json.dumps(train_ours(side, options, recorded)))
        return
    result = compare(options)
    click.echo(json.dumps(result) if as_json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
