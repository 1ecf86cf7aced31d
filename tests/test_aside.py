"""What is written appears whole, in one step; what others put where we would write aside stays, byte for byte."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time

import pytest

import mxdsurgery
from mxdsurgery import aside
from mxdsurgery.aside import MARKER, file_aside, mark, put_in_place
from mxdsurgery.checkpoint.writing import check_output, write_json, written_whole
from mxdsurgery.errors import OutputError
from mxdsurgery.processes import this_process

# No process has this number.
DEAD = {"process": 2**22 + 1, "process_started": "1"}


def contents(folder):
    """All files below a folder by name, with their bytes, and the folders."""
    return {path.relative_to(folder).as_posix(): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def somebody_s(path):
    """A folder of the user's own."""
    (path / "deep").mkdir(parents=True)
    (path / "notes.txt").write_text("three months of work")
    (path / "deep" / "metrics.jsonl").write_text("{}")
    return path


def left(place, name=None, **owner):
    """A folder that a process left aside when it wrote to a place; by default, one that is gone."""
    folder = place.with_name(f".{place.name}.abc.aside")
    folder.mkdir()
    (folder / "half").write_text("half")
    values = dataclasses.asdict(dataclasses.replace(this_process(), **owner or DEAD))
    (folder / MARKER).write_text(json.dumps(values | {"name": name or place.name}))
    return folder


def write_a_file(place):
    with file_aside(place) as new:
        new.write_text("new")


def write_a_folder(place):
    with written_whole(place) as staging:
        (staging / "new").write_text("new")


WAYS = {"file": write_a_file, "folder": write_a_folder, "json": lambda place: write_json(place, "new")}


@pytest.mark.parametrize("way", WAYS)
def test_what_a_dead_process_left_is_cleared_and_nothing_else_is(way, tmp_path):
    place = tmp_path / "out.json"
    gone = left(place)
    mine = somebody_s(tmp_path / ".out.json.mine.aside")
    other = somebody_s(tmp_path / ".out.json.old")
    (tmp_path / ".out.json.file.aside").write_text("a file")
    works = left(place.with_name("out.json.longer"), "out.json", **{"process": os.getpid()})  # this very process, at work
    copied = left(tmp_path / "elsewhere", "out.json")  # a marker alone proves nothing under another name
    before = {name: held for name, held in contents(tmp_path).items() if not name.startswith(gone.name)}
    WAYS[way](place)
    after = contents(tmp_path)
    assert {name: held for name, held in after.items() if name.partition("/")[0] != "out.json"} == before
    assert mine.exists() and other.exists() and works.exists() and copied.exists() and not gone.exists()
    if way == "folder":
        WAYS[way](place)  # over an earlier one
        assert contents(tmp_path) == after


def test_what_cannot_be_looked_up_is_left_for_a_week(tmp_path):
    place, elsewhere = tmp_path / "x", {"machine": "another", "process": 1}
    folder = left(place, **elsewhere)
    write_a_file(place)
    assert folder.exists()
    os.utime(folder / MARKER, (time.time() - 8 * 24 * 3600,) * 2)
    write_a_file(place)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("marker", ["", "[]", '{"name": "x"}', '{"name": 3, "host": 1}'])
def test_a_marker_that_is_not_ours_protects(marker, tmp_path):
    folder = left(tmp_path / "x")
    (folder / MARKER).write_text(marker)
    write_a_file(tmp_path / "x")
    assert folder.exists()


def test_a_killed_process_leaves_what_the_next_one_clears(tmp_path):
    code = "import sys, os, signal; from pathlib import Path; from mxdsurgery.aside import file_aside\n"
    code += "with file_aside(Path(sys.argv[1])) as new: new.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], check=False)
    assert len(list(tmp_path.glob(".x.*.aside"))) == 1 and not (tmp_path / "x").exists()
    write_a_file(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("swaps", [True, False])
def test_a_folder_takes_another_s_place_and_an_error_leaves_the_earlier_one(swaps, tmp_path, monkeypatch):
    if not swaps:
        monkeypatch.setattr(aside, "_swapped", lambda *_: False)
    old, new = somebody_s(tmp_path / "old"), tmp_path / "new"
    new.mkdir()
    put_in_place(new, old)
    assert [path.name for path in tmp_path.iterdir()] == ["old"] and not list(old.iterdir())
    (old / "earlier").touch()
    with pytest.raises(OSError):
        put_in_place(tmp_path / "not there", old)
    assert contents(tmp_path) == {"old": False, "old/earlier": b""}


def test_what_was_taken_from_its_place_is_put_back_before_anything_is_written(tmp_path):
    """Where two names cannot be swapped, a process may die between two renames."""
    somebody_s(left(tmp_path / "out") / "before")
    with pytest.raises(OutputError, match="exists already"):
        check_output(tmp_path / "out", overwrite=False)
    assert (tmp_path / "out" / "notes.txt").is_file() and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with file_aside(tmp_path / "x") as first, file_aside(tmp_path / "x") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "x").read_text() == "first" and [path.name for path in tmp_path.iterdir()] == ["x"]
    mark(tmp_path, "x")
    assert json.loads((tmp_path / MARKER).read_text())["process"] == os.getpid()


