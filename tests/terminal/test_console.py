"""How numbers are put for people."""

import pytest

from mxdsurgery.terminal.console import compact, size


@pytest.mark.parametrize(
    ("number", "said"),
    [(0.25, "0.25"), (999.4, "999"), (999.6, "1k"), (1234, "1.23k"), (299_776, "300k"), (999_936, "1M"), (2.5e9, "2.5B")],
)
def test_large_numbers_have_three_digits_and_a_unit(number, said):
    assert compact(number) == said and compact(-number) == f"-{said}"


@pytest.mark.parametrize(
    ("count", "said"),
    [(1000, "1000 B"), (1024, "1 KiB"), (1010 * 2**20, "1010 MiB"), (999.7 * 2**20, "999.7 MiB"), (3 * 2**29, "1.5 GiB")],
)
def test_bytes_have_binary_units_and_no_exponents(count, said):
    assert size(count) == said
