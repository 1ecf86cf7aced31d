"""Prints what a command returns: JSON for programs, tables and lines for people."""

import json
import sys
from typing import Any

from rich.console import Console

from mxdsurgery.terminal.streams import can_show, say, written


def print_json(value: Any) -> None:
    """A result as JSON, in letters that standard output has."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    say(text if can_show(text) else json.dumps(value, indent=2))


def print_table(*parts: Any) -> None:
    """Tables, and texts between them."""
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, emoji=False, width=180)
    with written(sys.stdout):
        for part in parts:
            console.print(part, markup=not isinstance(part, str))  # a folder's name may look like markup
