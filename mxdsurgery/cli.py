"""The command line: each command reads its flags, calls the public function of its name and prints what it returns."""

import dataclasses
import functools
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import click
import transformers
from rich.console import Console

import mxdsurgery
from mxdsurgery.card import LEGEND, evaluation_table
from mxdsurgery.coefficients import FORMS
from mxdsurgery.console import ConsoleReporter
from mxdsurgery.dissect import dissection_table
from mxdsurgery.edit import edit_table
from mxdsurgery.edits import edits_from_flags
from mxdsurgery.errors import MemoryBudgetError, MxDError, MxDWarning
from mxdsurgery.experts import experts_table
from mxdsurgery.frontier import DEFAULT_K, DEFAULT_KINDS
from mxdsurgery.probe import probe_tables
from mxdsurgery.recipe import RECIPE_KEYS, Recipe, parse_count
from mxdsurgery.search import BY, search_table

_INTERRUPTED = 130  # what a shell expects of a process that Ctrl-C ended


class _RecipeValue(click.ParamType):
    """A flag's value, checked by the recipe key of its name."""

    def __init__(self, name: str) -> None:
        self.recipe_key = name
        self.name = RECIPE_KEYS[name].kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return RECIPE_KEYS[self.recipe_key].parse(self.recipe_key, value)


class _Count(click.ParamType):
    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        count = parse_count(value)
        if count is None or count < 1:
            self.fail(f"{value!r} is no whole number of at least 1 (k, M and B suffixes allowed)", param, ctx)
        return count


class _List(click.ParamType):
    """Values between commas, each checked by the recipe key of the name."""

    def __init__(self, name: str) -> None:
        self.recipe_key, self.name = name, f"{name},{name},..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        key = RECIPE_KEYS[self.recipe_key]
        return value if isinstance(value, tuple) else tuple(key.parse(self.recipe_key, v.strip()) for v in value.split(","))


def _recipe_options(*without: str) -> Callable[[Callable], Callable]:
    """A flag for every recipe key but the model, which is the argument, and some others; in the recipe's order."""

    def add(command: Callable) -> Callable:
        for field in reversed(dataclasses.fields(Recipe)):
            key = RECIPE_KEYS[field.name]
            flag = "--" + field.name.replace("_", "-")
            if field.name in ("model", *without):
                continue
            if key.kind == "flag":
                option = click.option(f"{flag}/--no-{flag[2:]}", field.name, default=None, help=key.doc)
            else:
                shown = key.doc + (f" [{', '.join(key.choices)}]" if key.choices else "")
                option = click.option(flag, field.name, type=_RecipeValue(field.name), default=None, help=shown)
            command = option(command)
        return command

    return add


def _labelled_options(required: bool) -> Callable[[Callable], Callable]:
    """The flags of what looks at experts through labelled text."""
    options = (
        click.option("--data", required=required, help="Labelled text: .jsonl, .csv, .parquet or a data set on the hub."),
        click.option("--layer", type=int, help="Default: the first in DIR."),
        click.option("--text-column", default="text", show_default=True, help="The column or field that holds the text."),
        click.option("--label-column", default="label", show_default=True, help="The column or field that holds the class."),
        click.option("--samples", type=_Count(), help="Texts, drawn at random; default: all."),
        click.option("--context", type=_Count(), help="Tokens that each text is cut after; default: the recipe's."),
        click.option("--base", help="The original model, if it is not where the recipe says."),
        click.option("--device", type=_RecipeValue("device"), help=RECIPE_KEYS["device"].doc),
        click.option("--seed", type=int, default=0, show_default=True),
    )
    return lambda command: functools.reduce(lambda made, option: option(made), reversed(options), command)


