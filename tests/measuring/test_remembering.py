"""A layer that remembers its last input: nothing is computed twice, and nothing comes out otherwise."""

from contextlib import nullcontext

import pytest
import torch
from tiny import batches, busy_layer, tiny_model, train

from mxdsurgery.base.scores import SCORES
from mxdsurgery.layers.replacement import LAYER_KINDS
from mxdsurgery.measuring import scoring
from mxdsurgery.measuring.fidelity import measure
from mxdsurgery.measuring.remembering import remembering


def counted(layer, runs):
    return layer.gate.register_forward_hook(lambda *_: runs.append(1))


@pytest.mark.parametrize("kind", [kind for kind in LAYER_KINDS if kind != "dense"])
def test_what_is_remembered_is_of_the_last_input(kind):
    layer, runs = busy_layer(kind, "topk", d_model=16, d_hidden=24, n_experts=50, k=5, std=0.4), []
    x, other = torch.randn(2, 3, 7, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pairs = [(given, layer(given)) for given in (x, x.clone(), other, other[:2])]
        own, wanted = set(vars(layer)), pairs[0][1]
        counted(layer, runs)
        with remembering(layer):
            for given, found in pairs:
                again = layer.combine(layer.coefficients(given), given)
                assert layer(given).equal(found) and again.equal(found)
            assert len(runs) == 3
        assert set(vars(layer)) == own and layer(x).equal(wanted) and len(runs) == 4


def test_an_evaluation_runs_a_layer_once_for_its_variants_and_its_figures_stay_the_same(monkeypatch):
    model, ids = tiny_model("llama"), next(batches(seed=5))
    layers, _, blocks = train(model, steps=3)
    layers = {index: layer.eval().requires_grad_(False) for index, layer in layers.items()}
    runs = {index: [] for index in layers}
    for index, layer in layers.items():
        counted(layer, runs[index])

    def measured():
        for each in runs.values():
            each.clear()
        return measure(model, blocks, layers, ids, batch=10_000), {index: len(each) for index, each in runs.items()}

    figures, fewer = measured()
    monkeypatch.setattr("mxdsurgery.measuring.fidelity.remembering", lambda _: nullcontext())
    monkeypatch.setattr("mxdsurgery.measuring.fidelity._wanted", lambda _: SCORES)
    same, more = measured()
    assert figures == same
    first, second = layers
    assert more[first] - fewer[first] >= 2 * (more[second] - fewer[second]) > 0  # with all in place, the first only
    assert fewer[first] < 0.6 * more[first]


def test_one_score_alone_is_that_of_all_to_the_bit():
    model, ids = tiny_model("llama"), next(batches(seed=5))
    hidden = torch.randn(3, *ids.shape, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    others = [("whole", hidden[1]), ("ce", hidden[1]), ("kl", hidden[1]), ("more", hidden[2])]
    found = dict(scoring.prediction_sums(model, ids, hidden[0], others, lambda name: (name,) if name in SCORES else SCORES))
    assert list(found["whole"]) == list(found["more"]) == ["ce", "kl", "agree"]
    for score in ("ce", "kl"):
        assert list(found[score]) == [score] and found[score][score].equal(found["whole"][score])
