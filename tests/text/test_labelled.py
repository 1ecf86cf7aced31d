"""Labelled texts are drawn at random from a whole text, however it is sorted, in bounded memory."""

import json
import warnings
import weakref

import pytest

from mxdsurgery.errors import DataError, MxDWarning
from mxdsurgery.text import labelled
from mxdsurgery.text.labelled import read_labelled
from mxdsurgery.text.reservoir import Reservoir

ROWS = 3_000


def sorted_rows(count=ROWS):
    """By class: the first three quarters are "a"."""
    return ({"text": f"text {n}", "label": "a" if 4 * n < 3 * count else "b"} for n in range(count))


class Stream:
    """A data set on the hub: its files, as many rows in each, and how many of each were read."""

    def __init__(self, files, each):
        self.num_shards, self.each, self.read = files, each, {}

    def shard(self, num_shards, index):
        assert num_shards == self.num_shards
        return self.rows(index)

    def __iter__(self):
        return (row for index in range(self.num_shards) for row in self.rows(index))

    def rows(self, index):
        for n in range(self.each):
            self.read[index] = n + 1
            yield {"text": f"file {index} row {n}", "label": "old" if 2 * index < self.num_shards else "new"}


def hub(monkeypatch, stream):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: stream)
    return "user/set"


def numbers(found):
    return [int(text.split()[-1]) for text in found.texts]


@pytest.mark.parametrize("where", ["hub", "file"])
def test_a_sample_of_a_sorted_text_is_one_of_all_of_it(where, tmp_path, monkeypatch):
    spec = hub(monkeypatch, list(sorted_rows())) if where == "hub" else str(tmp_path / "t.jsonl")
    if where == "file":
        (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sorted_rows()))
    found = read_labelled(spec, samples=400, seed=3)
    places = numbers(found)
    assert found.drawn_from == ROWS and len(places) == 400 and places == sorted(set(places))
    assert sum(places) / 400 == pytest.approx(ROWS / 2, rel=0.1)
    assert found.labels.count("a") == pytest.approx(300, abs=45)  # five standard errors
    assert found.labels == ["a" if 4 * n < 3 * ROWS else "b" for n in places]
    assert read_labelled(spec, samples=400, seed=3) == found != read_labelled(spec, samples=400, seed=4)
    assert numbers(read_labelled(spec)) == list(range(ROWS))


def test_every_item_has_the_same_chance():
    counts = [0] * 40
    for seed in range(4_000):
        drawn = Reservoir(10, seed)
        for n in range(40):
            drawn.offer(n)
        for n in drawn.held():
            counts[n] += 1
    assert min(counts) > 1_000 - 5 * 28 and max(counts) < 1_000 + 5 * 28


def test_no_more_is_in_memory_than_is_drawn(monkeypatch):
    class Text(str):
        pass

    alive, most = weakref.WeakSet(), 0

    def rows():
        nonlocal most
        for row in sorted_rows():
            text = Text(row["text"])
            alive.add(text)
            most = max(most, len(alive))
            yield row | {"text": text}

    found = read_labelled(hub(monkeypatch, rows()), samples=50)
    assert len(found.texts) == 50 and isinstance(found.texts[0], Text) and most < 60
    monkeypatch.setattr(labelled, "MOST_TEXTS", 70)  # where nobody says how many
    found = read_labelled(hub(monkeypatch, list(sorted_rows())))
    assert len(found.texts) == 70 and found.drawn_from == ROWS


def test_of_a_set_that_is_too_long_files_from_all_over_it_are_read_and_that_is_said(monkeypatch):
    monkeypatch.setattr(labelled, "_MOST_ROWS", 640)
    stream = Stream(200, 1_000)
    with pytest.warns(MxDWarning, match="at most 640 rows of it were read, the beginnings of 64 of its 200 files"):
        found = read_labelled(hub(monkeypatch, stream), samples=100)
    assert found.drawn_from == 640 and 30 < found.labels.count("old") < 70
    assert set(stream.read.values()) == {11} and len(stream.read) == 64  # one more, to see that there are more
    assert min(stream.read) == 0 and max(stream.read) > 190
    with pytest.warns(MxDWarning, match="at most 640 rows of it were read, its beginning"):
        assert read_labelled(hub(monkeypatch, list(sorted_rows(800))), samples=100).drawn_from == 640


def test_of_a_set_in_many_files_that_is_short_enough_every_row_is_read(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_labelled(hub(monkeypatch, Stream(60, 30)), samples=10).drawn_from == 1_800


def test_a_sample_of_one_class_says_that_it_is_a_sample(monkeypatch):
    rows = [{"text": "x", "label": "a"}] * 500 + [{"text": "y", "label": "b"}]
    with pytest.raises(DataError, match="3 drawn of 501 texts, has 1 classes(.|\n)*or raise samples="):
        read_labelled(hub(monkeypatch, rows), samples=3)
