"""Numbers and the limits that messages name: what is at a limit is taken, what is beyond it is refused."""

import inspect
import json
import math
import re

import click
import numpy
import pytest
from click.testing import CliRunner
from running import ROOT
from transformers import LlamaConfig

import mxdsurgery
from mxdsurgery.arguments import ARGUMENTS, given_number
from mxdsurgery.base.config import _check_buildable
from mxdsurgery.base.selection import select_layers
from mxdsurgery.choices import HEAL_CHOICES
from mxdsurgery.cli import main
from mxdsurgery.conversion.heal import Healing
from mxdsurgery.editing.edits import Edits
from mxdsurgery.editing.generate import generate
from mxdsurgery.errors import HealError, MxDError, RecipeError
from mxdsurgery.measuring.held_out import _check_held_out
from mxdsurgery.measuring.probe import _check_classes
from mxdsurgery.options import Number, RecipeValue, RecipeValues
from mxdsurgery.outside import read_json, read_text
from mxdsurgery.recipe import RECIPE_KEYS, Recipe
from mxdsurgery.text import forms
from mxdsurgery.text.labelled import read_labelled
from mxdsurgery.text.sources import documents

RULES = {f"recipe {name}": (name, key) for name, key in RECIPE_KEYS.items()}
RULES |= {f"argument {name}": (name, key) for name, key in ARGUMENTS.items()}
RULES = {name: rule for name, rule in RULES.items() if rule[1].kind in ("count", "number")}
OPTIONS = {
    f"{command.name} {option.opts[0]}": (command, option)
    for command in main.commands.values()
    for option in command.params
    if isinstance(option, click.Option)
}


def limits(said):
    """The lower and the upper limit that a message names, and whether the lower one is itself refused."""
    low = re.search(r"(?:from|at least|above) (\S+?)(?:,| |$)", said)
    high = re.search(r"(?:to|at most) ([0-9][^, ]*)(?:,|$)", said)
    return low and float(low[1]), high and float(high[1]), "above" in said


def beyond(limit, kind, sign):
    return int(limit) + sign if kind == "count" else math.nextafter(limit, sign * math.inf)


@pytest.mark.parametrize(("name", "key"), RULES.values(), ids=RULES)
def test_the_limits_that_a_message_names_are_the_limits(name, key):
    low, high, itself_refused = limits(key.allowed())
    assert low is not None  # every number has a least one
    if itself_refused:
        assert key.parse(name, beyond(low, key.kind, 1)) is not None
    else:
        assert key.parse(name, low) == low
    wrong = [low if itself_refused else beyond(low, key.kind, -1), -1 - low, math.nan, math.inf, -math.inf, 10**30]
    if high is not None:
        assert key.parse(name, high) == high
        wrong.append(beyond(high, key.kind, 1))
    for value in [*wrong, True, [1], {}, "1 2", "one", b"1"]:
        with pytest.raises(RecipeError) as raised:
            key.parse(name, value)
        assert key.allowed() in str(raised.value) and name in str(raised.value)


def test_every_flag_that_takes_a_number_has_the_rule_of_its_name():
    """But numbers of layers, which the model's own number of layers limits."""
    found = 0
    for where, (_, option) in OPTIONS.items():
        given = option.type
        if isinstance(given, Number):
            assert given.argument == option.name, where
            found += 1
        elif isinstance(given, RecipeValue | RecipeValues):
            assert given.recipe_key in (option.name, option.name.removesuffix("s")), where
        elif isinstance(given, click.types.IntParamType | click.types.FloatParamType):
            assert option.name in ("layer", "sweep"), where
    assert found > 20


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (where, value)
        for where, (_, option) in OPTIONS.items()
        if isinstance(option.type, Number)
        for value in ("-1", "nan", "x")
    ],
)
def test_a_flag_out_of_range_is_refused_before_anything_else(where, value):
    command, option = OPTIONS[where]
    required = [f"{other.opts[0]}=x" for other in command.params if other.required and isinstance(other, click.Option)]
    arguments = ["x"] * sum(isinstance(other, click.Argument) for other in command.params)
    done = CliRunner().invoke(main, [command.name, *arguments, *required, f"{option.opts[0]}={value}"])
    assert done.exit_code == 2
    assert f"RecipeError: {option.name} is {value!r}\nexpected: {ARGUMENTS[option.name].allowed()}" in done.stderr


FUNCTIONS = {name: getattr(mxdsurgery, name) for name in mxdsurgery.__all__}
SIGNATURES = {
    name: inspect.signature(made).parameters.values() for name, made in FUNCTIONS.items() if hasattr(made, "__wrapped__")
}
GIVEN = [(name, given.name) for name, signature in SIGNATURES.items() for given in signature if given.name in ARGUMENTS]


@pytest.mark.parametrize(("function", "name"), GIVEN)
def test_a_functions_argument_out_of_range_is_refused_before_anything_else(function, name):
    needed = {p.name: "x" for p in SIGNATURES[function] if p.default is p.empty and p.kind != p.VAR_KEYWORD}
    with pytest.raises(RecipeError, match=f"^{name} is -1\nexpected: "):
        FUNCTIONS[function](**needed | {name: -1})


def test_arguments_are_what_their_flags_are():
    assert given_number("samples", "2k") == 2000 == given_number("samples", numpy.int64(2000))
    assert given_number("temperature", numpy.float32(0.5)) == 0.5 == given_number("temperature", "0.5")
    assert given_number("top_p", None) is None and given_number("prompt", -1) == -1


