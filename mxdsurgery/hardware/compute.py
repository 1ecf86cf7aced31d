"""The dtype to compute in: chosen by timing this device, never by a list of its instructions.

Weights are stored in the checkpoint's dtype, those of the result too. The dtype that a stage *computes* in is another thing: a
processor without bf16 instructions multiplies bf16 matrices 40 times as slowly as fp32 ones, one with them several times as
fast. So a model computes in the dtype that its weights are stored in, or in float32 where that is faster here; in a narrower
one only if asked to. Layers in training, whose weights are float32, compute under bf16 autocast where that is faster.

Each shape is timed once on a machine, in some tens of milliseconds, and the result is kept in the hub's cache folder.
"""

import functools
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import cached_assets_path
from torch import nn

from mxdsurgery.aside import file_aside
from mxdsurgery.hardware.device import hardware, synchronise

# A dtype has to be so many times as fast as the preferred one to be chosen instead.
_WORTH_IT = 1.1
# Timed on as many rows as take the slower dtype so many seconds, if there are as many; the best of so many calls.
_LONG_ENOUGH, _CALLS = 0.01, 4
# A clock has to tell moments that are so many seconds apart.
_FINE = 1e-6
# Wider matrices are timed at this width: their rate is the same.
_WIDEST = 1024
# Where rates are kept: seconds by machine, by what was measured, and by dtype.
_RATES_FILE = "rates-1.json"
Known = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Shape:
    """The shape of what a model computes at a time.

    Attributes:
        tokens: B T of a forward pass.
        context: T.
        d_model: D.
        d_hidden: H.
        heads: of the attention.
    """

    tokens: int
    context: int
    d_model: int
    d_hidden: int
    heads: int = 1


@dataclass(frozen=True)
class Choice:
    """A dtype to compute in (``float32``, ``bfloat16`` or ``float16``), and why, in words."""

    dtype: str
    why: str

    def __str__(self) -> str:
        return f"{self.dtype}: {self.why}"


def model_dtype(stored: str, asked: str, device: str, shape: Shape) -> Choice:
    """The dtype that a model computes in, by the dtype that its weights are stored in.

    Args:
        stored: ``float32``, ``bfloat16`` or ``float16``.
        asked: one of them, or ``auto``: as stored, or in float32 where that is faster.
        device: torch's name of it, for example ``cpu``.
        shape: of a forward pass.
    """
    if asked != "auto":
        return Choice(asked, "as asked for")
    if stored == "float32":
        return Choice(stored, "as stored")
    return _faster(stored, "float32", layer_seconds(device, (stored, "float32"), shape), device)


def training_dtype(device: str, tokens: int, d_in: int, d_out: int) -> Choice:
    """The dtype of products of tokens with float32 weights (d_out, d_in): float32, or bfloat16 where that is faster."""
    dtypes = ("float32", "bfloat16")
    return _faster(*dtypes, product_seconds(device, dtypes, tokens, d_in, d_out), device)


def _faster(first: str, second: str, seconds: dict[str, float], device: str) -> Choice:
    """The first of two dtypes, or the second where that is clearly faster."""
    ratio = seconds[second] / seconds[first]
    where = "this processor" if device == "cpu" else "this device"
    if ratio < 1 / _WORTH_IT:
        return Choice(second, f"{first} takes {1 / ratio:.2g} times as long on {where}")
    if ratio > _WORTH_IT:
        return Choice(first, f"{second} takes {ratio:.2g} times as long on {where}")
    return Choice(first, f"{second} is no faster on {where}")


