"""The safetensors format, where the library's own reader and writer do not reach: files that are not on a local disk.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes without gaps. The header
maps each name to `{"dtype", "shape", "data_offsets"}`, offsets counted from the end of the header.

Source: the format's description in the README of huggingface/safetensors; the order of tensors and keys is that of its
`serialize` (version 0.8), so that a file written here has the bytes that the library would write.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from models.ranges import RemoteFile, Span, truncated
from schemas.object_path import ObjectPath

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the library's own limit
ALIGNMENT = 8  # the header is padded with spaces to it
METADATA = "__metadata__"
NUMPY_TYPES: dict[str, type[np.generic] | np.dtype] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I16": np.int16,
    "U16": np.uint16,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I32": np.int32,
    "U32": np.uint32,
    "F32": np.float32,
    "F64": np.float64,
    "I64": np.int64,
    "U64": np.uint64,
}
# Larger numbers are written first, so that each tensor is aligned; of one size, in the library's order of types.
WRITTEN_FIRST = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file in a bucket. dtype: the format's name of it."""

    dtype: str
    shape: tuple[int, ...]
    span: Span

    def view(self, stored: np.ndarray) -> np.ndarray:
        """The tensor of its bytes, without a copy."""
        return stored.view(NUMPY_TYPES[self.dtype]).reshape(self.shape)


@dataclass(frozen=True)
class RemoteSafetensors:
    """The header of a file in a bucket. length: of the whole file."""

    file: RemoteFile
    tensors: Mapping[str, StoredTensor]
    length: int


def open_remote(path: ObjectPath) -> RemoteSafetensors:
    """Read a file's header and see that the file ends where the header says, in four small requests.

    Raises:
        CheckpointError: the file is missing, truncated or not of this format.
    """
    file = RemoteFile(path)
    size = int.from_bytes(file.read(0, LENGTH_BYTES), "little")
    if size > MAX_HEADER_BYTES:
        truncated(path, f"a header of {size} bytes")
    start = LENGTH_BYTES + size
    tensors, stop = _parse(file, file.read(LENGTH_BYTES, start), start)
    if not file.has(stop) or file.has(stop + 1):
        truncated(path, f"it is {'longer' if file.has(stop) else 'shorter'} than the {stop} bytes of its header")
    return RemoteSafetensors(file, tensors, stop)


def _parse(file: RemoteFile, header: bytes, start: int) -> tuple[dict[str, StoredTensor], int]:
    """The tensors, and where the last one ends."""
    tensors: dict[str, StoredTensor] = {}
    try:
        for name, entry in json.loads(header).items():
            if name == METADATA:
                continue
            first, last = entry["data_offsets"]
            tensors[name] = _checked(entry["dtype"], tuple(entry["shape"]), Span(file, start + first, start + last))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        truncated(file.path, error)
    stop = start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.span.start, tensor.span.stop)):
        if tensor.span.start != stop:
            truncated(file.path, "a header whose tensors overlap or leave gaps")
        stop = tensor.span.stop
    return tensors, stop


def _checked(dtype: str, shape: tuple[int, ...], span: Span) -> StoredTensor:
    if dtype in NUMPY_TYPES and span.size != prod(shape) * np.dtype(NUMPY_TYPES[dtype]).itemsize:
        raise ValueError(f"{span.size} bytes for {dtype} {list(shape)}")
    return StoredTensor(dtype, shape, span)


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor of a file that is written. value: makes it, contiguous, when its turn comes."""

    dtype: np.dtype
    shape: tuple[int, ...]
    value: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_safetensors(stream: BinaryIO, tensors: Mapping[str, TensorToWrite], metadata: Mapping[str, str]) -> None:
    """Write a file, one tensor in memory at a time. `metadata` has one key: the library fixes no order of several."""
    names = {np.dtype(NUMPY_TYPES[name]): name for name in WRITTEN_FIRST}
    order = sorted(tensors, key=lambda name: (WRITTEN_FIRST.index(names[tensors[name].dtype]), name))
    header: dict[str, Any] = {METADATA: dict(metadata)}
    stop = 0
    for name in order:
        tensor = tensors[name]
        offsets = [stop, stop := stop + tensor.size]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    stream.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
    for name in order:
        # As bytes: ml_dtypes' arrays have no buffer of their own kind.
        stream.write(np.ascontiguousarray(tensors[name].value()).reshape(-1).view(np.uint8).data)
