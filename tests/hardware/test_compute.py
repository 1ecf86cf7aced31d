"""The dtype to compute in: chosen by measuring, apart from the one that weights are stored in, on every kind of machine."""

import dataclasses
import json
import shutil
from collections import Counter

import pytest
import torch
from running import Said, interrupt_layer_2, random_states
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import mxdsurgery
from mxdsurgery.base.dtypes import as_stored, compute_in, computed_in, stored_in
from mxdsurgery.base.model import open_model
from mxdsurgery.catalogue.statistics import Tally
from mxdsurgery.editing.edits import edits_from_flags
from mxdsurgery.errors import Interrupted
from mxdsurgery.hardware import compute
from mxdsurgery.hardware.compute import Shape, layer_seconds, model_dtype, product_seconds, training_dtype
from mxdsurgery.planning.summary import summary
from mxdsurgery.terminal.console import Reporter

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "mkldnn_linear", "_scaled_dot_product_flash_attention_for_cpu"}
SHAPE = Shape(tokens=64, context=16, d_model=32, d_hidden=64, heads=4)


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products by dtype, while open."""

    def __init__(self):
        super().__init__()
        self.work = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func.overloadpacket.__name__ in PRODUCTS:
            first, second = [arg for arg in args if isinstance(arg, torch.Tensor)][-2:]
            self.work[second.dtype] += first.numel() * second.shape[-1]
        return out

    def share(self, dtype):
        return self.work[dtype] / self.work.total()


@pytest.fixture
def machine(monkeypatch):
    """Lets this machine have other rates: seconds of a thing in each dtype."""

    def make(**seconds):
        rate = {"float32": 1.0, "float16": 40.0} | seconds
        monkeypatch.setattr(compute, "layer_seconds", lambda _device, _dtypes, _shape: rate)
        monkeypatch.setattr(compute, "product_seconds", lambda _device, _dtypes, *_shape: rate)

    return make


KINDS = {"avx2": ({"bfloat16": 43.0}, torch.float32), "bf16": ({"bfloat16": 0.3}, torch.bfloat16)}


@pytest.fixture(params=list(KINDS))
def kind(request, machine):
    """Either kind of processor, and what a model stored in bfloat16 computes in there."""
    rates, dtype = KINDS[request.param]
    machine(**rates)
    return dtype


def test_a_model_computes_as_stored_or_in_float32_where_that_is_faster(machine):
    machine(bfloat16=43.0)
    chosen = model_dtype("bfloat16", "auto", "cpu", SHAPE)
    assert str(chosen) == "float32: bfloat16 takes 43 times as long on this processor"
    machine(bfloat16=0.25)
    assert str(model_dtype("bfloat16", "auto", "cpu", SHAPE)) == "bfloat16: float32 takes 4 times as long on this processor"
    machine(bfloat16=1.05)  # not worth twice the memory
    assert model_dtype("bfloat16", "auto", "cpu", SHAPE).dtype == "bfloat16"
    machine(bfloat16=0.25)
    assert model_dtype("float32", "auto", "cpu", SHAPE).dtype == "float32", "never in less than what is stored"
    assert model_dtype("float16", "auto", "cpu", SHAPE).dtype == "float32"
    assert model_dtype("float32", "bfloat16", "cpu", SHAPE).dtype == "bfloat16", "unless it is asked for"


def test_layers_in_training_compute_in_the_faster_of_both(machine):
    machine(bfloat16=0.25)
    assert training_dtype("cpu", 64, 32, 128).dtype == "bfloat16"
    machine(bfloat16=0.99)
    assert training_dtype("cpu", 64, 32, 128).dtype == "float32"


def test_rates_are_measured_once_on_a_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(compute, "_rates_path", lambda: tmp_path / "rates.json")
    calls, seconds = [], {"float32": 0.5, "bfloat16": 0.25}

    def timed():
        calls.append(1)
        return seconds

    for process in range(3):
        rates = compute._Rates()
        assert rates("one machine", "a product", timed) == rates("one machine", "a product", timed) == seconds, process
    assert len(calls) == 1
    assert compute._Rates()("another machine", "a product", timed) == seconds and len(calls) == 2
    assert json.loads((tmp_path / "rates.json").read_text()).keys() == {"one machine", "another machine"}
    (tmp_path / "rates.json").write_text("[1, 2")
    assert compute._Rates()("one machine", "a product", timed) == seconds and len(calls) == 3
    monkeypatch.setattr(compute, "_rates_path", lambda: tmp_path / "nowhere" / "rates.json")
    assert compute._Rates()("one machine", "a product", timed) == seconds and len(calls) == 4, "what cannot be kept"


def test_what_is_measured_is_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(compute, "_measured", compute._Rates())
    monkeypatch.setattr(compute, "_rates_path", lambda: tmp_path / "rates.json")
    found = [layer_seconds("cpu", (dtype, "float32"), SHAPE) for dtype in ("bfloat16", "float16")]
    odd = dataclasses.replace(SHAPE, tokens=2, context=1, heads=5)  # 32 is no multiple of 5
    found += [layer_seconds("cpu", ("bfloat16", "float32"), odd), product_seconds("cpu", ("float32", "bfloat16"), 64, 32, 128)]
    assert all(len(rates) == 2 and all(0 < seconds < 1 for seconds in rates.values()) for rates in found)
    assert list(json.loads((tmp_path / "rates.json").read_text()).popitem()[1].values()) == found


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_weights_come_back_as_they_were_stored(stored):
    model = open_model("demo-glu").load(dtype=stored)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers = {name: tensor.dtype for name, tensor in model.named_buffers()}
    compute_in(model, torch.float32)
    assert computed_in(model) == model.dtype == torch.float32
    compute_in(model, torch.float32)
    as_stored(model)
    after = model.state_dict()
    assert all(after[name].dtype == tensor.dtype and torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name: tensor.dtype for name, tensor in model.named_buffers()} == buffers


def test_what_is_computed_in_can_change_again():
    model = open_model("demo-glu").load(dtype="float16")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.float16):
        compute_in(model, dtype)
        assert computed_in(model) == dtype and stored_in(model) == torch.float16
    after = model.state_dict()
    assert all(after[name].dtype == tensor.dtype and torch.equal(after[name], tensor) for name, tensor in before.items())


def test_weights_that_a_dtype_does_not_hold_stay_and_the_model_runs_under_autocast():
    model, ids = open_model("demo-glu").load(dtype="float32"), torch.arange(16)[None]
    before = model(input_ids=ids).logits
    compute_in(model, torch.bfloat16)
    assert computed_in(model) == torch.bfloat16 and model.dtype == torch.float32
    with Products() as products:
        logits = model(input_ids=ids).logits
    assert logits.dtype == torch.bfloat16 and products.share(torch.bfloat16) == 1.0
    as_stored(model)
    assert computed_in(model) == torch.float32 and torch.equal(model(input_ids=ids).logits, before)


class Phases(Reporter):
    """Counts products apart for each phase of a command, by what it shows the progress of."""

    def __init__(self, products):
        self.products, self.work = products, {}

    def progress(self, name, unit, *more):
        self.products.work = self.work.setdefault(name, Counter())
        return super().progress(name, unit, *more)


OPTIONS = {
    "layers": "1-2",
    "tokens": 8_000,
    "eval_tokens": 2_000,
    "n_experts": 64,
    "k": 4,
    "shuffle": 100_000,
    "device": "cpu",
}


def test_a_conversion_computes_in_what_is_fast_and_stores_what_was_stored(kind, tmp_path):
    with Products() as products:
        phases = Phases(products)
        made = mxdsurgery.convert("demo-glu", out=str(tmp_path / "out"), reporter=phases, **OPTIONS)
    assert phases.work.keys() == {"distil", "evaluate"}
    for name, work in phases.work.items():
        # In bf16, the best experts are ranked again exactly, and what a few experts could do is solved for in fp32; sums over
        # tokens, and where a layer starts, are in float64.
        assert work[kind] > 0.9 * (work.total() - work[torch.float64]), f"{name}: {work}"
    assert made.evaluation["compute"] == made.plan.machine.compute == str(kind).removeprefix("torch.")
    assert made.plan.machine.bf16 == made.plan.machine.selection == (kind == torch.bfloat16)
    assert made.recipe.compute == made.recipe.precision == "auto", "another machine chooses for itself"
    assert made.plan.dtype == "bfloat16"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    base = open_model("demo-glu").load().state_dict()
    same = [name for name in tensors if name in base]
    assert len(same) > 20 and all(torch.equal(tensors[name], base[name]) for name in same)


@pytest.fixture(scope="module")
def folder(converted, tmp_path_factory):
    """The converted demo model, to be changed, with a catalogue."""
    out = tmp_path_factory.mktemp("compute") / "demo"
    shutil.copytree(converted.out, out)
    mxdsurgery.experts(out, tokens=2_000)
    return out


def test_the_figures_say_what_they_were_computed_in(folder):
    assert mxdsurgery.evaluate(folder, tokens=1_000, compute="bfloat16")["compute"] == "bfloat16"
    assert "computed in bfloat16" in (folder / "README.md").read_text()


def test_a_narrower_dtype_that_was_asked_for_leaves_the_stored_weights(machine, tmp_path):
    machine(bfloat16=43.0)
    with Products() as products:
        phases = Phases(products)
        how = OPTIONS | {"dtype": "float32", "compute": "bfloat16"}
        made = mxdsurgery.convert("demo-glu", out=str(tmp_path / "out"), reporter=phases, **how)
    shares = {phase: work[torch.bfloat16] / work.total() for phase, work in phases.work.items()}
    assert min(shares.values()) > 0.85, shares  # Jacobians and sums that dense paths are fitted from are in float32
    assert made.evaluation["compute"] == "bfloat16" and made.plan.dtype == "float32"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    base = open_model("demo-glu").load(dtype="float32").state_dict()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(torch.equal(tensor, base[name]) for name, tensor in tensors.items() if name in base)
    experts = tensors["model.layers.1.mlp.experts.weight"]
    assert not torch.equal(experts, experts.bfloat16().float()), "new layers are not rounded to what was computed in"


LABELLED = [{"text": f"def f{n}(x):\n    return x + {n}\n", "label": "a" if n % 2 else "b"} for n in range(40)]
COMMANDS = {
    "evaluate": lambda folder, place: mxdsurgery.evaluate(folder, tokens=1_000),
    "growth": lambda folder, place: mxdsurgery.growth(folder, tokens=1_000),
    "generate": lambda folder, place: mxdsurgery.generate(folder, prompt="import", max_new_tokens=4),
    "experts": lambda folder, place: mxdsurgery.experts(folder, tokens=1_000, out=place / "catalogue"),
    "search": lambda folder, place: mxdsurgery.search(folder, "raise ValueError(", by="text"),
    "coefficients": lambda folder, place: mxdsurgery.coefficients(folder, out=place / "c", tokens=1_000),
    "effect": lambda folder, place: mxdsurgery.effect(
        folder, edits=edits_from_flags(ablate="1:3"), tokens=1_000, controls=1, compute="auto"
    ),
    "sweep": lambda folder, place: mxdsurgery.sweep(folder, layer=1, tokens=1_000, compute="auto"),
    "steering": lambda folder, place: mxdsurgery.steering(
        folder, edits=edits_from_flags(steer="1:3=1"), prompt="import", samples=2, max_new_tokens=4, factors=(1,), controls=1
    ),
    "edit": lambda folder, place: mxdsurgery.edit(
        folder, edits=edits_from_flags(ablate="1:3"), out=place / "edited", tokens=1_000
    ),
    "heal": lambda folder, place: mxdsurgery.heal(folder, out=place / "healed", tokens=2_048, batch=1_024),
    "probe": lambda folder, place: mxdsurgery.probe(folder, data=str(place / "labelled.jsonl")),
    "frontier": lambda folder, place: mxdsurgery.frontier(
        "demo-glu", layer=1, k=(4,), kinds=("mxd",), out=str(place / "f"), **{
            name: value for name, value in OPTIONS.items() if name not in ("layers", "k")}
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_computes_in_what_is_fast_and_leaves_random_numbers_alone(command, kind, folder, tmp_path):
    (tmp_path / "labelled.jsonl").write_text("\n".join(json.dumps(row) for row in LABELLED))
    before = random_states()
    with Products() as products:
        COMMANDS[command](folder, tmp_path)
    assert random_states() == before
    if kind == torch.float32:
        assert products.work[torch.bfloat16] == 0, products.work
    else:  # some things are exact on purpose: the ranking of the best experts, what vectors say of the next token
        assert products.share(kind) > 0.5, products.work


def test_an_edit_changes_the_same_stored_bits_whatever_is_computed_in(converted, machine, tmp_path):
    edits, made = edits_from_flags(scale="1:3=0.7", steer="2:5=0.3"), {}
    for name, rates in {"avx2": 43.0, "bf16": 0.3}.items():
        machine(bfloat16=rates)
        mxdsurgery.edit(converted.out, edits=edits, out=tmp_path / name, tokens=1_000)
        made[name] = load_file(tmp_path / name / "model.safetensors")
        with safe_open(tmp_path / name / "edits" / "1" / "before.safetensors", "pt") as rows:
            assert {rows.get_tensor(key).dtype for key in rows.keys() if key.endswith(":values")} == {torch.bfloat16}
        mxdsurgery.edit(tmp_path / name, undo=True, out=tmp_path / f"{name}-undone")
        undone = load_file(tmp_path / f"{name}-undone" / "model.safetensors")
        before = load_file(converted.out / "model.safetensors")
        assert undone.keys() == before.keys() and all(torch.equal(undone[key], before[key]) for key in before)
    assert made["avx2"].keys() == made["bf16"].keys()
    assert all(torch.equal(made["avx2"][key], made["bf16"][key]) for key in made["avx2"])


def test_weights_on_disk_are_cast_as_they_are_read(machine, tmp_path):
    machine(bfloat16=43.0)
    how = OPTIONS | {"inputs": "converted", "tokens": 4_000}
    for offload in ("disk", "none"):
        mxdsurgery.convert("demo-glu", out=str(tmp_path / offload), offload=offload, **how)
    disk, memory = (load_file(tmp_path / offload / "model.safetensors") for offload in ("disk", "none"))
    assert {tensor.dtype for tensor in disk.values()} == {torch.bfloat16}
    assert disk.keys() == memory.keys() and all(torch.equal(disk[name], memory[name]) for name in disk)


def test_the_plan_counts_what_wider_weights_take(machine):
    weights = {}
    for name, rates in {"avx2": 43.0, "bf16": 0.3}.items():
        machine(bfloat16=rates)
        made, recipe = mxdsurgery.plan("demo-glu", device="cpu")
        weights[name] = made.groups[0].base_bytes
        line = next(line for line in summary(made, recipe) if line.startswith("compute"))
        assert made.checkpoint_bytes == 2 * made.parameters
        chosen = "float32: bfloat16 takes 43 times as long" if name == "avx2" else "bfloat16: float32 takes 3.3 times as long"
        assert chosen in line and line.endswith("new layers train in " + ("fp32" if name == "avx2" else "bf16"))
    assert weights["avx2"] == 2 * weights["bf16"]


def test_a_run_goes_on_in_what_it_began_with(machine, tmp_path, monkeypatch):
    machine(bfloat16=43.0)
    how = OPTIONS | {"inputs": "converted", "tokens": 4_000}
    whole = mxdsurgery.convert("demo-glu", out=str(tmp_path / "whole"), **how)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_layer_2(patch)
        mxdsurgery.convert("demo-glu", out=str(tmp_path / "out"), **how)
    machine(bfloat16=0.3)
    said = Said()
    made = mxdsurgery.convert("demo-glu", out=str(tmp_path / "out"), resume=True, reporter=said, **how)
    assert "compute    float32, as the run began; here it would have been bfloat16" in said.lines
    assert made.plan.machine.compute == "float32" and not made.plan.machine.bf16
    first, second = (load_file(folder / "model.safetensors") for folder in (whole.out, made.out))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_catalogue_goes_on_in_what_it_began_with(folder, machine, tmp_path, monkeypatch):
    how = {"tokens": 2_000, "checkpoint_every": 1}
    machine(bfloat16=43.0)
    monkeypatch.setattr("mxdsurgery.catalogue.experts._BATCH", 512)
    mxdsurgery.experts(folder, out=tmp_path / "whole", **how)
    add, calls = Tally.add, []

    def interrupted(self, *args):
        calls.append(None)
        if len(calls) == 5:
            raise KeyboardInterrupt
        add(self, *args)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Tally, "add", interrupted)
        mxdsurgery.experts(folder, out=tmp_path / "parts", **how)
    machine(bfloat16=0.3)
    said = Said()
    mxdsurgery.experts(folder, out=tmp_path / "parts", resume=True, reporter=said, **how)
    assert "compute    float32, as the run began; here it would have been bfloat16" in said.lines
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes(), path.name
