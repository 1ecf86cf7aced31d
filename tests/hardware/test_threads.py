"""CPU threads: as many as were asked for, before torch is loaded or after, and in a resumed run as many as it had."""

import json
import os
import signal
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from click.testing import CliRunner
from running import Said

import mxdsurgery
from mxdsurgery.cli import main
from mxdsurgery.errors import Interrupted, RecipeError
from mxdsurgery.hardware import threads
from mxdsurgery.training import distill

TINY = {"layers": "1", "tokens": 4_096, "eval_tokens": 300, "n_experts": 64, "k": 4, "batch": 512, "shuffle": 2_000}


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Afterwards, this process is as if nobody had asked for threads."""
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "_asked_for", None)
    with patch.dict(os.environ):
        yield
    torch.set_num_threads(before)


def test_before_torch_is_loaded_and_in_processes_that_are_started_from_here():
    ask = (
        "from mxdsurgery.hardware.threads import use_threads; import sys; use_threads(3); assert 'torch' not in sys.modules; "
    )
    count = "import torch; print(torch.get_num_threads())"
    child = f"import subprocess, sys; print(subprocess.check_output([sys.executable, '-c', '{count}'], text=True))"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "2"}
    said = subprocess.check_output([sys.executable, "-c", f"{ask}{count}; {child}"], text=True, env=environment)
    assert said.split() == ["3", "3"]


def test_as_a_flag_of_a_command_without_a_recipe(converted):
    result = CliRunner().invoke(
        main, ["generate", str(converted.out), "--prompt", "x", "--max-new-tokens", "1", "--threads", "2"]
    )
    assert result.exit_code == 0
    assert torch.get_num_threads() == threads.asked_for() == 2


def test_every_command_that_has_a_device_has_threads():
    named = {name: {option.name for option in command.params} for name, command in main.commands.items()}
    assert {name for name, options in named.items() if "device" in options and "threads" not in options} == set()
    assert {name for name, options in named.items() if "threads" not in options} == {"analyze", "plot", "push", "report"}


def test_as_a_recipe_key_and_in_the_plan(tmp_path):
    recipe = tmp_path / "two.yaml"
    recipe.write_text("threads: 2\ndata: stdlib\n")
    made, resolved = mxdsurgery.plan("demo-glu", recipe=recipe)
    assert resolved.threads == made.machine.threads == torch.get_num_threads() == 2
    without, _ = mxdsurgery.plan("demo-glu")
    assert without.machine.threads == 2  # the number stays for the rest of the process


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", "2000"])
def test_a_wrong_number_is_a_named_error(value):
    for command in (["plan", "demo-glu"], ["evaluate", "nowhere"]):
        result = CliRunner().invoke(main, [*command, "--threads", value])
        assert result.exit_code == 2
        assert "RecipeError: recipe key 'threads' is" in result.stderr and "from 1 to 1024" in result.stderr
    with pytest.raises(RecipeError, match="threads"):
        mxdsurgery.plan("demo-glu", threads=value)


def stopped_after(step, monkeypatch):
    """Ctrl-C comes in this step."""
    steps, real = [], distill.train_step

    def stopping(*args):
        steps.append(1)
        if len(steps) == step:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(distill, "train_step", stopping)


def test_a_resumed_run_keeps_its_own(tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.default_int_handler)  # ignored in the background
    torch.set_num_threads(2)
    with monkeypatch.context() as for_now:
        stopped_after(3, for_now)
        with pytest.raises(Interrupted):
            mxdsurgery.convert("demo-glu", **TINY, out=str(out))
    torch.set_num_threads(1)
    said = Said()
    mxdsurgery.convert("demo-glu", **TINY, out=str(out), resume=True, reporter=said)
    assert torch.get_num_threads() == 2 and threads.asked_for() is None
    assert [line for line in said.lines if line.startswith("threads")] == [
        "threads    2, as the run began; here it would have been 1"
    ]
    assert json.loads((out / "plan.json").read_text())["machine"]["threads"] == 2


def test_a_resumed_run_computes_on_other_threads_where_they_are_asked_for(tmp_path, monkeypatch):
    out, said = tmp_path / "out", Said()
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.default_int_handler)
    torch.set_num_threads(2)
    with monkeypatch.context() as for_now:
        stopped_after(3, for_now)
        with pytest.raises(Interrupted):
            mxdsurgery.convert("demo-glu", **TINY, out=str(out))
    mxdsurgery.convert("demo-glu", **TINY, out=str(out), resume=True, threads=1, reporter=said)
    assert torch.get_num_threads() == 1
    assert [line for line in said.lines if line.startswith("threads")] == [
        "threads    1, as asked for; the run began with 2, so sums are rounded differently from here on"
    ]
