"""What the command line says of itself: commands and flags in groups, whole sentences, examples that run, completion."""

import re
import shlex

import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner
from running import ROOT

from mxdsurgery.cli import SECTIONS, main
from mxdsurgery.recipe import RECIPE_KEYS
from mxdsurgery.terminal.examples import EXAMPLES

COMMANDS = sorted(main.commands)


def helped(*words):
    done = CliRunner().invoke(main, [*words, "--help"], prog_name="mxdsurgery", terminal_width=200)
    assert done.exit_code == 0
    return done.stdout


def test_every_command_is_in_one_group_in_the_order_of_a_users_work():
    listed = [name for section in SECTIONS for name in section.commands]
    assert sorted(listed) == COMMANDS and "Other commands" not in helped()
    places = [helped().index(f"\n{section.title}:\n") for section in SECTIONS]
    assert places == sorted(places)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_line_is_the_whole_first_sentence_of_its_help(name):
    sentence = main.commands[name].help.partition("\n\n")[0]
    assert sentence.endswith(".") and " ".join(sentence.split()) in " ".join(helped().split())


def test_every_recipe_key_is_a_flag_of_convert_in_a_group_with_its_default():
    text = helped("convert")
    convert = main.commands["convert"]
    grouped = {option.name: group.title for group in convert.option_groups for option in group.options}
    assert grouped.keys() == RECIPE_KEYS.keys() - {"model"}
    assert len({*grouped.values()}) == 8 and grouped["kept_tokens"] == grouped["inputs"] != grouped["batch"]
    assert "[default: 2,000,000]" in text and "K, experts active per token [default: 32]" in " ".join(text.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_commands_that_this_version_reads(name):
    assert EXAMPLES[name]
    for arguments in EXAMPLES[name]:
        assert f"  mxdsurgery {name} {arguments}".rstrip() in helped(name)
        # reads all flags and their values; raises where one is unknown or wrong, and runs nothing
        assert main.commands[name].make_context(name, shlex.split(arguments)).params is not None


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_json_if_asked(name):
    assert "--json" in {flag for parameter in main.commands[name].params for flag in parameter.opts}


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["conv"], ["convert"]),
        (["convert", "--spar"], ["--sparsity"]),
        (["convert", "--sparsity", "b"], ["batchtopk"]),
        (["generate", "--unit", ""], ["coefficient", "maximum"]),
        (["edit", "mod"], ["mod"]),  # the shell then looks for folders
        (["convert", "--data", "te"], ["te"]),
    ],
)
def test_a_shell_completes_commands_flags_and_values(words, offered):
    *before, incomplete = words
    found = BashComplete(main, {}, "mxdsurgery", "_MXDSURGERY_COMPLETE").get_completions(before, incomplete)
    assert [item.value for item in found] == offered
    assert (found[0].type in ("dir", "file")) == (offered == [incomplete])


GUIDE = sorted((ROOT / "docs" / "guide").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), *GUIDE]


def blocks(page):
    """The fenced blocks of a page: their language, and their text."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands_of(page):
    """The commands of ours that a page shows, as words; but for those with a word that stands for others."""
    text = "\n".join(block for language, block in blocks(page) if language != "python").replace("\\\n", " ")
    shown = re.findall(r"^(?:\$ )?(?:time )?mxdsurgery (.*)$", text, re.MULTILINE)
    every = (shlex.split(words, comments=True) for words in shown)
    return [words for words in every if not {"...", "MODEL", "DIR", "COMMAND"} & {*words}]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_python_that_pages_show_can_be_read(page):
    for name, *words in commands_of(page):
        assert main.commands[name].make_context(name, words).params is not None  # raises where a flag or value is wrong
    for language, block in blocks(page):
        if language == "python":
            compile(block, page.name, "exec")


def test_what_pages_show_is_found():
    shown = [words for page in PAGES for words in commands_of(page)]
    assert len(shown) > 20 and len({words[0] for words in shown}) > 10
    assert sum(language == "python" for page in PAGES for language, _ in blocks(page)) > 7
