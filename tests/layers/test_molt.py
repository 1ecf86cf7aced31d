"""Sparse mixtures of linear transforms: each is its matrices, whatever the way that it is computed."""

import copy
import dataclasses

import pytest
import torch
from running import without_reloads
from tiny import IDS, RECIPE, busy_layer, export_tiny, tiny_opened

from mxdsurgery.catalogue.experts import recorded_coefficients
from mxdsurgery.catalogue.statistics import Tally
from mxdsurgery.checkpoint.converted import load
from mxdsurgery.editing.edits import edits_from
from mxdsurgery.editing.transforms import baked_transforms, check_transforms, rank_of
from mxdsurgery.errors import EditError
from mxdsurgery.layers import low_rank
from mxdsurgery.layers.changes import InterventionError
from mxdsurgery.layers.layer import Coefficients
from mxdsurgery.layers.low_rank import total_rank, transform_ranks
from mxdsurgery.measuring.alike import Cosines
from mxdsurgery.measuring.dissect import effective_rank, expert_ranks, nearest_similarity

D, N, K = 32, 40, 4


def made(sparsity="topk"):
    return busy_layer("molt", sparsity, d_model=D, d_hidden=48, n_experts=N, k=K, std=0.5).double()


def matrices(experts):
    """Every ``U_n V_n`` (D, D)."""
    return torch.stack([experts.weight[rows].T @ experts.reads[rows] for rows in map(experts.rows, range(N))])


def test_ranks_halve_and_their_numbers_double():
    assert transform_ranks(256, 31) == ((128, 1), (64, 2), (32, 4), (16, 8), (8, 16))
    assert transform_ranks(7, 20) == ((3, 6), (1, 14)) and transform_ranks(1, 5) == ((1, 5),)
    for n in range(1, 200):
        ranks = transform_ranks(64, n)
        assert sum(count for _, count in ranks) == n and [rank for rank, _ in ranks] == sorted(
            (rank for rank, _ in ranks), reverse=True
        )
        assert total_rank(64, n) > total_rank(64, n - 1)  # so that a budget decides n


def test_a_layer_is_the_sum_of_its_transforms_weighted_by_the_gate():
    layer, x = made(), torch.randn(3, 5, D, dtype=torch.float64)
    a = layer.gate(x).dense(N)
    wanted = torch.einsum("btn,nde,bte->btd", a, matrices(layer.experts), x) + layer.bias
    torch.testing.assert_close(layer(x), wanted, rtol=1e-10, atol=1e-10)
    n = torch.tensor([0, 7, N - 1])
    said = torch.randn(3, 2, D, dtype=torch.float64)
    torch.testing.assert_close(
        layer.experts.term(n, said), torch.einsum("nde,nte->ntd", matrices(layer.experts)[n], said), rtol=1e-10, atol=1e-10
    )