def test_how_to_heal_is_checked_by_the_same_rules():
    assert Healing(top_n=1, patience="2", local=0.0).patience == 2
    for wrong in ({"top_n": 0}, {"patience": 1.5}, {"local": -0.1}, {"local": math.nan}, {"seed": -1}, {"lora_rank": True}):
        with pytest.raises(HealError, match=f"{next(iter(wrong))} is "):
            Healing(**wrong)
    for name, choices in HEAL_CHOICES.items():
        assert [getattr(Healing(**{name: choice}), name) for choice in choices] == list(choices)
        with pytest.raises(HealError, match=f"{name} is 'other'"):
            Healing(**{name: "other"})


# Limits that a model or a text sets


FOLDER = ROOT / "tests/fixtures/format_3"


@pytest.fixture(scope="module")
def converted():
    return mxdsurgery.load(FOLDER)


def refused(run):
    with pytest.raises((MxDError, ValueError)) as raised:
        run()
    return str(raised.value)


@pytest.mark.parametrize("n_layers", [1, 2, 12])
def test_layers(n_layers):
    said = refused(lambda: select_layers(str(n_layers), n_layers))
    first, last, low, high = map(int, re.search(r"from (\d+) to (\d+), or (-\d+) to (-\d+)", said).groups())
    assert [select_layers(str(number), n_layers) for number in (first, last, low, high)] == [[0], [last], [0], [last]]
    assert "has no layer" in refused(lambda: select_layers(str(last + 1), n_layers))
    assert "has no layer" in refused(lambda: select_layers(str(low - 1), n_layers))


def test_experts(converted):
    layer = next(iter(converted.layers))
    said = refused(lambda: Edits(ablate={layer: [10**6]}).live(converted.model))
    last = int(re.search(r"expected 0 to (\d+)", said)[1])
    Edits(ablate={layer: [0, last]}).live(converted.model)
    assert "has no expert" in refused(lambda: Edits(ablate={layer: [last + 1]}).live(converted.model))


def test_new_tokens(converted):
    most = int(re.search(r"at most (\d+)", refused(lambda: generate(FOLDER, prompt="a", max_new_tokens=10**6)))[1])
    prompt = converted.tokenizer()("a", return_tensors="pt")["input_ids"].shape[1]
    assert len(generate(FOLDER, prompt="a", max_new_tokens=most - prompt)) == 1
    assert f"at most {most}" in refused(lambda: generate(FOLDER, prompt="a", max_new_tokens=most - prompt + 1))


def test_layers_that_a_config_may_claim():
    said = refused(lambda: _check_buildable("x", LlamaConfig(num_hidden_layers=10**6)))
    most = int(re.search(r"at most (\d+)", said)[1])
    _check_buildable("x", LlamaConfig(num_hidden_layers=most))
    assert f"at most {most}" in refused(lambda: _check_buildable("x", LlamaConfig(num_hidden_layers=most + 1)))


def test_tokens_that_were_held_out():
    saved = Recipe(data="stdlib", eval_tokens=1000)
    _check_held_out(saved, 1000)
    assert "tokens=1000" in refused(lambda: _check_held_out(saved, 1001))


def test_texts_and_classes_of_a_probe(tmp_path):
    said = refused(lambda: _check_classes(numpy.array(["a", "b"]), "x"))
    least = int(re.search(r"classes of (\d+) texts", said)[1])
    _check_classes(numpy.array(["a", "b"] * least), "x")
    assert "too few" in refused(lambda: _check_classes(numpy.array(["a", "b"] * (least - 1) + ["a"]), "x"))
    path = tmp_path / "labelled.jsonl"
    path.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 2}\n')
    assert read_labelled(str(path)).classes == ["1", "2"]
    path.write_text('{"text": "a", "label": 1}\n')
    assert "at least two classes" in refused(lambda: read_labelled(str(path)))


def test_sizes_of_files(tmp_path, monkeypatch):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "a" * 20}))
    size = path.stat().st_size
    assert read_text(path, size) and f"larger than {size - 1} bytes" in refused(lambda: read_text(path, size - 1))
    monkeypatch.setattr(forms, "_MOST_CHARACTERS", size)
    assert list(documents(str(path))) == ["a" * 20]
    monkeypatch.setattr(forms, "_MOST_CHARACTERS", size - 1)
    assert f"longer than {size - 1} characters" in refused(lambda: list(documents(str(path))))
    path.write_text(str(2**63 - 1))
    assert read_json(path) == 2**63 - 1
    path.write_text(str(2**63))
    assert "too large" in refused(lambda: read_json(path))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["effect", "x", "--sweep", "1", "--controls", "3"], "--controls goes with edits"),
        (["effect", "x", "--ablate", "0:1", "--contexts-per-expert", "3"], "--contexts-per-expert goes with --sweep"),
        (["generate", "x", "--prompt", "x", "--unit", "maximum"], "--unit goes with --steer or --clamp"),
        (["generate", "x", "--prompt", "x", "--factors", "1"], "go with --score"),
        (["heal", "x", "--out", "y", "--top-n", "3"], "--top-n goes with --teacher cached"),
        (["heal", "x", "--out", "y", "--lora-rank", "3"], "--lora-rank goes with --mode lora"),
        (["heal", "x", "--out", "y", "--lora", "merged", "--mode", "mxd"], "--lora goes with --mode lora"),
    ],
)
def test_a_flag_that_would_have_no_say_is_refused(words, said):
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2 and said in done.stderr
