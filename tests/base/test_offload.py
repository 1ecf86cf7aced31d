"""Weights on disk: the model computes the same, weights are loaded and freed as needed, a conversion gives the same bits."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model

import mxdsurgery
from mxdsurgery.base.decoder import decoder_layers
from mxdsurgery.base.model import open_model
from mxdsurgery.base.offload import execution_device, is_offloaded, on_disk, resident
from mxdsurgery.layers.layer import MxDLayer

IDS = torch.randint(1, 64, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["llama", "gpt2", "gemma2"])
def pair(request, tmp_path):
    """A model in memory, and the same with its weights on disk."""
    model = tiny_model(request.param)
    model.save_pretrained(tmp_path / "model")
    return model, open_model(str(tmp_path / "model")).load(offload=tmp_path / "offload")


def test_an_offloaded_model_computes_the_same_and_holds_no_weights(pair):
    model, offloaded = pair
    assert is_offloaded(offloaded) and not is_offloaded(model)
    assert all(weight.is_meta for weight in offloaded.parameters())
    assert execution_device(offloaded) == execution_device(model) == torch.device("cpu")
    with torch.no_grad():
        assert torch.equal(offloaded(IDS).logits, model(IDS).logits)
    assert all(weight.is_meta for weight in offloaded.parameters())


def test_a_resident_part_has_its_weights_until_it_is_left(pair):
    model, offloaded = pair
    layer, wanted = (decoder_layers(each)[1][0] for each in (offloaded, model))
    state = torch.randn(2, 16, 32)
    with pytest.raises(RuntimeError, match="on leaving"), resident(layer):
        assert all(torch.equal(weight, wanted.get_parameter(name)) for name, weight in layer.named_parameters())
        with torch.no_grad():
            assert torch.equal(offloaded(IDS).logits, model(IDS).logits)
        assert not any(weight.is_meta for weight in layer.parameters())  # a pass does not free them
        raise RuntimeError("on leaving, whatever happens")
    assert all(weight.is_meta for weight in layer.parameters()) and state.isfinite().all()
    with torch.no_grad():
        assert torch.equal(offloaded(IDS).logits, model(IDS).logits)


def test_a_new_layer_on_disk_computes_the_same_through_every_door(tmp_path):
    layer = MxDLayer(
        n_experts=64, k=4, d_model=32, d_hidden=80, kind="glu", activation="silu", encoder_bias=True
    ).requires_grad_(False)
    torch.nn.init.normal_(layer.decoder.weight)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(3, 5, 32)
    wanted = layer(x), layer.coefficients(x), layer.dense_path(x)
    on_disk(layer, tmp_path / "layer.safetensors", torch.device("cpu"))
    assert layer.gate.weight.is_meta and layer.decoder.weight.is_meta and not layer.bias.is_meta
    found = layer(x), layer.coefficients(x), layer.dense_path(x)
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_conversion_gives_the_same_bits_wherever_the_base_models_weights_are(tmp_path):
    options = {"layers": "1-2", "tokens": 6_000, "eval_tokens": 500, "n_experts": 64, "k": 4, "device": "cpu"}
    options |= {"inputs": "converted", "shuffle": 20_000}
    made = [
        mxdsurgery.convert("demo-glu", **options, offload=offload, out=str(tmp_path / offload)) for offload in ("none", "disk")
    ]
    assert [one.plan.offloaded for one in made] == [False, True]
    weights = [load_file(one.out / "model.safetensors") for one in made]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert made[0].evaluation["all"] == made[1].evaluation["all"]
    assert {path.name for path in tmp_path.iterdir()} == {"none", "disk"}  # nothing is left behind


def test_an_interrupted_conversion_keeps_the_layers_that_lie_on_disk(tmp_path, interrupted_in_layer_2):
    options = {"layers": "1-2", "tokens": 5_000, "eval_tokens": 500, "n_experts": 64, "k": 4, "shuffle": 20_000}
    with pytest.raises(KeyboardInterrupt, match="the same call with resume=True goes on"):
        mxdsurgery.convert("demo-glu", **options, inputs="converted", offload="disk", device="cpu", out=str(tmp_path / "out"))
    kept = load_file(next((tmp_path / "out.run" / "checkpoints").iterdir()) / "group_0.safetensors")
    assert kept["1 mxd k4.decoder.weight"].any() and kept["1 mxd k4.gate.weight"].shape == (64, 192)
    assert {path.name for path in tmp_path.iterdir()} == {"out.run"}
