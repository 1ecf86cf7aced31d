"""Training: the loss and schedule of the paper, real learning on a real model, and named errors when it goes wrong."""

import copy
import dataclasses

import pytest
import torch
from accelerate import Accelerator
from tiny import RECIPE, batches, fed, nmse, tiny_model, train

from mxdsurgery.base.finding import find_blocks
from mxdsurgery.errors import DivergedError
from mxdsurgery.measuring.fidelity import measure
from mxdsurgery.planning.plan import plan_layer
from mxdsurgery.recipe import Recipe
from mxdsurgery.training.cost import first_k
from mxdsurgery.training.distill import LayerInTraining, Progress, active_experts, distill, learning_rate
from mxdsurgery.training.initialize import initial_layer, measure_statistics
from mxdsurgery.training.losses import distillation_loss, few_experts, frozen_gain, token_weights, zero_loss


def test_the_loss_is_the_squared_error_over_the_norm():
    y_hat, y = torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 2.0]])
    assert distillation_loss(y_hat, y).item() == pytest.approx((25 / 4 + 4 / 2) / 2)


def test_no_token_counts_more_than_one_of_eight_times_the_mean_size():
    y = torch.ones(100, 4)
    y[0] *= 500  # as real models have them at the first position; the mean size is about six times the others'
    weights = token_weights(y)[:, 0] * y.norm(dim=1)  # of relative errors, 1 each
    counted = weights * y.norm(dim=1)
    assert weights[1:].tolist() == pytest.approx([1.0] * 99)
    assert counted[0].item() == pytest.approx(8 * y.norm(dim=1).mean().item())
    assert distillation_loss(torch.zeros_like(y), y).item() == pytest.approx(counted.mean().item())
    assert zero_loss(y, token_weights(y)) == distillation_loss(torch.zeros_like(y), y)


