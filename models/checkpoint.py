"""Checkpoints in: an HF directory or a GGUF file, on a local disk or in a bucket, becomes a `Decoder`.

Loading never builds a decoder twice: its shape comes from `nnx.eval_shape`, and each stacked parameter is filled tensor
by tensor and then handed over, so that the peak of host memory is the result plus about one stacked parameter.

Nothing is guessed. Every tensor of the checkpoint has a place, every parameter is filled, or the load fails with the
list of those that do not fit.
"""

import os
from collections import defaultdict
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from models.config import ModelConfig
from models.decoder import Decoder
from models.export import save_pretrained as save_pretrained
from models.families import config_from_hf, layout_of
from models.ggufs import GgufSource, config_from_gguf, is_gguf, open_gguf
from models.hf_files import SafetensorsSource, read_json
from models.identity import CONFIG, locate_checkpoint
from models.identity import weights_digest as weights_digest
from models.sharding import box_of, parameter_sharding
from models.tensors import ROUTER_BIAS_FILE, Layout, TensorSlot, TensorSource, some, tensor_slots
from schemas.errors import CheckpointError
from schemas.object_path import ObjectPath, Place

FLOAT_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Buffers that old versions of transformers stored beside the weights; computed from the config, never trained.
HARMLESS_SUFFIXES = (".rotary_emb.inv_freq",)


def load_pretrained(
    path: str | os.PathLike[str] | ObjectPath, dtype: jnp.dtype | str | None = None, mesh: Mesh | None = None
) -> Decoder:
    """The decoder of a checkpoint.

    Args:
        path: an HF directory (config.json and safetensors) or a .gguf file: a local path or a URL.
        dtype: of the parameters. None: the narrowest that holds all the checkpoint's tensors without rounding;
            a quantised GGUF gives float32.
        mesh: where its parameters are put (sharding.py); a process loads what its own devices hold, and of a tensor of
            which they hold nothing it reads nothing. None: one device.
    """
    where = locate_checkpoint(path)
    source: TensorSource
    if is_gguf(where):
        reader = open_gguf(where)
        config = config_from_gguf(reader, where)
        source = GgufSource(reader, config, where)
    else:
        config = _config_of_directory(where)
        source = SafetensorsSource(where)
    try:
        own = jnp.dtype(dtype) if dtype is not None else _own_dtype(source, config)
        return fill_decoder(config, source, own, mesh)
    finally:
        source.close()


def read_config(path: str | os.PathLike[str] | ObjectPath) -> ModelConfig:
    """What `load_pretrained` would build, without reading weights."""
    where = locate_checkpoint(path)
    return config_from_gguf(open_gguf(where), where) if is_gguf(where) else _config_of_directory(where)


def _config_of_directory(directory: Place) -> ModelConfig:
    """What config.json says, with biases of routers where a file of them lies beside it."""
    config = config_from_hf(read_json(directory / CONFIG), directory / CONFIG)
    if not (directory / ROUTER_BIAS_FILE).exists():
        return config
    if config.moe is None or config.moe.native_bias:
        raise CheckpointError(
            "router biases lie beside a checkpoint that has no use for them",
            {"file": directory / ROUTER_BIAS_FILE, "family": config.family},
            "remove the file",
        )
    return replace(config, moe=replace(config.moe, bias=True))


def fill_decoder(config: ModelConfig, source: TensorSource, dtype: jnp.dtype, mesh: Mesh | None = None) -> Decoder:
    """A decoder with the parameters of `source`, one stacked parameter at a time."""
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Decoder(config, dtype=dtype)))
    parameters = dict(nnx.to_flat_state(abstract))
    layout, slots = layout_of(config), defaultdict(list)
    for slot in tensor_slots(config, layout):
        slots[slot.path].append(slot)
    shapes = {path: value.shape for path, value in parameters.items()}
    _check_tensors(config, layout, source, shapes, slots)
    boxes = {path: _boxes(path, value, mesh) for path, value in parameters.items()}
    slots = {path: [slot for slot in slots[path] if _is_held(slot, boxes[path])] for path in parameters}
    source.announce([slot.name for path in parameters for slot in slots[path]])
    filled = [
        (path, value.replace(_fill(slots[path], path, value, source, mesh, boxes[path])))
        for path, value in parameters.items()
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))


Box = tuple[slice, ...]


def _boxes(path: tuple[Any, ...], like: Any, mesh: Mesh | None) -> list[Box]:
    """The parts of a parameter that this process's devices hold, each once."""
    if mesh is None:
        return [tuple(slice(0, size) for size in like.shape)]
    sharding = parameter_sharding(mesh, "/".join(map(str, path)), like.shape)
    found = sharding.addressable_devices_indices_map(like.shape).values()
    return list({str(box): box for box in (box_of(index, like.shape) for index in found)}.values())


