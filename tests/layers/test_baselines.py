"""The layers beside MxDLayer: their formulas, starts, sparsity functions and the revival of dead experts."""

import copy
import dataclasses
import warnings

import pytest
import torch
from tiny import IDS, RECIPE, batches, export_tiny, nmse, tiny_model, train
from torch import nn

import mxdsurgery
from mxdsurgery.base.finding import find_blocks
from mxdsurgery.base.surgery import FrozenExperts
from mxdsurgery.checkpoint.converted import load
from mxdsurgery.layers.layer import BATCH_TOP_K_LIMIT, Gate
from mxdsurgery.layers.replacement import LAYER_KINDS
from mxdsurgery.planning.plan import plan_layer
from mxdsurgery.recipe import Recipe
from mxdsurgery.training.distill import LayerInTraining, _auxk_loss
from mxdsurgery.training.initialize import initial_layer, measure_statistics
from mxdsurgery.training.parameters import layer_parameters, matched_n_experts, transcoder_parameters

KINDS = pytest.mark.parametrize("kind", LAYER_KINDS)
BASELINES = pytest.mark.parametrize("kind", ["transcoder", "skip-transcoder", "topk-sae"])


def started(kind, family="llama", **keys):
    model = tiny_model(family)
    block = find_blocks(model)[0].block
    recipe = Recipe(kind=kind, n_experts=None if kind == "dense" else 48, k=4, **keys)
    statistics = measure_statistics(model, [block], [next(batches())])[0]
    plan = plan_layer(block, recipe)
    return model, plan, initial_layer(model, plan, recipe, statistics), statistics


def randomised(layer):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return layer.double()


@BASELINES
def test_a_baseline_is_its_formula(kind):
    _, plan, layer, _ = started(kind)
    layer, x = randomised(layer), torch.randn(7, 32, dtype=torch.float64)
    read = layer.block(x) if kind == "topk-sae" else x
    pre = read @ layer.gate.weight.T + layer.gate.bias
    top = pre.relu().topk(4, dim=-1)
    a = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
    expected = a @ layer.experts.weight + layer.bias
    if kind == "skip-transcoder":
        expected = expected + x @ layer.skip.weight.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


@KINDS
def test_it_has_the_parameters_that_the_plan_counts(kind):
    _, plan, layer, _ = started(kind)
    assert plan.parameters == sum(p.numel() for p in layer.parameters() if p.requires_grad)
    assert plan.all_parameters == sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize("kind", ["mxd", "transcoder", "skip-transcoder", "topk-sae", "molt"])
def test_all_kinds_are_matched_to_the_same_number_of_parameters(kind):
    block = find_blocks(tiny_model("gpt2"))[0].block
    budget = transcoder_parameters(block, 32)
    parameters = layer_parameters(block, matched_n_experts(block, budget, kind), kind)
    assert budget - (2 * block.d_model + 1) <= parameters + (block.d_hidden if kind == "mxd" else 0) <= budget + block.d_hidden


def test_transcoders_start_at_the_mean_output_with_a_centred_gate():
    for kind in ("transcoder", "skip-transcoder"):
        _, _, layer, statistics = started(kind)
        x = torch.randn(5, 32)
        torch.testing.assert_close(layer(x), statistics.mean_y.expand_as(x))
        torch.testing.assert_close(layer.gate.pre_activations(statistics.mean_x), torch.zeros(48), atol=1e-5, rtol=0)


def test_an_autoencoder_starts_tied_and_holds_the_block_frozen():
    model, plan, layer, statistics = started("topk-sae")
    x = torch.randn(5, 32)
    torch.testing.assert_close(layer.block(x), model.base_model.get_submodule(plan.block.path)(x), rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in layer.block.parameters())
    cosines = torch.cosine_similarity(layer.experts.weight, layer.gate.weight)
    torch.testing.assert_close(cosines, torch.ones(48))
    torch.testing.assert_close(layer.gate.pre_activations(statistics.mean_y), torch.zeros(48), atol=1e-5, rtol=0)


