"""Compressed chunks that were fetched as they are stored, unpacked by TensorStore's own codecs."""

import itertools

import numpy as np
import tensorstore as ts

from distillcache.schemas.format import layout
from distillcache.schemas.format.manifest import PartPlan


class Unpacker:
    """Unpacks the chunks of one array: each becomes, for a moment, a chunk of a zarr array in memory.

    Safe to use from several threads.
    """

    def __init__(self, part: PartPlan, row_tokens: int) -> None:
        self._shape, self._dtype = (row_tokens, part.width), np.dtype(part.dtype)
        chunk, most = (1, 1, *self._shape), 2**40
        metadata = layout.array_metadata((most, 1, *self._shape), part.dtype, (1, 1), part.bits_of, part.compress)
        (sharding,) = metadata["codecs"]
        metadata |= {
            "codecs": sharding["configuration"]["codecs"],
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        }
        context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "memory_key_value_store": {}})
        self._store = ts.KvStore.open({"driver": "memory"}, context=context).result()
        spec = layout.array_spec({"driver": "memory"}, metadata)
        self._array = ts.open(spec, open=True, read=True, assume_metadata=True, context=context).result()
        self._numbers = itertools.count()

    def unpack(self, packed: bytes | memoryview, memory: memoryview) -> bool:
        """Unpack a chunk to its place, `[T, W]`; False where these bytes are not what a compressor gives."""
        number = next(self._numbers)
        key = f"c/{number}/0/0/0"
        self._store.write(key, bytes(packed)).result()
        try:
            out = np.frombuffer(memory, self._dtype).reshape(self._shape)
            ts.array(out).write(self._array[number, 0]).result()
            return True
        except ValueError:
            return False
        finally:
            self._store.write(key, None).result()
