"""Runs the benchmarks and prints docs/performance.md from what they measured.

    python scripts/measure/performance.py measure --device cpu --shared ../shared  # about half an hour on two cores
    python scripts/measure/performance.py measure --device cpu --only "any: " --kind AVX2  # what any processor should measure
    python scripts/measure/performance.py measure --device cuda --yardstick PATH  # needs nothing but a GPU; about ten minutes
    python scripts/measure/performance.py measure --device cuda --tiny --on cpu  # the GPU's list at a tiny scale, anywhere
    python scripts/measure/performance.py measure --device cpu --only compiled  # compiles the kernels; needs triton
    python scripts/measure/performance.py page > docs/performance.md

Every benchmark is a command of its own in this folder; its line of JSON is kept in docs/performance.jsonl with the command
that printed it, and takes the place of an earlier one of the same name. `--only` runs those whose names contain a word.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import click
from pages import DOCS, ROOT, SCRIPTS, cells, read_lines, table, write_lines

RESULTS = DOCS / "performance.jsonl"

# The layer's shapes with the paper's N: D, H, N, and --glu where the block is one.
SHAPES = {
    "GPT-2": "--d 768 --h 3072 --n 21490",
    "Pythia-1.4B": "--d 2048 --h 8192 --n 65536",
    "Llama-3.2-3B": "--d 3072 --h 8192 --n 86015 --glu",
}
TINY = {
    "GPT-2": "--d 32 --h 64 --n 656",
    "Pythia-1.4B": "--d 32 --h 64 --n 700",
    "Llama-3.2-3B": "--d 32 --h 64 --n 800 --glu",
}


@dataclass(frozen=True)
class Bench:
    """A command of this folder: its name in the results, and its arguments; {yardstick}, {shared} and the like are paths."""

    name: str
    command: str


def cpu_benches() -> Iterator[Bench]:
    """What two cores can measure."""
    batches = {"GPT-2": (4096, 22), "Pythia-1.4B": (1024, 6), "Llama-3.2-3B": (512, 5)}
    for shape, (batch, steps) in batches.items():
        words = f"bench_step.py {SHAPES[shape]} --k 32 --batch {batch} --steps {steps} --yardstick {{yardstick}}"
        yield Bench(f"step {shape} cpu", words)
        if shape == "GPT-2":
            yield Bench(f"step {shape} cpu, ours in fp32", f"{words} --precision fp32 --selection fp32")
    for n in (5376, 10752, 21504, 43008):
        yield Bench(f"scaling N {n}", f"bench_step.py --n {n} --steps 8 --alone --yardstick {{yardstick}}")
    for k in (8, 32, 128):
        yield Bench(f"scaling K {k}", f"bench_step.py --k {k} --steps 8 --alone --yardstick {{yardstick}}")
    for d in (384, 768, 1536):
        yield Bench(f"scaling D {d}", f"bench_step.py --d {d} --h {4 * d} --steps 8 --alone --yardstick {{yardstick}}")
    texts = "--data {shared}/text/train.jsonl.gz --eval-data {shared}/text/heldout.jsonl.gz"
    model = "{shared}/models/books-llama-6m " + texts
    yield Bench("convert books-llama-6m", f"bench_convert.py {model} --tokens 500k --eval-tokens 20k")
    yield Bench("cache books-llama-6m", f"bench_cache.py {model} --layer 3 --rounds 1")
    smollm2 = f"{{smollm2}} {texts} --layer 15 --tokens 20k --eval-tokens 500 --shuffle 100k"
    yield Bench("cache smollm2", f"bench_cache.py {smollm2} --rounds 1")
    yield Bench("selection books-llama-6m", f"bench_selection.py {model} --layer 3 --tokens 1M")
    yield Bench("kernels GPT-2 cpu", "bench_kernels.py --d 768 --n 21490 --device cpu")
    yield Bench("compiled kernels", "compile_kernels.py")
    yield Bench("pass gpt2 cpu", "bench_pass.py --model gpt2 --device cpu --steps 5 --warm-up 2 --dtype float32")
    yield from any_benches()
    for threads in (1, 2):
        yield Bench(f"peers {threads}", f"bench_peers.py {model} --layer 3 --threads {threads} --peers {{peers}}")
    for dtype in ("float32", "bfloat16"):
        yield Bench(f"inference gpt2 cpu {dtype}", f"bench_inference.py --model gpt2 --device cpu --dtype {dtype}")


def any_benches() -> Iterator[Bench]:
    """What every kind of processor should measure."""
    yield Bench("any: commands", "bench_commands.py")
    yield Bench("any: plan demo-glu", "bench_plan.py demo-glu")
    yield Bench("any: beside", "bench_beside.py --precision default")


def gpu_benches(device: str, tiny: bool) -> Iterator[Bench]:
    """What a data-centre GPU should measure; ``tiny`` runs the same commands at a scale that any machine manages."""
    shapes, steps, k = (TINY, 6, 2) if tiny else (SHAPES, 22, 32)
    batch = 128 if tiny else 4096
    words = f"--k {k} --batch {batch} --steps {steps} --device {device} --yardstick {{yardstick}}"
    for shape, numbers in shapes.items():
        yield Bench(f"step {shape} {device}", f"bench_step.py {numbers} {words} --rounds 2")
        yield Bench(f"step {shape} {device}, yardstick in bf16", f"bench_step.py {numbers} {words} --rounds 2 --bf16")
        d, _, n = (numbers.split()[position] for position in (1, 3, 5))
        few = "--batch 32 --seconds 0.1" if tiny else f"--batch {batch}"  # Triton's interpreter takes seconds for a call
        yield Bench(f"kernels {shape} {device}", f"bench_kernels.py --d {d} --n {n} --k {k} {few} --device {device}")
    model = "tiny" if tiny else "Llama-3.2-3B"
    yield Bench(f"pass {model} {device}", f"bench_pass.py --model {model} --device {device}")
    sizes = "64,128" if tiny else "2048,8192,32768"
    words = f"bench_inference.py --model {model} --n-experts {sizes} --device {device} --dtype bfloat16"
    yield Bench(f"inference {model} {device} bfloat16", words)


def kept() -> dict[str, dict[str, Any]]:
    """The results so far, by name."""
    return {record["name"]: record for record in read_lines(RESULTS)}


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), required=True, help="Whose list to run.")
@click.option("--on", type=click.Choice(["cpu", "cuda"]), default="cuda", help="Where the GPU's list runs.")
@click.option("--shared", default="../shared", show_default=True, help="Folder with models/, text/ and bench/.")
@click.option("--yardstick", help="Default: bench/dense_reference.py in the shared folder.")
@click.option("--peers", help="Python of an environment with others' packages; without it they are not measured.")
@click.option("--smollm2", help="Folder with SmolLM2-135M-Instruct; without it nothing of it is measured.")
@click.option("--only", default="", help="Benchmarks whose names contain this.")
@click.option("--kind", default="bf16", show_default=True, help="Of the processor; what `any:` measures is kept for each.")
@click.option("--tiny", is_flag=True, help="The GPU's list at a tiny scale; nothing is kept.")
def measure(
    device: str,
    on: str,
    shared: str,
    yardstick: str | None,
    peers: str | None,
    smollm2: str | None,
    only: str,
    kind: str,
    tiny: bool,
) -> None:
    """Run the benchmarks of a device and keep their lines."""
    benches = cpu_benches() if device == "cpu" else gpu_benches(on, tiny)
    # What no GPU runs, Triton's interpreter can, if triton is installed.
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if device == "cuda" and on == "cpu" else {})
    paths = {
        "shared": shared,
        "yardstick": yardstick or f"{shared}/bench/dense_reference.py",
        "peers": peers,
        "smollm2": smollm2,
    }
    for bench in benches:
        missing = any(f"{{{name}}}" in bench.command for name, path in paths.items() if path is None)
        if only not in bench.name or missing:
            continue
        script, *words = shlex.split(f"{bench.command.format(**paths)} --json")
        command = shlex.join(["python", str((SCRIPTS / script).relative_to(ROOT)), *words])
        click.echo(f"-- {bench.name}: {command}", err=True)
        called = [sys.executable, str(SCRIPTS / script), *words]
        done = subprocess.run(called, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            click.echo(f"   failed with exit code {done.returncode}; nothing is kept of it", err=True)
            continue
        lines = list(map(json.loads, done.stdout.splitlines()))
        click.echo(done.stdout)
        if not tiny:
            name = f"{bench.name} ({kind})" if bench.name.startswith("any: ") else bench.name
            record = {"name": name, "command": command, "result": lines if len(lines) > 1 else lines[0]}
            write_lines(RESULTS, (kept() | {name: record}).values())


def step_table(records: dict[str, dict[str, Any]]) -> str:
    """Steps beside the yardstick; rows that no GPU has measured yet stay empty."""
    rows = []
    names = [bench.name for bench in (*cpu_benches(), *gpu_benches("cuda", tiny=False)) if bench.name.startswith("step ")]
    for name in names:
        result = records.get(name, {}).get("result")
        if result is None:
            rows.append(cells(name.removeprefix("step "), *[""] * 10))
            continue
        ours, dense = result["ours"], result["yardstick"]
        rows.append(
            f"{name.removeprefix('step ')} | {result['batch']} | {ours['seconds_per_step']:.4g} "
            f"| {dense['seconds_per_step']:.4g} | **{result['speedup']:.1f}** | {ours['tokens_per_second']:,} "
            f"| {ours['above_state_mib']:,} | {dense['above_state_mib']:,} | {result['memory_ratio']:.2f} "
            f"| {result['loss_difference']:.0e} | {result['floor_ratio']:.2f}"
        )
    headings = (
        "shape and device | batch | s/step | yardstick | speedup | tokens/s | MiB above state | yardstick's | ratio "
        "| loss differs by | step / floor"
    )
    return table(headings, rows)


def scaling_table(records: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, record in records.items():
        if name.startswith("scaling "):
            r = record["result"]
            ours = r["ours"]
            rows.append(
                f"{name.split()[1]} | {r['d']} | {r['h']} | {r['n']} | {r['k']} | {ours['seconds_per_step']:.3f} "
                f"| {ours['peak_mib']:,} | {ours['above_state_mib']:,} | {r['floor_ratio']}"
            )
    return table("varied | D | H | N | K | s/step | peak MiB | above state | step / floor", rows)


def inference_table(records: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, record in records.items():
        if name.startswith("inference "):
            r = record["result"]
            original = r["original"]
            start = [r["model"], r["device"], r["dtype"]]
            speed = [f"{original['prefill_tokens_per_second']:,}", original["decode_tokens_per_second"]]
            rows.append(cells(*start, "original", *speed, "", "", f"{original['weight_bytes'] / 2**20:,.0f}"))
            for n, at in r["by_n"].items():
                speed = [f"{at['prefill_tokens_per_second']:,}", at["decode_tokens_per_second"]]
                slower = [f"{at['prefill_slowdown']:.2f}", f"{at['decode_slowdown']:.2f}"]
                rows.append(cells(*start, n, *speed, *slower, f"{at['weight_bytes'] / 2**20:,.0f}"))
    return table("model | device | dtype | N | prefill tokens/s | decode tokens/s | prefill x | decode x | weights MiB", rows)


def parts_table(records: dict[str, dict[str, Any]]) -> str:
    """Where the time of one layer goes, at the largest N."""
    rows, headings = [], ""
    for name, record in records.items():
        if name.startswith("inference "):
            r = record["result"]
            n, at = list(r["by_n"].items())[-1]
            for call in ("microseconds_one_token", "microseconds_prompt"):
                tokens = 1 if call.endswith("token") else r["prompt"]
                headings = cells(*at[call]).replace("_", " ")
                rows.append(cells(r["model"], r["dtype"], n, tokens, *(f"{value:,.0f}" for value in at[call].values())))
    return table(f"model | dtype | N | tokens | {headings}", rows)


def any_section(records: dict[str, dict[str, Any]]) -> str:
    """For each kind of processor: what is chosen, commands in each dtype, beside a busy process, planned and measured."""
    parts = []
    kinds = dict.fromkeys(name.rpartition(" (")[2].rstrip(")") for name in records if name.startswith("any: "))
    for kind in kinds:
        commands, plan, beside = (
            records.get(f"any: {bench} ({kind})", {}).get("result") for bench in ("commands", "plan demo-glu", "beside")
        )
        parts.append(f"### {kind}")
        if commands:
            words = f"{commands['hardware']}, torch {commands['torch']}. Of demo-glu, chosen: {commands['compute']}."
            parts.append(f"`{records[f'any: commands ({kind})']['command']}`: {words}")
            rows = (cells(f"`{name}`", *times.values()) for name, times in commands["commands"].items())
            parts.append(table("seconds | chosen | float32 | bfloat16 | chosen / better of both", rows))
        if beside:
            rows = (f"{row['threads']} | {row['waiting']} | {row['alone']} | {row['beside']}" for row in beside)
            words = f"seconds of the first {beside[0]['tokens']:,} tokens: threads | waiting | alone | beside a busy process"
            parts.append(table(words, rows))
        if plan:
            rows = (cells(stage, plan["planned"][stage], plan["measured"][stage]) for stage in plan["planned"])
            parts.append(
                f"{plan['model']}, {plan['layers']} layers, {plan['tokens']:,} tokens; evaluated on {plan['eval_tokens']:,} "
                f"tokens, single layers on {plan['eval_tokens_single']:,}:"
            )
            parts.append(table("seconds | planned | measured", rows))
    return "\n\n".join(parts)


def peer_row(row: dict[str, Any]) -> str:
    """A trainer's figures."""
    name = f"**{row['name']}**" if row["ours"] else row["name"]
    learns = "the output from itself" if row["autoencoder"] else "the output from the input"
    speed = (f"{row['tokens_per_second']:,}", f"{row['seconds']:.0f}", f"{row['peak_mib']:,}")
    return cells(name, learns, *speed, f"{row['nmse']:.4f}")


