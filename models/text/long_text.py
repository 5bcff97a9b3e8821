"""Tokens of a long text, window by window, equal to those of the whole text, in memory that does not grow with it.

Windows overlap by OVERLAP characters, and each begins where a token of the one before begins. The windows pass over to
each other at a token boundary in the middle of the overlap, around which both give the same tokens at the same places.
A tokenizer that cuts words before it merges (byte-level BPE, WordPiece) looks at nothing left of a word, so one common
boundary is proof. One that merges over the whole text (SentencePiece's) is known by experience to look no further than
some tens of characters; windows must agree over 8,192. Where they do not, the caller hears of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64
from tokenizers import Tokenizer

WINDOW = 1 << 18  # characters; some 100 MB while a window of one-byte tokens is encoded
OVERLAP = 1 << 14


class NoCommonTokens(Exception):
    """Two windows give different tokens where they overlap; its text names the position."""


@dataclass(frozen=True, eq=False)
class TokenRun:
    """Consecutive tokens of a text, and the characters that each stands for."""

    ids: Int32[np.ndarray, " n"]
    begins: Int64[np.ndarray, " n"]
    ends: Int64[np.ndarray, " n"]

    def part(self, start: int, stop: int | None = None) -> "TokenRun":
        return TokenRun(self.ids[start:stop], self.begins[start:stop], self.ends[start:stop])


def token_runs(backend: Tokenizer, text: str, window: int = WINDOW, overlap: int = OVERLAP) -> Iterator[TokenRun]:
    """The tokens of a text, in runs that follow each other.

    Args:
        backend: without a post-processor, which takes spaces out of the tokens' places.
        window, overlap: characters.

    Raises:
        NoCommonTokens: the text cannot be tokenised by windows.
    """
    run, stop = _encoded(backend, text, 0, window), window
    first = 0
    while stop < len(text):
        lowest = int(np.searchsorted(run.begins, stop - overlap))
        if lowest >= run.ids.size or run.begins[lowest] >= stop - 3 * (overlap // 4):
            raise NoCommonTokens(f"no token begins at characters {stop - overlap} to {stop - 3 * (overlap // 4)}")
        start = int(run.begins[lowest])
        if start + window <= stop:
            raise NoCommonTokens(f"a window at character {start} gets no further")
        following = _encoded(backend, text, start, window)
        here, there = _common_boundary(run, following, start + overlap // 4, stop - overlap // 4)
        yield run.part(first, here)
        run, first, stop = following, there, start + window
    yield run.part(first)


def _encoded(backend: Tokenizer, text: str, start: int, size: int) -> TokenRun:
    encoding = backend.encode(text[start : start + size], add_special_tokens=False)
    places = np.array(encoding.offsets, np.int64).reshape(-1, 2) + start
    return TokenRun(np.array(encoding.ids, np.int32), places[:, 0], places[:, 1])


def _common_boundary(one: TokenRun, other: TokenRun, low: int, high: int) -> tuple[int, int]:
    """The number, in each of two runs, of a token at which both begin anew, where they agree between two characters."""
    (here, found), (there, expected) = (_within(run, low, high) for run in (one, other))
    same = found.ids.size == expected.ids.size and all(
        np.array_equal(getattr(found, name), getattr(expected, name)) for name in ("ids", "begins", "ends")
    )
    # A token that begins before the one before has ended shares a character with it.
    clean = np.flatnonzero(found.ends[:-1] <= found.begins[1:]) + 1
    if not same or not clean.size:
        raise NoCommonTokens(f"two windows differ at characters {low} to {high}")
    return here + int(clean[0]), there + int(clean[0])


def _within(run: TokenRun, low: int, high: int) -> tuple[int, TokenRun]:
    """The tokens that lie between two characters, and the number of the first."""
    start = int(np.searchsorted(run.begins, low))
    stop = int(np.searchsorted(run.ends, high, side="right"))
    return start, run.part(start, stop)
