"""For tests that run commands, scripts and examples: where files are, what a command printed, Ctrl-C at a chosen moment."""

import os
import random
import weakref
from pathlib import Path

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
