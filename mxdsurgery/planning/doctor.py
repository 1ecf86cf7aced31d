"""``doctor``: what this machine has for the other commands, and what it lacks; measured where that can be measured."""

import importlib.metadata
import platform
import shutil
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import constants, get_token
from huggingface_hub.utils import get_session
from rich.table import Table

from mxdsurgery.disclosure import masked
from mxdsurgery.errors import first_line
from mxdsurgery.hardware.compute import Shape, model_dtype, processor
from mxdsurgery.hardware.device import devices, hardware
from mxdsurgery.hardware.guard import guarded
from mxdsurgery.hardware.memory import free_memory
from mxdsurgery.planning.calibrate import matmul_rate
from mxdsurgery.terminal.console import size

_LIBRARIES = ("mxdsurgery", "torch", "transformers", "accelerate", "safetensors", "huggingface-hub", "datasets")
# What is not always installed, what it is for, and how it comes.
_OPTIONAL = {
    "peft": ("heal --mode lora", "pip install 'mxdsurgery[lora]'"),
    "tensorboard": ("--tracker tensorboard", "pip install 'mxdsurgery[tensorboard]'"),
    "wandb": ("--tracker wandb", "pip install 'mxdsurgery[wandb]'"),
    "triton": ("faster sparse products on a GPU", "comes with torch's builds for GPUs"),
    "lm-eval": ("accuracy on tasks, as in examples/lm_eval_task.py", "pip install lm-eval"),
}
# A forward pass of a small model, for which it is said what a model stored in bfloat16 computes in.
_SHAPE = Shape(tokens=512, context=128, d_model=576, d_hidden=1536, heads=9)
_HUB_SECONDS = 5.0


@guarded
def doctor() -> dict[str, Any]:
    """Looks at this machine: versions, processor and accelerator, measured products, memory, disk, the hub, what is optional.

    Takes some seconds. The hub is asked for an answer, and for nothing else; not where ``HF_HUB_OFFLINE`` is set.

    Returns:
        ``python``, ``system``; ``libraries``, versions by name; ``processor``; ``devices``, one object each: ``name``,
        ``hardware``, ``products`` (FLOP/s of a product of two matrices by dtype, on as many threads as torch has),
        ``free_bytes``, ``compute`` (what a model stored in bfloat16 computes in, and why); ``disk``: ``folder`` and
        ``free_bytes``; ``hub``: ``endpoint``, ``reachable``, ``why_not``, ``token``; ``optional``, by name: ``version``,
        ``used_for``, ``comes_with``; and ``lacks``, what to do about what is missing, in words.
    """
    there = devices()
    found = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "processor": f"{processor('model name')}, {torch.backends.cpu.get_cpu_capability()}",
        "memory_bytes": psutil.virtual_memory().total,
        "devices": [_device(name) for name in there],
        "disk": {"folder": str(Path.cwd()), "free_bytes": shutil.disk_usage(".").free},
        "hub": _hub(),
        "optional": {
            name: {"version": _version(name), "used_for": use, "comes_with": how} for name, (use, how) in _OPTIONAL.items()
        },
    }
    return found | {"lacks": _lacks(found)}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(name: str) -> dict[str, Any]:
    chosen = model_dtype("bfloat16", "auto", name, _SHAPE)
    return {
        "name": name,
        "hardware": hardware(name),
        "products": {dtype: matmul_rate(name, dtype) for dtype in ("float32", "bfloat16")},
        "free_bytes": free_memory(name),
        "compute": {"dtype": chosen.dtype, "why": chosen.why},
    }


def _hub() -> dict[str, Any]:
    """Whether the hub answers."""
    found = {"endpoint": masked(constants.ENDPOINT), "reachable": False, "why_not": None, "token": get_token() is not None}
    if constants.HF_HUB_OFFLINE:
        return found | {"why_not": "HF_HUB_OFFLINE is set"}
    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
    except Exception as error:  # httpx and what is below it raise many kinds
        return found | {"why_not": masked(first_line(error))}
    return found | {"reachable": True}


def _lacks(found: dict[str, Any]) -> list[str]:
    """What to do about what is missing or slow; nothing where all is well."""
    said = []
    for device in found["devices"]:
        fp32, bf16 = device["products"]["float32"], device["products"]["bfloat16"]
        if bf16 < fp32:
            ratio = f"bf16 products run at {bf16 / fp32:.2g} times the speed of fp32 ones"
            said.append(f"{device['name']}: {ratio}: models are computed in float32, whatever they are stored in")
    if found["devices"][-1]["name"] == "cpu":
        said.append(
            "no GPU that this build of torch can use: conversions of more than some hundred million parameters take days"
        )
    hub = found["hub"]
    if not hub["reachable"]:
        said.append(f"the hub does not answer ({hub['why_not']}): give models and text as local folders and files")
    elif not hub["token"]:
        said.append("no token of the hub: gated models and push need one: hf auth login")
    for name, package in found["optional"].items():
        if package["version"] is None:
            said.append(f"{name} is not installed ({package['used_for']}): {package['comes_with']}")
    return said


def doctor_tables(found: dict[str, Any]) -> list[Table | str]:
    """What `doctor` returns, for people."""
    libraries = ", ".join(f"{name} {version or 'not installed'}" for name, version in found["libraries"].items())
    folder, hub = found["disk"]["folder"], found["hub"]
    answer = "answers" if hub["reachable"] else f"does not answer: {hub['why_not']}"
    table = Table(
        "device", "what", "fp32 products", "bf16 products", "free memory", "a bf16 model computes in", title="Computing"
    )
    for device in found["devices"]:
        speeds = (f"{rate / 1e9:,.0f} GFLOP/s" for rate in device["products"].values())
        free = "unknown" if device["free_bytes"] is None else size(device["free_bytes"])
        chosen = f"{device['compute']['dtype']}: {device['compute']['why']}"
        table.add_row(device["name"], device["hardware"], *speeds, free, chosen)
    advice = "\n".join(f"- {line}" for line in found["lacks"]) or "Nothing is missing."
    return [
        f"Python {found['python']} on {found['system']}\n{libraries}\n",
        f"Processor: {found['processor']}; memory: {size(found['memory_bytes'])}\n",
        table,
        f"\nDisk: {size(found['disk']['free_bytes'])} free in {folder}",
        f"Hub: {hub['endpoint']} {answer}; {'a' if hub['token'] else 'no'} token\n",
        advice,
    ]
