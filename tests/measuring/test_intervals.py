"""Figures and their intervals: what is no number is none, and an interval covers the truth as often as it says."""

import math

import pytest
import torch

from mxdsurgery.measuring.fidelity import _figures
from mxdsurgery.measuring.intervals import with_interval

TOKENS = 62


def sums(contexts, spread=0.005, **ce):
    """What `fidelity` sums over contexts: mean cross-entropies of each variant in nats, ``spread`` apart between contexts."""
    generator = torch.Generator().manual_seed(0)
    columns = {"tokens": torch.full((contexts,), float(TOKENS), dtype=torch.float64)}
    for name in ("original", "converted 0", "frozen 0", "zero", "mean"):
        noise = torch.randn(contexts, generator=generator, dtype=torch.float64) * spread
        columns[f"{name}.ce"] = TOKENS * (ce[name.removesuffix(" 0")] + noise - noise.mean())
        for other in ("kl", "agree"):
            columns[f"{name}.{other}"] = torch.ones(contexts, dtype=torch.float64)
        for other in ("error", "power", "variance"):
            columns[f"{name} at 0.{other}"] = torch.ones(contexts, dtype=torch.float64)
    return columns


def test_a_layer_that_is_worse_than_no_block_has_no_share():
    found = _figures(sums(64, original=3.0, converted=3.02, frozen=3.005, zero=3.0, mean=3.0), 0, [0])
    assert found["delta_ce"] == pytest.approx(0.02) and found["zero_delta_ce"] == pytest.approx(0.0)
    assert found["expert_share"] is None and found["expert_share_ci"] is None  # -0.015 / -0.02 is no share of .75
    assert found["loss_recovered"] is None and found["loss_recovered_ci"] is None


def test_a_share_of_what_may_be_nothing_is_no_number():
    found = _figures(sums(64, original=3.0, converted=3.0002, frozen=3.0, zero=3.0004, mean=3.0), 0, [0])
    assert found["expert_share"] is None and found["loss_recovered"] is None
    surer = _figures(sums(64, spread=0.0001, original=3.0, converted=3.0002, frozen=3.0003, zero=3.0004, mean=3.0), 0, [0])
    assert surer["expert_share"] == pytest.approx(0.5) and surer["loss_recovered"] == pytest.approx(0.5)
    assert surer["expert_share_ci"][0] < 0.5 < surer["expert_share_ci"][1]


def test_a_share_is_one_exactly_where_the_interval_of_what_is_shared_lies_above_nothing():
    generator = torch.Generator().manual_seed(0)
    found = set()
    for trial in range(200):
        bottom = torch.randn(12, generator=generator, dtype=torch.float64) + 0.01 * trial - 0.5
        top = torch.randn(12, generator=generator, dtype=torch.float64)
        low, _ = with_interval("difference", bottom, torch.ones_like(bottom))["difference_ci"]
        share = with_interval("share", top, bottom, signed=True)
        assert (share["share"] is not None) == (share["share_ci"] is not None) == (low > 0)
        found.add(low > 0)
    assert found == {True, False}


def test_a_layer_that_is_worth_something_has_its_shares():
    found = _figures(sums(64, original=3.0, converted=3.02, frozen=3.1, zero=3.5, mean=3.4), 0, [0])
    assert found["expert_share"] == pytest.approx(0.08 / 0.48) and found["loss_recovered"] == pytest.approx(0.96)
    low, high = found["expert_share_ci"]
    assert low < found["expert_share"] < high and high - low < 0.02


@pytest.mark.parametrize("contexts", [2, 3, 5, 20, 60])
@pytest.mark.parametrize("signed", [False, True])
def test_an_interval_covers_the_truth_about_as_often_as_it_says(contexts, signed):
    generator = torch.Generator().manual_seed(0)
    covered, trials = 0, 400
    for _ in range(trials):
        top = torch.randn(contexts, generator=generator, dtype=torch.float64) + 3.0
        ends = with_interval("mean", top, torch.ones(contexts).double(), signed=signed)["mean_ci"]
        covered += ends[0] <= 3.0 <= ends[1]
    assert 0.92 <= covered / trials <= 0.98  # the bootstrap's percentiles: .5 of two contexts, .75 of three


def test_one_context_has_a_figure_and_no_interval():
    one = torch.tensor([31.0]).double()
    assert with_interval("ce", 2 * one, one) == {"ce": 2.0, "ce_ci": None}
    assert with_interval("share", one, 2 * one, signed=True) == {"share": None, "share_ci": None}


def test_what_is_counted_in_few_contexts_has_the_interval_of_few_contexts():
    top, bottom = torch.zeros(2, 60, dtype=torch.float64)
    top[:3], bottom[:3] = torch.tensor([2.0, 3.0, 7.0]), torch.tensor([1.0, 2.0, 3.0])
    rare = with_interval("kl", top, bottom)
    assert rare["kl"] == pytest.approx(2.0)
    assert rare == with_interval("kl", top[:3], bottom[:3])  # contexts without it say nothing
    residuals = torch.tensor([0.0, -1.0, 1.0]).double()
    reach = 4.302653 * residuals.std().item() * math.sqrt(3) / 6
    assert rare["kl_ci"] == pytest.approx([2 - reach, 2 + reach])


def test_what_is_counted_nowhere_and_what_is_not_finite_are_none():
    none = torch.zeros(4, dtype=torch.float64)
    assert with_interval("kl", none, none) == {"kl": None, "kl_ci": None}
    assert with_interval("ce", none + torch.inf, none + 1) == {"ce": None, "ce_ci": None}
    assert with_interval("ce", none + torch.nan, none + 1) == {"ce": None, "ce_ci": None}


def test_the_mean_of_several_ratios_has_the_interval_of_the_mean():
    generator = torch.Generator().manual_seed(0)
    top = torch.rand(3, 50, generator=generator, dtype=torch.float64)
    bottom = torch.tensor([[1.0], [10.0], [1000.0]]).double().expand(3, 50)
    found = with_interval("nmse", top, bottom)
    mean = with_interval("mean", (top / bottom).mean(0), torch.ones(50).double())
    assert found["nmse"] == pytest.approx(mean["mean"]) and found["nmse_ci"] == pytest.approx(mean["mean_ci"])
