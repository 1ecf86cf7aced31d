"""What to do next, as errors say it: only with flags that the command has, and in Python with keywords."""

import ast
import dataclasses
import inspect
import re

import pytest
from running import ROOT

import mxdsurgery
from mxdsurgery.choices import ONE_LAYER
from mxdsurgery.cli import flags_of, main
from mxdsurgery.conversion.heal import Healing
from mxdsurgery.errors import SWITCHES, DataError, Interrupted, MxDError, as_typed, flags_in
from mxdsurgery.hardware.guard import guarded_with
from mxdsurgery.recipe import RECIPE_KEYS

COMMANDS = {name: flags_of(command) for name, command in main.commands.items()}
SOURCES = [path for path in sorted((ROOT / "mxdsurgery").rglob("*.py")) if path.name not in ("cli.py", "options.py")]


def texts(node):
    """The texts that an expression may give; what is filled in when it runs is the number 7, or the flag --seed."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        made = "".join(part.value if isinstance(part, ast.Constant) else "7" for part in node.values)
        return [made.replace("--7", "--seed")]
    return [text for child in ast.iter_child_nodes(node) for text in texts(child)]


def said(*keywords):
    """The texts of an error's arguments of these names in the package, with where they stand; "found" is the first of all."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("Error"):
                given = [keyword.value for keyword in node.keywords if keyword.arg in keywords]
                given += node.args[:1] if "found" in keywords else []
            elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in keywords:
                given = [node.value]
            else:
                continue
            for text in (text for value in given for text in texts(value)):
                yield f"{path.name}:{node.lineno}", text


FIXES = list(said("fix"))


def test_all_fixes_are_read():
    assert len(FIXES) > 100 and sum(bool(flags_in(text)) for _, text in FIXES) > 60


def test_flags_are_named_only_where_something_is_to_be_done():
    assert [(where, text) for where, text in said("found", "expected") if re.search(r"(?<!\w)--[a-z]", text)] == []


@pytest.mark.parametrize(("where", "fix"), [pair for pair in FIXES if "--" in pair[1]])
def test_every_flag_that_a_fix_names_is_one(where, fix):
    known = set.union(*COMMANDS.values())
    assert flags_in(fix) <= known, where
    for name, rest in re.findall(r"mxdsurgery ([a-z]+)([^')]*)", fix):
        assert set(re.findall(r"--[a-z-]+", rest)) <= COMMANDS[name], where
    for way in fix.split(", or "):  # of several flags in one way, a command that lacks one would lose the others
        assert len(flags_in(way)) < 2 or re.search(r"--[a-z-]+ \S+ --[a-z-]+", way), f"{where}: {way!r} is several ways"


@pytest.mark.parametrize(("where", "fix"), [pair for pair in FIXES if "--" in pair[1]])
def test_a_command_names_its_own_flags_and_python_names_keywords(where, fix):
    error = MxDError("found", expected="expected", fix=fix)
    for flags in COMMANDS.values():
        shown = error.for_command(flags)
        assert shown.startswith("found\nexpected: expected") and flags_in(shown) <= flags, where
        assert all(way in shown for way in fix.split(", or ") if flags_in(way) <= flags)
    in_python = re.sub(r"mxdsurgery [a-z]+[^')]*", "", str(error))
    assert "--" not in in_python, where


def test_switches_are_the_flags_without_values():
    options = {flag: option for command in main.commands.values() for option in command.params for flag in option.opts}
    named = {flag for _, fix in FIXES for flag in flags_in(fix)}
    assert {flag for flag in named if options[flag].is_flag} <= {f"--{name}" for name in SWITCHES}
    assert all(options[f"--{name}"].is_flag for name in SWITCHES)


# What is the same everywhere: whole commands, whatever the folder in them is called, and what only looks like a flag.
OTHERS = [
    "run mxdsurgery experts DIR --data TEXT first",
    "run mxdsurgery experts 'my models/Ω (2) --k' --overwrite",
    'mxdsurgery apply "the user\'s" --base x --out DIR',
    "rename my--file.txt",
]


