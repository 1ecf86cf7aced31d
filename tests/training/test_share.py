"""expert_share as a target: the penalty, the way it is steered, and that a trained layer comes where it should."""

import dataclasses
import warnings

import pytest
import torch
from accelerate import Accelerator
from tiny import RECIPE as FORMER
from tiny import batches, fed, tiny_model, train

from mxdsurgery.base.activations import record_activations
from mxdsurgery.base.finding import find_blocks
from mxdsurgery.base.surgery import replaced
from mxdsurgery.errors import MxDWarning, RecipeError
from mxdsurgery.measuring.fidelity import measure
from mxdsurgery.measuring.shares import _RATIO, Shares, warn_of_shortfalls
from mxdsurgery.planning.effort import fitted_per_scored, looking_runs
from mxdsurgery.planning.plan import plan_layer
from mxdsurgery.recipe import EXPERT_SHARE, SPECIALISE, Recipe
from mxdsurgery.training.distill import Progress, distill
from mxdsurgery.training.initialize import initial_layer, measure_statistics
from mxdsurgery.training.losses import distillation_loss, few_experts, token_weights, zero_loss
from mxdsurgery.training.share import _KEEPS, LOOKS, SHARES, ShareControl, ShareKept, look_steps

CPU = torch.device("cpu")
RECIPE = dataclasses.replace(FORMER, init="shared", specialise=None)


def one_step(generator, share, control):
    """Scale, rest and target of a step, and a loss with which the experts carry ``share`` of it, beyond the control's few."""
    y = torch.randn(300, 6, generator=generator)
    scale, rest = torch.randn(300, 6, generator=generator) + 0.5 * y, torch.full((6,), 0.05)
    weights = token_weights(y)
    zero = zero_loss(y, weights)
    few = distillation_loss(few_experts(scale, y - rest, weights, control.few)[0] * scale + rest, y)
    return (few - share * zero) / (1 - share), zero, scale, rest, y, weights


def test_nothing_is_added_where_the_experts_carry_enough():
    control = ShareControl(0.5, 6, 10, CPU)
    assert control.asked == pytest.approx(0.5**0.5)
    generator = torch.Generator().manual_seed(0)
    assert control.penalty(*one_step(generator, 0.75, control)).item() == 0.0
    assert control.share_of_loss() == pytest.approx(0.75, abs=1e-4)
    assert control.penalty(*one_step(generator, 0.6, control)).item() > 0.0


def test_what_is_added_is_what_is_missing_times_the_weight():
    control = ShareControl(0.5, 6, 10, CPU)
    loss, zero, scale, rest, y, weights = one_step(torch.Generator().manual_seed(0), 0.6, control)
    worth, weight = (zero - loss).item(), control.weight.item()
    added = control.penalty(loss, zero, scale, rest, y, weights)
    assert added.item() == pytest.approx(weight * (control.asked - 0.6) * worth, rel=1e-3)


def test_the_weight_grows_where_a_layer_falls_behind_and_falls_again():
    control = ShareControl(0.5, 6, 60, CPU)
    weights = []
    for step in range(60):
        control.penalty(*one_step(torch.Generator().manual_seed(step), 0.2 if step < 12 else 0.9, control))
        weights.append(control.weight.item())
    assert weights[4] == pytest.approx(0.3) and 1.5 * weights[4] < weights[11] <= 1.0
    assert weights[59] == pytest.approx(0.3) and max(weights) <= 1.0


@pytest.mark.parametrize("power", [1.2, 2.0, 3.5])
def test_what_was_measured_says_what_has_to_be_asked_of_the_loss(power):
    control = ShareControl(0.5, 6, 10, CPU)
    for _ in range(60):
        control.penalty(*one_step(torch.Generator().manual_seed(1), 0.6, control))
    control.learn(0.6**power)
    assert control.asked**power == pytest.approx(0.5, rel=1e-3)


def test_where_nearly_all_of_the_loss_does_not_do_more_than_all_is_asked_for():
    control = ShareControl(0.5, 6, 10, CPU)
    for share, least, most in ((0.9, 1.0, 1.2), (1.2, 1.4, 1.6), (100.0, 3.0, 3.0)):
        control.running = torch.tensor([0.0, 1.0, share])  # loss, an output of zero's, a few experts'
        control.learn(0.35)
        assert least <= control.asked <= most
    control.running = torch.tensor([0.0, 1.0, 0.9])
    control.learn(0.8)
    assert control.asked < 0.8  # enough: less is asked for


def test_it_goes_on_where_it_stood():
    control, other = ShareControl(0.5, 6, 60, CPU), ShareControl(0.5, 6, 60, CPU)
    for step in range(40):
        control.penalty(*one_step(torch.Generator().manual_seed(step), 0.3, control))
    control.learn(0.1)
    other.restore(control.state())
    nexts = [of.penalty(*one_step(torch.Generator().manual_seed(50), 0.3, of)).item() for of in (control, other)]
    assert nexts[0] == nexts[1] > 0 and torch.equal(control.state(), other.state())


