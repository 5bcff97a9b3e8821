"""Where each tensor of an HF checkpoint lives in our stacked parameters.

Vocabulary: a *layout* is a family's names; a *slot* is one tensor of a checkpoint, or a part of one, and its place in a
decoder, a stacked parameter and an index on its leading axes; a *source* is an open checkpoint that reads a tensor by
its HF name (hf_files.py, ggufs.py). The slots are the only description of where things are: loading and saving both
follow them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np

from models.config import BlockKind, ModelConfig
from schemas.object_path import Place

WEIGHTS_NAME = "model.safetensors"
# Biases of routers of a family that has no place for them, float32 `[E]` for every block with experts. Other readers
# ignore the file and choose experts without it.
ROUTER_BIAS_FILE = "router_bias.safetensors"
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class Part:
    """Entries [start, stop) of `total` along an axis of a stored tensor that holds several parameters."""

    axis: int
    start: int
    stop: int
    total: int


@dataclass(frozen=True)
class BlockTensor:
    """One tensor, or with experts one for each of them, of every block.

    suffix: HF's name below the block's; `{e}` stands for the number of an expert.
    path: of the parameter below the block: `attention/q`.
    in_axes, part: see `TensorSlot`.
    """

    suffix: str
    path: str
    in_axes: int | None = None
    part: Part | None = None


@dataclass(frozen=True)
class Layout:
    """The names of a family's tensors.

    block_tensors: those of a block of some kind. block: the prefix of a block's names. head: stored as a linear map.
    foreign: prefixes of tensors that are no part of the language model.
    """

    block_tensors: Callable[[BlockKind], Sequence[BlockTensor]]
    embed: str = "model.embed_tokens.weight"
    block: str = "model.layers.{block}."
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    foreign: tuple[str, ...] = ()


@dataclass(frozen=True)
class TensorSlot:
    """One parameter, or one of its stack, and where a checkpoint has it.

    name: of the tensor, HF's.
    path: of the parameter in the decoder's nnx state.
    index: on the parameter's leading axes: its block's repeat, and where experts are stored one by one the expert.
    in_axes: how many leading axes of the parameter (behind `index`) the matrix product sums over: those are the
        *columns* of a stored `nn.Linear` weight. None: the tensor is stored as it is; vectors flat.
    part: which part of the tensor is this parameter; None: all of it.
    beside: it is kept in a file of its own, which only we read.
    """

    name: str
    path: tuple[str | int, ...]
    index: tuple[int, ...] = ()
    in_axes: int | None = None
    part: Part | None = None
    beside: bool = False

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape for a parameter of this shape (behind `index`)."""
        own = self._own_shape(shape)
        if self.part is None:
            return own
        return (*own[: self.part.axis], self.part.total, *own[self.part.axis + 1 :])

    def load(self, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Stored tensor -> parameter. A view where possible."""
        if self.part is not None:
            stored = stored[(slice(None),) * self.part.axis + (slice(self.part.start, self.part.stop),)]
        return (stored if self.in_axes is None else stored.T).reshape(shape)

    def store(self, parameter: np.ndarray) -> np.ndarray:
        """Parameter -> stored tensor, or its part: the inverse of `load`."""
        own = self._own_shape(parameter.shape)
        return parameter.reshape(own) if self.in_axes is None else parameter.reshape(own[::-1]).T

    def _own_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.in_axes is not None:
            return (prod(shape[self.in_axes :]), prod(shape[: self.in_axes]))
        is_vector = str(self.path[-1]).endswith(("norm", "bias"))
        return (prod(shape),) if is_vector else shape


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
                yield TensorSlot(name, path, index, tensor.in_axes, tensor.part)
        if kinds[block].moe and config.moe_config.bias and not config.moe_config.native_bias:
            path = ("groups", group, "blocks", place, "mlp", "router_bias")
            yield TensorSlot(f"{prefix}router_bias", path, (repeat,), beside=True)
    yield TensorSlot(layout.final_norm, ("final_norm",))
    if not config.tie_embeddings:
        yield TensorSlot(layout.head, ("head",), (), 1)


class TensorSource(Protocol):
    """An open checkpoint: tensors by HF name, in HF's layout. Close it: one in a bucket owns threads."""

    where: Place
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]  # safetensors' names: F32, BF16, ...

    def announce(self, names: Sequence[str]) -> None:
        """These will be read next, in this order: a source that is far away may fetch ahead."""
        ...

    def read(self, name: str) -> np.ndarray: ...

    def close(self) -> None: ...


def some(names: list[str], limit: int = 8) -> str:
    """The first few of a list, and how many more."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f", and {rest} more" if rest > 0 else "")
