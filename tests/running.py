"""For tests that run commands, scripts and examples: where files are, what a command printed, Ctrl-C at a chosen moment."""

import gc
import os
import random
import subprocess
import weakref
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import PreTrainedModel

from mxdsurgery.terminal.console import Reporter

ROOT = Path(__file__).parents[1]  # of the project


class Said(Reporter):
    """Keeps the lines that a command says."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def interrupt_layer_2(patch: pytest.MonkeyPatch) -> None:
    """Lets Ctrl-C come when layer 2 begins to train."""
    from mxdsurgery.training.distill import distill

    def interrupted(layers, *rest):
        if any(planned.block.layer == 2 for planned in layers):
            raise KeyboardInterrupt
        distill(layers, *rest)

    patch.setattr("mxdsurgery.conversion.train.distill", interrupted)


def shared_folder() -> Path | None:
    """The material beside the project: ../shared, or where MXD_SHARED points."""
    path = Path(os.environ.get("MXD_SHARED", ROOT.parent / "shared"))
    return path if (path / "models").is_dir() else None


def random_states():
    """Where the process's random numbers stand."""
    name, keys, *rest = numpy.random.get_state()
    return random.getstate(), (name, keys.tolist(), *rest), torch.get_rng_state().tolist()


def watch_models(monkeypatch):
    """Weak references to the models that `from_pretrained` will load, in order."""
    made, loading = [], PreTrainedModel.from_pretrained.__func__

    def from_pretrained(kind, *args, **options):
        found = loading(kind, *args, **options)
        made.append(weakref.ref(found[0] if isinstance(found, tuple) else found))
        return found

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
    return made


def without_reloads(patch: pytest.MonkeyPatch) -> None:
    """Spares tests of something else the fresh process that loads what was written."""

    def reloaded(_folder: Path, reference: Any) -> tuple[dict[str, torch.Tensor], str]:
        return reference.outputs, str(reference.device)

    patch.setattr("mxdsurgery.checkpoint.export._reloaded", reloaded)


def held_at_reload(patch: pytest.MonkeyPatch) -> list[int]:
    """Gets the bytes of weights that this process has, beyond now, each time that a fresh one loads what was written."""
    from mxdsurgery.checkpoint import export

    gc.collect()
    before, held, reloaded, run = _matrix_bytes(), [], export._reloaded, export._run_reload

    def with_reference(folder: Path, reference: Any) -> tuple[dict[str, torch.Tensor], str]:
        held.append(-before - sum(output.nbytes for output in reference.outputs.values()))
        return reloaded(folder, reference)

    def counted(*given: Any) -> subprocess.CompletedProcess[str]:
        held[-1] += _matrix_bytes()
        return run(*given)

    patch.setattr(export, "_reloaded", with_reference)
    patch.setattr(export, "_run_reload", counted)
    return held


def _matrix_bytes() -> int:
    """Of all that any floating-point matrix of this process lies in; what compiling left behind lies nowhere."""
    tensors = [made for made in gc.get_objects() if issubclass(type(made), torch.Tensor)]
    stored = (made.untyped_storage() for made in tensors if made.is_floating_point() and made.ndim > 1 and not made.is_meta)
    return sum({place: storage.nbytes() for storage in stored if (place := _place(storage)) is not None}.values())


def _place(storage: torch.UntypedStorage) -> int | None:
    """Where it lies; None for that of a fake tensor, which torch refuses to say."""
    try:
        return storage.data_ptr() or None
    except RuntimeError:
        return None
