"""Paths as users write them: ``~`` is the home folder for every command, recipe key and function."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from running import ROOT

import mxdsurgery
from mxdsurgery.cli import main
from mxdsurgery.errors import PathError
from mxdsurgery.paths import PATH_NAMES, check_working_folder, given_path
from mxdsurgery.recipe import RECIPE_KEYS, Recipe, load_recipe

TINY = {"layers": "1", "tokens": 4_096, "eval_tokens": 1_000, "n_experts": 64, "k": 4, "batch": 512, "shuffle": 2_000}
FLAGS = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with a text, and a folder to work in that is another."""
    made = tmp_path / "home"
    made.mkdir()
    (made / "t.txt").write_text("Some words of text, as many as are needed. " * 2_000)
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(made))
    monkeypatch.chdir(tmp_path / "work")
    return made


def test_texts_and_paths(home):
    assert given_path("out", "~/x") == f"{home}/x"
    assert given_path("folder", Path("~/x")) == home / "x"
    assert given_path("base", "~") == str(home)
    for name, value in [("prompt", "~/x"), ("out", "x/~"), ("out", "./~"), ("data", None), ("layers", "~")]:
        assert given_path(name, value) == value


def test_a_home_that_is_not_known_is_a_named_error():
    with pytest.raises(PathError, match="home folder is not known"):
        given_path("out", "~no-such-user/x")
    result = CliRunner().invoke(main, ["evaluate", "~no-such-user/x"])
    assert result.exit_code == 2 and "PathError" in result.stderr


def test_recipe_keys_in_files_and_in_python(home):
    (home / "r.yaml").write_text("data: ~/t.txt\nmodel: ~/m\nout: ~/x\n")
    assert load_recipe(home / "r.yaml") == {"data": f"{home}/t.txt", "model": f"{home}/m", "out": f"{home}/x"}
    assert Recipe(eval_data="~/t.txt").eval_data == f"{home}/t.txt"
    assert PATH_NAMES & RECIPE_KEYS.keys() == {"cache_activations", "data", "eval_data", "model", "out"}


def test_commands_and_functions(home, tmp_path):
    (home / "r.yaml").write_text("data: ~/t.txt\n")
    (home / "other.txt").write_text("\n".join(f"class Thing{i}:\n    size = {i * i}" for i in range(400)))
    result = CliRunner().invoke(main, ["convert", "demo-glu", "--recipe=~/r.yaml", "--out=~/made", *FLAGS])
    assert result.exit_code == 0, result.output
    for words in (
        ["evaluate", "~/made", "--data=~/other.txt", "--tokens", "500", "--base", "demo-glu"],
        ["edit", "~/made", "--out=~/edited", "--ablate", "1:3", "--data=~/other.txt", "--tokens", "500"],
        ["plot", "~/made", "--out=~/figure.png"],
        ["experts", "~/made", "--data=~/t.txt", "--tokens", "500", "--out=~/catalogue"],
        ["coefficients", "~/made", "--out=~/coefficients", "--tokens", "500"],
    ):
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, result.output
    assert {"made", "edited", "figure.png", "catalogue", "coefficients"} <= {path.name for path in home.iterdir()}
    assert mxdsurgery.analyze("demo-glu").to_dict() and mxdsurgery.load(Path("~/made")).folder == home / "made"
    (home / "edits.yaml").write_text("layers: {1: {ablate: [3]}}\n")
    assert mxdsurgery.edits_from_flags("~/edits.yaml") == mxdsurgery.read_edits("~/edits.yaml")
    assert list((tmp_path / "work").iterdir()) == []  # above all no folder named ~


def test_a_working_folder_that_is_gone_is_a_named_error(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(PathError, match="is gone"):
        check_working_folder()
    # In a new process, in which transformers, when it is imported, asks for the working folder.
    path = {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    line = [sys.executable, "-m", "mxdsurgery", "analyze", "demo-glu"]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | path, check=False)
    os.chdir(tmp_path)
    assert done.returncode == 2 and "cd to another folder" in done.stderr and "Traceback" not in done.stderr


def test_a_working_folder_that_is_gone_is_a_named_error_in_python_too(tmp_path):
    (tmp_path / "gone").mkdir()
    code = (
        "import os, sys; sys.path[:0] = [sys.argv[1]]; os.chdir('gone'); os.rmdir('../gone'); import mxdsurgery\n"
        "try: mxdsurgery.convert('demo-glu')\n"
        "except mxdsurgery.MxDError as error: print(type(error).__name__, error)"
    )
    line = [sys.executable, "-I", "-c", code, str(ROOT)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0 and done.stdout.startswith("PathError the folder that"), done
    assert "cd to another folder" in done.stdout and done.stderr == ""


def test_a_cache_that_cannot_be_written_stops_nothing(monkeypatch):
    from mxdsurgery.hardware import compute

    def fails(error):
        def path(**_):
            raise error

        monkeypatch.setattr(compute, "cached_assets_path", path)
        return compute._Rates()("this one", "a product", lambda: {"float32": 1.0})

    for error in (RuntimeError("Could not determine home directory."), ValueError("Corrupted"), PermissionError("read-only")):
        assert fails(error) == {"float32": 1.0}


def test_a_name_that_is_no_text_here_is_a_named_error(converted):
    for call in (mxdsurgery.load, mxdsurgery.evaluate, mxdsurgery.analyze):
        with pytest.raises(PathError, match="PYTHONUTF8=1"):
            call(os.fsdecode(b"m\xff"))