def test_coefficients_of_any_sign_zero_and_several_for_one_transform_add_up_and_have_gradients():
    layer, x = made(), torch.randn(2, D, dtype=torch.float64)
    indices = torch.tensor([[3, 3, 30], [0, 39, 5]])
    values = torch.tensor([[1.0, -2.5, 0.0], [0.0, 0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    said = layer.mixture(Coefficients(values, indices), x)
    wanted = torch.einsum("nk,nkde,ne->nd", values, matrices(layer.experts)[indices], x)
    torch.testing.assert_close(said, wanted, rtol=1e-10, atol=1e-10)
    mine, theirs = (torch.autograd.grad(y.square().sum(), values, retain_graph=True)[0] for y in (said, wanted))
    torch.testing.assert_close(mine, theirs)  # also of what was zero
    with torch.no_grad():
        torch.testing.assert_close(layer.mixture(Coefficients(values, indices), x), wanted, rtol=1e-10, atol=1e-10)
        assert not layer.mixture(Coefficients(torch.zeros_like(values), indices), x).any()


def test_memory_holds_the_ranks_of_chosen_transforms_only(monkeypatch):
    """Neither all transforms of a token, nor a copy of a transform for each token."""
    layer, x = made(), torch.randn(200, D, dtype=torch.float64)
    largest = []
    real = low_rank._Enter.forward

    def spied(ctx, *args):
        h = real(ctx, *args)
        largest.append(h.numel())
        return h

    monkeypatch.setattr(low_rank._Enter, "forward", staticmethod(spied))
    monkeypatch.setattr(low_rank, "_parts", None)  # copies of matrices are made by way of it
    layer(x).sum().backward()
    chosen = layer.gate(x).indices
    ranks = torch.tensor([rank for rank, count in layer.experts.ranks for _ in range(count)])
    assert sum(largest[: len(layer.experts.ranks)]) == ranks[chosen].sum()


def test_cosines_and_ranks_are_those_of_whole_matrices():
    layer = made().float()
    whole = matrices(layer.experts).flatten(1)
    unit = whole / whole.norm(dim=1, keepdim=True)
    torch.testing.assert_close(Cosines(layer.experts).of(torch.arange(3)), (unit @ unit.T)[:3], rtol=1e-4, atol=1e-5)
    near = nearest_similarity(layer)["experts"]["50%"]
    alone = (unit @ unit.T).abs().fill_diagonal_(0).amax(1)
    assert near == pytest.approx(alone.median().item(), abs=0.02)
    found = expert_ranks(layer)
    ranks = [effective_rank(matrix) for matrix in matrices(layer.experts)]
    assert found["effective"]["50%"] == pytest.approx(torch.tensor(ranks).quantile(0.5).item(), rel=1e-3)
    assert found["numerical_median"] == 1 and found["experts"] == N  # most have the least rank


def test_the_catalogue_knows_what_a_transform_adds_on_average():
    opened = tiny_opened(kind="molt")
    layer = opened.converted.layers[0]
    with recorded_coefficients(opened.converted, [0]) as seen, torch.no_grad():
        opened.model(input_ids=opened.input_ids)
    a, x = seen[0]
    tally = Tally.none(24, 32, 0, 4, 4)
    tally.add(a, x, torch.full(x.shape[:2], -1), 0, torch.Generator().manual_seed(0))
    n = int(tally.fired.argmax())
    coefficient = a.dense(24)[:, 1:, n]
    rows = layer.experts.rows(n)
    added = coefficient[..., None] * (x[:, 1:] @ layer.experts.reads[rows].T @ layer.experts.weight[rows])
    mean = added.sum((0, 1)) / (coefficient > 0).sum()
    said = (tally.contribution[n] / tally.fired[n])[None, None]
    torch.testing.assert_close(layer.experts.term(torch.tensor([n]), said)[0, 0], mean, rtol=1e-4, atol=1e-5)


def test_live_and_baked_edits_give_equal_logits(tmp_path, monkeypatch):
    without_reloads(monkeypatch)
    export_tiny("llama", tmp_path / "out", recipe=dataclasses.replace(RECIPE, kind="molt"))
    converted = load(tmp_path / "out")
    edits = edits_from({"layers": {0: {"ablate": [60, 61], "drop": [1], "scale": {0: -2.5}, "copy": {63: 62}}}}, "here")
    check_transforms(edits, converted)
    model = converted.model
    with torch.no_grad():
        before = model(IDS).logits
        with edits.live(model):
            live = model(IDS).logits
        layer = converted.layers[0]
        changed = baked_transforms(edits, 0, dict(layer.state_dict()), layer.experts)
        assert set(changed) == {"experts.weight", "experts.reads", "gate.bias"}
        layer.load_state_dict(dict(layer.state_dict()) | changed)
        torch.testing.assert_close(model(IDS).logits, live, rtol=1e-4, atol=1e-5)
    assert (live - before).abs().max() > 1e-3


def test_edits_that_weights_cannot_hold_are_refused_by_name_and_work_live():
    opened = tiny_opened(kind="molt")
    model, experts = opened.converted.model, opened.converted.layers[0].experts
    assert rank_of(experts, 0) != rank_of(experts, 20)
    given = {"steer": {3: 1.0}, "merge": [[3, 4]], "copy": {0: 20}}
    for kind, what in given.items():
        edits = edits_from({"layers": {0: {kind: what}}}, "here")
        with pytest.raises(EditError, match=kind) as refused:
            check_transforms(edits, opened.converted)
        assert f"model.mxd.{kind}" in refused.value.fix
        with torch.no_grad():
            before = model(IDS).logits
            with edits.live(model):
                assert not torch.allclose(model(IDS).logits, before)
    with pytest.raises(EditError, match="replace"):
        check_transforms(edits_from({"layers": {0: {"replace": {3: [0.0] * 32}}}}, "here"), opened.converted)
    with pytest.raises(InterventionError, match="no vectors c_n"):
        model.mxd.replace({0: {3: [0.0] * 32}})


def test_a_copy_of_a_layer_under_vmap_and_compiled_code_is_the_same():
    layer, x = made(), torch.randn(6, D, dtype=torch.float64)
    wanted = layer(x).detach()
    torch.testing.assert_close(torch.vmap(layer)(x).detach(), wanted)
    torch.testing.assert_close(torch.vmap(layer, chunk_size=2)(x).detach(), wanted)
    other = copy.deepcopy(layer)
    torch.testing.assert_close(torch.func.functional_call(other, dict(layer.named_parameters()), (x,)).detach(), wanted)
