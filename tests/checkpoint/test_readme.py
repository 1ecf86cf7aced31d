"""What people write into a model card stays, whatever command writes the card anew; our section is what the figures say."""

import json
import shutil

import pytest
import yaml

from mxdsurgery import Edits, apply, edit, evaluate
from mxdsurgery.checkpoint.apply import make_adapter
from mxdsurgery.checkpoint.converted import EVALUATION_FILE, PLAN_FILE, saved_recipe
from mxdsurgery.checkpoint.export import is_as_written, write_evaluation, written_as
from mxdsurgery.checkpoint.readme import CARD, merged, read_card, whole_card, without_section, write_card
from mxdsurgery.planning.plan import read_plan
from mxdsurgery.sharing.contents import pack

FRONT = {"library_name": "transformers", "tags": ["a", "b"]}
NEW = whole_card(FRONT, "# Title\n\nnew figures\n")
OLD = whole_card(FRONT, "# Title\n\nold figures\n")
ABOVE, BELOW = "My words above.\r\n\n", "\n## Licence\n\nMy words below, \udcff and no line end"


@pytest.fixture
def folder(converted, tmp_path):
    """A converted model to which somebody added words and a licence."""
    copy = tmp_path / "model"
    shutil.copytree(converted.out, copy)
    write_card(copy / CARD, worded(read_card(copy / CARD)))
    return copy


def worded(card):
    """A card with words around its section, and keys in the front matter."""
    front, section = card[4:].split("---\n", 1)
    return f"---\n# a comment\nlicense: mit\n{front}model-index:\n- name: mine\n---\n{ABOVE}{section}{BELOW}"


def check_words(card):
    """All that somebody wrote is there, once; the section in between, whole, is returned."""
    front, rest = card[4:].split("---\n", 1)
    assert front.startswith("# a comment\nlicense: mit\n") and yaml.safe_load(front)["model-index"] == [{"name": "mine"}]
    assert rest.startswith(ABOVE) and rest.endswith(BELOW)
    assert "words" not in rest[len(ABOVE) : -len(BELOW)]
    return rest[len(ABOVE) : -len(BELOW)]


def measured(folder, **figures):
    """Writes evaluation.json and the card with other figures."""
    evaluation = json.loads((folder / EVALUATION_FILE).read_text())
    write_evaluation(folder, evaluation | figures, read_plan(folder / PLAN_FILE), saved_recipe(folder))


def test_only_the_section_is_rewritten():
    assert merged(OLD, NEW) == NEW and merged(NEW, NEW) == NEW
    assert check_words(merged(worded(OLD), NEW)) == NEW.split("---\n", 2)[2]
    assert merged(worded(OLD), NEW) == worded(NEW)
    assert merged(merged(worded(OLD), NEW), OLD) == worded(OLD)


def test_our_keys_are_kept_up_and_others_stay():
    theirs = OLD.replace(
        "library_name: transformers\n", "library_name: other # said\nbase_model:\n- their/model\nx: 1 # why\n"
    )
    front = merged(theirs + "mine", whole_card(FRONT | {"base_model": "a/b", "tags": ["b", "c"]}, "")).split("---\n")[1]
    assert "x: 1 # why\n" in front and "theirs" not in front
    assert yaml.safe_load(front) == {"x": 1, "tags": ["a", "b", "c"], "library_name": "transformers", "base_model": "a/b"}


@pytest.mark.parametrize("front", ["a: [", "- 1\n", "just words\n"])
def test_a_front_matter_that_cannot_be_read_is_left_to_its_writer(front):
    there = f"---\n{front}\n---\nmine\n"
    assert merged(there, NEW).startswith(there.rstrip())


def test_a_card_without_our_section_is_kept_unless_it_is_nobody_s():
    card = without_section(OLD)
    assert merged(card, NEW, replaceable=True) == NEW
    kept = merged(card + "mine\n", NEW)
    assert kept.startswith((card + "mine\n").rstrip()) and kept.endswith(NEW.split("---\n", 2)[2])
    again = merged(kept, OLD)
    assert again == kept.replace("new figures", "old figures")
    assert merged("only words, no front matter", NEW).startswith("---\nlibrary_name") and "only words" in merged(
        "only words", NEW
    )
    half = OLD.replace("<!-- mxdsurgery: end -->", "")  # somebody deleted a comment
    assert merged(half, NEW).startswith(half.rstrip()) and merged(merged(half, NEW), OLD).startswith(half.rstrip())


def test_what_a_model_said_cannot_end_the_section():
    card = whole_card(FRONT, "said '<!-- mxdsurgery: end -->' and so on\n")
    assert merged(card, NEW) == NEW


def test_figures_measured_anew_leave_the_words(folder):
    before = check_words(read_card(folder / CARD))
    measured(folder, tokens=123_456)
    now = check_words(read_card(folder / CARD))
    assert "Measured on 123,456 tokens" in now and "123,456" not in before
    assert json.loads((folder / EVALUATION_FILE).read_text())["tokens"] == 123_456


@pytest.mark.parametrize("mine", ["", "my words\n"])
def test_a_card_of_an_earlier_version_is_replaced_only_if_nobody_changed_it(mine, converted, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(converted.out, folder)
    old = without_section(read_card(folder / CARD)) + mine
    write_card(folder / CARD, old)
    assert is_as_written(folder) == (not mine)
    measured(folder, tokens=123_456)
    card = read_card(folder / CARD)
    assert card.count("# demo-glu, ") == (2 if mine else 1) and "Measured on 123,456 tokens" in card
    assert card.startswith(old.rstrip()) == bool(mine)


def test_commands_keep_the_words(folder, tmp_path, converted):
    evaluate(folder, tokens=500)
    check_words(read_card(folder / CARD))
    edited = tmp_path / "edited"
    edit(folder, out=edited, edits=Edits(ablate={1: [0]}), tokens=500)
    assert "ablate 0" in check_words(read_card(edited / CARD))
    write_card(edited / CARD, read_card(edited / CARD).replace("My words above", "Mine of now above"))
    edit(edited, out=tmp_path / "undone", undo=True)
    undone = read_card(tmp_path / "undone" / CARD)
    assert undone == read_card(folder / CARD).replace("My words above", "Mine of now above")
    with written_as(edited, "checkpoint", "demo-glu", None) as staging:  # as convert, heal and edit overwrite a folder
        shutil.copytree(converted.out, staging, dirs_exist_ok=True)
    assert "ablate 0" not in read_card(edited / CARD) and "Mine of now above" in read_card(edited / CARD)
    assert read_card(edited / CARD).endswith(BELOW)


def test_an_adapter_and_what_is_rebuilt_and_sent_keep_the_words(folder, tmp_path):
    write_card(folder / CARD, "# Mine\n\nfirst\n".join(read_card(folder / CARD).split(ABOVE)))
    make_adapter(folder, out=tmp_path / "adapter")
    card = read_card(tmp_path / "adapter" / CARD)
    assert "# Mine\n\nfirst\n<!-- mxdsurgery: begin" in card and card.endswith(BELOW) and "**This is an adapter.**" in card
    assert pack(tmp_path / "adapter").contents[CARD] == (tmp_path / "adapter" / CARD).read_bytes()
    out = tmp_path / "out"
    assert apply(tmp_path / "adapter", out=out)["differs"] == [] and read_card(out / CARD) == read_card(folder / CARD)
    write_card(out / CARD, read_card(out / CARD).replace("first\n", "later\n"))
    apply(tmp_path / "adapter", out=out, overwrite=True)
    assert read_card(out / CARD) == read_card(folder / CARD).replace("first\n", "later\n")
