"""The four starts: what each takes from the block, and the centred gate."""

import pytest
import torch
from tiny import FAMILIES, tiny_model

from mxdsurgery.base.activations import record_activations
from mxdsurgery.base.finding import find_blocks
from mxdsurgery.errors import MxDWarning
from mxdsurgery.planning.plan import plan_layer
from mxdsurgery.recipe import Recipe
from mxdsurgery.training.initialize import initial_layer, measure_statistics

BATCHES = [torch.randint(1, 64, (8, 16), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def start(family, init, **keys):
    recipe = Recipe(init=init, n_experts=64, k=4, **keys)
    model = tiny_model(family)
    block = find_blocks(model)[1].block
    statistics = measure_statistics(model, [block], BATCHES)[1]
    layer = initial_layer(model, plan_layer(block, recipe), recipe, statistics)
    x, y = (t[:, 1:].flatten(0, 1) for t in record_activations(model, [block], torch.cat(BATCHES))[1])
    return model, block, statistics, layer, x, y


def test_statistics_are_the_means_over_all_positions_but_0():
    _, _, statistics, _, x, y = start("llama", "random")
    torch.testing.assert_close(statistics.mean_x, x.mean(0))
    torch.testing.assert_close(statistics.mean_y, y.mean(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_encoder_takes_the_blocks_hidden_units_and_starts_the_rest_afresh(family):
    model, block, statistics, layer, x, _ = start(family, "encoder")
    torch.testing.assert_close(layer.hidden(x), block.hidden(model.base_model, x), rtol=1e-4, atol=1e-5)
    assert (layer.decoder.weight == 0).all()
    torch.testing.assert_close(layer(x), statistics.mean_y.expand_as(x))


def test_random_takes_nothing_but_the_means():
    _, block, _, layer, _, _ = start("llama", "random")
    model, _, _, other, _, _ = start("llama", "encoder")
    assert not torch.equal(layer.encoder.weight, block.encoder.weight(model.base_model))
    assert torch.equal(layer.gate.weight, other.gate.weight)


@pytest.mark.parametrize("init", ["encoder", "random"])
def test_the_average_token_favours_no_expert(init):
    _, _, statistics, layer, x, _ = start("gpt2", init)
    torch.testing.assert_close(layer.gate.pre_activations(statistics.mean_x), torch.zeros(64), atol=1e-5, rtol=0)
    torch.testing.assert_close(layer.gate.pre_activations(x).mean(0), torch.zeros(64), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_pretrained_is_near_the_block_at_once_and_warns(family):
    with pytest.warns(MxDWarning, match="expert_share"):
        _, _, _, layer, x, y = start(family, "pretrained")
    nmse = (layer(x) - y).square().sum() / y.square().sum()
    assert nmse < 1e-4


def test_shared_without_a_share_to_carry_warns():
    with pytest.warns(MxDWarning, match="init: shared .* the experts mean little"):
        start("llama", "shared", expert_share=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_shared_is_near_the_block_at_once_by_its_shared_expert_alone(family):
    _, block, statistics, layer, x, y = start(family, "shared")
    assert (layer.experts.bias == 1).all() and (layer.experts.weight == 0).all()
    nmse = (layer(x) - y).square().sum() / (y - y.mean(0)).square().sum()
    assert nmse < 0.7  # what is constant in D z is only nearly so
    torch.testing.assert_close(layer(statistics.x).mean(0), statistics.y.mean(0), atol=1e-5, rtol=1e-3)
    added = layer.decoder.weight - block.decoder.weight(start(family, "encoder")[0].base_model)
    torch.testing.assert_close(added, added[:1].expand_as(added), atol=1e-6, rtol=1e-4)
    constant = layer.hidden(statistics.x) @ added[0]
    assert constant.mean().item() == pytest.approx(statistics.y.square().mean().sqrt().item(), rel=0.3)
    assert constant.std() < constant.mean()


def test_a_layers_start_depends_on_the_seed_and_the_layer_only():
    model = tiny_model("llama")
    blocks = [finding.block for finding in find_blocks(model)]
    statistics = measure_statistics(model, blocks, BATCHES)

    def gate(block, seed):
        recipe = Recipe(n_experts=64, k=4, init="random", seed=seed)
        return initial_layer(model, plan_layer(block, recipe), recipe, statistics[block.layer]).gate.weight

    assert torch.equal(gate(blocks[0], 0), gate(blocks[0], 0))
    assert not torch.equal(gate(blocks[0], 0), gate(blocks[0], 1))
    assert not torch.equal(gate(blocks[0], 0), gate(blocks[1], 0))
