"""`Fingerprints`: a text is known again whatever became of its file, and another one is not."""

import numpy as np
import pytest
import torch

from mxdsurgery.text.fingerprints import Apart, Fingerprints, tokens_in_words, winnowed

DOCUMENTS = [
    torch.randint(2, 5_000, (length,), generator=torch.Generator().manual_seed(length)) for length in range(300, 900, 7)
]


def packed(documents, context):
    """Documents one after the other, in contexts."""
    ids = torch.cat(documents)
    return ids[: len(ids) // context * context].view(-1, context)


@pytest.mark.parametrize("context", [8, 16, 32, 64, 128, 512])
def test_a_text_is_known_again_and_another_is_not(context):
    met = Fingerprints.of(packed(DOCUMENTS, context), context)
    assert met.known(packed(DOCUMENTS, context)).all()
    other = torch.randint(2, 5_000, (200, context), generator=torch.Generator().manual_seed(1))
    assert not met.known(other).any()
    assert not met.known(other[:0]).any() and met.known(other[:0]).shape == (0,)


@pytest.mark.parametrize("context", [64, 128, 512])
@pytest.mark.parametrize("change", ["other order", "a part", "a word more at the start"])
def test_documents_in_another_order_or_a_part_of_them_are_known(context, change):
    met = Fingerprints.of(packed(DOCUMENTS, context), context)
    order = torch.randperm(len(DOCUMENTS), generator=torch.Generator().manual_seed(0)).tolist()
    given = {
        "other order": [DOCUMENTS[number] for number in order],
        "a part": DOCUMENTS[31:60],
        "a word more at the start": [torch.tensor([1]), *DOCUMENTS],
    }[change]
    assert met.known(packed(given, context)).float().mean() > 0.95


def test_half_of_a_context_decides():
    half, text = torch.randint(2, 5_000, (2, 1, 128), generator=torch.Generator().manual_seed(3))
    met = Fingerprints.of(text, 128)
    assert met.known(torch.cat([text[:, :90], half[:, 90:]], dim=1)).all()
    assert not met.known(torch.cat([text[:, :40], half[:, 40:]], dim=1)).any()


@pytest.mark.parametrize("pieces", [2, 3])
def test_what_is_set_aside_stays_unknown_however_it_is_spread_over_the_rest(pieces):
    """As tables in the standard library are: across the border of two contexts, or in a piece here and a piece there."""
    aside = torch.randint(2, 5_000, (20, 128), generator=torch.Generator().manual_seed(5))
    rest = torch.randint(2, 5_000, (20 * pieces + 10, 128), generator=torch.Generator().manual_seed(6))
    cuts = [128 * piece // pieces for piece in range(pieces + 1)]
    for piece, (begin, end) in enumerate(zip(cuts, cuts[1:], strict=False)):
        rest[piece : 20 * pieces : pieces, begin:end] = aside[:, begin:end]
    rest[0] = aside[0]
    by_half = rest[~Fingerprints.of(aside, 128).known(rest)]
    assert len(by_half) > len(rest) - 20 and Fingerprints.of(by_half, 128).known(aside).sum() > 10
    apart = Apart([aside[:12], aside[12:]], 128)
    for _ in range(2):  # every pass over a text leaves out the same
        left_out = apart.leaving_out()
        kept = rest[[not left_out(context) for context in rest]]
        assert not Fingerprints.of(kept, 128).known(aside).any()
        assert len(rest) - 30 <= len(kept) < len(by_half) and kept[-10:].equal(rest[-10:])
    met = Fingerprints.of(aside[:3], 128)  # what was trained on is no reason to leave anything out, but counts where it helps
    left_out = Apart([aside], 128, met | Fingerprints.of(rest[3 * pieces : 3 * pieces + 1], 128)).leaving_out()
    of_met, of_fourth = rest[pieces : 3 * pieces], rest[3 * pieces + 1 : 4 * pieces]
    assert not any(left_out(context) for context in of_met) and any(left_out(context) for context in of_fourth)


def test_of_every_run_of_the_stated_length_a_hash_is_kept_wherever_it_stands():
    context, run = 128, 16 + 128 // 8  # a passage, and the window's other passages
    shared, rest = torch.randint(2, 5_000, (2, 1, 512), generator=torch.Generator().manual_seed(4))
    kept = set(winnowed(torch.cat([rest[:, :31], shared[:, :run], rest[:, 31 : 96 - run + 31]], dim=1), context)[0].tolist())
    for at in (0, 5, 64, 127 - run):
        there = torch.cat([rest[:, 200 : 200 + at], shared[:, :run], rest[:, 300 : 300 + 128 - at - run]], dim=1)
        assert kept & set(winnowed(there, context)[0].tolist()), at
    assert not kept & set(winnowed(rest[:, 300:428], context)[0].tolist())


def test_they_are_small_stored_as_they_are_and_added_up():
    contexts = packed(DOCUMENTS, 128)
    whole = Fingerprints.of(contexts, 128)
    assert whole.hashes.nbytes < 130 * len(contexts)
    assert np.array_equal(Fingerprints.from_tensor(128, whole.tensor()).hashes, whole.hashes)
    parts = [Fingerprints.of(part, 128) for part in contexts.split(7)]
    assert np.array_equal(Fingerprints.union(parts).hashes, whole.hashes)
    assert np.array_equal((parts[0] | parts[1]).hashes, Fingerprints.of(contexts[:14], 128).hashes)


def test_a_text_shorter_than_a_passage_says_nothing():
    met = Fingerprints.of(packed(DOCUMENTS, 128), 128)
    assert not met.known(DOCUMENTS[0][None, :9]).any()
    assert met.known(DOCUMENTS[0][None, :40]).all()


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({"trained_on": 0}, "1,000 held-out tokens"),
        ({"trained_on": 3}, "1,000 tokens (of 8 contexts, 3 were trained on)"),
        ({"trained_on": None}, "1,000 tokens, held out or not: what was trained on is not recorded"),
        ({}, "1,000 tokens, held out or not: what was trained on is not recorded"),
    ],
)
def test_only_what_was_not_trained_on_is_called_held_out(figures, words):
    assert tokens_in_words({"tokens": 1_000, "sequences": 8} | figures) == words
