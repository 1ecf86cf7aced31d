"""``plan --gpu``: predicted times against arithmetic by hand, and more GPUs that are never planned slower."""

import dataclasses
import json

import pytest
from click.testing import CliRunner
from real_configs import REAL_CONFIGS

import mxdsurgery
from mxdsurgery.cli import main
from mxdsurgery.errors import RecipeError
from mxdsurgery.hardware.gpus import GIB, GPUS
from mxdsurgery.planning import gpus
from mxdsurgery.planning.plan import Plan

LLAMA = "meta-llama/Llama-3.2-3B"
OPTIONS = {"layers": "all", "data": "stdlib", "inputs": "original", "compute": "bfloat16", "dtype": "bfloat16"}
OPTIONS |= {"batch": 4096, "context": 128, "tokens": "20M", "n_experts": 8192}


@pytest.fixture
def llama(tmp_path):
    REAL_CONFIGS[LLAMA].save_pretrained(tmp_path)
    return str(tmp_path)


def rented(model, gpu="h100", **options):
    return mxdsurgery.gpu_hours(model, gpu=gpu, **OPTIONS | options)


def test_a_step_of_llama_3b_by_hand(llama):
    found = rented(llama, gpu="a100-80", efficiency=0.5, k=32, k_start=32)
    b, d, h, n, k = 4096, 3072, 8192, 8192, 32
    flops, bandwidth = 0.5 * 312e12, 0.5 * 2039e9
    parameters = 3 * h * d + d + n * (2 * d + 1) + d  # E, E_up, D and a bias; G, b_g and C; what the experts are added to
    gate = 2 * n * d * b / flops  # more than to move G once in fp32 and twice in bf16, and bf16 pre-activations there and back
    assert gate > (8 * n * d + 4 * b * n) / bandwidth
    dense = 14 * d * h * b / flops
    assert dense > (3 * 8 * d * h + 16 * b * h * 2) / bandwidth
    experts = 28 * k * d * b / bandwidth  # K rows of G and C in fp32: read thrice, their gradients read and written
    assert experts > 10 * k * d * b / (0.5 * 19.5e12)
    update = (20 + 28) * parameters / bandwidth  # a gradient's five, weight, gradient and moments read, all but one written
    assert found.plan.calibration.step_seconds == pytest.approx(gate + dense + experts + update, rel=1e-3)
    decoder_layer = 2 * 3072 * 3072 + 2 * 3072 * 1024 + 3 * 3072 * 8192 + 2 * 3072
    base = 28 * (2 * decoder_layer + 4 * 128 * d) * b / flops
    assert found.plan.calibration.base_seconds == pytest.approx(base)
    (group,) = found.plan.groups
    assert group.seconds == pytest.approx(20_000_000 // b * (28 * (gate + dense + experts + update) + base), rel=0.2)
    assert group.seconds > 20_000_000 // b * (28 * (gate + dense + experts + update) + base)  # experts are looked at, too
    assert found.rows[0].seconds == found.plan.seconds and found.rows[0].gpu_hours == found.plan.total_seconds / 3600


def test_moments_in_bfloat16_move_more_bytes_take_less_memory_and_fewer_passes(llama):
    usual, rounded = (rented(llama, n_experts=86_016, moments=moments) for moments in ("float32", "bfloat16"))
    parameters = usual.plan.layers[0].parameters
    assert sum(group.adam_bytes for group in usual.plan.groups) == 8 * 28 * parameters
    assert sum(group.adam_bytes for group in rounded.plan.groups) == 4 * 28 * parameters
    assert len(rounded.plan.groups) < len(usual.plan.groups)
    assert rounded.rows[0].layers_at_once > usual.rows[0].layers_at_once
    more = (92 - 28) * parameters / (0.4 * GPUS["h100"].bandwidth)
    taken = rounded.plan.calibration.step_seconds - usual.plan.calibration.step_seconds
    assert taken == pytest.approx(more, rel=1e-3)


def test_a_checkpoint_to_resume_from_has_the_layers_in_training_and_those_before(llama):
    found = rented(llama, n_experts=86_016)
    layer, groups = found.plan.layers[0].parameters, [len(group.layers) for group in found.plan.groups]
    before = [sum(groups[:number]) for number in range(len(groups))]
    assert found.plan.resume_bytes(found.recipe) == max(
        12 * layer * count + 2 * layer * finished for count, finished in zip(groups, before, strict=True)
    )


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(
    "options",
    [{}, {"n_experts": 40_000}, {"inputs": "converted"}, {"batch": 256, "layers": "0-2"}, {"parallel": "data", "batch": 1024}],
    ids=str,
)
def test_more_gpus_are_never_planned_slower_and_each_is_within_its_memory(llama, gpu, options):
    found = rented(llama, gpu=gpu, price=2.0, **options)
    if not found.rows:
        assert found.plan.refusal is not None
        return
    assert [row.gpus for row in found.rows][0] == 1
    times = [row.total_seconds for row in found.rows]
    assert times == sorted(times, reverse=True) and len(set(times)) == len(times)
    assert all(row.peak_bytes <= 0.9 * GPUS[gpu].memory for row in found.rows)
    assert all(row.cost == pytest.approx(2 * row.gpus * row.total_seconds / 3600) for row in found.rows)
    assert sorted([row.gpus for row in found.rows] + found.left_out) == list(gpus.COUNTS)
    ways = {row.parallel for row in found.rows[1:]}
    assert ways <= ({"data"} if options.keys() & {"inputs", "parallel"} else {"data", "layers"})


def test_layers_are_shared_as_they_are_trained(llama):
    found = rented(llama, parallel="layers")
    assert [row.layers_at_once for row in found.rows] == [28, 14, 7, 4]
    step, base = found.plan.calibration.step_seconds, found.plan.calibration.base_seconds
    steps = 20_000_000 // 4096
    # The last process runs the whole base model for its layers; experts are looked at beside that.
    for row, layers in zip(found.rows, (28, 14, 7, 4), strict=True):
        assert row.seconds == pytest.approx(steps * (layers * step + base), rel=0.2)
        assert row.seconds > steps * (layers * step + base)
    few = rented(llama, layers="0-1", parallel="layers")
    assert [row.gpus for row in few.rows] == [1, 2] and few.left_out == [4, 8]


def test_shared_text_pays_for_gradients_that_travel(llama):
    found = rented(llama, parallel="data", gpu="l40s", layers="27")
    two = next(row for row in found.rows if row.gpus == 2)
    layer, steps = found.plan.layers[0].parameters, 20_000_000 // 4096
    assert two.seconds > found.rows[0].seconds / 2 + steps * 4 * layer / (0.4 * 32e9) * 0.99


def test_twice_the_efficiency_takes_half_of_the_time_to_train(llama):
    slow, fast = (rented(llama, efficiency=efficiency).rows[0].seconds for efficiency in (0.3, 0.6))
    assert slow == pytest.approx(2 * fast, rel=1e-6)


def test_every_line_of_time_says_that_it_is_predicted_and_json_says_the_same(llama):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    command = ["plan", llama, "--gpu", "h100", "--price", "2.5", *flags]
    said = CliRunner().invoke(main, command)
    assert said.exit_code == 0, said.output
    table = said.output.partition("Predicted by arithmetic, not measured: on H100 80 GB, at 40%")[2]
    rows = [line for line in table.splitlines() if line.startswith("│")]
    assert len(rows) == 4 and all("predicted" in row for row in rows)
    assert "time       predicted, not measured: about" in said.output and "time, predicted" in said.output
    plain = json.loads(CliRunner().invoke(main, [*command, "--json"]).output)
    found = plain["gpus"]
    assert found["predicted"] and not found["measured"] and found["price"] == 2.5 and found["efficiency"] == 0.4
    assert [row["gpus"] for row in found["rows"]] == [1, 2, 4, 8]
    assert found["rows"][0]["seconds"] == plain["totals"]["seconds"]
    assert found["rows"] == rented(llama, price=2.5).to_dict()["rows"]
    assert found["gpu"]["memory"] == 79 * GIB
    kept = Plan.from_dict({name: value for name, value in plain.items() if name not in ("gpus", "recipe")})
    assert kept.calibration.predicted and kept.seconds == plain["totals"]["seconds"]


def test_without_a_price_there_is_no_cost(llama):
    found = rented(llama)
    assert found.price is None and all(row.cost is None for row in found.rows)


def test_what_does_not_fit_one_is_refused_for_all(llama):
    found = rented(llama, gpu="rtx-4090", n_experts=400_000)
    assert found.rows == [] and "memory of the RTX 4090" in found.plan.refusal["found"]
    given = rented(llama, gpu="rtx-4090", n_experts=86_016, layers="3", memory=80)
    assert given.plan.refusal is None and given.plan.machine.memory == 80 * GIB


@pytest.mark.parametrize(
    ("options", "words"),
    [({"gpu": "gpu9"}, "gpu is 'gpu9'(.|\n)*a100-40"), ({"device": "cpu"}, "device is 'cpu'"), ({"price": -1}, "price is -1")],
)
def test_a_mistake_is_named(llama, options, words):
    with pytest.raises(RecipeError, match=words):
        rented(llama, **options)


@pytest.mark.parametrize("flags", [["--price", "2"], ["--efficiency", ".5"], ["--gpu", "h100", "--hours", "3"]])
def test_flags_that_need_each_other_or_not_say_so(flags):
    said = CliRunner().invoke(main, ["plan", "demo-glu", *flags])
    assert said.exit_code == 2 and "--gpu" in said.output


def test_a_launch_is_the_least_that_a_step_takes(llama):
    found = rented(llama, n_experts=64, k=4, layers="0", batch=128)
    tiny = dataclasses.replace(found.plan.layers[0], n_experts=8, parameters=8)
    roof = gpus._Roof(GPUS["b200"], 1.0)
    small = dataclasses.replace(tiny, block=dataclasses.replace(tiny.block, d_model=4, d_hidden=4))
    assert gpus.step_seconds(small, 4, 8, found.recipe, found.plan.machine, roof) == pytest.approx(226 * 5e-6)
