"""Checkpoints whose stored tensors differ from their layout: other names, or packed in few bits.

A *form* says of one tensor what is read of the file for a part of it, and how that becomes the part. Nothing but what
is requested is read, so such checkpoints load as others do, tensor by tensor into the devices' parts.

- MXFP4: 32 numbers share a power of two; each is one of 16 values in 4 bits, two to a byte, the first in the low half.
  Source: OCP Microscaling Formats (MX) v1.0, E2M1 elements with E8M0 scales. As gpt-oss stores it (the model card, and
  HF transformers `integrations/mxfp4.py`), the numbers run along what a product sums over, which is the last axis of
  the file's `X_blocks` and the axis before it in `X`. Exact in bfloat16.
- Experts stored together: of the fused tensors of a block's experts each matrix is read as if it lay alone.
- Rows of several tensors that are cut elsewhere: transformers joins some in memory, and saves as many equal parts.
- FP8: numbers of 8 bits (E4M3), and for every square of them, or for a whole matrix, a factor in `X_scale_inv`. Source:
  DeepSeek-V3 (arXiv 2412.19437), section 3.3; `weight_dequant` in its `inference/kernel.py`; HF transformers
  `integrations/finegrained_fp8.py`. Products are float32. Factors of activations are left out.
- Integers of 4 bits, eight to one of 32 in `X_packed`, the first in the lowest bits, each 8 too large; of every group
  of a row a factor in `X_scale`. Source: the format `pack-quantized` of compressed-tensors. Products are float32.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from distillcache.models.config import ModelConfig
from distillcache.models.files.tensors import ROWS_AT_ONCE, Box, FusedExperts, Layout, TensorSource, whole
from distillcache.schemas.errors import CheckpointError

log = logging.getLogger(__name__)

GROUP = 32  # numbers under one scale of MXFP4
E8M0_BIAS = 127
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # and with the highest bit of the four the same, negative
VALUES = np.array([*E2M1, *(-value for value in E2M1)], np.float32)
# Of a byte its two numbers, side by side as one of 8 bytes (measured: 0.05 against 0.21 s for 33 MB of bfloat16).
PAIRS = np.ascontiguousarray(VALUES[np.stack([np.arange(256) & 15, np.arange(256) >> 4], 1)]).view(np.uint64)[:, 0]
BLOCKS, SCALES, INVERSE = "_blocks", "_scales", "_scale_inv"
FP8_TYPES = ("F8_E4M3",)
PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"  # of integers
INTEGERS, MIDDLE = 8, 8  # of one of 32 bits; what stands for 0
OF_ACTIVATIONS = "activation_scale"


class Form(Protocol):
    """The storage of one tensor. shape and dtype: of the unpacked result."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    def reads(self, box: Box) -> list[tuple[str, Box]]:
        """Return the parts of stored tensors that make up this part."""
        ...

    def part(self, stored: Sequence[np.ndarray], box: Box) -> np.ndarray:
        """The part, of these."""
        ...


