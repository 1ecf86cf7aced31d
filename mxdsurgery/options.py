"""The flags that several commands share, and what their values may be."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import click
import cloup
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from mxdsurgery.arguments import ARGUMENTS, given_number
from mxdsurgery.choices import DEFAULT_KINDS, HEAL_CHOICES, LOCAL, LR_FACTOR, SPECIALISE_FACTOR
from mxdsurgery.demo import DEMO_MODELS
from mxdsurgery.hardware.gpus import EFFICIENCY, GPUS
from mxdsurgery.hardware.threads import use_threads
from mxdsurgery.paths import PATH_NAMES
from mxdsurgery.recipe import CHECKPOINT_KEYS, RECIPE_KEYS, Recipe


def key_help(name: str) -> str:
    """What a recipe key's flag says of it."""
    doc = RECIPE_KEYS[name].doc
    return doc[:1].upper() + doc[1:]


class RecipeValue(click.ParamType):
    """A flag's value, checked by the recipe key of its name."""

    def __init__(self, name: str) -> None:
        self.recipe_key = name
        self.name = RECIPE_KEYS[name].kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: D102
        return RECIPE_KEYS[self.recipe_key].parse(self.recipe_key, value)

    def shell_complete(self, _ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: D102
        choices = [choice for choice in RECIPE_KEYS[self.recipe_key].choices if choice.startswith(incomplete)]
        is_path = self.recipe_key in PATH_NAMES
        return [CompletionItem(incomplete, type="file")] if is_path else [CompletionItem(choice) for choice in choices]


class Number(click.ParamType):
    """A flag's number, checked as the argument of its name is."""

    def __init__(self, argument: str) -> None:
        self.argument = argument
        self.name = ARGUMENTS[argument].kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: D102
        return given_number(self.argument, value)


def number(name: str, doc: str | None = None, default: float | str | None = None) -> Callable[[Callable], Callable]:
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


# Where, in the recipe's order of keys, the help begins a new group of flags.
_GROUPS = {
    "model": "What is converted",
    "kind": "Into what",
    "inputs": "What layers learn from",
    "data": "The text",
    "batch": "How they learn",
    "compute": "Where and in what it is computed",
    "seed": "The run",
    "out": "What is written",
}


def recipe_options(*without: str) -> Callable[[Callable], Callable]:
    """A flag for every recipe key, in the recipe's order, except the model, which is the argument, and ``without``."""
    groups: dict[str, list[Callable]] = {}
    for field in dataclasses.fields(Recipe):
        if field.name in _GROUPS:
            flags = groups.setdefault(_GROUPS[field.name], [])
        if field.name not in ("model", *without):
            flags.append(_recipe_option(field))
    return _together(*(cloup.option_group(title, *flags) for title, flags in groups.items() if flags))


def _recipe_option(field: dataclasses.Field) -> Callable[[Callable], Callable]:
    """A recipe key's flag. None where it is not given: the model's recipe may say something else than the default."""
    key, flag = RECIPE_KEYS[field.name], "--" + field.name.replace("_", "-")
    shown = key_help(field.name) + (f" [{', '.join(key.choices)}]" if key.choices else "")
    if field.default not in (None, False):
        default = "on" if field.default is True else f"{field.default:,}" if key.kind == "count" else f"{field.default}"
        shown += f" [default: {default}]"
    if key.kind == "flag":
        return click.option(f"{flag}/--no-{flag[2:]}", field.name, default=None, help=shown)
    return click.option(flag, field.name, type=RecipeValue(field.name), default=None, help=shown)


def _together(*options: Callable[[Callable], Callable]) -> Callable[[Callable], Callable]:
    """Several decorators as one, the first of them first in the help."""
    return lambda command: functools.reduce(lambda made, option: option(made), reversed(options), command)


def _folders(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(incomplete, type="dir")]


MODEL = cloup.argument(
    "model", shell_complete=_folders, help="A hub id, the folder of a model, or " + " or ".join(DEMO_MODELS) + "."
)
DIR = cloup.argument(
    "folder", metavar="DIR", shell_complete=_folders, help="A converted model: what convert, heal, edit or apply wrote."
)
DEVICE = click.option("--device", type=RecipeValue("device"), help=key_help("device"))
COMPUTE = click.option("--compute", type=RecipeValue("compute"), help=key_help("compute"))
# For commands that convert nothing; for a conversion it is a recipe key, like the others.
THREADS = click.option(
    "--threads",
    type=RecipeValue("threads"),
    expose_value=False,
    callback=lambda _ctx, _param, count: use_threads(count),
    help=key_help("threads"),
)


# For commands that convert nothing; never set by a file.
TRUST = click.option("--trust-remote-code", is_flag=True, help="Run the Python code that came with the base model.")


def machine_options(command: Callable) -> Callable:
    """The flags that say where and how a command that converts nothing computes."""
    return cloup.option_group(_GROUPS["compute"], DEVICE, COMPUTE, THREADS)(TRUST(command))


RESUME = click.option("--resume", is_flag=True, help="Go on with the unfinished run in OUT.run, if there is one.")
OVERWRITE = click.option("--overwrite", is_flag=True, help="Take the place of an earlier folder of ours.")
BASE = click.option("--base", help="The original model, if it is not where the recipe says.")


TEXT_COLUMN = click.option("--text-column", help=key_help("text_column") + "; default: the recipe's.")


def labelled_options(required: bool) -> Callable[[Callable], Callable]:
    """The flags of commands that look at experts through labelled text."""
    text = (
        click.option("--data", required=required, help="Labelled text: a file, folder or data set with columns."),
        click.option("--text-column", default="text", show_default=True, help="The column or field that holds the text."),
        click.option("--label-column", default="label", show_default=True, help="The column or field that holds the class."),
        number("samples", "Texts, drawn at random; default: all, but 20,000 at most."),
        number("context", "Tokens that each text is cut after; default: the recipe's."),
        number("seed", "Of the drawing.", default=0),
    )
    layer = click.option("--layer", type=int, help="Negative: from the end; default: the first in DIR.")
    return _together(cloup.option_group(_GROUPS["data"], *text), machine_options, layer, BASE)


def gpu_options(command: Callable) -> Callable:
    """The flags that ask for a plan on GPUs of a kind; they become one argument, ``rented``, empty where none is asked for."""
    options = (
        click.option("--gpu", type=click.Choice(list(GPUS)), help="Predict what 1 to 8 such GPUs take; none is needed."),
        number("price", "With --gpu: of a GPU for an hour, in any currency."),
        number("efficiency", "With --gpu: share of its peak figures that is taken to be reached.", default=EFFICIENCY),
    )

    @functools.wraps(command)
    def with_rented(*args: Any, gpu: str | None, price: float | None, efficiency: float, **given: Any) -> Any:
        if gpu is None:
            refuse_typed("price", "goes with --gpu")
            refuse_typed("efficiency", "goes with --gpu")
            return command(*args, rented={}, **given)
        refuse_typed("hours", "goes without --gpu")
        return command(*args, rented={"gpu": gpu, "price": price, "efficiency": efficiency}, **given)

    return cloup.option_group("On GPUs that are not here", *options)(with_rented)


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

    return cloup.option_group("Edits", *options)(with_edits)


def heal_options(command: Callable) -> Callable:
    """The flags of how to heal; a flag that is not given is the default of `Healing`."""
    penalty = (
        f"Weight of the penalty on what frozen experts could do; default: {SPECIALISE_FACTOR:g} times the recipe's, or none "
        "where it asks for an expert_share: what the experts carry is then held at what it is."
    )
    text = (
        number("tokens", "Of training; default: the recipe's."),
        click.option("--data", help="The text; default: the recipe's."),
        TEXT_COLUMN,
        number("seed", "Of the text's order and the adapters; default: one more than the recipe's."),
    )
    learning = (
        _choice("mode", "What learns: the new layers, LoRA on the attention projections, or both."),
        click.option("--lr", type=RecipeValue("lr"), help=f"Peak learning rate; default: {LR_FACTOR} times the recipe's."),
        _key_option("moments"),
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
    )
    groups = {
        _GROUPS["data"]: text,
        _GROUPS["batch"]: learning,
        _GROUPS["seed"]: (*(_key_option(name) for name in CHECKPOINT_KEYS), RESUME),
        _GROUPS["out"]: (
            click.option("--out", required=True, help="The folder to write."),
            _choice("format", key_help("format")),
            OVERWRITE,
        ),
    }

    @functools.wraps(command)
    def with_given(*args: Any, **options: Any) -> Any:
        if options["teacher"] != "cached":
            refuse_typed("top_n", "goes with --teacher cached")
        if options["mode"] == "lora":
            refuse_typed("moments", "goes with --mode mxd or --mode both")
        if options["mode"] in (None, "mxd"):
            refuse_typed("lora_rank", "goes with --mode lora or --mode both")
            refuse_typed("lora", "goes with --mode lora or --mode both")
        return command(*args, **{name: value for name, value in options.items() if value is not None})

    return _together(*(cloup.option_group(title, *flags) for title, flags in groups.items()))(with_given)


def _key_option(name: str) -> Callable[[Callable], Callable]:
    """A recipe key's flag on a command that converts nothing."""
    return click.option("--" + name.replace("_", "-"), type=RecipeValue(name), help=key_help(name))


def _choice(name: str, text: str) -> Callable[[Callable], Callable]:
    """A flag of `heal` with few values; the first is the default."""
    return click.option(f"--{name}", type=click.Choice(HEAL_CHOICES[name]), help=f"{text} [default: {HEAL_CHOICES[name][0]}]")


def text_options(command: Callable) -> Callable:
    """The flags of commands that measure on held-out text."""
    options = (
        click.option("--data", help="Text; default: the recipe's held-out text."),
        number("tokens", "How many of its tokens; default: the recipe's eval_tokens."),
        TEXT_COLUMN,
    )
    return _together(cloup.option_group(_GROUPS["data"], *options), machine_options)(command)


sampling_options = cloup.option_group(
    "Sampling",
    number("max_new_tokens", "Default: 100; with --score, 32."),
    number("temperature", "Default: 1, as the model predicts."),
    number("top_k", "Sample from so many of the likeliest tokens only. Default: all."),
    number("top_p", "Default: 1, from all."),
    number("samples", "Default: 1; with --score, 10."),
    number("seed", "Default: 0."),
)

scoring_options = cloup.option_group(
    "How good steering is",
    click.option("--score", is_flag=True, help="Measure how good the steering of one expert is, beside that of others."),
    click.option("--factors", type=Numbers(), help="With --score: try these multiples of the strength."),
    number("controls", "With --score: so many others. Default: 4."),
    click.option("--base", help="With --score: the original model, if it is not where the recipe says."),
    click.option(
        "--judge", "judge_url", metavar="URL", help="With --score: an OpenAI-compatible judge; key in OPENAI_API_KEY."
    ),
    click.option("--judge-model", metavar="NAME", help="Which model judges."),
)

AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


KINDS_HELP = f"Of {', '.join(RECIPE_KEYS['kind'].choices)}. [default: {','.join(DEFAULT_KINDS)}]"
