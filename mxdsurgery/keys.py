"""What a recipe key may hold: counts, numbers, texts and flags, within a range or among choices."""

import numbers
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mxdsurgery.disclosure import secret_in
from mxdsurgery.errors import MxDError, RecipeError
from mxdsurgery.outside import shown
from mxdsurgery.paths import given_path

_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_COUNT = re.compile(r"(\d{1,18}(?:\.\d{1,18})?(?:e[+-]?\d{1,2})?)\s*([kmb]?)", re.IGNORECASE)
# Counts and measures have to be smaller than this.
_MOST_NUMBER = 10**18
# Truth as text, as it comes from the environment, from JSON or in quotes.
_FLAG_WORDS = dict.fromkeys(("true", "yes", "on"), True) | dict.fromkeys(("false", "no", "off"), False)
# Texts are not longer than this, and hold no control characters or lone surrogates.
_MOST_CHARACTERS = 10_000
_NO_TEXT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


def parse_count(value: object) -> int | None:
    """A whole number, also written ``100k``, ``2M``, ``1.5B`` or ``1e6``; None where the value is no such thing."""
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float, str)) or _too_large(value):
        return None
    match = _COUNT.fullmatch(str(value).strip().replace("_", ""))
    if match is None:
        return None
    number = Fraction(match[1]) * _SUFFIXES[match[2].lower()]  # with floats, 4.1M would not be whole
    return int(number) if number.denominator == 1 and number < _MOST_NUMBER else None


def _plain(value: object) -> object:
    """A number of numpy's, as notebooks have them, as one of Python's."""
    return value.item() if isinstance(value, numbers.Real) and hasattr(value, "item") else value


def _too_large(value: object) -> bool:
    return isinstance(value, int) and abs(value) >= _MOST_NUMBER


def _parse_number(value: object) -> float | None:
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)  # also of text: YAML reads 1e-3 as a string
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
    if isinstance(value, str):
        return _FLAG_WORDS.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def parse_layers(value: object) -> str | None:
    """A selection of layers as text, also from a number or a list of them; None where the value is no such thing."""
    if isinstance(value, list | tuple | range):
        parts = [_parse_text(part) for part in value]
        value = None if None in parts else ",".join(parts)
    return _parse_text(value)


_PARSERS = {
    "count": parse_count,
    "number": _parse_number,
    "text": _parse_text,
    "flag": _parse_flag,
    "layers": parse_layers,
}


@dataclass(frozen=True)
class Key:
    """What a recipe key may hold: a count, number, text, flag or layers, within a range or among choices."""

    kind: str
    doc: str
    low: float | None = None
    above: float | None = None
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
            "layers": "layers: all, one (3, or -1 for the last), a range (2-5), or several of these, also as a list",
        }[self.kind]
        if self.above is not None:
            words += f" above {self.above:g}" + ("" if self.high is None else f" and at most {self.high:g}")
        elif self.low is not None and self.high is not None:
            words += f" from {self._limit(self.low)} to {self._limit(self.high)}"
        elif self.low is not None:
            words += f" of at least {self._limit(self.low)}"
        return words + (", or nothing (null)" if self.optional else "")

    def _limit(self, limit: float) -> str:
        """A limit as it is, not rounded to one that is refused."""
        return f"{limit:.0f}" if self.kind == "count" else f"{limit:g}"

    def _why(self, value: object) -> str:
        """Why a value is refused, where what is allowed does not say so."""
        number = isinstance(value, int | str) and self.kind in ("count", "number")
        digits = number and re.fullmatch(r"'?[+-]?([0-9_]+)'?", shown(value, 100))
        return ", which is too large" if digits and int(digits[1].strip("_") or 0) >= _MOST_NUMBER else ""

    def _hint(self, value: object) -> str | None:
        """What else to say where YAML may have read something else than was written."""
        if self.kind == "text" and isinstance(value, bool | float):
            return "in a file, put it in quotes: YAML reads yes, no, on, off and numbers as what they look like"
        return None

    def parse(self, name: str, value: object, what: str | None = None, error: type[MxDError] = RecipeError) -> Any:
        """The value in its own type.

        Args:
            name: of the key.
            value: as it was given.
            what: the value, for people; default: the recipe key.
            error: what is raised.

        Raises:
            RecipeError, or the error asked for: naming the key, the value and what is allowed.
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
        if good and self.above is not None:
            good = parsed > self.above
        if good and self.high is not None:
            good = parsed <= self.high
        if not good:
            found = f"{what or f'recipe key {name!r}'} " + ("has no value" if value is None else f"is {shown(value)}")
            raise error(found + self._why(value), expected=self.allowed(), fix=self._hint(value))
        secret = secret_in(parsed) if isinstance(parsed, str) else None
        if secret is not None:  # the error does not quote it
            raise RecipeError(
                f"recipe key {name!r} holds {secret}",
                expected="no secret: recipes are saved with the model, and shown on its card",
                fix="give the hub's token with 'hf auth login' or HF_TOKEN",
            )
        return parsed
