"""Families are converted end to end or refused by name: the most used ones here, all with ``-m every_family``."""

import json
import subprocess
import sys

import families
import pytest
import tiny_models

import mxdsurgery
from mxdsurgery.errors import UnsupportedBlockError
from mxdsurgery.terminal.console import Reporter

MOST_USED = {
    "glu": ["llama", "qwen3", "mistral", "gemma3_text", "phi3", "granite"],
    "mlp": ["gpt2", "gpt_neox", "falcon", "bloom", "apertus"],
    "mixed": ["lfm2_moe", "deepseek_v3", "falcon_h1"],
}
REFUSED = ["bert", "musicgen", "mamba", "mixtral", "cpmant", "bitnet"]
HANDFULS = [
    families.FAMILIES[start : start + families.HANDFUL] for start in range(0, len(families.FAMILIES), families.HANDFUL)
]
KNOWN = json.loads(families.FIGURES.read_text(encoding="utf-8"))["rows"]


def check_apart(names):
    """Rows of a process of its own."""
    command = [sys.executable, families.__file__, "check", *names]
    limit = families.SECONDS * len(names)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    return list(map(json.loads, done.stdout.splitlines()))


def assert_as_known(names, rows):
    rows = {row["family"]: row for row in rows}
    assert list(rows) == list(names)
    for name, row in rows.items():
        known = KNOWN[name]
        assert {key: row.get(key) for key in ("verdict", "kind", "activation", "block", "able", "layers")} == {
            key: known.get(key) for key in ("verdict", "kind", "activation", "block", "able", "layers")
        }, row
        if row["verdict"] == "refused":
            assert row["reason"] == known["reason"]


@pytest.mark.parametrize("kind", MOST_USED)
def test_the_most_used_families_are_converted_exported_reloaded_generated_from_and_edited(kind):
    assert {KNOWN[name]["verdict"] for name in MOST_USED[kind]} == {"converted"}
    assert_as_known(MOST_USED[kind], families.check_all(MOST_USED[kind]))


def test_all_layers_of_a_mixed_model_are_those_that_can_be_converted_and_the_others_are_named(tmp_path):
    source, lines = tmp_path / "mixed", []
    tiny_models.tiny_model("lfm2_moe").save_pretrained(source)
    families.byte_tokenizer().save_pretrained(source)
    reporter = Reporter()
    reporter.say = lines.append
    settings = families.SETTINGS | {"data": families.text(tmp_path, "CHANGELOG.md"), "eval_tokens": 128, "tokens": 512}
    made = mxdsurgery.convert(str(source), layers="all", out=str(tmp_path / "out"), reporter=reporter, **settings)
    assert [block.layer for block in made.plan.blocks] == [0, 1] and list(made.plan.left.values()) == ["2-3"]
    assert any(line.startswith("left       layers 2-3 as they are: is a mixture of experts") for line in lines)
    assert "Layers 2-3 are as they were: is a mixture of experts" in (made.out / "README.md").read_text(encoding="utf-8")
    with pytest.raises(UnsupportedBlockError, match="layer 2 .* is a mixture of experts"):
        mxdsurgery.plan(str(source), layers="1-2", data=settings["data"])
    with pytest.raises(UnsupportedBlockError, match="no layer of .* can be converted: layers 0-3: is a mixture of experts"):
        tiny_models.tiny_model("mixtral").save_pretrained(tmp_path / "experts")
        mxdsurgery.plan(str(tmp_path / "experts"), layers="all", data=settings["data"])


def test_what_cannot_be_converted_is_refused_by_name():
    assert {KNOWN[name]["verdict"] for name in REFUSED} == {"refused"}
    assert_as_known(REFUSED, check_apart(REFUSED))


@pytest.mark.every_family
@pytest.mark.parametrize("names", HANDFULS, ids=lambda names: f"{names[0]}-{names[-1]}")
def test_every_family_is_converted_or_refused_as_the_page_says(names):
    assert_as_known(names, check_apart(names))


def test_the_page_knows_every_family_of_this_transformers_and_none_is_wrong():
    if json.loads(families.FIGURES.read_text(encoding="utf-8"))["transformers"] == families.transformers.__version__:
        assert sorted(KNOWN) == families.FAMILIES
    assert {row["verdict"] for row in KNOWN.values()} == {"converted", "refused"}


def test_a_process_that_dies_is_a_wrong_verdict(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(families, "FIGURES", tmp_path / "figures.json")
    monkeypatch.setattr(families, "__file__", str(tmp_path / "nothing.py"))
    families.measure(["gpt2", "bert"])
    rows = json.loads(families.FIGURES.read_text(encoding="utf-8"))["rows"]
    assert [row["verdict"] for row in rows.values()] == ["wrong", "wrong"]
    assert "| bert | - | the process ended with 2 |" in families.page()
