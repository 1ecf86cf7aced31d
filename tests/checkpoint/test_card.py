"""The table of figures: intervals beside what people quote, and n/a for what is no number."""

import io

import pytest
from rich.console import Console

from mxdsurgery.checkpoint.card import FIGURES, evaluation_table, figure_rows
from mxdsurgery.terminal.figures import SHARES, interval, range_of, times, value_of, with_range

HEADINGS = [heading for _, heading, _ in FIGURES]


def entry(**figures):
    """A layer's figures: all are 0.5 with an interval from 0.4 to 0.6, except these."""
    made = {name: 0.5 for name, _, _ in FIGURES} | {f"{name}_ci": [0.4, 0.6] for name, _, _ in FIGURES}
    return made | figures


def evaluation(*layers, **every):
    layers = [{"layer": number} | figures for number, figures in enumerate(layers)]
    return {"tokens": 1000, "original": {"ce": 3.0}, "layers": layers, "all": entry(**every)}


def test_shares_are_printed_with_their_intervals_and_as_none_where_they_are_none():
    worse = entry(expert_share=None, expert_share_ci=None, loss_recovered=None, loss_recovered_ci=None, delta_ce_ci=None)
    first, second, every = (dict(zip(HEADINGS, row[1:], strict=True)) for row in figure_rows(evaluation(entry(), worse)))
    assert first["expert share"] == every["expert share"] == "0.50 [0.40, 0.60]"
    assert first["ΔCE"] == "+0.5000 [+0.4000, +0.6000]" and first["loss recovered"] == "50.0% [40.0%, 60.0%]"
    assert second["expert share"] == second["loss recovered"] == "n/a" and second["ΔCE"] == "+0.5000"


def test_the_terminal_shows_the_intervals_on_one_line():
    shown = io.StringIO()
    Console(width=127, file=shown).print(evaluation_table(evaluation(entry(), entry(expert_share=None))))
    lines = shown.getvalue().splitlines()
    assert sum("+0.5000 [+0.4000, +0.6000]" in line for line in lines) == 3
    assert any("n/a" in line for line in lines) and any("0.50 [0.40, 0.60]" in line for line in lines)


def test_errors_that_an_older_version_summed_over_layers_are_said_to_be_pooled():
    nmse = 1 + HEADINGS.index("NMSE")
    older = figure_rows(evaluation(entry(), entry(), expert_share_ci=[None, None]))
    assert [row[nmse] for row in older] == ["0.5000", "0.5000", "0.5000 (pooled)"]
    assert older[-1][1 + HEADINGS.index("expert share")] == "0.50"
    newer = entry(nmse_together=0.5, nmse_together_ci=[0.4, 0.6])
    assert [row[nmse] for row in figure_rows(evaluation(newer, newer))] == ["0.5000"] * 3
    assert figure_rows(evaluation(entry()))[-1][nmse] == "0.5000"  # one layer: a sum over one


def test_figures_without_a_value_or_an_interval_are_written_as_what_they_are():
    row = {"kl": 0.25, "kl_ci": [0.125, 0.5], "ce": None, "ce_ci": None, "old": 1.0, "old_ci": [None, None]}
    assert with_range(row, "kl", ".3f") == "0.250 [0.125, 0.500]" and range_of(row, "kl", ".3f") == "0.125 to 0.500"
    assert value_of(row, "ce", ".3f") == with_range(row, "ce", ".3f") == range_of(row, "ce", ".3f") == "n/a"
    assert with_range(row, "old", ".1f") == "1.0" and interval(row, "old") is None


def test_a_loss_is_a_multiple_only_of_one_that_is_certain():
    row = {"delta_ce": 0.011, "delta_ce_ci": [0.009, 0.013]}
    for ends, ratio in (([0.001, 0.003], 5.5), ([-0.001, 0.005], None), (None, None)):
        found = times(row, {"delta_ce": 0.002, "delta_ce_ci": ends}, "delta_ce")
        assert found == (ratio and pytest.approx(ratio))
    assert times(row, {"delta_ce": -0.002, "delta_ce_ci": [-0.003, -0.001]}, "delta_ce") is None


def test_the_terminal_shows_what_the_experts_can_claim_with_its_interval():
    shares = {name: 0.25 for name in SHARES} | {f"{name}_ci": [0.125, 0.375] for name in SHARES}
    shown = io.StringIO()
    Console(width=200, file=shown).print(evaluation_table(evaluation(entry(**shares), permuted_delta_ce=0.1, **shares)))
    assert shown.getvalue().count("0.25 [0.12, 0.38]") == 2 * 3  # expert share, beyond a few, earned
