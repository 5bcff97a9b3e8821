"""Memory that is lent again: never while anything looks at it, and no more of it than was in use at once."""

import gc
import weakref

import jax
import numpy as np

from distillcache.trainer.feed.buffers import ALIGNMENT, KEPT, SMALLEST, Buffers

SHAPE = (3, SMALLEST // 4)
U16 = np.dtype(np.uint16)


def address(array):
    return array.ctypes.data


def test_memory_is_lent_again_once_nobody_looks_at_it():
    buffers = Buffers()
    first = buffers.empty(SHAPE, U16)
    place = address(first)
    assert place % ALIGNMENT == 0
    assert first.shape == SHAPE
    assert first.dtype == U16
    del first
    assert address(buffers.empty(SHAPE, U16)) == place


def test_a_view_holds_the_memory():
    buffers = Buffers()
    first = buffers.empty(SHAPE, U16)
    place, view = address(first), first[1:, 2:][0, :5]
    view[...] = 7
    del first
    second = buffers.empty(SHAPE, U16)
    assert address(second) != place
    second[...] = 9
    assert view.tolist() == [7] * 5
    del view
    assert address(buffers.empty(SHAPE, U16)) == place


def test_a_device_array_holds_the_memory():
    buffers = Buffers()
    lent = buffers.empty(SHAPE, U16)
    lent[...] = 5
    device = jax.device_put(lent)
    del lent
    gc.collect()
    other = buffers.empty(SHAPE, U16)
    other[...] = 6
    assert int(np.asarray(device).max()) == 5


def test_only_so_many_free_buffers_are_kept():
    buffers = Buffers()
    lent = [buffers.empty(SHAPE, U16) for _ in range(KEPT + 3)]
    beneath = [weakref.ref(array.base) for array in lent]
    places = {address(array) for array in lent}
    lent.clear()
    assert not any(reference() is not None for reference in beneath)
    again = [buffers.empty(SHAPE, U16) for _ in range(KEPT)]
    assert {address(array) for array in again} <= places


def test_small_and_empty_arrays():
    buffers = Buffers()
    small = buffers.empty((2, 3), np.dtype(np.int8))
    assert address(small) % ALIGNMENT == 0
    assert buffers.empty((4, 0, 16), U16).shape == (4, 0, 16)
