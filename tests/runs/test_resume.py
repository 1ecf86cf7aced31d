"""Interrupted runs resume bit for bit where they stopped, and a checkpoint is there whole or not at all."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from running import ROOT, without_reloads
from safetensors.torch import load_file, save_file

import mxdsurgery
from mxdsurgery.base.model import BaseModel
from mxdsurgery.errors import CheckpointError, Interrupted, OutputError
from mxdsurgery.recipe import Recipe
from mxdsurgery.runs.resume import Checkpoints, optimizer_state, part, restore_optimizer
from mxdsurgery.runs.run_folder import RunFolder, stoppable
from mxdsurgery.training import distill, end_to_end

SMALL = {
    "layers": "0-2",
    "tokens": 6_144,
    "eval_tokens": 300,
    "n_experts": 64,
    "k": 4,
    "batch": 256,
    "shuffle": 4_000,
    "device": "cpu",
}
STEPS = 24


def weights(folder):
    """All tensors of a folder's checkpoint, and what was measured on it."""
    figures = json.loads((folder / "evaluation.json").read_text())
    return load_file(folder / "model.safetensors"), figures["all"], figures["training"]["dead_share"]


def assert_same(first, second):
    (tensors, *figures), (others, *other_figures) = weights(first), weights(second)
    assert tensors.keys() == others.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []
    assert figures == other_figures


@pytest.fixture(scope="module", autouse=True)
def unchecked():
    with pytest.MonkeyPatch.context() as patch:
        without_reloads(patch)
        yield


@contextmanager
def stopping(patch):
    """Yields ``stopped(n)``: a Ctrl-C comes in the n-th step of a layer, or of an end-to-end training, from here on."""

    def after(count):
        counter = itertools.count(1)

        def counting(real):
            def step(*args, **options):
                if next(counter) == count:
                    signal.raise_signal(signal.SIGINT)
                return real(*args, **options)

            return step

        patch.setattr("mxdsurgery.training.distill.train_step", counting(distill.train_step))
        patch.setattr(end_to_end._Trainer, "step", counting(end_to_end._Trainer.step))

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    try:
        yield after
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def stopped(monkeypatch):
    with stopping(monkeypatch) as after:
        yield after


WAYS = {
    "as the recipe for it says": ({}, [20]),
    "stopped twice": ({}, [11, 41]),
    "positions mixed across batches": ({"activation_buffer": 1_500}, [20, 41]),
    "at its last step": ({"activation_buffer": 1_500}, [3 * STEPS - 1]),
    "block by block": ({"inputs": "converted", "kept_tokens": 2_048}, [30]),
    "block by block, from disk": ({"inputs": "converted", "offload": "disk"}, [60]),
    "jointly": ({"inputs": "joint"}, [9]),
    "transcoders with rows of unit length": ({"kind": "transcoder", "unit_norm": True, "auxk": 0.1}, [25]),
    "jumprelu": ({"sparsity": "jumprelu"}, [30]),
    "moments in bfloat16": ({"moments": "bfloat16"}, [25]),
    "batchtopk, block by block": ({"sparsity": "batchtopk", "inputs": "converted"}, [30]),
}


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory):
    """What a conversion with some keys gives that was not stopped."""
    made = {}

    def convert(keys):
        name = json.dumps(keys)
        if name not in made:
            made[name] = tmp_path_factory.mktemp("unstopped") / "whole"
            mxdsurgery.convert("demo-glu", **SMALL, **keys, out=str(made[name]))
        return made[name]

    return convert


@pytest.mark.parametrize("way", WAYS)
def test_a_conversion_that_was_stopped_goes_on_bit_for_bit(way, unstopped, tmp_path, stopped, monkeypatch):
    keys, stops = WAYS[way]
    whole = unstopped(keys)
    for stop in stops:
        with monkeypatch.context() as patch:
            patch.setattr("mxdsurgery.training.distill.train_step", distill.train_step)
            stopped(stop)
            with pytest.raises(Interrupted, match="A checkpoint of step (.|\n)*resume=True goes on"):
                mxdsurgery.convert("demo-glu", **SMALL, **keys, out=str(tmp_path / "parts"), resume=True)
        assert not (tmp_path / "parts").exists()
    mxdsurgery.convert("demo-glu", **SMALL, **keys, out=str(tmp_path / "parts"), resume=True)
    assert_same(whole, tmp_path / "parts")
    assert {path.name for path in tmp_path.iterdir()} == {"parts"}


