"""Text: the documents of a text, and the streams of packed contexts that they become.

A text is named by a SPEC: a file, a folder or a pattern of files on this machine (`places` finds them, `forms` reads what they
hold, and `fields` finds the text in a row); ``stdlib`` or ``stdlib:heldout``, the source of the running Python's standard
library; or a data set on the hub as ``user/name[:config[:split]]``, which is streamed, never downloaded whole.
"""

import dataclasses
import itertools
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mxdsurgery.demo import stdlib_documents
from mxdsurgery.errors import DataError, NoFreshTextError, first_line
from mxdsurgery.hardware.device import copies_from_pinned_memory
from mxdsurgery.once import warn_once
from mxdsurgery.recipe import Recipe
from mxdsurgery.text.ahead import run_ahead
from mxdsurgery.text.fields import MOST_NAMES, text_in
from mxdsurgery.text.fingerprints import Apart, Fingerprints
from mxdsurgery.text.forms import Entry, entries
from mxdsurgery.text.packing import Packing
from mxdsurgery.text.places import FORMS, on_hub, text_files

Item = TypeVar("Item")

# Tokens of the training text that are set aside to choose on, and the largest share of the text that they may be.
VALIDATION_TOKENS, _VALIDATION_SHARE = 8192, 8
# Held-out contexts, and those to choose on, are spread over so many times their own amount of text.
_SPREAD = 32
# Of so many files of a data set on the hub at most, a sample is drawn: each is a connection.
_SHARDS = 64
# No figure counts what is at position 0, and what comes after the last token is not known.
_LEAST_TOKENS = 3