@dataclass(frozen=True)
class Renamed:
    """As it is, under another name; with a smaller shape, its first rows."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def reads(self, box: Box) -> list[tuple[str, Box]]:
        return [(self.name, box)]

    def part(self, stored: Sequence[np.ndarray], box: Box) -> np.ndarray:
        return stored[0]


@dataclass(frozen=True)
class Mxfp4:
    """`[E, D, F]` of blocks `[E, F, D / 32, 16]` and scales `[E, F, D / 32]`, both bytes."""

    blocks: str
    scales: str
    shape: tuple[int, ...]
    dtype: str = "BF16"

    def reads(self, box: Box) -> list[tuple[str, Box]]:
        experts, rows, columns = box
        groups = slice(rows.start // GROUP, -(-rows.stop // GROUP))
        return [
            (self.blocks, (experts, columns, groups, slice(0, GROUP // 2))),
            (self.scales, (experts, columns, groups)),
        ]

    def part(self, stored: Sequence[np.ndarray], box: Box) -> np.ndarray:
        """One expert after the other: the numbers are float32 for a while."""
        _, rows, columns = box
        first = rows.start // GROUP * GROUP
        cut = slice(rows.start - first, rows.stop - first)
        size = (stored[0].shape[0], rows.stop - rows.start, columns.stop - columns.start)
        found = np.empty(size, ml_dtypes.bfloat16)
        for expert, (blocks, scales) in enumerate(zip(*stored, strict=True)):
            values = unpack_mxfp4(blocks, scales)[:, cut].astype(found.dtype)
            for row in range(0, len(values), ROWS_AT_ONCE):
                found[expert, :, row : row + ROWS_AT_ONCE] = values[row : row + ROWS_AT_ONCE].T
        return found


@dataclass(frozen=True)
class BlockFp8:
    """`[O, I]` of as many codes, and of scales one for each square of `block` numbers; or `[E, O, I]`."""

    codes: str
    scales: str
    shape: tuple[int, ...]
    block: tuple[int, ...]
    dtype: str = "F32"

    def reads(self, box: Box) -> list[tuple[str, Box]]:
        squares = tuple(
            slice(axis.start // size, -(-axis.stop // size)) for axis, size in zip(box, self.block, strict=True)
        )
        return [(self.codes, box), (self.scales, squares)]

    def part(self, stored: Sequence[np.ndarray], box: Box) -> np.ndarray:
        codes, scales = stored
        for axis, (run, size) in enumerate(zip(box, self.block, strict=True)):
            scales = np.take(scales, np.arange(run.start, run.stop) // size - run.start // size, axis=axis)
        return codes.astype(np.float32) * scales


@dataclass(frozen=True)
class MatrixFp8:
    """Codes with one factor, or with an axis of experts one for each of them."""

    codes: str
    scale: str
    shape: tuple[int, ...]
    scale_shape: tuple[int, ...]
    dtype: str = "F32"

    def reads(self, box: Box) -> list[tuple[str, Box]]:
        """See `Form`."""
        return [(self.codes, box), (self.scale, whole(self.scale_shape))]

    def part(self, stored: Sequence[np.ndarray], box: Box) -> np.ndarray:
        """See `Form`."""
        codes, scale = stored
        factors = scale.astype(np.float32).reshape(-1, *(1,) * (len(self.shape) - 1))
        return codes.astype(np.float32) * (factors if len(factors) == 1 else factors[box[0]])


@dataclass(frozen=True)
class PackedInts:
    """`[O, I]` of `[O, I / 8]` integers of 32 bits, and a factor for every `group` numbers of a row."""

    packed: str
    scale: str
    shape: tuple[int, ...]
    group: int
    dtype: str = "F32"

    def reads(self, box: Box) -> list[tuple[str, Box]]:
        """See `Form`."""
        rows, columns = box
        return [
            (name, (rows, slice(columns.start // size, -(-columns.stop // size))))
            for name, size in ((self.packed, INTEGERS), (self.scale, self.group))
        ]

    def part(self, stored: Sequence[np.ndarray], box: Box) -> np.ndarray:
        """See `Form`."""
        packed, scale = stored
        columns = np.arange(box[1].start, box[1].stop)
        places = columns // INTEGERS - box[1].start // INTEGERS
        bits = packed.astype(np.uint32)[:, places] >> (4 * (columns % INTEGERS)).astype(np.uint32)
        values = (bits & 15).astype(np.float32) - np.float32(MIDDLE)
        return values * scale.astype(np.float32)[:, columns // self.group - box[1].start // self.group]


class UnpackedSource:
    """A checkpoint in which some tensors have a form; the others are as they are."""

    def __init__(self, source: TensorSource, forms: Mapping[str, Form], hidden: frozenset[str]) -> None:
        """
        Args:
            hidden: stored tensors of which forms are made.
        """
        self.where, self._source, self._forms = source.where, source, forms
        seen = [name for name in source.shapes if name not in hidden]
        self.shapes = {name: source.shapes[name] for name in seen} | {n: form.shape for n, form in forms.items()}
        self.dtypes = {name: source.dtypes[name] for name in seen} | {n: form.dtype for n, form in forms.items()}

    def announce(self, reads: Sequence[tuple[str, Box]]) -> None:
        """See `TensorSource`."""
        self._source.announce([read for name, box in reads for read in self._reads(name, box)])

    def read(self, name: str, box: Box | None = None) -> np.ndarray:
        """A tensor or a part of it."""
        box = whole(self.shapes[name]) if box is None else box
        stored = [self._source.read(*read) for read in self._reads(name, box)]
        form = self._forms.get(name)
        return stored[0] if form is None else form.part(stored, box)

    def close(self) -> None:
        """See `TensorSource`."""
        self._source.close()

    def _reads(self, name: str, box: Box) -> list[tuple[str, Box]]:
        form = self._forms.get(name)
        return [(name, box)] if form is None else form.reads(box)


@dataclass(frozen=True)
class OfFused:
    """One expert's matrix `[out, in]`, out of a tensor of all of them.

    first: its first row among the outputs. turned: the tensor has inputs before outputs.
    """

    name: str
    expert: int
    first: int
    shape: tuple[int, ...]
    dtype: str
    turned: bool

    def reads(self, box: Box) -> list[tuple[str, Box]]:
        """See `Form`."""
        rows, columns = slice(self.first + box[0].start, self.first + box[0].stop), box[1]
        inner = (columns, rows) if self.turned else (rows, columns)
        return [(self.name, (slice(self.expert, self.expert + 1), *inner))]

    def part(self, stored: Sequence[np.ndarray], box: Box) -> np.ndarray:
        """See `Form`."""
        return stored[0][0].T if self.turned else stored[0][0]


@dataclass(frozen=True)
class Recut:
    """Rows from `first` on of these tensors `(name, rows)`, one behind the other."""

    stored: tuple[tuple[str, int], ...]
    first: int
    shape: tuple[int, ...]
    dtype: str

    def reads(self, box: Box) -> list[tuple[str, Box]]:
        """See `Form`."""
        found, before = [], self.first
        for name, rows in self.stored:
            start, stop = max(box[0].start + before, 0), min(box[0].stop + before, rows)
            if start < stop:
                found.append((name, (slice(start, stop), *box[1:])))
            before -= rows
        return found

    def part(self, stored: Sequence[np.ndarray], box: Box) -> np.ndarray:
        """See `Form`."""
        return np.concatenate(stored)


def unpacked(source: TensorSource, layout: Layout, quantization: Mapping[str, Any] | None) -> TensorSource:
    """The checkpoint with the names of the layout, and numbers in place of codes.

    Args:
        quantization: the `quantization_config` of its config.json, where it has one that the families accept.

    Raises:
        CheckpointError: a packed tensor lacks its scales.
    """
    forms: dict[str, Form] = {}
    source = _with_numbers(source, layout, quantization or {})
    for name, form in _forms(source, layout, quantization or {}):
        forms[_spelled(name, layout)] = form
    hidden = {name for form in forms.values() for name, _ in form.reads(whole(form.shape))}
    if forms and quantization:  # beside them: factors of activations, and sizes of packed matrices
        beside = {form.packed.removesuffix(PACKED) + SHAPE for form in forms.values() if isinstance(form, PackedInts)}
        hidden |= {name for name in source.shapes if name in beside or name.endswith(OF_ACTIVATIONS)}
    for name in source.shapes:
        if name not in hidden and _spelled(name, layout) != name:
            forms[_spelled(name, layout)] = Renamed(name, source.shapes[name], source.dtypes[name])
            hidden.add(name)
    return UnpackedSource(source, forms, frozenset(hidden)) if forms else source


def _with_numbers(source: TensorSource, layout: Layout, quantization: Mapping[str, Any]) -> TensorSource:
    """The checkpoint with numbers in place of the FP8 codes of experts that are stored together, which have a form of
    their own then."""
    block = quantization.get("weight_block_size") or []
    if layout.fused is None or len(block) != 2:
        return source
    forms = {}
    for name, shape in source.shapes.items():
        if len(shape) == 3 and source.dtypes[name] in FP8_TYPES and not name.startswith(layout.foreign):
            squares = (shape[0], *(-(-size // side) for size, side in zip(shape[1:], block, strict=True)))
            _check_scales(source, name, name + INVERSE, squares)
            forms[name] = BlockFp8(name, name + INVERSE, shape, (1, *block))
    return UnpackedSource(source, forms, frozenset(form.scales for form in forms.values())) if forms else source


def unpack_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Bytes `[..., G, 16]` and `[..., G]` to float32 `[..., 32 G]`."""
    values = np.take(PAIRS, blocks).view(np.float32)
    values *= np.ldexp(np.float32(1), scales.astype(np.int32) - E8M0_BIAS)[..., None]
    return values.reshape(*blocks.shape[:-2], -1)


