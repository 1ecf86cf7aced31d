"""Several processes give what one gives: bit for bit where they share the layers, to rounding where they share the text."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import mxdsurgery
from mxdsurgery.conversion.heal import _contexts_per_pass
from mxdsurgery.conversion.healing import Healing
from mxdsurgery.errors import DeviceError, HealError, RecipeError
from mxdsurgery.recipe import Recipe
from mxdsurgery.runs import parallel

OPTIONS = {
    "layers": "0-2",
    "tokens": 8_192,
    "eval_tokens": 300,
    "n_experts": 64,
    "k": 4,
    "batch": 1_024,
    "shuffle": 4_000,
    "compute": "float32",
    "device": "cpu",
}


def flags(options):
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def launched(*arguments, processes=2):
    """A command in several processes, on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "-m", "mxdsurgery", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finished(*arguments, code=0, **options):
    process = launched(*arguments, **options)
    said = process.communicate(timeout=240)[0]
    assert (process.returncode == 0) == (code == 0), said
    return said


@pytest.fixture(scope="module", autouse=True)
def as_much_validation_as_the_processes_have():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mxdsurgery.text.sources.VALIDATION_TOKENS", 8_192)
        yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes."""
    out = tmp_path_factory.mktemp("alone") / "out"
    mxdsurgery.convert("demo-glu", **OPTIONS, out=str(out))
    return out


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_close(first, second, within=5e-3):
    """To rounding: Adam makes more of it where a gradient is next to nothing, so the rows as a whole are compared."""
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        difference = (tensor.float() - other[name].float()).norm() / tensor.float().norm().clamp_min(1e-6)
        assert difference < within, (name, difference)
    figures = [json.loads((folder / "evaluation.json").read_text())["all"] for folder in (first, second)]
    assert figures[0]["kl"] == pytest.approx(figures[1]["kl"], rel=2e-3)


def test_sharing_the_layers_gives_the_same_bits_and_one_voice(alone, tmp_path):
    said = finished("convert", "demo-glu", *flags(OPTIONS), "--parallel", "layers", "--out", tmp_path / "out")
    assert said.count("The converted model is in") == said.count("exported ") == 1
    one, two = weights(alone), weights(tmp_path / "out")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    figures = [json.loads((folder / "evaluation.json").read_text()) for folder in (alone, tmp_path / "out")]
    assert figures[0]["all"] == figures[1]["all"]
    assert figures[0]["training"]["dead_share"] == figures[1]["training"]["dead_share"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {layer for row in rows for layer in row["layers"]} == {"0 mxd k4", "1 mxd k4", "2 mxd k4"}
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_sharing_the_text_gives_the_same_to_rounding(alone, tmp_path):
    finished("convert", "demo-glu", *flags(OPTIONS), "--parallel", "data", "--out", tmp_path / "out")
    assert_close(alone, tmp_path / "out")


def test_healing_shares_the_text(alone, tmp_path):
    options = {"tokens": 4_096, "batch": 1_024, "seed": 3, "accumulate": 4}  # one context in each pass of each process
    mxdsurgery.heal(alone, out=tmp_path / "one", **options)
    finished("heal", alone, "--out", tmp_path / "two", *flags(options))
    assert_close(tmp_path / "one", tmp_path / "two", within=1e-3)


@pytest.mark.parametrize("way", ["layers", "data"])
def test_the_death_of_one_ends_the_others_and_all_go_on_from_a_checkpoint(way, alone, tmp_path):
    arguments = [
        "convert",
        "demo-glu",
        *flags(OPTIONS),
        "--parallel",
        way,
        "--out",
        tmp_path / "out",
        "--checkpoint-every",
        "1",
    ]
    process = launched(*arguments)
    name = "checkpoints.1" if way == "layers" else "checkpoints"
    until = time.monotonic() + 200
    while not any((tmp_path / "out.run" / name).glob("step-*")) and time.monotonic() < until:
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    killed = time.monotonic()
    said = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and time.monotonic() - killed < 60, said
    assert "SIGKILL" in said and not (tmp_path / "out").exists()
    assert "holds an unfinished run" in finished(*arguments, code=2)
    finished(*arguments, "--resume")
    if way == "layers":
        one, two = weights(alone), weights(tmp_path / "out")
        assert all(torch.equal(one[name], two[name]) for name in one)
    else:
        assert_close(alone, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.fixture
def three(monkeypatch):
    """As if three processes had been launched, and this were the second."""
    monkeypatch.setattr(parallel, "processes", lambda: 3)
    monkeypatch.setattr(parallel, "rank", lambda: 1)


def test_shares_of_the_layers_are_neighbours_and_may_be_uneven(three):
    assert parallel.layer_shares(range(7), Recipe(parallel="layers")) == [[0, 1], [2, 3], [4, 5, 6]]
    assert parallel.layer_shares([5], Recipe(parallel="layers")) == [[], [], [5]]
    assert parallel.layer_shares([5, 6], Recipe(parallel="data")) == [[5, 6]] * 3


def test_shares_of_the_text_cover_a_batch(three, monkeypatch):
    batch, recipe, seen = torch.arange(12).view(6, 2), Recipe(parallel="data"), []
    for number in range(3):
        monkeypatch.setattr(parallel, "rank", lambda number=number: number)
        seen += parallel.my_contexts(batch, recipe).flatten().tolist()
    assert sorted(seen) == list(range(12)) and len(seen) == 12
    assert parallel.my_contexts(batch, Recipe(parallel="layers")) is batch


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"batch": 1024, "context": 128}, "8 contexts, which 3 processes cannot share(.|\n)*batch=768"),
        ({"batch": 1536, "activation_buffer": 4096}, "'activation_buffer' and 'parallel'(.|\n)*parallel='layers'"),
        ({"batch": 1536, "sparsity": "batchtopk"}, "'sparsity' and 'parallel'"),
        ({"parallel": "layers", "inputs": "converted"}, "'inputs' and 'parallel'(.|\n)*parallel='data'"),
        ({"parallel": "layers", "inputs": "joint"}, "'inputs' and 'parallel'"),
        ({"cache_activations": "kept"}, "'cache_activations' is 'kept', with 3 processes(.|\n)*launch one process"),
    ],
)
def test_what_they_cannot_do_together_is_named(three, keys, message):
    with pytest.raises(RecipeError, match=message):
        parallel.check_parallel(Recipe(**keys))


@pytest.mark.parametrize(
    ("accumulate", "batch", "fix"),
    [(2, 1_152, "accumulate=1"), (4, 1_152, "accumulate=3"), (9, 1_152, "accumulate=3(.|\n)*batch=3456")],
)
def test_every_process_has_as_many_contexts_in_each_pass(three, accumulate, batch, fix):
    recipe = Recipe(batch=batch, context=128)
    assert [_contexts_per_pass(recipe, Healing(accumulate=fits)) for fits in (1, 3)] == [9, 3]
    with pytest.raises(
        HealError, match=f"accumulate is {accumulate}, and a step has 9 contexts .* in 3 processes(.|\n)*{fix}"
    ):
        _contexts_per_pass(recipe, Healing(accumulate=accumulate))


def test_a_frontier_is_made_by_one(monkeypatch):
    monkeypatch.setattr("mxdsurgery.training.accelerator.processes", lambda: 2)
    with pytest.raises(DeviceError, match="2 processes were launched for a frontier"):
        mxdsurgery.frontier("demo-glu", layer=0, k=(4,), tokens=2_000, n_experts=64)


def test_a_lost_process_is_named():
    def lost(*_, **__):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:4711")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "processes", lambda: 2)
        patch.setattr(parallel.dist, "barrier", lost)
        with pytest.raises(DeviceError, match="another process of this run ended(.|\n)*resume=True"):
            parallel.wait()


def test_plain_data_and_tensors_travel_as_bytes(monkeypatch):
    box = []
    monkeypatch.setattr(parallel.dist, "send", lambda tensor, _: box.append(tensor.clone()))
    monkeypatch.setattr(parallel.dist, "recv", lambda here, _: here.copy_(box.pop(0)))
    values, tensor, cpu = {"a": [1, 2.5, None], "é": "x"}, torch.randn(3, 5).bfloat16(), torch.device("cpu")
    parallel.send_values(values, cpu)
    assert parallel.receive_values(1, cpu) == values
    parallel.send(tensor.T, cpu)
    assert torch.equal(parallel.receive(torch.empty(5, 3, dtype=torch.bfloat16), 1, cpu), tensor.T)