@KINDS
def test_every_kind_learns_on_text_it_has_not_seen(kind):
    model = tiny_model("llama")
    recipe = Recipe(kind=kind, n_experts=64, k=4, batch=512, context=16, lr=3e-3)
    layers, progress, blocks = train(model, recipe, steps=120, layers=(0,))
    layers[0].eval()
    assert nmse(model, blocks, layers)[0] < {"dense": 0.1, "mxd": 0.5, "topk-sae": 0.7}.get(kind, 0.85)
    assert len(progress.nmse) == 1


@KINDS
@pytest.mark.parametrize("sparsity", ["topk", "batchtopk", "jumprelu"])
def test_every_kind_is_exported_and_reloaded(kind, sparsity, tmp_path):
    recipe = dataclasses.replace(RECIPE, kind=kind, sparsity=sparsity)
    model, blocks, layers, differences = export_tiny("llama", tmp_path / "out", recipe=recipe)
    assert differences == {"logits": 0.0, "hidden": 0.0}
    loaded = load(tmp_path / "out")
    assert type(loaded.layers[0]) is LAYER_KINDS[kind] and loaded.plan.layers[0].kind == kind
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        assert torch.equal(loaded.layers[1](x), layers[1](x))
        assert loaded.model(IDS).logits.isfinite().all()


def test_frozen_experts_say_the_same_for_every_token():
    for kind in ("mxd", "transcoder", "skip-transcoder", "topk-sae"):
        _, _, layer, _ = started(kind)
        layer, x = randomised(layer), torch.randn(2, 5, 32, dtype=torch.float64)
        constant = torch.randn(32, dtype=torch.float64)
        with torch.no_grad():
            frozen = FrozenExperts(layer, constant)(x)
            layer.experts.forward = lambda a, c=constant: c
            torch.testing.assert_close(frozen, layer(x).expand_as(x))


def gate(sparsity="batchtopk", k=4, n=64):
    torch.manual_seed(0)
    made = Gate(32, n, k, sparsity)
    with torch.no_grad():
        made.bias.uniform_(-1, 1)
    return made


def test_batch_top_k_keeps_k_per_token_on_average_in_training():
    made, x = gate(), torch.randn(200, 32) * torch.linspace(0.2, 3, 200)[:, None]
    a = made(x)
    kept = (a.values > 0).sum(-1)
    assert a.values.shape == (200, BATCH_TOP_K_LIMIT * 4)
    assert kept.sum() == 4 * 200 and kept.min() < 4 < kept.max()
    pre = made.pre_activations(x).relu()
    best = pre.topk(16, dim=-1).values.flatten().topk(800).values
    torch.testing.assert_close(a.values[a.values > 0].sort().values, best.sort().values)


def test_batch_top_k_uses_the_threshold_of_training_afterwards_whatever_the_batch():
    made = gate()
    for seed in range(300):
        made(torch.randn(200, 32, generator=torch.Generator().manual_seed(seed)))
    made.eval()
    x = torch.randn(2000, 32, generator=torch.Generator().manual_seed(999))
    a = made(x)
    assert (a.values > 0).sum(-1).float().mean() == pytest.approx(4, rel=0.1)
    assert (a.values[a.values > 0] >= made.threshold).all()
    torch.testing.assert_close(made(x[:1]).values, a.values[:1])


def inputs(n, seed):
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(seed))


def l0(made, x):
    return (made.eval()(x).values > 0).sum(-1).float().mean().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_batch_top_k_gate_keeps_k_per_token_in_low_precision(dtype):
    made, x = gate(k=8, n=512), inputs(20_000, 999)
    for seed in range(300):
        made(inputs(400, seed))
    assert l0(made, x) == pytest.approx(8, rel=0.01)
    made.threshold.mul_(2.0047 / made.threshold)  # rounds to 2 in bfloat16
    exact, low = l0(made, x), copy.deepcopy(made).to(dtype)
    assert low.weight.dtype == dtype and low.threshold.dtype == torch.float32 and torch.equal(low.threshold, made.threshold)
    assert l0(low, x.to(dtype)) == pytest.approx(exact, rel=0.002)
    with torch.autocast("cpu", torch.bfloat16):
        assert l0(made, x) == pytest.approx(exact, rel=0.002)
        assert l0(low, x[:300].to(dtype)) == l0(low, x[:300].to(dtype))
    low.threshold = made.threshold.to(torch.bfloat16)
    assert abs(l0(low, x.to(dtype)) / exact - 1) > 0.01  # what rounding it did