def reached_rows(rows: list[dict[str, Any]]) -> Iterator[str]:
    """When ours were as good as others in the end."""
    seconds = {row["name"]: row["seconds"] for row in rows}
    for row in rows:
        for other, at in row.get("reached", {}).items():
            if at["seconds"] is None:
                yield cells(row["name"], other, "never", "", f"{seconds[other]:.0f}", "")
            else:
                taken = (f"{at['tokens']:,}", f"{at['seconds']:.1f}", f"{seconds[other]:.0f}")
                yield cells(row["name"], other, *taken, f"{seconds[other] / at['seconds']:.1f}")


def peers_section(records: dict[str, dict[str, Any]]) -> str:
    """Our trainer beside others', a table for each run."""
    parts = []
    for name, record in records.items():
        if not name.startswith("peers "):
            continue
        r = record["result"]
        parts.append(
            f"`{record['command']}`: {r['hardware']}, torch {r['torch']}, all in {r['precision']}; D {r['d']}, features "
            f"{r['expansion'] * r['d']:,}, K {r['k']}, batch {r['batch']:,}; {r['tokens']:,} tokens, "
            f"{r['heldout_tokens']:,} held out."
        )
        parts.append(table("trainer | learns | tokens/s | seconds | peak MiB | NMSE", map(peer_row, r["rows"])))
        parts.append(
            table("ours | as good as | after tokens | seconds | the other's seconds | over ours", reached_rows(r["rows"]))
        )
    return "\n\n".join(parts) if parts else "Not measured yet."


