"""Three storage formats of other systems, as writers and readers, for the comparison in `bench feed`.

    RawShards     DeepSpec's layout: raw bf16 files of several rows, memory-mapped
    SampleFiles   the speculators layout: one safetensors file a row
    TfExamples    MaxText's offline layout: tf.train.Example records in an ArrayRecord file

A *row* here is `[L, T, D]` uint16, the bits of bfloat16. Every reader gives `[L, B, T, D]` in fresh memory, as a
training step wants it, and does no more work than its format demands: no check, since none of them stores a digest.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import UInt16
from safetensors import safe_open
from safetensors.numpy import save_file

from distillcache.cache_builder.text.files.tf_example import decode_example

Bits = UInt16[np.ndarray, "L T D"]
Batch = UInt16[np.ndarray, "L B T D"]

# Wire types of protocol buffers (protobuf.dev/programming-guides/encoding), and the fields of tf.train.Example:
# Example.features = 1, Features.feature = 1 (a map: key = 1, value = 2), Feature.float_list = 2, FloatList.value = 1.
BYTES = 2
FEATURE = "activations"


class RawShards:
    """Raw rows, `shard_rows` a file, mapped once and kept mapped."""

    def __init__(self, folder: Path, shape: tuple[int, int, int]) -> None:
        """`shape`: (L, T, D) of a row; the files hold nothing but numbers."""
        self._maps = [np.memmap(path, np.uint16, "r").reshape(-1, *shape) for path in sorted(folder.glob("*.bin"))]
        self._shape, self._shard_rows = shape, len(self._maps[0])

    @staticmethod
    def write(folder: Path, rows: Iterable[Bits], shard_rows: int) -> None:
        """Write the rows into a new folder."""
        folder.mkdir(parents=True)
        for number, row in enumerate(rows):
            with (folder / f"{number // shard_rows:05d}.bin").open("ab") as file:
                file.write(np.ascontiguousarray(row).data)

    def __getitem__(self, numbers: Sequence[int]) -> Batch:
        out = _batch(self._shape, len(numbers))
        for place, number in enumerate(numbers):
            shard, row = divmod(number, self._shard_rows)
            out[:, place] = self._maps[shard][row]
        return out


class SampleFiles:
    """One safetensors file a row, opened when it is read."""

    def __init__(self, folder: Path, shape: tuple[int, int, int]) -> None:
        self._folder, self._shape = folder, shape

    @staticmethod
    def write(folder: Path, rows: Iterable[Bits]) -> None:
        """Write the rows into a new folder. The bits as uint16: NumPy has no bfloat16."""
        folder.mkdir(parents=True)
        for number, row in enumerate(rows):
            save_file({FEATURE: np.ascontiguousarray(row)}, folder / f"data_{number}.safetensors")

    def __getitem__(self, numbers: Sequence[int]) -> Batch:
        out = _batch(self._shape, len(numbers))
        for place, number in enumerate(numbers):
            with safe_open(self._folder / f"data_{number}.safetensors", "numpy") as file:
                out[:, place] = file.get_tensor(FEATURE)
        return out


class TfExamples:
    """One tf.train.Example a row with a packed FloatList: the format has no 16-bit numbers.

    ArrayRecord in groups of one, the fastest for rows in random order, with its own default compression.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self._reader, self._shape = ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0"), shape

    @staticmethod
    def write(path: Path, rows: Iterable[Bits]) -> None:
        """Write the rows into one file."""
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for row in rows:
            writer.write(encode_example(FEATURE, row.view(ml_dtypes.bfloat16).astype(np.float32)))
        writer.close()

    def __getitem__(self, numbers: Sequence[int]) -> Batch:
        out = _batch(self._shape, len(numbers))
        for place, record in enumerate(self._reader.read(list(numbers))):
            values = np.asarray(decode_example(record)[FEATURE]).reshape(self._shape)
            out[:, place] = values.astype(ml_dtypes.bfloat16).view(np.uint16)
        return out

    def close(self) -> None:
        """End the reader's threads."""
        self._reader.close()


def encode_example(name: str, values: np.ndarray) -> bytes:
    """A serialised tf.train.Example with one float feature."""
    floats = _field(1, np.ascontiguousarray(values, "<f4").tobytes())
    entry = _field(1, name.encode()) + _field(2, _field(2, floats))
    return _field(1, _field(1, entry))


def _batch(shape: tuple[int, int, int], rows: int) -> Batch:
    return np.empty((shape[0], rows, *shape[1:]), np.uint16)


def _field(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | BYTES) + _varint(len(payload)) + payload


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
