"""Changes while a model runs: what they do to the layer's output, and that they leave no trace."""

import math
import shutil

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from running import without_reloads
from safetensors.torch import save_file
from tiny import IDS, export_tiny
from transformers import AutoModelForCausalLM

from mxdsurgery.layers.interventions import MAXIMUM_FILE

FAMILIES = ["llama", "gpt2", "opt", "gemma2"]
LAYER = 1


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "out"
    with pytest.MonkeyPatch.context() as patch:
        without_reloads(patch)
        export_tiny(request.param, out)
    return out


@pytest.fixture
def model(folder):
    """As anybody loads it: by plain transformers, with the code that travels."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval().requires_grad_(False)


class Run:
    """One layer's input, coefficients and output in a forward pass, position by position: (B T, ...)."""

    def __init__(self, model, ids=IDS, layer=LAYER):
        module = model.mxd.layers[layer]
        seen = {}
        hooks = [
            module.register_forward_hook(lambda _m, args, y: seen.update(x=args[0], y=y)),
            module.gate.register_forward_hook(lambda _m, _a, a: seen.update(a=a)),
        ]
        self.logits = model(ids).logits
        for hook in hooks:
            hook.remove()
        self.x, self.y = (seen[name].reshape(ids.numel(), -1) for name in "xy")
        self.a = seen["a"].dense(module.gate.n_experts).reshape(ids.numel(), -1)
        self.fires = self.a > 0


def by_formula(model, a, x, layer=LAYER):
    module = model.mxd.layers[layer]
    return (a @ module.experts.weight) * module.decoder(module.hidden(x)) + module.bias


def some_experts(run, count=3):
    """Experts that fire on some tokens and not on all."""
    fired = run.fires.sum(0)
    found = ((fired > 0) & (fired < len(run.fires))).nonzero()[:, 0].tolist()
    return found[:count]


def test_ablating_changes_the_layers_output_only_where_the_expert_fired(model):
    before = Run(model)
    (expert,) = some_experts(before, 1)
    with model.mxd.ablate({LAYER: [expert]}):
        after = Run(model)
    fired = before.fires[:, expert]
    assert torch.equal(after.y[~fired], before.y[~fired])
    assert (after.y[fired] != before.y[fired]).any(-1).all()
    assert torch.equal(after.x, before.x)
    torch.testing.assert_close(after.y, by_formula(model, before.a.index_fill(1, torch.tensor([expert]), 0), before.x))


def test_ablating_all_experts_of_a_token_leaves_the_bias(model):
    before = Run(model)
    token = 5
    experts = before.fires[token].nonzero()[:, 0].tolist()
    assert experts
    with model.mxd.ablate({LAYER: experts}):
        after = Run(model)
    assert torch.equal(after.y[token], model.mxd.layers[LAYER].bias)


def test_ablating_is_zeroing_the_row_of_c(model):
    before = Run(model)
    experts = some_experts(before)
    with model.mxd.ablate({LAYER: experts}):
        live = model(IDS).logits
    model.mxd.layers[LAYER].experts.weight[experts] = 0
    assert torch.equal(model(IDS).logits, live)


def test_where_an_expert_is_dropped_the_next_one_takes_its_place(model):
    before = Run(model)
    experts = some_experts(before)
    with model.mxd.drop({LAYER: experts[:1]}).drop({LAYER: experts[1:]}):
        after = Run(model)
    gate = model.mxd.layers[LAYER].gate
    pre = gate.pre_activations(before.x).relu().index_fill(1, torch.tensor(experts), 0)
    top = pre.topk(gate.k)
    torch.testing.assert_close(after.a, torch.zeros_like(pre).scatter(1, top.indices, top.values))
    assert not after.fires[:, experts].any()


def test_a_drop_at_some_positions_is_none_at_the_others(model):
    before = Run(model)
    experts = before.fires[3].nonzero()[:, 0].tolist()[:2]
    with model.mxd.drop({LAYER: experts}):
        everywhere = Run(model)
    with model.mxd.drop({LAYER: experts}, positions=[3, 7]):
        some = Run(model)
    at = torch.zeros(IDS.shape, dtype=torch.bool)
    at[:, [3, 7]] = True
    torch.testing.assert_close(some.a[at.flatten()], everywhere.a[at.flatten()])
    torch.testing.assert_close(some.a[~at.flatten()], before.a[~at.flatten()])


