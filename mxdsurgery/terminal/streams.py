"""Standard output and error as they are: with an encoding that lacks letters, a reader that has left, a disk that is full."""

import codecs
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import click

from mxdsurgery.errors import OutputError

# What stands for the letters that our own tables and sentences use, each as wide as the letter, so that columns stay columns.
_PLAIN = {"Δ": "d", "‖": "|", "×": "x", "±": "~", "…": ".", "\N{REPLACEMENT CHARACTER}": "?"}


def _plain(error: UnicodeError) -> tuple[str, int]:
    """An error handler of codecs: `_PLAIN`, or else the letter's number, as ``\\u0394``."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(_PLAIN.get(letter) or ascii(letter)[1:-1] for letter in letters), error.end


codecs.register_error("mxdsurgery.plain", _plain)


def show_all_letters() -> None:
    """Lets standard output and error show every text, letters that their encoding lacks in another form."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="mxdsurgery.plain")


def can_show(text: str) -> bool:
    """Whether standard output's encoding has all letters of a text."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
        return True
    except UnicodeEncodeError:
        return False


def say(text: Any, err: bool = False) -> None:
    """Prints a line to standard output, or to standard error."""
    with written(sys.stderr if err else sys.stdout) as stream:
        click.echo(text, file=stream)  # named: click would write UTF-8 to a stream whose encoding is ASCII


@contextmanager
def written(stream: TextIO) -> Iterator[TextIO]:
    """While open, a stream is written to; at the end, all of it has left this process.

    Raises:
        OutputError: it cannot be written.
        BrokenPipeError: nobody reads it any more.
    """
    try:
        yield stream
        stream.flush()
    except OSError as error:
        hush(stream)
        if error.errno == errno.EPIPE:
            raise
        raise OutputError(f"the result cannot be printed: {error.strerror}", fix="send it elsewhere") from None


def hush(stream: TextIO) -> None:
    """Lets a stream lead nowhere: what it still holds would fail again when the process ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
