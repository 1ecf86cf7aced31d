"""The arithmetic of what a conversion takes, against numbers computed by hand and the tensors of real layers."""

import dataclasses

import pytest
import torch
from accelerate import Accelerator
from tiny import tiny_model

from mxdsurgery.base.finding import find_blocks
from mxdsurgery.hardware.memory import PeakMemory, free_memory
from mxdsurgery.layers.layer import MxDLayer
from mxdsurgery.planning import budget
from mxdsurgery.recipe import Recipe
from mxdsurgery.training import cost
from mxdsurgery.training.cost import BaseShape, LayerPlan, Machine
from mxdsurgery.training.distill import LayerInTraining, train_step
from mxdsurgery.training.initialize import layer_shape

RECIPE = Recipe(k=4, n_experts=64, data="stdlib", batch=512, context=16, shuffle=1000)


def tiny_layers(family="llama", n_experts=64):
    blocks = [finding.block for finding in find_blocks(tiny_model(family))]
    return [LayerPlan(block, n_experts, 4, cost.layer_parameters(block, n_experts)) for block in blocks]


def tiny_base(dtype="bfloat16"):
    return BaseShape(parameters=40_000, layer_parameters=(10_000, 11_000), d_model=32, vocabulary=64, dtype=dtype)


def machine(memory=None, device="cpu", bf16=False):
    return Machine(device, bf16, bf16, memory, "as the test says")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neo", "opt"])  # glu and mlp, with biases and without
def test_planned_bytes_are_those_of_the_tensors_of_a_layer_in_training(family):
    (planned, _) = tiny_layers(family)
    group = cost.make_group([planned], [], tiny_base(), RECIPE, machine())
    layer = MxDLayer(**layer_shape(planned))
    assert group.new_bytes == sum(weight.nbytes for weight in layer.parameters())
    assert group.gradient_bytes == group.new_bytes
    job = LayerInTraining("the layer", layer, RECIPE)
    train_step(job, torch.randn(64, 32), torch.randn(64, 32), 1e-3, 64, Accelerator(cpu=True))
    states = job.optimizer.state.values()
    assert group.adam_bytes == sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq"))


def test_moments_in_bfloat16_are_planned_as_they_are_held_and_more_layers_fit_together():
    layers = tiny_layers()
    rounded = dataclasses.replace(RECIPE, moments="bfloat16")
    group = cost.make_group(layers[:1], [], tiny_base(), rounded, machine())
    layer = MxDLayer(**layer_shape(layers[0]))
    job = LayerInTraining("the layer", layer, rounded)
    train_step(job, torch.randn(64, 32), torch.randn(64, 32), 1e-3, 64, Accelerator(cpu=True))
    states = job.optimizer.state.values()
    assert group.adam_bytes == sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq"))
    whole = cost.make_group(layers, [], tiny_base(), rounded, machine())
    assert whole.peak_bytes == cost.make_group(layers, [], tiny_base(), RECIPE, machine()).peak_bytes - whole.adam_bytes
    just = machine(whole.peak_bytes)
    assert [group.layers for group in cost.make_groups(layers, tiny_base(), rounded, just)] == [[0, 1]]
    assert [group.layers for group in cost.make_groups(layers, tiny_base(), RECIPE, just)] == [[0], [1]]


