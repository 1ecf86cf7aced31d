"""The sparse products: equal to the dense formulas in values and gradients, in plain torch and in Triton."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mxdsurgery.layers import sparse
from mxdsurgery.layers.sparse import dots, mix, scatter, select, sparse_gate, top_k


def problem(n=9, d=6, rows=15, k=4, dtype=torch.float64, device="cpu", seed=0):
    """x (n, d), weight (rows, d), bias (rows,), values and distinct indices (n, k)."""
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias, values = (
        torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((n, d), (rows, d), (rows,), (n, k))
    )
    indices = torch.stack([torch.randperm(rows, generator=generator)[:k] for _ in range(n)])
    return *(t.to(device=device, dtype=dtype) for t in (x, weight, bias, values)), indices.to(device)


def dense_coefficients(values, indices, rows):
    """(n, K) values at indices as a dense (n, rows) matrix."""
    return values.new_zeros(len(values), rows).scatter_add(1, indices, values)


def check_products(dtype, tolerance, device="cpu", **shape):
    """mix, dots and scatter against dense products in float64."""
    x, weight, _, values, indices = problem(dtype=dtype, device=device, **shape)
    a, w, wide = dense_coefficients(values.double(), indices, len(weight)), weight.double(), x.double()
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(mix(values, indices, weight).double(), a @ w, **close)
    torch.testing.assert_close(dots(x, indices, weight).double(), (wide @ w.T).gather(1, indices), **close)
    torch.testing.assert_close(scatter(values, indices, x, weight).double(), a.T @ wide, **close)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.25)], ids=str
)
def test_the_three_products_are_the_dense_ones(dtype, tolerance):
    check_products(dtype, tolerance, n=50, d=33, rows=70, k=7)


def test_gradients_are_those_of_finite_differences():
    x, weight, bias, values, indices = (t.requires_grad_(t.is_floating_point()) for t in problem())
    assert torch.autograd.gradcheck(lambda *args: sparse_gate(*args, 4)[0], (x, weight, bias))
    assert torch.autograd.gradcheck(lambda v, w: mix(v, indices, w), (values, weight))


@pytest.mark.parametrize(("selection", "tolerance"), [(None, 1e-5), (torch.bfloat16, 1e-5)], ids=str)
def test_the_gate_is_the_dense_gate_in_values_and_gradients(selection, tolerance):
    x, weight, bias, *_ = problem(n=64, d=48, rows=400, dtype=torch.float32)
    upstream = torch.linspace(-1, 1, 64 * 400).view(64, 400)
    arguments = [t.requires_grad_() for t in (x, weight, bias)]
    values, indices = sparse_gate(*arguments, 16, selection)
    mine = dense_coefficients(values, indices, 400)
    pre = torch.nn.functional.linear(*arguments).relu()
    theirs = pre * torch.zeros_like(pre).scatter(1, pre.topk(16).indices, 1.0)
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    gradients = [torch.autograd.grad((a * upstream).sum(), arguments, retain_graph=True) for a in (mine, theirs)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_needs_no_gradient_gets_none():
    x, weight, bias, *_ = problem()
    values, _ = sparse_gate(x, weight.requires_grad_(), bias, 4)
    values.sum().backward()
    assert weight.grad is not None and x.grad is None and bias.grad is None


def test_selection_in_bf16_chooses_what_fp32_chooses_and_returns_fp32_values():
    x, weight, bias, *_ = problem(n=300, d=128, rows=4000, dtype=torch.float32)
    exact, chosen = select(x, weight, bias, 32)
    ranked, candidates = select(x, weight, bias, 32, torch.bfloat16)
    same = (chosen.sort().values == candidates.sort().values).all(1).float().mean().item()
    without_extra = torch.topk((x.bfloat16() @ weight.bfloat16().T + bias.bfloat16()), 32).indices
    naive = (chosen.sort().values == without_extra.sort().values).all(1).float().mean().item()
    assert same > 0.99 > naive
    torch.testing.assert_close(ranked.sort().values, exact.sort().values, rtol=1e-4, atol=1e-2)
    assert ranked.dtype == torch.float32


@pytest.mark.parametrize("tokens", [100, 5])  # more and fewer candidates than rows
def test_weights_in_bf16_are_ranked_exactly_too(tokens):
    x, weight, bias, *_ = problem(n=tokens, d=64, rows=600, dtype=torch.bfloat16)
    _, indices = select(x, weight, bias, 8)
    wanted = (x.float() @ weight.float().T + bias.float()).topk(8).indices
    assert (indices.sort().values == wanted.sort().values).all(1).float().mean() > 0.98


@pytest.mark.parametrize("k", [1, 38, 40])
def test_there_may_be_hardly_more_experts_than_candidates(k):
    x, weight, bias, *_ = problem(rows=40, dtype=torch.float32)
    values, indices = select(x, weight, bias, k, torch.bfloat16)
    assert values.shape == indices.shape == (9, k)
    assert all(len(set(row)) == k for row in indices.tolist())


def test_chunks_do_not_change_the_choice(monkeypatch):
    x, weight, bias, *_ = problem(n=33, rows=40)
    whole = select(x, weight, bias, 5)
    monkeypatch.setitem(sparse.CHUNK_BYTES, "cpu", 4 * 40 * 8)
    chunked = select(x, weight, bias, 5)
    assert torch.equal(whole[1].sort().values, chunked[1].sort().values)


@pytest.mark.parametrize(("n", "k"), [(7, 7), (100, 3), (1000, 8), (1003, 15), (4096, 32)])
def test_top_k_by_group_maxima_finds_the_k_largest(n, k):
    x = torch.randn(20, n)
    values, indices = top_k(x, k)
    assert torch.equal(values.sort().values, torch.topk(x, k).values.sort().values)
    assert torch.equal(x.gather(1, indices), values)
    assert all(len(set(row.tolist())) == k for row in indices)


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: its kernels cannot run")

# Odd sizes, an expert that every token chooses, and one that none does.
KERNEL_SHAPES = [{"n": 37, "d": 70, "rows": 90, "k": 5}, {"n": 20, "d": 1100, "rows": 12, "k": 12}]


def check_kernels(device):
    """The Triton kernels of the products, put to use for the device, against dense products, and their gradients."""
    from mxdsurgery.training import trial

    for shape in KERNEL_SHAPES:
        for dtype, tolerance in ((torch.float32, 2e-4), (torch.bfloat16, 0.5)):
            x, weight, _, values, indices = problem(dtype=dtype, device=device, **shape)
            plain = mix(values, indices, weight.requires_grad_())
            wanted = torch.autograd.grad(plain.float().square().sum(), weight)[0]
            trial.install(device)
            try:
                check_products(dtype, tolerance, device=device, **shape)
                mine = torch.autograd.grad(mix(values, indices, weight).float().square().sum(), weight)[0]
            finally:
                del sparse.KERNELS[device]
            close = {"rtol": 10 * tolerance, "atol": 10 * tolerance}
            torch.testing.assert_close(mine, wanted, **close)


def check_trial(device):
    """What a trial finds is what it installs; a kernel that is wrong or does not run is never used."""
    from unittest import mock

    from mxdsurgery.training import gate_kernels, kernels, trial

    def tried(selection=None):
        """The trials of the products and of the choice, and what is installed."""
        return *trial.install_if_faster(24, 600, 1, 16, device, selection), set(sparse.KERNELS.get(device, ()))

    for selection in (None, torch.bfloat16):
        products, choice, installed = tried(selection)
        assert all(one.error <= 1e-4 and one.plain > 0 and one.triton > 0 for one in (products, choice))
        wanted = {"mix", "dots", "scatter"} if products.worthwhile else set()
        assert installed == wanted | ({"select"} if choice.worthwhile else set())
    assert len(trial.install_if_faster(24, 30, 4, 16, device)) == 1  # of so few it is not tried to choose in Triton
    with mock.patch.object(kernels, "mix", lambda values, indices, weight: weight[: len(values)] * 0):
        wrong, _, installed = tried()
    assert not wrong.worthwhile and "mix" not in installed and "off here" in str(wrong)
    with mock.patch.object(kernels, "dots", side_effect=RuntimeError("no compiler")):
        broken, _, installed = tried()
        assert "mix" not in installed and "do not run here (RuntimeError: no compiler)" in str(broken)
        for spoilt in SPOILT:
            with mock.patch.object(gate_kernels, "select", spoilt):
                wrong = trial.install_if_faster(24, 900, 4, 16, device)[1]
            assert not wrong.worthwhile and device not in sparse.KERNELS and "off here" in str(wrong)


# Choices with the experts of another token, an expert twice, values that are not those of the experts, and not the largest.
SPOILT = [
    lambda x, weight, bias, k, _: (sparse.select_plain(x, weight, bias, k)[0], sparse.select_plain(-x, weight, bias, k)[1]),
    lambda *given: tuple(part[:, :1].expand_as(part) for part in sparse.select_plain(*given)),
    lambda *given: (sparse.select_plain(*given)[0] + 1, sparse.select_plain(*given)[1]),
    lambda x, weight, bias, k, _: sparse.select_plain(x, weight[:450], bias[:450], k),
]


# So that no group of columns, tile or block of tokens is full; and K = 1.
CHOICE_SHAPES = [{"n": 131, "d": 70, "rows": 1003, "k": 5}, {"n": 17, "d": 130, "rows": 700, "k": 1}]
# As many experts as a Llama-3.2-3B has.
MANY_EXPERTS = {"n": 2, "d": 40, "rows": 86016, "k": 32}


def chosen_by_kernels(device, x, weight, bias, k, selection):
    """What the kernels choose; plain torch may not do their work, and what it says it is checked against the dense product."""
    from unittest import mock

    from mxdsurgery.training import trial

    trial.install(device, ["select"])
    try:
        with mock.patch.object(sparse, "select_plain", side_effect=AssertionError("plain torch chose")):
            values, indices = select(x, weight, bias, k, selection)
    finally:
        del sparse.KERNELS[device]
    assert values.dtype == torch.float32 and values.shape == indices.shape == (len(x), k)
    assert (indices.sort().values.diff() > 0).all() and 0 <= indices.min() and indices.max() < len(weight)
    dense = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(values.double(), dense.gather(1, indices), rtol=1e-4, atol=1e-4)
    return values.double().sort().values, dense.topk(k).values.flip(1)


def check_choice(device):
    """The K chosen by the Triton kernels are the K largest, in any case that groups could get wrong."""
    close = {"rtol": 1e-4, "atol": 1e-4}
    ways = [(torch.float32, None), (torch.float32, torch.bfloat16), (torch.bfloat16, None)]
    for dtype, selection in ways:
        for shape in CHOICE_SHAPES:
            x, weight, bias, *_ = problem(dtype=dtype, device=device, **shape)
            # All below zero; a group of 16 or 32 that holds the best; the same, as far apart as groups are; NaN and -inf.
            negative, crowded, apart = bias - 300, bias.clone(), bias.clone()
            crowded[:200:8] += 500
            apart[::256] += 500
            for offset in (bias, negative, crowded, apart):
                mine, wanted = chosen_by_kernels(device, x, weight, offset, shape["k"], selection)
                torch.testing.assert_close(mine, wanted, **close)
            # Whole numbers: most are equal to others.
            x, weight, bias = x.sign(), weight.sign(), bias.sign()
            mine, wanted = chosen_by_kernels(device, x, weight, bias, shape["k"], selection)
            assert torch.equal(mine, wanted)
            values, _ = chosen_by_kernels(device, x, weight, torch.full_like(bias, -torch.inf), shape["k"], selection)
            assert values.isneginf().all()
        x, weight, bias, *_ = problem(dtype=dtype, device=device, **MANY_EXPERTS)
        mine, wanted = chosen_by_kernels(device, x, weight, bias, MANY_EXPERTS["k"], selection)
        torch.testing.assert_close(mine, wanted, **close)
    check_choice_gradients(device)
    check_choice_of_all(device)


def check_choice_gradients(device):
    """The derivative is that of the dense gate."""
    from mxdsurgery.training import trial

    for selection in (None, torch.bfloat16):
        x, weight, bias, *_ = problem(n=40, d=48, rows=1500, dtype=torch.float32, device=device)
        upstream = torch.linspace(-1, 1, 40 * 1500, device=device).view(40, 1500)
        arguments = [t.requires_grad_() for t in (x, weight, bias)]
        trial.install(device)
        try:
            mine = dense_coefficients(*sparse_gate(*arguments, 16, selection), 1500)
            found = torch.autograd.grad((mine * upstream).sum(), arguments)
        finally:
            del sparse.KERNELS[device]
        pre = torch.nn.functional.linear(*arguments).relu()
        theirs = pre * torch.zeros_like(pre).scatter(1, pre.topk(16).indices, 1.0)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        for one, other in zip(found, torch.autograd.grad((theirs * upstream).sum(), arguments), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def check_choice_of_all(device):
    """Where there are few groups, no tokens, or float64, plain torch chooses; a NaN is chosen, as torch.topk does."""
    from mxdsurgery.training import trial

    x, weight, bias, *_ = problem(n=5, d=12, rows=600, dtype=torch.float32, device=device)
    bias[77] = torch.nan
    trial.install(device)
    try:
        assert (select(x, weight, bias, 600)[1].sort().values == torch.arange(600, device=device)).all()
        assert select(x[:0], weight, bias, 4)[1].shape == (0, 4)
        assert select(x.double(), weight.double(), bias.double(), 4)[0].dtype == torch.float64
        assert (select(x, weight, bias, 4)[1] == 77).any(1).all()
        seen = torch.func.vmap(lambda row: select(row[None], weight, bias, 4)[1][0])(x)
        assert (seen == 77).any(1).all()
    finally:
        del sparse.KERNELS[device]


@needs_cuda
@needs_triton
@pytest.mark.parametrize("check", [check_kernels, check_choice, check_trial])
def test_the_kernels_are_plain_torch_on_cuda(check):
    check("cuda")


@needs_triton
@pytest.mark.parametrize("check", [check_kernels, check_choice, check_trial])
def test_the_kernels_are_plain_torch_in_tritons_interpreter(check):
    code = f"import test_sparse; test_sparse.{check.__name__}('cpu')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("n", [20, 400])  # fewer rows chosen than there are, and more
def test_autocast_does_not_reach_what_is_ranked_exactly(n):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((n, 32), (512, 32), (512,)))
    values, indices = select(x, weight, bias, 8)
    with torch.autocast("cpu", torch.bfloat16):
        again, chosen = select(x, weight, bias, 8)
    assert torch.equal(again, values) and torch.equal(chosen, indices) and values.dtype == torch.float32
    exact = x.float() @ weight.float().T + bias.float()
    torch.testing.assert_close(values, exact.gather(1, indices))
