"""The flags that several commands share, and what their values may be."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource

from mxdsurgery.arguments import ARGUMENTS, given_number
from mxdsurgery.choices import DEFAULT_KINDS, HEAL_CHOICES, LOCAL, LR_FACTOR, SPECIALISE_FACTOR
from mxdsurgery.hardware.threads import use_threads
from mxdsurgery.recipe import CHECKPOINT_KEYS, RECIPE_KEYS, Recipe


class RecipeValue(click.ParamType):
    """A flag's value, checked by the recipe key of its name."""

    def __init__(self, name: str) -> None:
        self.recipe_key = name
        self.name = RECIPE_KEYS[name].kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: D102
        return RECIPE_KEYS[self.recipe_key].parse(self.recipe_key, value)


class Number(click.ParamType):
    """A flag's number, checked as the argument of its name is."""

    def __init__(self, argument: str) -> None:
        self.argument = argument
        self.name = ARGUMENTS[argument].kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: D102
        return given_number(self.argument, value)


def number(name: str, doc: str | None = None, default: int | str | None = None) -> Callable[[Callable], Callable]:
    """The flag of an argument that is a number."""
    flag, said = "--" + name.replace("_", "-"), doc or ARGUMENTS[name].doc.capitalize() + "."
    return click.option(flag, type=Number(name), default=default, show_default=default is not None, help=said)


class RecipeValues(click.ParamType):
    """Values between commas, each checked by the recipe key of the name."""

    def __init__(self, name: str) -> None:
        self.recipe_key, self.name = name, f"{name},{name},..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: D102
        key = RECIPE_KEYS[self.recipe_key]
        return value if isinstance(value, tuple) else tuple(key.parse(self.recipe_key, v.strip()) for v in value.split(","))


class Numbers(click.ParamType):
    """Positive numbers between commas."""

    name = "number,number,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: D102
        try:
            numbers = tuple(float(part) for part in value.split(",")) if isinstance(value, str) else value
        except ValueError:
            self.fail(f"{value!r} is no list of numbers", param, ctx)
        if not all(0 < number < float("inf") for number in numbers):
            self.fail(f"{value!r}: numbers above 0 are expected", param, ctx)
        return numbers


def refuse_typed(name: str, why: str) -> None:
    """Raises UsageError for a flag that was given, where it would have no say."""
    if click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE:
        raise click.UsageError(f"--{name.replace('_', '-')} {why}")


def recipe_options(*without: str) -> Callable[[Callable], Callable]:
    """A flag for every recipe key, in the recipe's order, except the model, which is the argument, and ``without``."""

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
                option = click.option(flag, field.name, type=RecipeValue(field.name), default=None, help=shown)
            command = option(command)
        return command

    return add


DEVICE = click.option("--device", type=RecipeValue("device"), help=RECIPE_KEYS["device"].doc)
COMPUTE = click.option("--compute", type=RecipeValue("compute"), help=RECIPE_KEYS["compute"].doc)
# For commands that convert nothing; for a conversion it is a recipe key, like the others.
THREADS = click.option(
    "--threads",
    type=RecipeValue("threads"),
    expose_value=False,
    callback=lambda _ctx, _param, count: use_threads(count),
    help=RECIPE_KEYS["threads"].doc,
)


# For commands that convert nothing; never set by a file.
TRUST = click.option("--trust-remote-code", is_flag=True, help="Run the Python code that came with the base model.")


def machine_options(command: Callable) -> Callable:
    """The flags that say where and how a command that converts nothing computes."""
    return DEVICE(COMPUTE(THREADS(TRUST(command))))


RESUME = click.option("--resume", is_flag=True, help="Go on with the unfinished run in OUT.run, if there is one.")
BASE = click.option("--base", help="The original model, if it is not where the recipe says.")


TEXT_COLUMN = click.option("--text-column", help=RECIPE_KEYS["text_column"].doc + "; default: the recipe's.")


