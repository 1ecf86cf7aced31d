"""What was trained on is known afterwards, and no figure that is called held-out rests on it."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from running import Said, without_reloads

import mxdsurgery
from mxdsurgery.checkpoint.card import evaluation_table
from mxdsurgery.checkpoint.converted import load, saved_recipe
from mxdsurgery.checkpoint.trained_on import TRAINED_ON_FILE, read_trained_on
from mxdsurgery.conversion.heal_text import healing_texts
from mxdsurgery.demo import stdlib_documents
from mxdsurgery.errors import DataError, MxDWarning, NotConvertedError
from mxdsurgery.measuring.held_out import held_out, trained_share
from mxdsurgery.text.sources import open_texts

OPTIONS = {"layers": "1", "tokens": 8_192, "eval_tokens": 1_024, "n_experts": 64, "k": 4, "shuffle": 0, "batch": 1_024}
TRAINED = 8_192 // 128  # contexts


@pytest.fixture(scope="module")
def documents():
    return list(itertools.islice((text[:6_000] for text in stdlib_documents("train") if len(text) > 6_000), 12))


def written(path, documents):
    path.write_text("\n".join(json.dumps({"text": text}) for text in documents), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def made(documents, tmp_path_factory, little_validation):
    """demo-glu converted on the first part of a text, whose first contexts were held out."""
    folder = tmp_path_factory.mktemp("made")
    text = written(folder / "text.jsonl", documents)
    return mxdsurgery.convert("demo-glu", **OPTIONS, data=text, eval_data=None, out=str(folder / "out"), device="cpu").out


@pytest.fixture(scope="module")
def opened(made):
    """The folder, its recipe, and its three texts."""
    converted, recipe = load(made), saved_recipe(made)
    return converted, recipe, open_texts(recipe, converted.tokenizer())


def test_a_conversion_records_which_contexts_it_was_trained_on_and_sets_two_texts_aside(made, opened):
    _, recipe, texts = opened
    record = read_trained_on(made)
    contexts = torch.stack(list(texts.train.contexts()))
    assert len(contexts) > 2 * TRAINED and len(texts.validation) == len(texts.heldout) == 8
    known = record.fingerprints.known(contexts)
    assert known[:TRAINED].all() and not known[TRAINED:].any()
    assert not record.fingerprints.known(torch.cat([texts.validation, texts.heldout])).any()
    first = len(texts.heldout)
    assert record.texts == [
        {"data": "text.jsonl", "context": 128, "first": first, "last": first + TRAINED, "passes": 1},
    ]
    assert record.ends(recipe.data) == first + TRAINED and record.ends("another.jsonl") == 0
    evaluation = json.loads((made / "evaluation.json").read_text())
    assert evaluation["trained_on"] == 0 and "1,008 held-out tokens" in (made / "README.md").read_text()


@pytest.mark.parametrize("order", [1, -1])
def test_a_text_that_was_trained_on_is_left_out_under_another_name_and_in_another_order(
    made, opened, documents, tmp_path, order
):
    converted, recipe, texts = opened
    copy = written(tmp_path / "renamed.jsonl", documents[::order])
    with pytest.warns(MxDWarning, match="contexts of 'renamed.jsonl' were trained on: they are left out"):
        contexts = held_out(converted, recipe, copy, tokens=100_000)
    everything = held_out(converted, recipe, copy, tokens=100_000, any_text=True)
    left_out = len(everything) - len(contexts)
    assert abs(left_out - TRAINED) <= (0 if order > 0 else 4)  # half and half at the seams with what was set aside
    assert trained_share(converted, contexts) == {"trained_on": 0}
    assert trained_share(converted, everything) == {"trained_on": left_out}


def test_evaluate_measures_what_is_left_and_refuses_where_nothing_is(made, opened, documents, tmp_path):
    converted, _, texts = opened
    folder = tmp_path / "folder"
    shutil.copytree(made, folder)
    before = (folder / "evaluation.json").read_text(), (folder / "README.md").read_text()
    only = converted.tokenizer().batch_decode(texts.train.first(TRAINED * 128)[:, 1:])
    trained = written(tmp_path / "trained.jsonl", ["".join(only)])
    with pytest.raises(DataError, match="every context of the text(.|\n)*was trained on before(.|\n)*another text"):
        mxdsurgery.evaluate(folder, data=trained)
    assert ((folder / "evaluation.json").read_text(), (folder / "README.md").read_text()) == before
    with pytest.warns(MxDWarning, match="left out"):
        figures = mxdsurgery.evaluate(
            folder, data=written(tmp_path / "all.jsonl", documents), tokens=1_024, tokens_single=1_024
        )
    assert figures["trained_on"] == 0 and "held-out tokens" in title(figures)


def title(figures):
    return evaluation_table(figures).title


def test_a_folder_without_the_record_says_so_everywhere(made, documents, tmp_path):
    old, said = tmp_path / "old", Said()
    shutil.copytree(made, old)
    shutil.rmtree((old / TRAINED_ON_FILE).parent)
    text = written(tmp_path / "text.jsonl", documents)
    figures = mxdsurgery.evaluate(old, data=text, tokens=512, tokens_single=512)
    assert figures["trained_on"] is None
    for shown in (title(figures), (old / "README.md").read_text()):
        assert "held out or not: what was trained on is not recorded" in shown and "held-out tokens" not in shown
    converted, recipe = load(old), saved_recipe(old)
    texts = healing_texts(converted, recipe, recipe, None, said)
    assert texts.before is None and texts.train.begin == 0
    assert any("without a record of what the conversion was trained on" in line for line in said.lines)
    assert trained_share(converted, texts.heldout) == {"trained_on": None}


def test_effect_and_its_like_run_on_any_text_and_say_how_much_of_it_was_trained_on(made, opened, documents, tmp_path):
    text = written(tmp_path / "text.jsonl", documents)
    found = mxdsurgery.coefficients(made, out=tmp_path / "out", data=text, tokens=100_000)
    everything = held_out(*opened[:2], text, tokens=100_000, any_text=True)
    assert found["tokens"] == everything.numel() and found["trained_on"] == TRAINED


def test_an_edit_is_titled_by_what_it_rests_on(made):
    from mxdsurgery.editing.edit import edit_table

    figures = {name: 1.0 for name in ("ce_before", "ce_after", "delta_ce", "kl")}
    figures |= {f"{name}_ci": [0.0, 2.0] for name in figures} | {"edits": [], "samples": [], "tokens": 100, "sequences": 2}
    titles = [edit_table(figures | {"trained_on": count})[0].title for count in (0, 1, None)]
    assert titles[0] == "On 100 held-out tokens" and "of 2 contexts, 1 were trained on" in titles[1]
    assert "not recorded" in titles[2]


def test_healing_goes_on_behind_the_conversion_and_chooses_and_reports_on_other_texts(made, opened):
    converted, recipe, whole = opened
    said = Said()
    texts = healing_texts(converted, recipe, dataclasses.replace(recipe, seed=1), None, said)
    known = texts.before.fingerprints.known
    assert texts.validation.equal(whole.validation) and texts.heldout.equal(whole.heldout)
    assert not known(torch.cat([texts.validation, texts.heldout])).any()
    left = len(list(texts.train.contexts())) - TRAINED
    batches = torch.stack(list(itertools.islice((batch[0] for batch in texts.train.batches(1)), left + 5)))
    assert not known(batches[:left]).any() and known(batches[left:]).all()  # then from the start
    assert any("goes on after the 8.19k tokens" in line for line in said.lines), said.lines
    once = torch.stack(list(texts.train.once()))
    assert len(once) == left + TRAINED and not known(once[:left]).any() and known(once[left:]).all()


def test_a_copy_of_the_training_text_is_no_new_text_for_healing(opened, documents, tmp_path):
    converted, recipe, whole = opened
    texts = healing_texts(converted, recipe, recipe, written(tmp_path / "copy.jsonl", documents), Said())
    rows = [{tuple(row.tolist()) for row in part} for part in (texts.heldout, texts.validation, texts.train.contexts())]
    assert texts.heldout.equal(whole.heldout) and len(texts.validation) == 8
    assert not rows[0] & rows[1] and not rows[0] & rows[2] and not rows[1] & rows[2]
    assert not texts.before.fingerprints.known(texts.validation).any()


def test_a_healed_folder_records_both_trainings(made, opened, tmp_path, monkeypatch):
    without_reloads(monkeypatch)
    healed = mxdsurgery.heal(made, out=tmp_path / "healed", tokens=2_048, batch=1_024, device="cpu")
    record, texts = read_trained_on(tmp_path / "healed"), opened[2]
    contexts = torch.stack(list(texts.train.contexts()))
    assert record.fingerprints.known(contexts).nonzero().flatten().tolist() == list(range(TRAINED + 16))
    first = len(texts.heldout)
    assert [(used["first"], used["last"]) for used in record.texts] == [
        (first, first + TRAINED), (first + TRAINED, first + TRAINED + 16),
    ]  # fmt: skip
    assert healed["heldout_tokens"] == texts.heldout[:, 1:].numel() and healed["evaluation"]["trained_on"] == 0
    assert "1,016 tokens, on which nothing was trained or chosen" in (tmp_path / "healed" / "README.md").read_text()


def test_a_record_that_cannot_be_read_is_named(made, tmp_path):
    shutil.copytree(made, tmp_path / "folder")
    (tmp_path / "folder" / TRAINED_ON_FILE).write_bytes(b"{}")
    with pytest.raises(NotConvertedError, match="fingerprints.safetensors cannot be read"):
        read_trained_on(tmp_path / "folder")


def test_the_record_is_no_file_of_weights_and_is_pushed_with_the_model(made):
    from mxdsurgery.sharing.contents import pack

    assert not [path.name for path in Path(made).glob("*.safetensors") if path.name != "model.safetensors"]
    assert TRAINED_ON_FILE in pack(made).contents