def test_a_command_to_be_run_names_folders_as_they_are_typed():
    """Every folder or name that is filled into a command is quoted."""
    filled = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for joined in ast.walk(node.value) if isinstance(node, ast.keyword) and node.arg == "fix" else ():
                before = ""
                for part in getattr(joined, "values", []):
                    if isinstance(part, ast.FormattedValue) and re.search("mxdsurgery [a-z]+ [^;,]*$", before):
                        filled.append(ast.unparse(part.value))
                    before += str(getattr(part, "value", ""))
    assert len(filled) > 4 and [text for text in filled if not text.startswith("as_typed(")] == []
    assert as_typed("a") == "a" and as_typed("my Ω") == "'my Ω'"


@pytest.mark.parametrize(
    ("fix", "flags", "command", "python"),
    [
        ("lower --lr (a third), or raise --k", {"--lr"}, "lower --lr (a third)", "lower lr= (a third), or raise k="),
        ("text, or --context 64, or --by text", {"--by"}, "text, or --by text", "text, or context=64, or by='text'"),
        ("--layers 0,2-3", {"--layers"}, "--layers 0,2-3", "layers='0,2-3'"),
        ("--dtype bfloat16 --compute bfloat16", {"--dtype"}, None, "dtype='bfloat16' compute='bfloat16'"),
        ("--overwrite to begin anew", set(), None, "overwrite=True to begin anew"),
        *[(other, set(), other, other) for other in OTHERS],
    ],
)  # fmt: skip
def test_ways_that_a_command_lacks_are_left_out(fix, flags, command, python):
    error = MxDError("found", fix=fix)
    assert error.for_command(flags) == "found" + (f"\nto mend: {command}" if command else "")
    assert str(error) == f"found\nto mend: {python}" and error.fix == fix


FUNCTIONS = [getattr(mxdsurgery, name) for name in mxdsurgery.__all__ if name[0].islower() and name != "register_family"]
TAKES = {name: {*RECIPE_KEYS} for name in ("convert", "plan")} | {
    "frontier": {*RECIPE_KEYS} - {"layers", *ONE_LAYER},
    "heal": {field.name for field in dataclasses.fields(Healing)},
}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_function_names_its_own_arguments(function):
    has = set(inspect.signature(function).parameters) | TAKES.get(function.__name__, set())
    for _, fix in FIXES:
        error = MxDError("found", expected="expected", fix=fix)
        wrapped = guarded_with(*TAKES.get(function.__name__, ()))(_raising(function, error))
        with pytest.raises(MxDError):
            wrapped()
        named = {flag[2:].replace("-", "_") for flag in flags_in(fix)}
        own = re.sub(r"mxdsurgery [a-z]+[^')]*", "", str(error))
        assert {name for name in named if re.search(rf"(?<!\w){name}=", own)} <= has, fix
        assert error.fix == fix and str(error).startswith("found\nexpected: expected")


def _raising(function, error):
    """A function with the arguments of another, that raises."""

    def raises(*_, **__):
        raise error

    raises.__signature__ = inspect.signature(function)
    return raises


def test_the_functions_that_take_more_say_what():
    with pytest.raises(MxDError, match="to mend: local=0, or teacher="):
        mxdsurgery.heal("folder", out="out", teacher="cached", local=1.0)
    with pytest.raises(MxDError, match=r"to mend: .*batch="):
        mxdsurgery.plan("demo-glu", context=8_192, batch=128)


def test_what_is_left_is_said_in_python_s_words_and_in_the_command_s():
    said = "A checkpoint of step 4 is in OUT.run; the same command with --resume goes on from there."
    error, stopped = DataError("found", expected="expected", left=said), Interrupted(said)
    assert "with resume=True goes on" in str(error) and "with resume=True goes on" in str(stopped)
    assert said in error.for_command({"--resume"}) and stopped.said == said
