"""Where each tensor of an HF checkpoint lives in our stacked parameters, and how its files are read.

Vocabulary: a *slot* is one tensor of a checkpoint and its place in a decoder, a stacked parameter and an index on its
leading axis; a *source* is an open checkpoint that reads a tensor by its HF name. The slots are the only description
of the layout: loading and saving both follow them.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from models.config import ModelConfig
from schemas.errors import CheckpointError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorSlot:
    """One tensor of a checkpoint, and its place in a decoder.

    name: HF's name.
    path: of the parameter in the decoder's nnx state.
    repeat: index on the parameter's leading axis, None for a parameter that is not stacked.
    in_axes: how many leading axes of the parameter (without the stack's) the matrix product sums over: those are
        the *columns* of a stored `nn.Linear` weight. None: the tensor is stored as it is, apart from its shape.
    """

    name: str
    path: tuple[str | int, ...]
    repeat: int | None
    in_axes: int | None

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The checkpoint's shape for a parameter of this shape (without the stack's axis)."""
        if self.in_axes is not None:
            return (prod(shape[self.in_axes :]), prod(shape[: self.in_axes]))
        return shape if self.path == ("embed",) else (prod(shape),)

    def load(self, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Stored tensor -> parameter. A view where possible."""
        return (stored if self.in_axes is None else stored.T).reshape(shape)

    def store(self, parameter: np.ndarray) -> np.ndarray:
        """Parameter -> stored tensor, contiguous: the inverse of `load`."""
        if self.in_axes is None:
            return np.ascontiguousarray(parameter.reshape(self.stored_shape(parameter.shape)))
        rows, columns = self.stored_shape(parameter.shape)
        return np.ascontiguousarray(parameter.reshape(columns, rows).T)


# A block's tensors: (HF suffix, path below the block, in_axes).
BLOCK_TENSORS: tuple[tuple[str, tuple[str, str], int | None], ...] = (
    ("input_layernorm.weight", ("attention", "norm"), None),
    ("self_attn.q_proj.weight", ("attention", "q"), 1),
    ("self_attn.k_proj.weight", ("attention", "k"), 1),
    ("self_attn.v_proj.weight", ("attention", "v"), 1),
    ("self_attn.o_proj.weight", ("attention", "o"), 2),
    ("post_attention_layernorm.weight", ("mlp", "norm"), None),
    ("mlp.gate_proj.weight", ("mlp", "gate"), 1),
    ("mlp.up_proj.weight", ("mlp", "up"), 1),
    ("mlp.down_proj.weight", ("mlp", "down"), 1),
)
ATTENTION_BIASES = tuple((f"self_attn.{x}_proj.bias", ("attention", f"{x}_bias"), None) for x in "qkvo")
MLP_BIASES = tuple((f"mlp.{x}_proj.bias", ("mlp", f"{x}_bias"), None) for x in ("gate", "up", "down"))


def tensor_slots(config: ModelConfig) -> Iterator[TensorSlot]:
    """Every tensor of an HF checkpoint of this config, in the order of the blocks."""
    yield TensorSlot("model.embed_tokens.weight", ("embed",), None, None)
    tensors = BLOCK_TENSORS + ATTENTION_BIASES * config.attention_bias + MLP_BIASES * config.mlp_bias
    first = 0
    for number, group in enumerate(config.layers):
        for repeat in range(group.repeats):
            for place in range(len(group.pattern)):
                layer = first + repeat * len(group.pattern) + place
                for suffix, path, in_axes in tensors:
                    full = ("groups", number, "blocks", place, *path)
                    yield TensorSlot(f"model.layers.{layer}.{suffix}", full, repeat, in_axes)
        first += group.repeats * len(group.pattern)
    yield TensorSlot("model.norm.weight", ("final_norm",), None, None)
    if not config.tie_embeddings:
        yield TensorSlot("lm_head.weight", ("head",), None, 1)


class TensorSource(Protocol):
    """An open checkpoint: tensors by HF name, in HF's layout."""

    where: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]  # safetensors' names: F32, BF16, ...

    def read(self, name: str) -> np.ndarray: ...


class SafetensorsSource:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` lists."""

    def __init__(self, directory: Path) -> None:
        self.where = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        for file in weight_files(directory):
            self._index(file)
        self._check_index()

    def read(self, name: str) -> np.ndarray:
        with _open_safetensors(self._files[name]) as tensors:
            return tensors.get_tensor(name)

    def _index(self, file: Path) -> None:
        with _open_safetensors(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a method of safe_open, not of a dict
                if name in self._files:
                    raise CheckpointError(
                        "a tensor is stored twice",
                        {"tensor": name, "found": f"in {self._files[name]} and in {file}"},
                        "remove the shard that does not belong to this checkpoint",
                    )
                view = tensors.get_slice(name)
                self._files[name] = file
                self.shapes[name], self.dtypes[name] = tuple(view.get_shape()), view.get_dtype()

    def _check_index(self) -> None:
        index = self.where / INDEX_NAME
        if (self.where / WEIGHTS_NAME).exists() or not index.exists():
            return
        listed = read_json(index)["weight_map"]
        misplaced = [name for name, file in listed.items() if self._files.get(name) != self.where / file]
        if misplaced:
            raise CheckpointError(
                "the shards do not hold what their index lists",
                {"index": index, "not found": some(misplaced)},
                "copy the checkpoint again",
            )


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors, by name. `model.safetensors` wins over an index, as in HF."""
    if (directory / WEIGHTS_NAME).exists():
        return [directory / WEIGHTS_NAME]
    if not (directory / INDEX_NAME).exists():
        raise _no_weights(directory)
    listed = read_json(directory / INDEX_NAME).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise CheckpointError(
            "the index of the shards has no weight_map",
            {"file": directory / INDEX_NAME, "expected": '{"weight_map": {tensor: file}}'},
            "copy the checkpoint again",
        )
    files = [directory / name for name in sorted(set(listed.values()))]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise CheckpointError(
            "shards of the checkpoint are missing",
            {"index": directory / INDEX_NAME, "missing": some(missing), "of": f"{len(files)} shards"},
            "copy the missing files beside the index",
        )
    return files


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint."""
    if not file.exists():
        raise CheckpointError(
            f"{file.name} is missing",
            {"directory": file.parent, "found": some(sorted(x.name for x in file.parent.iterdir())) or "nothing"},
            "name a directory as transformers' save_pretrained writes it, or a .gguf file",
        )
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{file.name} cannot be read as JSON", {"file": file, "found": error}, "copy the file again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{file.name} is not a JSON object", {"file": file, "found": type(value).__name__}, "copy the file again"
        )
    return value


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            "a weight file is damaged, truncated or not a safetensors file",
            {"file": file, "bytes": file.stat().st_size, "found": error},
            "copy the file again",
        ) from error


def _no_weights(directory: Path) -> CheckpointError:
    names = sorted(file.name for file in directory.iterdir())
    torch = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    ggufs = [name for name in names if name.endswith(".gguf")]
    step = "name a directory that has model.safetensors, or a .gguf file"
    if torch:
        step = "load it with transformers and save it again: save_pretrained writes safetensors (pickles are not read)"
    if ggufs:
        step = f"name the file itself: {directory / ggufs[0]}"
    return CheckpointError(
        "the checkpoint has no safetensors weights",
        {"directory": directory, "expected": f"{WEIGHTS_NAME} or {INDEX_NAME}", "found": some(names) or "nothing"},
        step,
    )


def some(names: list[str], limit: int = 8) -> str:
    """The first few of a list, and how many more."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f", and {rest} more" if rest > 0 else "")
