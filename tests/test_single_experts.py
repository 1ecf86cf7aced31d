"""What single experts do is measured as its page says: beside the whole model run anew with the same change."""

import math

import one_expert
import pytest
import single_experts
import torch
from one_expert import LayerAtWork, at_kl, scored
from tiny import N, coefficients, tiny_opened

from mxdsurgery.catalogue.contexts import Corpus

LAYER = 1


def at_work(kind="mxd"):
    opened = tiny_opened("llama", kind=kind)
    ids = opened.input_ids
    which = torch.zeros_like(ids, dtype=torch.bool)
    which[::2] = True
    return opened, LayerAtWork(opened.converted, LAYER), Corpus(ids, torch.zeros_like(ids), ["text"]), which


@torch.no_grad()
def predicted(opened, *change):
    """Log-probabilities of all next tokens (S, T, V), by the whole model with a change."""
    for one in change:
        with one:
            return opened.model(input_ids=opened.input_ids, use_cache=False).logits.log_softmax(-1)
    return opened.model(input_ids=opened.input_ids, use_cache=False).logits.log_softmax(-1)


def lost(before, after, where):
    """KL of predictions."""
    return (before.exp() * (before - after)).sum(-1)[where]


@pytest.mark.parametrize("kind", ["mxd", "molt"])
def test_firings_are_counted_where_something_is_predicted(kind):
    opened, work, corpus, which = at_work(kind)
    known = one_expert.firings(work, corpus, {"half": which})
    fires = (coefficients(opened, LAYER) > 0) & scored(corpus.ids)[..., None]
    assert known.fired.tolist() == fires.sum((0, 1)).tolist() and known.places == scored(corpus.ids).sum()
    labelled, places = known.labelled["half"]
    assert labelled.tolist() == fires[which].sum(0).tolist() and places == (which & scored(corpus.ids)).sum()
    expert = int(known.fired.argmax())
    assert known.contexts[expert].tolist() == fires[..., expert].any(1).nonzero()[:, 0].tolist()
    following = corpus.ids.roll(-1, 1)[fires[..., expert]]
    assert known.follows[expert].tolist() == torch.bincount(following, minlength=known.follows.shape[1]).tolist()
    assert known.mean[expert].item() == pytest.approx(
        coefficients(opened, LAYER)[..., expert][fires[..., expert]].mean().item()
    )
    ratio = (labelled / places + 1e-4) / ((known.fired - labelled) / (known.places - places) + 1e-4)
    assert ratio[known.preferring("half")].tolist() == sorted(ratio[known.fired > 0].tolist(), reverse=True)


def test_own_tokens_follow_more_often_than_elsewhere():
    follows, base = torch.tensor([[8.0, 2, 0, 90, 0, 3]]), torch.tensor([10.0, 40, 50, 900, 1, 2])
    known = one_expert.Firings(100, torch.ones(1), torch.ones(1), {}, follows, base, {})
    assert known.own_tokens(0).tolist() == [0, 5]  # not the fourth, which is as frequent everywhere


@pytest.mark.parametrize("kind", ["mxd", "transcoder", "molt"])
def test_ablation_is_that_of_the_whole_model(kind):
    opened, work, corpus, _ = at_work(kind)
    there = one_expert.firings(work, corpus, {})
    expert, own = int(there.fired.argmax()), torch.tensor([3, 5])
    found = one_expert.ablation(work, corpus, there, expert, own, len(corpus.ids), torch.Generator().manual_seed(0))
    fires = (coefficients(opened, LAYER)[..., expert] > 0) & scored(corpus.ids)
    before = predicted(opened)
    itself = predicted(opened, opened.model.mxd.ablate({LAYER: [expert]}, positions=fires))
    nothing = predicted(opened, work.without_layer(fires))
    assert found["fired"] == fires.sum() > 1
    assert found["itself"]["kl"] == pytest.approx(lost(before, itself, fires).mean().item(), rel=1e-6)
    assert found["layer"]["kl"] == pytest.approx(lost(before, nothing, fires).mean().item(), rel=1e-6)
    fell = (before - itself)[fires].gather(1, corpus.ids.roll(-1, 1)[fires][:, None]).mean().item()
    assert found["itself"]["delta_ce"] == pytest.approx(fell, rel=1e-6, abs=1e-9)
    fell = (before.exp()[..., own].sum(-1).log() - itself.exp()[..., own].sum(-1).log())[fires].mean().item()
    assert found["itself"]["own"] == pytest.approx(fell, rel=1e-5, abs=1e-9)
    assert 0 < found["other"]["kl"] != found["itself"]["kl"]


