"""Derivatives of any order, by every way that torch has: of every kind of layer, and with interventions in force."""

import pytest
import torch
from tiny import busy_layer, tiny_opened
from torch.autograd.functional import hessian, jacobian, jvp
from torch.func import functional_call, grad, jacfwd, jacrev, linearize, vmap
from torch.func import hessian as hessian_by_func
from torch.func import jvp as jvp_by_func

from mxdsurgery.layers.replacement import LAYER_KINDS

KINDS = [kind for kind in LAYER_KINDS if kind != "dense"]
D = 7


def made(kind, sparsity="topk", n_experts=20, k=3):
    return busy_layer(kind, sparsity, d_model=D, d_hidden=9, n_experts=n_experts, k=k, std=0.6).double()


def finite_differences(function, x, v, step=1e-6):
    """``J v``."""
    return (function(x + step * v) - function(x - step * v)) / (2 * step)


def squared(layer):
    return lambda x: layer(x).square().sum()


@pytest.fixture(params=[(kind, sparsity) for kind in KINDS for sparsity in ("topk", "batchtopk", "jumprelu")], ids="-".join)
def layer(request):
    return made(*request.param)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_gradients_of_first_and_second_order_are_those_of_finite_differences(layer):
    """Backward, forward, batched, and each of them after the other; by x and by every parameter."""
    weights = dict(layer.named_parameters())

    def function(x, *parameters):
        return functional_call(layer, dict(zip(weights, parameters, strict=True)), (x,))

    x = torch.randn(4, D, dtype=torch.float64)
    given = [tensor.detach().clone().requires_grad_() for tensor in (x, *weights.values())]
    batched = {"check_batched_grad": True, "fast_mode": True}
    assert torch.autograd.gradcheck(function, given, check_forward_ad=True, check_batched_forward_grad=True, **batched)
    assert torch.autograd.gradgradcheck(function, given, check_fwd_over_rev=True, check_rev_over_rev=True, **batched)


def test_jacobians_by_torch_func_are_those_by_autograd(layer):
    x, v = torch.randn(2, 4, D, dtype=torch.float64)
    wanted = jacobian(layer, x)
    assert wanted.abs().max() > 0.1
    product = torch.einsum("ndme,me->nd", wanted, v)
    torch.testing.assert_close(product, finite_differences(layer, x, v), rtol=1e-6, atol=1e-6)
    for found in (jacrev(layer)(x), jacfwd(layer)(x), jacobian(layer, x, vectorize=True)):
        close(found, wanted)
    close(jacobian(layer, x, vectorize=True, strategy="forward-mode"), wanted)
    for by in (jvp, lambda f, x, v: jvp_by_func(f, (x,), (v,))):
        output, found = by(layer, x, v)
        close(output.detach(), layer(x).detach())
        close(found, product)
    close(linearize(layer, x)[1](v), product)
    close(vmap(layer)(x), layer(x))
    alone = torch.einsum("ndne->nde", wanted)  # a token's output depends on its own input only
    close(vmap(jacrev(layer))(x), alone)
    close(vmap(jacfwd(layer))(x), alone)


def test_second_derivatives(layer):
    f, x = squared(layer), torch.randn(2, D, dtype=torch.float64)
    wanted = hessian(f, x)
    assert wanted.abs().max() > 0.1
    for found in (hessian_by_func(f)(x), jacrev(jacrev(f))(x), jacfwd(jacfwd(f))(x)):
        close(found, wanted)


def test_gradients_of_single_samples_and_an_ensemble(layer):
    weights = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    x = torch.randn(3, D, dtype=torch.float64)

    def loss(weights, x):
        return functional_call(layer, weights, (x[None],)).square().sum()

    each = vmap(grad(loss), (None, 0))(weights, x)
    together = grad(lambda weights: functional_call(layer, weights, (x,)).square().sum())(weights)
    for name in weights:
        close(each[name].sum(0), together[name])
    several = {name: torch.stack([weight, 1.1 * weight]) for name, weight in weights.items()}
    found = vmap(lambda weights: functional_call(layer, weights, (x,)))(several)
    for place in range(2):
        close(found[place], functional_call(layer, {name: many[place] for name, many in several.items()}, (x,)))


def test_a_derivative_in_training_is_no_step_of_the_threshold():
    layer, x = made("mxd", "batchtopk").train(), torch.randn(4, D, dtype=torch.float64)
    wanted = jacobian(layer, x)
    threshold = layer.gate.threshold.clone()
    close(jacrev(layer)(x), wanted)
    close(jacfwd(layer)(x), wanted)
    assert torch.equal(layer.gate.threshold, threshold)


def test_weights_in_low_precision_have_jacobians_too():
    layer, x = made("mxd").bfloat16(), torch.randn(4, D).bfloat16()
    found = jacrev(layer)(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), jacrev(layer.float())(x.float()), rtol=0.1, atol=0.3)


def test_interventions_are_differentiated_through():
    model = tiny_opened().converted.model
    layer, x, v = model.mxd.layers[0], *torch.randn(2, 3, 32, dtype=torch.float64)
    plain = jacrev(layer)(x)
    changes = model.mxd.steer({0: {3: 1.0}}).drop({0: [5]}).clamp({0: {7: 1.0}}, when="firing").merge({0: [[8, 9]]})
    with changes.copy({0: {2: 4}}).scale({0: {1: 2.0}}).ablate({0: [0]}).replace({0: {4: [0.1] * 32}}):
        wanted = jacobian(layer, x)
        for found in (jacrev(layer)(x), jacfwd(layer)(x)):
            close(found, wanted)
        close(vmap(layer)(x), layer(x))
        torch.testing.assert_close(jvp(layer, x, v)[1], finite_differences(layer, x, v), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(wanted, plain)


def test_the_whole_model_has_jacobians():
    model = tiny_opened().converted.model
    model.set_attn_implementation("eager")  # torch's own has no forward-mode derivative on a CPU
    embedded = torch.randn(1, 5, 32, dtype=torch.float64)

    def last(embedded):
        return model(inputs_embeds=embedded, use_cache=False).logits[0, -1, :3]

    wanted = jacobian(last, embedded)
    for by in (jacrev, jacfwd):
        torch.testing.assert_close(by(last)(embedded), wanted, rtol=1e-4, atol=1e-5)  # Llama's norms compute in float32
