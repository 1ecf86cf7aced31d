"""The controls of `expert_share`: which of them exposes which way to win that share without earning it."""

import copy
import dataclasses
import inspect

import pytest
import torch
from constructed_layers import BUILDERS
from tiny import RECIPE, batches, tiny_model, train

from mxdsurgery.base.activations import record_activations
from mxdsurgery.base.finding import find_blocks
from mxdsurgery.base.model import load_tokenizer, open_model
from mxdsurgery.base.surgery import FrozenExperts
from mxdsurgery.checkpoint.card import evaluation_table, share_rows
from mxdsurgery.layers.layer import MxDLayer
from mxdsurgery.measuring.controls import (
    SHARES,
    DenseFit,
    FewExperts,
    PermutedExperts,
    RandomGate,
    ShuffledTokens,
    Usage,
    main_directions,
    quarters,
)
from mxdsurgery.measuring.fidelity import measure
from mxdsurgery.training.losses import how_few

LAYER, CONTEXTS, LENGTH = 0, 24, 64  # the layer that is worth the most


@pytest.fixture(scope="module")
def built():
    """All figures of each built layer, in a small trained model, on text of the kind that it knows."""
    model = open_model("demo-glu").load(dtype="float32", compute="float32")
    ids = load_tokenizer("demo-glu")(inspect.getsource(torch.nn.functional)[:10_000])["input_ids"]
    ids = torch.tensor(ids[: CONTEXTS * LENGTH]).view(CONTEXTS, LENGTH)
    block = find_blocks(model)[LAYER].block
    x = record_activations(model, [block], ids)[LAYER].x[:, 1:].flatten(0, 1)
    with torch.no_grad():
        layers = {name: build(model, block, x) for name, build in BUILDERS.items()}
    return {name: measure(model, [block], {LAYER: layer}, ids, batch=1024)["layers"][0] for name, layer in layers.items()}


def test_a_sign_bit_has_the_whole_share_and_is_exposed_by_a_few_experts_and_by_retraining_alone(built):
    shares = built["sign bit"]
    assert abs(shares["delta_ce"]) < 0.01 * shares["zero_delta_ce"]  # it computes the block's output
    assert shares["expert_share"] > 0.9
    assert min(shares[name] for name in ("permuted_share", "shuffled_share", "random_gate_share")) > 1
    assert max(abs(shares[name]) for name in ("few_experts_share", "earned_share")) < 0.02


def test_experts_that_differ_in_size_alone_are_exposed_by_all_controls_that_keep_the_size(built):
    shares = built["size only"]
    assert abs(shares["delta_ce"]) < 0.01 * shares["zero_delta_ce"] and shares["expert_share"] > 0.1
    assert max(abs(shares[name]) for name in ("permuted_share", "shuffled_share", "few_experts_share")) < 0.01
    assert shares["earned_share"] > 0.05  # no dense path can do without the size


def test_decoration_loses_nothing_under_any_control(built):
    assert max(abs(built["decoration"][name]) for name in ("expert_share", *SHARES.values())) < 0.02


def test_specialised_experts_keep_their_share_against_every_control(built):
    shares = built["specialised"]
    whole = shares["expert_share"]
    assert min(shares[name] for name in SHARES.values() if name != "few_experts_share") > 0.9 * whole > 0.3
    assert shares["few_experts_share"] > 0.5 * whole  # a few directions of the output say a good part of it


@pytest.fixture(scope="module")
def kinds():
    """Figures of every kind of layer in both blocks of a tiny model, measured twice."""
    model, found = tiny_model("llama"), {}
    for kind in ("mxd", "transcoder", "skip-transcoder", "topk-sae", "molt", "dense"):
        layers, _, blocks = train(model, dataclasses.replace(RECIPE, kind=kind), steps=3)
        found[kind] = [measure(model, blocks, layers, next(batches(seed=5)), batch=256) for _ in range(2)]
    return found


def test_every_kind_has_its_controls_with_intervals_and_has_the_same_ones_again(kinds):
    figures = [name for control, share in SHARES.items() for name in (f"{control}_delta_ce", share)]
    for kind, (once, again) in kinds.items():
        assert once == again
        for entry in [once["all"], *once["layers"]]:
            assert {*figures, *(f"{name}_ci" for name in figures)} <= set(entry)
            assert all((entry[name] is None) == (kind == "dense") for name in figures if name.endswith("delta_ce"))
            if kind in ("transcoder", "topk-sae"):  # their dense path is a constant: there is nothing to fit anew
                assert entry["retrained_delta_ce"] == entry["constant_gate_delta_ce"]


