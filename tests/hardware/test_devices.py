"""Any device that torch knows: everything runs on a pretended one, and real ones are queried correctly."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import check_device
import pytest
import torch
from accelerate import PartialState
from running import ROOT
from torch.utils import backend_registration

import mxdsurgery
from mxdsurgery.errors import DeviceError
from mxdsurgery.hardware import device, memory
from mxdsurgery.layers import sparse
from mxdsurgery.layers.layer import MxDLayer
from mxdsurgery.recipe import Recipe
from mxdsurgery.training import accelerator
from mxdsurgery.training.accelerator import choose_kernels, make_accelerator

TESTS = ROOT / "tests"
ON_CPU = Recipe(model="demo-glu", device="cpu")

needs_python_backends = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="torch has no devices in Python yet"
)


@pytest.fixture(scope="module")
def pretended():
    """What tests/pretend.py prints: it needs a process of its own, whose accelerator it is."""
    paths = os.pathsep.join([str(TESTS), str(ROOT / "scripts"), *sys.path])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(TESTS / "pretend.py")],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {"rows": {line["check"]: line for line in lines if "check" in line}} | lines[0] | lines[-1]


@needs_python_backends
@pytest.mark.parametrize("check", check_device.CHECKS)
def test_what_computes_does_so_on_any_device_and_gives_what_the_cpu_gives(pretended, check):
    row = pretended["rows"][check]
    assert "failed" not in row, row["failed"]
    # The CPU's own kernels; experts start at zero, where Adam makes much of what is only rounding.
    most = 1e-2 if check_device.CHECKS[check][1] == check_device.TRAINED else 1e-3
    assert row["right"] and row["difference"] < most, row


@needs_python_backends
def test_that_device_refuses_what_a_real_one_would(pretended):
    said = pretended["refusals"]
    assert "on the same device" in said["two devices"] and "on the same device" in said["an index from elsewhere"]
    assert "float64" in said["float64"] and "float64" in said["float64 from nothing"]
    assert "_linalg_svd" in said["no kernel"] and not said["sparse"].startswith("gave")
    assert {"aten::_fused_adam_", "aten::topk", "aten::_embedding_bag_dense_backward"} <= {*pretended["operations"]}


@needs_python_backends
def test_a_device_without_sums_of_rows_gets_them_otherwise(pretended):
    cpu, other = (torch.tensor(pretended["without sums of rows"][name]) for name in ("cpu", "pretend"))
    assert cpu.abs().max() > 1
    torch.testing.assert_close(other, cpu, rtol=1e-4, atol=1e-4)


@pytest.fixture
def machine_with(monkeypatch):
    """A machine with an accelerator of some type, of which nothing can be used."""

    def having(kind):
        monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available=False: kind and torch.device(kind))

    return having


@pytest.mark.parametrize(("kind", "there"), [(None, ["cpu"]), ("cuda", ["cpu", "cuda"]), ("mps", ["cpu", "mps"])])
def test_a_device_is_meant_by_its_name_and_auto_is_the_best_of_those_here(machine_with, kind, there):
    machine_with(kind)
    assert device.devices() == there and device.meant("auto") == device.check_device("auto") == there[-1]
    assert device.meant("xpu") == "xpu" and device.check_device("cpu") == "cpu"
    with pytest.raises(DeviceError) as caught:
        device.check_device("xpu")
    assert "'device' is 'xpu', which this machine does not have" in str(caught.value)
    assert f"expected: {' or '.join(there)}" in str(caught.value) and f"--device {there[-1]}" in caught.value.fix


def test_sums_are_float64_where_the_device_has_that(monkeypatch):
    assert device.widest("cpu") == device.widest(torch.device("cpu")) == torch.float64
    for error in (TypeError("no float64 on MPS"), RuntimeError("Required aspect fp64 is not supported")):
        device._has_float64.cache_clear()
        monkeypatch.setattr("torch.ones", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        assert device.widest("cpu") == torch.float32
        monkeypatch.undo()
    device._has_float64.cache_clear()


def test_free_memory_is_asked_of_the_device_and_shared_memory_of_the_host_too(monkeypatch):
    free = memory.free_memory("cpu")
    modules = {
        "cuda": SimpleNamespace(mem_get_info=lambda: (7, 9)),
        "mps": SimpleNamespace(recommended_max_memory=lambda: 10 * free, driver_allocated_memory=lambda: 5),
        "hpu": SimpleNamespace(),
    }
    monkeypatch.setattr("torch.get_device_module", lambda name: modules[name])
    assert memory.free_memory("cuda") == 7 and memory.free_memory("hpu") is None
    assert memory.free_memory("mps") < 2 * free  # not ten times what the machine has
    modules["mps"].recommended_max_memory = lambda: 105
    assert memory.free_memory("mps") == 100


def test_the_peak_is_unknown_where_torch_does_not_count(monkeypatch):
    monkeypatch.setattr("torch.accelerator.reset_peak_memory_stats", lambda: (_ for _ in ()).throw(RuntimeError("no stats")))
    assert memory.PeakMemory("mps").bytes() is None
    peaks = iter([100, 350])
    monkeypatch.setattr("torch.accelerator.reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr("torch.accelerator.memory_stats", lambda: {"allocated_bytes.all.peak": next(peaks)})
    assert memory.PeakMemory("xpu").bytes() == 250


def test_a_plan_for_another_machines_device_knows_whose_memory_the_text_takes(machine_with):
    machine_with(None)
    made = {kind: mxdsurgery.plan("demo-glu", device=kind, memory=4)[0] for kind in ("cpu", "cuda", "mps", "xpu")}
    assert {kind for kind, plan in made.items() if plan.groups[0].text_bytes} == {"cpu", "mps"}
    assert mxdsurgery.plan("demo-glu", device="mps", measure=True)[0].unmeasured == "there is no mps here"
    assert {kind for kind, plan in made.items() if plan.host_bytes} == {"cuda", "xpu"}
    unknown, _ = mxdsurgery.plan("demo-glu", device="xpu")
    assert unknown.machine.memory is None and unknown.machine.memory_source == "there is no xpu here: name one with --memory"


def test_a_second_run_in_the_same_process_may_be_on_another_device(machine_with, monkeypatch):
    assert make_accelerator(ON_CPU).device.type == "cpu"
    machine_with("meta")
    monkeypatch.setattr(PartialState, "default_device", torch.device("meta"))
    assert make_accelerator(Recipe(model="demo-glu", precision="fp32")).device.type == "meta"
    assert make_accelerator(ON_CPU).device.type == "cpu"


def test_accelerate_has_to_agree(monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    with pytest.raises(DeviceError, match="accelerate computes on meta, not on cpu"):
        make_accelerator(ON_CPU)
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE")
    make_accelerator(ON_CPU)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DeviceError, match="2 processes were launched, and on mps they do not work together"):
        accelerator._check_agrees(SimpleNamespace(device=torch.device("mps")), "mps")


def test_triton_is_tried_only_where_it_compiles():
    shape = {"d_model": 8, "n_experts": 8, "k": 2, "tokens": 16, "selection": None}
    assert choose_kernels(SimpleNamespace(device=torch.device("mps")), **shape) is None
    assert choose_kernels(SimpleNamespace(device=torch.device("cuda")), **shape | {"n_experts": 0}) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whether_torch_sums_rows_is_tried(monkeypatch, dtype):
    tried = sparse._tried_to_sum_rows.__wrapped__
    assert tried("cpu", dtype)
    monkeypatch.setattr("torch.nn.functional.embedding_bag", lambda _i, rows, per_sample_weights, mode: rows[:2] * 2)
    assert not tried("cpu", dtype)  # it runs, with a wrong result
    monkeypatch.setattr("torch.nn.functional.embedding_bag", lambda *_, **__: (_ for _ in ()).throw(NotImplementedError()))
    assert not tried("cpu", dtype)


def test_a_layer_runs_where_there_is_no_autocast():
    layer = MxDLayer(n_experts=40, k=4, d_model=8, d_hidden=16, kind="glu", activation="silu", encoder_bias=False).to("meta")
    assert layer(torch.empty(2, 3, 8, device="meta")).shape == (2, 3, 8)
