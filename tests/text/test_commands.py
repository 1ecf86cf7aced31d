"""Every command that takes a text: a single sentence can be looked at, and the column is named."""

import json
import shutil
import warnings

import pytest
from click.testing import CliRunner

import mxdsurgery
from mxdsurgery.cli import main
from mxdsurgery.editing.edits import edits_from_flags
from mxdsurgery.errors import DataError
from mxdsurgery.recipe import load_recipe
from mxdsurgery.terminal.console import Reporter

SENTENCE = "def f(x):\n    return x + 1"


def functions(number, count):
    """Text that never repeats: what is held out of a text is not trained on, wherever it stands."""
    return "".join(f"def f{n}(x):\n    return x + {n}\n" for n in range(1_000 * number, 1_000 * number + count))


@pytest.fixture(scope="module")
def folder(converted, tmp_path_factory):
    """A copy: `evaluate`, `sweep` and `experts` write into it."""
    return shutil.copytree(converted.out, tmp_path_factory.mktemp("commands") / "demo")


COMMANDS = {
    "evaluate": lambda folder, _out, **text: mxdsurgery.evaluate(folder, **text)["tokens"],
    "growth": lambda folder, _out, **text: mxdsurgery.growth(folder, **text)["tokens"],
    "effect": lambda folder, _out, **text: mxdsurgery.effect(folder, edits=ABLATE, controls=1, **text)["tokens"],
    "sweep": lambda folder, _out, **text: mxdsurgery.sweep(folder, layer=1, contexts_per_expert=1, **text)["tokens"],
    "edit": lambda folder, out, **text: mxdsurgery.edit(folder, out=out, edits=ABLATE, **text)["tokens"],
    "coefficients": lambda folder, out, **text: mxdsurgery.coefficients(folder, out=out, **text)["tokens"] - 2,
    "experts": lambda folder, out, **text: mxdsurgery.experts(folder, out=out, **text)["tokens"] - 1,
}
ABLATE = edits_from_flags(None, ablate=("1:3",))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_single_sentence_can_be_looked_at_and_one_token_cannot(command, folder, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"body": SENTENCE}))
    ids = mxdsurgery.load(folder).tokenizer()(SENTENCE)["input_ids"]
    begins = ids[0] == mxdsurgery.load(folder).tokenizer().bos_token_id
    predictions = len(ids) - 2  # position 0 is left out, and what follows the last token is not known
    assert 3 <= len(ids) < 128 and not begins
    assert COMMANDS[command](folder, tmp_path / "out", data=str(path), text_column="body") == predictions
    path.write_text(json.dumps({"body": "x"}))
    with pytest.raises(DataError, match="is too short: tokens: 1,.*\n.*at least 3"):
        COMMANDS[command](folder, tmp_path / "again", data=str(path), text_column="body")
    path.write_text("")
    with pytest.raises(DataError, match="holds no text"):
        COMMANDS[command](folder, tmp_path / "again", data=str(path), text_column="body")
    assert not list(tmp_path.glob("again*"))


def test_a_small_text_heals_with_an_eighth_of_it_for_validation(folder, tmp_path):
    (tmp_path / "shards").mkdir()
    for number in range(2):
        (tmp_path / "shards" / f"{number}.jsonl").write_text(json.dumps({"doc": {"text": functions(number, 60)}}))
    data = str(tmp_path / "shards")
    healed = mxdsurgery.heal(folder, out=tmp_path / "out", data=data, text_column="doc.text", tokens=2000, batch=512)
    assert 0 < healed["validation_tokens"] < 1500 and healed["data"] == "shards"


def test_more_tokens_than_a_text_holds_are_said_with_what_it_holds_before_anything_is_measured(folder, tmp_path):
    path, said = tmp_path / "text.txt", []
    path.write_text(f"{SENTENCE}\n" * 60)

    class Listening(Reporter):
        def say(self, text, **_):
            said.append(text)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: said.append(str(message))
        tokens = mxdsurgery.evaluate(folder, data=str(path), tokens=10**9, reporter=Listening())["tokens"]
        warned, announced = [line for line in said if "1,000,000,000 tokens" in line or line.startswith("evaluate")]
        held = tokens // 126 * 128  # the first position and the last of each context count in none of the figures
        assert (
            announced.startswith("evaluate") and f"'{path}' were asked for, and it holds {held:,} in contexts of 128" in warned
        )
        said.clear()
        mxdsurgery.evaluate(folder, data=str(path))  # the recipe's number: nobody asked for it
    assert not any("asked for" in line for line in said)


def test_rows_that_hold_nothing_are_said_once_in_a_call_that_reads_a_text_often(folder, tmp_path):
    rows = [{"text": functions(1, 200)}, {"text": None}, {"text": functions(2, 200)}]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for out in ("out", "again"):  # each call says it anew
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            mxdsurgery.heal(folder, out=tmp_path / out, data=str(tmp_path / "text.jsonl"), tokens=3000, batch=512)
        assert sum("hold nothing (null)" in str(one.message) for one in caught) == 1


def test_every_command_with_a_text_has_the_column():
    for name, command in main.commands.items():
        flags = {flag for parameter in command.params for flag in parameter.opts}
        assert ("--data" in flags) == ("--text-column" in flags), name


def test_a_folder_or_pattern_is_kept_in_the_recipe_from_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for number in range(3):
        (tmp_path / "texts" / f"{number}.txt").write_text(functions(number, 300))
    few = {"layers": "1", "tokens": 4096, "eval_tokens": 512, "n_experts": 64, "k": 4, "batch": 512, "device": "cpu"}
    out = mxdsurgery.convert("demo-glu", data="texts", eval_data="texts/[12].txt", out="out", **few).out
    kept = load_recipe(out / "recipe.yaml")
    assert (kept["data"], kept["eval_data"]) == (str(tmp_path / "texts"), str(tmp_path / "texts" / "[12].txt"))
    assert str(tmp_path) not in (out / "README.md").read_text()
    monkeypatch.chdir("/")
    result = CliRunner().invoke(main, ["evaluate", str(out), "--json"])
    assert result.exit_code == 0, result.output
