"""How near two differently compiled programs are to each other: docs/design.md says where bits are equal, and why.

XLA chooses the order of a sum, the width of its vectors and whether a multiplication and an addition are one
instruction by shape, by what else is in the program, by threads and by processor. A comparison for equal bits across
programs therefore holds on one machine and fails on the next.
"""

from typing import Any

import numpy as np

SUMS = 3e-6  # of the largest value: float32 sums of some hundred terms in another order, through a few layers
LEVELS = {"f32": SUMS, "bf16": 2**-8, "int8": 1 / 64, "int4": 1 / 4}  # of the largest: one code further up or down


def assert_rounded(found: Any, expected: Any, codec: str = "f32") -> None:
    """Compare numbers of two programs: apart by what rounding does, or by one level of the codec they went through."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    largest = np.abs(expected).max(initial=0.0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=LEVELS[codec] * largest)
    # A wrong number somewhere would pass under a coarse codec; then most numbers are the same.
    assert np.mean(np.abs(found - expected) > SUMS * largest) < 0.05
