"""What a recipe key may hold: counts, numbers, texts and flags, within a range or among choices."""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mxdsurgery.disclosure import secret_in
from mxdsurgery.errors import RecipeError
from mxdsurgery.outside import shown
from mxdsurgery.paths import given_path

_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_COUNT = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*([kmb]?)", re.IGNORECASE)
# Counts and measures have to be smaller than this.
_MOST_NUMBER = 10**18
# Texts are not longer than this, and hold no control characters or lone surrogates.
_MOST_CHARACTERS = 10_000
_NO_TEXT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


def parse_count(value: object) -> int | None:
    """A whole number, also written ``100k``, ``2M`` or ``1.5B``; None where the value is no such thing."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)) or _too_large(value):
        return None
    match = _COUNT.fullmatch(str(value).strip().replace("_", ""))
    if match is None:
        return None
    number = Fraction(match[1]) * _SUFFIXES[match[2].lower()]  # with floats, 4.1M would not be whole
    return int(number) if number.denominator == 1 and number < _MOST_NUMBER else None


def _too_large(value: object) -> bool:
    return isinstance(value, int) and abs(value) >= _MOST_NUMBER


def _parse_number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)  # YAML reads 1e-3 as a string
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < _MOST_NUMBER else None


def _parse_text(value: object) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool) and not _too_large(value):
        return str(value)  # layers: 3
    if not isinstance(value, str) or not 0 < len(value) <= _MOST_CHARACTERS or _NO_TEXT.search(value):
        return None
    return value


def _parse_flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


_PARSERS = {"count": parse_count, "number": _parse_number, "text": _parse_text, "flag": _parse_flag}


@dataclass(frozen=True)
class Key:
    """What a recipe key may hold: a count, number, text or flag, within a range or among choices."""

    kind: str
    doc: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    optional: bool = False

    def allowed(self) -> str:
        """The allowed values, in words."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        words = {
            "count": "a whole number (k, M and B suffixes allowed)",
            "number": "a number",
            "text": "text",
            "flag": "true or false",
        }[self.kind]
        if self.low is not None and self.high is not None:
            words += f" from {self.low:g} to {self.high:g}"
        elif self.low is not None:
            words += f" of at least {self.low:g}"
        return words + (", or nothing (null)" if self.optional else "")

    def parse(self, name: str, value: object) -> Any:
        """The value in its own type.

        Raises:
            RecipeError: naming the key, the value and what is allowed.
            PathError: see `given_path`.
        """
        if value is None and self.optional:
            return None
        parsed = given_path(name, _PARSERS[self.kind](value))
        good = parsed is not None
        if good and self.choices:
            good = parsed in self.choices
        if good and self.low is not None:
            good = parsed >= self.low
        if good and self.high is not None:
            good = parsed <= self.high
        if not good:
            raise RecipeError(f"recipe key {name!r} is {shown(value)}", expected=self.allowed())
        secret = secret_in(parsed) if isinstance(parsed, str) else None
        if secret is not None:  # the error does not quote it
            raise RecipeError(
                f"recipe key {name!r} holds {secret}",
                expected="no secret: recipes are saved with the model, and shown on its card",
                fix="give the hub's token with 'hf auth login' or HF_TOKEN",
            )
        return parsed
