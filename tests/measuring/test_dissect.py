"""Rank, similarity, usage and specialisation: each against its definition or a case that is known."""

import json
import math

import pytest
import torch
from running import ROOT
from tiny import make_layer

import mxdsurgery
from mxdsurgery.layers.baselines import Transcoder
from mxdsurgery.measuring.dissect import (
    _information,
    _nearest,
    class_information,
    effective_rank,
    expert_ranks,
    nearest_similarity,
)


def test_the_effective_rank_counts_equal_singular_values():
    assert effective_rank(torch.diag(torch.tensor([2.0, 2.0, 2.0, 0.0]))) == pytest.approx(3.0)
    assert effective_rank(torch.outer(torch.randn(5), torch.randn(7))) == pytest.approx(1.0, abs=1e-5)


def test_an_experts_rank_is_that_of_its_matrix_and_a_features_is_1():
    layer = make_layer(n_experts=5)
    found = expert_ranks(layer)
    matrices = layer.experts.weight[:, :, None] * layer.decoder.weight
    assert found["experts"] == 5 and found["numerical_median"] == 12
    expected = sorted(effective_rank(matrix.detach()) for matrix in matrices)
    assert found["effective"]["50%"] == pytest.approx(expected[2])
    assert set(expert_ranks(Transcoder(d_model=12, n_experts=9, k=2))["effective"].values()) == {1.0}


def test_similarity_is_the_cosine_of_whole_matrices():
    layer = make_layer(n_experts=6)
    flat = (layer.experts.weight[:, :, None] * layer.decoder.weight).flatten(1).detach()
    cosines = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1).abs()
    nearest = cosines.fill_diagonal_(0).amax(1)
    found = nearest_similarity(layer)["experts"]
    assert found["50%"] == pytest.approx(nearest.quantile(0.5).item(), rel=1e-4)


def test_similarity_in_chunks_is_the_same(monkeypatch):
    rows = torch.randn(50, 8)
    whole = _nearest(rows)
    monkeypatch.setattr("mxdsurgery.measuring.dissect._SIMILARITY_ELEMENTS", 130)
    assert _nearest(rows) == whole


def test_information_is_1_for_units_of_one_class_each_and_0_for_units_of_all():
    tokens = torch.tensor([[10.0, 30.0], [10.0, 30.0]])
    pure = torch.tensor([[5.0, 0.0], [0.0, 15.0]])
    even = torch.tensor([[5.0, 15.0], [2.0, 6.0]])
    found = class_information(torch.stack([pure, even]).double(), tokens.double())
    assert found["information"] == pytest.approx(1.0) and found["classes_per_unit"] == pytest.approx(1.0)
    assert found["chance_information"] == pytest.approx(0.0, abs=1e-9)
    assert found["chance_classes_per_unit"] == pytest.approx(2.0)


def test_of_nothing_there_is_no_information_and_no_rank():
    tokens = torch.full((2, 2), 10.0).double()
    silent = class_information(torch.zeros(2, 3, 2).double(), tokens)
    assert set(silent.values()) == {None}  # 0 classes per unit is no number of classes
    assert _information(silent) == ["n/a"] * 4
    one_class = class_information(torch.rand(2, 300, 1).double(), tokens[:, :1])
    assert one_class["information"] is None and one_class["classes_per_unit"] == pytest.approx(1.0)
    assert effective_rank(torch.zeros(3, 4)) == 0.0


def test_a_converted_model_is_dissected(converted, tmp_path):
    path = tmp_path / "two.jsonl"
    texts = [(f"import name{i}", "a") for i in range(20)] + [(f"class Name{i}:", "b") for i in range(20)]
    lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in texts]
    path.write_text("".join(lines))
    found = mxdsurgery.dissect(converted.out, data=str(path), layer=2)
    (subject,) = found["subjects"]
    assert 1 < subject["rank"]["effective"]["50%"] <= found["decoder_effective_rank"] * 1.2
    usage, use = subject["usage"], subject["specialisation"]
    assert 0 < usage["l0"] <= 8 and usage["effective_experts"] <= 256
    assert sum(usage["firing_frequency"].values()) == pytest.approx(1 - usage["dead_share"])
    assert 0 <= use["chance_information"] < use["information"] <= 1 and 1 <= use["classes_per_unit"] <= 2
    assert found["hidden_units"]["information"] < use["information"]
    assert (converted.out / "dissection" / "two-layer2.json").is_file()
    weights_only = mxdsurgery.dissect(converted.out)
    assert weights_only["layer"] == 1 and "usage" not in weights_only["subjects"][0]


def test_the_example_shows_what_it_says(forking):
    done = forking.script(ROOT / "examples" / "rank_one_experts.py")
    assert done.returncode == 0, done.stderr
    assert "ranks of the experts: {16}; of D: 16" in done.stdout and "rank-1 experts differ by" in done.stdout


def test_entropy_of_even_use_is_the_number_of_experts():
    from mxdsurgery.measuring.dissect import _entropy_rank

    assert _entropy_rank(torch.full((64,), 0.25)) == pytest.approx(64)
    assert math.isclose(_entropy_rank(torch.tensor([1.0, 0.0])), 1.0)