HEALS = {
    "layers": {},
    "layers and LoRA": {"mode": "both", "lora_rank": 2, "moments": "bfloat16"},
    "from kept predictions, in two passes": {"teacher": "cached", "accumulate": 2},
}


@pytest.mark.parametrize("way", HEALS)
def test_healing_that_was_stopped_goes_on_bit_for_bit(way, converted, tmp_path, stopped, monkeypatch):
    options = {"tokens": 3_072, "batch": 256, "specialise": 0.01} | HEALS[way]
    if options.get("mode") == "both":
        pytest.importorskip("peft")
    mxdsurgery.heal(converted.out, out=tmp_path / "whole", **options)
    with monkeypatch.context():
        stopped(7)
        with pytest.raises(Interrupted, match="A checkpoint of step 7"):
            mxdsurgery.heal(converted.out, out=tmp_path / "parts", **options)
    with pytest.raises(CheckpointError, match="depends on something else: lr"):
        mxdsurgery.heal(converted.out, out=tmp_path / "parts", resume=True, **options, lr=1e-5)
    mxdsurgery.heal(converted.out, out=tmp_path / "parts", resume=True, **options)
    assert_same(tmp_path / "whole", tmp_path / "parts")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "parts"}


def test_healing_that_ended_is_not_done_again_when_only_writing_failed(converted, tmp_path, monkeypatch):
    options = {"tokens": 20_480, "batch": 512, "lr": 0.05, "patience": 1}  # nothing gets better: it stops early
    whole = mxdsurgery.heal(converted.out, out=tmp_path / "whole", **options)
    assert whole["stopped_early"]
    steps = []
    with monkeypatch.context() as patch:
        full = OSError(28, "No space left on device")
        patch.setattr("mxdsurgery.conversion.heal_record.write_code", lambda *_: (_ for _ in ()).throw(full))
        with pytest.raises(OutputError, match="No space left(.|\n)*the same call with resume=True goes on"):
            mxdsurgery.heal(converted.out, out=tmp_path / "parts", **options)
    monkeypatch.setattr(end_to_end._Trainer, "step", lambda *_: steps.append(1))
    mxdsurgery.heal(converted.out, out=tmp_path / "parts", resume=True, **options)
    assert not steps
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_a_frontier_goes_on_within_a_group(tmp_path, stopped):
    options = {key: value for key, value in SMALL.items() if key not in ("layers", "k")} | {"layer": 1, "k": (4,)}
    whole = mxdsurgery.frontier("demo-glu", kinds=("mxd", "transcoder"), out=str(tmp_path / "whole"), **options)
    stopped(21)
    with pytest.raises(Interrupted, match="A checkpoint of step 11 (.|\n)*holds 0 finished rows"):
        mxdsurgery.frontier("demo-glu", kinds=("mxd", "transcoder"), out=str(tmp_path / "parts"), **options)
    with pytest.raises(OutputError, match="unfinished run(.|\n)*delete .*parts.run to begin anew"):
        mxdsurgery.frontier("demo-glu", kinds=("mxd", "transcoder"), out=str(tmp_path / "parts"), **options)
    parts = mxdsurgery.frontier("demo-glu", kinds=("mxd", "transcoder"), out=str(tmp_path / "parts"), resume=True, **options)
    assert parts.rows == whole.rows
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "parts"}
    rows = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 20, 24] and set(rows[0]["layers"]) == {"1 mxd k4", "1 transcoder k4"}


@pytest.fixture(scope="module")
def once_stopped(tmp_path_factory):
    """A text, and the run of a conversion on it that was stopped at its third step."""
    place = tmp_path_factory.mktemp("stopped")
    text = place / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(f"def f{i}(x):\n    return x + {i}\n" * 20 for i in range(200)))
    with pytest.MonkeyPatch.context() as patch, stopping(patch) as stopped, pytest.raises(Interrupted):
        stopped(3)
        mxdsurgery.convert("demo-glu", **SMALL | {"layers": "1", "data": str(text), "out": str(place / "out")})
    return place


