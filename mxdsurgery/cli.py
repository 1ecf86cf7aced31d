"""The command line: each command reads its flags, calls the public function of its name and prints what it returns."""

import dataclasses
from typing import Any

import click
import cloup

import mxdsurgery
from mxdsurgery.choices import BY, DEFAULT_K, DEFAULT_KINDS, FORMS, ONE_LAYER, UNITS
from mxdsurgery.errors import EditError, MemoryBudgetError
from mxdsurgery.options import (
    AS_JSON,
    BASE,
    COMPUTE,
    DIR,
    KINDS_HELP,
    MODEL,
    OVERWRITE,
    RESUME,
    TEXT_COLUMN,
    THREADS,
    TRUST,
    RecipeValue,
    RecipeValues,
    edit_options,
    gpu_options,
    heal_options,
    key_help,
    labelled_options,
    machine_options,
    number,
    recipe_options,
    refuse_typed,
    sampling_options,
    scoring_options,
    text_options,
)
from mxdsurgery.terminal.console import duration, size
from mxdsurgery.terminal.ending import NamedErrors, flags_of
from mxdsurgery.terminal.results import print_json, print_table
from mxdsurgery.terminal.streams import say
from mxdsurgery.terminal.voice import console_reporter, level_options

SECTIONS = LOOK, CONVERT, MEASURE, EXPERTS, CHANGE, SHARE = tuple(
    map(cloup.Section, ("Look", "Convert", "Measure", "Experts", "Change and use", "Share"))
)


