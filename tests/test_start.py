"""What each command loads: help and mistakes need no torch, and a command loads no library that it does not use."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mxdsurgery
from mxdsurgery import choices
from mxdsurgery.cli import main
from mxdsurgery.layers import interventions

HEAVY = {
    *("torch", "transformers", "accelerate", "numpy", "scipy", "sklearn", "matplotlib", "pandas", "datasets", "pyarrow"),
    *("peft", "huggingface_hub", "tokenizers", "psutil", "triton", "torch.utils.benchmark", "urllib.request"),
}

# Runs commands, one after the other, and prints as JSON which heavy libraries each of them loaded.
RUN = """
import contextlib, io, json, os, sys

first, commands, heavy = json.loads(sys.argv[1])
exec(first)
there = set(sys.modules)

def loaded():
    return [name for name in heavy if name in sys.modules and name not in there]

import mxdsurgery
said = [["import", None, "", loaded()]]
from mxdsurgery.cli import main

for command in commands:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            main(command, prog_name="mxdsurgery")
        except SystemExit as end:
            code = end.code
    said.append([" ".join(command), code, errors.getvalue(), loaded()])
print(json.dumps([said, {name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}]))
"""


def loaded_by(commands, first="", **environment):
    """In a fresh process: of the import and each command, its exit code, stderr and all heavy libraries loaded so far."""
    given = json.dumps([first, commands, sorted(HEAVY)])
    others = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", RUN, given], capture_output=True, text=True, env=others | environment, check=True
    )
    return json.loads(done.stdout)


def test_help_version_and_mistakes_in_flags_load_nothing_heavy():
    helped = [["--help"], ["--version"], *([name, "--help"] for name in main.commands)]
    mistaken = {
        "No such command": ["zork"],
        "No such option": ["analyze", "demo-glu", "--zork"],
        "Missing argument": ["convert"],
        "'k' is 'many'": ["convert", "demo-glu", "--k", "many"],
        "'threads' is '0'": ["evaluate", "nowhere", "--threads", "0"],
        "is not one of": ["heal", "nowhere", "--out", "x", "--mode", "zork"],
        "--prompt is needed": ["generate", "nowhere"],
        "EditError: ablate": ["edit", "nowhere", "--out", "x", "--ablate", "zork"],
        "--sweep was given together": ["effect", "nowhere", "--sweep", "1", "--ablate", "1:2"],
        "MetricsError": ["plot", "nowhere"],
    }
    (imported, *said), waiting = loaded_by([*helped, *mistaken.values()])
    assert [(command, code, errors) for command, code, errors, _ in said[: len(helped)] if code or errors] == []
    for (command, code, errors, _), words in zip(said[len(helped) :], mistaken, strict=True):
        assert code == 2 and words in errors, (command, errors)
    assert [(command, loaded) for command, *_, loaded in [imported, *said] if loaded] == []
    assert waiting == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}


def test_a_command_loads_only_what_it_uses(converted):
    out = str(converted.out)
    commands = [
        ["analyze", "demo-glu"],
        ["plan", "demo-glu", "--no-measure"],
        ["generate", out, "--prompt", "def", "--max-new-tokens", "2", "--ablate", "1:3"],
        ["evaluate", out, "--growth", "--tokens", "500", "-q"],
        ["dissect", out, "-q"],
    ]
    # what transformers loads for any model at all, of what is installed, is its own choice
    any_model = "import accelerate.hooks, transformers.models.llama.modeling_llama, transformers.pytorch_utils, tokenizers"
    (_, *said), waiting = loaded_by(commands, any_model, OMP_WAIT_POLICY="ACTIVE")
    assert [(command, code, errors) for command, code, errors, _ in said if code] == []
    assert [(command, loaded) for command, *_, loaded in said if loaded] == []
    assert waiting == {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": None}  # the user's own


def test_plot_loads_matplotlib_and_no_torch(converted, tmp_path):
    (_, (_, code, errors, loaded)), _ = loaded_by([["plot", str(converted.out), "--out", str(tmp_path / "figure.png")]])
    assert code == 0, errors
    assert "matplotlib" in loaded
    assert set(loaded) <= {"matplotlib", "numpy", "psutil"}  # the last names the process that writes


ORDERS = {
    "the package alone": "import mxdsurgery; made = mxdsurgery.plot",
    "from the package": "from mxdsurgery import plot as made",
    "the module first": "import mxdsurgery.runs.plot; made = mxdsurgery.plot",
    "from the module": "from mxdsurgery.runs.plot import plot as made; import mxdsurgery; mxdsurgery.plot",
}


@pytest.fixture
def afresh():
    """Nothing of ours is loaded; afterwards all that was."""
    ours = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "mxdsurgery"}
    for name in ours:
        del sys.modules[name]
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "mxdsurgery"]:
        del sys.modules[name]
    sys.modules.update(ours)


@pytest.mark.parametrize("order", ORDERS)
def test_a_public_function_is_the_same_however_it_is_asked_for(order, afresh):
    names = {}
    exec(ORDERS[order], names)
    module = sys.modules["mxdsurgery.runs.plot"]
    assert names["made"] is module.plot is sys.modules["mxdsurgery"].plot
    assert names["made"].__name__ == "plot" and callable(names["made"])


def test_all_public_names_are_there_and_the_stub_says_the_same():
    stub = ast.parse((Path(mxdsurgery.__file__).parent / "__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    told = {alias.asname: f"{node.module}.{alias.name}" for node in imports for alias in node.names}
    assert told == {name: f"mxdsurgery.{module}.{name}" for name, module in mxdsurgery._MODULE_OF.items()}
    assert set(mxdsurgery.__all__) == told.keys() <= set(dir(mxdsurgery))
    for name in mxdsurgery.__all__:
        found = getattr(mxdsurgery, name)
        assert callable(found) and found.__name__ == name
    assert mxdsurgery.planning.calibrate.__name__ == "mxdsurgery.planning.calibrate"  # submodules are still importable
    with pytest.raises(AttributeError, match="'mxdsurgery' has no attribute 'zork'"):
        mxdsurgery.zork  # noqa: B018
    with pytest.raises(ImportError):
        exec("from mxdsurgery import zork")


def test_units_are_those_of_the_file_that_travels_with_checkpoints():
    assert choices.UNITS == interventions.UNITS