def token_strings(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    r"""Each token as it stands in a text, with the space before it if it has one.

    A token that is no text by itself but some bytes of a character is given as ``\xe2\x80``; a token that the tokenizer does
    not know, as its id between angle brackets.
    """
    # Decoded after another token: of a token alone, many tokenizers drop the space before it.
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before = tokenizer.decode(anchor, **options)
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    strings = []
    for token in ids:
        text = tokenizer.decode([*anchor, token], **options)
        text = text[len(before) :] if text.startswith(before) else tokenizer.decode([token], **options)
        if "�" in text:
            piece = str(tokenizer.convert_ids_to_tokens(token))
            bytes_ = [byte_of.get(character) for character in piece]
            text = piece if None in bytes_ else "".join(f"\\x{byte:02x}" if byte > 126 else chr(byte) for byte in bytes_)
        strings.append(text or f"<{token}>")
    return strings


def documents(spec: str, text_column: str = "text", tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[str]:
    """Yields the documents of a text, in their order; empty ones are left out, and what is no character is replaced by U+FFFD.

    Rows that hold no text (null) are left out, too, and an `MxDWarning` says how many.

    Args:
        spec: see the module.
        text_column: column or field that holds the text, where there are several; one inside others by a dotted name.
        tokenizer: has the template by which chats are written out; None: chats are refused.

    Raises:
        DataError: no such file or data set, no such column, or a line that cannot be read. Raised at the first document,
            not at the call.
    """
    return (document for document, _ in documents_with_fields(spec, text_column, tokenizer=tokenizer))


def documents_with_fields(
    spec: str, text_column: str = "text", fields: Sequence[str] = (), tokenizer: PreTrainedTokenizerBase | None = None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """As `documents`, each with its row; in it are those of ``fields`` that the file has."""
    read = empty = 0
    try:
        for entry in rows(spec, text_column, fields):
            read += 1
            document = entry.document
            if document is None:
                document = text_in(entry.row, text_column, entry.where, tokenizer)
            if document is None:
                empty += 1
            elif document:
                yield _encodable(document), entry.row
    finally:
        say_empty(empty, read, spec, text_column)


def say_empty(empty: int, read: int, spec: str, column: str) -> None:
    """Warns of rows that were left out, once for each text and column: a text is read several times."""
    if empty:
        of = f"{empty:,} of {read:,} rows that were read of {spec!r}"
        warn_once(("empty", spec, column), f"{of} hold nothing (null) in the column {column!r}: they are left out")


def rows(spec: str, text_column: str, fields: Sequence[str] = (), most: int | None = None) -> Iterator[Entry]:
    """The rows of a text, or the documents of one without columns.

    Of a data set on the hub with more than ``most`` rows, so many: the beginnings of files that are spread over it, and an
    `MxDWarning` says so.

    Raises:
        DataError: as `documents`.
    """
    if spec in ("stdlib", "stdlib:train", "stdlib:heldout"):
        for document in stdlib_documents(spec.partition(":")[2] or "train"):
            yield Entry(spec, {}, document)
    elif spec.startswith("stdlib:"):
        raise DataError(f"no text {spec!r}", expected="stdlib, stdlib:train or stdlib:heldout")
    elif on_hub(spec):
        for row in _hub_rows(spec, most):
            yield Entry(f"the data set {spec!r}", row)
    else:
        for path in text_files(spec):
            yield from entries(path, (text_column, *fields))


def _encodable(document: str) -> str:
    """A document with its lone surrogates replaced: JSON can hold them, and no tokenizer takes them."""
    try:
        document.encode()
        return document
    except UnicodeEncodeError:
        return document.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _open_stream(spec: str) -> Iterable[dict]:
    """The rows of a data set on the hub, streamed."""
    from datasets import load_dataset

    name, _, rest = spec.partition(":")
    config, _, split = rest.partition(":")
    options = {"split": split or "train", "streaming": True}
    try:
        return load_dataset(name, config or None, **options)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        # Data sets that come with a loading script: the hub keeps a converted copy of the same rows.
        return load_dataset(name, config or None, revision="refs/convert/parquet", **options)


def _hub_rows(spec: str, most: int | None) -> Iterator[dict[str, Any]]:
    try:
        stream = _open_stream(spec)
        yield from stream if most is None else _spread_rows(stream, spec, most)
    except Exception as error:  # each of the library's layers raises its own kinds, also in the middle of the stream
        raise _hub_error(spec, error) from None


def _spread_rows(stream: Any, spec: str, most: int) -> Iterator[dict[str, Any]]:
    """At most so many rows of a stream, evenly from the beginnings of at most ``_SHARDS`` of its files, spread over all."""
    count = getattr(stream, "num_shards", 1)
    shards = min(count, _SHARDS)
    cut = shards < count
    for index in range(shards):
        shard = iter(stream if count == 1 else stream.shard(num_shards=count, index=index * count // shards))
        yield from itertools.islice(shard, most // shards)
        cut = next(shard, None) is not None or cut
    if cut:
        of = f"the beginnings of {shards} of its {count} files" if count > 1 else "its beginning"
        warn_once(("long", spec, most), f"{spec!r} is long: at most {most:,} rows of it were read, {of}")


def _hub_error(spec: str, error: Exception) -> DataError:
    """The named error for what `datasets` raised while a data set on the hub was read."""
    words, (name, *rest) = str(error), spec.split(":")
    expected, fix = FORMS, "check the spelling (there is no file or folder of that name here) and the connection"
    found = first_line(error)
    named = re.search(r"(?:[Aa]vailable(?: configs)?|Should be one of|Available splits):? (\[[^]]*\])", words)
    if "gated" in words:
        found, expected = "it is gated", "a token of an account that was granted access"
        fix = f"ask for access at https://huggingface.co/datasets/{name}, then run 'hf auth login' or set HF_TOKEN"
    elif "doesn't exist on the Hub" in words:
        found, fix = "the hub knows no such data set (or it is private)", fix + "; for a private one, set HF_TOKEN"
    elif "refs/convert/parquet" in words:
        found, fix = "it comes as a script, which is not run, and the hub holds no copy of its rows", "save its rows to files"
    elif named and "split" in words:
        found, expected = "it has no such split", f"one of its splits: {shorten(named[1], MOST_NAMES)}"
        fix = f"name one: {name}:{(rest or ['CONFIG'])[0]}:SPLIT"
    elif named:
        found, expected = "it has several configurations", f"one of them: {shorten(named[1], MOST_NAMES)}"
        fix = f"name one: {name}:CONFIG"
    return DataError(
        f"the data set {spec!r} cannot be read: {found}",
        expected=expected,
        fix=f"{fix}, or give a text that is on this machine with --data",
    )


@dataclass
class TextStream:
    """A text as packed contexts, over and over.

    Attributes:
        spec: see the module.
        packing: how its documents become contexts.
        text_column: see `documents`.
        skip: contexts at the start that are left out in every pass (they are held out).
        without: contexts that are left out wherever they occur, or that are to stay unknown to who is trained on the text.
        begin: contexts after these that `batches` leaves out in the first pass only: it goes on where another training ended.
        shuffle: tokens in the buffer that `batches` draws contexts from at random; 0 keeps the text's order.
        seed: of the shuffling.
        passes: how many times the text was begun for the batches taken so far.
        left_out: contexts that were left out so far, because they are among those ``without``.
    """

    spec: str
    packing: Packing
    text_column: str = "text"
    skip: int = 0
    without: Fingerprints | Apart | None = None
    begin: int = 0
    shuffle: int = 0
    seed: int = 0
    passes: int = field(default=0, init=False)
    left_out: int = field(default=0, init=False)

    def contexts(self, short: bool = False) -> Iterator[Tensor]:
        """One pass over the text: yields int64 (T,).

        Args:
            short: a text of less than one context is one, too, of its own length.

        Raises:
            DataError: the text does not fill one context; with ``short``, not three tokens.
        """
        whole = filled = False
        left_out = None if self.without is None else self.without.leaving_out()
        packed = self.packing.pack(documents(self.spec, self.text_column, self.packing.tokenizer), short)
        for context in itertools.islice(packed, self.skip, None):
            check_length(context, self.spec)
            whole = True
            if left_out is not None and left_out(context):
                self.left_out += 1
                continue
            filled = True
            yield context
        if whole and not filled:
            raise NoFreshTextError(
                f"every context of the text {self.spec!r} was trained on before, or is held out",
                expected="text that is neither",
                fix="give another text",
            )
        if not filled and short:
            raise DataError(f"the text {self.spec!r} holds no text", expected="more text", fix="give a longer text")
        if not filled:
            beyond = f" beyond the {self.skip} that are held out" if self.skip else ""
            raise DataError(
                f"the text {self.spec!r} does not fill one context of {self.packing.context} tokens{beyond}",
                expected="more text",
                fix="give a longer text, or a smaller --context" + (", or fewer --eval-tokens" if self.skip else ""),
                keys=("context", "eval_tokens") if self.skip else ("context",),
            )

    def batches(self, size: int) -> Iterator[Tensor]:
        """Batches of shuffled contexts without end, pass after pass: yields int64 (B, T), B = size.

        Reading, tokenising and packing run ahead in their own thread; batches are in pinned memory if a device copies from it
        faster.
        """
        for number, batch in run_ahead(self._batches(size)):
            self.passes = number
            yield batch

    def _batches(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """Each batch with the number of the pass that its last context came from."""
        passes = ((number, context) for number in itertools.count(1) for context in self._shuffled(number))
        while True:
            numbers, contexts = zip(*itertools.islice(passes, size), strict=True)
            batch = torch.stack(contexts)
            yield numbers[-1], batch.pin_memory() if copies_from_pinned_memory() else batch

    def _shuffled(self, number: int) -> Iterator[Tensor]:
        """One pass in random order: each context is drawn from a full buffer, the next of the text takes its place."""
        room = self.room()
        buffer: list[Tensor] = []
        contexts = itertools.islice(self.contexts(), self.begin if number == 1 else 0, None)
        if room < 2:
            yield from contexts
            return
        generator = random.Random(self.seed + number)
        for context in contexts:
            if len(buffer) < room:
                buffer.append(context)
            else:
                position = generator.randrange(room)
                buffer[position], context = context, buffer[position]
                yield context
        generator.shuffle(buffer)
        yield from buffer

    def first(self, tokens: int) -> Tensor:
        """The first contexts, about ``tokens`` tokens of them and at least one: int64 (B, T)."""
        wanted = max(1, tokens // self.packing.context)
        return torch.stack(list(itertools.islice(self.contexts(), wanted)))

    def once(self) -> Iterator[Tensor]:
        """Each context once, in the text's order, those after ``begin`` first: yields int64 (T,)."""
        yield from itertools.islice(self.contexts(), self.begin, None)
        yield from itertools.islice(self.contexts(), self.begin)

    def room(self) -> int:
        """How many contexts `batches` may have read beyond those that it gave."""
        return self.shuffle // self.packing.context

    def for_validation(self, tokens: int) -> Tensor:
        """As `spread`, but at most an eighth of the text; none of a text of one context."""
        wanted = max(1, tokens // self.packing.context)
        rows = list(itertools.islice(self.contexts(), wanted * _SPREAD))
        least = min(1, len(rows) - 1)
        taken = min(wanted, max(least, len(rows) // _VALIDATION_SHARE))
        return _evenly(rows, taken)

    def spread(self, tokens: int, short: bool = False, asked: bool = False) -> Tensor:
        """As `first`, but evenly spread over the first ``_SPREAD`` times as much text: several documents, not one.

        Args:
            tokens: how many, in whole contexts; all that the text holds, if it holds fewer.
            short: a text of less than one context is one of its own length: (1, T).
            asked: whether somebody asked for so many: an `MxDWarning` then says how many there are, if they are fewer.
        """
        wanted = max(1, tokens // self.packing.context)
        rows = list(itertools.islice(self.contexts(short), wanted * _SPREAD))
        if asked and len(rows) < wanted:
            held = f"{sum(len(row) for row in rows):,} in contexts of {len(rows[0])}"
            words = f"{tokens:,} tokens of {self.spec!r} were asked for, and it holds {held}: figures rest on these"
            warn_once(("fewer", self.spec, tokens), words)
        return _evenly(rows, min(wanted, len(rows)))


def _evenly(rows: list[Tensor], count: int) -> Tensor:
    """So many of the contexts (T,), evenly spread over them: (count, T)."""
    return torch.stack(rows)[torch.arange(count) * len(rows) // max(1, count)]


def check_validation(validation: Tensor, train: TextStream) -> None:
    """Raises DataError where there is nothing to choose the best weights on: validation (0, T)."""
    if not len(validation):
        raise DataError(
            f"the text {train.spec!r} is too short: beyond what is held out, it is one context",
            expected="one to train on, and one to choose the best weights on",
            fix="give a longer text, or a smaller --context",
            keys=("context",),
        )


def check_length(context: Tensor, spec: str) -> None:
    """Raises DataError for a context (T,) that is too short for any figure."""
    if len(context) < _LEAST_TOKENS:
        raise DataError(
            f"the text {spec!r} is too short: tokens: {len(context)}, the beginning-of-text token included where there is one",
            expected=f"at least {_LEAST_TOKENS}: figures rest on what is predicted from the second token on",
            fix="give a longer text",
        )


class Texts(NamedTuple):
    """The texts of a recipe; no context is in two of them.

    Attributes:
        train: to train on.
        heldout: contexts (S, T) that figures are reported on; nothing is trained or chosen on them.
        validation: contexts (S, T) to choose on, the best weights for example; none where the text is but one context.
    """

    train: TextStream
    heldout: Tensor
    validation: Tensor


def open_texts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Texts:
    """The texts of a recipe. Held-out contexts are those of ``eval_data``, or else the first ones of ``data``.

    A context that occurs in the training text, too, is left out there: `Fingerprints` says what is the same.

    Raises:
        DataError: one cannot be read, or is too short.
    """
    packing = Packing(tokenizer, recipe.context, recipe.prepend_bos)
    train = TextStream(recipe.data, packing, recipe.text_column, shuffle=recipe.shuffle, seed=recipe.seed)
    if recipe.eval_data is not None:
        asked = recipe.eval_tokens != Recipe.eval_tokens
        heldout = TextStream(recipe.eval_data, packing, recipe.text_column).spread(recipe.eval_tokens, asked=asked)
    else:
        heldout = train.first(recipe.eval_tokens)
        train = dataclasses.replace(train, skip=len(heldout))
    try:
        validation, apart = set_aside(train, heldout)
        next(apart.contexts())  # fails now, not after the model is loaded
    except NoFreshTextError:
        words = "also occurs in its held-out part: it is trained on all the same, and figures say so"
        warn_once(("same", recipe.data), f"all of the text {recipe.data!r} {words}")
        next(train.contexts())
        return Texts(train, heldout, heldout[:0])
    return Texts(apart, heldout, validation)


def set_aside(train: TextStream, heldout: Tensor, trained_on: Fingerprints | None = None) -> tuple[Tensor, TextStream]:
    """Contexts to choose on, (S, T), the first that were not trained on before; and the text without these and held-out ones.

    Raises:
        DataError: the text cannot be read, or there is nothing left of it.
    """
    context = train.packing.context
    aside = Fingerprints.of(heldout, context)
    fresh = dataclasses.replace(train, without=aside if trained_on is None else aside | trained_on)
    validation = fresh.for_validation(VALIDATION_TOKENS)
    return validation, dataclasses.replace(train, without=Apart([heldout, validation], context, trained_on))
