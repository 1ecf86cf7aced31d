"""What is said beside tables of figures: each column is explained, and nothing that the table does not show."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from mxdsurgery.checkpoint.card import FIGURES, evaluation_table
from mxdsurgery.editing import effect, steering, sweep
from mxdsurgery.editing.judge import RATINGS
from mxdsurgery.measuring import growth
from mxdsurgery.measuring.frontier_table import Frontier
from mxdsurgery.terminal.figures import EXPLAINED, SHARES, legend

# Every heading that is explained anywhere.
WORDS = EXPLAINED | growth.WORDS | effect.WORDS | steering.WORDS | sweep.WORDS
# Those that say it themselves.
PLAIN = {"", "layer", "layers", "kind", "K", "N", "parameters", "tokens", "predictions", "95 % interval", "expert"}
PLAIN |= {"fires most at", "text", "coefficient", "the first begins"}


def explained(text):
    """The headings that a legend explains."""
    names = {heading: re.escape(heading[0].upper() + heading[1:]) for heading in WORDS}
    return {heading for heading, name in names.items() if re.search(rf"(^|\. ){name}: ", " ".join(text.split()))}


def headings(*tables):
    return {str(column.header) for table in tables for column in table.columns} - PLAIN


def figures(*names):
    return {name: 0.5 for name in names} | {f"{name}_ci": [0.4, 0.6] for name in names}


ENTRY = figures(*(name for name, _, _ in FIGURES))
WITH_CONTROLS = ENTRY | figures(*SHARES) | {"permuted_delta_ce": 0.1}


@pytest.mark.parametrize("entry", [ENTRY, WITH_CONTROLS], ids=["of an older version", "with controls"])
def test_an_evaluation_explains_what_it_shows(entry):
    table = evaluation_table({"tokens": 1000, "original": {"ce": 3.0}, "layers": [{"layer": 0} | entry], "all": entry})
    assert explained(table.caption) == headings(table)
    shown = io.StringIO()
    Console(width=200, file=shown).print(table)
    assert ("Beyond a few: what is left" in shown.getvalue()) == (entry is WITH_CONTROLS)
    assert "Same top-1" not in shown.getvalue() and shown.getvalue().count("ΔCE: nats per token") == 1


def test_a_frontier_explains_what_it_shows():
    row = WITH_CONTROLS | {"layer": 0, "kind": "mxd", "k": 8, "n_experts": 64, "params": 1000}
    table = Frontier(Path(), [row], 1000, {"ce": 3.0}, {}).table()
    assert explained(table.caption) == headings(table)


def test_growth_explains_what_it_shows():
    row = figures("delta_ce", "kl", "top1_agreement", "singles_delta_ce", "excess_delta_ce") | {"layers": [0]}
    stream = [figures("error", "fvu") | {"layer": 0, "own_error": 0.5}]
    result = {part: [row] for part, _ in growth.PARTS} | {"stream": stream, "verdict": "Errors add up.", "tokens": 1000}
    *tables, text = growth.growth_table(result)
    assert explained(text.plain.partition("\n\n")[2]) == headings(*tables)


OTHERS = {"draws": [{"fired": 3}], "delta_ce": 0.5, "delta_ce_range": [0.4, 0.6], "kl": 0.5, "kl_range": [0.4, 0.6]}


@pytest.mark.parametrize("controls", [None, OTHERS], ids=["alone", "beside others"])
def test_an_effect_explains_what_it_shows(controls):
    part = figures("delta_ce", "kl", "top1_agreement") | {"tokens": 100, "rose": [], "fell": []}
    result = {name: part for name in effect.PARTS} | {"original": {"ce": 3.0}, "tokens": 100, "data": "text", "words": []}
    result |= {"experts": [{"layer": 0, "expert": 1, "fired": 5, "of": 100}], "controls": controls, "predictions": []}
    _, table, _ = effect.effect_tables(result)
    assert explained(table.caption) == headings(table)
    assert ("Other experts: " in table.caption) == (controls is not None)


@pytest.mark.parametrize("judged", [False, True], ids=["unjudged", "judged"])
def test_steering_explains_what_it_shows(judged):
    row = figures("similarity", "strength", "perplexity", *(f"judged_{name}" for name in RATINGS)) | {"texts": ["a text"]}
    steered = [row | {"amount": 1.0, "in_maximum": 1.0, "controls": []}]
    result = {"layer": 0, "expert": 1, "samples": 1, "max_new_tokens": 8, "prompt": "a", "kind": "steer", "own_contexts": None}
    table = steering.steering_table(result | {"unsteered": row, "steered": steered} | ({"judge": "one"} if judged else {}))
    assert explained(table.caption) == headings(table)


def test_a_sweep_explains_what_it_shows():
    row = {"expert": 1, "frequency": 0.1, "measured": 1, "contexts": 2, "kl": 0.5, "kl_error": 0.1, "delta_ce": 0.5}
    row |= {"kl_per_firing": 0.1, "token": None, "share": None}
    table = sweep.sweep_table({"layer": 0, "tokens": 1000, "never_fired": 1, "experts": [row]})
    assert explained(table.caption) == headings(table)


def test_nothing_is_explained_that_no_table_shows():
    assert {heading for _, heading, _ in FIGURES} | set(SHARES.values()) >= EXPLAINED.keys()
    assert {heading for _, heading, _ in FIGURES} <= explained(legend([heading for _, heading, _ in FIGURES]))
