"""The safetensors format, for what the library's own reader and writer lack: slices of tensors, and buckets.

A file on a local disk is mapped: a part of a tensor is a view, whose pages are the page cache's. The library would copy
whole tensors, or parse the header again for each part.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes without gaps. The header
maps each name to `{"dtype", "shape", "data_offsets"}`, offsets counted from the end of the header.

Source: the format's description in the README of huggingface/safetensors; the order of tensors and keys is that of its
`serialize` (version 0.8), so that a file written here has the bytes that the library would write.
"""

import json
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from distillcache.models.files.foreign import LFS_MAGIC, lfs_pointer
from distillcache.models.files.ranges import RemoteFile, Span, truncated
from distillcache.models.files.tensors import Box
from distillcache.schemas.counted import counted
from distillcache.schemas.store.path import Location, ObjectPath

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the library's own limit
MAX_COUNT = 2**63
MAX_AXES = 64  # numpy's limit
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
    """A tensor in a file in a bucket, or some of its rows. dtype: the format's name of it."""

    dtype: str
    shape: tuple[int, ...]
    span: Span

    def rows(self, box: Box) -> "StoredTensor":
        """Return the whole rows of this part that one run of bytes contains."""
        if not box:
            return self
        size = self.span.size // max(self.shape[0], 1)
        span = Span(self.span.file, self.span.start + size * box[0].start, self.span.start + size * box[0].stop)
        return StoredTensor(self.dtype, (box[0].stop - box[0].start, *self.shape[1:]), span)

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
    """Read a file's header and check that the file ends where the header says, in four small requests.

    Raises:
        CheckpointError: the file is missing, truncated or not of this format.
    """
    file = RemoteFile(path)
    first = file.read(0, LENGTH_BYTES)
    size = int.from_bytes(first, "little")
    if size > MAX_HEADER_BYTES:
        if LFS_MAGIC.startswith(first):
            raise lfs_pointer(path)
        truncated(path, f"a header of {counted(size, 'byte')}")
    start = LENGTH_BYTES + size
    entries, stop = _parse(path, file.read(LENGTH_BYTES, start), start)
    tensors = {
        name: StoredTensor(entry.dtype, entry.shape, Span(file, entry.start, entry.stop))
        for name, entry in entries.items()
    }
    if not file.has(stop) or file.has(stop + 1):
        truncated(path, f"it is {'longer' if file.has(stop) else 'shorter'} than the {stop} bytes of its header")
    return RemoteSafetensors(file, tensors, stop)


class MappedSafetensors:
    """A file on a local disk."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            CheckpointError: it is truncated or not of this format.
            OSError: it cannot be read.
        """
        with path.open("rb") as stream:
            length = os.fstat(stream.fileno()).st_size
            size = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            start = LENGTH_BYTES + size
            if length < start or size > MAX_HEADER_BYTES:
                truncated(path, f"a header of {counted(size, 'byte')} in a file of {length}")
            self.tensors, stop = _parse(path, stream.read(size), start)
            if stop != length:
                truncated(path, f"{counted(length, 'byte')}, where its header says {stop}")
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._bytes = np.frombuffer(mapped, np.uint8)

    def view(self, name: str) -> np.ndarray:
        """A tensor, not writable; none of its bytes are read yet."""
        entry = self.tensors[name]
        return self._bytes[entry.start : entry.stop].view(NUMPY_TYPES[entry.dtype]).reshape(entry.shape)


@dataclass(frozen=True)
class Entry:
    """A tensor's entry in a header: its bytes are [start, stop) of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def _parse(path: Location, header: bytes, start: int) -> tuple[dict[str, Entry], int]:
    """The tensors, and where the last one ends. start: where the header does."""
    tensors: dict[str, Entry] = {}
    try:
        for name, entry in json.loads(header, object_pairs_hook=_once).items():
            if name == METADATA:
                continue
            first, last = _counts(entry["data_offsets"])
            if not isinstance(kind := entry["dtype"], str):
                raise ValueError(f"{str(kind)[:80]} where the name of a dtype is expected")
            tensors[name] = _checked(Entry(kind, _counts(entry["shape"]), start + first, start + last))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        truncated(path, f"{type(error).__name__}: {error}"[:300])
    stop = start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.stop)):
        if tensor.start != stop:
            truncated(path, "a header whose tensors overlap or leave gaps")
        stop = tensor.stop
    return tensors, stop


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, none of whose names stands twice: readers differ in which one they would take."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice in the header")
    return found


def _counts(values: Any) -> tuple[int, ...]:
    """Sizes or offsets: whole numbers from 0, below what 64 bits hold, no more of them than numpy has axes."""
    if not isinstance(values, list) or len(values) > MAX_AXES:
        raise ValueError(f"{str(values)[:80]} where a list of at most {MAX_AXES} whole numbers is expected")
    if not all(type(value) is int and 0 <= value < MAX_COUNT for value in values):
        raise ValueError(f"{str(values)[:80]} where whole numbers from 0 are expected")
    return tuple(values)


def _checked(entry: Entry) -> Entry:
    size = entry.stop - entry.start
    if size < 0:
        raise ValueError(f"a tensor that ends {-size} bytes before it starts")
    known = entry.dtype in NUMPY_TYPES
    if known and size != prod(entry.shape) * np.dtype(NUMPY_TYPES[entry.dtype]).itemsize:
        raise ValueError(f"{size} bytes for {entry.dtype} {list(entry.shape)}")
    return entry


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
    header, order = header_of(tensors, metadata)
    stream.write(header)
    for name in order:
        # As bytes: ml_dtypes' arrays have no buffer of their own kind.
        stream.write(np.ascontiguousarray(tensors[name].value()).reshape(-1).view(np.uint8).data)


def header_of(tensors: Mapping[str, TensorToWrite], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """All before the tensors' bytes, and the names in the order in which these follow, without gaps."""
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
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, order
