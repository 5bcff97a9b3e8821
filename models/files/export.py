"""Checkpoints out: a `Decoder` becomes an HF directory, on a local disk or in a bucket.

A reader never takes half an export for a whole one. On a local disk it is written beside its place and renamed. In a
bucket nothing is renamed: config.json, without which there is no checkpoint, is deleted first and written last, and a
mark lies beside it from the first write to the last, by which the next export knows the remains of one that was killed.
"""

import io
import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from flax import nnx

from distillcache.models.decoder import Decoder
from distillcache.models.families import config_to_hf, exported_layout_of
from distillcache.models.files.hf import UNFINISHED
from distillcache.models.files.identity import CONFIG, locate_checkpoint
from distillcache.models.files.safetensors import TensorToWrite, write_safetensors
from distillcache.models.files.tensors import (
    INDEX_NAME,
    ROUTER_BIAS_FILE,
    WEIGHTS_NAME,
    TensorSlot,
    slice_on_host,
    some,
    tensor_slots,
)
from distillcache.models.text.tokenizer import TOKENIZER_FILES, TextTokenizer, tokenizer_files
from distillcache.schemas.errors import CheckpointError
from distillcache.schemas.store.path import Location, ObjectPath, locate
from distillcache.schemas.store.whole_file import refusals, staged_folder

# transformers' own limit of a shard until version 5; a file below it can be copied by every tool, and is one PUT.
SHARD_BYTES = 5_000_000_000
# In the safetensors metadata: `format` is what transformers asks for, `producer` is how we know our own exports.
FILE_METADATA = {"format": "pt"}  # one key only: safetensors writes several in no fixed order
PRODUCER = "distillcache"  # in config.json: by this an export of ours is known
# In config.json of a run's student, which is float32: what exports of the run are stored in.
SOURCE_DTYPE = "distillcache_source_dtype"
GENERATION = "generation_config.json"
log = logging.getLogger(__name__)

WEIGHTS_PATTERN = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors")
ADAPTER_FILES, BASE = ("adapter_model.safetensors", "adapter_config.json"), "base"  # of an export for peft
KNOWN_FILES = frozenset({CONFIG, INDEX_NAME, ROUTER_BIAS_FILE, UNFINISHED, *TOKENIZER_FILES})


@dataclass(frozen=True)
class ExportFile:
    """A file of an export: its name, and the function that writes its content."""

    name: str
    write: Callable[[BinaryIO], object]


def save_pretrained(
    decoder: Decoder,
    path: str | os.PathLike[str] | ObjectPath,
    *,
    tokenizer_from: str | os.PathLike[str] | ObjectPath | TextTokenizer | None = None,
    shard_bytes: int = SHARD_BYTES,
    source_dtype: str | None = None,
) -> None:
    """Write an HF directory, whole or not at all: a killed export leaves nothing that could be taken for one.

    Args:
        path: the directory to make, a local path or a URL. One made by an earlier export is replaced; any other that is
            not empty is refused.
        tokenizer_from: a tokenizer, or the HF directory, tokenizer.json or .gguf file whose tokenizer goes along.
        shard_bytes: above this size the weights are split into shards with an index. In a bucket one shard is held in
            memory, and stored with one write.
        source_dtype: noted in config.json: the dtype of the checkpoint that the decoder was made of.
    """
    noted = {} if source_dtype is None else {SOURCE_DTYPE: source_dtype}
    write_export(locate(path), lambda: export_files(decoder, tokenizer_from, shard_bytes, noted))


def write_export(target: Location, files: Callable[[], list[ExportFile]]) -> None:
    """Write these files and no others to a folder, whole or not at all.

    Args:
        files: makes them, once the target is known to be ours; the last one is that without which nobody reads it.

    Raises:
        CheckpointError: the target is neither empty nor an export of ours.
    """
    _check_target(target)
    if isinstance(target, ObjectPath):
        _write_objects(target, files())
    else:
        _write_directory(target, files())


def export_files(
    decoder: Decoder, tokenizer_from: Any, shard_bytes: int = SHARD_BYTES, noted: Mapping[str, Any] | None = None
) -> list[ExportFile]:
    """All files of an HF directory, in the order in which they are written: config.json is the last."""
    config = config_to_hf(decoder.config, str(decoder.dtype))
    files = list(_weights(decoder, shard_bytes))
    if tokenizer_from is not None:
        given = tokenizer_from if isinstance(tokenizer_from, TextTokenizer) else locate_checkpoint(tokenizer_from)
        contents, ids = tokenizer_files(given)
        config |= ids | generation_ids(contents, decoder.config.vocab_size)
        files[:0] = [_whole(name, content) for name, content in contents.items()]
    config |= {**(noted or {}), "producer": PRODUCER}
    return [*files, json_file(CONFIG, config)]


def generation_ids(contents: Mapping[str, bytes], vocab_size: int) -> dict[str, Any]:
    """Take the ids that config.json shares with generation_config.json, where that is among these files: readers that
    know config.json alone stop and pad by the same tokens. Ids beyond the vocabulary are left out."""
    try:
        stated = json.loads(contents.get(GENERATION, b"{}"))
    except (ValueError, RecursionError):
        return {}  # the file is copied as it is; whoever generates by it will say so
    found: dict[str, Any] = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = stated.get(key) if isinstance(stated, dict) else None
        ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if ids and all(type(each) is int and 0 <= each < vocab_size for each in ids):
            found[key] = value
    return found


