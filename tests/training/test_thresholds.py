"""Thresholds of `jumprelu` gates: what they choose, what they learn, and that a token has K experts on average."""

import copy
import dataclasses

import pytest
import torch
from tiny import IDS, RECIPE, batches, fed, tiny_model, train
from torch import nn

from mxdsurgery.base.activations import record_activations
from mxdsurgery.layers.layer import BATCH_TOP_K_LIMIT, Gate
from mxdsurgery.training.distill import LayerInTraining
from mxdsurgery.training.thresholds import LearnedThresholds

K, N, D = 4, 64, 32


def gate(seed=0):
    torch.manual_seed(seed)
    made = Gate(D, N, K, "jumprelu").double()
    made.bias.data.uniform_(-0.1, 0.1)
    made.threshold.uniform_(0.4, 1.2)
    return made


def inputs(n, seed=1):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_an_expert_fires_where_it_exceeds_its_own_threshold():
    made, x = gate().eval(), inputs(300)
    made.threshold.mul_(1.5)
    a = made(x)
    assert a.values.shape == (300, BATCH_TOP_K_LIMIT * K)
    z = made.pre_activations(x)
    assert (z > made.threshold).sum(-1).max() <= BATCH_TOP_K_LIMIT * K  # the limit cuts nothing here
    torch.testing.assert_close(a.dense(N), torch.where(z > made.threshold, z, 0))
    torch.testing.assert_close(made(x[:1]).dense(N), a.dense(N)[:1])  # whatever the batch
    made.threshold.fill_(-9.0)  # all exceed it: those that do by most
    assert torch.equal(made(x).indices.sort().values, z.topk(BATCH_TOP_K_LIMIT * K).indices.sort().values)


def test_the_derivative_by_a_threshold_is_the_kernels():
    """``da/dθ = -θ/ε`` and ``dL0/dθ = -1/ε`` within half of ε around θ, else nothing; ε is a tenth of θ."""
    made, x = gate().train(), inputs(400)
    made.threshold.mul_(1.5)
    learned, upstream = LearnedThresholds(made), torch.randn(400, N, dtype=torch.float64)
    (made(x).dense(N) * upstream).sum().backward()
    z, theta = made.pre_activations(x).detach(), made.threshold.double()
    width = 0.1 * theta
    near = (z - theta).abs() < width / 2
    by_theta = -(upstream * near * theta / width).sum(0)
    torch.testing.assert_close(learned.log.grad.double(), by_theta * theta, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(learned.near.double(), (near / width * theta).sum(0), rtol=1e-4, atol=1e-4)
    assert learned.log.grad.abs().max() > 1
    fires = z > theta
    torch.testing.assert_close(made.weight.grad, (upstream * fires).T @ x)  # the others' is the true one
    learned.log.grad.copy_(-learned.log.grad.abs())  # a firing is worth nothing: it has no price
    before = learned.log.grad.clone()
    learned.charge()
    assert torch.equal(learned.log.grad, before)
    learned.log.grad.neg_()
    learned.charge()
    assert abs(learned.log.grad.sum()) < 1e-4 * learned.log.grad.abs().sum()  # thresholds move against each other


def test_all_thresholds_follow_what_fires():
    made = gate().train()
    learned = LearnedThresholds(made)
    for seed in range(60):
        made(inputs(500, seed))
        learned.follow()
    made.eval()
    assert (made(inputs(5000, 99)).values > 0).sum(-1).double().mean() == pytest.approx(K, rel=0.05)
    assert torch.equal(made.threshold, learned.log.detach().exp())


@pytest.mark.parametrize("kind", ["mxd", "transcoder", "topk-sae", "molt"])
def test_a_trained_layer_has_k_experts_on_average_with_thresholds_of_their_own(kind):
    model = tiny_model("llama")
    layers, _, blocks = train(model, dataclasses.replace(RECIPE, kind=kind, sparsity="jumprelu"), steps=150, layers=(0,))
    layer = layers[0].eval()
    x = record_activations(model, blocks, torch.cat([next(batches(seed)) for seed in range(90, 96)]))[0].x
    assert (layer.coefficients(x).values > 0).sum(-1).double().mean() == pytest.approx(4, rel=0.15)
    assert layer.gate.learning is None and layer.gate.threshold.std() > 0.005 * layer.gate.threshold.mean()
    with torch.no_grad():
        before = layer(x)
        layer.train()  # outside of a training of ours, thresholds are what they are
        assert torch.equal(layer(x), before)


def test_a_stopped_training_goes_on_with_the_same_thresholds():
    model, recipe = tiny_model("llama"), dataclasses.replace(RECIPE, sparsity="jumprelu")
    layers, _, blocks = train(model, recipe, steps=5, layers=(0,))
    x, y = (part.flatten(0, 1) for part in record_activations(model, blocks, IDS)[0])
    job = LayerInTraining("it", layers[0].train(), recipe)
    assert job.thresholds.begun and torch.allclose(job.thresholds.log.exp(), layers[0].gate.threshold)
    (layers[0](x) - y).square().sum().backward()
    job.optimizer.step()
    other = LayerInTraining("other", copy.deepcopy(layers[0]), recipe)
    other.restore({name: tensor.clone() for name, tensor in job.state().items()})
    assert torch.equal(other.thresholds.log, job.thresholds.log) and other.layer.gate.learning is other.thresholds


def test_nothing_casts_thresholds():
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.bfloat16)):
        layer = nn.Sequential(gate())
        exact = layer[0].threshold.clone()
        cast(layer)
        assert layer[0].threshold.dtype == torch.float32 and torch.equal(layer[0].threshold, exact)


def test_training_feeds_the_first_batch_before_any_threshold_is_known():
    model = tiny_model("llama")
    recipe = dataclasses.replace(RECIPE, sparsity="jumprelu", k_start=4)
    layers, _, blocks = train(model, recipe, steps=1, layers=(0,))
    x = next(fed(model, blocks))[0].x
    found = (layers[0].eval().coefficients(x).values > 0).sum(-1).double().mean()
    assert found == pytest.approx(4, rel=0.3) and layers[0].gate.threshold.min() > 0


def test_a_gate_in_evaluation_mode_keeps_its_thresholds_while_others_train():
    made = gate().eval()
    learned, before = LearnedThresholds(made), made.threshold.clone()
    made(inputs(200)).values.sum().backward()
    learned.charge()
    learned.follow()
    torch.testing.assert_close(made.threshold, before)
    made.train()
    for seed in range(12):  # from several times K per token
        made(inputs(500, seed))
        learned.follow()
    assert (made.eval()(inputs(5000, 99)).values > 0).sum(-1).double().mean() == pytest.approx(K, rel=0.1)