def layer_seconds(device: str, dtypes: tuple[str, ...], shape: Shape) -> dict[str, float]:
    """Seconds per token of a decoder layer of a shape, built by torch's own class, in some dtypes; kept for this machine."""
    d, h = min(shape.d_model, _WIDEST), min(shape.d_hidden, 2 * _WIDEST)
    heads = max(1, min(shape.heads, shape.heads * d // shape.d_model))
    heads = heads if d % heads == 0 else 1
    contexts = max(1, shape.tokens // shape.context)

    def layer_in(dtype: torch.dtype) -> Callable[[int], Any]:
        # In training mode, or torch would take a path that no language model takes.
        layer = nn.TransformerEncoderLayer(d, heads, h, dropout=0.0, norm_first=True, batch_first=True, device="meta")
        layer = layer.to(dtype).to_empty(device=device)
        for weight in layer.parameters():
            nn.init.constant_(weight, 0.01)
        mask = nn.Transformer.generate_square_subsequent_mask(shape.context, device=device, dtype=dtype)
        x = torch.full((contexts, shape.context, d), 0.1, device=device, dtype=dtype)

        def run(tokens: int) -> None:
            part = x[: max(1, tokens // shape.context), : min(tokens, shape.context)]
            length = part.shape[1]
            layer(part, src_mask=mask[:length, :length], is_causal=True)

        return run

    what = f"layer, tokens {shape.tokens} of {shape.context}, D {d}, H {h}, heads {heads}"
    return _kept(device, what, dtypes, layer_in, contexts * shape.context)


def product_seconds(device: str, dtypes: tuple[str, ...], tokens: int, d_in: int, d_out: int) -> dict[str, float]:
    """Seconds per token of a product with a float32 matrix that is first cast to a dtype, as autocast does; kept likewise."""
    d_in, d_out = min(d_in, _WIDEST), min(d_out, 4 * _WIDEST)

    def product_in(dtype: torch.dtype) -> Callable[[int], Any]:
        x, weight = torch.full((tokens, d_in), 0.1, device=device), torch.full((d_out, d_in), 0.01, device=device)
        return lambda rows: F.linear(x[:rows].to(dtype), weight.to(dtype))

    return _kept(device, f"product, tokens {tokens}, {d_in} to {d_out}", dtypes, product_in, tokens)


def _kept(
    device: str, what: str, dtypes: tuple[str, ...], made: Callable[[torch.dtype], Callable[[int], Any]], rows: int
) -> dict[str, float]:
    """Seconds per row of something in some dtypes on this machine, measured now or in an earlier process."""

    def timed() -> dict[str, float]:
        return _seconds_per_row({dtype: made(getattr(torch, dtype)) for dtype in dtypes}, rows, device)

    return _measured(_machine(device), f"{what}, {' or '.join(dtypes)}", timed)


@torch.no_grad()
def _seconds_per_row(runs: dict[str, Callable[[int], Any]], rows: int, device: str) -> dict[str, float]:
    """Seconds per row of each call's input, all on the same number of rows: on fewer than ``rows`` where that takes long."""

    # On a processor, the time that this thread computes, if that can be read: what else is at work there must not decide.
    fine = time.get_clock_info("thread_time").resolution <= _FINE
    clock = time.thread_time if device == "cpu" and fine else time.perf_counter

    def seconds(run: Callable[[int], Any], count: int) -> float:
        start = clock()
        run(count)
        synchronise(device)
        return clock() - start

    count = min(rows, 8)
    while True:
        best = {name: seconds(run, count) for name, run in runs.items()}
        for _ in range(_CALLS):
            # One that has taken long already is known well enough.
            again = {name: run for name, run in runs.items() if best[name] < 8 * _LONG_ENOUGH}
            best |= {name: min(best[name], seconds(run, count)) for name, run in again.items()}
        if count == rows or max(best.values()) > _LONG_ENOUGH:
            return {name: taken / count for name, taken in best.items()}
        count = min(rows, 4 * count)


class _Rates:
    """What was measured in this process, and in earlier ones on the same machine: a file in the hub's cache folder."""

    def __init__(self) -> None:
        self.known: Known | None = None

    def __call__(self, machine: str, what: str, timed: Callable[[], dict[str, float]]) -> dict[str, float]:
        if self.known is None:
            self.known = _read_rates()
        found = self.known.get(machine, {}).get(what)
        if found is None:
            found = self.known.setdefault(machine, {})[what] = timed()
            _write_rate(machine, what, found)
        return found


_measured = _Rates()


def _rates_path() -> Path:
    return cached_assets_path(library_name="mxdsurgery", namespace="compute", subfolder="rates") / _RATES_FILE


def _read_rates() -> Known:
    """What earlier processes measured; nothing where it is not there, or is not what one of them wrote."""
    try:
        known = json.loads(_rates_path().read_text(encoding="utf-8"))
        return {
            machine: {what: {dtype: float(value) for dtype, value in found.items()} for what, found in rates.items()}
            for machine, rates in known.items()
        }
    except (OSError, ValueError, AttributeError, TypeError, RuntimeError):  # the last: there is no home folder
        return {}


def _write_rate(machine: str, what: str, seconds: dict[str, float]) -> None:
    """Adds to what later processes will know; where the cache folder cannot be written, they measure again."""
    try:
        path, known = _rates_path(), _read_rates()
        known.setdefault(machine, {})[what] = seconds
        with file_aside(path) as file:
            file.write_text(json.dumps(known, indent=1), encoding="utf-8")
    except (OSError, ValueError, RuntimeError):  # a file in the folder's place; no home folder
        pass


@functools.cache
def _machine(device: str) -> str:
    """What the rates of a device depend on beside the shape."""
    if device == "cpu":
        named, capability = processor("model name", "model", "stepping"), torch.backends.cpu.get_cpu_capability()
        name = f"{named}, {capability}, {torch.get_num_threads()} threads"
    else:
        name = hardware(device)
    limits = (f"{name}={os.environ[name]}" for name in ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS") if name in os.environ)
    return ", ".join([name, f"torch {torch.__version__}", *limits])


def processor(*wanted: str) -> str:
    """What Linux says of the processor, by the names that /proc/cpuinfo has: several processors share a ``model name``."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        lines = []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = (value.strip() for key, value in fields.items() if key.strip() in wanted)
    return " ".join(named) or platform.processor() or platform.machine()