@pytest.fixture
def unfinished(once_stopped, tmp_path):
    """A conversion that was stopped at its third step, and its options."""
    shutil.copytree(once_stopped / "out.run", tmp_path / "out.run")
    return SMALL | {"layers": "1", "data": str(once_stopped / "text.txt"), "out": str(tmp_path / "out")}


def test_a_run_of_other_settings_model_or_text_is_not_resumed(unfinished, tmp_path, monkeypatch):
    def resumed(**changes):
        mxdsurgery.convert("demo-glu", **unfinished | changes, resume=True)

    before = sorted(path.name for path in (tmp_path / "out.run").rglob("*"))
    with pytest.raises(OutputError, match="holds an unfinished run(.|\n)*resume=True to go on"):
        mxdsurgery.convert("demo-glu", **unfinished)
    with pytest.raises(CheckpointError, match="something else: lr: 0.5(.|\n)*expected: lr: 0.00"):
        resumed(lr=0.5)
    with monkeypatch.context() as patch:
        read = BaseModel._read

        def another(*args):
            model = read(*args)
            model.model.layers[0].mlp.down_proj.weight.data[0, 0] += 1.0
            return model

        patch.setattr(BaseModel, "_read", another)
        with pytest.raises(CheckpointError, match="something else: base"):
            resumed()
    file, text = Path(unfinished["data"]), Path(unfinished["data"]).read_text()
    file.write_text(text.replace("def f", "def g"))
    try:
        with pytest.raises(CheckpointError, match="the training text is not what it was"):
            resumed()
    finally:
        file.write_text(text)  # of other tests, too
    assert sorted(path.name for path in (tmp_path / "out.run").rglob("*")) == before  # nothing is lost
    resumed(keep_checkpoints=1, checkpoint_every=5)  # keys that do not affect the result may change
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize("data", ["texts", "texts/*.txt"])
def test_a_run_on_a_folder_or_pattern_goes_on_from_elsewhere_unless_its_files_are_others(data, tmp_path, stopped, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for number in (1, 2, 3):
        text = "\n".join(f"def f{i}(x):\n    return x + {number}\n" * 20 for i in range(70))
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    options = SMALL | {"layers": "1", "out": str(tmp_path / "out")}
    with monkeypatch.context():
        stopped(3)
        with pytest.raises(Interrupted):
            mxdsurgery.convert("demo-glu", **options, data=data)
    (tmp_path / "texts" / "0.txt").write_text(text)
    with pytest.raises(CheckpointError, match="the training text is not what it was"):
        mxdsurgery.convert("demo-glu", **options, data=data, resume=True)
    (tmp_path / "texts" / "0.txt").unlink()
    monkeypatch.chdir("/")
    mxdsurgery.convert("demo-glu", **options, data=str(tmp_path / data), resume=True)
    assert {path.name for path in tmp_path.iterdir()} == {"texts", "out"}


def test_overwrite_begins_anew(unfinished, tmp_path):
    mxdsurgery.convert("demo-glu", **unfinished, overwrite=True)
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 20, 24] and not (tmp_path / "out.run").exists()


