"""``plan``: groups, bytes and FLOPs of real models against numbers computed by hand, refusals that help, measured times."""

import json
import re

import pytest
from click.testing import CliRunner
from real_configs import REAL_CONFIGS
from tiny import tiny_config

import mxdsurgery
from mxdsurgery.cli import main
from mxdsurgery.errors import MemoryBudgetError, RecipeError
from mxdsurgery.planning import calibrate
from mxdsurgery.planning.plan import Plan, open_and_plan, with_time
from mxdsurgery.planning.resolve import base_shape, open_base
from mxdsurgery.planning.summary import summary
from mxdsurgery.terminal.console import size

LLAMA = "meta-llama/Llama-3.2-3B"


def plan_real(tmp_path, model, **overrides):
    REAL_CONFIGS[model].save_pretrained(tmp_path)
    options = {"device": "cpu", "precision": "fp32", "selection": "fp32", "data": "stdlib", "inputs": "original"}
    return mxdsurgery.plan(str(tmp_path), **options | overrides)[0]


def test_gpt2_by_hand(tmp_path):
    plan = plan_real(
        tmp_path,
        "openai-community/gpt2",
        layers="8",
        n_experts=1000,
        k=32,
        dtype="float32",
        context=128,
        shuffle=0,
        memory=100,
    )
    (group,) = plan.groups
    parameters = 3072 * 769 + 3072 * 768 + 768 + 1000 * (2 * 768 + 1) + 768  # E and b_e, D, b, then G, b_g, C and c_0
    assert plan.trained_parameters == group.parameters == parameters == 6_260_200
    assert group.base_bytes == 4 * 124_439_808
    assert (group.new_bytes, group.gradient_bytes, group.adam_bytes) == (4 * parameters, 4 * parameters, 8 * parameters)
    # Nine decoder layers of 7,087,872 parameters, attention over 128 tokens.
    assert group.flops["base_forward"] == 9 * (2 * 7_087_872 + 4 * 128 * 768)
    assert group.flops["gate"] == 2 * 1000 * 768
    assert group.flops["encoder_decoder"] == 10 * 768 * 3072
    assert group.flops["experts"] == 10 * 32 * 768
    assert plan.checkpoint_bytes == plan.disk_bytes == 4 * (124_439_808 + parameters - (2 * 768 * 3072 + 768 + 3072))


def test_llama_3b_by_hand_and_in_groups(tmp_path):
    options = {"layers": "all", "n_experts": 8192, "dtype": "bfloat16", "batch": 4096, "context": 128, "shuffle": 0}
    options["compute"] = "bfloat16"  # also where this machine is slow at it
    whole = plan_real(tmp_path, LLAMA, memory=1000, **options)
    (group,) = whole.groups
    layer = 3 * 8192 * 3072 + 3072 + 8192 * (2 * 3072 + 1) + 3072
    assert (group.layers, group.parameters) == (list(range(28)), 28 * layer)
    assert group.base_bytes == 2 * 3_212_749_824
    assert (group.gradient_bytes, group.adam_bytes) == (4 * layer, 8 * 28 * layer)
    decoder_layer = 2 * 3072 * 3072 + 2 * 3072 * 1024 + 3 * 3072 * 8192 + 2 * 3072
    assert group.flops["base_forward"] == 28 * (2 * decoder_layer + 4 * 128 * 3072)
    assert group.flops["encoder_decoder"] == 28 * 14 * 3072 * 8192
    parted = plan_real(tmp_path, LLAMA, memory=32, **options)
    assert parted.refusal is None and len(parted.groups) > 1
    assert [index for group in parted.groups for index in group.layers] == list(range(28))
    assert all(group.peak_bytes <= 32 * 2**30 for group in parted.groups)
    assert parted.flops["gate"] == whole.flops["gate"] and parted.flops["base_forward"] > whole.flops["base_forward"]


