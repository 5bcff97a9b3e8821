"""Mapping of an HF checkpoint's tensors to positions in the stacked parameters.

Vocabulary: a *layout* is a family's names; a *slot* is one tensor of a checkpoint, or a part of one, and its place in a
decoder, a stacked parameter and an index on its leading axes; a *source* is an open checkpoint that reads a tensor by
its HF name (hf.py, files/gguf/file.py). The slots are the only description of where things are: loading and saving both
follow them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import jax
import numpy as np

from distillcache.models.config import BlockKind, ModelConfig
from distillcache.models.layers.mlp import Moe
from distillcache.models.layers.recurrent.gated_delta import GatedDelta
from distillcache.models.layers.recurrent.mamba import AttentionBesideMamba, Mamba2
from distillcache.schemas.store.path import Location

WEIGHTS_NAME = "model.safetensors"
# Biases of routers of a family that has no place for them, float32 `[E]` for every block with experts. Other readers
# ignore the file and choose experts without it.
ROUTER_BIAS_FILE = "router_bias.safetensors"
INDEX_NAME = "model.safetensors.index.json"
ROWS_AT_ONCE = 32
# Last names of parameters that are float32 in the decoder and in every pass, whatever the dtype, which they do not
# decide: small differences matter, or act over a whole document.
FLOAT32 = frozenset({*Moe.by_rule, *GatedDelta.float32, *Mamba2.float32, *AttentionBesideMamba.float32})

Box = tuple[slice, ...]  # a part of an array: a start and a stop on every axis, as numbers


@dataclass(frozen=True)
class TensorSlice:
    """Entries [start, stop) of `total` along an axis of a stored tensor that holds several parameters.

    step: entries of `step` parameters take turns along the whole axis: of this one are start, start + step, ...
    groups: the axis is this many equal runs, such as heads, and of each of them [start, stop) are this parameter's.
    """

    axis: int
    start: int
    stop: int
    total: int
    step: int = 1
    groups: int = 1

    @property
    def is_run(self) -> bool:
        """Tell whether its entries are neighbours."""
        return self.step == 1 and self.groups == 1

    @property
    def entries(self) -> tuple[slice | np.ndarray, ...]:
        """Its place in the tensor."""
        if self.groups == 1:
            own: slice | np.ndarray = slice(self.start, self.stop, self.step)
        else:
            own = np.arange(self.total).reshape(self.groups, -1)[:, self.start : self.stop].reshape(-1)
        return (*(slice(None),) * self.axis, own)

    def taken(self, stored: np.ndarray) -> np.ndarray:
        """Its entries, out of what was read for them: whole turns, or whole groups."""
        before = (slice(None),) * self.axis
        if self.step > 1:
            return stored[(*before, slice(self.start, None, self.step))]
        sizes, run = stored.shape, self.total // self.groups
        split = stored.reshape(*sizes[: self.axis], -1, run, *sizes[self.axis + 1 :])
        return split[(*before, slice(None), slice(self.start, self.stop))].reshape(
            *sizes[: self.axis], -1, *sizes[self.axis + 1 :]
        )

    def read_for(self, inside: slice) -> slice | None:
        """The entries of the tensor that are read for these of the parameter; None: no run of them."""
        if self.step > 1:
            return slice(self.step * inside.start, self.step * inside.stop)
        if self.groups == 1:
            return slice(self.start + inside.start, self.start + inside.stop)
        width, run = self.stop - self.start, self.total // self.groups
        if inside.start % width or inside.stop % width:
            return None
        return slice(inside.start // width * run, inside.stop // width * run)


@dataclass(frozen=True)
class BlockTensor:
    """One tensor, or with experts one for each of them, of every block.

    suffix: HF's name below the block's; `{e}` stands for the number of an expert.
    path: of the parameter below the block: `attention/q`.
    in_axes, part, depthwise, turned, ones: see `TensorSlot`.
    """

    suffix: str
    path: str
    in_axes: int | None = None
    part: TensorSlice | None = None
    depthwise: bool = False
    turned: bool = False
    ones: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class FusedExperts:
    """The experts of a block as three axes of two tensors, in files of a family that names them one by one here.

    prefix: of both below the block's name; `gate_up_proj` and `down_proj` follow. hidden, width: D and F of an expert.
    inputs_first: where the sizes do not tell, gate and up are `[E, D, 2 F]` and down `[E, F, D]`; else `[E, 2 F, D]`
        and `[E, D, F]`.
    """

    hidden: int
    width: int
    inputs_first: bool
    prefix: str = "mlp.experts."


@dataclass(frozen=True)
class Layout:
    """The names of a family's tensors.

    block_tensors: those of a block of some kind. block: the prefix of a block's names. head: its name;
        head_in_axes: see `TensorSlot`.
    foreign: prefixes of tensors that are no part of the language model. spellings: prefixes that names have in other
        files, and what stands for them here; endings: the same of what they end with. fused: files may have experts in
        this form. more: (name, parameter, `in_axes`) of others outside of blocks. recut: what tensors of a block end
        with, and their rows; files may have their rows, one tensor's behind the other's, cut elsewhere.
    """

    block_tensors: Callable[[BlockKind], Sequence[BlockTensor]]
    embed: str = "model.embed_tokens.weight"
    block: str = "model.layers.{block}."
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    head_in_axes: int | None = 1
    foreign: tuple[str, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()
    endings: tuple[tuple[str, str], ...] = ()
    recut: tuple[tuple[str, int], ...] = ()
    fused: FusedExperts | None = None
    more: tuple[tuple[str, str, int | None], ...] = ()


@dataclass(frozen=True)
class TensorSlot:
    """One parameter, or one of its stack, and its location in a checkpoint.

    name: of the tensor, HF's.
    path: of the parameter in the decoder's nnx state.
    index: on the parameter's leading axes: its block's repeat, and where experts are stored one by one the expert.
    in_axes: how many leading axes of the parameter (behind `index`) the matrix product sums over: those are the
        *columns* of a stored `nn.Linear` weight. None: the tensor is stored as it is; vectors flat.
    part: which part of the tensor is this parameter; None: all of it.
    beside: it is kept in a file of its own, which only we read.
    depthwise: the tensor is a depthwise convolution's, `[channels, 1, taps]`; the parameter has `[..., taps]`.
    turned: the tensor holds matrices, each of outputs by inputs; the parameter's last two axes are the other way round.
    ones: how many axes of one entry the tensor has in front of the parameter's, and behind them.
    """

    name: str
    path: tuple[str | int, ...]
    index: tuple[int, ...] = ()
    in_axes: int | None = None
    part: TensorSlice | None = None
    beside: bool = False
    depthwise: bool = False
    turned: bool = False
    ones: tuple[int, int] = (0, 0)

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape for a parameter of this shape (behind `index`)."""
        own = self._own_shape(shape)
        if self.part is None:
            return own
        return (*own[: self.part.axis], self.part.total, *own[self.part.axis + 1 :])

    def load(self, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Stored tensor, of a `part` that alone -> parameter. A view where possible.

        Args:
            stored: the tensor, or of it what `stored_box` says. shape: of the parameter, or of the box.
        """
        if self.part is not None and not self.part.is_run:
            stored = self.part.taken(stored)
        if self.turned:
            return stored.swapaxes(-1, -2).reshape(shape)
        return (stored if self.in_axes is None else stored.T).reshape(shape)

    def load_into(self, stored: np.ndarray, target: np.ndarray) -> None:
        """The same into memory that is there, contiguous. A few rows at a time: turning a matrix as a whole reads one
        number of every page (measured: 0.67 against 0.05 s for 140 MB)."""
        if self.turned and stored.ndim == 3:
            for matrix, into in zip(stored, target, strict=True):
                _turn(matrix, into)
        elif self.in_axes is None or stored.ndim != 2 or (self.part is not None and not self.part.is_run):
            target[...] = self.load(stored, target.shape)
        else:
            _turn(stored, target.reshape(stored.shape[::-1]))

    def stored_box(self, box: Box, shape: tuple[int, ...]) -> Box | None:
        """Which part of the stored tensor a box of the parameter is; None: it is no box there.

        Args:
            box: of the parameter, behind `index`, with numbers as starts and stops. shape: of the parameter there.
        """
        if self.in_axes is not None:
            columns = merged(box[: self.in_axes], shape[: self.in_axes])
            rows = merged(box[self.in_axes :], shape[self.in_axes :])
            found = (rows, columns)
        elif self.turned:
            found = (*box[:-2], box[-1], box[-2])
        elif any(self.ones):
            found = (*[slice(0, 1)] * self.ones[0], *box, *[slice(0, 1)] * self.ones[1])
        elif self.depthwise:
            found = (merged(box[:-1], shape[:-1]), slice(0, 1), box[-1])
        else:
            found = (merged(box, shape),) if self._own_shape(shape) != shape else box
        inside = None if self.part is None else found[self.part.axis]
        if self.part is None or inside is None:
            return _known(found)
        moved = self.part.read_for(inside)
        return _known((*found[: self.part.axis], moved, *found[self.part.axis + 1 :]))

    def store(self, parameter: np.ndarray) -> np.ndarray:
        """Parameter -> stored tensor, or its part: the inverse of `load`."""
        if self.turned:
            return parameter.swapaxes(-1, -2)
        own = self._own_shape(parameter.shape)
        return parameter.reshape(own) if self.in_axes is None else parameter.reshape(own[::-1]).T

    def _own_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.in_axes is not None:
            return (prod(shape[self.in_axes :]), prod(shape[: self.in_axes]))
        if self.depthwise:
            return (prod(shape[:-1]), 1, shape[-1])
        if self.turned:
            return (*shape[:-2], shape[-1], shape[-2])
        if any(self.ones):
            return (*[1] * self.ones[0], *shape, *[1] * self.ones[1])
        # Of attention a vector has an axis for heads; of experts, one for each of them, as in the files.
        is_vector = str(self.path[-1]).endswith(("norm", "bias")) and "mlp" not in self.path
        return (prod(shape),) if is_vector else shape


def _turn(stored: np.ndarray, target: np.ndarray) -> None:
    """A matrix into one whose axes are the other way round, a few rows at a time (see `TensorSlot.load_into`)."""
    for row in range(0, stored.shape[0], ROWS_AT_ONCE):
        target[:, row : row + ROWS_AT_ONCE] = stored[row : row + ROWS_AT_ONCE].T


def slice_on_host(value: jax.Array, index: tuple[int, ...]) -> np.ndarray:
    """One block's part of a stacked parameter. On a CPU a view, without a compiled program for every shape; of other
    devices' arrays the slice alone is copied."""
    devices = value.devices()
    if len(devices) == 1 and next(iter(devices)).platform == "cpu":
        return np.asarray(value)[index]
    return np.asarray(value[index])


def tensor_slots(config: ModelConfig, layout: Layout) -> Iterator[TensorSlot]:
    """Every tensor of an HF checkpoint of this config, in the order of the blocks; those of one tensor together."""
    yield TensorSlot(layout.embed, ("embed",))
    kinds = config.kinds
    for block, group, repeat, place in config.places():
        prefix = layout.block.format(block=block)
        for tensor in layout.block_tensors(kinds[block]):
            path = ("groups", group, "blocks", place, *tensor.path.split("/"))
            experts = range(config.moe_config.num_experts) if "{e}" in tensor.suffix else (None,)
            for expert in experts:
                index = (repeat,) if expert is None else (repeat, expert)
                name = prefix + tensor.suffix.format(e=expert)
                form = {"depthwise": tensor.depthwise, "turned": tensor.turned}
                yield TensorSlot(name, path, index, tensor.in_axes, tensor.part, **form, ones=tensor.ones)
        if kinds[block].moe and config.moe_config.bias and not config.moe_config.native_bias:
            path = ("groups", group, "blocks", place, "mlp", "router_bias")
            yield TensorSlot(f"{prefix}router_bias", path, (repeat,), beside=True)
    for name, parameter, in_axes in layout.more:
        yield TensorSlot(name, (parameter,), (), in_axes)
    yield TensorSlot(layout.final_norm, ("final_norm",))
    if not config.tie_embeddings:
        yield TensorSlot(layout.head, ("head",), (), layout.head_in_axes)


def whole(shape: Sequence[int]) -> Box:
    """All of an array."""
    return tuple(slice(0, size) for size in shape)


def merged(box: Box, shape: Sequence[int]) -> slice | None:
    """A box of these axes as a run of the one axis that they make up in C order; None: it is no run."""
    if any(axis.stop <= axis.start for axis in box):
        return slice(0, 0)
    first = last = 0
    for axis, size in zip(box, shape, strict=True):
        first, last = first * size + axis.start, last * size + axis.stop - 1
    return slice(first, last + 1) if last + 1 - first == prod(axis.stop - axis.start for axis in box) else None


def _known(box: tuple[slice | None, ...]) -> Box | None:
    found = tuple(axis for axis in box if axis is not None)
    return found if len(found) == len(box) else None


def hull(boxes: Sequence[Box]) -> Box:
    """The smallest box that holds all of these."""
    return tuple(
        slice(min(axis.start for axis in axes), max(axis.stop for axis in axes)) for axes in zip(*boxes, strict=True)
    )


def within(box: Box, outer: Box) -> Box:
    """A box as a box of one that holds it."""
    return tuple(
        slice(axis.start - whole.start, axis.stop - whole.start) for axis, whole in zip(box, outer, strict=True)
    )


class TensorSource(Protocol):
    """An open checkpoint: tensors by HF name, in HF's layout. Close it: one in a bucket owns threads."""

    where: Location
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]  # safetensors' names: F32, BF16, ...

    def announce(self, reads: Sequence[tuple[str, Box]]) -> None:
        """These parts of tensors will be read next, in this order: a source that is far away may fetch ahead."""
        ...

    def read(self, name: str, box: Box | None = None) -> np.ndarray:
        """A tensor, or this part of it, perhaps not writable."""
        ...

    def close(self) -> None: ...


def some(names: list[str], limit: int = 8) -> str:
    """The first few of a list, and how many more."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f", and {rest} more" if rest > 0 else "")
