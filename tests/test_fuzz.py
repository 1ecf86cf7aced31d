"""What comes from outside, in a file or a flag, is read or refused by name: inputs of scripts/measure/fuzz.py, a few of each.

Always the same ones; the script makes others, for as long as one likes.
"""

import fuzz
import pytest
from running import without_reloads


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        without_reloads(patched)  # other tests do it
        return fuzz.Place(tmp_path_factory.mktemp("fuzz"))


EXAMPLES = 80


@pytest.mark.parametrize("name", fuzz.KINDS)
def test_any_input_ends_in_success_or_a_named_error(place, name):
    kind = fuzz.Kind(fuzz.KINDS[name].strategy, fuzz.KINDS[name].run)
    fuzz.fuzz(place, kind, EXAMPLES)
    assert kind.outcomes.total() >= EXAMPLES
    assert kind.slowest < fuzz.SLOWEST


def test_what_is_fed_is_not_all_refused_at_the_first_look(place):
    """Of each kind some input is read, but of the edits that are any text: to be one takes more than chance."""
    for name in ("recipe, keys and values", "recipe, planned", "edit file", "jsonl", "config.json", "safetensors header"):
        kind = fuzz.Kind(fuzz.KINDS[name].strategy, fuzz.KINDS[name].run)
        fuzz.fuzz(place, kind, 40)
        assert kind.outcomes["read"] > 0 and kind.outcomes.total() > kind.outcomes["read"], name


def test_another_error_than_a_named_one_is_noticed(place):
    def fails(_place, value):
        raise KeyError(value)

    with pytest.raises(KeyError):
        fuzz.fuzz(place, fuzz.Kind(fuzz.KINDS["layers"].strategy, fails), 5)
