"""Identity of a checkpoint's weights: one digest of its content, the same on a local disk and in a bucket."""

import json
import os
from pathlib import Path
from typing import cast

import numpy as np
import xxhash

from distillcache.models.families import config_from_hf
from distillcache.models.files.foreign import step_for_missing_path, unreadable_weights
from distillcache.models.files.gguf.file import is_gguf, open_gguf, open_parts, part_files
from distillcache.models.files.gguf.remote import RemoteGguf
from distillcache.models.files.hf import open_all, read_json, weight_files
from distillcache.models.files.maxtext.checkpoint import MaxtextFolder, MaxtextSource, find_maxtext
from distillcache.models.files.ranges import CHUNK_BYTES, RemoteFile, Span, SpanReader
from distillcache.models.files.runs import find_run, numbered
from distillcache.schemas.errors import CheckpointError
from distillcache.schemas.store.local_path import LocalPath
from distillcache.schemas.store.path import Location, ObjectPath, locate

CONFIG = "config.json"
LENGTH_BYTES = 8
# Digests of checkpoints in buckets by the generations of their files: reading 140 GB again tells nothing new.
_known: dict[tuple[object, ...], str] = {}


def locate_checkpoint(path: str | os.PathLike[str] | ObjectPath) -> Location:
    """The place of a checkpoint. Raises `CheckpointError` where a local one is not there."""
    where = numbered(locate(path))
    if isinstance(where, Path) and not where.exists():
        raise CheckpointError("no such checkpoint", {"path": where}, step_for_missing_path(where))
    return where


def weights_digest(path: str | os.PathLike[str] | ObjectPath) -> str:
    """xxh3-128 of a checkpoint's content, in hex: config.json and the weight files in order, or the GGUF files.

    Names do not count, except that shards are taken in the order of theirs. The same weights sharded otherwise have
    another digest. Of a run's checkpoint it is that of its student and its own record; of MaxText's, of the values. In
    a bucket every byte is read, several requests at once, and once a process.
    """
    where = locate_checkpoint(path)
    if not is_gguf(where):
        if (run := find_run(where)) is not None:
            return xxhash.xxh3_128_hexdigest(weights_digest(run.student).encode() + run.record())
        read_json(where / CONFIG)
        if (found := find_maxtext(where)) is not None:
            return _maxtext_digest(found)
    if isinstance(where, ObjectPath):
        return _remote_digest(where)
    digest = xxhash.xxh3_128()
    for file in part_files(where) if is_gguf(where) else [where / CONFIG, *weight_files(where)]:
        try:
            with LocalPath(str(file)).open("rb") as stream:
                digest.update(os.fstat(stream.fileno()).st_size.to_bytes(LENGTH_BYTES, "little"))
                while chunk := stream.read(CHUNK_BYTES):
                    digest.update(chunk)
        except OSError as error:
            raise unreadable_weights(file, error) from error
    return digest.hexdigest()


def _maxtext_digest(place: MaxtextFolder) -> str:
    """Digest config.json, the notes and the parameters' values, independent of Orbax's layout."""
    config = (place.folder / CONFIG).read_bytes()
    source = MaxtextSource(place, config_from_hf(json.loads(config), place.folder / CONFIG))
    notes = place.notes.model_dump_json(exclude={"checkpoint"}).encode()
    digest = xxhash.xxh3_128(len(config).to_bytes(LENGTH_BYTES, "little") + config + notes)
    for name, dtype, shape, slabs in source.parts():
        digest.update(f"{name} {dtype} {shape}".encode())
        for slab in slabs:
            digest.update(slab.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _remote_digest(where: ObjectPath) -> str:
    config, files = _remote_files(where)
    key = (config, *((str(file.path), file.generation, length) for file, length in files))
    if key not in _known:
        digest = xxhash.xxh3_128(b"" if config is None else len(config).to_bytes(LENGTH_BYTES, "little") + config)
        reader = SpanReader()
        try:
            reader.announce([span for file, length in files for span in _chunks(file, length)])
            for file, length in files:
                digest.update(length.to_bytes(LENGTH_BYTES, "little"))
                for span in _chunks(file, length):
                    digest.update(reader.read(span).data)
        finally:
            reader.close()
        _known[key] = digest.hexdigest()
    return _known[key]


def _remote_files(where: ObjectPath) -> tuple[bytes | None, list[tuple[RemoteFile, int]]]:
    """The content of config.json (None: a GGUF file has none), and the weight files with their lengths."""
    if is_gguf(where):
        readers = cast("list[RemoteGguf]", open_parts(open_gguf(where), where))  # since they lie in a bucket
        return None, [(reader.file, reader.length()) for reader in readers]
    return (where / CONFIG).read_bytes(), [(header.file, header.length) for header in open_all(weight_files(where))]


def _chunks(file: RemoteFile, length: int) -> list[Span]:
    return [Span(file, start, min(start + CHUNK_BYTES, length)) for start in range(0, length, CHUNK_BYTES)]
