"""A run folder has one owner at a time; one that is gone is told from one that works."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from click.testing import CliRunner

import mxdsurgery
from mxdsurgery.aside import MARKER
from mxdsurgery.cli import main
from mxdsurgery.errors import DataError, OutputError, RunInUseError
from mxdsurgery.recipe import Recipe
from mxdsurgery.runs import owner
from mxdsurgery.runs.owner import OWNER_FILE, Ownership
from mxdsurgery.runs.run_folder import RunFolder
from mxdsurgery.terminal.console import Reporter

TINY = {"layers": "1", "tokens": 2_048, "eval_tokens": 300, "n_experts": 64, "k": 4, "batch": 512, "shuffle": 2_000}
FLAGS = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))]

# Takes the folder, says so and waits for a line before it ends, or to be killed.
HOLDS = """
import sys
from pathlib import Path
from mxdsurgery.runs.owner import Ownership
holder = Ownership(Path(sys.argv[1])).take()
print("holds", flush=True)
sys.stdin.readline()
holder.give_back()
"""


@pytest.fixture
def holder():
    """Lets another process hold a folder; it ends with the test."""
    started = []

    def start(folder):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDS, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "holds\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def put(folder, silent=0.0, **values):
    """Writes the name of an owner, this process's but for the values, who gave the last sign of life so long ago."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / OWNER_FILE
    file.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(owner.this_process(), **values))))
    os.utime(file, (time.time() - silent,) * 2)
    return file


def test_a_second_process_is_refused_by_name_until_the_first_has_ended(tmp_path, holder):
    folder = tmp_path / "new" / "out.run"
    first = holder(folder)
    with pytest.raises(RunInUseError) as refused:
        Ownership(folder).take()
    assert f"process {first.pid} on host {socket.gethostname()!r}" in str(refused.value)
    assert f"kill {first.pid}" in refused.value.fix and "--out" in refused.value.fix
    first.communicate("end\n")
    assert first.returncode == 0
    assert not folder.parent.exists()  # nothing is left of it
    mine = Ownership(folder).take()
    assert mine.before is None
    mine.give_back()


def test_a_killed_process_is_no_owner_any_more(tmp_path, holder):
    first = holder(tmp_path / "out.run")
    first.kill()  # and not waited for: a zombie is gone, too
    for _ in range(100):
        if owner.started(first.pid) is None:
            break
        time.sleep(0.05)
    mine = Ownership(tmp_path / "out.run").take()
    assert mine.before.process == first.pid
    mine.give_back()


def test_a_later_process_with_the_same_number_is_not_the_owner(tmp_path):
    put(tmp_path, process=os.getppid(), process_started=owner.started(os.getppid()))
    with pytest.raises(RunInUseError):
        Ownership(tmp_path).take()
    put(tmp_path, process=os.getppid(), process_started="1")
    Ownership(tmp_path).take().give_back()


def test_what_an_earlier_call_of_this_very_process_left_does_not_count(tmp_path):
    put(tmp_path)
    Ownership(tmp_path).take().give_back()


def test_an_owner_elsewhere_counts_while_it_gives_signs_of_life(tmp_path):
    put(tmp_path, silent=20, host="node7", machine="another", process=1)
    with pytest.raises(RunInUseError, match="process 1 on host 'node7'") as refused:
        Ownership(tmp_path).take()
    assert "in 40 s" in refused.value.fix or "in 39 s" in refused.value.fix
    assert {path.name for path in tmp_path.iterdir()} == {OWNER_FILE}  # nothing is left of the refused one
    put(tmp_path, silent=61, host="node7", machine="another", process=1)
    mine = Ownership(tmp_path).take()
    assert mine.before.host == "node7"
    mine.give_back()


def test_the_owner_gives_signs_of_life_and_notices_who_took_over(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "_BEAT", 0.05)
    mine = Ownership(tmp_path / "out.run").take()
    os.utime(mine.file, (0, 0))
    deadline = time.monotonic() + 10
    while mine.file.stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert mine.file.stat().st_mtime > 0
    mine.check(now=True)
    file = put(tmp_path / "out.run", host="node7", token="other")
    while not mine.lost and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(RunInUseError, match="on host 'node7' took"):
        mine.check()
    mine.give_back()
    assert json.loads(file.read_text())["token"] == "other"  # the other one's


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1}'])
def test_a_damaged_name_is_nobody_s(content, tmp_path, monkeypatch):
    file = tmp_path / OWNER_FILE
    file.write_text(content)
    os.utime(file, (time.time() - 5,) * 2)
    Ownership(tmp_path).take().give_back()
    assert not file.exists()


