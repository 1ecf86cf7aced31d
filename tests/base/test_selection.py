"""What ``--layers`` means."""

import pytest

from mxdsurgery.base.selection import select_layers, write_layers
from mxdsurgery.errors import LayerSelectionError


@pytest.mark.parametrize(
    ("selection", "layers"),
    [
        ("all", list(range(12))),
        (" all ", list(range(12))),
        ("3", [3]),
        ("0", [0]),
        ("11", [11]),
        ("2-5", [2, 3, 4, 5]),
        ("4-4", [4]),
        ("0,4,7-9", [0, 4, 7, 8, 9]),
        (" 4 , 0 ", [0, 4]),
        ("-1", [11]),
        ("-12", [0]),
        ("-3-11", [9, 10, 11]),
        ("5,5,4-6,-7", [4, 5, 6]),
    ],
)
def test_a_selection_names_layers_ascending_and_each_once(selection, layers):
    assert select_layers(selection, 12) == layers


@pytest.mark.parametrize("selection", ["12", "-13", "3,12", "2-12", "99999999999999999999"])
def test_a_layer_that_is_not_there_is_refused_and_the_range_is_named(selection):
    with pytest.raises(LayerSelectionError) as caught:
        select_layers(selection, 12)
    message = str(caught.value)
    assert repr(selection) in message and "the model has no layer" in message
    assert "from 0 to 11, or -12 to -1" in message


@pytest.mark.parametrize(
    ("selection", "layers"),
    [([0, 2], [0, 2]), (3, [3]), (("0", "4-5"), [0, 4, 5]), (range(2), [0, 1]), (["all"], list(range(12)))],
)
def test_a_list_of_layers_is_a_selection(selection, layers):
    assert select_layers(selection, 12) == layers


@pytest.mark.parametrize(
    "selection",
    [
        [],
        [[1]],
        [None],
        None,
        1.5,
        True,
        [0.5],
        "",
        " ",
        ",",
        "3,",
        "first",
        "ALL",
        "all,3",
        "3:5",
        "1.5",
        "2--5",
        "2-5-7",
        "--1",
        "3 4",
        "+3",
    ],
)
def test_what_cannot_be_read_is_refused_and_the_language_is_explained(selection):
    with pytest.raises(LayerSelectionError, match="cannot read") as caught:
        select_layers(selection, 12)
    assert "0,4,7-9" in caught.value.expected


@pytest.mark.parametrize("selection", ["5-2", "0-3,9-8", "-1-3"])
def test_a_range_that_runs_backwards_is_refused(selection):
    with pytest.raises(LayerSelectionError, match="runs backwards"):
        select_layers(selection, 12)


def test_a_model_without_layers_has_none_to_select():
    with pytest.raises(LayerSelectionError, match="no decoder layers"):
        select_layers("all", 0)


@pytest.mark.parametrize("selection", ["0", "0-2,5", "1,3,5", "7-9", "0-11"])
def test_layers_are_written_as_they_are_read(selection):
    assert write_layers(select_layers(selection, 12)) == selection