@pytest.mark.parametrize("overrides", [{"memory": 32, "n_experts": 8192}, {"memory": 8}, {}])
def test_a_plan_goes_through_json(tmp_path, overrides):
    plan = plan_real(tmp_path, LLAMA, **overrides)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_a_plan_of_an_older_version_is_read_and_has_no_groups(tmp_path):
    plan = plan_real(tmp_path, LLAMA)
    new = {"machine", "groups", "evaluation_bytes", "disk_bytes", "calibration", "unmeasured", "refusal"}
    old = Plan.from_dict({name: value for name, value in plan.to_dict().items() if name not in new})
    assert old.layers == plan.layers and old.groups == [] and old.seconds is None
    assert old.checkpoint_bytes == plan.checkpoint_bytes
    assert Plan.from_dict(json.loads(json.dumps(old.to_dict()))) == old


@pytest.mark.parametrize(("memory", "batch", "named"), [(3, 1024, {"n-experts", "memory"}), (4, 4096, {"layers", "dtype"})])
def test_a_refusal_says_by_how_much_and_each_change_it_names_does(tmp_path, memory, batch, named):
    options = {"layers": "4-6", "n_experts": 100_000, "dtype": "float32", "shuffle": 0, "batch": batch, "memory": memory}
    plan = plan_real(tmp_path, "openai-community/gpt2", **options)
    assert [group.layers for group in plan.groups] == [[4], [5], [6]]
    over = max(group.peak_bytes for group in plan.groups) - memory * 2**30
    with pytest.raises(
        MemoryBudgetError, match=rf"more than the memory budget of {memory} GiB \(recipe key 'memory'\)"
    ) as caught:
        plan.check_budget()
    assert f"{size(over)} more" in str(caught.value)
    remedies = [dict(re.findall(r"--(\S+) (\S+)", remedy)) for remedy in caught.value.fix.split(", or ")]
    assert named <= {name for flags in remedies for name in flags}
    for flags in remedies:
        changed = options | {name.replace("-", "_"): value for name, value in flags.items()}
        assert plan_real(tmp_path, "openai-community/gpt2", **changed).refusal is None, f"{flags} does not do"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch": 64}, "(context 128: the default)"),
        ({"n_experts": 8}, "(k 32: the default)"),
        ({"expansion": 0.02}, "(k 32: the default)"),
        ({"k": 50_000}, "(expansion 16.0: from the recipe demo.yaml)"),
        ({"warmup": 0.9}, "(decay 0.3: the default)"),
    ],
)
def test_a_value_that_nobody_gave_is_not_blamed_on_the_user(options, said):
    with pytest.raises(RecipeError) as caught:
        mxdsurgery.plan("demo-glu", **options)
    assert said in caught.value.found
    (name, value), *_ = options.items()
    assert f"({name} " not in caught.value.found and f", {name} {value}:" not in caught.value.found


def test_a_size_that_is_asked_for_counts_more_than_a_recipe_s_number_of_experts(tmp_path):
    recipe = tmp_path / "counted.yaml"
    recipe.write_text("n_experts: 500\nexpansion: 4\n", encoding="utf-8")
    counts = [
        mxdsurgery.plan("demo-glu", recipe=recipe, data="stdlib", **options)[0].layers[0].n_experts
        for options in ({}, {"expansion": 16}, {"expansion": 8})
    ]
    assert counts[0] == 500 and counts[1] == mxdsurgery.plan("demo-glu", expansion=16)[0].layers[0].n_experts
    assert counts[2] < counts[1]
    with pytest.raises(RecipeError, match="'n_experts' and 'expansion' are 64 and 8"):
        mxdsurgery.plan("demo-glu", n_experts=64, expansion=8)


def test_where_evaluation_does_not_fit_that_is_said(tmp_path):
    tiny_config("llama", vocab_size=50_000).save_pretrained(tmp_path)
    options = {"n_experts": 64, "k": 4, "data": "stdlib", "device": "cpu", "shuffle": 0, "batch": 4096, "context": 64}
    roomy, _ = mxdsurgery.plan(str(tmp_path), **options)
    assert roomy.peak_bytes < roomy.evaluation_bytes
    tight, _ = mxdsurgery.plan(str(tmp_path), **options, memory=(roomy.evaluation_bytes - 2**20) / 2**30)
    assert tight.refusal["found"].startswith("evaluating and exporting the converted model takes")
    assert "1 MiB more than" in tight.refusal["found"]


