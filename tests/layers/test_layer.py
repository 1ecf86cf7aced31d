"""The layer: the fast path, the dense formula and the explicit mixture are the same function."""

import copy

import pytest
import torch
from tiny import make_layer
from torch.nn.utils import parameters_to_vector

from mxdsurgery.layers.layer import Coefficients, Gate, MxDLayer

KINDS = pytest.mark.parametrize(("kind", "activation", "encoder_bias"), [("mlp", "gelu_new", True), ("glu", "silu", False)])


def explicit_mixture(layer, x):
    """``Σ_n a_n W_n z + b`` with every expert's matrix ``W_n = diag(c_n) D`` materialised."""
    a = layer.gate(x).dense(layer.gate.weight.shape[0])
    experts = layer.experts.weight[:, :, None] * layer.decoder.weight  # (N, D, H)
    return torch.einsum("...n,ndh,...h->...d", a, experts, layer.hidden(x)) + layer.bias


def gradients(layer, function, x):
    x = x.clone().requires_grad_()
    weights = torch.linspace(-1, 1, 12, dtype=x.dtype)
    return torch.autograd.grad((function(x) * weights).square().sum(), [x, *layer.parameters()])


@KINDS
def test_fast_dense_and_explicit_mixture_agree_in_values_and_gradients(kind, activation, encoder_bias):
    layer = make_layer(kind, activation, encoder_bias)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    fast = layer(x)
    functions = (layer.forward_dense, lambda x: explicit_mixture(layer, x))
    for function in functions:
        torch.testing.assert_close(fast, function(x), rtol=1e-12, atol=1e-12)
        for mine, theirs in zip(gradients(layer, layer, x), gradients(layer, function, x), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_fast_and_dense_agree_in_working_precision(dtype, tolerance):
    layer = make_layer(dtype=dtype)
    x = torch.randn(50, 12, dtype=dtype)
    fast = layer(x).float()  # ranks as fp32 does, whatever the dtype
    slow = layer.float().forward_dense(x.float())
    torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance * fast.abs().max().item())


def test_a_forward_hook_on_the_gate_reads_and_changes_the_coefficients():
    layer, x = make_layer(), torch.randn(3, 4, 12, dtype=torch.float64)
    seen = []
    handle = layer.gate.register_forward_hook(lambda _m, _a, a: seen.append(a))
    layer(x)
    handle.remove()
    assert seen[0].values.shape == (3, 4, 5) and (seen[0].values >= 0).all()

    handle = layer.gate.register_forward_hook(lambda _m, _a, a: Coefficients(torch.zeros_like(a.values), a.indices))
    silenced = layer(x)
    handle.remove()
    assert torch.equal(silenced, layer.bias.expand_as(silenced))

    def add_expert_3(_module, _args, a):
        one = torch.ones_like(a.values[..., :1])
        return Coefficients(torch.cat([a.values, one], -1), torch.cat([a.indices, one.long() * 3], -1))

    handle = layer.gate.register_forward_hook(add_expert_3)
    steered = layer(x)
    handle.remove()
    expected = layer(x) + layer.experts.weight[3] * layer.decoder(layer.hidden(x))
    torch.testing.assert_close(steered, expected)


def test_a_token_with_no_positive_pre_activation_gets_the_bias():
    gate = Gate(12, 40, 5)
    with torch.no_grad():
        gate.bias.fill_(-1e6)
    assert (gate(torch.randn(6, 12)).values == 0).all()


def test_the_papers_start_has_zero_output_and_unit_rows():
    layer = MxDLayer(d_model=12, d_hidden=20, n_experts=40, k=5, kind="mlp", activation="relu", encoder_bias=True)
    torch.testing.assert_close(layer.experts.weight.norm(dim=1), torch.ones(40))
    assert (layer(torch.randn(3, 12)) == 0).all()


def test_training_the_fast_path_and_the_dense_path_leads_to_the_same_weights():
    fast = make_layer(dtype=torch.float64)
    dense = copy.deepcopy(fast)
    x, y = torch.randn(64, 12, dtype=torch.float64), torch.randn(64, 12, dtype=torch.float64)
    for layer, function in ((fast, fast), (dense, dense.forward_dense)):
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
        for _ in range(10):
            optimizer.zero_grad()
            (function(x) - y).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(
        parameters_to_vector(fast.parameters()), parameters_to_vector(dense.parameters()), rtol=1e-8, atol=1e-8
    )