def labelled_options(required: bool) -> Callable[[Callable], Callable]:
    """The flags of commands that look at experts through labelled text."""
    options = (
        click.option("--data", required=required, help="Labelled text: a file, folder or data set with columns."),
        click.option("--layer", type=int, help="Negative: from the end; default: the first in DIR."),
        click.option("--text-column", default="text", show_default=True, help="The column or field that holds the text."),
        click.option("--label-column", default="label", show_default=True, help="The column or field that holds the class."),
        number("samples", "Texts, drawn at random; default: all, but 20,000 at most."),
        number("context", "Tokens that each text is cut after; default: the recipe's."),
        BASE,
        machine_options,
        number("seed", default=0),
    )
    return lambda command: functools.reduce(lambda made, option: option(made), reversed(options), command)


def edit_options(command: Callable) -> Callable:
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
        from mxdsurgery.editing.edits import edits_from_flags

        flags = {kind: given.pop(kind) for kind in ("ablate", "drop", "scale", "steer", "clamp")}
        return command(*args, edits=edits_from_flags(edit_file, **flags), **given)

    return functools.reduce(lambda made, option: option(made), reversed(options), with_edits)


def heal_options(command: Callable) -> Callable:
    """The flags of how to heal; a flag that is not given is the default of `Healing`."""
    penalty = (
        f"Weight of the penalty on what frozen experts could do; default: {SPECIALISE_FACTOR:g} times the recipe's, or none "
        "where it asks for an expert_share: what the experts carry is then held at what it is."
    )
    options = (
        _choice("mode", "What learns: the new layers, LoRA on the attention projections, or both."),
        number("tokens", "Of training; default: the recipe's."),
        click.option("--data", help="The text; default: the recipe's."),
        TEXT_COLUMN,
        click.option("--lr", type=RecipeValue("lr"), help=f"Peak learning rate; default: {LR_FACTOR} times the recipe's."),
        click.option("--batch", type=RecipeValue("batch"), help="Tokens per optimiser step; default: the recipe's."),
        number("accumulate", "Forward and backward passes that a step is split into. [default: 1]"),
        click.option("--checkpointing", is_flag=True, help="Compute each decoder layer twice, and keep less in memory."),
        click.option("--specialise", type=RecipeValue("specialise"), help=penalty),
        number("local", f"Weight of each layer's distance from its block's output. [default: {LOCAL}]"),
        number("patience", "Stop after so many looks, of 10, without anything better. [default: 4]"),
        number("lora_rank", "Of the adapters. [default: 8]"),
        _choice("lora", "LoRA merged into the weights, or kept as a PEFT adapter in OUT/lora."),
        _choice("teacher", "The original runs beside the model, or once before it, its likeliest tokens kept on disk."),
        number("top_n", "How many are kept of each position. [default: 64]"),
        number("seed", "Of the text's order and the adapters; default: one more than the recipe's."),
        _choice("format", RECIPE_KEYS["format"].doc),
        *(_key_option(name) for name in CHECKPOINT_KEYS),
    )

    @functools.wraps(command)
    def with_given(*args: Any, **options: Any) -> Any:
        if options["teacher"] != "cached":
            refuse_typed("top_n", "goes with --teacher cached")
        if options["mode"] in (None, "mxd"):
            refuse_typed("lora_rank", "goes with --mode lora or --mode both")
            refuse_typed("lora", "goes with --mode lora or --mode both")
        return command(*args, **{name: value for name, value in options.items() if value is not None})

    return functools.reduce(lambda made, option: option(made), reversed(options), with_given)


def _key_option(name: str) -> Callable[[Callable], Callable]:
    """A recipe key's flag on a command that converts nothing."""
    return click.option("--" + name.replace("_", "-"), type=RecipeValue(name), help=RECIPE_KEYS[name].doc)


def _choice(name: str, text: str) -> Callable[[Callable], Callable]:
    """A flag of `heal` with few values; the first is the default."""
    return click.option(f"--{name}", type=click.Choice(HEAL_CHOICES[name]), help=f"{text} [default: {HEAL_CHOICES[name][0]}]")


def text_options(command: Callable) -> Callable:
    """The flags of commands that measure on held-out text."""
    options = (
        click.option("--data", help="Text; default: the recipe's held-out text."),
        number("tokens", "How many of its tokens; default: the recipe's eval_tokens."),
        TEXT_COLUMN,
        machine_options,
    )
    return functools.reduce(lambda made, option: option(made), reversed(options), command)


AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


KINDS_HELP = f"Of {', '.join(RECIPE_KEYS['kind'].choices)}. [default: {','.join(DEFAULT_KINDS)}]"
