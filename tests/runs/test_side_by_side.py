"""Real processes that want the same run, or write the same files, at the same time."""

import json
import os
import shutil
import threading
import time

import pytest
from running import ROOT

from mxdsurgery.checkpoint import export
from mxdsurgery.checkpoint.converted import load
from mxdsurgery.checkpoint.writing import write_json
from mxdsurgery.planning.plan import read_plan
from mxdsurgery.recipe import Recipe, load_recipe
from mxdsurgery.runs.owner import OWNER_FILE, my_turn

TINY = ["--layers=1", "--tokens=8192", "--eval-tokens=300", "--n-experts=64", "--k=4", "--batch=512", "--device=cpu"]


# Starts commands in forks: two conversions, and, while the one that got the run is stopped, the two of a launch.
TOGETHER = """
import json, os, signal, socket, sys, time
from pathlib import Path
root, words, owner, said = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
sys.path.insert(0, root)

def started(name, **environment):
    if (child := os.fork()) == 0:
        to = os.open(said / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(to, 1), os.dup2(to, 2)
        os.environ.update(environment)
        from mxdsurgery.cli import main
        try:
            main(words)
        finally:
            code = sys.exc_info()[1].code
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    return child

def code_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

two = [started("one"), started("other")]
until = time.monotonic() + 120
while not owner.is_file() and time.monotonic() < until:
    time.sleep(0.005)
first = json.loads(owner.read_text())["process"]
os.kill(first, signal.SIGSTOP)
with socket.create_server(("127.0.0.1", 0)) as free:
    port = str(free.getsockname()[1])
launch = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
launch = [started(f"rank {rank}", RANK=rank, LOCAL_RANK=rank, **launch) for rank in "01"]
codes = {child: code_of(child) for child in (*two, *launch) if child != first}
os.kill(first, signal.SIGCONT)
print(json.dumps([first, [*codes.values()], code_of(first)]))
"""


def test_of_two_conversions_and_a_launch_of_two_one_goes_on_and_the_others_are_refused(forking, tmp_path):
    out, said = tmp_path / "out", tmp_path / "said"
    said.mkdir()
    words = json.dumps(["convert", "demo-glu", *TINY, "--out", str(out)])
    given = [str(ROOT), words, str(tmp_path / "out.run" / OWNER_FILE), str(said)]
    done = forking.run(TOGETHER, given, os.environ | {"OMP_NUM_THREADS": "1"}, str(tmp_path))
    texts = {path.name: path.read_text() for path in said.iterdir()}
    assert done.returncode == 0, (done, texts)
    first, refused, code = json.loads(done.stdout)
    assert (refused, code) == ([2, 2, 2], 0), texts
    named = f"RunInUseError: process {first} on host"
    assert [text.count(named) for text in sorted(texts.values(), key=len)][:2] == [1, 1], texts
    assert "exported " in max(texts.values(), key=len) and "DeviceError: another process of this run ended" in texts["rank 1"]
    assert {path.name for path in tmp_path.iterdir()} == {"out", "said"} and load(out).layers.keys() == {1}


def figures_and_card(folder):
    """A figure as evaluation.json and as the card have it."""
    tokens = json.loads((folder / "evaluation.json").read_text())["tokens"]
    return tokens, f"{tokens:,} tokens" in (folder / "README.md").read_text()


def test_figures_and_card_are_of_one_evaluation_where_two_are_written_at_once(tmp_path, monkeypatch):
    folder, second_is_there = tmp_path / "made", threading.Event()
    shutil.copytree(ROOT / "tests/fixtures/format_3", folder)
    plan, evaluation = read_plan(folder / "plan.json"), json.loads((folder / "evaluation.json").read_text())
    recipe, replace = Recipe(**load_recipe(folder / "recipe.yaml")), os.replace

    def slowly(source, target):
        if os.path.basename(target) == "README.md" and threading.current_thread() is first:
            second_is_there.wait(0.5)  # as long as the second one would need for both
        replace(source, target)

    def write(tokens):
        export.write_evaluation(folder, evaluation | {"tokens": tokens}, plan, recipe)

    def write_second():
        write(22_222)
        second_is_there.set()

    monkeypatch.setattr(os, "replace", slowly)
    first, second = threading.Thread(target=write, args=(11_111,)), threading.Thread(target=write_second)
    first.start()
    while figures_and_card(folder)[0] != 11_111:
        time.sleep(0.005)
    second.start()
    for thread in (first, second):
        thread.join(30)
    assert figures_and_card(folder) == (22_222, True)
    assert not any(path.name.startswith(".") for path in folder.iterdir())


def in_forks(*works):
    """Runs each in a fork of this process, all at the same time; the forks' exit codes."""
    children = []
    for work in works:
        if (child := os.fork()) == 0:
            code = 1
            try:
                work()
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def test_a_file_that_many_processes_write_is_always_one_of_theirs(tmp_path):
    file = tmp_path / "new" / "result.json"

    def write(number):
        for _ in range(100):
            write_json(file, [number] * 2_000)
            assert len(set(json.loads(file.read_text()))) == 1

    assert in_forks(*(lambda number=number: write(number) for number in range(4))) == [0] * 4
    assert [path.name for path in file.parent.iterdir()] == ["result.json"]


def test_processes_take_turns(tmp_path):
    shared = tmp_path / "counted"
    shared.write_text("0")

    def count():
        for _ in range(5):
            with my_turn(tmp_path / "turn"):
                found = int(shared.read_text())
                time.sleep(0.01)
                shared.write_text(str(found + 1))

    assert in_forks(count, count, count) == [0] * 3
    assert shared.read_text() == "15" and [path.name for path in tmp_path.iterdir()] == ["counted"]


def test_a_turn_ends_with_an_error_and_nothing_is_left(tmp_path):
    with pytest.raises(ValueError, match="wrong"), my_turn(tmp_path / "turn"):
        raise ValueError("wrong")
    assert list(tmp_path.iterdir()) == []
