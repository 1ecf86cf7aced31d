"""README.md of a folder: the section that is ours, and what people wrote around it, which stays.

Our card is between two comments. Only that section is ever rewritten, and of the front matter only the keys that we set.
Earlier versions wrote their card without the comments. It is known by its parts (`_PARTS`), whatever their words and figures
were: the section takes its place, and all from the first to the last of the parts is kept, folded, below a line that says what
it is, since somebody may have written between them. Any other text stays as it is, and the section follows it.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

CARD = "README.md"
_WORD = "<!-- mxdsurgery:"
_BEGIN = f"{_WORD} begin -->\n<!-- Rewritten by mxdsurgery. What is written above or below this section stays. -->\n"
_END = f"{_WORD} end -->\n"
_FRONT = re.compile(r"\A---\r?\n(.*?)^---[ \t]*\r?\n", re.DOTALL | re.MULTILINE)
# The keys of the front matter that are ours.
_OURS = ("library_name", "pipeline_tag", "base_model", "tags")
# What somebody's text is followed by, where it has no section.
_KEPT = "\n<!-- The text above was here before, and may speak of an earlier state of the model. -->\n"
# What the cards of all earlier versions are made of: how they begin, their figures, how they end.
_PARTS = re.compile(
    r"""(?:^\#\ [^\n]*\n\s*)?^Made\ from\ `[^\n]*\ by\ mxdsurgery\.[^\n]*\n
    | ^\#\#\ What\ it\ cost\s*\n
    | ^\|\ layer\ \|\ ΔCE\ [^\n]*\n (?:\|[^\n]*\n)*
    | ^\#\#\ How\ it\ was\ made\s*\n (?:(?!```)[^\n]*\n)* ```yaml\s*\n (?:(?!```)[^\n]*\n)* ```[^\n]*\n?""",
    re.MULTILINE | re.VERBOSE,
)
_EARLIER = """
<details>
<summary>From before, written by an earlier version of mxdsurgery: these are not the present figures.</summary>

{}

</details>
"""


def whole_card(front: Mapping[str, Any], body: str) -> str:
    """A new README.md: front matter, and the section with ``body``."""
    return f"---\n{_dumped(front)}---\n{_BEGIN}{body.replace(_WORD, '<!- mxdsurgery:')}{_END}"


def merged(there: str, new: str) -> str:
    """A README.md with the section, and the keys of the front matter, of a new one; all else in it stays as it is.

    Args:
        there: the text that is there.
        new: what `whole_card` made.
    """
    begin, end = _section(there)
    if not there.strip():
        return new
    if begin is not None and not _words(there):
        return _with_keys(new, _front(there))
    first, last = _section(new)
    body = new[_FRONT.match(new).end() if _FRONT.match(new) else 0 :]
    section = f"{_BEGIN}{body}{_END}" if first is None else new[first:last]  # of an earlier version's card
    if begin is not None:
        text = there[:begin] + section + there[end:]
    elif parts := list(_PARTS.finditer(there)):
        begin, end = parts[0].start(), parts[-1].end()
        text = there[:begin] + section + _EARLIER.format(there[begin:end].strip()) + there[end:]
    else:
        text = f"{there.rstrip()}\n{_KEPT}{section}"
    return _with_keys(text, _front(new), set(_OURS))


def keep_words(there: Path, staging: Path) -> None:
    """Before a folder takes another's place: puts what people wrote into that one's README.md into the new one's.

    Args:
        there: the folder that is there, if there is one.
        staging: the folder that will have its place.

    Raises:
        OSError: it cannot be read or written.
    """
    if (there / CARD).is_file() and (staging / CARD).is_file():
        write_card(staging / CARD, merged(read_card(there / CARD), read_card(staging / CARD)))


def read_card(path: Path) -> str:
    """A card's text, with its line ends, and whatever bytes it holds; OSError if it cannot be read."""
    return path.read_bytes().decode("utf-8", "surrogateescape")


def write_card(path: Path, text: str) -> None:
    """Writes what `read_card` read; OSError if it cannot."""
    path.write_bytes(text.encode("utf-8", "surrogateescape"))


def section_start(card: str) -> int:
    """Where the section begins; 0 where there is none."""
    return _section(card)[0] or 0


def _words(text: str) -> str:
    """What people wrote around the section."""
    front, (begin, end) = _FRONT.match(text), _section(text)
    return (text[front.end() if front else 0 : begin] + text[end:]).strip()


def _front(text: str) -> dict[str, Any]:
    """The front matter; empty where there is none, or none that can be read."""
    front = _FRONT.match(text)
    try:
        found = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:  # somebody's to mend: push says what is wrong
        found = None
    return found if isinstance(found, dict) else {}


def _section(text: str) -> tuple[int, int] | tuple[None, None]:
    """Where the section begins and ends; None, where a comment is missing."""
    end = text.find(_END.rstrip())
    begin = text.rfind(_BEGIN.split("\n")[0], 0, max(end, 0))
    if end < 0 or begin < 0:
        return None, None
    end += len(_END.rstrip())
    return begin, end + (text[end : end + 1] == "\n")


def _with_keys(text: str, given: Mapping[str, Any], always: Collection[str] = ()) -> str:
    """The text with keys in its front matter that it lacks, and those that are ``always`` to be as given, lists at least.

    All else in the front matter, comments too, stays as it is.
    """
    front, theirs = _FRONT.match(text), _front(text)
    if front is None:
        return f"---\n{_dumped(given)}---\n{text}" if given else text
    lines = front[1]
    for key, value in given.items() if theirs else ():
        had = theirs.get(key)
        if key in theirs and key not in always:
            continue
        if isinstance(value, list) and isinstance(had, list):
            value = [*had, *(one for one in value if one not in had)]
        if value != had:
            entry = re.compile(rf"^{re.escape(key)}[ \t]*:.*\n(?:[ \t-].*\n)*", re.MULTILINE)
            lines = entry.sub("", lines) + _dumped({key: value})
    return text[: front.start(1)] + lines + text[front.end(1) :]


def _dumped(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