def test_nothing_casts_the_threshold_of_a_batch_top_k_gate():
    made = gate()
    made(inputs(200, 0))
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.bfloat16), lambda m: m.to("meta")):
        layer = nn.Sequential(copy.deepcopy(made))
        cast(layer)
        assert layer[0].threshold.dtype == torch.float32 and layer[0].threshold.device == layer[0].weight.device
        assert layer[0].threshold.is_meta or torch.equal(layer[0].threshold, made.threshold)
    made.double()(inputs(200, 1).double())
    assert made.threshold.dtype == torch.float32


def test_a_topk_gate_has_no_threshold_in_its_state():
    assert set(gate("topk").state_dict()) == {"weight", "bias"}
    assert set(gate().state_dict()) == {"weight", "bias", "threshold"}


@pytest.mark.parametrize("kind", ["mxd", "transcoder"])
def test_auxk_gives_dead_experts_a_gradient_and_living_ones_none(kind):
    _, _, layer, _ = started(kind)
    with torch.no_grad():
        layer.gate.bias[:10] = -1e3  # never among the K, and still on the positive side of relu after this
        torch.nn.init.normal_(layer.experts.weight)
        if kind == "mxd":
            torch.nn.init.normal_(layer.decoder.weight)
    job = LayerInTraining("it", layer, Recipe(auxk=0.1, precision="fp32", selection="fp32"), dead_after=100)
    job.last_fired[:] = 1000
    job.last_fired[:10] = 0
    with torch.no_grad():
        layer.gate.bias[:10] = 0.5
    x, y = torch.randn(50, 32), torch.randn(50, 32)
    scale = layer.dense_path(x)[0].detach()
    loss = _auxk_loss(job, x, scale, y, y, tokens_seen=1000)
    loss.backward()
    for weight in (layer.gate.weight, layer.experts.weight):
        moved = weight.grad.abs().sum(1) > 0
        assert moved[:10].any() and not moved[10:].any()
    job.last_fired[:] = 1000
    assert _auxk_loss(job, x, scale, y, y, tokens_seen=1000) == 0.0


def test_unit_norm_keeps_a_transcoders_rows_at_unit_length():
    layers, _, _ = train(tiny_model("llama"), Recipe(kind="transcoder", n_experts=64, k=4, unit_norm=True, batch=512), steps=5)
    torch.testing.assert_close(layers[0].experts.weight.norm(dim=1), torch.ones(64))


def test_only_a_pretrained_mixture_of_decoders_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        started("dense", init="pretrained")
        started("transcoder", init="pretrained")


@pytest.mark.parametrize(
    ("kind", "said"), [("skip-transcoder", "N = 100 experts each, K = 4"), ("dense", "dense layers of the same width")]
)
def test_a_baseline_is_converted_evaluated_and_described_like_an_mxd_model(kind, said, tmp_path):
    keys = {"tokens": 12_000, "eval_tokens": 2_000, "batch": 1024, "k": 4, "shuffle": 0, "device": "cpu"}
    n_experts = {} if kind == "dense" else {"n_experts": 100}
    made = mxdsurgery.convert("demo-glu", layers="1", kind=kind, out=str(tmp_path / "out"), **keys, **n_experts)
    again = mxdsurgery.evaluate(made.out)
    assert again["all"] == made.evaluation["all"]
    assert again["all"].items() <= again["layers"][0].items()
    card = (made.out / "README.md").read_text()
    assert said in card and ("gate" in card) == (kind != "dense")
    assert type(load(made.out).layers[1]) is LAYER_KINDS[kind]