def compiled_section(records: dict[str, dict[str, Any]]) -> str:
    """What the kernels take, compiled without a GPU, and what an H100 would need by arithmetic."""
    record = records.get("compiled kernels")
    if record is None:
        return "Not compiled yet."
    r = record["result"]
    rows, ways = [], []
    for row in r["kernels"]:
        taken = (
            cells(row[target]["registers"], row[target]["stack"], f"{row[target]['shared'] / 1024:.0f}")
            for target in ("sm_80", "sm_90")
        )
        predicted = row["microseconds_predicted"]
        work = cells(row["gflop"], row["kind"], row["mb"], predicted["operations"], predicted["memory"], row["bound_by"])
        rows.append(cells(row["shape"], row["kernel"]) + f" | {' | '.join(taken)} | {work}")
    for way in r["ways"]:
        ways.append(cells(way["shape"], way["way"], *way["nanoseconds_predicted"].values(), way["sum"]))
    target = "registers | stack | KiB"
    names = f"shape | kernel | sm_80 {target} | sm_90 {target} | GFLOP | in | MB | µs by operations | by bytes | bound by"
    said = f"`{record['command']}`, triton {r['triton']}; {r['tokens']:,} tokens, K {r['k']}:"
    choices = table("shape | way to choose in bf16 | product | copy of G | rest | ns a token, all predicted", ways)
    return f"{said}\n\n{table(names, rows)}\n\n{choices}"