def test_the_schedule_warms_up_stays_and_decays():
    recipe = dataclasses.replace(RECIPE, lr=1.0, warmup=0.1, decay=0.2)
    rates = [learning_rate(step, 100, recipe) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert rates[10:80] == [1.0] * 70
    assert rates[90] == pytest.approx(0.5) and rates[99] == pytest.approx(0.05)
    paper = dataclasses.replace(recipe, warmup=0.0, decay=0.0)
    assert learning_rate(0, 100, paper) == learning_rate(99, 100, paper) == 1.0


def test_k_falls_to_its_own_value_and_is_that_in_the_end():
    ks = [active_experts(step, 100, 4, 32) for step in range(100)]
    assert ks[0] == 32 and ks[35] == 18 and ks[70:] == [4] * 30 and ks == sorted(ks, reverse=True)
    assert Recipe(k=4).first_k == 32 and Recipe(k=64).first_k == 256 and Recipe(k=300).first_k == 300
    assert Recipe(k=4, k_start=4).first_k == 4 and Recipe(k=4, k_start=2).first_k == 4
    plan = plan_layer(find_blocks(tiny_model("llama"))[0].block, dataclasses.replace(RECIPE, n_experts=20))
    assert first_k(plan, RECIPE) == 20  # no more than there are
    layers, _, _ = train(tiny_model("llama"), steps=4)
    assert layers[0].gate.k == 4 and layers[0](torch.randn(3, 32)).shape == (3, 32)


def test_the_penalty_is_what_the_best_constant_takes_off_the_loss():
    generator = torch.Generator().manual_seed(0)
    scale, y = (torch.randn(200, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    scale, bias = scale + y, torch.full((6,), 0.1, dtype=torch.float64)
    target, weight = y - bias, token_weights(y)
    best = torch.stack(
        [torch.linalg.lstsq(weight.sqrt() * scale[:, [d]], weight.sqrt() * target[:, [d]]).solution[0, 0] for d in range(6)]
    )
    gained = distillation_loss(bias.expand_as(y), y) - distillation_loss(best * scale + bias, y)
    assert frozen_gain(scale, target, weight).item() == pytest.approx(gained.item(), rel=1e-5)


def test_the_penalty_makes_the_experts_carry_more():
    model = tiny_model("llama")

    def share(specialise):
        layers, _, blocks = train(model, dataclasses.replace(RECIPE, specialise=specialise), steps=150, layers=(0,))
        return measure(model, blocks, {0: layers[0].eval()}, next(batches(99)), 512)["layers"][0]["constant_gate_nmse"]

    assert share(0.1) > 1.5 * share(0.0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_layers_learn_their_blocks_on_text_they_have_not_seen(family):
    model = tiny_model(family)
    layers, progress, blocks = train(model, steps=150)
    assert (progress.step, progress.tokens) == (150, 150 * 512)
    held_out = nmse(model, blocks, layers)
    assert max(held_out.values()) < 0.5
    assert [plan.block.layer for plan in progress.nmse] == [plan.block.layer for plan in progress.dead_share] == [0, 1]


def test_a_layer_learns_the_same_whether_others_train_beside_it():
    model = tiny_model("llama")
    alone, _, _ = train(model, steps=10, layers=(1,))
    together, _, _ = train(model, steps=10, layers=(0, 1))
    for mine, theirs in zip(alone[1].parameters(), together[1].parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_base_model_is_left_as_it_was():
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, steps=5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_unit_norm_keeps_the_experts_rows_at_unit_length():
    layers, _, _ = train(tiny_model("llama"), dataclasses.replace(RECIPE, unit_norm=True), steps=20)
    torch.testing.assert_close(layers[0].experts.weight.norm(dim=1), torch.ones(64))
    free, _, _ = train(tiny_model("llama"), steps=20)
    assert (free[0].experts.weight.norm(dim=1) - 1).abs().max() > 1e-3


def test_experts_that_never_fire_are_counted_dead():
    model = tiny_model("llama")
    block = find_blocks(model)[0].block
    statistics = measure_statistics(model, [block], [next(batches())])[0]
    plan = plan_layer(block, RECIPE)
    layer = initial_layer(model, plan, RECIPE, statistics)
    with torch.no_grad():
        layer.gate.bias[:16] = -1e6
    progress = Progress(40, 512)
    distill(
        {plan: layer},
        fed(model, [block]),
        RECIPE,
        Accelerator(cpu=True),
        progress,
        lambda p: None,
    )
    assert 16 / 64 <= progress.dead_share[plan] < 0.5


def test_a_nan_stops_with_the_layers_name_and_a_remedy():
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(DivergedError, match="layer 1 .*: the loss is nan(.|\n)*lower lr="):
        train(model, steps=40)


def test_a_diverging_loss_stops():
    with pytest.raises(DivergedError, match="layer 0 .*: the loss is"):
        train(tiny_model("llama"), dataclasses.replace(RECIPE, lr=1.0, warmup=0.0), steps=400)


def test_a_gradient_far_longer_than_those_before_it_is_cut():
    layers, _, _ = train(tiny_model("llama"), steps=4)
    job = LayerInTraining("it", layers[0].train(), RECIPE)

    def left_of(length):
        parameters = [p for p in job.layer.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, length / sum(p.numel() for p in parameters) ** 0.5)
        job.shorten_gradient()
        return torch.cat([parameter.grad.flatten() for parameter in parameters]).norm().item()

    assert [left_of(length) for length in (1.0, 1.9, 0.5)] == pytest.approx([1.0, 1.9, 0.5], rel=1e-4)
    usual = job.usual_gradient.item()
    assert usual == pytest.approx(1.0 + 0.09 - 0.059, rel=1e-4)
    assert left_of(1000.0) == pytest.approx(2 * usual, rel=1e-4)
    other = LayerInTraining("other", copy.deepcopy(layers[0]), RECIPE)
    job.optimizer.step()  # a state has Adam's moments
    other.restore(job.state())
    assert other.usual_gradient.item() == pytest.approx(1.1 * usual, rel=1e-4)  # it may grow, a tenth in a step
    assert left_of(0.0) == 0


def test_bf16_autocast_keeps_parameters_in_fp32_and_learns():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    model = tiny_model("llama")
    block = find_blocks(model)[0].block
    statistics = measure_statistics(model, [block], [next(batches())])[0]
    plan = plan_layer(block, RECIPE)
    layer = initial_layer(model, plan, RECIPE, statistics)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    distill(
        {plan: layer},
        fed(model, [block]),
        RECIPE,
        accelerator,
        Progress(100, 512),
        lambda p: None,
    )
    AcceleratorState._reset_state()
    Accelerator(cpu=True)  # as the next test expects it
    assert all(parameter.dtype == torch.float32 for parameter in layer.parameters())
    assert nmse(model, [block], {0: layer})[0] < 0.6


def test_what_few_experts_say_is_the_best_sum_of_them_and_they_come_nearer_to_the_best():
    generator = torch.Generator().manual_seed(0)
    m, v = torch.randn(200, 12, generator=generator), torch.randn(12, 2, generator=generator)
    y = m * (torch.randn(200, 2, generator=generator) @ v.T) + 0.1 * torch.randn(200, 12, generator=generator)
    few, losses = torch.linalg.qr(torch.randn(12, 2, generator=generator))[0], []
    for _ in range(12):
        said, nearer = few_experts(m, y, token_weights(y), few)
        best = (few @ torch.linalg.lstsq(m[..., None] * few, y[..., None]).solution)[..., 0]
        losses.append(distillation_loss(m * said, y).item())
        assert losses[-1] == pytest.approx(distillation_loss(m * best, y).item(), rel=1e-3)
        torch.testing.assert_close(nearer.T @ nearer, torch.eye(2), atol=1e-5, rtol=0)
        few = nearer
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.02 * distillation_loss(0 * y, y).item()  # it finds the two
    nothing, kept = few_experts(0 * m, y, token_weights(y), few)
    assert nothing.isfinite().all()
    torch.testing.assert_close(kept.T @ kept, torch.eye(2), atol=1e-5, rtol=0)  # as wide as before, to go on from


def test_a_loss_with_what_few_experts_say_has_the_gradient_of_the_least_loss_that_they_reach():
    generator = torch.Generator().manual_seed(0)
    m, y = (torch.randn(50, 12, generator=generator, dtype=torch.float64).float() for _ in range(2))
    few = torch.linalg.qr(torch.randn(12, 3, generator=generator))[0]

    def least(m):
        solved = torch.linalg.lstsq((m[..., None] * few).double(), y[..., None].double()).solution
        return distillation_loss((few.double() @ solved)[..., 0].float() * m, y)

    there = m.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(distillation_loss(few_experts(there, y, token_weights(y), few)[0] * there, y), there)
    direction = torch.randn(50, 12, generator=generator)
    slope = (least(m + 1e-3 * direction) - least(m - 1e-3 * direction)) / 2e-3
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=0.02)
