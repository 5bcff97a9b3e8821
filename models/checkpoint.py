"""Checkpoints in and out: an HF directory or a GGUF file becomes a `Decoder`, a `Decoder` an HF directory.

Loading never builds a decoder twice: its shape comes from `nnx.eval_shape`, and each stacked parameter is filled tensor
by tensor and then handed over, so that the peak of host memory is the result plus about one stacked parameter.

Nothing is guessed. Every tensor of the checkpoint has a place, every parameter is filled, or the load fails with the
list of those that do not fit.
"""

import json
import os
import shutil
import uuid
from collections import defaultdict
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import xxhash
from flax import nnx
from safetensors.numpy import save_file

from models.config import ModelConfig
from models.decoder import Decoder
from models.families import config_from_hf, config_to_hf, exported_layout_of, layout_of
from models.ggufs import GgufSource, config_from_gguf, open_gguf
from models.tensors import (
    INDEX_NAME,
    ROUTER_BIAS_FILE,
    WEIGHTS_NAME,
    Layout,
    SafetensorsSource,
    TensorSlot,
    TensorSource,
    read_json,
    some,
    tensor_slots,
    weight_files,
)
from models.tokenizer import TOKENIZER_FILES, TextTokenizer, write_tokenizer
from schemas.errors import CheckpointError, StorageError

# transformers' own limit of a shard until version 5; a file below it can be copied by every tool.
SHARD_BYTES = 5_000_000_000
DIGEST_CHUNK_BYTES = 16 * 2**20
# In the safetensors metadata: `format` is what transformers asks for, `producer` is how we know our own exports.
FILE_METADATA = {"format": "pt"}  # one key only: safetensors writes several in no fixed order
PRODUCER = "distillcache"  # in config.json: by this an export of ours is known
FLOAT_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Buffers that old versions of transformers stored beside the weights; computed from the config, never trained.
HARMLESS_SUFFIXES = (".rotary_emb.inv_freq",)


def load_pretrained(path: str | os.PathLike[str], dtype: jnp.dtype | str | None = None) -> Decoder:
    """The decoder of a checkpoint.

    Args:
        path: an HF directory (config.json and safetensors) or a .gguf file.
        dtype: of the parameters. None: the narrowest that holds all the checkpoint's tensors without rounding;
            a quantised GGUF gives float32.
    """
    where = _local(path)
    source: TensorSource
    if where.is_file():
        reader = open_gguf(where)
        config = config_from_gguf(reader, where)
        source = GgufSource(reader, config, where)
    else:
        config = _config_of_directory(where)
        source = SafetensorsSource(where)
    own = jnp.dtype(dtype) if dtype is not None else _own_dtype(source, config)
    return fill_decoder(config, source, own)


def read_config(path: str | os.PathLike[str]) -> ModelConfig:
    """What `load_pretrained` would build, without reading weights."""
    where = _local(path)
    if where.is_file():
        return config_from_gguf(open_gguf(where), where)
    return _config_of_directory(where)


def _config_of_directory(directory: Path) -> ModelConfig:
    """What config.json says, with biases of routers where a file of them lies beside it."""
    config = config_from_hf(read_json(directory / "config.json"), directory / "config.json")
    if not (directory / ROUTER_BIAS_FILE).exists():
        return config
    if config.moe is None or config.moe.native_bias:
        raise CheckpointError(
            "router biases lie beside a checkpoint that has no use for them",
            {"file": directory / ROUTER_BIAS_FILE, "family": config.family},
            "remove the file",
        )
    return replace(config, moe=replace(config.moe, bias=True))


def weights_digest(path: str | os.PathLike[str]) -> str:
    """xxh3-128 of a checkpoint's content, in hex: config.json and the weight files in order, or the GGUF file.

    Names do not count, except that shards are taken in the order of theirs. The same weights sharded otherwise have
    another digest.
    """
    where = _local(path)
    files = [where] if where.is_file() else [where / "config.json", *weight_files(where)]
    if not where.is_file():
        read_json(where / "config.json")
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(file.stat().st_size.to_bytes(8, "little"))
        with file.open("rb") as stream:
            while chunk := stream.read(DIGEST_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def fill_decoder(config: ModelConfig, source: TensorSource, dtype: jnp.dtype) -> Decoder:
    """A decoder with the parameters of `source`, one stacked parameter at a time."""
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Decoder(config, dtype=dtype)))
    parameters = dict(nnx.to_flat_state(abstract))
    layout, slots = layout_of(config), defaultdict(list)
    for slot in tensor_slots(config, layout):
        slots[slot.path].append(slot)
    shapes = {path: value.shape for path, value in parameters.items()}
    _check_tensors(config, layout, source, shapes, slots)
    filled = [(path, value.replace(_fill(slots[path], value, source))) for path, value in parameters.items()]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _fill(slots: list[TensorSlot], like: Any, source: TensorSource) -> jnp.ndarray:
    """One parameter, stacked over its repeats where it has any. Its own dtype: a router's bias is always float32."""
    out = np.zeros(like.shape, like.dtype)
    for slot in slots:
        place = out[slot.index]
        place[...] = slot.load(source.read(slot.name), place.shape)
    return jnp.asarray(out)


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


