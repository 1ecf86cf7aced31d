"""Probing: pooled units, the best of them, and a floor that chance alone reaches."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, f1_score

import mxdsurgery
from mxdsurgery.base.activations import record_activations
from mxdsurgery.cli import main
from mxdsurgery.errors import DataError, LayerSelectionError, MemoryBudgetError, OutputError
from mxdsurgery.measuring.expert_layers import open_expert_layers
from mxdsurgery.measuring.probe import HIDDEN_UNITS, _best_unit, _joined, pool, probe_units
from mxdsurgery.text.labelled import read_labelled, token_batches
from mxdsurgery.text.sources import Packing

PIECES = {
    "import": "import {0}\nfrom {0} import name\nimport os.path\n",
    "class": "class {0}(Exception):\n    def __init__(self):\n        pass\n",
    "test": "assert {0} == 1\nassert not {0}\nassert {0} in (1, 2)\n",
}


TWO = '{"text": "import os", "label": "x"}\n{"text": "import re", "label": "y"}\n'


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    path = tmp_path_factory.mktemp("labelled") / "python.jsonl"
    rows = [{"text": piece.format(f"name{i}"), "label": label} for i in range(40) for label, piece in PIECES.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_class_has_its_expert_well_above_the_floor(converted, labelled):
    result = mxdsurgery.probe(converted.out, data=str(labelled))
    assert result["layer"] == 1 and result["texts"] == 120 and result["classes"] == dict.fromkeys(sorted(PIECES), 40)
    names = [subject["name"] for subject in result["subjects"]]
    assert names == ["mxd, K = 8", HIDDEN_UNITS]
    for subject in result["subjects"]:
        assert subject["mean_f1"] > 0.8 > 0.6 > subject["mean_floor_f1"]
        for entry in subject["classes"]:
            assert 0 <= entry["f1"] <= entry["best_f1"] <= 1 and 0 <= entry["unit"] < subject["units"]
    assert json.loads((converted.out / "probing" / "python-layer1.json").read_text()) == result
    assert mxdsurgery.probe(converted.out, data=str(labelled)) == result


def test_pooling_is_the_mean_over_a_texts_tokens_but_position_0(converted, labelled):
    opened = open_expert_layers(converted.out, 2)
    texts = read_labelled(str(labelled)).texts[:9] + ["x"]
    batches = token_batches(texts, Packing(opened.tokenizer, 32), 64)
    assert len(batches) > 1
    experts, hidden = pool(opened.model, opened.block, opened.layers, batches, len(texts))
    layer = opened.layers["mxd, K = 8"]
    for row, text in enumerate(texts):
        ids = torch.tensor([opened.tokenizer(text, add_special_tokens=False)["input_ids"][:32]])
        if ids.shape[1] < 2:
            assert experts.features[row].nnz == 0
            continue
        x = record_activations(opened.model, [opened.block], ids)[2].x[0, 1:]
        mean = layer.coefficients(x).dense(256).float().mean(0).numpy()
        np.testing.assert_allclose(experts.features[row].toarray()[0], mean, rtol=0.05, atol=0.02)
        z = opened.block.hidden(opened.model.base_model, x).float().mean(0).numpy()
        np.testing.assert_allclose(hidden.features[row].toarray()[0], z, rtol=0.05, atol=0.02)


def test_the_best_unit_and_its_scores_are_those_of_plain_scikit_learn():
    generator = np.random.default_rng(0)
    positive = generator.random(300) < 0.3
    features = generator.random((300, 20)) + positive[:, None] * np.linspace(0, 0.6, 20)
    train, test = np.arange(200), np.arange(200, 300)
    found = _best_unit(sparse.csc_matrix(features), positive, train, test)
    scores = []
    for column in (features / features[train].std(0)).T[:, :, None]:
        said = LogisticRegression(class_weight="balanced").fit(column[train], positive[train]).predict(column)
        scores.append((f1_score(positive[train], said[train]), said[test]))
    unit = max(range(20), key=lambda index: scores[index][0])
    assert found["unit"] == unit
    assert found["f1"] == pytest.approx(f1_score(positive[test], scores[unit][1]))
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(positive[test], scores[unit][1]))


def test_noise_reaches_the_floor_and_no_more():
    generator = np.random.default_rng(1)
    labels = np.array(["a", "b"])[generator.integers(0, 2, 800)]
    result = probe_units(sparse.random(800, 300, density=0.1, format="csc", random_state=1), labels, seed=0)
    assert result["mean_balanced_accuracy"] == pytest.approx(result["mean_floor_balanced_accuracy"], abs=0.08)
    assert abs(result["mean_floor_balanced_accuracy"] - 0.5) < 0.06


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_labelled_text_is_read_from_every_form(form, labelled, tmp_path):
    import pandas

    table = pandas.read_json(labelled, lines=True).rename(columns={"text": "body", "label": "kind"})
    path = tmp_path / f"t.{form}"
    if form == "parquet":
        table.to_parquet(path)
    elif form == "csv":
        table.to_csv(path, index=False)
    else:
        table.to_json(path, orient="records", lines=True)
    read, plain = read_labelled(str(path), "body", "kind"), read_labelled(str(labelled))
    assert (read.texts, read.labels, read.classes) == (plain.texts, plain.labels, sorted(PIECES))
    assert read.drawn_from == len(read.texts) == 120


def test_numbers_as_labels_are_names(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a b", "label": 1}\n{"text": "c", "label": 0}\n{"text": " ", "label": 2}\n')
    assert read_labelled(str(tmp_path / "t.jsonl")).labels == ["1", "0"]


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        ('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n', ["--label-column", "kind"], "has no column 'kind'"),
        ('{"text": "a", "label": "x"}\n', [], "has 1 classes"),
        ("\n", [], "holds no labelled text"),
        (
            '{"text": "import os", "label": "x"}\n{"text": "import re", "label": "y"}\n',
            [],
            "too few texts of a class: 'x' 1, 'y' 1\n",
        ),
        ('{"text": "import os", "label": "x"}\n{"text": "import re", "label": "y"}\n', ["--context", "5k"], "reads at most"),
        ('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n', ["--layer", "-3"], "no text has two tokens"),
        ("not json", [], "line 1: not JSON"),
    ],
)
def test_bad_labelled_text_is_a_named_error(content, words, message, converted, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    result = CliRunner().invoke(main, ["probe", str(converted.out), "--data", str(path), *words])
    kind = "RecipeError" if "--context" in words else "DataError"
    assert result.exit_code == 2 and message in result.stderr and kind in result.stderr


def test_wrong_layers_and_folders_are_named(converted, labelled, tmp_path):
    with pytest.raises(LayerSelectionError, match="holds no experts in layer 3"):
        mxdsurgery.probe(converted.out, data=str(labelled), layer=3)
    with pytest.raises(LayerSelectionError, match="no experts in layer -4\nexpected: one of 1, 2; or, from the end, -3, -2"):
        mxdsurgery.dissect(converted.out, layer=-4)
    assert mxdsurgery.dissect(converted.out, layer=-3)["layer"] == 1
    (tmp_path / "frontier.json").write_text("{}")
    with pytest.raises(OutputError, match="no frontier.json that can be read"):
        mxdsurgery.probe(tmp_path, data=str(labelled))
    with pytest.raises(DataError, match="no text file"):
        mxdsurgery.probe(converted.out, data="nothing.jsonl")


def test_all_kinds_of_a_frontier_are_probed_and_dissected(labelled, tmp_path):
    out = tmp_path / "out"
    kinds = ("mxd", "skip-transcoder", "topk-sae", "dense")
    small = {"tokens": 6_500, "eval_tokens": 500, "expansion": 6, "batch": 1024, "device": "cpu", "shuffle": 0}
    mxdsurgery.frontier("demo-glu", layer=2, k=(4,), kinds=kinds, out=str(out), **small)
    names = ["mxd, K = 4", "skip-transcoder, K = 4", "topk-sae, K = 4"]
    result = mxdsurgery.probe(out, data=str(labelled), samples=60)
    assert [subject["name"] for subject in result["subjects"]] == [*names, HIDDEN_UNITS] and result["texts"] == 60
    found = mxdsurgery.dissect(out, data=str(labelled))
    assert [subject["name"] for subject in found["subjects"]] == names
    printed = CliRunner().invoke(main, ["dissect", str(out)])
    assert printed.exit_code == 0 and "effective rank" in printed.stdout and "topk-sae" in printed.stdout


def test_adding_up_batches_is_linear_in_what_they_hold(monkeypatch):
    """Each batch's entries are touched once, and texts that two batches share are added up."""
    touched, join = [], np.concatenate
    monkeypatch.setattr(np, "concatenate", lambda parts: touched.append(sum(map(len, parts))) or join(parts))
    monkeypatch.setattr(sparse.csc_matrix, "__add__", None)  # each sum would be written anew
    monkeypatch.setattr(sparse.coo_matrix, "__add__", None)
    for count in (10, 20):
        touched.clear()
        parts = [sparse.coo_matrix(([1.0, 2.0], ([at, at + 1], [0, 3])), (count + 1, 5)) for at in range(count)]
        joined = _joined(parts)
        assert sum(touched) == 3 * 2 * count
        assert joined.toarray().sum(0).tolist() == [count, 0, 0, 2 * count, 0] and joined.nnz == 2 * count


def test_hidden_units_that_do_not_fit_are_refused_before_a_pass(converted, labelled, monkeypatch):
    monkeypatch.setattr("mxdsurgery.measuring.probe.free_memory", lambda device: 1000)
    with pytest.raises(MemoryBudgetError, match="hidden units over each of 120 texts take"):
        mxdsurgery.probe(converted.out, data=str(labelled))