def layer_and_text(n_experts=12, k=3):
    torch.manual_seed(0)
    layer = MxDLayer(d_model=8, d_hidden=6, n_experts=n_experts, k=k, kind="mlp", activation="gelu", encoder_bias=True)
    layer = layer.double().requires_grad_(False)
    for parameter in layer.parameters():
        parameter.normal_()
    return layer, torch.randn(40, 10, 8, dtype=torch.float64)


def usage(layer, x):
    """Of position 1 on, as the statistics of an evaluation have it."""
    a = layer.coefficients(x[:, 1:].flatten(0, 1)).dense(layer.gate.n_experts)
    s = a @ layer.experts.weight
    m, _ = layer.dense_path(x[:, 1:].flatten(0, 1))
    return Usage(torch.zeros(8), main_directions(s.T @ s, m.square().sum(0)), (a > 0).sum(0), a.sum(0), len(a))


def test_a_permutation_is_one_of_experts_that_fire_and_leaves_none_in_its_place():
    layer, x = layer_and_text()
    layer.gate.bias[:4] = -1e6  # these never fire
    control = PermutedExperts(layer, usage(layer, x), seed=0)
    goes_to = control.goes_to
    assert torch.equal(goes_to[:4], torch.arange(4)) and torch.equal(goes_to[4:].sort().values, torch.arange(4, 12))
    assert (goes_to[4:] != torch.arange(4, 12)).all()
    expected = control(x)
    layer.experts.weight.copy_(layer.experts.weight[goes_to])
    torch.testing.assert_close(layer(x), expected)
    assert torch.equal(PermutedExperts(layer, usage(layer, x), seed=0).goes_to, goes_to)
    assert not torch.equal(PermutedExperts(layer, usage(layer, x), seed=1).goes_to, goes_to)


def test_shuffled_tokens_keep_their_size_and_position_0_and_get_experts_of_a_token_of_about_that_size(monkeypatch):
    layer, x = layer_and_text()
    layer.gate.bias += 20.0  # as many experts for every token
    given = []
    monkeypatch.setattr(layer, "combine", lambda a, x: given.append(a) or x)
    own = layer.coefficients(x)
    for seen in (x, x.flatten(0, 1)):  # some families flatten batch and tokens
        ShuffledTokens(layer, 10, seed=0)(seen)
    a = given[0]
    assert all(torch.equal(a[i].flatten(0, 1), given[1][i]) for i in range(2))
    assert torch.equal(a.values[:, 0], own.values[:, 0]) and torch.equal(a.indices[:, 0], own.indices[:, 0])
    sizes = own.values[:, 1:].sum(-1)
    torch.testing.assert_close(a.values[:, 1:].sum(-1), sizes)
    # Each token's experts, in proportion, are those of exactly one other token.
    mine = (own.dense(12)[:, 1:] / sizes[..., None]).flatten(0, 1)
    got = (a.dense(12)[:, 1:] / sizes[..., None]).flatten(0, 1)
    source = torch.cdist(got, mine).argmin(1)
    torch.testing.assert_close(mine[source], got)
    assert len(source.unique()) == len(source) and (source != torch.arange(len(source))).all()
    ranks = sizes.flatten().argsort().argsort()
    apart = (ranks[source] - ranks).abs().sort().values
    assert apart[-2] < 32  # neighbours in size, but for the largest, which gets those of the smallest


def test_a_random_gate_draws_each_expert_as_often_as_it_fires_with_its_mean_coefficient(monkeypatch):
    layer, x = layer_and_text()
    layer.gate.bias[0] = 1e3  # this one always fires
    of = usage(layer, x)
    given = []
    monkeypatch.setattr(layer, "combine", lambda a, x: given.append(a) or x)
    RandomGate(layer, of, seed=0)(torch.zeros(200, 100, 8))
    a = given[0].dense(12).flatten(0, 1)
    frequency, mean = of.fired / of.tokens, of.amount / of.fired.clamp_min(1)
    assert frequency[0] == 1 and (a[:, 0] > 0).all()
    torch.testing.assert_close(a.mean(0), (frequency * mean).to(a.dtype), rtol=0.1, atol=0.02)
    assert ((a > 0).sum(1) <= 3).all()
    assert len(torch.unique(a > 0, dim=0)) > 12  # not the same few choices