def save_pretrained(
    decoder: Decoder,
    path: str | os.PathLike[str],
    *,
    tokenizer_from: str | os.PathLike[str] | TextTokenizer | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write an HF directory, whole or not at all: into a temporary sibling, which is then renamed.

    Args:
        path: the directory to make. One made by an earlier export is replaced; any other that is not empty is refused.
        tokenizer_from: a tokenizer, or the HF directory, tokenizer.json or .gguf file whose tokenizer goes along.
        shard_bytes: above this size the weights are split into shards with an index.
    """
    target = _local(path, must_exist=False)
    _check_target(target)
    staging = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise StorageError(
            "a checkpoint cannot be written here", {"path": target, "cause": error}, "name a folder that can be written"
        ) from error
    try:
        _write_weights(decoder, staging, shard_bytes)
        config = config_to_hf(decoder.config, str(decoder.embed[...].dtype))
        if tokenizer_from is not None:
            given = tokenizer_from if isinstance(tokenizer_from, TextTokenizer) else _local(tokenizer_from)
            config |= write_tokenizer(given, staging)
        config["producer"] = PRODUCER
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _publish(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_weights(decoder: Decoder, directory: Path, shard_bytes: int) -> None:
    parameters = dict(nnx.to_flat_state(nnx.state(decoder, nnx.Param)))
    tensors: dict[str, list[TensorSlot]] = defaultdict(list)
    beside: dict[str, list[TensorSlot]] = defaultdict(list)
    for slot in tensor_slots(decoder.config, exported_layout_of(decoder.config)):
        (beside if slot.beside else tensors)[slot.name].append(slot)
    if beside:
        _write_file(directory / ROUTER_BIAS_FILE, list(beside.values()), parameters)
    shards = _plan_shards(tensors, parameters, shard_bytes)
    names: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        written = _write_file(directory / file, shard, parameters)
        names |= dict.fromkeys(written, file)
        total += sum(written.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(file: Path, tensors: list[list[TensorSlot]], parameters: dict[Any, Any]) -> dict[str, int]:
    """One safetensors file of these tensors, each by its slots; their bytes by name."""
    stored = {slots[0].name: _stored(slots, parameters) for slots in tensors}
    try:
        save_file(stored, file, metadata=FILE_METADATA)
    except (safetensors.SafetensorError, OSError) as error:
        raise StorageError(
            "the weights cannot be written",
            {"file": file.parent.parent / file.name, "cause": error},
            "free some space or name another place; nothing was kept",
        ) from error
    # safetensors makes files that only their owner reads; an export is as open as its directory.
    file.chmod(file.parent.stat().st_mode & 0o666)
    return {name: tensor.nbytes for name, tensor in stored.items()}


def _stored(slots: list[TensorSlot], parameters: dict[Any, Any]) -> np.ndarray:
    """One tensor, contiguous, of its slots: several where parameters are stored as one."""
    parts = [slot.store(np.asarray(parameters[slot.path].get_value()[slot.index])) for slot in slots]
    part = slots[0].part
    return np.ascontiguousarray(parts[0] if part is None else np.concatenate(parts, part.axis))


def _plan_shards(
    tensors: dict[str, list[TensorSlot]], parameters: dict[Any, Any], shard_bytes: int
) -> list[list[list[TensorSlot]]]:
    """The slots of every tensor, in order, cut where the next tensor would not fit; a larger one has its own shard."""
    shards: list[list[list[TensorSlot]]] = [[]]
    used = 0
    for slots in tensors.values():
        slots.sort(key=lambda slot: slot.part.start if slot.part else 0)
        size = sum(_slot_bytes(slot, parameters) for slot in slots)
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(slots)
        used += size
    return shards


def _slot_bytes(slot: TensorSlot, parameters: dict[Any, Any]) -> int:
    value = parameters[slot.path].get_value()
    return value.nbytes // prod(value.shape[: len(slot.index)])


def _check_target(target: Path) -> None:
    if not target.exists() or (target.is_dir() and (not any(target.iterdir()) or _is_ours(target))):
        return
    raise CheckpointError(
        "the target of an export exists and was not made by an export",
        {
            "target": target,
            "found": some(sorted(x.name for x in target.iterdir())) if target.is_dir() else "a file",
        },
        "name another directory, or remove this one",
    )


def _is_ours(directory: Path) -> bool:
    """An export of ours has our mark in its config, and nothing beside what we write."""
    weights = sorted(directory.glob("model*.safetensors"))
    known = {"config.json", INDEX_NAME, ROUTER_BIAS_FILE, *TOKENIZER_FILES, *(file.name for file in weights)}
    if not weights or any(file.name not in known for file in directory.iterdir()):
        return False
    try:
        return json.loads((directory / "config.json").read_text(encoding="utf-8")).get("producer") == PRODUCER
    except (OSError, ValueError, AttributeError):
        return False


def _publish(staging: Path, target: Path) -> None:
    """Rename into place. An earlier export steps aside first: a directory cannot be replaced by one rename."""
    if target.exists() and any(target.iterdir()):
        aside = staging.with_name(f"{staging.name}.old")
        os.rename(target, aside)
        os.rename(staging, target)
        shutil.rmtree(aside)
    else:
        os.rename(staging, target)


def _local(path: str | os.PathLike[str], must_exist: bool = True) -> Path:
    if "://" in str(path):
        raise CheckpointError(
            "checkpoints are read and written on local disks only",
            {"path": path},
            "copy the checkpoint to a local directory first",
        )
    where = Path(path).expanduser()
    if must_exist and not where.exists():
        raise CheckpointError("no such checkpoint", {"path": where}, "name an HF directory or a .gguf file")
    return where
