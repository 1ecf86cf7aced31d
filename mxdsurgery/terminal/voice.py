"""How much a command says: -q and -v, which all commands have, and whether the libraries' warnings are shown."""

import logging
import os
import sys
import warnings
from typing import Any

import click
import cloup

from mxdsurgery.disclosure import masked, secrets_here
from mxdsurgery.errors import MxDWarning
from mxdsurgery.once import one_call
from mxdsurgery.paths import check_working_folder
from mxdsurgery.terminal.console import ConsoleReporter, event_line
from mxdsurgery.terminal.examples import EXAMPLES
from mxdsurgery.terminal.streams import say

# Where click keeps the level: the same for a group and for the command in it.
_LEVEL = "mxdsurgery.level"


def level_options() -> list[click.Option]:
    """-q and -v; the last one given counts, and one after the command's name more than one before it."""

    def option(short: str, name: str, level: str, text: str) -> click.Option:
        def keep(ctx: click.Context, _param: click.Parameter, given: bool) -> None:
            if given:
                ctx.meta[_LEVEL] = level

        return click.Option([short, f"--{name}"], is_flag=True, expose_value=False, callback=keep, help=text)

    return [
        option("-q", "quiet", "warning", "Say only what is wrong, and the result."),
        option("-v", "verbose", "debug", "Say all of it, with time and level, and what the libraries warn of."),
    ]


class Command(cloup.Command):
    """A command with -q and -v, whose help ends with examples."""

    def __init__(self, name: str, **options: Any) -> None:
        params = [*options.pop("params", ()), *level_options()]
        super().__init__(name, params=params, epilog=_examples(name), **options)

    def get_short_help_str(self, _limit: int = 0) -> str:
        """The first sentence of its help, whole: the list of commands wraps it."""
        return " ".join((self.help or "").partition("\n\n")[0].split())

    def invoke(self, ctx: click.Context) -> Any:
        """Runs it, with the libraries' warnings shown or not, as asked for. Raises PathError if the working folder is gone."""
        check_working_folder()
        _hear_libraries(_level() == "debug")
        with one_call:
            return super().invoke(ctx)


def _examples(name: str) -> str | None:
    lines = "".join(f"\n  mxdsurgery {name} {arguments}" for arguments in EXAMPLES.get(name, ()))
    return f"\b\nExamples:{lines}" if lines else None


def console_reporter() -> ConsoleReporter:
    """The reporter of the running command, at the level asked for."""
    return ConsoleReporter(level=_level())


def _level() -> str:
    return click.get_current_context().meta.get(_LEVEL, "info")


class _Lines(logging.Handler):
    """Prints what a library logs as a line like ours."""

    def emit(self, record: logging.LogRecord) -> None:
        line = event_line(record.levelname.lower(), record.name.partition(".")[0], record.getMessage())
        say(masked(line, secrets_here(None)), err=True)


def _hear_libraries(warned: bool) -> None:
    """Silences the libraries' progress bars, advice and, unless ``warned``, warnings: they would interrupt our own."""
    warnings.simplefilter("default" if warned else "ignore")
    warnings.simplefilter("once", MxDWarning)
    warnings.showwarning = lambda message, *_: say(f"warning: {message}", err=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers', too, if it is not loaded yet
    logging.disable(logging.NOTSET if warned else logging.WARNING)  # no library need be loaded for that
    if warned or "transformers" in sys.modules:
        import transformers

        transformers.logging.disable_progress_bar()
    if warned:
        logging.basicConfig(level=logging.WARNING, handlers=[_Lines()])
        transformers.logging.disable_default_handler()
        transformers.logging.enable_propagation()