def _edit_options(command: Callable) -> Callable:
    """The flags that say what is done to which experts; they become one argument, ``edits``."""
    listed, numbered = "LAYER:EXPERT,...", "LAYER:EXPERT=NUMBER,..."
    options = (
        click.option("--edits", "edit_file", metavar="FILE", help="An edit file (YAML)."),
        click.option("--ablate", multiple=True, metavar=listed, help="Set coefficients to 0 after the choice."),
        click.option("--drop", multiple=True, metavar=listed, help="Take experts out before the choice."),
        click.option("--scale", multiple=True, metavar=numbered, help="Multiply coefficients."),
        click.option("--steer", multiple=True, metavar=numbered, help="Add to coefficients, on every token."),
        click.option("--clamp", multiple=True, metavar=numbered, help="Set coefficients, on every token."),
    )

    @functools.wraps(command)
    def with_edits(*args: Any, edit_file: str | None, **given: Any) -> Any:
        flags = {kind: given.pop(kind) for kind in ("ablate", "drop", "scale", "steer", "clamp")}
        return command(*args, edits=edits_from_flags(edit_file, **flags), **given)

    return functools.reduce(lambda made, option: option(made), reversed(options), with_edits)


def _text_options(command: Callable) -> Callable:
    """The flags of what measures on held-out text."""
    options = (
        click.option("--data", help="Text; default: the recipe's held-out text."),
        click.option("--tokens", type=_Count(), help="How many of its tokens; default: the recipe's eval_tokens."),
        click.option("--device", type=_RecipeValue("device"), help=RECIPE_KEYS["device"].doc),
    )
    return functools.reduce(lambda made, option: option(made), reversed(options), command)


_AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_KINDS_HELP = f"Of {', '.join(RECIPE_KEYS['kind'].choices)}. [default: {','.join(DEFAULT_KINDS)}]"