def _forms(source: TensorSource, layout: Layout, quantization: Mapping[str, Any]) -> Iterator[tuple[str, Form]]:
    block: list[int] = quantization.get("weight_block_size") or []
    group = _group_of(quantization)
    for name, shape in source.shapes.items():
        if name.startswith(layout.foreign):
            continue
        stem = name.removesuffix(BLOCKS)
        if name.endswith(BLOCKS) and len(shape) == 4:
            _check_scales(source, name, stem + SCALES, shape[:-1])
            experts, columns, groups, _ = shape
            yield stem, Mxfp4(name, stem + SCALES, (experts, groups * GROUP, columns))
        elif len(block) == len(shape) == 2 and source.dtypes[name] in FP8_TYPES:
            squares = tuple(-(-size // side) for size, side in zip(shape, block, strict=True))
            _check_scales(source, name, name + INVERSE, squares)
            yield name, BlockFp8(name, name + INVERSE, shape, (block[0], block[1]))
        elif not block and source.dtypes[name] in FP8_TYPES and source.shapes.get(name + INVERSE) is not None:
            scales = source.shapes[name + INVERSE]
            if np.prod(scales, dtype=int) != 1:
                _check_scales(source, name, name + INVERSE, (shape[0], *(1,) * (len(scales) - 1)))
            yield name, MatrixFp8(name, name + INVERSE, shape, scales)
        elif group and name.endswith(PACKED) and len(shape) == 2:
            stem = name.removesuffix(PACKED)
            groups = source.shapes.get(stem + SCALE, (0, 0))[-1]
            _check_scales(source, name, stem + SCALE, (shape[0], -(-shape[1] * INTEGERS // group)))
            yield stem, PackedInts(name, stem + SCALE, (shape[0], min(shape[1] * INTEGERS, groups * group)), group)
        elif layout.fused is not None and len(shape) == 3:
            yield from _experts(source, name, layout.fused)
        elif layout.recut and name.endswith(layout.recut[0][0]):
            yield from _recut(source, name.removesuffix(layout.recut[0][0]), layout.recut)


def _group_of(quantization: Mapping[str, Any]) -> int:
    """Numbers under one factor of packed integers; 0 where there are none."""
    groups = quantization.get("config_groups") or {}
    return next((int(group["weights"]["group_size"]) for group in groups.values()), 0)


def _experts(source: TensorSource, name: str, fused: FusedExperts) -> Iterator[tuple[str, Form]]:
    """The matrices of every expert in a tensor of that name and of these sizes; of another tensor none."""
    experts, *sizes = source.shapes[name]
    matrices = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    stem, prefix, last = name.rpartition(fused.prefix)
    if not prefix or last not in matrices:
        return
    of_one = (fused.width, fused.hidden) if last == "gate_up_proj" else (fused.hidden, fused.width)
    plain = [len(matrices[last]) * of_one[0], of_one[1]]
    if sizes not in (plain, plain[::-1]):
        return  # its name is unknown then, and the error names its shape
    turned = fused.inputs_first if plain == plain[::-1] else sizes != plain
    for expert in range(experts):
        for place, matrix in enumerate(matrices[last]):
            form = OfFused(name, expert, place * of_one[0], of_one, source.dtypes[name], turned)
            yield f"{stem}{prefix}{expert}.{matrix}.weight", form


def _recut(source: TensorSource, stem: str, wanted: Sequence[tuple[str, int]]) -> Iterator[tuple[str, Form]]:
    """The tensors of a block whose rows are cut elsewhere; none where they are not, or are not as many."""
    names, sizes = [stem + ending for ending, _ in wanted], [rows for _, rows in wanted]
    shapes = [source.shapes.get(name, (0,)) for name in names]
    found = [shape[0] for shape in shapes]
    if found == sizes or sum(found) != sum(sizes) or len({shape[1:] for shape in shapes}) > 1:
        return
    for place, (name, rows) in enumerate(zip(names, sizes, strict=True)):
        stored, shape = tuple(zip(names, found, strict=True)), (rows, *shapes[0][1:])
        yield name, Recut(stored, sum(sizes[:place]), shape, source.dtypes[name])


def without_padding(source: TensorSource, layout: Layout, config: ModelConfig) -> TensorSource:
    """Leave out the rows that embedding and head have behind the config's `vocab_size`, which no id names; with a note
    on standard error. A matrix that differs from the config in another way too stays as it is."""
    names = [layout.embed, *([layout.head] if layout.head_in_axes == 1 else [])]
    size = (config.vocab_size, config.hidden_size)
    longer = {
        name: shape[0]
        for name in names
        if len(shape := source.shapes.get(name, ())) == 2 and shape[0] > size[0] and shape[1] == size[1]
    }
    if not longer:
        return source
    log.info(
        f"note: {source.where}: {' and '.join(f'{name} has {rows:,} rows' for name, rows in longer.items())}, "
        f"vocab_size in config.json is {size[0]:,}; the rows behind it are padding and left out"
    )
    return UnpackedSource(source, {name: Renamed(name, size, source.dtypes[name]) for name in longer}, frozenset())


def _check_scales(source: TensorSource, name: str, scales: str, expected: tuple[int, ...]) -> None:
    found = source.shapes.get(scales)
    if found != expected:
        raise CheckpointError(
            "the scales of a packed tensor are missing, or of another shape",
            {"checkpoint": source.where, "tensor": name, "scales": scales, "found": found, "expected": list(expected)},
            "check quantization_config in config.json, or copy the checkpoint again",
        )


def _spelled(name: str, layout: Layout) -> str:
    for theirs, ours in layout.spellings:
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
            break
    for theirs, ours in layout.endings:
        if name.endswith(theirs):
            return name.removesuffix(theirs) + ours
    return name