def test_what_adam_works_on_at_a_time_counts_where_nothing_else_takes_as_much():
    (layer, _) = tiny_layers(n_experts=200_000)
    small = dataclasses.replace(RECIPE, moments="bfloat16", batch=16)
    rounded, usual = (
        cost.make_group([layer], [], tiny_base(), recipe, machine(device="cuda"))
        for recipe in (small, dataclasses.replace(small, moments="float32"))
    )
    assert rounded.activation_bytes - 2 * 16 * 32 * 2 == 16 * (2**28 // 64) > usual.activation_bytes


def test_a_group_adds_up_its_layers_and_holds_the_gradients_of_one():
    layers = tiny_layers()
    first, second = (cost.make_group([layer], [], tiny_base(), RECIPE, machine()) for layer in layers)
    both = cost.make_group(layers, [], tiny_base(), RECIPE, machine())
    assert both.layers == [0, 1] and both.new_bytes == first.new_bytes + second.new_bytes
    assert both.adam_bytes == first.adam_bytes + second.adam_bytes == 2 * both.new_bytes
    assert both.gradient_bytes == first.gradient_bytes
    assert both.base_bytes == first.base_bytes == 80_000
    # x and y of 512 tokens, 32 wide, 2 bytes each: what one more layer adds.
    assert both.activation_bytes - first.activation_bytes == 2 * 512 * 32 * 2
    assert both.peak_bytes == 80_000 + both.new_bytes + first.new_bytes + both.adam_bytes + both.activation_bytes + 13_000
    # 2 x (10,000 + 11,000) for the weights, 4 T D for attention in each of two layers.
    assert both.flops["base_forward"] == 42_000 + 2 * 4 * 16 * 32
    # 2 N D; E and E_up 4 D H each, D 6 D H; about ten times K D.
    assert [both.flops[name] for name in ("gate", "encoder_decoder", "experts")] == [8192, 2 * 14 * 32 * 80, 2560]


def test_an_activation_buffer_is_held_in_whole_batches_for_every_layer():
    plain, held = (
        cost.make_group(tiny_layers(), [], tiny_base(), dataclasses.replace(RECIPE, activation_buffer=size), machine())
        for size in (0, 1600)
    )
    assert held.activation_bytes - plain.activation_bytes == 2 * (2 * 3 * 512 * 32 * 2)


def test_finished_layers_count_on_the_cpu_and_lie_in_host_memory_on_a_gpu():
    first, second = tiny_layers()
    on_cpu = cost.make_group([second], [first], tiny_base(), RECIPE, machine())
    on_gpu = cost.make_group([second], [first], tiny_base(), RECIPE, machine(device="cuda"))
    assert (on_cpu.finished_bytes, on_gpu.finished_bytes) == (2 * first.parameters, 0)
    assert (on_cpu.text_bytes, on_gpu.text_bytes) == (13_000, 0)


def test_groups_are_as_large_as_the_budget_allows_and_no_larger():
    (like, _) = tiny_layers()
    layers = [dataclasses.replace(like, block=dataclasses.replace(like.block, layer=index)) for index in range(6)]
    base = dataclasses.replace(tiny_base(), layer_parameters=(10_000,) * 6)
    alone = max(group.peak_bytes for group in cost.make_groups(layers, base, RECIPE, machine(1)))
    for memory in (None, alone + 10**5, alone + 3 * 10**5, alone + 6 * 10**5):
        groups = cost.make_groups(layers, base, RECIPE, machine(memory))
        assert [index for group in groups for index in group.layers] == list(range(6))
        if memory is None:
            assert len(groups) == 1
            continue
        assert len(groups) > 1 and all(group.peak_bytes <= memory for group in groups)
        for group in groups[:-1]:  # one layer more would not have fitted
            start, end = group.layers[0], group.layers[-1] + 2
            assert cost.make_group(layers[start:end], layers[:start], base, RECIPE, machine(memory)).peak_bytes > memory


def test_a_layer_that_fits_nowhere_stands_alone_and_is_refused():
    layers, base = tiny_layers(), tiny_base()
    needed = budget.needed_bytes(layers, base, RECIPE, machine())
    for memory, fits in ((needed, True), (needed - 1, False)):
        small = machine(memory)
        groups = cost.make_groups(layers, base, RECIPE, small)
        assert (budget.refusal(layers, groups, base, RECIPE, small) is None) is fits
    assert [group.layers for group in cost.make_groups(layers, base, RECIPE, machine(1))] == [[0], [1]]
    assert budget.refusal(layers, groups, base, RECIPE, machine(None)) is None


def test_the_largest_n_experts_fits_and_one_more_does_not():
    layers, base = tiny_layers(n_experts=5000), tiny_base()
    small = machine(budget.needed_bytes(layers, base, RECIPE, machine()) // 2)
    n = budget.largest_n_experts(layers, base, RECIPE, small)
    assert 4 <= n < 5000
    assert budget.needed_bytes(tiny_layers(n_experts=n), base, RECIPE, small) <= small.memory
    assert budget.needed_bytes(tiny_layers(n_experts=n + 1), base, RECIPE, small) > small.memory
    assert budget.largest_n_experts(layers, base, RECIPE, machine(1)) is None


def test_where_the_text_buffer_is_what_does_not_fit_a_smaller_one_is_named():
    layers, base, recipe = tiny_layers(), tiny_base(), dataclasses.replace(RECIPE, shuffle=10**6)
    small = machine(budget.needed_bytes(layers, base, recipe, machine()) - 5_000_000)
    refused = budget.refusal(layers, cost.make_groups(layers, base, recipe, small), base, recipe, small)
    shuffle = int(refused.fix.partition("--shuffle ")[2].split(",")[0])
    assert 0 < shuffle < 10**6
    assert budget.needed_bytes(layers, base, dataclasses.replace(recipe, shuffle=shuffle), small) <= small.memory


def test_a_step_takes_no_tokens_by_n_matrix_and_grows_with_the_batch():
    def step(n=21_490, batch=4096, bf16=False):
        return cost.step_bytes(768, 3072, n, 32, "mlp", batch, bf16, bf16, "cpu")

    assert step(n=2_000_000) < 2_000_000 * 4096 * 4 / 10
    assert step(batch=2048) < step() < 2 * step(batch=2048) + 1
    assert step(bf16=True) < step()


def test_the_peak_of_a_stretch_of_work_is_seen():
    memory = PeakMemory("cpu")
    if memory.bytes() is None:
        pytest.skip("this system does not tell a process's peak memory")
    tensor = torch.ones(64 * 2**20)  # 256 MiB: more than what the process has kept of what it freed
    del tensor
    assert 200 * 2**20 < memory.bytes() < 500 * 2**20
    assert PeakMemory("cpu").bytes() < 200 * 2**20  # begins anew
    assert free_memory("cpu") > 0
