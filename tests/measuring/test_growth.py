"""`growth`: its rows are figures of `evaluate` where both measure it; the stream is untouched below the first new layer."""

import io
import json
import shutil

import pytest
import torch
from rich.console import Console

from mxdsurgery.base.model import open_model
from mxdsurgery.checkpoint.converted import load, settle
from mxdsurgery.errors import BaseModelError
from mxdsurgery.measuring.growth import _sets, _verdict, growth, growth_table
from mxdsurgery.measuring.held_out import held_out
from mxdsurgery.recipe import Recipe, load_recipe

FIGURES = ("delta_ce", "kl", "top1_agreement")


@pytest.fixture(scope="module")
def folder(converted):
    return converted.out


@pytest.fixture(scope="module")
def evaluation(folder):
    return json.loads((folder / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def grown(folder):
    return growth(folder)


def test_the_row_of_all_layers_is_what_the_evaluation_says_of_them(grown, evaluation):
    assert grown["tokens"] == evaluation["tokens"]
    assert grown["original"]["ce"] == pytest.approx(evaluation["original"]["ce"], abs=1e-9)
    for row in (grown["bottom"][-1], grown["top"][-1]):
        assert row["layers"] == [1, 2]
        for name in FIGURES:
            assert row[name] == pytest.approx(evaluation["all"][name], abs=1e-6)
            assert row[f"{name}_ci"] == pytest.approx(evaluation["all"][f"{name}_ci"], abs=1e-6)


def test_the_row_of_a_single_layer_is_what_the_evaluation_says_of_it(grown, evaluation):
    assert [row["layers"] for row in grown["alone"]] == [[1], [2]]
    for row, measured in zip(grown["alone"], evaluation["layers"], strict=True):
        for name in FIGURES:
            assert row[name] == pytest.approx(measured[name], abs=1e-6)
            assert row[f"{name}_ci"] == pytest.approx(measured[f"{name}_ci"], abs=1e-6)
    assert grown["bottom"][0] == grown["alone"][0] and grown["top"][0] == grown["alone"][1]


def test_what_single_layers_cost_is_added_up_beside_what_they_cost_together(grown):
    joint, single = grown["bottom"][-1], grown["alone"]
    assert joint["singles_delta_ce"] == pytest.approx(sum(row["delta_ce"] for row in single))
    assert joint["singles_kl"] == pytest.approx(sum(row["kl"] for row in single))
    assert joint["excess_delta_ce"] == pytest.approx(joint["delta_ce"] - joint["singles_delta_ce"])
    low, high = joint["excess_delta_ce_ci"]
    assert low < joint["excess_delta_ce"] < high
    assert all(row["excess_delta_ce"] == 0 for row in single)


def test_the_stream_is_the_originals_below_the_first_new_layer_and_not_above(grown):
    assert [row["layer"] for row in grown["stream"]] == [0, 1, 2, 3]
    assert grown["stream"][0]["error"] == grown["stream"][0]["fvu"] == 0.0
    assert all(row["error"] > 0 for row in grown["stream"][1:])
    assert [row["own_error"] is None for row in grown["stream"]] == [True, False, False, True]
    assert grown["stream"][1]["own_error"] == grown["stream"][1]["error"]  # nothing comes from below


def test_the_streams_error_is_the_distance_of_two_models_hidden_states(grown, folder):
    converted, recipe = load(folder), Recipe(**load_recipe(folder / "recipe.yaml"))
    ids = held_out(converted, recipe)
    settle(converted, recipe, grown["compute"])
    original = open_model("demo-glu").load(compute=grown["compute"])
    with torch.no_grad():
        new = converted.model(input_ids=ids, output_hidden_states=True).hidden_states[3][:, 1:].double()
        old = original(input_ids=ids, output_hidden_states=True).hidden_states[3][:, 1:].double()
    error, variance = (new - old).square().sum(), (old - old.mean((0, 1))).square().sum()
    row = grown["stream"][2]  # entry 0 of hidden_states is the embedding
    assert row["error"] == pytest.approx((error / old.square().sum()).item(), rel=1e-4)
    assert row["fvu"] == pytest.approx((error / variance).item(), rel=1e-4)


@pytest.mark.parametrize(("n", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_layers_come_in_by_powers_of_two_and_in_the_end_all_of_them(n, counts):
    sets = _sets(range(n))
    assert [len(which) for which in sets["bottom"]] == [len(which) for which in sets["top"]] == counts
    assert sets["bottom"][0] == (0,) and sets["top"][0] == (n - 1,)
    assert sets["bottom"][-1] == sets["top"][-1] == tuple(range(n))
    assert sets["alone"] == [(layer,) for layer in range(n)]


def test_the_verdict_follows_from_the_interval_of_the_difference(grown):
    joint = grown["bottom"][-1]
    for interval, words in (([-2, -1], "cancel in part"), ([-1, 1], "Errors add up"), ([1, 2], "more than add up")):
        assert words in _verdict(joint | {"excess_delta_ce_ci": interval})
    assert "nothing to add up" in _verdict(grown["alone"][0])


def test_the_table_shows_every_row_and_the_verdict(grown):
    shown = io.StringIO()
    Console(width=127, file=shown).print(*growth_table(grown))
    text = shown.getvalue()
    assert "from the bottom" in text and "from the top" in text and "each alone" in text and "1-2" in text
    assert f"{grown['bottom'][-1]['delta_ce']:+.4f}" in text and grown["verdict"][:40] in text
    assert json.loads(json.dumps(grown)) == grown


def test_another_model_is_refused_and_the_folder_is_left_as_it_was(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    before = {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()}
    with pytest.raises(BaseModelError):
        growth(copy, base="demo-mlp")
    assert growth(copy, tokens=512)["tokens"] < 512
    assert {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()} == before


def test_a_model_whose_attention_was_healed_is_refused(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config["mxd"]["healed"] = [{"mode": "both", "lora": "merged", "maps": ["layers.0.self_attn.q_proj"]}]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="attention was healed"):
        growth(copy, tokens=512)
