"""What people write into a model card stays, whatever command writes the card anew; our section is what the figures say."""

import json
import re
import shutil

import pytest
import yaml
from running import ROOT

from mxdsurgery import Edits, apply, edit, evaluate
from mxdsurgery.checkpoint.apply import make_adapter
from mxdsurgery.checkpoint.converted import EVALUATION_FILE, PLAN_FILE, saved_recipe
from mxdsurgery.checkpoint.export import write_evaluation, written_as
from mxdsurgery.checkpoint.readme import CARD, merged, read_card, whole_card, write_card
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


MEASURED = re.compile("Measured on 123,456 (held-out )?tokens")


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


def test_a_text_without_our_section_stays_and_the_section_follows_it():
    there = "---\nlicense: mit\n---\n# Mine\n\nmine\n"
    kept = merged(there, NEW)
    assert there[len("---\nlicense: mit\n") :].rstrip() in kept and kept.endswith(NEW.split("---\n", 2)[2])
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
    assert len(MEASURED.findall(now)) == 1 and "123,456" not in before
    assert json.loads((folder / EVALUATION_FILE).read_text())["tokens"] == 123_456


@pytest.fixture(params=[*sorted((ROOT / "tests" / "fixtures").glob("format_?")), "half"], ids=lambda one: str(one)[-8:])
def earlier(request, converted, tmp_path):
    """A folder whose card has no section: of each earlier format, and one of now where somebody deleted a comment."""
    copy = tmp_path / "earlier"
    shutil.copytree(converted.out if request.param == "half" else request.param, copy)
    if request.param == "half":
        write_card(copy / CARD, read_card(copy / CARD).replace("<!-- mxdsurgery: end -->\n", ""))
    return copy


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_the_figures_of_an_earlier_version_s_card_are_folded_and_nothing_is_lost(earlier, line_end):
    card = read_card(earlier / CARD)
    table = "".join(re.findall(r"^\|.*\n", card, re.MULTILINE)).replace("\n", line_end)
    card = card.replace("## What it cost", "Mine, in between.\n\n## What it cost")
    front, body = card[4:].split("---\n", 1)
    write_card(earlier / CARD, f"---\n{front}---\nMine above.\n\n{body}\nMine below.\n".replace("\n", line_end))
    measured(earlier, tokens=123_456)
    now = read_card(earlier / CARD)
    above, section, below = re.split("<!-- mxdsurgery: begin -->\n(?=.*\n#)|<!-- mxdsurgery: end -->\n", now)
    folded = re.search(r"<details>\n<summary>From before,.*</summary>\n(.*)</details>", below, re.DOTALL)[1]
    assert len(MEASURED.findall(section)) == len(MEASURED.findall(now)) == 1
    assert "Mine above." in above and "Measured" not in above and now.endswith(f"Mine below.{line_end}")
    assert "Mine, in between." in folded and all(line in folded for line in table.splitlines()) and table
    measured(earlier, tokens=234_567)  # from now on there is a section
    assert read_card(earlier / CARD) == now.replace("123,456", "234,567")


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
