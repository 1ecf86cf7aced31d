"""The inputs that layers train on: bit for bit what the original, or the model converted so far, gives them."""

import dataclasses
import itertools

import pytest
import torch
from tiny import FAMILIES, tiny_model
from torch import nn

from mxdsurgery.base.activations import record_activations
from mxdsurgery.base.finding import find_blocks
from mxdsurgery.base.running import hooked
from mxdsurgery.base.surgery import replaced
from mxdsurgery.errors import UnsupportedBlockError
from mxdsurgery.planning.plan import plan_layer
from mxdsurgery.recipe import Recipe
from mxdsurgery.terminal.console import Reporter
from mxdsurgery.training.inputs import ConvertedInputs, OriginalInputs

RECIPE = Recipe(k=4, n_experts=64, data="stdlib", batch=64, context=16, tokens=320, inputs="converted", target="original")
CPU = torch.device("cpu")
BATCHES = [torch.randint(1, 64, (4, 16), generator=torch.Generator().manual_seed(seed)) for seed in range(5)]


@dataclasses.dataclass
class Text:
    """In the place of a `TextStream`: the same batches over and over."""

    passes: int = 1

    def batches(self, size):
        assert size == 4
        yield from itertools.cycle(BATCHES)


def planned(model, recipe=RECIPE):
    return [plan_layer(finding.block, recipe) for finding in find_blocks(model)]


def stand_in(d_model=32):
    """A new layer that does something else than the block did."""
    torch.manual_seed(5)
    return nn.Linear(d_model, d_model).requires_grad_(False)


def fed(model, recipe=RECIPE, folder=None, count=5):
    """The replaced layer 0, and the first batches that layer 1 is fed after it."""
    first, second = planned(model, recipe)
    source = ConvertedInputs(model, Text(), recipe, CPU, folder, Reporter())
    with source.feed([first.block]):
        pass
    new = stand_in()
    source.replace({first: new})
    with source.feed([second.block]) as feed:
        return new, feed.statistics[1], [batch[1] for batch in itertools.islice(feed.batches, count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_are_those_of_the_model_converted_so_far(family):
    model = tiny_model(family)
    blocks = [plan.block for plan in planned(model)]
    new, statistics, batches = fed(model)
    originals = [record_activations(model, blocks[1:], ids)[1] for ids in BATCHES]
    with replaced(model, blocks[:1], {0: new}):
        wanted = [record_activations(model, blocks[1:], ids)[1] for ids in BATCHES]
    assert not torch.equal(wanted[0].x, originals[0].x)
    for batch, converted, original in zip(batches, wanted, originals, strict=True):
        assert torch.equal(batch.x, converted.x.flatten(0, 1))
        assert torch.equal(batch.y, original.y.flatten(0, 1))
    mean = torch.stack([activations.x[:, 1:] for activations in wanted[:4]]).mean((0, 1, 2))
    torch.testing.assert_close(statistics.mean_x, mean)


def test_the_target_may_be_the_blocks_output_on_its_own_input():
    model = tiny_model("llama")
    blocks = [plan.block for plan in planned(model)]
    new, _, batches = fed(model, dataclasses.replace(RECIPE, target="own"))
    with replaced(model, blocks[:1], {0: new}):
        x, y = record_activations(model, blocks[1:], BATCHES[0])[1]
    assert torch.equal(batches[0].x, x.flatten(0, 1)) and torch.equal(batches[0].y, y.flatten(0, 1))


def test_the_target_may_be_what_brings_the_stream_back_to_the_originals():
    model = tiny_model("gpt2")
    blocks = [plan.block for plan in planned(model)]
    new, _, batches = fed(model, dataclasses.replace(RECIPE, target="stream"))
    after: list[torch.Tensor] = []
    with torch.no_grad(), hooked(model.transformer.h[1].register_forward_hook(lambda _m, _a, out: after.append(out))):
        model(BATCHES[0])
        teach = _Says(batches[0].y.view(4, 16, 32))
        with replaced(model, blocks, {0: new, 1: teach}):  # a layer that has learned its target perfectly
            model(BATCHES[0])
    first, second = (out if isinstance(out, torch.Tensor) else out[0] for out in after)
    torch.testing.assert_close(first, second)


class _Says(nn.Module):
    def __init__(self, y):
        super().__init__()
        self.y = y

    def forward(self, x):
        return self.y


def test_a_layer_that_changes_its_blocks_output_has_no_such_target():
    with pytest.raises(UnsupportedBlockError, match="does something to its block's output") as caught:
        fed(tiny_model("gemma2"), dataclasses.replace(RECIPE, target="stream"))
    assert "--target own" in caught.value.fix


def test_hidden_states_on_disk_are_those_in_memory(tmp_path):
    model = tiny_model("gpt2")
    in_memory, on_disk = fed(model)[2], fed(model, folder=tmp_path)[2]
    assert len(list(tmp_path.glob("*.safetensors"))) == len(list(tmp_path.iterdir())) == 5
    for one, other in zip(in_memory, on_disk, strict=True):
        assert torch.equal(one.x, other.x) and torch.equal(one.y, other.y)


def test_the_kept_text_is_read_again_in_another_order():
    model = tiny_model("llama")
    _, _, batches = fed(model, dataclasses.replace(RECIPE, kept_tokens=256), count=12)
    first, again, third = ([batch.x.sum().item() for batch in batches[start : start + 4]] for start in (0, 4, 8))
    assert sorted(first) == sorted(again) == sorted(third) and len(set(first)) == 4
    assert first != again or again != third


def test_original_inputs_come_from_one_pass_for_all_blocks():
    model = tiny_model("llama")
    plans = planned(model)
    source = OriginalInputs(model, Text(), RECIPE, CPU)
    with source.feed([plan.block for plan in plans]) as feed:
        batch = next(feed.batches)
    wanted = record_activations(model, [plan.block for plan in plans], BATCHES[0])
    assert set(batch) == {0, 1}
    assert all(torch.equal(batch[layer].y, wanted[layer].y.flatten(0, 1)) for layer in batch)


def test_a_model_whose_layers_see_the_text_itself_is_refused(monkeypatch):
    model = tiny_model("llama")
    layers = model.model.layers
    forward = type(layers[0]).forward

    def with_text(self, hidden_states, text=None, **kwargs):
        return forward(self, hidden_states, **kwargs)

    def model_forward(input_ids=None, use_cache=None, **_):
        hidden = model.model.embed_tokens(input_ids)
        rotary = model.model.rotary_emb(hidden, torch.arange(16)[None])
        for layer in layers:
            hidden = layer(hidden, text=input_ids, position_embeddings=rotary)
        return hidden

    monkeypatch.setattr(type(layers[0]), "forward", with_text)
    monkeypatch.setattr(model.model, "forward", model_forward)
    with pytest.raises(UnsupportedBlockError, match="given something else on each text"):
        ConvertedInputs(model, Text(), RECIPE, CPU, None, Reporter())


def test_a_model_that_does_something_between_its_layers_is_refused():
    model = tiny_model("llama")
    model.model.layers[1].register_forward_pre_hook(lambda _module, args: (args[0] * 2, *args[1:]))
    with pytest.raises(UnsupportedBlockError, match="what enters layer 1 is not what leaves layer 0"):
        ConvertedInputs(model, Text(), RECIPE, CPU, None, Reporter())
