"""Token streams, and the rows that they are cut into.

A *marked token* is 5 bytes: the token, and whether it begins a document and counts as a target. A *stream* is the
marked tokens of a corpus, documents joined end to end. Row `n` is a pure function of the T marked tokens from `n * T`
on, so rows can be made from any place on, by anybody.

A document that is cut at a row's end goes on in the next row as a document of its own, from position 0: no row needs
its neighbour.
"""

from collections.abc import Iterator
from typing import IO, Protocol

import numpy as np
from jaxtyping import Bool, Int32

from distillcache.schemas.counted import counted
from distillcache.schemas.errors import InputError
from distillcache.schemas.format.rows import Row

MARKED = np.dtype([("token", "<i4"), ("marks", "u1")])  # packed: no padding byte between
BEGINS, COUNTED = 1, 2
PACKED_TOKENS = 1 << 18  # packed at once: some 10 MB of arrays


class TokenStream(Protocol):
    """Marked tokens by their place."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """The marked tokens `start` to `stop - 1`, of dtype MARKED."""
        ...


class SpooledStream:
    """A stream in a file of this process's, written first and then read."""

    def __init__(self, spool: IO[bytes]) -> None:
        self._spool = spool
        self.length = 0

    def append(self, marked: np.ndarray) -> None:
        """Add a document's marked tokens."""
        self._spool.write(marked.tobytes())
        self.length += marked.size

    def flush(self) -> None:
        """Flush everything that was added to the file; raise if the file system cannot."""
        self._spool.flush()

    def read(self, start: int, stop: int) -> np.ndarray:
        self._spool.seek(start * MARKED.itemsize)
        return np.frombuffer(self._spool.read((stop - start) * MARKED.itemsize), MARKED)


def mark_document(
    tokens: Int32[np.ndarray, " n"], counted: Bool[np.ndarray, " n"] | None = None, *, begins: bool = True
) -> np.ndarray:
    """A document's tokens with their marks; without `counted` all of them are targets.

    Args:
        begins: the document begins with these; otherwise they continue one.
    """
    marked = np.empty(tokens.size, MARKED)
    marked["token"] = tokens
    marked["marks"] = COUNTED if counted is None else counted * np.uint8(COUNTED)
    marked["marks"][:1] |= np.uint8(BEGINS if begins else 0)
    return marked


def count_begins(marked: np.ndarray) -> int:
    """Count the documents that begin among these marked tokens."""
    return int(np.count_nonzero(marked["marks"] & BEGINS))


def pack_tokens(marked: np.ndarray, row_tokens: int) -> Int32[np.ndarray, "rows columns T"]:
    """Rows of T tokens as columns tokens, positions, segment_ids (0 = padding), counted (0 or 1).

    Args:
        marked: from the beginning of a row on; what the last row lacks is padding.
    """
    rows = -(-marked.size // row_tokens)
    filled = np.zeros(rows * row_tokens, MARKED)
    filled[: marked.size] = marked
    filled = filled.reshape(rows, row_tokens)
    real = (np.arange(rows * row_tokens) < marked.size).reshape(rows, row_tokens)
    begins = (filled["marks"] & BEGINS) != 0
    begins[:, 0] = True  # what goes on from the row before is a document of its own here
    places = np.arange(row_tokens)
    starts = np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    columns = (filled["token"], places - starts, np.cumsum(begins, axis=1), (filled["marks"] & COUNTED) != 0)
    return np.stack([np.where(real, column, 0) for column in columns], axis=1).astype(np.int32)


def pack_rows_of(
    stream: TokenStream, tokens: int, first: int, stop: int, row_tokens: int, held_out: set[int]
) -> Iterator[Row]:
    """Rows `first` to `stop - 1` of a stream.

    Args:
        tokens: how many of the stream's tokens go into rows.
        held_out: the rows for evaluation.
    """
    step = max(1, PACKED_TOKENS // row_tokens)
    for start in range(first, stop, step):
        marked = stream.read(start * row_tokens, min((start + step) * row_tokens, stop * row_tokens, tokens))
        for number, columns in enumerate(pack_tokens(marked, row_tokens), start):
            split = "eval" if number in held_out else "train"
            yield Row(columns[0], columns[1], columns[2], loss_mask=columns[3] > 0, split=split)


def draw_eval_rows(rows: int, eval_rows: int, seed: int, max_rows: int | None = None) -> tuple[int, ...]:
    """Which of the rows are held out, ascending: drawn from all of them, without replacement.

    Args:
        max_rows: the limit of all rows, for the message.

    Raises:
        InputError: no row would be left to train on.
    """
    if eval_rows >= rows:
        most = f"{rows - 1} or less" if rows > 1 else "0"
        if rows == max_rows:
            raise InputError(
                "all rows would be held out for evaluation, and none is left to train on",
                {"data.max_rows": max_rows, "data.eval_rows": eval_rows},
                f"set data.eval_rows to {most}, or data.max_rows to {eval_rows + 1} or more",
            )
        raise InputError(
            "the text is too short to hold out so many rows",
            {
                "data.eval_rows": eval_rows,
                "found": f"{counted(rows, 'row')} in all",
                "expected": f"{eval_rows + 1} or more",
            },
            f"set data.eval_rows to {most}, or name more text, or make data.row_tokens smaller",
        )
    drawn = np.random.Generator(np.random.PCG64(seed)).choice(rows, eval_rows, replace=False)
    return tuple(sorted(drawn.tolist()))
