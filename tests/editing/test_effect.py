"""What edits do: figures by their definitions, parts that add up, and controls that differ in the experts only."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from tiny import S, T, coefficients, tiny_opened

import mxdsurgery.editing.effect
from mxdsurgery.checkpoint.converted import load
from mxdsurgery.editing.edits import Edits, edits_from_flags
from mxdsurgery.editing.effect import _firings, _measure, _rows, draw_control, effect, effect_tables
from mxdsurgery.editing.predictions import prediction_shifts
from mxdsurgery.errors import EditError
from mxdsurgery.measuring.held_out import held_out
from mxdsurgery.measuring.intervals import next_token_sums


def by_definition(original, changed, next_ids):
    log_p, log_q = original.double().log_softmax(-1), changed.double().log_softmax(-1)
    lost = log_p - log_q
    return lost.gather(1, next_ids[:, None])[:, 0], (log_p.exp() * lost).sum(-1)


@pytest.mark.parametrize("common", [0.0, -300.0, 300.0])
@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_shifts_are_those_of_the_definition(scale, common):
    torch.manual_seed(0)
    original, next_ids = torch.randn(50, 40) * 4, torch.randint(40, (50,))
    changed = original + torch.randn(50, 40) * scale + common
    for found, wanted in zip(
        prediction_shifts(original, changed, next_ids), by_definition(original, changed, next_ids), strict=True
    ):
        torch.testing.assert_close(found.double(), wanted, rtol=2e-3 if common else 1e-4, atol=2e-5 * (1 + abs(common)))


def test_tiny_shifts_are_exact_and_none_is_zero():
    torch.manual_seed(0)
    original, next_ids = torch.randn(50, 1000).double() * 4, torch.randint(1000, (50,))
    changed = original + torch.randn(50, 1000).double() * 1e-4
    wanted = by_definition(original.float(), changed.float(), next_ids)
    delta_ce, kl = prediction_shifts(original.float(), changed.float(), next_ids)
    assert wanted[1].mean() < 1e-8
    torch.testing.assert_close(kl.double(), wanted[1], rtol=1e-2, atol=5e-11)
    torch.testing.assert_close(delta_ce.double(), wanted[0], rtol=1e-2, atol=1e-9)
    log_p, log_q = original.float().log_softmax(-1), changed.float().log_softmax(-1)
    plain = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert (plain - wanted[1]).abs().max() > 1e-8  # the plain formula is less exact
    for none in prediction_shifts(original, original.clone(), next_ids):
        assert not none.any()
    assert all(part.shape == (0,) for part in prediction_shifts(original[:0], original[:0], next_ids[:0]))


def run(opened, edits, controls=(), top=6):
    record, drawn = _measure(opened, edits, list(controls), top, lambda: None)
    return record.figures(_Letters(), top), drawn


class _Letters:
    """A tokenizer of 64 letters."""

    def encode(self, _text, **_options):
        return [0]

    def decode(self, ids, **_options):
        return "".join(chr(200 + token) for token in ids)


@torch.no_grad()
def logits(opened, edits):
    plain = opened.model(input_ids=opened.input_ids).logits
    with edits.live(opened.model):
        return plain, opened.model(input_ids=opened.input_ids).logits


ALL_KINDS = Edits(
    ablate={0: [1], 1: [2]},
    drop={1: [3]},
    scale={0: {4: 2.0}},
    steer={1: {5: 0.5}},
    clamp={0: {6: 1.5}},
    copy={1: {7: 8}},
    merge={0: [[9, 10]]},
    replace={1: {11: [0.25] * 32}},
)


@pytest.mark.parametrize("edits", [Edits(ablate={1: [0, 1, 2]}), ALL_KINDS], ids=["ablate", "all kinds"])
def test_figures_are_those_of_plain_passes(edits):
    opened = tiny_opened("llama")
    found, _ = run(opened, edits)
    original, changed = logits(opened, edits)
    plain, edited = (next_token_sums(some, original, opened.input_ids) for some in (original, changed))
    tokens = S * (T - 2)
    assert found["all"]["tokens"] == tokens
    assert found["original"]["ce"] == pytest.approx(plain["ce"].sum().item() / tokens, rel=1e-6)
    assert found["all"]["delta_ce"] == pytest.approx((edited["ce"] - plain["ce"]).sum().item() / tokens, abs=1e-6)
    assert found["all"]["kl"] == pytest.approx(edited["kl"].sum().item() / tokens, rel=1e-5)
    assert found["all"]["top1_agreement"] == pytest.approx(edited["agree"].sum().item() / tokens)
    assert found["all"]["kl"] > 1e-4
    low, high = found["all"]["kl_ci"]
    assert low < found["all"]["kl"] < high


def test_predictions_are_parted_by_where_the_unedited_gates_choose_an_edited_expert():
    opened, edits = tiny_opened("gpt2"), Edits(ablate={0: [3], 1: [5, 6]})
    found, _ = run(opened, edits)
    firing = (coefficients(opened, 0)[..., [3]] > 0).any(-1) | (coefficients(opened, 1)[..., [5, 6]] > 0).any(-1)
    firing = firing[:, 1:-1]
    shifts = [
        torch.stack(part)
        for part in zip(*((delta, kl) for _, delta, kl in _rows(opened.input_ids, *logits(opened, edits))), strict=True)
    ]
    for part, chosen in (("firing", firing), ("silent", ~firing)):
        assert found[part]["tokens"] == chosen.sum() > 0
        for name, values in zip(("delta_ce", "kl"), shifts, strict=True):
            assert found[part][name] == pytest.approx(values[chosen].mean().item(), abs=1e-12)


def test_in_the_last_layer_nothing_changes_where_no_edited_expert_fires():
    opened, edits = tiny_opened("llama"), Edits(ablate={1: [3]})
    found, _ = run(opened, edits)
    assert found["silent"]["tokens"] > 0 and found["silent"]["kl"] == 0 == found["silent"]["delta_ce"]
    assert found["firing"]["kl"] > 0 and all(one["experts"][0]["expert"] == 3 for one in found["predictions"])


def test_next_tokens_are_listed_by_the_change_of_their_mean_probability():
    opened, edits = tiny_opened("llama"), Edits(steer={1: {3: 2.0}})
    found, _ = run(opened, edits)
    p, q = (some[:, 1:-1].softmax(-1) for some in logits(opened, edits))
    firing = (coefficients(opened, 1)[:, 1:-1, 3] > 0)[..., None].expand_as(p)
    for part, chosen in (("all", torch.ones_like(firing)), ("firing", firing)):
        before, after = (some[chosen].view(-1, p.shape[-1]).mean(0) for some in (p, q))
        for name, order in (("rose", (after - before).argsort(descending=True)), ("fell", (after - before).argsort())):
            entries = found[part][name]
            assert [entry["token"] for entry in entries] == [chr(200 + token) for token in order[:6].tolist()]
            assert entries[0]["before"] == pytest.approx(before[order[0]].item(), abs=1e-12)
            assert entries[0]["after"] == pytest.approx(after[order[0]].item(), abs=1e-12)


@pytest.mark.parametrize("batch", [1, 3 * T, 100 * T])
def test_the_most_changed_predictions_are_those_with_the_largest_kl(batch):
    opened, edits = tiny_opened("llama", batch=batch), Edits(ablate={0: [1, 2, 3]})
    found, _ = run(opened, edits)
    original, changed = (some[:, 1:-1].log_softmax(-1) for some in logits(opened, edits))
    kl = (original.exp() * (original - changed)).sum(-1)
    a = coefficients(opened, 0)
    wanted = kl.flatten().topk(6)
    assert [one["kl"] for one in found["predictions"]] == pytest.approx(wanted.values.tolist())
    for one, place in zip(found["predictions"], wanted.indices.tolist(), strict=True):
        row, position = place // (T - 2), place % (T - 2) + 1
        ids = opened.input_ids[row]
        assert (one["context"], one["position"]) == (row, position)
        assert one["text"] == "".join(chr(200 + token) for token in ids[max(0, position - 11) : position + 1].tolist())
        assert one["next"] == chr(200 + ids[position + 1])
        for when, log in (("before", original), ("after", changed)):
            here = log[row, position - 1]
            assert one[f"logprob_{when}"] == pytest.approx(here[ids[position + 1]].item())
            assert one[f"likeliest_{when}"]["token"] == chr(200 + here.argmax())
            assert one[f"likeliest_{when}"]["probability"] == pytest.approx(here.max().exp().item())
        there = {e["expert"]: e["coefficient"] for e in one["experts"]}
        assert there == pytest.approx({n: a[row, position, n].item() for n in (1, 2, 3) if a[row, position, n] > 0})


def test_frequencies_leave_out_position_0():
    opened = tiny_opened("gpt2")
    for layer, fired in _firings(opened, [0, 1], lambda: None).items():
        assert fired.tolist() == (coefficients(opened, layer)[:, 1:] > 0).sum((0, 1)).tolist()


def test_a_controls_figures_are_those_of_its_own_edits():
    opened, edits = tiny_opened("gpt2"), Edits(ablate={0: [1]}, steer={1: {2: 1.0}})
    fired = _firings(opened, edits.layers, lambda: None)
    others = [draw_control(edits, fired, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    _, drawn = run(opened, edits, others)
    for other, sums in zip(others, drawn, strict=True):
        assert list(other.steer[1].values()) == [1.0]
        alone, _ = run(opened, other)
        for name in ("delta_ce", "kl"):
            assert sums[name] / (S * (T - 2)) == pytest.approx(alone["all"][name], abs=1e-12)


def test_controls_fire_about_as_often_and_are_not_edited_themselves():
    fired = {3: torch.cat([torch.zeros(30, dtype=torch.int64), torch.arange(1, 201)])}
    edits = Edits(ablate={3: [5, 130, 131]}, copy={3: {229: 128}})
    seen = set()
    for seed in range(100):
        other = draw_control(edits, fired, torch.Generator().manual_seed(seed))
        never, *middle, most = other.experts(3)
        assert len({*other.experts(3)}) == 4 and not {5, 130, 131, 229, 128} & {*other.experts(3)}
        assert never < 30 and all(118 <= expert <= 143 for expert in middle) and most >= 208
        assert other.copy[3] == {most: 128}
        seen.update(middle)
    assert len(seen) > 15  # by chance, not always the nearest


def test_where_no_other_expert_is_alike_any_other_will_do_and_where_none_is_left_it_is_an_error():
    fired = {0: torch.tensor([0, 9, 9])}
    assert draw_control(Edits(ablate={0: [0]}), fired, torch.Generator()).ablate[0][0] in (1, 2)
    with pytest.raises(EditError, match="no experts left to compare 2 edited ones with"):
        draw_control(Edits(ablate={0: [0, 1]}), fired, torch.Generator())


def test_predictions_that_are_no_numbers_are_an_error():
    original = torch.randn(1, 8, 5)
    with pytest.raises(EditError, match="no numbers any more"):
        list(_rows(torch.zeros(1, 8, dtype=torch.int64), original, original / 0))


@pytest.fixture(scope="module")
def found(converted):
    loaded = load(converted.out, dtype="float32")
    ids = held_out(loaded, converted.recipe, None, 1024)
    seen = []
    handle = loaded.layers[1].gate.register_forward_hook(lambda _m, _x, a: seen.append(a))
    with torch.no_grad():
        original = loaded.model(input_ids=ids).logits
    handle.remove()
    fired = (seen[0].dense(256)[:, 1:] > 0).sum((0, 1))
    often, never = fired.argmax().item(), fired.argmin().item()
    edits = edits_from_flags(ablate=f"1:{often},1:{never}")
    result = effect(converted.out, edits=edits, tokens=1024, controls=2, top=4, device="cpu")
    return result, loaded, ids, original, edits, fired[[often, never]].tolist()


def test_a_folders_effect_is_that_of_plain_passes(found):
    result, loaded, ids, original, edits, fired = found
    with torch.no_grad(), edits.live(loaded.model):
        changed = loaded.model(input_ids=ids).logits
    ce = [F.cross_entropy(some[:, 1:-1].flatten(0, 1).double(), ids[:, 2:].flatten()).item() for some in (original, changed)]
    assert result["tokens"] == ids[:, 2:].numel() == result["all"]["tokens"]
    assert result["original"]["ce"] == pytest.approx(ce[0], abs=1e-6)
    assert result["all"]["delta_ce"] == pytest.approx(ce[1] - ce[0], abs=1e-6)
    assert [one["fired"] for one in result["experts"]] == fired and result["experts"][0]["of"] == ids[:, 1:].numel()
    controls = result["controls"]
    assert len(controls["draws"]) == 2 and controls["kl_range"][0] <= controls["kl"] <= controls["kl_range"][1]
    assert controls["kl"] == pytest.approx(sum(one["kl"] for one in controls["draws"]) / 2)
    assert json.loads(json.dumps(result))["words"] == edits.words()


def test_the_tables_say_it_all_and_leave_brackets_alone(found):
    result = found[0]
    result["predictions"][0]["text"] = "a [/bold] b"
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    for part in effect_tables(result):
        console.print(part)
    text = console.export_text()
    assert "'a [/bold] b'" in text and result["words"][0] in text and "mean of 2" in text
    if not result["experts"][1]["fired"]:
        assert f"1:{result['experts'][1]['expert']} never fires on this text" in text
    assert f"{result['all']['kl']:.3g}" in text and "stdlib" in text


def test_an_expert_that_never_fires_changes_nothing_and_is_said_to(converted):
    loaded = load(converted.out, dtype="float32")
    loaded.layers[2].gate.bias.data[7] = -1e9
    opened = mxdsurgery.editing.predictions.Opened(loaded, held_out(loaded, converted.recipe, None, 512), 512, "text")
    edits = Edits(ablate={2: [7]})
    record, _ = _measure(opened, edits, [], 4, lambda: None)
    figures = record.figures(loaded.tokenizer(), 4)
    assert figures["firing"]["tokens"] == 0 and figures["firing"]["kl"] is None
    assert figures["all"]["kl"] == 0 and figures["predictions"] == [] and figures["all"]["rose"] == []
    experts = [{"layer": 2, "expert": 7, "fired": 0, "of": 508}]
    rest = {"words": edits.words(), "experts": experts, "controls": None, "tokens": 504, "data": "text"}
    lines, *tables = effect_tables(figures | rest)
    assert "2:7 never fires on this text" in lines and len(tables) == 2


def test_mistakes_are_named(converted):
    with pytest.raises(EditError, match="no edits were given"):
        effect(converted.out, edits=Edits())
    with pytest.raises(EditError, match="layer 0 has no experts"):
        effect(converted.out, edits=Edits(ablate={0: [1]}), tokens=512)
    with pytest.raises(EditError, match="for the model with the fingerprint"):
        effect(converted.out, edits=Edits(ablate={1: [1]}, model="0" * 16), tokens=512)
    assert math.isfinite(effect(converted.out, edits=Edits(ablate={1: [1]}), tokens=512, controls=0)["all"]["kl"])