@pytest.mark.parametrize("when", ["always", "firing", "silent"])
def test_scaling_steering_and_clamping_do_what_they_say(model, when):
    before = Run(model)
    first, second, third = some_experts(before)
    changes = model.mxd.scale({LAYER: {first: -2.0}}).steer({LAYER: {second: 3.0}}, when=when)
    with changes.clamp({LAYER: {third: 0.5}}, when=when):
        after = Run(model)
    a = before.a.clone()
    a[:, first] *= -2.0
    told = {"always": before.fires | True, "firing": before.fires, "silent": ~before.fires}[when]
    a[:, second] += 3.0 * told[:, second]
    a[:, third] = torch.where(told[:, third], 0.5, a[:, third])
    torch.testing.assert_close(after.a, a)
    torch.testing.assert_close(after.y, by_formula(model, a, before.x), rtol=1e-4, atol=1e-5)


def test_copy_merge_and_replace_change_what_comes_of_a_firing(model):
    before = Run(model)
    first, second, third = some_experts(before)
    weight = model.mxd.layers[LAYER].experts.weight
    row = torch.linspace(-1, 1, weight.shape[1])
    for changes, expert, wanted in (
        (model.mxd.copy({LAYER: {first: second}}), first, weight[second]),
        (model.mxd.merge({LAYER: [[first, second]]}), first, (weight[first] + weight[second]) / 2),
        (model.mxd.replace({LAYER: {third: row.tolist()}}), third, row),
    ):
        kept = weight.clone()
        with changes:
            after = Run(model)
        assert torch.equal(weight, kept)
        changed = weight.clone()
        changed[expert] = wanted
        if expert == first and wanted is not weight[second]:
            changed[second] = wanted if not torch.equal(wanted, weight[second]) else changed[second]
        module = model.mxd.layers[LAYER]
        y = (before.a @ changed) * module.decoder(module.hidden(before.x)) + module.bias
        torch.testing.assert_close(after.y, y, rtol=1e-4, atol=1e-5)


def test_contexts_nest_and_leave_nothing_behind_even_after_an_exception(model):
    before = Run(model)
    first, second, _ = some_experts(before)
    gate = model.mxd.layers[LAYER].gate
    with pytest.raises(RuntimeError, match="inside"):
        with model.mxd.ablate({LAYER: [first]}, positions=[2]).replace({LAYER: {second: [0.0] * 32}}):
            with model.mxd.scale({LAYER: {second: 2.0}}):
                assert len(model.mxd.in_force(LAYER)) == 2
                raise RuntimeError("inside")
    assert gate.interventions is None and not model.base_model._forward_hooks and not model.base_model._forward_pre_hooks
    assert torch.equal(model(IDS).logits, before.logits)


def test_what_works_together_is_in_the_order_of_the_contexts(model):
    before = Run(model)
    (expert,) = some_experts(before, 1)
    with model.mxd.steer({LAYER: {expert: 1.0}}), model.mxd.scale({LAYER: {expert: 3.0}}):
        torch.testing.assert_close(Run(model).a[:, expert], 3 * (before.a[:, expert] + 1))
    with model.mxd.scale({LAYER: {expert: 3.0}}).steer({LAYER: {expert: 1.0}}):
        torch.testing.assert_close(Run(model).a[:, expert], 3 * before.a[:, expert] + 1)


def test_contexts_that_are_left_in_another_order_leave_the_right_ones(model):
    before = Run(model)
    first, second, _ = some_experts(before)
    outer, inner = model.mxd.ablate({LAYER: [first]}), model.mxd.ablate({LAYER: [second]})
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    after = Run(model)
    assert torch.equal(after.a[:, first], before.a[:, first]) and not after.a[:, second].any()
    inner.__exit__(None, None, None)
    assert torch.equal(model(IDS).logits, before.logits)