class _NamedErrors(click.Group):
    """A user's mistake, in a flag too: its three lines on stderr and exit code 2. Ctrl-C: what is there, and 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MxDError as error:
            click.echo(f"{type(error).__name__}: {error}", err=True)
            sys.exit(2)
        except KeyboardInterrupt as interrupt:
            click.echo(f"\n{str(interrupt) or 'Interrupted. Nothing was written.'}", err=True)
            sys.exit(_INTERRUPTED)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _print_table(*parts: Any) -> None:
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, emoji=False, width=160)
    for part in parts:
        console.print(part)


def _quiet_libraries() -> None:
    """The libraries' own progress bars, warnings and advice would interrupt ours."""
    warnings.simplefilter("ignore")
    warnings.simplefilter("once", MxDWarning)
    warnings.showwarning = lambda message, *_: click.echo(f"warning: {message}", err=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


@click.group(cls=_NamedErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mxdsurgery")
def main() -> None:
    """Replace the MLP blocks of a language model by Mixtures of Decoders, and see what it costs."""
    _quiet_libraries()


@main.command()
@click.argument("model")
@click.option("--revision", help="Branch, tag or commit on the hub.")
@_AS_JSON
def analyze(model: str, revision: str | None, as_json: bool) -> None:
    """Show which MLP blocks MODEL has, from its config alone."""
    analysis = mxdsurgery.analyze(model, revision=revision)
    _print_json(analysis.to_dict()) if as_json else _print_table(analysis.table())


@main.command()
@click.argument("model")
@click.option("--recipe", help="A recipe file, or the name of one that comes with mxdsurgery.")
@click.option("--measure/--no-measure", default=True, help="Measure this machine for some seconds, for the time it takes.")
@_AS_JSON
@_recipe_options()
def plan(model: str, recipe: str | None, measure: bool, as_json: bool, **overrides: Any) -> None:
    """Show what a conversion of MODEL would make and take, without weights.

    Every flag is a key of the recipe; what is not given comes from the recipe made for the model, or from --recipe.
    """
    made, resolved = mxdsurgery.plan(model, recipe=recipe, measure=measure, **overrides)
    if as_json:
        _print_json(made.to_dict() | {"recipe": resolved.to_dict()})
        return
    refusal = [] if made.refusal is None else [f"\nconvert would refuse: {MemoryBudgetError(**made.refusal)}"]
    _print_table(made.table(), made.group_table(), *made.summary(resolved), *refusal)


@main.command()
@click.argument("model")
@click.option("--recipe", help="A recipe file, or the name of one that comes with mxdsurgery.")
@_recipe_options()
def convert(model: str, recipe: str | None, **overrides: Any) -> None:
    """Convert MODEL: distil, evaluate and export.

    Every flag is a key of the recipe; what is not given comes from the recipe made for the model, or from --recipe.
    """
    made = mxdsurgery.convert(model, recipe=recipe, reporter=ConsoleReporter(), **overrides)
    _print_table(evaluation_table(made.evaluation), LEGEND, f"\nThe converted model is in {made.recipe.out}")


@main.command()
@click.argument("model")
@click.option("--layer", type=int, required=True, help="The layer whose block is replaced; negative: from the end.")
@click.option("--k", type=_List("k"), default=DEFAULT_K, help="Values of K. [default: 16,32,64,128,256]")
@click.option("--kinds", type=_List("kind"), default=DEFAULT_KINDS, help=_KINDS_HELP)
@click.option("--recipe", help="A recipe file, or the name of one that comes with mxdsurgery.")
@_recipe_options("layers", "k", "kind")
def frontier(model: str, **options: Any) -> None:
    """Compare kinds of layers at several K in place of one block of MODEL.

    All are trained on the same activations and have the same number of parameters. What --out holds already is kept.
    """
    made = mxdsurgery.frontier(model, reporter=ConsoleReporter(), **options)
    _print_table(
        made.table(), *made.verdicts, f"\nfrontier.json, frontier.csv, frontier.png and frontier.svg are in {made.out}"
    )


@main.command()
@click.argument("folder", metavar="DIR")
@click.option("--data", help="Held-out text; default: the recipe's.")
@click.option("--tokens", type=_Count(), help="How many of its tokens; default: the recipe's eval_tokens.")
@click.option("--base", help="The original model, if it is not where the recipe says.")
@click.option("--device", type=_RecipeValue("device"), help=RECIPE_KEYS["device"].doc)
@_AS_JSON
def evaluate(folder: str, as_json: bool, **options: Any) -> None:
    """Measure the converted model in DIR against its original."""
    figures = mxdsurgery.evaluate(folder, reporter=ConsoleReporter(), **options)
    _print_json(figures) if as_json else _print_table(evaluation_table(figures), LEGEND)


@main.command()
@click.argument("folder", metavar="DIR")
@_labelled_options(required=True)
@_AS_JSON
def probe(folder: str, as_json: bool, **options: Any) -> None:
    """Find the expert in DIR that stands for each class of labelled texts.

    DIR is what convert or frontier wrote.
    """
    result = mxdsurgery.probe(folder, reporter=ConsoleReporter(), **options)
    _print_json(result) if as_json else _print_table(*probe_tables(result))


@main.command()
@click.argument("folder", metavar="DIR")
@_labelled_options(required=False)
@_AS_JSON
def dissect(folder: str, as_json: bool, **options: Any) -> None:
    """Show the experts' rank, how alike they are, how they are used and what for.

    DIR is what convert or frontier wrote. Usage needs labelled text, --data; without it, weights alone are looked at.
    """
    result = mxdsurgery.dissect(folder, reporter=ConsoleReporter(), **options)
    _print_json(result) if as_json else _print_table(dissection_table(result))


@main.command()
@click.argument("folder", metavar="DIR")
@click.option("--data", help="The text; default: the recipe's held-out text, or its training text.")
@click.option("--tokens", type=_Count(), default=1_000_000, help="How many of its tokens. [default: 1M]")
@click.option("--out", help="Where to; default: DIR/experts.")
@click.option("--layers", default="all", show_default=True, help="Which; as convert's.")
@click.option("--text-column", help=RECIPE_KEYS["text_column"].doc)
@click.option("--label-column", help="Field with each document's class; default: label or kind, where there is one.")
@click.option("--top", type=_Count(), default=10, show_default=True, help="Strongest places kept of each expert.")
@click.option("--sample", type=_Count(), default=10, show_default=True, help="Random places kept of each expert.")
@click.option("--spread", type=_Count(), default=8, show_default=True, help="Draw from so many times as much text.")
@click.option("--overwrite", is_flag=True, help="Take the place of an earlier catalogue.")
@click.option("--device", type=_RecipeValue("device"), help=RECIPE_KEYS["device"].doc)
@click.option("--seed", type=int, default=0, show_default=True)
@_AS_JSON
def experts(folder: str, as_json: bool, **options: Any) -> None:
    """Write down of every expert in DIR when it fires and what it does: for search, report and steering.

    An interrupted run goes on where it stopped when the same command is given again.
    """
    result = mxdsurgery.experts(folder, reporter=ConsoleReporter(), **options)
    _print_json(result) if as_json else _print_table(experts_table(result), f"\nThe catalogue is in {result['out']}")


@main.command()
@click.argument("folder", metavar="DIR")
@click.argument("query")
@click.option("--by", type=click.Choice(BY), default="auto", show_default=True, help="What QUERY is.")
@click.option("--layer", type=int, help="Look in one layer only.")
@click.option("--top", type=_Count(), default=20, show_default=True, help="How many experts to show.")
@_AS_JSON
def search(folder: str, query: str, as_json: bool, **options: Any) -> None:
    """Show which experts in DIR fire most specifically on QUERY, a token or an example text."""
    result = mxdsurgery.search(folder, query, **options)
    _print_json(result) if as_json else _print_table(search_table(result))


@main.command()
@click.argument("folder", metavar="DIR")
@click.option("--out", help="The page; default: report.html in DIR.")
@click.option("--limit-mib", type=_Count(), default=64, show_default=True, help="Larger data go into files beside the page.")
def report(folder: str, **options: Any) -> None:
    """Write a page that shows every expert of DIR, for a browser; `experts` must have run."""
    made = mxdsurgery.report(folder, reporter=ConsoleReporter(), **options)
    beside = f"\nIts data are in {made['data']}: keep them together" if made["data"] else ""
    _print_table(f"The page is in {made['page']}{beside}")


@main.command()
@click.argument("folder", metavar="DIR")
@click.option("--out", required=True, help="A new folder.")
@click.option("--form", type=click.Choice(FORMS), default=FORMS[0], show_default=True)
@click.option("--layers", default="all", show_default=True, help="Which; as convert's.")
@_text_options
def coefficients(folder: str, **options: Any) -> None:
    """Write every expert coefficient of DIR on a text to files that other tools read."""
    made = mxdsurgery.coefficients(folder, reporter=ConsoleReporter(), **options)
    _print_table(f"Coefficients on {made['tokens']:,} tokens are in {options['out']}")


@main.command()
@click.argument("folder", metavar="DIR")
@click.option("--out", required=True, help="The folder to write.")
@click.option("--undo", is_flag=True, help="Take the last edit back, bit for bit.")
@click.option("--overwrite", is_flag=True, help="Take the place of an earlier folder of ours.")
@_edit_options
@_text_options
@_AS_JSON
def edit(folder: str, as_json: bool, **options: Any) -> None:
    """Edit experts of DIR for good, in a new folder, and say what that changed."""
    result = mxdsurgery.edit(folder, reporter=ConsoleReporter(), **options)
    _print_json(result) if as_json else _print_table(*edit_table(result), f"\nThe model is in {result['out']}")


@main.command()
@click.argument("folder", metavar="DIR")
@click.option("--prompt", required=True, help="How the text begins.")
@click.option("--max-new-tokens", type=_Count(), default=100, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.7, show_default=True)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=0.95, show_default=True)
@click.option("--samples", type=_Count(), default=1, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def generate(folder: str, prompt: str, **options: Any) -> None:
    """Continue a prompt with the converted model in DIR."""
    for text in mxdsurgery.generate(folder, prompt=prompt, **options):
        click.echo(text)
