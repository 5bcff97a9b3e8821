"""What rows say of themselves: tokens whose embeddings do not fit, blocks out of order, masks that cannot be."""

from dataclasses import replace

import numpy as np
import pytest

from distillcache.schemas.format.rows import Row
from distillcache.tools.look.sample_checks import SampleChecks, exchanged

T, D, S = 32, 16, 6
EMBED = np.random.default_rng(0).normal(size=(8, D)).astype(np.float32)


def a_row(seed: int) -> Row:
    ids = np.random.default_rng(seed).integers(0, 8, T).astype(np.int32)
    ones = np.ones(T, np.int32)
    return Row(ids, np.arange(T, dtype=np.int32), ones, ones > 0, "train")


def stream(row: Row, seed: int) -> np.ndarray:
    """A stream to which every block adds a little."""
    added = np.random.default_rng(seed + 100).normal(size=(S - 1, T, D)).astype(np.float32)
    return np.concatenate([EMBED[row.tokens][None], EMBED[row.tokens] + np.cumsum(added, 0)])


def found(rows: dict[int, tuple[Row, np.ndarray]]) -> list[str]:
    checks = SampleChecks([7])
    for number, (row, values) in rows.items():
        checks.row(number, ("0000", number // 2), row)
        for slot, each in enumerate(values):
            checks.slot("resid", slot, each)
            checks.slot("attn_out", slot, each * np.nan)  # not looked at
    return checks.findings()


def rows_of(count: int = 8) -> dict[int, tuple[Row, np.ndarray]]:
    rows = {number: a_row(number) for number in range(count)}
    return {number: (row, stream(row, number)) for number, row in rows.items()}


def test_whole_rows() -> None:
    assert found(rows_of()) == []
    assert found({}) == []


def test_numbers_at_other_tokens() -> None:
    shifted = {number: (row, np.roll(values, 1, axis=1)) for number, (row, values) in rows_of().items()}
    (words,) = found(shifted)
    assert words.startswith("the same token enters block 0 as different vectors, in 8 of 8 rows")
    (words,) = found({3: shifted[3]})  # one row is enough: `show` has no more
    assert "in 1 of 1 row: " in words


def test_rows_of_another_teacher() -> None:
    rows = rows_of()
    rows |= {number: (row, -values) for number, (row, values) in rows.items() if number in (4, 5)}
    (words,) = found(rows)
    assert words.startswith("rows 4, 5 (shards 0000/2): their tokens enter block 0 as other vectors")


def test_numbers_that_are_not_finite_are_left_out() -> None:
    rows = rows_of()
    for number in (0, 1, 2, 3, 4):
        rows[number][1][0, ::2] = np.nan
    assert found(rows) == []


@pytest.mark.parametrize("at", [1, 2, 3])
def test_neighbours_that_are_exchanged(at: int) -> None:
    order = [*range(at), at + 1, at, *range(at + 2, S)]
    (words,) = found({number: (row, values[order]) for number, (row, values) in rows_of().items()})
    assert words.startswith(f"resid {at} and {at + 1} look exchanged")


def test_a_stream_in_order() -> None:
    distance = np.abs(np.subtract.outer(np.arange(9), np.arange(9)))
    assert exchanged(0.9**distance) == []


def test_masks() -> None:
    row = a_row(0)
    tokens = np.where(np.arange(T) < 20, row.tokens % 7, 7).astype(np.int32)
    counted = replace(row, tokens=tokens)
    (words,) = found({0: (counted, stream(counted, 0))})
    assert words == "the last 12 tokens are all id 7, and marked as text, in row 0"