def test_without_hard_links_the_name_is_created_too(tmp_path, monkeypatch):
    def none(*_):
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", none)
    mine = Ownership(tmp_path / "out.run").take()
    assert mine._read() == mine.me
    assert not owner._created(mine.file, mine.file)
    mine.give_back()


def test_one_of_many_that_take_a_dead_one_s_folder_at_once_gets_it(tmp_path, monkeypatch):
    put(tmp_path, process=2**22 + 1, process_started="1")  # no such process
    got, refused, start = [], [], threading.Barrier(8)

    def take(number):
        held = Ownership(tmp_path)
        held.me = dataclasses.replace(held.me, process=number)  # as if each were a process
        held.key = f"{held.key} {number}"
        monkeypatch.setattr(owner, "started", lambda number: "1" if number < 8 else None)
        held.me = dataclasses.replace(held.me, process_started="1")
        start.wait(10)
        try:
            got.append(held.take())
        except RunInUseError:
            refused.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (len(got), len(refused)) == (1, 7)
    got[0].give_back()


def test_a_folder_that_another_process_takes_in_between_is_not_taken_over(tmp_path, monkeypatch):
    mine, found = Ownership(tmp_path), iter([None, None])  # nobody, and nobody again: one came and went, and another came

    def another_comes(me):
        monkeypatch.undo()
        put(tmp_path, process=os.getppid(), process_started=owner.started(os.getppid()), token="another")
        monkeypatch.setattr(mine, "_read", lambda: next(found, None) or Ownership._read(mine))
        return dataclasses.asdict(me)

    next(found)
    monkeypatch.setattr(owner, "asdict", another_comes)
    with pytest.raises(RunInUseError):
        mine.take()
    assert json.loads((tmp_path / OWNER_FILE).read_text())["token"] == "another"
    assert [path.name for path in tmp_path.iterdir()] == [OWNER_FILE]


def test_a_name_that_the_owner_s_work_removed_is_written_anew(tmp_path, monkeypatch):
    def gone(me):
        monkeypatch.undo()
        text = dataclasses.asdict(me)
        monkeypatch.setattr(os, "link", removed)
        return text

    def removed(aside, file):
        monkeypatch.undo()
        os.unlink(aside)
        os.link(aside, file)

    monkeypatch.setattr(owner, "asdict", gone)
    mine = Ownership(tmp_path / "out.run").take()
    assert mine._read() == mine.me
    mine.give_back()


def test_a_thread_of_the_same_process_is_refused_and_the_same_thread_is_not(tmp_path):
    mine = Ownership(tmp_path / "out.run").take()
    assert Ownership(tmp_path / "out.run").take() is mine
    mine.give_back()
    assert mine.file.exists()
    refused = []

    def other():
        with pytest.raises(RunInUseError) as error:
            Ownership(tmp_path / "out.run").take()
        refused.append(error.value)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join(10)
    assert str(os.getpid()) in str(refused[0])
    mine.give_back()
    assert not mine.folder.exists()


@pytest.mark.parametrize("command", ["convert", "heal", "experts", "frontier"])
@pytest.mark.parametrize("more", [[], ["--resume"], ["--overwrite"]])
def test_commands_refuse_at_once_and_touch_nothing(command, more, tmp_path, holder, converted):
    out = tmp_path / "out"
    first = holder(tmp_path / "out.run")
    (tmp_path / "out.run" / "log.txt").write_text("of the first\n")
    words = {
        "convert": ["convert", "demo-glu", *FLAGS],
        "frontier": ["frontier", "demo-glu", "--layer", "1", "--k", "4", "--kinds", "mxd", *FLAGS[2:8]],
        "heal": ["heal", str(converted.out), "--tokens", "2000"],
        "experts": ["experts", str(converted.out), "--tokens", "2000"],
    }[command]
    result = CliRunner().invoke(main, [*words, "--out", str(out), *more])
    assert result.exit_code == 2, result.output
    assert f"RunInUseError: process {first.pid} on host" in result.stderr
    assert {path.name for path in (tmp_path / "out.run").iterdir()} == {OWNER_FILE, "log.txt"}
    assert not out.exists()


def test_a_run_ends_with_its_owner_and_a_second_cell_runs(tmp_path, interrupted_in_layer_2):
    out, both = tmp_path / "out", TINY | {"layers": "1-2", "memory": 0.2}
    for _ in range(2):  # Ctrl-C, and the same cell again
        with pytest.raises(KeyboardInterrupt):
            mxdsurgery.convert("demo-glu", **both, out=str(out), device="cpu", overwrite=True)
        assert not (tmp_path / "out.run" / OWNER_FILE).exists()
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(DataError):
        mxdsurgery.convert("demo-glu", **TINY, data=str(tmp_path / "short.txt"), out=str(tmp_path / "new" / "x"), device="cpu")
    mxdsurgery.convert("demo-glu", **TINY, out=str(out), device="cpu", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "short.txt"}