def cache_table(records: dict[str, dict[str, Any]]) -> str:
    """Trainings without kept activations, that keep them, and on kept ones."""
    rows = []
    for name, record in records.items():
        if name.startswith("cache "):
            r = record["result"]
            start = (r["model"], r["layer"], f"{r['tokens']:,}", r["batch"], r["compute"], f"{r['bytes_per_token']:,}")
            for what in ("steps", "train", "command"):
                cpu = [r[run][f"{what}_cpu"] for run in ("without", "writing", "reading")]
                ratio = f"{cpu[0] / cpu[2]:.1f}"
                rows.append(cells(*start, what, *cpu, ratio, *(r[run][f"{what}_wall"] for run in ("without", "reading"))))
    headings = "model | layer | tokens | batch | computed in | bytes of a token | what | without | writing | reading"
    return table(f"{headings} | without / reading | by the clock, without | reading", rows)


def blocks(records: dict[str, dict[str, Any]], prefix: str) -> str:
    """Results as JSON, where they fit no table."""
    found = [r for name, r in records.items() if name.startswith(prefix)]
    return "\n\n".join(f"`{r['command']}`\n\n```json\n{json.dumps(r['result'], indent=2)}\n```" for r in found)


PAGE = """# Performance

Printed by `python scripts/measure/performance.py page` from docs/performance.jsonl, which its `measure` writes; each
line there holds the command that measured it. Times are medians. Cores are shared: a ratio within a row was measured in one
run, absolute times vary by a fifth from day to day. Hardware of the CPU rows: {hardware}. {gpu}

## Any processor

A model's weights are stored in one dtype and may be computed with in another. The second is chosen by timing this machine
once, in some tens of milliseconds: a decoder layer of the model's shape, and the products of a new layer. A model stored in
bfloat16 computes in bfloat16, or in float32 where that is more than a tenth faster. Each command below ran on demo-glu in
turn in the chosen dtype and in either; the fastest of `--rounds` runs counts, of which the first may include imports.
Everything ran on one thread, with another such job on the other core. Where a kind of processor is emulated, torch, oneDNN
and MKL were told to use AVX2 only (`ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2`): bf16
products are then 8 times as slow as fp32 ones; on a real processor without bf16 instructions they are 40 times as slow.

{any_kind}

## One training step

Our step is compared with the training step as it was published, which computes every expert densely: in fp32 unless stated,
from the same start, with the same batch and the same number of Adam steps. *MiB above state*: peak memory beyond parameters
and Adam's moments. *Floor*: the gate's product and those of encoder and decoder, forward and backward, at the best
matrix-product rate measured in the same run and precision.

{steps}

## Beside others' trainers

Trained on the same recorded activations, in the same order, by others' own code (`scripts/measure/peers_train.py`), with
their defaults, and by ours (bold); each alone in a process, in one run. *as good as*: when ours first had the NMSE on
held-out activations that the other had in the end. SAELens and dictionary_learning train autoencoders only.

{peers}

## Scaling of our step

Batch 4096, GPT-2's shape where not varied.

{scaling}

## All layers from one pass

{convert}

{passes}

## Activations kept on disk

`frontier --kinds mxd --k 32 --cache-activations FOLDER` on one layer, one thread: *without* the flag, with a new folder
(*writing*), and with the same folder again (*reading*); the weights are the same to the bit. *steps* are the training's
steps, *train* adds what comes before the first one, most of it the text, which is read until its shuffling buffer is full,
*command* adds loading, proving and measuring. Seconds of computing, since other jobs ran beside; the ratio is of these.
Medians, rounds: {cache_rounds}.

{cache}

## Selection in bf16

{selection}

## Kernels and plain torch

{kernels}

### Compiled for GPUs, and predicted

Compiled without a GPU: registers and bytes of stack (spills) of a thread, KiB of shared memory of a program. **All times are
predicted, none was measured**: what an H100 needs at least, at 989 (bf16), 494 (TF32; three products for one of fp32) or 67
TFLOP/s (fp32), and at 3.35 TB/s with each number read or written once. *best* finds the best three of each group of 32 (bf16)
or 16 (fp32) of N, *hidden* computes the rest of groups that may hide more, as often as if the best lay anywhere. With a copy
of G in bf16, *dots* of the K + 8 candidates and `torch.topk` of what was kept, they are the gate's choice.

{compiled}

The ways to choose differ in the *rest*, which goes through memory: plain torch writes and reads (tokens, N), for some tokens
at a time; candidates' rows of G are read in fp32, for each token anew. Of groups of which only the maximum is kept, every
member of the best K + 8 has to be computed again.

## Inference

All blocks of a randomly initialised model replaced, K = 32; *x*: times as slow as the original, measured in turn. The
largest N with which decode stays within 1.3 times the original: {largest}.

{inference}

Microseconds per call of the parts of one layer. The gate is the price of N experts. For one token nearly all of it is the
product, which reads all of G, N x D numbers; for a prompt, ranking and choosing take a quarter (fp32) to half (bf16, with the
exact ranking of the candidates) of it. Touching K experts costs almost nothing.

{parts}
"""


