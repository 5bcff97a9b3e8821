"""The tables of `distillcache inspect`."""

import pytest

from distillcache.tools.look.inspect_print import _range


@pytest.mark.parametrize(("rms", "text"), [([0.5], "0.5"), ([0.61, 0.8, 0.3, 0.52], "0.3 to 0.8")])
def test_a_range_goes_from_the_least_to_the_largest_slot(rms: list[float], text: str) -> None:
    assert _range(rms) == text