@click.group(
    cls=NamedErrors, sections=SECTIONS, params=level_options(), context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(package_name="mxdsurgery")
def main() -> None:
    """Replace the MLP blocks of a language model by Mixtures of Decoders, and see what it costs."""


@main.command(section=LOOK)
@THREADS
@AS_JSON
def doctor(as_json: bool) -> None:
    """Show what this machine has for the other commands, and what it lacks."""
    from mxdsurgery.planning.doctor import doctor_tables

    found = mxdsurgery.doctor()
    print_json(found) if as_json else print_table(*doctor_tables(found))


@main.command(section=LOOK)
@MODEL
@click.option("--revision", help="Branch, tag or commit on the hub.")
@click.option("--trust-remote-code", is_flag=True, help=key_help("trust_remote_code"))
@AS_JSON
def analyze(model: str, as_json: bool, **options: Any) -> None:
    """Show which MLP blocks MODEL has, from its config alone."""
    analysis = mxdsurgery.analyze(model, **options)
    print_json(analysis.to_dict()) if as_json else print_table(analysis.table())


@main.command(section=LOOK)
@MODEL
@click.option("--recipe", help="A recipe file, or the name of one that comes with mxdsurgery.")
@click.option("--measure/--no-measure", default=True, help="Measure this machine for some seconds, for the time it takes.")
@number("hours", "Hours that there are: propose the conversion that fits them, evaluation and export included.")
@gpu_options
@AS_JSON
@recipe_options()
def plan(model: str, measure: bool, hours: float | None, rented: dict[str, Any], as_json: bool, **given: Any) -> None:
    """Show what a conversion of MODEL would make and take, without weights.

    Every flag is a key of the recipe; what is not given comes from the recipe made for the model, or from --recipe. With
    --hours, this machine is measured up to five times, ten seconds each; with --gpu, it is not.
    """
    from mxdsurgery.planning.summary import group_table, layer_table, summary

    printed, more = [], {}
    if rented:
        found = mxdsurgery.gpu_hours(model, **rented, **given)
        made, resolved, printed, more = found.plan, found.recipe, found.printed(), {"gpus": found.to_dict()}
    elif hours is not None:
        found = mxdsurgery.propose(model, hours=hours, **given)
        made, resolved, command = found.plan, found.recipe, found.command(model, given)
        more = {"proposal": {"hours": hours} | found.keys | {"command": command}}
    else:
        made, resolved = mxdsurgery.plan(model, measure=measure, **given)
    if made.refusal is not None:
        printed = [f"\nconvert would refuse: {MemoryBudgetError(**made.refusal).for_command(flags_of(convert))}"]
    elif more.get("proposal"):
        printed = [f"\nIn {duration(made.total_seconds)}, of the {duration(3600 * hours)} that there are:\n{command}"]
    plain = made.to_dict() | {"recipe": resolved.to_dict()} | more
    print_json(plain) if as_json else print_table(layer_table(made), group_table(made), *summary(made, resolved), *printed)


@main.command(section=CONVERT)
@MODEL
@click.option("--recipe", help="A recipe file, or the name of one that comes with mxdsurgery.")
@RESUME
@AS_JSON
@recipe_options()
def convert(model: str, recipe: str | None, as_json: bool, **overrides: Any) -> None:
    """Convert MODEL: distil, evaluate and export.

    Every flag is a key of the recipe; what is not given comes from the recipe made for the model, or from --recipe.
    """
    from mxdsurgery.checkpoint.card import evaluation_table

    made = mxdsurgery.convert(model, recipe=recipe, reporter=console_reporter(), **overrides)
    if made is None:
        return  # the first of several processes says it
    if as_json:
        print_json(made.evaluation | {"out": made.recipe.out})
        return
    print_table(evaluation_table(made.evaluation), f"\nThe converted model is in {made.recipe.out}")


@main.command(section=CONVERT)
@MODEL
@click.option("--layer", type=int, required=True, help="The layer whose block is replaced; negative: from the end.")
@click.option("--k", type=RecipeValues("k"), default=DEFAULT_K, help="Values of K. [default: 16,32,64,128,256]")
@click.option("--kinds", type=RecipeValues("kind"), default=DEFAULT_KINDS, help=KINDS_HELP)
@click.option("--recipe", help="A recipe file, or the name of one that comes with mxdsurgery.")
@RESUME
@AS_JSON
@recipe_options("layers", "k", "kind", *ONE_LAYER)
def frontier(model: str, as_json: bool, **options: Any) -> None:
    """Compare kinds of layers at several K in place of one block of MODEL.

    All are trained on the same activations and have the same number of parameters. What --out holds already is kept.
    """
    made = mxdsurgery.frontier(model, reporter=console_reporter(), **options)
    if as_json:
        print_json(dataclasses.asdict(made) | {"out": str(made.out)})
        return
    print_table(
        made.table(), *made.verdicts, f"\nfrontier.json, frontier.csv, frontier.png and frontier.svg are in {made.out}"
    )


@main.command(section=MEASURE)
@DIR
@text_options
@BASE
@number("tokens_single", "Of them, those that each layer alone is measured on.")
@click.option("--growth", is_flag=True, help="Show instead how the error grows from layer to layer; DIR is left as it is.")
@AS_JSON
def evaluate(folder: str, growth: bool, tokens_single: int | None, as_json: bool, **options: Any) -> None:
    """Measure the converted model in DIR against its original."""
    if growth:
        if tokens_single is not None:
            raise click.UsageError("--tokens-single does not go with --growth")
        from mxdsurgery.measuring.growth import growth_table

        result = mxdsurgery.growth(folder, reporter=console_reporter(), **options)
        print_json(result) if as_json else print_table(*growth_table(result))
        return
    from mxdsurgery.checkpoint.card import evaluation_table

    figures = mxdsurgery.evaluate(folder, tokens_single=tokens_single, reporter=console_reporter(), **options)
    print_json(figures) if as_json else print_table(evaluation_table(figures))


@main.command(section=CONVERT)
@DIR
@heal_options
@machine_options
@BASE
@AS_JSON
def heal(folder: str, as_json: bool, **options: Any) -> None:
    """Train the converted model in DIR end to end, toward its original's predictions.

    What learns keeps its form and K. The best weights on text that is not trained on are written.
    """
    from mxdsurgery.checkpoint.card import evaluation_table
    from mxdsurgery.conversion.heal import heal_table

    result = mxdsurgery.heal(folder, reporter=console_reporter(), **options)
    if result is None:
        return  # the first of several processes says it
    if as_json:
        print_json(result)
        return
    print_table(heal_table(result), evaluation_table(result["evaluation"]), f"\nThe model is in {result['out']}")


@main.command(name="apply", section=SHARE)
@cloup.argument("adapter", help="A folder or hub id: what --format adapter wrote.")
@click.option("--base", help="The base model; default: the one that the adapter names.")
@COMPUTE
@THREADS
@TRUST
@click.option("--out", required=True, help="The folder to write.")
@OVERWRITE
@AS_JSON
def apply_(adapter: str, as_json: bool, **options: Any) -> None:
    """Write the whole checkpoint of ADAPTER, bit for bit, from the base model's weights and what differs from them."""
    result = mxdsurgery.apply(adapter, reporter=console_reporter(), **options)
    made = f"{size(result['bytes'])} from an adapter of {size(result['adapter_bytes'])} and {result['base_model']}"
    print_json(result) if as_json else print_table(f"The model is in {result['out']}: {made}")


@main.command(section=SHARE)
@DIR
@cloup.argument("repo", metavar="USER/NAME", help="Where on the hub.")
@click.option("--private", is_flag=True, help="Only you may see it.")
@click.option("--revision", help="Branch to write to, made if it is not there; default: main.")
@click.option("--message", help="Of the commit.")
@click.option("--redact", is_flag=True, help="Send copies in which local paths are cut down to their last component.")
@click.option("--include-experts", is_flag=True, help="Send the catalogue of `experts` too, with the text in it.")
@AS_JSON
def push(folder: str, repo: str, as_json: bool, **options: Any) -> None:
    """Upload the model or adapter in DIR to the hub, with its card, if nothing in it has to stay private."""
    from mxdsurgery.sharing.push import push_table

    result = mxdsurgery.push(folder, repo, reporter=console_reporter(), **options)
    print_json(result) if as_json else print_table(push_table(result), f"\nIt is at {result['url']}")


@main.command(section=MEASURE)
@DIR
@labelled_options(required=True)
@AS_JSON
def probe(folder: str, as_json: bool, **options: Any) -> None:
    """Find the expert in DIR that stands for each class of labelled texts.

    DIR is what convert or frontier wrote.
    """
    from mxdsurgery.measuring.probe import probe_tables

    result = mxdsurgery.probe(folder, reporter=console_reporter(), **options)
    print_json(result) if as_json else print_table(*probe_tables(result))


@main.command(section=MEASURE)
@DIR
@labelled_options(required=False)
@AS_JSON
def dissect(folder: str, as_json: bool, **options: Any) -> None:
    """Show the experts' rank, how alike they are, how they are used and what for.

    DIR is what convert or frontier wrote. Usage needs labelled text, --data; without it, weights alone are looked at.
    """
    from mxdsurgery.measuring.dissect import dissection_table

    result = mxdsurgery.dissect(folder, reporter=console_reporter(), **options)
    print_json(result) if as_json else print_table(dissection_table(result))


@main.command(section=EXPERTS)
@DIR
@click.option("--data", help="The text; default: the recipe's held-out text, or its training text.")
@number("tokens", "How many of its tokens.", default="1M")
@click.option("--out", help="Where to; default: DIR/experts.")
@click.option("--layers", default="all", show_default=True, help="Which; as convert's.")
@TEXT_COLUMN
@click.option("--label-column", help="Field with each document's class; default: label or kind, where there is one.")
@number("top", "Strongest places kept of each expert.", default=10)
@number("sample", "Random places kept of each expert.", default=10)
@number("spread", "Draw from so many times as much text.", default=8)
@click.option("--overwrite", is_flag=True, help="Take the place of an earlier catalogue.")
@RESUME
@number("checkpoint_every", "Passes between two checkpoints; default: the recipe's.")
@machine_options
@number("seed", default=0)
@AS_JSON
def experts(folder: str, as_json: bool, **options: Any) -> None:
    """Write down of every expert in DIR when it fires and what it does: for search, report and steering."""
    from mxdsurgery.catalogue.experts import experts_table

    result = mxdsurgery.experts(folder, reporter=console_reporter(), **options)
    print_json(result) if as_json else print_table(experts_table(result), f"\nThe catalogue is in {result['out']}")


@main.command(section=LOOK)
@DIR
@click.option("--out", metavar="FILE", help="A .png or .svg; both are written. Default: metrics.png beside metrics.jsonl.")
@AS_JSON
def plot(folder: str, as_json: bool, **options: Any) -> None:
    """Draw how the training of DIR went: loss, NMSE and dead experts of each layer, and the KL where there is one.

    DIR is what convert, heal or frontier wrote, or is writing; a layer that went wrong is named.
    """
    from mxdsurgery.runs.plot import plot_table

    result = mxdsurgery.plot(folder, reporter=console_reporter(), **options)
    drawn = f"\nThe figures are {' and '.join(result['figures'])}"
    print_json(result) if as_json else print_table(*plot_table(result), drawn)


@main.command(section=EXPERTS)
@DIR
@cloup.argument("query", required=False, help="A token, an example text, or a class of texts.")
@click.option("--by", type=click.Choice(BY), default="auto", show_default=True, help="What QUERY is.")
@click.option("--layer", type=int, help="Look in one layer only; negative: from the end.")
@number("top", "How many experts to show.", default=20)
@machine_options
@AS_JSON
def search(folder: str, query: str | None, as_json: bool, **options: Any) -> None:
    """Show which experts in DIR fire most specifically on QUERY: a token, an example text, or a class of texts.

    Without QUERY: the experts that a reader understands at once, each with the token that it fires on.
    """
    from mxdsurgery.catalogue.search import search_table

    result = mxdsurgery.search(folder, query, **options)
    print_json(result) if as_json else print_table(search_table(result))


@main.command(section=EXPERTS)
@DIR
@click.option("--out", help="The page; default: report.html in DIR.")
@number("limit_mib", "Larger data go into files beside the page.", default=64)
@TRUST
@AS_JSON
def report(folder: str, as_json: bool, **options: Any) -> None:
    """Write a page that shows every expert of DIR, for a browser; `experts` must have run."""
    made = mxdsurgery.report(folder, reporter=console_reporter(), **options)
    beside = f"\nIts data are in {made['data']}: keep them together" if made["data"] else ""
    print_json(made) if as_json else print_table(f"The page is in {made['page']}{beside}")


@main.command(section=EXPERTS)
@DIR
@click.option("--out", required=True, help="A new folder.")
@click.option("--form", type=click.Choice(FORMS), default=FORMS[0], show_default=True)
@click.option("--layers", default="all", show_default=True, help="Which; as convert's.")
@text_options
@AS_JSON
def coefficients(folder: str, as_json: bool, **options: Any) -> None:
    """Write every expert coefficient of DIR on a text to files that other tools read."""
    made = mxdsurgery.coefficients(folder, reporter=console_reporter(), **options)
    print_json(made) if as_json else print_table(f"Coefficients on {made['tokens']:,} tokens are in {options['out']}")


@main.command(section=CHANGE)
@DIR
@click.option("--out", required=True, help="The folder to write.")
@click.option("--undo", is_flag=True, help="Take the last edit back, bit for bit.")
@OVERWRITE
@click.option("--format", type=RecipeValue("format"), default="checkpoint", help=key_help("format"))
@edit_options
@text_options
@AS_JSON
def edit(folder: str, as_json: bool, **options: Any) -> None:
    """Edit experts of DIR for good, in a new folder, and say what that changed."""
    from mxdsurgery.editing.edit import edit_table

    result = mxdsurgery.edit(folder, reporter=console_reporter(), **options)
    print_json(result) if as_json else print_table(*edit_table(result), f"\nThe model is in {result['out']}")


@main.command(section=EXPERTS)
@DIR
@edit_options
@click.option(
    "--sweep", type=int, metavar="LAYER", help="Instead of edits: rank all experts of a layer by what ablating does."
)
@text_options
@number("controls", "Draws of other experts; 0: none.", default=5)
@number("contexts_per_expert", "With --sweep: where each is measured.", default=4)
@number("top", "Rows to show.", default=20)
@number("seed", default=0)
@AS_JSON
def effect(folder: str, edits: Any, sweep: int | None, as_json: bool, **options: Any) -> None:
    """Measure what edits of experts in DIR do to its predictions, and what the same edits of others do."""
    per_expert = options.pop("contexts_per_expert")
    if sweep is None:
        refuse_typed("contexts_per_expert", "goes with --sweep")
        from mxdsurgery.editing.effect import effect_tables

        result = mxdsurgery.effect(folder, edits=edits, reporter=console_reporter(), **options)
        print_json(result) if as_json else print_table(*effect_tables(result))
        return
    if edits:
        raise EditError("--sweep was given together with edits", expected="one of them: it ablates each expert alone")
    refuse_typed("controls", "goes with edits: --sweep compares every expert with all others")
    from mxdsurgery.editing.sweep import sweep_table

    top, _ = options.pop("top"), options.pop("controls")
    ranked = mxdsurgery.sweep(folder, layer=sweep, contexts_per_expert=per_expert, reporter=console_reporter(), **options)
    print_json(ranked) if as_json else print_table(sweep_table(ranked, top))


@main.command(section=CHANGE)
@DIR
@click.option("--prompt", help='How the text begins; needed, but with --score, where it is "Let\'s talk about ".')
@click.option("--chat", is_flag=True, default=None, help="The prompt is a message to a chat model; show its answers.")
@edit_options
@click.option("--unit", type=click.Choice(UNITS), help="Of --steer and --clamp; maximum: the largest that `experts` saw.")
@sampling_options
@scoring_options
@machine_options
@AS_JSON
def generate(folder: str, score: bool, judge_url: str | None, judge_model: str | None, as_json: bool, **options: Any) -> None:
    """Continue a prompt with the converted model in DIR; with edits, beside the unedited model."""
    given = {name: value for name, value in options.items() if value is not None}
    if score:
        refuse_typed("chat", "goes without --score")
        from mxdsurgery.editing.judge import judge_from_flags
        from mxdsurgery.editing.steering import steering_table

        judge = judge_from_flags(judge_url, judge_model)
        result = mxdsurgery.steering(folder, judge=judge, reporter=console_reporter(), **given)
        print_json(result) if as_json else print_table(steering_table(result))
        return
    if given.keys() & {"factors", "controls", "base"} or judge_url or judge_model:
        raise click.UsageError("--factors, --controls, --base and --judge go with --score")
    if not given.get("edits"):
        refuse_typed("unit", "goes with --steer or --clamp, or --edits with these")
    if "prompt" not in given:
        raise click.UsageError("--prompt is needed")
    from mxdsurgery.editing.generate import side_by_side

    result = mxdsurgery.generate(folder, **given)
    if as_json or isinstance(result, dict):
        print_json(result) if as_json else print_table(side_by_side(result))
        return
    for text in result:
        say(text)