@main.command()
def page() -> None:
    """Print docs/performance.md."""
    records = kept()
    hardware = records["step GPT-2 cpu"]["result"]
    gpu = next((r["result"]["hardware"] for name, r in records.items() if " cuda" in name), None)
    largest = [
        f"{r['result']['largest_n_within_1.3x']:,} ({r['result']['model']}, {r['result']['device']}, {r['result']['dtype']})"
        for name, r in records.items()
        if name.startswith("inference ")
    ]
    click.echo(
        PAGE.format(
            hardware=f"{hardware['hardware']} with bf16 instructions, torch {hardware['torch']}",
            gpu=f"Of the GPU rows: {gpu}." if gpu else "No GPU has measured its rows yet: they are empty.",
            steps=step_table(records),
            peers=peers_section(records),
            scaling=scaling_table(records),
            convert=blocks(records, "convert "),
            passes=blocks(records, "pass "),
            any_kind=any_section(records),
            cache=cache_table(records),
            cache_rounds=", ".join(
                f"{r['result']['rounds']} ({r['result']['model']})" for name, r in records.items() if name.startswith("cache ")
            ),
            selection=blocks(records, "selection "),
            kernels=blocks(records, "kernels "),
            compiled=compiled_section(records),
            largest="; ".join(largest),
            inference=inference_table(records),
            parts=parts_table(records),
        ).rstrip()
    )


if __name__ == "__main__":
    main()