def _is_held(slot: TensorSlot, boxes: list[Box]) -> bool:
    """Whether a tensor's place on the leading axes is in one of these."""
    return any(all(cut.start <= at < cut.stop for at, cut in zip(slot.index, box, strict=False)) for box in boxes)


def _fill(
    slots: list[TensorSlot], path: tuple[Any, ...], like: Any, source: TensorSource, mesh: Mesh | None, boxes: list[Box]
) -> jnp.ndarray:
    """One parameter, stacked over its repeats where it has any. Its own dtype: a router's bias is always float32.

    On the host are the parts of this process's devices, and one tensor at a time.
    """
    parts = {str(box): np.zeros([cut.stop - cut.start for cut in box], like.dtype) for box in boxes}
    for slot in slots:
        leading = len(slot.index)
        tensor = slot.load(source.read(slot.name), like.shape[leading:])
        for box in boxes:
            if _is_held(slot, [box]):
                place = tuple(at - cut.start for at, cut in zip(slot.index, box, strict=False))
                parts[str(box)][place] = tensor[box[leading:]]
    if mesh is None:
        return jnp.asarray(parts[str(boxes[0])])
    sharding = parameter_sharding(mesh, "/".join(map(str, path)), like.shape)
    return jax.make_array_from_callback(like.shape, sharding, lambda index: parts[str(box_of(index, like.shape))])


def _check_tensors(
    config: ModelConfig, layout: Layout, source: TensorSource, shapes: dict[Any, Any], slots: dict[Any, Any]
) -> None:
    if set(shapes) != set(slots):
        raise ValueError(f"tensor_slots does not cover the decoder: {set(shapes) ^ set(slots)}")
    expected: dict[str, tuple[int, ...]] = {}
    for path, group in slots.items():
        for slot in group:
            expected[slot.name] = slot.stored_shape(shapes[path][len(slot.index) :])
    found = {name: shape for name, shape in source.shapes.items() if not _is_foreign(name, layout)}
    if config.tie_embeddings and layout.head in found:
        _check_tied(source, layout)
        del found[layout.head]
    facts = {
        "missing": [name for name in expected if name not in found],
        "unknown": [name for name in found if name not in expected],
        "shape": [
            f"{name} is {list(found[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    }
    facts = {label: some(names) for label, names in facts.items() if names}
    if facts:
        raise CheckpointError(
            "the checkpoint's tensors are not those of its config",
            {"checkpoint": source.where, **facts},
            "check that config.json belongs to these weights, and that they are a whole causal language model",
        )
    _own_dtype(source, config)


def _is_foreign(name: str, layout: Layout) -> bool:
    return name.endswith(HARMLESS_SUFFIXES) or name.startswith(layout.foreign)


def _check_tied(source: TensorSource, layout: Layout) -> None:
    """Some files store the tied head as well; it is left out only if it is the embedding."""
    head, embed = source.read(layout.head), source.read(layout.embed)
    if head.shape != embed.shape or not np.array_equal(head, embed):
        raise CheckpointError(
            f"tie_word_embeddings is true, but {layout.head} differs from the embeddings",
            {"checkpoint": source.where},
            "set tie_word_embeddings to false in config.json if the head is a matrix of its own",
        )


def _own_dtype(source: TensorSource, config: ModelConfig) -> jnp.dtype:
    """The narrowest dtype that holds every tensor exactly; float16 beside bfloat16 gives float32.

    Biases of routers do not count: they are float32 everywhere, in files and here.
    """
    layout = layout_of(config)
    biases = {slot.name for slot in tensor_slots(config, layout) if slot.path[-1] == "router_bias"}
    kinds = {name: kind for name, kind in source.dtypes.items() if not _is_foreign(name, layout)}
    foreign = {kind: name for name, kind in kinds.items() if kind not in FLOAT_DTYPES}
    if foreign:
        raise CheckpointError(
            "the checkpoint has tensors of a dtype that is not supported",
            {
                "checkpoint": source.where,
                "found": some([f"{kind} ({name})" for kind, name in foreign.items()]),
                "expected": ", ".join(FLOAT_DTYPES),
            },
            "use a checkpoint that is not quantised, or a .gguf file",
        )
    dtypes = {FLOAT_DTYPES[kind] for name, kind in kinds.items() if name not in biases}
    return jnp.result_type(*(jnp.dtype(dtype) for dtype in dtypes or {"float32"}))
