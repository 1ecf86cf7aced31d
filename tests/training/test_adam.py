"""Adam with moments in bfloat16: what is rounded at random is right on average, and all else is as torch's Adam does it."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from mxdsurgery.recipe import Recipe
from mxdsurgery.runs.resume import optimizer_state, restore_optimizer
from mxdsurgery.training import adam
from mxdsurgery.training.adam import RoundedAdam, make_adam, round_at_random

ROUNDED = Recipe(data="stdlib", moments="bfloat16", lr=0.01, seed=3)


def parameters(*sizes):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size)) for size in sizes]


def train(optimizer, learning, steps, first=0):
    for number in range(first, first + steps):
        generator = torch.Generator().manual_seed(number)
        for parameter in learning:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def noise(shape, seed):
    return torch.randint(0, 2**16, shape, dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


def test_a_rounded_value_is_one_of_the_two_next_to_it_and_right_on_average():
    values = torch.cat([torch.randn(500), torch.randn(500).square() * 1e-12, torch.zeros(5), torch.tensor([1.0, -2.0])])
    below = (values.view(torch.int32) & -(2**16)).view(torch.float32)  # toward zero
    above = ((values.view(torch.int32) & -(2**16)) + 2**16).view(torch.float32)
    found = torch.stack([round_at_random(values.clone(), noise(values.shape, seed)) for seed in range(400)])
    assert torch.equal(found, found.bfloat16().float())
    assert ((found == below) | (found == above)).all()
    exact = below == values
    assert (found[:, exact] == values[exact]).all() and exact.sum() >= 7
    # The mean of 400 is good to a twentieth of half a step, and over all values to far less.
    off = ((found.mean(0) - values) / (above - below))[~exact]
    assert off.abs().max() < 0.12 and off.mean().abs() < 0.005


def test_the_default_is_torchs_own_adam():
    (learning,) = parameters(5)
    made = make_adam([learning], Recipe(data="stdlib"))
    assert type(made) is torch.optim.Adam and made.defaults["fused"]
    assert isinstance(make_adam([learning], ROUNDED), RoundedAdam)


def test_steps_are_torchs_but_for_the_rounding_of_the_moments():
    ours, theirs = parameters(1000, 7), parameters(1000, 7)
    made, usual = make_adam(ours, ROUNDED), torch.optim.Adam(theirs, lr=0.01, fused=True)
    for first, steps in ((0, 1), (1, 99)):
        train(made, ours, steps, first)
        train(usual, theirs, steps, first)
        for one, other in zip(ours, theirs, strict=True):
            if steps == 1:  # nothing was rounded yet
                assert torch.equal(one, other)
            assert (one - other).abs().max() < 0.01  # of up to a hundred steps of as much
    held = made.state[ours[0]]
    assert held["exp_avg"].dtype == held["exp_avg_sq"].dtype == torch.bfloat16
    usually = usual.state[theirs[0]]["exp_avg_sq"]
    assert held["exp_avg_sq"].float().mean().item() == pytest.approx(usually.mean().item(), rel=0.01)


def test_a_second_moment_falls_where_rounding_to_the_nearest_would_keep_it():
    (learning,) = parameters(2000)
    made = make_adam([learning], ROUNDED)
    train(made, [learning], 1)
    start = made.state[learning]["exp_avg_sq"].float()
    nearest = start.bfloat16()
    for _ in range(1000):
        learning.grad = torch.zeros_like(learning)
        made.step()
        nearest = (nearest.float() * 0.999).bfloat16()
    left = made.state[learning]["exp_avg_sq"].float().sum() / start.sum()
    assert left.item() == pytest.approx(0.999**1000, rel=0.02)
    assert torch.equal(nearest.float(), start)


def test_parts_do_not_change_what_one_step_does_and_every_part_is_worked_on(monkeypatch):
    whole, parted = parameters(1000, 30), parameters(1000, 30)
    train(make_adam(whole, ROUNDED), whole, 1)
    monkeypatch.setattr(adam, "chunk_bytes", lambda _device: 64 * 96)  # 96 elements at a time, and a rest
    made = make_adam(parted, ROUNDED)
    train(made, parted, 1)
    for one, other in zip(whole, parted, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert all((state["exp_avg"] != 0).all() and (state["exp_avg_sq"] != 0).all() for state in made.state.values())


def test_a_state_goes_through_a_file_and_goes_on_bit_for_bit(tmp_path):
    first = parameters(300, 4)
    made = make_adam(first, ROUNDED)
    train(made, first, 5)
    save_file({name: tensor.contiguous() for name, tensor in optimizer_state(made).items()}, tmp_path / "adam.safetensors")
    second = copy.deepcopy(first)
    again = make_adam(second, ROUNDED)
    restore_optimizer(again, load_file(tmp_path / "adam.safetensors"))
    train(made, first, 5, first=5)
    train(again, second, 5, first=5)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
        assert made.state[one].keys() == again.state[other].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(made.state[one][name], again.state[other][name]) for name in made.state[one])
        assert again.state[other]["exp_avg"].dtype == torch.bfloat16


def test_the_seed_alone_decides_how_it_is_rounded_whatever_else_was_drawn():
    def trained(seed):
        learning = parameters(500)
        torch.manual_seed(seed + 40)
        train(make_adam(learning, Recipe(data="stdlib", moments="bfloat16", seed=seed // 2)), learning, 5)
        return learning[0]

    assert torch.equal(trained(0), trained(1))
    assert not torch.equal(trained(0), trained(2))
