"""Compiles every Triton kernel for A100 (sm_80) and H100 (sm_90), without a GPU, and says what an H100 would need at least.

    python scripts/measure/compile_kernels.py --json      # needs triton and half a minute

Registers and stack (spills) are of a thread, shared memory is of a program. The kernels are those that a training step of
4,096 tokens launches at a model's shape, compiled as for that launch. Times are arithmetic, nothing was measured: operations
at the processor's full rate, and bytes, each number read or written once, at its memory's.
"""

import json
import math
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import click
import torch
from performance import SHAPES

from mxdsurgery.layers import sparse

ARCHITECTURES = (80, 90)
# Of an H100 SXM: operations a second by kind, dense; bytes a second. From NVIDIA's data sheet.
RATES = {"bf16": 989e12, "tf32": 494.5e12, "fp32": 67e12}
BANDWIDTH = 3.35e12
TOKENS, K = 4096, 32
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}


def launches(d: int, n: int) -> Iterable[tuple[str, Any, tuple, dict[str, Any]]]:
    """What a step launches: a name, the kernel, its arguments and its constants; of several of a name, the last."""
    import triton

    from mxdsurgery.training import trial

    found: list[tuple[Any, tuple, dict[str, Any]]] = []

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        found.append((kernel, arguments, constants))

    x, weight = torch.empty(TOKENS, d, device="meta"), torch.empty(n, d, device="meta")
    bias, values = torch.empty(n, device="meta"), torch.empty(TOKENS, K, device="meta")
    indices = torch.empty(TOKENS, K, dtype=torch.int64, device="meta")
    trial.install("meta")
    try:
        with mock.patch.object(triton.JITFunction, "run", run):
            for selection in (torch.bfloat16, torch.float32):
                sparse.select(x, weight, bias, K, selection)
            sparse.mix(values, indices, weight)
            sparse.dots(x, indices, weight)
            sparse.scatter(values, indices, x, weight)
    finally:
        del sparse.KERNELS["meta"]
    named = {}
    for kernel, arguments, constants in found:
        name = kernel.__name__.strip("_")
        if name == "best":
            name += f" {'bf16' if arguments[0].dtype == torch.bfloat16 else 'fp32'}"
        elif name == "hidden":
            name += f" g {constants['GROUP']}"
        named[name] = (name, kernel, arguments, constants)
    return named.values()


def compiled(kernel: Any, arguments: tuple, constants: dict[str, Any], architecture: int) -> dict[str, int]:
    """What a launch takes on an architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    constants = {name: value for name, value in constants.items() if name not in options}
    types = [POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32" for value in arguments]
    signature = dict(zip(kernel.arg_names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    even = [isinstance(value, torch.Tensor) or value % 16 == 0 for value in arguments]
    attributes = {(place,): [["tt.divisibility", 16]] for place, is_even in enumerate(even) if is_even}
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", said).groups())
    return {"registers": registers, "stack": stack, "shared": made.metadata.shared, "warps": made.metadata.num_warps}


def hidden_rows(n: int, candidates: int, group: int) -> float:
    """Rows a token that `_hidden` reads, if the best lie anywhere: those of groups with three or more of the candidates."""
    share = group / n
    fewer = sum(math.comb(candidates, i) * share**i * (1 - share) ** (candidates - i) for i in range(3))
    return n / group * (1 - fewer) * (group - 3)


def needs(name: str, constants: dict[str, Any], d: int, n: int) -> tuple[str, float, float]:
    """A launch's kind of operations, how many, and the bytes that go to and from memory."""
    pairs = TOKENS * K
    rows = 4 * d * min(n, pairs)  # as if every expert that can be were chosen
    ends = 4 * d * TOKENS + 12 * pairs
    if name.startswith("best"):
        size, factors = (2, 1) if name.endswith("bf16") else (4, 3)
        kept = 4 * constants["BEST"] * TOKENS * n / constants["GROUP"]
        return ("bf16" if size == 2 else "tf32"), factors * 2.0 * TOKENS * n * d, size * d * (n + TOKENS) + 4 * n + kept
    if name.startswith("hidden"):
        read = hidden_rows(n, K + sparse.EXTRA_CANDIDATES, constants["GROUP"]) * TOKENS
        slots = 4 * TOKENS * constants["SLOTS"] * constants["GROUP"]
        return "fp32", 2.0 * read * d, 4 * d * (read + TOKENS) + slots
    return "fp32", 2.0 * pairs * d, ends + (4 * d * n if name == "scatter" else rows)


def kernel_rows(shape: str, d: int, n: int) -> Iterator[dict[str, Any]]:
    """What each kernel takes on each architecture, and what an H100 would need at least."""
    for name, kernel, arguments, constants in launches(d, n):
        kind, operations, size = needs(name, constants, d, n)
        times = {"operations": 1e6 * operations / RATES[kind], "memory": 1e6 * size / BANDWIDTH}
        yield {
            "shape": shape,
            "kernel": name,
            **{f"sm_{number}": compiled(kernel, arguments, constants, number) for number in ARCHITECTURES},
            "kind": kind,
            "gflop": round(operations / 1e9, 1),
            "mb": round(size / 1e6, 1),
            "microseconds_predicted": {name: round(value, 1) for name, value in times.items()},
            "bound_by": max(times, key=times.get),
        }


def ways(shape: str, d: int, n: int) -> Iterator[dict[str, Any]]:
    """Ways to choose in bf16, by what an H100 would need of each for a token: nanoseconds, predicted."""
    candidates = K + sparse.EXTRA_CANDIDATES
    # The top of numbers by maxima of four, of four of those, ...: each is read once, a third as many are written and read.
    top = 1 + 2 / 3
    exact, cast = 4 * d * candidates, 6 * n * d / TOKENS
    todo = {
        "plain torch": 2 * n * (1 + top) + exact,
        "maxima of groups of 8, all of the best groups again": 4 * n / 8 * (1 + top) + 8 * exact,
        "best three of groups of 32": 12 * n / 32 * (1 + top) + exact + 4 * d * hidden_rows(n, candidates, 32),
    }
    for way, size in todo.items():
        times = {"product": 2 * n * d / RATES["bf16"], "copy": cast / BANDWIDTH, "rest": size / BANDWIDTH}
        nanoseconds = {name: round(1e9 * value) for name, value in times.items()}
        yield {"shape": shape, "way": way, "nanoseconds_predicted": nanoseconds, "sum": sum(nanoseconds.values())}


@click.command(help=__doc__)
@click.option("--shape", "names", multiple=True, type=click.Choice(list(SHAPES)), help="Default: all.")
@click.option("--json", "as_json", is_flag=True)
def main(names: tuple[str, ...], as_json: bool) -> None:
    import triton

    kernels, choices = [], []
    for shape in names or SHAPES:
        words = SHAPES[shape].split()
        d = int(words[words.index("--d") + 1])
        n = math.ceil(int(words[words.index("--n") + 1]) / 512) * 512  # as a recipe has it
        kernels += kernel_rows(f"{shape}, D {d:,}, N {n:,}", d, n)
        choices += ways(f"{shape}, D {d:,}, N {n:,}", d, n)
    result = {"triton": triton.__version__, "tokens": TOKENS, "k": K, "kernels": kernels, "ways": choices}
    if as_json:
        click.echo(json.dumps(result))
    else:
        for row in kernels + choices:
            click.echo(" ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
