"""Figures as reports write them."""

import pytest

from spsim.report.words import figure, size


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.4199, "0.42"), (0.4263, "0.426"), (9.671, "9.67"), (10.04, "10"), (156.4, "156"), (12345.6, "12,346")],
)
def test_small_figures_keep_three_digits(value, text):
    assert figure(value) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0.00 KiB"), (2**10, "1.00 KiB"), (2**20, "1.00 MiB"), (3 * 2**29, "1.50 GiB")]
)
def test_bytes_take_the_unit_that_they_reach(count, text):
    assert size(count) == text
