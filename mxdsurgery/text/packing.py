"""How documents become packed contexts of token ids, whatever their length."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mxdsurgery.errors import DataError

# Documents are tokenised so many at a time, and in pieces of at most so many characters.
_DOCUMENTS, _PIECE = 16, 2**20


def in_batches(contexts: Tensor, tokens: int) -> tuple[Tensor, ...]:
    """Splits contexts (S, T) into batches (B, T) of at most ``tokens`` tokens, but of one context at least."""
    return contexts.split(max(1, tokens // contexts.shape[1]))


@dataclass(frozen=True)
class Packing:
    """How documents become contexts.

    Documents follow each other with an end-of-text token between them; what is left at the end, less than one context, is
    dropped, so there is no padding.

    Attributes:
        tokenizer: the model's.
        context: T, tokens per context.
        prepend_bos: begin every context with the beginning-of-text token; None: if the tokenizer does so by itself.
    """

    tokenizer: PreTrainedTokenizerBase
    context: int
    prepend_bos: bool | None = None

    def first_tokens(self) -> list[int]:
        """What every context begins with: the BOS token, or nothing.

        Raises:
            DataError: ``prepend_bos`` is asked for and there is no such token.
        """
        bos = self.tokenizer.bos_token_id
        if bos is None and self.prepend_bos:
            raise DataError("recipe key 'prepend_bos' is true, but the tokenizer has no BOS token", fix="leave it out")
        if bos is None or self.prepend_bos is False:
            return []
        return [bos] if self.prepend_bos or self.tokenizer("a")["input_ids"][:1] == [bos] else []

    def pack(self, texts: Iterator[str], short: bool = False) -> Iterator[Tensor]:
        """Tokenises documents and packs them: yields int64 (T,). With ``short``, see `pack_labelled`."""
        return (context for context, _ in self.pack_labelled(((text, 0) for text in texts), short))

    def pack_labelled(self, texts: Iterator[tuple[str, int]], short: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """As `pack`, of documents with a number each: yields ids and the number of each token's document, int64 (T,) both.

        The beginning-of-text token has the number -1, an end-of-text token that of the document that it ends. With ``short``,
        texts that do not fill one context are one of their own length, without the last end-of-text token.

        A document of more than a million characters is tokenised in pieces, cut between words, so that memory and time per
        character do not grow with it. With tokenizers that split text at spaces, and nearly all do, the tokens are the same.
        """
        first = self.first_tokens()
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        room = self.context - len(first)
        pending: list[int] = []
        numbers: list[int] = []
        pieces = ((piece, last, number) for text, number in texts for piece, last in self._pieces(text))
        while batch := _batch(pieces):
            found = self.tokenizer([piece for piece, _, _ in batch], add_special_tokens=False, return_attention_mask=False)
            for ids, (_, last, number) in zip(found["input_ids"], batch, strict=True):
                ids = ids + end if last else ids
                pending += ids
                numbers += [number] * len(ids)
            whole = len(pending) // room * room
            for start in range(0, whole, room):
                part = slice(start, start + room)
                yield torch.tensor(first + pending[part]), torch.tensor([-1] * len(first) + numbers[part])
            del pending[:whole], numbers[:whole]
            short = short and not whole
        pending = pending[: len(pending) - len(end)]
        if short and pending:
            yield torch.tensor(first + pending), torch.tensor([-1] * len(first) + numbers[: len(pending)])

    def _pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """A document in pieces, and of each whether it is the last."""
        start = 0
        while len(text) - start > _PIECE:
            # A space after a letter or digit: there, no rule of a tokenizer joins what is before and after.
            cut = start + _PIECE
            while cut > start + _PIECE // 2 and not (text[cut] == " " and text[cut - 1].isalnum()):
                cut -= 1
            if cut == start + _PIECE // 2:  # no such place: anywhere
                cut = start + _PIECE
            yield text[start:cut], False
            start = cut + (text[cut] == " " and self._adds_space)
        yield text[start:], True

    @functools.cached_property
    def _adds_space(self) -> bool:
        """Whether the tokenizer adds a space before every text; if so, the space before a piece is left out."""
        ids = self.tokenizer(["a a", "a", " a"], add_special_tokens=False)["input_ids"]
        return ids[0] == ids[1] + ids[1] != ids[1] + ids[2]


def _batch(pieces: Iterator[tuple[str, bool, int]]) -> list[tuple[str, bool, int]]:
    """The next pieces to tokenise together."""
    batch: list[tuple[str, bool, int]] = []
    held = 0
    while held < _PIECE and len(batch) < _DOCUMENTS and (piece := next(pieces, None)) is not None:
        batch.append(piece)
        held += len(piece[0])
    return batch
