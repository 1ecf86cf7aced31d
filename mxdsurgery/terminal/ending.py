"""How a command ends that did not do what it was asked to: a named error, a mistake in its flags, or Ctrl-C."""

import io
import os
import sys
import time
from typing import Any, NoReturn

import click
import cloup

from mxdsurgery.disclosure import masked, secrets_here
from mxdsurgery.errors import MxDError
from mxdsurgery.terminal.streams import say, show_all_letters
from mxdsurgery.terminal.voice import Command

_INTERRUPTED = 130  # what a shell expects of a process that Ctrl-C ended
_FIRST_SPEAKS = 5.0  # seconds that the other processes of a run wait before they say what they found


def flags_of(command: click.Command) -> set[str]:
    """The flags that a command has."""
    return {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}


class NamedErrors(cloup.Group):
    """Prints a user's mistake, also one in a flag, on stderr: exit code 2. For Ctrl-C, what was kept: exit code 130."""

    command_class = Command

    def main(self, *args: Any, **extra: Any) -> Any:
        """Runs a command, with standard output and error that can show every text."""
        show_all_letters()
        return super().main(*args, **extra)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """Reads the flags before a command's name."""
        try:
            return super().make_context(*args, **extra)
        except click.ClickException as error:
            _end_with(error)

    def invoke(self, ctx: click.Context) -> Any:
        """Reads a command's flags and runs it."""
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            _end_with(error)
        except MxDError as error:
            one_of_several = int(os.environ.get("RANK", 0))
            time.sleep(_FIRST_SPEAKS * bool(one_of_several))  # the launcher ends this one meanwhile if the first says the same
            said = f"{type(error).__name__}: {error.for_command(flags_of(self.commands.get(ctx.invoked_subcommand, self)))}"
            say(masked(said, secrets_here(None)), err=True)
            sys.exit(2)
        except KeyboardInterrupt as interrupt:
            say(f"\n{getattr(interrupt, 'said', '') or 'Interrupted. Nothing was written.'}", err=True)
            sys.exit(_INTERRUPTED)


def _end_with(error: click.ClickException) -> NoReturn:
    """Prints click's own error with the letters that stderr has: click would write UTF-8 to any."""
    text = io.StringIO()
    error.show(text)
    say(text.getvalue().rstrip("\n"), err=True)
    sys.exit(error.exit_code)