def kept_pass(kept, seed, spread, again=False):
    """The penalty of a pass in which the sum of experts that the output needs varies by ``spread`` between tokens."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(300, 24, generator=generator) + 0.5
    scale.requires_grad_()
    sums = torch.ones(24) + spread * torch.randn(300, 24, generator=generator)
    now, rest = (scale * sums).detach() + 0.05, torch.full((300, 24), 0.05)
    return kept.penalty(scale, rest, now, token_weights(now), again=again), scale


def test_what_experts_carry_is_measured_and_then_held():
    kept = ShareKept(24, CPU)
    assert all(kept_pass(kept, seed, 1.0)[0].item() == 0.0 for seed in range(20))  # it is measured
    assert 0.3 < kept.asked.item() < 1.0  # four experts leave a good part of what varies in 24 directions
    assert max(kept_pass(kept, seed, 1.3)[0].item() for seed in range(20, 50)) == 0.0  # more is not brought down
    added = [kept_pass(kept, seed, 0.6) for seed in range(50, 110)]
    mean = sum(penalty.item() for penalty, _ in added[-10:]) / 10
    assert mean == pytest.approx(_KEEPS * (kept.asked - kept.lost).item(), rel=0.1) and mean > 0.01
    added[-1][0].backward()
    assert added[-1][1].grad.abs().max() > 0


def test_a_pass_that_is_computed_again_is_the_same_and_teaches_nothing():
    kept = ShareKept(24, CPU)
    for seed in range(30):
        kept_pass(kept, seed, 1.0 if seed < 20 else 0.5)
    once = kept_pass(kept, 31, 0.5)[0].item()
    before = kept.state()
    assert kept_pass(kept, 31, 0.5, again=True)[0].item() == once > 0
    assert torch.equal(kept.state(), before)


def test_what_is_held_goes_on_where_it_stood():
    kept, other = ShareKept(24, CPU), ShareKept(24, CPU)
    for seed in range(30):
        kept_pass(kept, seed, 1.0 if seed < 20 else 0.5)
    other.restore(kept.state())
    assert kept_pass(kept, 31, 0.5)[0].item() == kept_pass(other, 31, 0.5)[0].item() > 0
    assert torch.equal(kept.state(), other.state())


def test_the_looks_are_within_the_steps():
    for steps in (1, 2, 7, 300):
        assert all(1 <= step <= steps for step in look_steps(steps))
    assert len(look_steps(300)) == len(LOOKS)


def spoken(model, contexts):
    """Text that the model says itself, (contexts, 16): whatever part of it is removed, it predicts that worse."""
    generator, ids = torch.Generator().manual_seed(3), torch.randint(1, 64, (contexts, 1))
    with torch.no_grad():
        while ids.shape[1] < 16:
            likely = model(input_ids=ids).logits[:, -1].float().softmax(-1)
            ids = torch.cat([ids, torch.multinomial(likely, 1, generator=generator)], dim=1)
    return ids


def sure_of_itself():
    """A model whose blocks matter for what it predicts."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(4.0)
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(4.0)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_measured_shares_are_those_of_the_evaluation(dtype):
    """On text that the model speaks itself, for there its predictions are right about the text."""
    model = sure_of_itself()
    ids = spoken(model, 256)
    recipe = dataclasses.replace(RECIPE, init="encoder", expert_share=0.0)
    layers, _, blocks = train(model, recipe, steps=30)
    plans = {plan_layer(block, recipe): layers[block.layer].eval() for block in blocks}
    expected = measure(model, blocks, layers, ids, batch=256)["layers"]
    before = {name: tensor.clone() for name, tensor in model.to(dtype).state_dict().items()}
    looks, of_fewer = Shares(model, ids, batch=256), Shares(model, ids, batch=256, fitted=4)
    found, found_by_fewer = looks(plans), of_fewer(plans)
    assert found == looks(plans)  # now without running the model without the blocks
    for plan, entry in zip(plans, expected, strict=True):
        assert set(found[plan]) == set(SHARES)
        assert found[plan] == pytest.approx({name: entry[name] for name in SHARES}, abs=0.05)
        assert found_by_fewer[plan] == pytest.approx(found[plan], abs=0.05)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_look_takes_the_shares_of_kl_that_whole_logits_have():
    model = sure_of_itself()
    ids = spoken(model, 16)
    layers, _, blocks = train(model, dataclasses.replace(RECIPE, init="encoder", expert_share=0.0), steps=30)
    plans = {plan_layer(block, RECIPE): layers[block.layer].eval() for block in blocks}
    looks = Shares(model, ids, batch=64, fitted=2)
    found, stand_ins = looks(plans), Shares(model, ids, batch=64, fitted=2)._stand_ins(plans, blocks)
    scored = ids[::2]

    @torch.no_grad()
    def kl(plan, name):
        module = stand_ins[plan][name]
        if name == "zero":
            module.first = record_activations(model, [plan.block], scored)[plan.block.layer].y[:, :1]
        log_p = model(input_ids=scored).logits[:, 1:-1].double().log_softmax(-1)
        with replaced(model, [plan.block], {plan.block.layer: module}):
            log_q = model(input_ids=scored).logits[:, 1:-1].double().log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum().item()

    for plan, shares in found.items():
        own, zero = kl(plan, "converted"), kl(plan, "zero")
        for name, share in shares.items():
            assert share == pytest.approx(_RATIO * (kl(plan, name) - own) / (zero - own), abs=1e-4)
    assert all(set(shares) == set(SHARES) for shares in found.values())