@pytest.mark.parametrize("few", [1, 3])
def test_a_few_experts_are_the_best_sums_of_the_best_directions(few, monkeypatch):
    monkeypatch.setattr("mxdsurgery.measuring.controls.how_few", lambda d_model: few)
    layer, x = layer_and_text()
    rows = layer.experts.weight
    rows[few:] = torch.randn(12 - few, few, dtype=torch.float64) @ rows[:few]  # all experts but a few are sums of these
    torch.testing.assert_close(FewExperts(layer, usage(layer, x).few)(x), layer(x), atol=5e-3, rtol=0)  # the ridge
    layer, x = layer_and_text()
    directions = usage(layer, x).few
    assert directions.shape == (8, few)
    m, s = layer.dense_path(x)[0], layer.experts(layer.coefficients(x))
    best = (directions @ torch.linalg.lstsq(m[..., None] * directions, (m * s)[..., None]).solution)[..., 0]
    torch.testing.assert_close(FewExperts(layer, directions)(x), best * m + layer.bias, atol=5e-3, rtol=0)  # the ridge
    assert (FewExperts(layer, directions)(x) - layer(x)).abs().max() > 0.1


def test_a_few_are_four_or_a_sixteenth_of_the_width():
    assert [how_few(d_model) for d_model in (4, 16, 48, 64, 576, 3072)] == [1, 1, 3, 4, 4, 4]


def fitted(layer, x, y):
    """The retrained layer, from contexts (S, T, D) of their quarters."""
    fit = DenseFit(FrozenExperts(layer, torch.ones(8, dtype=torch.float64)))
    for quarter, one_x, one_y in zip(quarters(len(x)), x, y, strict=True):
        fit.add(int(quarter), one_x, one_y)
    return fit.retrained(torch.float64)


def test_the_dense_path_is_fitted_on_one_half_and_scored_on_the_other():
    layer, x = layer_and_text()
    y = layer.hidden(x) @ torch.randn(6, 8, dtype=torch.float64) + 3.0  # what a dense layer could do
    for half, retrained in enumerate([fitted(layer, x, y)] * 2):
        retrained.half = half
        assert (retrained(x) - y).square().mean() < 1e-6 * y.square().mean()
    spoilt = y.clone()
    spoilt[20:] = torch.randn(20, 10, 8)  # the second half: nothing but noise
    retrained = fitted(layer, x, spoilt)
    retrained.half = 1  # scores the second half, and was fitted on the first
    assert (retrained(x) - y).square().mean() < 1e-6 * y.square().mean()
    retrained.half = 0
    assert (retrained(x) - y).square().mean() > 0.1 * y.square().mean()


def test_with_too_little_text_the_dense_path_stays_as_it_is():
    layer, x = layer_and_text()
    y = torch.randn_like(x)
    for contexts in (1, 2):  # half of that is at most one: there is nothing to choose the ridge by
        retrained = fitted(layer, x[:contexts], y[:contexts])
        for retrained.half in range(2):
            torch.testing.assert_close(retrained(x), retrained.frozen(x))


def test_tables_have_the_shares_where_there_are_experts_and_an_evaluation_of_an_older_version_is_printed_without(kinds):
    evaluation = {kind: copy.deepcopy(once) for kind, (once, _) in kinds.items()}
    headings = {kind: [column.header for column in evaluation_table(figures).columns] for kind, figures in evaluation.items()}
    assert headings["mxd"][-2:] == headings["transcoder"][-2:] == ["beyond a few", "earned"]
    assert headings["dense"] == headings["mxd"][:-2] and share_rows(evaluation["dense"]) == []
    rows = share_rows(evaluation["mxd"])
    assert [row[0] for row in rows] == ["0", "1", "all"] and {len(row) for row in rows} == {1 + 1 + len(SHARES)}
    for entry in [evaluation["mxd"]["all"], *evaluation["mxd"]["layers"]]:
        for control, share in SHARES.items():
            del entry[f"{control}_delta_ce"], entry[share]
    assert [column.header for column in evaluation_table(evaluation["mxd"]).columns] == headings["dense"]