# What a command writes, and how it is called; of a model that has a catalogue.
COMMANDS = {
    "experts": lambda folder: mxdsurgery.experts(folder, tokens=2_000, overwrite=True),
    "report": lambda folder: mxdsurgery.report(folder),
    "plot": lambda folder: mxdsurgery.plot(folder),
    "coefficients": lambda folder: mxdsurgery.coefficients(folder, out=folder.parent / "coefficients", tokens=1_000),
    "edit": lambda folder: mxdsurgery.edit(
        folder, out=folder.parent / "edited", edits=mxdsurgery.Edits(ablate={1: [0]}), tokens=1_000
    ),
    "evaluate": lambda folder: mxdsurgery.evaluate(folder, tokens=1_000),
}
# Names that those commands, of this version or an earlier one, have used for what they write aside.
ASIDE = ["experts.old", ".experts.x", "experts.tmp", ".metrics.png.tmp", ".metrics.svg.tmp", ".evaluation.x"]
ASIDE += [f".{name}.{os.getpid()}" for name in ("report.html", "config", "plan", "evaluation")]
ASIDE += [".README.md.x.aside", ".evaluation.json.x.aside", ".report.html.x.aside", ".metrics.png.x.aside", ".experts.x.aside"]
OUTSIDE = ["edited.old", "edited.run", ".edited.x", ".edited.x.aside", ".coefficients.x", ".coefficients.x.aside"]


@pytest.fixture(scope="module")
def catalogued(converted, tmp_path_factory):
    out = tmp_path_factory.mktemp("aside") / "demo"
    shutil.copytree(converted.out, out)
    mxdsurgery.experts(out, tokens=2_000)
    return out


@pytest.mark.parametrize("command", COMMANDS)
def test_a_user_s_own_folders_stay_whatever_they_are_called(command, catalogued, tmp_path):
    folder = tmp_path / "demo"
    shutil.copytree(catalogued, folder)
    own = [somebody_s(folder / name) for name in ASIDE] + [somebody_s(tmp_path / name) for name in OUTSIDE]
    before = [contents(path) for path in own]
    COMMANDS[command](folder)
    assert [contents(path) for path in own] == before
    assert not [path for path in tmp_path.rglob("*") if (path / MARKER).exists()]  # nothing of ours is left


@pytest.mark.parametrize("command", ["experts", "report"])
def test_a_user_s_own_at_the_very_place_is_refused_and_stays(command, catalogued, tmp_path):
    folder = tmp_path / "demo"
    shutil.copytree(catalogued, folder)
    own = folder / {"experts": "experts.run", "report": "report-data"}[command]
    own.mkdir()
    (own / "chart.js").write_text("let mine = true;")
    with pytest.raises(OutputError, match=own.name):
        COMMANDS[command](folder)
    assert contents(own) == {"chart.js": b"let mine = true;"}


def test_a_user_s_own_figure_is_not_drawn_over(catalogued, tmp_path):
    (tmp_path / "chart.svg").write_text("<svg/>")
    with pytest.raises(OutputError, match=r"chart\.svg.*was not drawn by"):
        mxdsurgery.plot(catalogued, out=tmp_path / "chart.png")
    assert contents(tmp_path) == {"chart.svg": b"<svg/>"}
    for _ in range(2):  # its own it draws anew
        mxdsurgery.plot(catalogued, out=tmp_path / "own.png")
    assert {path.name for path in tmp_path.iterdir()} == {"chart.svg", "own.png", "own.svg"}
