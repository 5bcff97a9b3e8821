"""The gguf package's reader, with every count and length checked against the file before memory is allocated."""

import sys
from itertools import pairwise
from typing import Any

import gguf
import numpy as np
from gguf.gguf_reader import ReaderField

# What no file exceeds: the largest vocabulary in use has 262,144 tokens, with half a million merges.
MOST_FIELDS = 2**16
MOST_TENSORS = 2**20
MOST_ELEMENTS = 2**22  # of all arrays; each is an object of some 150 bytes to the package
MOST_STRING = 2**24
MOST_AXES = 4  # ggml's limit
# The fewest bytes of a key with its value, of a tensor's entry, and of an array's element.
FIELD_BYTES, TENSOR_BYTES = 13, 24
# All that the package raises for bytes that are no GGUF file, according to where.
DAMAGE = (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError, MemoryError, RecursionError, TypeError)


class AbsurdSize(ValueError):
    """A number in a header that no longer file would make right."""


class CheckedGguf(gguf.GGUFReader):
    """The header of a file, and its tensors memory-mapped.

    Raises:
        AbsurdSize: it names more of something than any model has. And the others of `DAMAGE`.
    """

    _elements = 0

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        self._need(offset, np.dtype(dtype).itemsize * int(count))
        return super()._get(offset, dtype, count, override_order)

    def _need(self, offset: int, size: int) -> None:
        if offset + size > len(self.data):
            raise ValueError(f"{size} bytes at byte {offset} are beyond the end")

    def _get_str(self, offset: int) -> Any:
        length = int(super()._get(offset, np.uint64)[0]) if offset + 8 <= len(self.data) else 0
        _bounded("bytes of a string", length, MOST_STRING)
        return super()._get_str(offset)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        self._elements += count
        _bounded("elements of arrays", self._elements, MOST_ELEMENTS)
        self._need(orig_offs + 12, count)
        kind = int(self._get(orig_offs, np.uint32)[0])
        if kind == gguf.GGUFValueType.STRING and count and self.byte_order == "I":
            return self._get_strings(orig_offs, count)
        if count and (dtype := self.gguf_scalar_to_np.get(gguf.GGUFValueType(kind))) is not None:
            return self._get_numbers(orig_offs, dtype, count)
        return super()._get_field_parts(orig_offs, raw_type)

    def _get_strings(self, start: int, count: int) -> Any:
        """`_get_field_parts` of an array of strings in this machine's byte order.

        The package's own takes four views of a memory map for each, with checks and all 10 s for 98,000 of them.
        """
        data, at = np.asarray(self.data), start + 12
        parts = [data[start : start + 4].view(np.uint32), data[start + 4 : at].view(np.uint64)]
        for _ in range(count):
            self._need(at, 8)
            length = int.from_bytes(data[at : at + 8].data, sys.byteorder)
            _bounded("bytes of a string", length, MOST_STRING)
            self._need(at + 8, length)
            parts += (data[at : at + 8], data[at + 8 : at + 8 + length])
            at += 8 + length
        kinds = [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING]
        return at - start, parts, list(range(3, len(parts), 2)), kinds

    def _get_numbers(self, start: int, dtype: Any, count: int) -> Any:
        """`_get_field_parts` of an array of numbers: one view instead of one each."""
        values = self._get(start + 12, dtype, count)
        parts = [self._get(start, np.uint32), self._get(start + 4, np.uint64), *values.reshape(-1, 1)]
        kind = gguf.GGUFValueType(int(parts[0][0]))
        return 12 + values.nbytes, parts, list(range(2, len(parts))), [gguf.GGUFValueType.ARRAY, kind]

    def _build_fields(self, offs: int, count: int) -> int:
        _bounded("keys", int(count), MOST_FIELDS)
        self._need(offs, int(count) * FIELD_BYTES)
        return super()._build_fields(offs, count)

    def _build_tensor_info(self, offs: int, count: int) -> Any:
        _bounded("tensors", int(count), MOST_TENSORS)
        self._need(offs, int(count) * TENSOR_BYTES)
        return super()._build_tensor_info(offs, count)

    def _get_tensor_info_field(self, orig_offs: int) -> ReaderField:
        field = super()._get_tensor_info_field(orig_offs)
        sizes = [int(size) for size in field.parts[3]]
        if not 1 <= len(sizes) <= MOST_AXES or 0 in sizes:
            raise AbsurdSize(f"the tensor {field.name[:80]} has the shape {sizes[:8]}")
        elements = 1
        for size in sizes:
            elements *= size
        _bounded(f"numbers in the tensor {field.name[:80]}", elements, 2**48)
        return field

    def _build_tensors(self, start_offs: int, fields: list[ReaderField]) -> None:
        """Check, as llama.cpp does, that no tensor begins inside another: one of the two would have wrong numbers."""
        super()._build_tensors(start_offs, fields)
        ordered = sorted(self.tensors, key=lambda tensor: tensor.data_offset)
        for before, tensor in pairwise(ordered):
            if tensor.data_offset < before.data_offset + before.n_bytes:
                raise AbsurdSize(f"the tensor {tensor.name[:80]} begins inside {before.name[:80]}")
        for tensor in ordered:
            if (tensor.data_offset - start_offs) % self.alignment:
                raise AbsurdSize(f"the tensor {tensor.name[:80]} begins at no multiple of {self.alignment} bytes")


def _bounded(what: str, found: int, most: int) -> None:
    if found > most:
        raise AbsurdSize(f"{found} {what}, where no model has more than {most}")
