"""The text that figures rest on: held out, and what is known of it if it is not."""

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from mxdsurgery.checkpoint.converted import Converted
from mxdsurgery.checkpoint.trained_on import read_trained_on
from mxdsurgery.errors import DataError, MxDWarning
from mxdsurgery.recipe import Recipe
from mxdsurgery.text.places import text_name
from mxdsurgery.text.sources import Packing, TextStream


def held_out(
    converted: Converted,
    saved: Recipe,
    data: str | None = None,
    tokens: int | None = None,
    text_column: str | None = None,
    *,
    any_text: bool = False,
) -> Tensor:
    """Contexts to measure a converted model on, (S, T): from the text ``data``, or else from the recipe's held-out text.

    Contexts of ``data`` that the model was trained on, as its folder records it, are left out, and an `MxDWarning` says how
    many; not so with ``any_text``. A text ``data`` that is shorter than one context is one of its own length. ``text_column``:
    by default the recipe's.

    Raises:
        DataError: the text cannot be read, more tokens are asked for than were held out, or all of it was trained on.
    """
    given = {"eval_tokens": tokens or saved.eval_tokens, "text_column": text_column or saved.text_column}
    recipe = dataclasses.replace(saved, **given)
    tokenizer = converted.tokenizer()
    packing = Packing(tokenizer, recipe.context, recipe.prepend_bos)
    if data is not None:
        text = TextStream(data, packing, recipe.text_column)
        record = None if any_text else read_trained_on(converted.folder)
        if record is None:
            return text.spread(recipe.eval_tokens, short=True, asked=tokens is not None)
        fresh = dataclasses.replace(text, without=record.fingerprints)
        contexts = fresh.spread(recipe.eval_tokens, short=True, asked=tokens is not None)
        if fresh.left_out:
            warnings.warn(
                f"{fresh.left_out:,} contexts of {text_name(data)!r} were trained on: they are left out",
                MxDWarning,
                stacklevel=2,
            )
        return contexts
    _check_held_out(saved, tokens)
    with recipes_text(converted.folder):
        if recipe.eval_data is not None:  # the training text need not be on this machine
            stream = TextStream(recipe.eval_data, packing, recipe.text_column)
            return stream.spread(recipe.eval_tokens, asked=tokens is not None)
        return TextStream(recipe.data, packing, recipe.text_column).first(recipe.eval_tokens)


def trained_share(converted: Converted, contexts: Tensor) -> dict[str, int | None]:
    """How many of the contexts that figures rest on were trained on, for `tokens_in_words`; None if that is not recorded."""
    record = read_trained_on(converted.folder)
    return {"trained_on": None} if record is None else record.share_of(contexts)


@contextmanager
def recipes_text(folder: Path, given: str | None = None) -> Iterator[None]:
    """While open, what is wrong with a text is said to be so of the recipe's text, unless a text was ``given``.

    Raises:
        DataError: in place of another, with the way out: another text.
    """
    try:
        yield
    except DataError as error:
        if given is not None:
            raise
        ways = [] if error.fix is None else [error.fix]
        ways += [] if "--data" in (error.fix or "") else ["give another text with --data"]
        raise DataError(
            f"{error.found}; that is the text which the recipe in {str(folder)!r} names",
            expected=error.expected,
            fix=", or ".join(ways),
        ) from None


def _check_held_out(saved: Recipe, tokens: int | None) -> None:
    """Raises DataError if more tokens are asked for than the conversion held out of its training text."""
    if saved.eval_data is None and tokens is not None and tokens > saved.eval_tokens:
        raise DataError(
            f"{tokens:,} tokens were asked for, but only the first {saved.eval_tokens:,} of {saved.data!r} were held out",
            expected="text that was not trained on",
            fix=f"ask for fewer: --tokens {saved.eval_tokens}, or give another text with --data",
        )