def test_rows_of_a_batch_do_not_disturb_each_other(model):
    before = Run(model)
    (expert,) = some_experts(before, 1)
    with model.mxd.steer({LAYER: {expert: 4.0}}, positions=slice(2, None, 3)):
        together = model(IDS).logits
        alone = torch.cat([model(row[None]).logits for row in IDS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", [None, [0, 9, 17, 18], slice(12, None)])
def test_generation_with_a_cache_is_that_without(model, positions):
    before = Run(model)
    first, second, _ = some_experts(before)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    options |= {"return_dict_in_generate": True, "attention_mask": torch.ones_like(IDS)}
    plain = model.generate(IDS, **options)
    with model.mxd.steer({LAYER: {first: 30.0}}, positions=positions).ablate({LAYER: [second]}, positions=positions):
        cached, bare = (model.generate(IDS, use_cache=use, **options) for use in (True, False))
    for mine, other in zip(cached.logits, bare.logits, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(cached.logits[3], plain.logits[3], atol=1e-3)


def test_a_mask_says_for_each_row_where(model):
    before = Run(model)
    mask = torch.zeros(IDS.shape, dtype=torch.bool)
    mask[0, 4] = mask[1, 9] = True
    (expert,) = some_experts(before, 1)
    with model.mxd.steer({LAYER: {expert: 2.0}}, positions=mask):
        after = Run(model)
        with pytest.raises(ValueError, match="a mask of 2 rows for a batch of 1"):
            model(IDS[:1])
    torch.testing.assert_close(after.a[:, expert] - before.a[:, expert], 2.0 * mask.flatten().float())


def test_a_mask_holds_for_every_beam_and_sequence_of_its_row(model):
    mask = torch.zeros(IDS.shape, dtype=torch.bool)
    mask[0, 4] = mask[1, 9] = True
    (expert,) = some_experts(Run(model), 1)
    options = {"max_new_tokens": 3, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}
    with model.mxd.steer({LAYER: {expert: 30.0}}, positions=mask):
        one, three = model(IDS).logits, model(IDS.repeat_interleave(3, 0)).logits
        torch.testing.assert_close(three, one.repeat_interleave(3, 0), rtol=1e-4, atol=1e-4)
        assert len(model.generate(IDS, num_beams=3, num_return_sequences=2, **options)) == 4
        assert len(model.generate(IDS, do_sample=True, num_return_sequences=3, **options)) == 6
        with pytest.raises(ValueError, match="a mask of 2 rows for a batch of 3"):
            model(IDS[[0, 1, 0]])
    assert not torch.allclose(model(IDS).logits, one, atol=1e-3)


def test_a_compiled_model_follows_the_changes(model):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    before = Run(model)
    (expert,) = some_experts(before, 1)
    torch.testing.assert_close(compiled(IDS).logits, before.logits)
    with model.mxd.steer({LAYER: {expert: 5.0}}):
        plain = model(IDS).logits
        torch.testing.assert_close(compiled(IDS).logits, plain)
    assert not torch.allclose(plain, before.logits, atol=1e-3)
    torch.testing.assert_close(compiled(IDS).logits, before.logits)


def test_amounts_can_be_in_units_of_the_experts_own_maximum(folder, tmp_path):
    copy = tmp_path / "with-maximum"
    shutil.copytree(folder, copy)
    model = AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True).eval()
    n_experts = model.mxd.layers[LAYER].gate.n_experts
    with pytest.raises(ValueError, match="run mxdsurgery experts"):
        model.mxd.steer({LAYER: {3: 0.5}}, unit="maximum")
    (copy / MAXIMUM_FILE).parent.mkdir()
    maximum = torch.arange(n_experts).float()
    save_file({f"layer{LAYER}": maximum}, copy / MAXIMUM_FILE)
    before = Run(model)
    with model.mxd.steer({LAYER: {3: 0.5}}, unit="maximum"):
        torch.testing.assert_close(Run(model).a[:, 3], before.a[:, 3] + 1.5)
    with pytest.raises(ValueError, match="never fired"):
        model.mxd.clamp({LAYER: {0: 1.0}}, unit="maximum")


def test_an_offloaded_model_is_changed_as_well(model):
    before = Run(model)
    first, second, _ = some_experts(before)

    def changes():
        changes = model.mxd.steer({LAYER: {first: 2.0}}).drop({LAYER: [second]}).ablate({0: [1]})
        return changes.replace({LAYER: {first: [0.5] * 32}})

    with changes():
        wanted = model(IDS).logits
    cpu_offload(model)
    with changes():
        assert torch.equal(model(IDS).logits, wanted)


@pytest.mark.parametrize("how", ["modules_to_save", "target_parameters"])
def test_gates_that_peft_has_wrapped_are_changed_as_well(model, how):
    every = {LAYER: range(model.mxd.layers[LAYER].gate.n_experts)}
    before = model(IDS).logits
    with model.mxd.ablate(every):
        wanted = model(IDS).logits
    path = model.config.mxd["layers"][LAYER]["path"]
    gate = {"modules_to_save": [f"{path}.gate"], "target_parameters": [f"{path}.gate.weight"]}[how]
    wrapped = get_peft_model(model, LoraConfig(target_modules=[f"{path}.encoder"], **{how: gate})).eval()
    assert type(model.mxd.layers[LAYER].gate).__module__.startswith("peft.")
    with wrapped.mxd.ablate(every):
        assert torch.equal(wrapped(IDS).logits, wanted)
    assert torch.equal(wrapped(IDS).logits, before) and not torch.equal(before, wanted)


def test_numbers_of_numpy_are_numbers_and_no_experts_are_no_change(model):
    before = Run(model)
    first, second, _ = some_experts(before)
    with model.mxd.ablate({LAYER: np.array([first])}).scale({LAYER: {np.int64(second): np.float32(2)}}).drop({LAYER: []}):
        after = Run(model)
    assert not after.a[:, first].any() and torch.equal(after.a[:, second], 2 * before.a[:, second])


def test_mistakes_are_named_and_change_nothing(model):
    n_experts = model.mxd.layers[LAYER].gate.n_experts
    for wrong, said in (
        (lambda m: m.ablate({7: [1]}), "layer 7 has no experts; layers that have: 0, 1"),
        (lambda m: m.ablate({LAYER: [n_experts]}), f"no expert {n_experts}; expected 0 to {n_experts - 1}"),
        (lambda m: m.ablate({LAYER: [-1]}), "no expert -1"),
        (lambda m: m.ablate({LAYER: [True]}), "no expert True"),
        (lambda m: m.ablate([3]), "expected a mapping by layer"),
        (lambda m: m.scale({LAYER: {1: math.nan}}), "nan is not a finite number"),
        (lambda m: m.steer({LAYER: {1: math.inf}}), "inf is not a finite number"),
        (lambda m: m.steer({LAYER: {1: 1.0}}, when="sometimes"), "always, firing, silent"),
        (lambda m: m.steer({LAYER: {1: 1.0}}, unit="volt"), "coefficient, maximum"),
        (lambda m: m.ablate({LAYER: [1]}, positions=[-1]), "count from the first token"),
        (lambda m: m.ablate({LAYER: [1]}, positions=slice(-3, None)), "count from the first token"),
        (lambda m: m.replace({LAYER: {1: [1.0]}}), "expected 32 finite ones"),
        (lambda m: m.merge({LAYER: [[1, 2], [2, 3]]}), "none of them in two groups"),
        (lambda m: m.copy({LAYER: {1: n_experts}}), f"no expert {n_experts}"),
    ):
        with pytest.raises(ValueError, match=said):
            wrong(model.mxd)
    assert model.mxd.layers[LAYER].gate.interventions is None


def test_positions_where_the_models_own_pass_is_not_running_are_refused(model):
    module = model.mxd.layers[LAYER]
    with model.mxd.ablate({LAYER: [1]}, positions=[0]), pytest.raises(ValueError, match="own forward pass only"):
        module.gate(torch.zeros(1, 3, 32))
