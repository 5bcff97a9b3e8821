"""A GGUF file in a bucket: its header parsed by the gguf package, its tensors fetched by range reads."""

import tempfile
from typing import Any

import numpy as np
from gguf.gguf_reader import ReaderTensor

from distillcache.models.files.gguf.reader import DAMAGE, AbsurdSize, CheckedGguf
from distillcache.models.files.ranges import RemoteFile, Span
from distillcache.schemas.errors import CheckpointError
from distillcache.schemas.store.path import ObjectPath

FIRST_BYTES = 16 * 2**20  # more than the headers of nearly all files: 8 MB for Llama 3's vocabulary
MOST_BYTES = 2**30  # a longer header is damage


class RemoteGguf(CheckedGguf):
    """The reader of a header alone. The tensors' `data` have their dtypes and shapes, and all zeros: see `span`."""

    data_offset = MOST_BYTES  # until the end of the header is known

    def __init__(self, file: RemoteFile, header: bytes) -> None:
        self.file = file
        with tempfile.TemporaryFile() as stream:  # the reader maps a file
            stream.write(header)
            stream.flush()
            super().__init__(stream)  # pyright: ignore[reportArgumentType] - numpy.memmap takes open files

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        if offset < self.data_offset:
            return super()._get(offset, dtype, count, override_order)
        order = self.byte_order if override_order is None else override_order
        return np.broadcast_to(np.zeros((), np.dtype(dtype).newbyteorder(order)), (int(count),))

    def span(self, tensor: ReaderTensor) -> Span:
        """Return the byte range of a tensor."""
        return Span(self.file, tensor.data_offset, tensor.data_offset + tensor.n_bytes)

    @property
    def end(self) -> int:
        """The end of the last tensor; writers pad it to the alignment."""
        return max((self.span(tensor).stop for tensor in self.tensors), default=self.data_offset)

    def length(self) -> int:
        """The length of the whole file in bytes."""
        alignment = int(self.alignment)
        return self.file.length(-(-self.end // alignment) * alignment)


def open_remote(path: ObjectPath) -> RemoteGguf:
    """Read a file's header, and see that its tensors are all there.

    Raises:
        CheckpointError: there is no such file, or it is damaged or truncated.
    """
    file = RemoteFile(path)
    size = FIRST_BYTES
    while True:
        whole = not file.has(size)
        size = file.length(size) if whole else size
        try:
            reader = RemoteGguf(file, file.read(0, size))
        except DAMAGE as error:
            if isinstance(error, AbsurdSize) or whole or size >= MOST_BYTES:
                raise damaged(path, size, error) from error
            size *= 2
            continue
        if not file.has(reader.end):
            raise damaged(path, file.length(reader.end), f"its tensors end at byte {reader.end}")
        return reader


def damaged(path: object, size: int, found: object) -> CheckpointError:
    """The error for a file that is not whole."""
    return CheckpointError(
        "this GGUF file is truncated or damaged",
        {"file": path, "bytes": size, "found": str(found)[:300]},
        "copy or download the file again",
    )
