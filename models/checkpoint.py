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
from models.ggufs import GgufSource, config_from_gguf, open_gguf
from models.huggingface import config_from_hf, config_to_hf
from models.tensors import (
    INDEX_NAME,
    WEIGHTS_NAME,
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
        config = config_from_hf(read_json(where / "config.json"), where / "config.json")
        source = SafetensorsSource(where)
    return fill_decoder(config, source, jnp.dtype(dtype) if dtype is not None else _own_dtype(source))


def read_config(path: str | os.PathLike[str]) -> ModelConfig:
    """What `load_pretrained` would build, without reading weights."""
    where = _local(path)
    if where.is_file():
        return config_from_gguf(open_gguf(where), where)
    return config_from_hf(read_json(where / "config.json"), where / "config.json")


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
    slots = defaultdict(list)
    for slot in tensor_slots(config):
        slots[slot.path].append(slot)
    _check_tensors(config, source, {path: value.shape for path, value in parameters.items()}, slots)
    filled = [
        (path, value.replace(_fill(slots[path], value.shape, source, dtype))) for path, value in parameters.items()
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _fill(slots: list[TensorSlot], shape: tuple[int, ...], source: TensorSource, dtype: jnp.dtype) -> jnp.ndarray:
    """One parameter, stacked over its repeats where it has any."""
    out = np.empty(shape, dtype)
    for slot in slots:
        place = out if slot.repeat is None else out[slot.repeat]
        place[...] = slot.load(source.read(slot.name), place.shape)
    return jnp.asarray(out)


def _check_tensors(config: ModelConfig, source: TensorSource, shapes: dict[Any, Any], slots: dict[Any, Any]) -> None:
    if set(shapes) != set(slots):
        raise ValueError(f"tensor_slots does not cover the decoder: {set(shapes) ^ set(slots)}")
    expected: dict[str, tuple[int, ...]] = {}
    for path, group in slots.items():
        for slot in group:
            expected[slot.name] = slot.stored_shape(shapes[path] if slot.repeat is None else shapes[path][1:])
    found = {name: shape for name, shape in source.shapes.items() if not name.endswith(HARMLESS_SUFFIXES)}
    if config.tie_embeddings and "lm_head.weight" in found:
        _check_tied(source)
        del found["lm_head.weight"]
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
    _own_dtype(source)


def _check_tied(source: TensorSource) -> None:
    """Some files store the tied head as well; it is left out only if it is the embedding."""
    head, embed = source.read("lm_head.weight"), source.read("model.embed_tokens.weight")
    if head.shape != embed.shape or not np.array_equal(head, embed):
        raise CheckpointError(
            "tie_word_embeddings is true, but lm_head.weight differs from the embeddings",
            {"checkpoint": source.where},
            "set tie_word_embeddings to false in config.json if the head is a matrix of its own",
        )


def _own_dtype(source: TensorSource) -> jnp.dtype:
    """The narrowest dtype that holds every tensor exactly; float16 beside bfloat16 gives float32."""
    found = {kind: name for name, kind in source.dtypes.items() if not name.endswith(HARMLESS_SUFFIXES)}
    foreign = {kind: name for kind, name in found.items() if kind not in FLOAT_DTYPES}
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
    dtypes = [jnp.dtype(FLOAT_DTYPES[kind]) for kind in found] or [jnp.dtype("float32")]
    return jnp.result_type(*dtypes)


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
    shards = _plan_shards(decoder.config, parameters, shard_bytes)
    names: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {slot.name: slot.store(_slice(parameters[slot.path].get_value(), slot)) for slot in shard}
        try:
            save_file(tensors, directory / file, metadata=FILE_METADATA)
        except (safetensors.SafetensorError, OSError) as error:
            raise StorageError(
                "the weights cannot be written",
                {"file": directory.parent / file, "cause": error},
                "free some space or name another place; nothing was kept",
            ) from error
        # safetensors makes files that only their owner reads; an export is as open as its directory.
        (directory / file).chmod(directory.stat().st_mode & 0o666)
        names |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _slice(value: jnp.ndarray, slot: TensorSlot) -> np.ndarray:
    return np.asarray(value if slot.repeat is None else value[slot.repeat])


def _plan_shards(config: ModelConfig, parameters: dict[Any, Any], shard_bytes: int) -> list[list[TensorSlot]]:
    """Slots in order, cut where the next one would not fit; a tensor larger than a shard has its own."""
    shards: list[list[TensorSlot]] = [[]]
    used = 0
    for slot in tensor_slots(config):
        value = parameters[slot.path].get_value()
        size = value.nbytes // (1 if slot.repeat is None else value.shape[0])
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(slot)
        used += size
    return shards


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
    known = {"config.json", INDEX_NAME, *TOKENIZER_FILES, *(file.name for file in weights)}
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
