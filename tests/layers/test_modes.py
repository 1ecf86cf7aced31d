"""Every kind of layer in every dtype and mode, on both sides of every size at which sparse.py computes otherwise."""

import copy

import pytest
import torch
from tiny import busy_layer, tiny_opened

from mxdsurgery.layers import sparse
from mxdsurgery.layers.replacement import LAYER_KINDS

KINDS = [kind for kind in LAYER_KINDS if kind != "dense"]
D, N, K = 16, 200, 5
# Gathered rows or all of them: tokens x (K + 8) > N, 4 times as many with batchtopk; top_k by groups from 16 tokens on;
# several chunks of pre-activations (see `small_chunks`).
TOKENS = [1, 7, 15, 16, 70]
# How far from float64 a layer may be, relative to its output: a choice that rounding decides may differ.
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.4, torch.float16: 0.1}


def made(kind, sparsity="topk", dtype=torch.float64):
    return busy_layer(kind, sparsity, d_model=D, d_hidden=24, n_experts=N, k=K, std=0.4).to(dtype)


def inputs(tokens, dtype=torch.float64):
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(1)).to(dtype)


def inside(mode, layer, x):
    with mode:
        return layer(x)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setitem(sparse.CHUNK_BYTES, "cpu", 30 * N * 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparsity", ["topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_computes_the_same_in_every_mode(kind, sparsity, dtype, small_chunks):
    layer, wide = made(kind, sparsity, dtype), made(kind, sparsity)
    wide.load_state_dict(layer.state_dict())  # rounded alike
    with torch.inference_mode():
        inner = copy.deepcopy(layer)  # as a model that was loaded there
    for tokens in TOKENS:
        x = inputs(tokens, dtype)
        plain = inside(torch.no_grad(), layer, x)
        wanted = inside(torch.no_grad(), wide, x.double())
        assert plain.dtype == dtype
        difference = (plain.double() - wanted).square().mean() / wanted.square().mean()
        assert difference.sqrt() < DTYPES[dtype]
        assert torch.equal(inside(torch.inference_mode(), layer, x), plain)
        assert torch.equal(inside(torch.inference_mode(), inner, x), plain)
        assert torch.equal(inside(torch.no_grad(), inner, x), plain)
        assert torch.equal(layer(x).detach(), plain)
        assert torch.equal(torch.func.functional_call(layer, layer.state_dict(), (x,)).detach(), plain)
        parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(layer(x.requires_grad_()).float().sum(), [x, *parameters])
        assert all(gradient.isfinite().all() and gradient.dtype == dtype for gradient in gradients)
        assert gradients[0].any()


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_does_not_reach_the_sparse_products(dtype, lower):
    layer = made("transcoder", dtype=dtype)  # all of it is sparse
    for tokens in TOKENS:
        x = inputs(tokens, dtype)
        with torch.autocast("cpu", lower), torch.no_grad():
            assert torch.equal(layer(x), inside(torch.autocast("cpu", enabled=False), layer, x).detach())
            values, indices = layer.gate(x)
            wide = layer.gate.weight.double()[indices]
            exact = torch.einsum("nd,nkd->nk", x.double(), wide) + layer.gate.bias.double()[indices]
            torch.testing.assert_close(values.double(), exact.relu(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_interventions_in_every_mode_and_dtype(mode, dtype):
    model = tiny_opened().converted.model.to(dtype)
    ids = torch.arange(1, 61).view(2, 30)
    changes = model.mxd.steer({0: {3: 2.0}}, positions=[4]).drop({0: [5]}).drop({1: [6]}, positions=[1]).clamp({1: {7: 1.0}})
    changes = (
        changes.merge({0: [[8, 9]]}).copy({1: {2: 4}}).scale({0: {1: 2.0}}).ablate({1: [0]}).replace({1: {4: [0.1] * 32}})
    )
    with mode():
        before = model(ids).logits
        with changes:
            inner = model(ids).logits
    with changes:
        outer = model(ids).logits
    assert torch.equal(inner, outer) and not torch.equal(inner, before) and inner.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "dtype"), [("mxd", torch.float32), ("skip-transcoder", torch.bfloat16), ("molt", torch.float32)], ids=str
)
def test_a_layer_is_compiled_whole_and_exported(kind, dtype):
    torch._dynamo.reset()
    layer, x = made(kind, dtype=dtype), inputs(70, dtype)
    compiled, exported = torch.compile(layer, backend="aot_eager", fullgraph=True), torch.export.export(layer, (x,)).module()
    wanted = layer(x).detach()
    found = compiled(x), inside(torch.inference_mode(), compiled, x), exported(x)
    for one in found:
        assert (one - wanted).double().square().mean() < DTYPES[dtype] ** 2 * wanted.double().square().mean()
    mine, theirs = (torch.autograd.grad(f(x).float().sum(), list(layer.parameters())) for f in (compiled, layer))
    for one, other in zip(mine, theirs, strict=True):
        assert (one - other).double().square().mean() < DTYPES[dtype] ** 2 * other.double().square().mean()


@pytest.mark.parametrize(
    ("kind", "sparsity", "dtype"),
    [
        ("mxd", "topk", torch.float32),
        ("mxd", "batchtopk", torch.bfloat16),
        ("skip-transcoder", "topk", torch.bfloat16),
        ("topk-sae", "topk", torch.float32),
        ("molt", "jumprelu", torch.float32),
    ],
    ids=str,
)
def test_a_layer_is_exported_for_any_number_of_tokens(kind, sparsity, dtype, small_chunks):
    """On each side of every size at which it computes otherwise, in one program."""
    layer = made(kind, sparsity, dtype).requires_grad_(False)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    exported = torch.export.export(layer, (inputs(40, dtype),), dynamic_shapes=({0: tokens},)).module()
    for number in (2, *TOKENS[1:], 4096):
        x = inputs(number, dtype)
        wanted = layer(x)
        difference = (exported(x) - wanted).double().square().mean() / wanted.double().square().mean()
        assert difference.sqrt() < DTYPES[dtype], number