def _whole(name: str, content: bytes) -> ExportFile:
    return ExportFile(name, lambda stream: stream.write(content))


def json_file(name: str, value: Mapping[str, Any]) -> ExportFile:
    return _whole(name, (json.dumps(value, indent=2) + "\n").encode())


def _write_objects(target: ObjectPath, files: list[ExportFile]) -> None:
    """Each file by one write."""
    (target / UNFINISHED).write_bytes(b"an export is being written here\n")
    names = [file.name for file in files]
    before = target.keys_below()
    if names[-1] in before:
        (target / names[-1]).unlink()
    for name in before:
        if name not in (*names, UNFINISHED):
            (target / name).unlink()  # a shard of an earlier export, which may have had more
    for file in files:
        stream = io.BytesIO()
        file.write(stream)
        (target / file.name).write_bytes(stream.getvalue())
    (target / UNFINISHED).unlink()


def _write_directory(target: Path, files: list[ExportFile]) -> None:
    """Into a temporary sibling, which is then renamed."""
    with staged_folder(target, "a checkpoint cannot be written here") as staging:
        for file in files:
            (staging / file.name).parent.mkdir(exist_ok=True)
            with (
                refusals(target / file.name, "an export cannot be written"),
                (staging / file.name).open("wb") as stream,
            ):
                file.write(stream)


def _weights(decoder: Decoder, shard_bytes: int) -> Iterator[ExportFile]:
    parameters = dict(nnx.to_flat_state(nnx.state(decoder, nnx.Param)))
    tensors: dict[str, list[TensorSlot]] = defaultdict(list)
    beside: dict[str, list[TensorSlot]] = defaultdict(list)
    for slot in tensor_slots(decoder.config, exported_layout_of(decoder.config)):
        (beside if slot.beside else tensors)[slot.name].append(slot)
    if beside:
        yield weight_file(ROUTER_BIAS_FILE, _to_write(beside, parameters))
    whole = _to_write(tensors, parameters)
    shards = _plan_shards(whole, shard_bytes)
    names: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        yield weight_file(file, {name: whole[name] for name in shard})
        names |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(tensor.size for tensor in whole.values())
        yield json_file(INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))})


def weight_file(name: str, tensors: dict[str, TensorToWrite]) -> ExportFile:
    return ExportFile(name, partial(write_safetensors, tensors=tensors, metadata=FILE_METADATA))


def _to_write(tensors: Mapping[str, list[TensorSlot]], parameters: dict[Any, Any]) -> dict[str, TensorToWrite]:
    """Every tensor, of its slots: several where parameters are stored as one."""
    found = {}
    for name, slots in tensors.items():
        slots.sort(key=lambda slot: slot.part.start if slot.part else 0)
        value = parameters[slots[0].path].get_value()
        shape = slots[0].stored_shape(value.shape[len(slots[0].index) :])
        found[name] = TensorToWrite(np.dtype(value.dtype), shape, partial(_stored, slots, parameters))
    return found


def _stored(slots: list[TensorSlot], parameters: dict[Any, Any]) -> np.ndarray:
    parts = [slot.store(slice_on_host(parameters[slot.path].get_value(), slot.index)) for slot in slots]
    if (part := slots[0].part) is None:
        return np.ascontiguousarray(parts[0])
    shape = [part.total if axis == part.axis else size for axis, size in enumerate(parts[0].shape)]
    whole = np.empty(shape, parts[0].dtype)
    for slot, value in zip(slots, parts, strict=True):
        if slot.part is not None:
            whole[slot.part.entries] = value
    return whole


def _plan_shards(tensors: Mapping[str, TensorToWrite], shard_bytes: int) -> list[list[str]]:
    """The names, in order, cut where the next tensor would not fit; a larger one has its own shard."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += tensor.size
    return shards


def _check_target(target: Location) -> None:
    found = _found_in(target)
    if found is not None and (not found or _is_ours(target, found)):
        if found and UNFINISHED not in found:
            log.info(f"replacing the earlier export in {target}")
        return
    raise CheckpointError(
        "the target of an export exists and was not made by an export",
        {"target": target, "found": "a file" if found is None else some(found)},
        "name another directory, or remove this one",
    )


def _found_in(target: Location) -> list[str] | None:
    """List the names in a folder; None if it is a file."""
    if isinstance(target, ObjectPath):
        return target.keys_below()
    if not target.is_dir():
        return None if target.exists() else []
    return sorted(each.name for each in target.iterdir())


def _is_ours(target: Location, found: list[str]) -> bool:
    """An export of ours has our mark in its config, and nothing beside what we write; a killed one has another mark."""
    beside = [name for name in found if name in ADAPTER_FILES or name.split("/")[0] == BASE]
    if beside:
        rest = [name for name in found if name not in (*beside, UNFINISHED)]
        inside = _found_in(target / BASE)
        return not rest and bool(inside) and (UNFINISHED in found or _is_ours(target / BASE, inside or []))
    if not all(name in KNOWN_FILES or WEIGHTS_PATTERN.fullmatch(name) for name in found):
        return False
    if UNFINISHED in found:
        return True
    try:
        config = json.loads((target / CONFIG).read_text(encoding="utf-8"))
        return any(map(WEIGHTS_PATTERN.fullmatch, found)) and config.get("producer") == PRODUCER
    except (OSError, ValueError, AttributeError):
        return False
