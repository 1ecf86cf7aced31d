"""The texts of `heal`: to train on, to validate on and to measure on."""

import dataclasses

from torch import Tensor

from mxdsurgery.checkpoint.converted import Converted
from mxdsurgery.errors import DataError
from mxdsurgery.measuring.evaluate import held_out, recipes_text
from mxdsurgery.recipe import Recipe
from mxdsurgery.terminal.console import Reporter, compact
from mxdsurgery.text.places import lasting, text_name
from mxdsurgery.text.sources import Packing, TextStream, open_texts
from mxdsurgery.training.end_to_end import VALIDATION_TOKENS


def healing_texts(
    converted: Converted, saved: Recipe, recipe: Recipe, data: str | None, reporter: Reporter
) -> tuple[TextStream, Tensor, Tensor, str | None]:
    """The training text; contexts (S, T) at its beginning for validation; held-out ones; and their text, if not the recipe's.

    What is trained on is neither of the two. Where the recipe's text cannot be read, the held-out contexts are the first of
    ``data``, too: in the end there has to be something to measure on.

    Raises:
        DataError: a text cannot be read, is too short, or is the held-out text.
    """
    tokenizer = converted.tokenizer()
    heldout, measured_on = saved.eval_data, None
    if data is None or saved.data in (data, lasting(data)):
        with recipes_text(converted.folder):
            train, measured = open_texts(recipe, tokenizer)
    elif heldout is not None and heldout in (data, lasting(data)):
        raise DataError(
            f"{data!r} is the held-out text of {str(converted.folder)!r}",
            expected="another text: the figures would say nothing of text that it does not know",
        )
    else:
        packing = Packing(tokenizer, recipe.context, recipe.prepend_bos)
        train = TextStream(data, packing, recipe.text_column, shuffle=recipe.shuffle)
        try:
            measured = held_out(converted, saved)
        except DataError as error:
            measured, train = train.split(recipe.eval_tokens)
            measured_on = data
            reporter.say(f"held-out   the first {compact(measured.numel())} tokens of {text_name(data)}: {error.found}")
    validation, train = dataclasses.replace(train, seed=recipe.seed).split(VALIDATION_TOKENS, leave=True)
    next(train.contexts())  # fails now, not after the original is loaded
    return train, validation, measured, measured_on
