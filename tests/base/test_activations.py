"""Recording what the blocks see, from a pass that stops after the last of them and leaves no hook behind."""

import itertools

import pytest
import tiny_models
import torch
from tiny import tiny_model

from mxdsurgery.base.activations import Activations, ShuffledPositions, record_activations, recording
from mxdsurgery.base.finding import find_blocks
from mxdsurgery.base.running import hooked
from mxdsurgery.errors import UnsupportedBlockError

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


def numbered(batches, n=4, d=2):
    """Batches of two layers whose position p holds the number p, in x as in y of layer 0, plus 1000 in layer 1."""
    for batch in range(batches):
        x = torch.arange(batch * n, (batch + 1) * n).float()[:, None].expand(n, d)
        yield {0: Activations(x.clone(), x.clone()), 1: Activations(x + 1000, x + 1000)}


@pytest.mark.parametrize(("batches", "buffer"), [(0, 8), (1, 8), (3, 0), (3, 7), (5, 8), (7, 12), (3, 400)])
def test_shuffling_positions_yields_every_position_once_and_all_layers_alike(batches, buffer):
    shuffled = list(ShuffledPositions(numbered(batches), buffer, 4, seed=0))
    assert len(shuffled) == batches
    for drawn in shuffled:
        assert torch.equal(drawn[0].x, drawn[0].y) and torch.equal(drawn[0].x + 1000, drawn[1].y)
    seen = [value for drawn in shuffled for value in drawn[0].x[:, 0].tolist()]
    assert sorted(seen) == list(range(4 * batches))
    assert (seen == sorted(seen)) == (buffer < 8 or batches == 0)


def test_the_order_of_positions_depends_on_the_seed_alone():
    orders = [[tuple(d[0].x[:, 0].tolist()) for d in ShuffledPositions(numbered(9), 12, 4, seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(("buffer", "after"), [(0, 4), (12, 1), (12, 5), (12, 7), (12, 9)])
def test_shuffling_goes_on_from_its_state_as_if_it_had_not_stopped(buffer, after):
    def drawn(shuffled):
        return [tuple(batch[1].x[:, 0].tolist()) for batch in shuffled]

    whole = drawn(ShuffledPositions(numbered(9), buffer, 4, seed=3))
    first = ShuffledPositions(numbered(9), buffer, 4, seed=3)
    begun = [tuple(next(first)[1].x[:, 0].tolist()) for _ in range(after)]
    taken = min(9, after + ShuffledPositions.ahead(buffer, 4))
    again = ShuffledPositions(itertools.islice(numbered(9), taken, None), buffer, 4, seed=3)
    again.restore({name: part.clone() for name, part in first.state().items()}, torch.device("cpu"))
    assert begun + drawn(again) == whole


@pytest.mark.parametrize("family", ["falcon", "llama4_text"])
def test_a_blocks_output_is_recorded_before_others_are_added_to_it_in_place(family):
    model = tiny_models.tiny_model(family)
    blocks = [finding.block for finding in find_blocks(model)]
    ids = torch.randint(3, 256, (2, 7), generator=torch.Generator().manual_seed(0))
    with recording(model, blocks) as recorded:
        model(input_ids=ids, use_cache=False)
    for block in blocks:
        x, y = recorded[block.layer]
        torch.testing.assert_close(block.output(model.base_model, block.hidden(model.base_model, x)), y, rtol=1e-4, atol=1e-6)


def test_a_layer_that_changes_its_blocks_input_in_place_is_refused():
    model = tiny_model("llama")
    block = find_blocks(model)[0].block
    layer, given = model.model.layers[0], []
    forward = layer.forward
    layer.mlp.register_forward_pre_hook(lambda _m, x: given.append(x[0]))
    layer.forward = lambda *args, **kwargs: [forward(*args, **kwargs), given[-1].add_(1)][0]
    with pytest.raises(UnsupportedBlockError, match="in place"), recording(model, [block]):
        model(input_ids=torch.arange(8).view(1, -1), use_cache=False)


def test_a_block_that_is_not_run_once_on_each_token_is_refused():
    model = tiny_model("llama")
    block, layer = find_blocks(model)[0].block, model.model.layers[0]
    layer.forward = lambda hidden_states, *_, **__: layer.mlp(torch.cat([hidden_states, hidden_states[:, :3]], 1))[:, :-3]
    with pytest.raises(UnsupportedBlockError, match="runs its block on 27 positions of 24 tokens"):
        record_activations(model, [block], torch.arange(24).view(1, -1))