def test_a_result_that_another_process_wrote_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    def written(run, *given):
        (tmp_path / "out").mkdir()
        return before(run, *given)

    before = RunFolder.open
    monkeypatch.setattr(RunFolder, "open", written)
    with pytest.raises(OutputError, match="meanwhile"):
        mxdsurgery.convert("demo-glu", **TINY, out=str(tmp_path / "out"), device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_that_was_taken_over_stops_and_leaves_the_other_one_s_folder(tmp_path):
    run = RunFolder(tmp_path / "out", Recipe(checkpoint_every=1))
    run.open({}, resume=False, overwrite=False)
    with pytest.raises(RunInUseError), run.working(Reporter()):
        put(run.path, host="node7", token="other")
        run.after(1, {"x": list}, {}, dict)
    assert (run.path / OWNER_FILE).is_file() and not any(run.path.glob("checkpoints/step-*"))


def began(run):
    """Begins and ends a run that trains nothing; its name."""
    run.open({}, resume=False, overwrite=True)
    with run.working(Reporter()):
        (run.path / "recipe.yaml").write_text("")
    run._give_back()
    return run.path


@pytest.mark.parametrize("names", [["notes.txt"], ["log.txt", "metrics.jsonl", "recipe.yaml", "plan.json"]])
@pytest.mark.parametrize("how", [{}, {"overwrite": True}, {"resume": True}])
def test_a_user_s_own_folder_where_a_run_would_work_is_refused_and_stays(how, names, tmp_path):
    (tmp_path / "out.run" / "checkpoints").mkdir(parents=True)
    for name in names:
        (tmp_path / "out.run" / name).write_text("{}\n")
    before = {path.name: path.is_file() and path.read_text() for path in (tmp_path / "out.run").iterdir()}
    with pytest.raises(OutputError, match="mxdsurgery did not make it"):
        mxdsurgery.convert("demo-glu", **TINY, out=str(tmp_path / "out"), device="cpu", **how)
    assert {path.name: path.is_file() and path.read_text() for path in (tmp_path / "out.run").iterdir()} == before


def test_what_others_put_into_a_run_s_folder_stays(tmp_path):
    folder = began(RunFolder(tmp_path / "out", Recipe()))
    (folder / "notes.txt").write_text("mine")
    run = RunFolder(tmp_path / "out", Recipe())
    run.open({}, resume=False, overwrite=True)
    (tmp_path / "out").mkdir()
    with run.working(Reporter()):
        pass
    run.finish(tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {"notes.txt", MARKER}


def test_an_empty_folder_of_the_user_s_is_worked_in_and_left_empty(tmp_path):
    (tmp_path / "out.run").mkdir()
    run = RunFolder(tmp_path / "out", Recipe())
    (tmp_path / "out").mkdir()
    run.open({}, resume=False, overwrite=False)
    with run.working(Reporter()):
        pass
    run.finish(tmp_path / "out")
    assert not list((tmp_path / "out.run").iterdir())


@pytest.mark.parametrize("left", ["checkpoint", "metrics", "owner"])
def test_a_run_folder_of_an_earlier_version_has_no_marker_and_goes_on(left, tmp_path):
    run = RunFolder(tmp_path / "out", Recipe(checkpoint_every=1))
    run.open({}, resume=False, overwrite=False)
    with pytest.raises(OutputError), run.working(Reporter()) as reporter:
        reporter.say("train      a line")
        if left == "checkpoint":
            run.after(1, {"x": list}, {}, dict)
        else:
            run.journal.metrics("distil", step=1)
        raise OutputError("it ends too soon")
    (run.path / MARKER).unlink()
    if left == "owner":
        (run.path / "metrics.jsonl").unlink()
        put(run.path, process=2**22 + 1)
    again = RunFolder(tmp_path / "out", Recipe())
    again.open({}, resume=True, overwrite=False)
    assert (again.at == 1) == (left == "checkpoint") and (run.path / MARKER).is_file()
    again._give_back()


def test_a_run_at_work_that_has_no_checkpoint_yet_is_left_alone(tmp_path, holder):
    folder = began(RunFolder(tmp_path / "out", Recipe()))
    holder(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(RunInUseError):
        RunFolder(tmp_path / "out", Recipe()).open({}, resume=False, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