def test_a_plan_that_cannot_be_carried_out_is_printed_with_the_refusal(tmp_path):
    REAL_CONFIGS[LLAMA].save_pretrained(tmp_path)
    done = CliRunner().invoke(main, ["plan", str(tmp_path), "--memory", "4", "--data", "stdlib", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "layers.27.mlp" in done.output and "convert would refuse: " in done.output and "--memory" in done.output
    assert "not predicted: it does not fit the memory budget" in done.output


def test_a_micro_step_and_a_pass_give_the_time():
    plan, recipe = mxdsurgery.plan("demo-mlp", layers="1-2", n_experts=256, measure=True, device="cpu", tokens=1_000_000)
    measured = plan.calibration
    assert measured.step_seconds > 0 and measured.base_seconds > 0
    assert measured.base_from == "forward pass"
    assert 256 <= measured.step_tokens <= 2048  # as many as this machine makes in time
    # Two layers like the measured one, the pass up to the last of them, and looks at what the experts carry.
    each = 2 * measured.step_seconds + measured.base_seconds
    base = base_shape(open_base("demo-mlp", None, {}), plan.dtype, plan.machine.compute)
    looking = measured.looking_seconds(plan.layers, base, recipe, plan.look_tokens)
    assert plan.seconds == pytest.approx(plan.steps * each + looking) and plan.steps == 1_000_000 // 256 and looking > 0
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert "from one layer's step on 256 tokens and a forward pass" in "\n".join(summary(plan, recipe))


def test_what_is_too_large_to_measure_is_extrapolated_and_says_so(monkeypatch):
    monkeypatch.setattr(calibrate, "_LONGEST", 0.0)
    monkeypatch.setattr(calibrate, "_LARGEST_BUILT", 0)
    plan, recipe = mxdsurgery.plan("demo-glu", layers="0", n_experts=256, measure=True, device="cpu")
    assert plan.calibration.step_tokens == 256 and plan.calibration.base_from == "matrix product"
    assert plan.seconds > 0
    assert "one layer's step on 256 tokens and a matrix product" in "\n".join(summary(plan, recipe))


def test_without_measuring_there_is_no_time():
    done = CliRunner().invoke(main, ["plan", "demo-glu", "--no-measure", "--json"])
    values = json.loads(done.stdout)
    assert values["totals"]["seconds"] is None and values["calibration"] is None
    assert values["groups"][0]["peak_bytes"] == values["totals"]["peak_bytes"] > 0
    assert values["recipe"]["k"] == 32


def test_planning_for_a_gpu_that_is_not_here(monkeypatch):
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available=False: None)
    plan, _ = mxdsurgery.plan("demo-glu", device="cuda", measure=True)
    assert plan.machine.memory is None and plan.unmeasured == "there is no cuda here" and plan.refusal is None
    limited, _ = mxdsurgery.plan("demo-glu", device="cuda", memory=0.06)
    assert limited.machine.memory == int(0.06 * 2**30) and limited.groups[0].text_bytes == 0


def test_convert_predicts_only_what_is_worth_it():
    plan, recipe, base = open_and_plan("demo-glu", None, {"tokens": 5_000, "device": "cpu"})
    assert with_time(plan, recipe, base, worth_it=60.0).unmeasured.startswith("too short a run to measure first, at least ")


def sequential(tmp_path, **overrides):
    options = {"layers": "all", "inputs": "converted", "n_experts": 256, "tokens": 4096 * 100, "shuffle": 0}
    options |= {"dtype": "float32"}
    return plan_real(tmp_path, "openai-community/gpt2", **options | overrides)


def test_layers_that_learn_on_converted_inputs_stand_alone_and_their_states_are_counted(tmp_path):
    plan = sequential(tmp_path, memory=100)
    assert [group.layers for group in plan.groups] == [[layer] for layer in range(12)]
    assert plan.states_bytes == 2 * 4096 * 100 * 768 * 4 and not plan.states_on_disk and not plan.offloaded
    assert all(group.state_bytes == plan.states_bytes for group in plan.groups)
    one_model = sequential(tmp_path, memory=100, target="own", kept_tokens=4096 * 10)
    assert one_model.states_bytes == 4096 * 10 * 768 * 4


def test_what_does_not_fit_goes_to_disk_before_it_is_refused(tmp_path):
    roomy = sequential(tmp_path, memory=100)
    states = sequential(tmp_path, memory=(roomy.peak_bytes - 2**20) / 2**30)
    assert states.states_on_disk and not states.offloaded and states.refusal is None
    assert states.peak_bytes == roomy.peak_bytes - roomy.states_bytes
    assert states.disk_bytes == roomy.disk_bytes + roomy.states_bytes
    least = sequential(tmp_path, memory=100, offload="disk")
    assert least.offloaded and least.peak_bytes < roomy.peak_bytes
    assert {group.finished_bytes for group in least.groups} == {0}
    refused = sequential(tmp_path, memory=0.1)
    assert refused.offloaded and refused.states_on_disk and refused.refusal is not None


def test_looks_at_what_experts_carry_rest_on_as_many_tokens_as_the_training_affords(tmp_path):
    def look_tokens(**options):
        return plan_real(tmp_path, LLAMA, n_experts=8192, memory=1000, **options).look_tokens

    few, some, many = (look_tokens(layers="all", tokens=tokens) for tokens in (16_384, 2_000_000, 6_000_000))
    assert few == 16_384 // 32 and 1024 < some < many == pytest.approx(3 * some, abs=3)
    assert some < look_tokens(layers="12", tokens=2_000_000) < 8192  # each layer is measured alone
    assert [look_tokens(**none) for none in ({"specialise": 0.01}, {"expert_share": 0}, {"kind": "transcoder"})] == [0] * 3


def test_layers_that_learn_jointly_are_one_group_or_are_refused(tmp_path):
    plan = sequential(tmp_path, inputs="joint", batch=2048, memory=100)
    (group,) = plan.groups
    assert group.gradient_bytes == 4 * group.parameters == 4 * plan.trained_parameters
    refused = sequential(tmp_path, inputs="joint", batch=2048, memory=plan.peak_bytes / 2 / 2**30)
    assert "training layers 0-11 jointly" in refused.refusal["found"]
    assert "--inputs converted" in refused.refusal["fix"]


def test_the_host_s_memory_by_hand(tmp_path):
    options = {"layers": "all", "n_experts": 8192, "dtype": "bfloat16", "batch": 4096, "context": 128, "memory": 1000}
    options |= {"compute": "bfloat16", "device": "cuda", "shuffle": 10**9}
    layer, base = 3 * 8192 * 3072 + 3072 + 8192 * (2 * 3072 + 1) + 3072, 2 * 3_212_749_824
    plan = plan_real(tmp_path, LLAMA, **options)
    assert plan.host_bytes == 13 * 10**9 + 2 * 28 * layer + 12 * layer  # the text, all finished layers, one with Adam's state
    assert plan_real(tmp_path, LLAMA, **options | {"shuffle": 0, "layers": "0"}).host_bytes == base  # while it is loaded
    assert plan_real(tmp_path, LLAMA, **options | {"device": "cpu", "shuffle": 0}).host_bytes == 0
    buffer = plan_real(tmp_path, LLAMA, **options | {"activation_buffer": 2**20}).host_bytes
    assert buffer == 13 * 10**9 + 2 * 28 * layer + 2**20 * 3072 * 2  # more than one layer's state


def test_what_the_host_has_no_room_for_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mxdsurgery.planning.host.devices", lambda: ["cpu", "cuda"])
    monkeypatch.setattr("mxdsurgery.planning.host.free_memory", lambda device: 100 * 2**20)
    made, recipe = mxdsurgery.plan("demo-glu", device="cuda", memory=4)
    assert made.host_bytes > 90 * 2**20 > made.host_bytes - 13 * recipe.shuffle
    with pytest.raises(MemoryBudgetError, match="of host memory are needed beside cuda's own") as refused:
        made.check_budget()
    smaller = int(re.search(r"--shuffle (\d+)", refused.value.fix)[1])
    assert mxdsurgery.plan("demo-glu", device="cuda", memory=4, shuffle=smaller)[0].refusal is None
    assert mxdsurgery.plan("demo-glu", device="cuda", memory=4, shuffle=smaller + 1000)[0].refusal is not None
    printed = CliRunner().invoke(main, ["plan", "demo-glu", "--device", "cuda", "--memory", "4"]).output
    assert f"host       {size(made.host_bytes)} of host memory" in printed
