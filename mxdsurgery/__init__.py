"""mxdsurgery: language models with Mixture-of-Decoders layers in place of their MLP blocks.

The public functions are named as the commands: `analyze`, `plan`, `convert`, `heal`, `evaluate`, ...; `load` reads a converted
folder, `MxDLayer` is the layer, `MxDError` the base of all named errors. Each is loaded when it is first asked for, and torch
with it; `__init__.pyi` says the same to type checkers and editors.
"""

import importlib
import importlib.util
import os
import sys
from typing import Any

# On Linux, torch then asks for huge pages: the CPU's training step spends a tenth of its time on page faults otherwise.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# OpenMP's threads then spin briefly while they wait for each other, and then sleep: beside other programs, long spinning costs
# many times what it saves; alone, no spinning at all costs an eighth (docs/tried.md).
if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
    os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="2000")

__version__ = "0.1.0"

# The public names, by the module that each is in.
_PLACES = {
    "base.analyze": ("Analysis", "analyze"),
    "base.families": ("Family", "register_family"),
    "catalogue.coefficients": ("coefficients",),
    "catalogue.experts": ("experts",),
    "catalogue.report": ("report",),
    "catalogue.search": ("search",),
    "checkpoint.apply": ("apply", "make_adapter"),
    "checkpoint.converted": ("Converted", "load"),
    "conversion.convert": ("Conversion", "convert"),
    "conversion.frontier": ("frontier",),
    "conversion.heal": ("heal",),
    "editing.edit": ("edit",),
    "editing.edits": ("Edits", "edits_from_flags", "read_edits"),
    "editing.effect": ("effect",),
    "editing.generate": ("generate",),
    "editing.steering": ("steering",),
    "editing.sweep": ("sweep",),
    "errors": ("MxDError",),
    "layers.layer": ("Coefficients", "MxDLayer"),
    "measuring.dissect": ("dissect",),
    "measuring.evaluate": ("evaluate",),
    "measuring.frontier_table": ("Frontier",),
    "measuring.growth": ("growth",),
    "measuring.probe": ("probe",),
    "planning.doctor": ("doctor",),
    "planning.gpus": ("GpuHours", "gpu_hours"),
    "planning.plan": ("Plan", "plan"),
    "planning.proposal": ("Proposal", "propose"),
    "recipe": ("Recipe",),
    "runs.plot": ("plot",),
    "sharing.push": ("push",),
}
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """Loads a public name, or a room or module of ours, when it is first asked for."""
    if name in _MODULE_OF:
        if _MODULE_OF[name] != "errors":  # named before torch is loaded, which ends the whole process there, without a word
            importlib.import_module(f"{__name__}.paths").check_working_folder()
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        setattr(sys.modules[__name__], name, value)
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
