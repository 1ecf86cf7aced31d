"""The texts of `heal`: to train on, to choose on and to report on; and what the original says about the first two."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mxdsurgery.base.blocks import Block
from mxdsurgery.base.decoder import vocabulary_size
from mxdsurgery.checkpoint.converted import Converted
from mxdsurgery.checkpoint.trained_on import TrainedOn, read_trained_on
from mxdsurgery.checkpoint.writing import check_room
from mxdsurgery.errors import DataError
from mxdsurgery.measuring.held_out import held_out, recipes_text
from mxdsurgery.recipe import Recipe
from mxdsurgery.runs.parallel import my_contexts
from mxdsurgery.terminal.console import Reporter, compact
from mxdsurgery.text.places import lasting, text_name
from mxdsurgery.text.sources import Packing, TextStream, check_validation, open_texts, set_aside
from mxdsurgery.training.inputs import Read
from mxdsurgery.training.teacher import Example, KeptPredictions, original_examples


class HealingTexts(NamedTuple):
    """Three texts, no context in two of them.

    Attributes:
        train: to train on; it begins where the conversion ended, if that read a part of the same text.
        validation: contexts (S, T) to choose the best weights on: neither the conversion nor an earlier healing trained on
            them, so far as that is recorded.
        heldout: contexts (S, T) to report on: nothing was trained or chosen on them.
        measured_on: the name of the held-out contexts' text, if it is not the recipe's.
        before: what is recorded of earlier trainings; None where an older version wrote the folder.
    """

    train: TextStream
    validation: Tensor
    heldout: Tensor
    measured_on: str | None
    before: TrainedOn | None


def healing_texts(converted: Converted, saved: Recipe, recipe: Recipe, data: str | None, reporter: Reporter) -> HealingTexts:
    """The texts to heal with: the recipe's, or ``data`` and the recipe's held-out one.

    Where the recipe's text cannot be read, the held-out contexts are the first of ``data`` that were not trained on: in the
    end there has to be something to measure on.

    Raises:
        DataError: a text cannot be read, is too short, is the held-out text, or all of it was trained on or is held out.
    """
    before, measured_on = read_trained_on(converted.folder), None
    if data is None or saved.data in (data, lasting(data)):
        with recipes_text(converted.folder):
            train, heldout, validation = open_texts(recipe, converted.tokenizer())
    elif saved.eval_data is not None and saved.eval_data in (data, lasting(data)):
        raise DataError(
            f"{data!r} is the held-out text of {str(converted.folder)!r}",
            expected="another text: the figures would say nothing of text that it does not know",
        )
    else:
        packing = Packing(converted.tokenizer(), recipe.context, recipe.prepend_bos)
        train = TextStream(data, packing, recipe.text_column, shuffle=recipe.shuffle, seed=recipe.seed)
        known = None if before is None else before.fingerprints
        try:
            heldout = held_out(converted, saved)
        except DataError as error:
            heldout = dataclasses.replace(train, without=known).first(recipe.eval_tokens)
            measured_on = data
            reporter.say(f"held-out   the first {compact(heldout.numel())} tokens of {text_name(data)}: {error.found}")
        validation, train = set_aside(train, heldout, known)
    check_validation(validation, train)
    if before is None:
        _say_unknown(validation, reporter)
    else:
        train = dataclasses.replace(train, begin=max(0, before.ends(train.spec) - train.skip))
    if train.begin:
        reporter.say(
            f"text       goes on after the {compact(train.begin * recipe.context)} tokens that were trained on before"
        )
    next(train.contexts())  # fails now, not after the original is loaded
    return HealingTexts(train, validation, heldout, measured_on, before)


def _say_unknown(validation: Tensor, reporter: Reporter) -> None:
    """Says what is not known of a folder that does not record what it was trained on."""
    reporter.say("text       an older version wrote the folder, without a record of what the conversion was trained on:")
    reporter.say(f"           the {compact(validation.numel())} tokens that the best weights are chosen on may be among it")


class Answered(NamedTuple):
    """The texts with the original's predictions.

    Attributes:
        examples: to train on, without end.
        validation: to choose on.
        heldout: gives those to report on; they are made anew, if the original is there.
        read: the training text, as far as it was taken.
    """

    examples: Iterator[Example]
    validation: list[Example]
    heldout: Callable[[], Iterable[Example]]
    read: Read


def with_answers(
    original: PreTrainedModel, blocks: Sequence[Block], texts: HealingTexts, size: int, taken: int, recipe: Recipe
) -> Answered:
    """The texts with the original's predictions, made when they are asked for.

    Args:
        original: the model that answers.
        blocks: those whose outputs are wanted, too.
        texts: to train and to choose on.
        size: contexts in a batch; where several processes share the text, each gets its part of them.
        taken: batches that an earlier process took of the training text.
        recipe: parallel.
    """
    read = Read(texts.train.batches(size))
    read.skip(taken)
    looked_at = list(original_examples(original, (), texts.validation.split(size)))
    mine = (my_contexts(batch, recipe) for batch in read)

    def heldout() -> Iterator[Example]:
        return original_examples(original, (), texts.heldout.split(size))

    return Answered(original_examples(original, blocks, mine), looked_at, heldout, read)


def with_kept_answers(
    original: PreTrainedModel,
    texts: HealingTexts,
    size: int,
    taken: int,
    wanted: int,
    top_n: int,
    scratch: Path,
    recipe: Recipe,
) -> Answered:
    """The texts with the original's likeliest predictions, made here and kept on disk: the original need not stay.

    Args:
        original: the model that answers.
        texts: to train and to choose on.
        size: as for `with_answers`.
        taken: as there.
        wanted: how many contexts are trained on, if the text has so many.
        top_n: predictions kept at each position.
        scratch: an existing folder.
        recipe: context, parallel, seed.
    """
    device, vocabulary = original.device, vocabulary_size(original)
    contexts = wanted + len(texts.validation) + len(texts.heldout)
    check_room(scratch, KeptPredictions.bytes(contexts, recipe.context, min(top_n, vocabulary)))

    def kept(name: str, contexts: Iterator[Tensor], count: int) -> KeptPredictions:
        (scratch / name).mkdir()
        made = KeptPredictions(scratch / name, count, recipe.context, top_n, vocabulary)
        while batch := list(itertools.islice(contexts, size)):
            made.add(original, torch.stack(batch))
        return made

    read = Read(itertools.islice(texts.train.once(), wanted))
    train = kept("train", read, wanted)
    validation, heldout = (
        kept(name, iter(rows), len(rows)) for name, rows in (("validation", texts.validation), ("heldout", texts.heldout))
    )
    examples = train.examples(size, device, recipe.seed, functools.partial(my_contexts, recipe=recipe))
    looked_at = list(validation.in_order(size, device))
    return Answered(itertools.islice(examples, taken, None), looked_at, lambda: heldout.in_order(size, device), read)
