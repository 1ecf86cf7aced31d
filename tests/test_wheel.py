"""What is installed: the wheel holds all that the commands need and nothing else, and works without the repository."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from running import ROOT

# Everything in the process but the standard library and what is installed beside mxdsurgery comes from the folder given.
RUN = "import sys; sys.path.insert(0, sys.argv.pop(1)); from mxdsurgery.cli import main; main(prog_name='mxdsurgery')"


def built(source, target, kind):
    """The file that the project's own build backend makes of a folder."""
    code = f"import hatchling.build as b, sys; print(b.build_{kind}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(target)], cwd=source, capture_output=True, text=True, check=True)
    return target / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return built(ROOT, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def command(unpacked, tmp_path, *words):
    """Runs the wheel's command far from the repository."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(unpacked), *words], cwd=tmp_path, env=kept, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_holds_the_package_the_recipes_and_the_demo_models_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {Path(name).parts[0] for name in names} == {"mxdsurgery", Path(names[-1]).parts[0]}
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mxdsurgery").rglob("*") if path.is_file()}
    here |= {f"mxdsurgery/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    packed = {name for name in names if name.startswith("mxdsurgery/")}
    assert packed == {name for name in here if "__pycache__" not in name}
    assert "mxdsurgery/demo/demo-glu/model.safetensors" in packed and "mxdsurgery/recipes/demo.yaml" in packed


def test_it_converts_and_edits_without_the_repository(unpacked, tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import mxdsurgery; print(mxdsurgery.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", code, str(unpacked)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert Path(where.stdout.strip()).is_relative_to(unpacked)
    small = "--layers 1 --n-experts 64 --k 4 --tokens 4k --eval-tokens 1k --shuffle 0 -q".split()
    made = json.loads(command(unpacked, tmp_path, "convert", "demo-glu", *small, "--out", "made", "--json"))
    assert made["layers"][0]["layer"] == 1 and made["tokens"] > 500
    edited = json.loads(
        command(unpacked, tmp_path, "edit", "made", "--ablate", "1:3", "--tokens", "500", "--out", "edited", "-q", "--json")
    )
    assert (tmp_path / edited["out"] / "model.safetensors").is_file()


def test_the_source_archive_builds_the_same_wheel(wheel, tmp_path):
    import tarfile

    archive = built(ROOT, tmp_path, "sdist")
    tarfile.open(archive).extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    again = zipfile.ZipFile(built(source, tmp_path, "wheel"))
    first = zipfile.ZipFile(wheel)
    assert {name: first.read(name) for name in first.namelist()} == {name: again.read(name) for name in again.namelist()}
    assert not any("__pycache__" in name for name in again.namelist())
