"""Memory for batches, reused when no reference is left.

A batch is large enough that the system hands out its memory as fresh pages, zeroed one by one: that costs as much as
reading into them. So a buffer comes back when the last array that looks at it is gone, device arrays included (JAX on
CPU takes host arrays over without a copy, and holds on to them).
"""

import weakref
from collections import deque

import numpy as np

ALIGNMENT = 64  # bytes; JAX's CPU client takes aligned host arrays over without a copy
KEPT = 4  # free buffers of one size: two batches being read, for two taps
SMALLEST = 1 << 20  # bytes; what is smaller comes from the allocator's own free lists


class Buffers:
    """Lends arrays. Safe to use from several threads: finalisers may run in any of them, so there is no lock."""

    def __init__(self) -> None:
        self._free: dict[int, deque[np.ndarray]] = {}

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An uninitialised, aligned array; its memory is reused once the array and all its views are gone."""
        size = int(np.prod(shape)) * dtype.itemsize
        if size < SMALLEST:
            return _aligned(size)[:size].view(dtype).reshape(shape)
        free = self._free.setdefault(size, deque(maxlen=KEPT))
        try:
            memory = free.pop()  # the one that was freed last: its pages are the likeliest to be in a CPU cache
        except IndexError:
            memory = _aligned(size)
        # Over a memoryview, so that NumPy lets every view hold this array, and not `memory` beneath it.
        lent = np.frombuffer(memory.data, np.uint8)
        weakref.finalize(lent, free.append, memory).atexit = False
        return lent.view(dtype).reshape(shape)


def _aligned(size: int) -> np.ndarray:
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size]