@pytest.mark.parametrize("file", ["training.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("fault", ["cut", "altered", "missing"])
def test_a_damaged_checkpoint_is_named_and_left(file, fault, unfinished, tmp_path):
    (checkpoint,) = (tmp_path / "out.run" / "checkpoints").iterdir()
    path = checkpoint / file
    content = path.read_bytes()
    if fault == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if fault == "cut" else content[:-9] + b"\x00" + content[-8:])
    with pytest.raises(CheckpointError, match="is damaged(.|\n)*to mend: delete it(.|\n)*begins anew"):
        mxdsurgery.convert("demo-glu", **unfinished, resume=True)
    assert checkpoint.is_dir()


def checkpoints(folder, **options):
    return Checkpoints(folder, **{"every": None, "minutes": 0.0, "keep": 2} | options)


def test_the_last_ones_stay_and_what_is_finished_is_written_once(tmp_path):
    kept, asked = checkpoints(tmp_path / "c"), []
    for step in (1, 2, 3):
        finished = {"done.safetensors": lambda: asked.append(1) or [{"x": torch.ones(3)}, {"y": torch.ones(1)}]}
        tensors = {"training.safetensors": lambda step=step: [{"x": torch.full((2,), step)}]}
        kept.save(step, tensors, finished, {"step": step})
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["step-000000002", "step-000000003"]
    assert len(asked) == 1
    found = checkpoints(tmp_path / "c").latest()
    assert found.state == {"step": 3}
    assert found.tensors("training.safetensors")["x"].tolist() == [3, 3]
    assert found.tensors("done.safetensors")["x"].tolist() == [1, 1, 1]
    assert set(found.tensors("done.safetensors")) == {"x", "y"}


def test_one_part_at_a_time_is_held(tmp_path):
    held = []

    def parts():
        for number in range(3):
            assert not any(one() is not None for one in held)  # the part before is freed
            tensor = torch.full((4,), float(number))
            held.append(weakref.ref(tensor))
            yield {f"{number}.x": tensor}
            del tensor

    checkpoints(tmp_path).save(1, {"training.safetensors": parts}, {}, {})
    found = checkpoints(tmp_path).latest()
    names = {"training.safetensors", "training.1.safetensors", "training.2.safetensors"}
    assert {path.name for path in found.folder.iterdir()} == {*names, "state.json", "manifest.json"}
    tensors = found.tensors("training.safetensors")
    assert part(tensors, "2")["x"].tolist() == [2.0] * 4 and list(tensors) == ["0.x", "1.x", "2.x"]
    # Earlier versions wrote all of it to one file.
    save_file(dict(tensors), found.folder / "whole.safetensors")
    assert part(found.tensors("whole.safetensors"), "2")["x"].tolist() == [2.0] * 4
    (found.folder / "training.2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"training\.2\.safetensors is missing"):
        checkpoints(tmp_path).latest()


def test_what_ends_between_two_parts_leaves_the_checkpoint_before(tmp_path):
    def ends():
        yield {"x": torch.ones(1)}
        raise OSError(28, "No space left on device")

    kept = checkpoints(tmp_path)
    kept.save(1, {"training.safetensors": lambda: [{"x": torch.zeros(1)}]}, {}, {"step": 1})
    with pytest.raises(OutputError, match="No space left"):
        kept.save(2, {"training.safetensors": ends}, {}, {"step": 2})
    assert kept.latest().state == {"step": 1} and [path.name for path in tmp_path.iterdir()] == ["step-000000001"]


def test_a_checkpoint_of_version_1_is_read(tmp_path):
    kept = checkpoints(tmp_path)
    kept.save(1, {"training.safetensors": lambda: [{"0.x": torch.ones(1), "1.x": torch.ones(2)}]}, {}, {"step": 1})
    manifest = tmp_path / "step-000000001" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 2', '"format_version": 1'))
    assert set(kept.latest().tensors("training.safetensors")) == {"0.x", "1.x"}


def test_the_one_before_a_damaged_one_is_offered(tmp_path):
    kept = checkpoints(tmp_path)
    for step in (1, 2):
        kept.save(step, {}, {}, {"step": step})
    (tmp_path / "step-000000002" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="goes on from step-000000001"):
        kept.latest()
    shutil.rmtree(tmp_path / "step-000000002")
    assert kept.latest().state == {"step": 1}


def test_one_of_a_later_version_is_refused(tmp_path):
    kept = checkpoints(tmp_path)
    kept.save(1, {}, {}, {})
    manifest = tmp_path / "step-000000001" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 2', '"format_version": 9'))
    with pytest.raises(CheckpointError, match="version 9"):
        kept.latest()


def test_a_full_disk_leaves_the_checkpoints_before_as_they_were(tmp_path, monkeypatch):
    kept = checkpoints(tmp_path)
    kept.save(1, {"a.safetensors": lambda: [{"x": torch.ones(1)}]}, {}, {"step": 1})

    def full(tensors, path):
        path.write_bytes(b"half of ")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mxdsurgery.runs.resume.save_file", full)
        with pytest.raises(OutputError, match="checkpoint of step 2 cannot be written(.|\n)*No space left"):
            kept.save(2, {"a.safetensors": lambda: [{"x": torch.ones(1)}]}, {}, {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
    assert kept.latest().state == {"step": 1}


def test_what_a_killed_run_left_half_written_is_no_checkpoint(tmp_path):
    kept = checkpoints(tmp_path)
    kept.save(1, {}, {}, {"step": 1})
    shutil.copytree(tmp_path / "step-000000001", tmp_path / ".writing")
    assert checkpoints(tmp_path).latest().state == {"step": 1}
    kept.save(2, {}, {}, {"step": 2})
    assert {path.name for path in tmp_path.iterdir()} == {"step-000000001", "step-000000002"}


def test_checkpoints_are_due_by_steps_and_by_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("mxdsurgery.runs.resume.time.monotonic", lambda: now[0])
    by_time = checkpoints(tmp_path, minutes=10.0)
    assert not by_time.due(1)
    now[0] = 601.0
    assert by_time.due(2)
    by_time.took = 60.0  # at most a twentieth of the time
    assert not by_time.due(2)
    assert [step for step in range(1, 10) if checkpoints(tmp_path, every=4, minutes=10.0).due(step)] == [4, 8]
    assert not checkpoints(tmp_path, every=1, keep=0).due(1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_ends(number):
    said, before = [], signal.getsignal(number)
    signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), stoppable(said.append) as stop:
            signal.raise_signal(number)
            assert stop.asked and len(said) == 1 and number.name in said[0]
            signal.raise_signal(number)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_in_another_thread_signals_are_left_alone():
    seen = []

    def work():
        with stoppable(seen.append) as stop:
            seen.append(stop.asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_a_mistake_before_the_training_leaves_nothing_behind(tmp_path):
    with pytest.raises(mxdsurgery.MxDError):
        mxdsurgery.convert("demo-glu", **SMALL | {"data": str(tmp_path / "no.txt")}, out=str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_adam_goes_on_where_it_was():
    def steps(parameter, optimizer, count):
        for number in range(count):
            parameter.grad = torch.full_like(parameter, 1.0 + number)
            optimizer.step()

    torch.manual_seed(0)
    start = torch.randn(5)
    first = torch.nn.Parameter(start.clone())
    adam = torch.optim.Adam([first], lr=0.1, fused=True)
    steps(first, adam, 3)
    second = torch.nn.Parameter(first.detach().clone())
    again = torch.optim.Adam([second], lr=0.1, fused=True)
    restore_optimizer(again, {name: value.clone() for name, value in optimizer_state(adam).items()})
    steps(first, adam, 2)
    steps(second, again, 2)
    assert torch.equal(first, second)


def test_a_run_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunFolder(None, Recipe(checkpoint_every=1))
    run.open({"a": 1}, resume=False, overwrite=False)
    run.after(1, {"x.safetensors": lambda: pytest.fail("asked for")}, {}, dict)
    run.finish(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_keeps_every_dtype_bit_for_bit(tmp_path):
    tensors = {str(d): torch.randn(7).to(d) for d in (torch.float32, torch.bfloat16, torch.float64)}
    kept = checkpoints(tmp_path)
    kept.save(1, {"a.safetensors": lambda: [tensors]}, {}, {})
    save_file(tensors, tmp_path / "again.safetensors")
    found = kept.latest().tensors("a.safetensors")
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_runs_killed_at_random_instants_end_as_if_they_had_not_been(tmp_path):
    script = ROOT / "scripts" / "measure" / "reliability.py"
    work = "import json, reliability, pathlib, sys; print(json.dumps(reliability.measure_kills(2, pathlib.Path(sys.argv[1]))))"
    command = [sys.executable, "-c", work, str(tmp_path)]  # a process of its own: it forks
    environment = os.environ | {"PYTHONPATH": str(script.parent), "OMP_NUM_THREADS": "1"}
    made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert made.returncode == 0, made.stderr
    rows = json.loads(made.stdout)["rows"]
    assert sum(row["kills"] for row in rows) == 2
    assert all(row["same"] and row["exit"] == 0 and not row["torn"] and not row["left_behind"] for row in rows)