def test_steering_is_equally_hard_and_seen_in_own_tokens():
    opened, work, corpus, _ = at_work()
    known = one_expert.firings(work, corpus, {})
    experts = known.fired.topk(3).indices.tolist()
    strengths, logs, _ = one_expert.steering(work, corpus.ids, known, experts, kl=0.05)
    where, before = scored(corpus.ids), predicted(opened)
    for row, (expert, strength) in enumerate(zip(experts, strengths, strict=True)):
        after = predicted(opened, opened.model.mxd.steer({LAYER: {expert: strength * known.mean[expert].item()}}))
        assert lost(before, after, where).mean().item() == pytest.approx(0.05, rel=0.031)
        for column, other in enumerate(experts):
            own = known.own_tokens(other)
            rose = (after[where][:, own].logsumexp(1) - before[where][:, own].logsumexp(1)).mean().item()
            assert logs[row, column].item() == pytest.approx(rose, abs=1e-6)
    beside = single_experts.beside_others(0, logs, logs)
    assert beside["own"] == logs[0, 0].item() and beside["others"] == pytest.approx(logs[1:, 0].mean().item())
    logs[0] = math.nan
    assert single_experts.beside_others(0, logs, logs) == {} != single_experts.beside_others(1, logs, logs)


def test_a_strength_is_found_or_said_to_be_none():
    def shifts(of):
        return lambda strength: one_expert.Shifts(torch.zeros(1), torch.tensor([of(strength)]), torch.zeros(1, 1))

    assert at_kl(shifts(lambda s: min(1e-6 * s**2, 0.5)), 0.1)[0] == pytest.approx(0.1**0.5 * 1e3, rel=0.02)
    assert at_kl(shifts(lambda s: 0.0 if s < 7 else (s - 7) / 50), 0.1)[0] == pytest.approx(12, rel=0.05)
    assert at_kl(shifts(lambda s: 0.05), 0.1) == (None, None)


def test_experts_of_each_layer_are_drawn_at_the_same_frequencies():
    frequency = torch.linspace(0.001, 0.1, 100)
    known = one_expert.Firings(1000, 1000 * frequency, frequency, {}, frequency, frequency, {})
    chosen = one_expert.drawn(known, known, (0.01, 0.04), 4, least=1)
    wanted = [0.01 * 4 ** ((number + 0.5) / 4) for number in range(4)]
    assert frequency[chosen].tolist() == pytest.approx(wanted, abs=0.001) and len(set(chosen)) == 4
    assert len(one_expert.drawn(known, known, (0.01, 0.0125), 4, least=1)) == 3 and not one_expert.drawn(
        known, known, (0.01, 0.04), 4, 999
    )


def test_erasing_takes_as_many_experts_as_the_budget_asks():
    opened, work, corpus, which = at_work()
    known = one_expert.firings(work, corpus, {"half": which})
    before = predicted(opened)
    for row in one_expert.erasing(work, corpus, which, known, "half", (0.2, 0.5), draws=2):
        chosen = known.preferring("half")[: row["experts"]].tolist()
        change = before - predicted(opened, opened.model.mxd.ablate({LAYER: chosen}))
        lost_there = change.gather(2, corpus.ids.roll(-1, 1)[..., None])[..., 0]
        assert row["damage"] == pytest.approx(lost_there[which & scored(corpus.ids)].mean().item(), abs=1e-6)
        assert row["rest"] == pytest.approx(lost_there[~which & scored(corpus.ids)].mean().item(), abs=1e-6)
        assert row["reached"] == (row["damage"] >= row["budget"] * row["layer"]["damage"]) or row["experts"] == N
        assert len(row["random"]) == (2 if 2 * row["experts"] <= (known.fired > 0).sum() else 0)


def test_places_of_a_story_are_told_apart():
    tokens = ["<s>", " way", '."', " he", " said", ".", ' "', "No", "!", '"', " Then", " she", ",", '"', "so", '".']
    told = single_experts.told_apart(tokens)
    assert [number for number, inside in enumerate(told["speech"]) if inside] == [0, 1, 6, 7, 8]
    assert [number for number, ends in enumerate(told["sentence starts"]) if ends] == [2, 5, 8, 15]


def test_places_of_documents_with_kinds_are_told_by_them():
    corpus = Corpus(torch.ones(1, 3, dtype=torch.int32), torch.tensor([[-1, 0, 1]]), ["book", "python"])
    assert single_experts.places_of(("python",), corpus, None)["python"].tolist() == [[False, False, True]]


def test_what_is_kept_takes_the_place_of_what_was(tmp_path, monkeypatch):
    monkeypatch.setattr(single_experts, "KEPT", tmp_path / "kept")
    path, read = tmp_path / "kept" / "rows.jsonl", single_experts.read_lines
    for value in (1 / 3, 2 / 3):
        for name in ("a", "b"):
            single_experts.keep(path, {"model": "m", "variant": name}, [{"at": [value]}])
    assert read(path) == [{"model": "m", "variant": name, "at": [0.66667]} for name in ("a", "b")]
