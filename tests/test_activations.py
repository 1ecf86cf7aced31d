"""Recording: what the blocks saw, from a pass that stops after the last of them, and no hook left behind."""

import pytest
import torch
from conftest import tiny_model

from mxdsurgery.activations import hooked, record_activations, recording
from mxdsurgery.blocks import find_blocks

IDS = torch.arange(24).view(2, 12)


def hooks_of(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_recorded_pass_stops_after_the_last_block_asked_for(family):
    model = tiny_model(family)
    blocks = [finding.block for finding in find_blocks(model)]
    ran = []
    model.base_model.get_submodule(blocks[1].path).register_forward_hook(lambda *_: ran.append("block 1"))
    model.get_output_embeddings().register_forward_hook(lambda *_: ran.append("head"))
    recorded = record_activations(model, blocks[:1], IDS)
    assert ran == []
    assert set(recorded) == {0}
    assert recorded[0].x.shape == recorded[0].y.shape == (2, 12, 32)


def test_recorded_outputs_are_the_blocks_own():
    model = tiny_model("llama")
    blocks = [finding.block for finding in find_blocks(model)]
    for layer, (x, y) in record_activations(model, blocks, IDS).items():
        assert torch.equal(model.model.layers[layer].mlp(x), y)


def test_an_exception_inside_leaves_no_hook():
    model = tiny_model("llama")
    blocks = [finding.block for finding in find_blocks(model)]
    with pytest.raises(ZeroDivisionError), recording(model, blocks):
        assert hooks_of(model)
        raise ZeroDivisionError
    assert not hooks_of(model)
    with pytest.raises(ZeroDivisionError), hooked(model.register_forward_hook(lambda *_: None)):
        raise ZeroDivisionError
    assert not hooks_of(model)
    record_activations(model, blocks, IDS)
    assert not hooks_of(model)