def test_layers_are_trained_to_the_share_that_is_asked_for():
    model = sure_of_itself()
    block = find_blocks(model)[0].block
    statistics = measure_statistics(model, [block], [next(batches())])[0]
    ids, shares = spoken(model, 256), {}
    for target in (0.0, 0.3, 0.6):
        recipe = dataclasses.replace(RECIPE, expert_share=target)
        plan = plan_layer(block, recipe)
        layer, progress = initial_layer(model, plan, recipe, statistics), Progress(300, 512)
        looks, heldout = (Shares(model, part, batch=512) for part in ids.split(128))
        distill({plan: layer}, fed(model, [block]), recipe, Accelerator(cpu=True), progress, lambda p: None, shares_of=looks)
        shares[target] = min(heldout({plan: layer.eval()})[plan].values())
        assert (plan in progress.expert_share) == (target > 0)
    assert shares[0.0] < 0.1 and shares[0.3] == pytest.approx(0.3, abs=0.1) and shares[0.6] == pytest.approx(0.6, abs=0.1)


def test_a_recipe_asks_for_a_share_or_for_a_weight():
    plain, share, none, weight = Recipe(), Recipe(expert_share=0.2), Recipe(expert_share=0), Recipe(specialise=0.01)
    assert (plain.share_target, plain.penalty, plain.start) == (EXPERT_SHARE, 0.0, "shared")
    assert (share.share_target, share.penalty, share.start) == (0.2, 0.0, "shared")
    assert Recipe(expert_share=0.2, init="random").start == "random"
    assert (none.share_target, none.penalty) == (None, 0.0)
    assert (weight.share_target, weight.penalty, weight.start) == (None, 0.01, "encoder")
    for other in (Recipe(inputs="joint"), Recipe(init="pretrained")):
        assert (other.share_target, other.penalty) == (None, SPECIALISE)
    with pytest.raises(RecipeError, match="'expert_share' and 'specialise' are 0.5 and 0.003"):
        Recipe(expert_share=0.5, specialise=0.003)
    with pytest.raises(RecipeError, match="'expert_share' and 'inputs' are 0.5 and 'joint'"):
        Recipe(expert_share=0.5, inputs="joint")
    assert Recipe(specialise=0.0).penalty == 0.0


def test_what_is_missing_is_said_layer_by_layer():
    layers = [
        {"layer": 0, "expert_share": 0.7, "few_experts_share": 0.46},
        {"layer": 1, "expert_share": 0.6, "few_experts_share": 0.31, "few_experts_share_ci": [0.28, 0.34]},
        {"layer": 2, "expert_share": None, "few_experts_share": None},
    ]
    with pytest.warns(
        MxDWarning, match=r"of 0.50 .* 0.31 \[0.28, 0.34\] in layer 1 \(few_experts_share\); no number in layer 2,"
    ):
        warn_of_shortfalls({"layers": layers}, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_shortfalls({"layers": layers[:1]}, 0.5)


def _of_contexts(ran):
    """Notes a run of a layer on whole contexts; one on their first tokens alone costs next to nothing."""

    def note(_module, args, _output):
        if args[0].shape[-2] > 1:
            ran.append("new layer")

    return note


def test_the_plan_counts_the_runs_of_a_look():
    model = tiny_model("llama")
    layers, _, blocks = train(model, RECIPE, steps=1)
    plans = {plan_layer(block, RECIPE): layers[block.layer].eval() for block in blocks}
    looks, ran = Shares(model, spoken(model, 2 * 8), batch=32, fitted=8), []
    looks(plans)
    hooks = [x.self_attn.register_forward_hook(lambda *_: ran.append("decoder layer")) for x in model.model.layers]
    hooks += [layer.gate.register_forward_hook(_of_contexts(ran)) for layer in plans.values()]
    hooks.append(model.lm_head.register_forward_hook(lambda *_: ran.append("head")))
    looks(plans)
    for hook in hooks:
        hook.remove()
    assert [fitted_per_scored(tokens, 1024) for tokens in (10_000, 100_000, 300_000, 2_000_000)] == [1, 3, 8, 8]
    expected = looking_runs(blocks, 2, fitted=8)
    assert [ran.count(what) for what in ("decoder layer", "head")] == [expected.decoder_layers, expected.heads]
    # With experts frozen, nothing is chosen.
    assert ran.count("new layer") == expected.new_layers - len(blocks)
