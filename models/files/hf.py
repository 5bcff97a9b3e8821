"""The files of an HF directory: which of them hold the weights, and their tensors, on a local disk or in a bucket."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from distillcache.models.files.foreign import is_lfs_pointer, lfs_pointer, step_for_folder, unreadable_weights
from distillcache.models.files.ranges import REQUESTS, SpanReader
from distillcache.models.files.safetensors import Entry, MappedSafetensors, RemoteSafetensors, StoredTensor, open_remote
from distillcache.models.files.tensors import INDEX_NAME, ROUTER_BIAS_FILE, WEIGHTS_NAME, Box, some, whole
from distillcache.schemas.base import is_name_inside
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import CheckpointError
from distillcache.schemas.store.local_path import LocalPath
from distillcache.schemas.store.path import Location, ObjectPath

# In a bucket, where nothing is renamed whole: lies in a folder from an export's first write to its last.
UNFINISHED = ".export-unfinished"


class SafetensorsSource:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` lists.

    On a local disk they are memory-mapped; in a bucket what is needed of each is fetched by range reads into its shard.
    """

    def __init__(self, directory: Location) -> None:
        self.where = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._files: dict[str, Location] = {}
        self._stored: dict[str, StoredTensor] = {}
        self._mapped: dict[str, MappedSafetensors] = {}
        files = weight_files(directory)
        if isinstance(directory, ObjectPath):
            for header in open_all(files):
                self._index(header.file.path, header.tensors)
                self._stored |= header.tensors
        else:
            for file in files:
                mapped = _open_local(file)
                self._index(file, mapped.tensors)
                self._mapped |= dict.fromkeys(mapped.tensors, mapped)
        self._check_index()
        self._reader = SpanReader() if self._stored else None

    def announce(self, reads: Sequence[tuple[str, Box]]) -> None:
        """See `TensorSource`."""
        if self._reader is not None:
            self._reader.announce(self._stored[name].rows(box).span for name, box in reads)

    def read(self, name: str, box: Box | None = None) -> np.ndarray:
        """A tensor or a part of it; on a local disk a view of the mapped file."""
        box = whole(self.shapes[name]) if box is None else box
        if self._reader is None:
            return self._mapped[name].view(name)[box]
        rows = self._stored[name].rows(box)
        return rows.view(self._reader.read(rows.span))[(slice(None), *box[1:])[: len(box)]]

    def close(self) -> None:
        """Stop the reader's threads, where there are any."""
        if self._reader is not None:
            self._reader.close()

    def _index(self, file: Location, tensors: Mapping[str, StoredTensor] | Mapping[str, Entry]) -> None:
        for name, tensor in tensors.items():
            if name in self._files:
                raise CheckpointError(
                    "a tensor is stored twice",
                    {"tensor": name, "found": f"in {self._files[name]} and in {file}"},
                    "remove the shard that does not belong to this checkpoint",
                )
            self._files[name], self.shapes[name], self.dtypes[name] = file, tensor.shape, tensor.dtype

    def _check_index(self) -> None:
        index = self.where / INDEX_NAME
        if (self.where / WEIGHTS_NAME) in self._files.values() or not index.exists():
            return
        listed = read_json(index)["weight_map"]
        misplaced = [name for name, file in listed.items() if self._files.get(name) != self.where / file]
        if misplaced:
            raise CheckpointError(
                "the shards do not hold what their index lists",
                {"index": index, "not found": some(misplaced)},
                "copy the checkpoint again",
            )


def open_all(files: Sequence[Location]) -> list[RemoteSafetensors]:
    """The headers of files in a bucket, several at once: a large model has hundreds."""
    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(open_remote, (file for file in files if isinstance(file, ObjectPath))))


def weight_files(directory: Location) -> list[Location]:
    """The files that hold a checkpoint's tensors, by name. `model.safetensors` wins over an index, as in HF."""
    names = names_in(directory)
    beside = [directory / ROUTER_BIAS_FILE] if ROUTER_BIAS_FILE in names else []
    if WEIGHTS_NAME in names:
        return [directory / WEIGHTS_NAME, *beside]
    if INDEX_NAME not in names:
        raise _no_weights(directory, names)
    listed = read_json(directory / INDEX_NAME).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise CheckpointError(
            "the index of the shards has no weight_map",
            {"file": directory / INDEX_NAME, "expected": '{"weight_map": {tensor: file}}'},
            "copy the checkpoint again",
        )
    files = sorted(set(listed.values()))
    if outside := [file for file in files if not is_name_inside(file)]:
        raise CheckpointError(
            "the index of the shards names files outside its folder",
            {"file": directory / INDEX_NAME, "found": some(outside)},
            "put the shards beside the index, and correct their names in it",
        )
    missing = [file for file in files if file not in names and not (directory / file).exists()]
    if missing:
        raise CheckpointError(
            "shards of the checkpoint are missing",
            {"index": directory / INDEX_NAME, "missing": some(missing), "of": counted(len(files), "shard")},
            "copy the missing files beside the index",
        )
    return [*(directory / file for file in files), *beside]


def names_in(directory: Location) -> list[str]:
    """List the names in a folder, sorted, with one request instead of one for each name."""
    return sorted(each.name for each in directory.iterdir())


def read_json(file: Location) -> dict[str, Any]:
    """Read a JSON object from a file of the checkpoint.

    Raises:
        CheckpointError: it is missing, no object of JSON, nested too deep, or has a key twice with different values.
    """
    try:
        data = file.read_bytes()
        if is_lfs_pointer(data[:200]):
            raise lfs_pointer(file)
        value = json.loads(data.decode(), object_pairs_hook=_agreeing)
    except FileNotFoundError as error:
        raise _missing(file) from error
    except (ValueError, OSError, RecursionError) as error:
        found = "brackets nested too deep" if isinstance(error, RecursionError) else str(error)[:300]
        raise CheckpointError(
            f"{file.name} cannot be read as JSON", {"file": file, "found": found}, "copy the file again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{file.name} is not a JSON object", {"file": file, "found": type(value).__name__}, "copy the file again"
        )
    return value


def _agreeing(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON in which a key that stands twice has one value."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        first = found.setdefault(key, value)
        if first is not value and first != value:  # a NaN does not equal itself
            raise ValueError(f"the key {key[:80]!r} appears twice, with different values")
    return found


def _missing(file: Location) -> CheckpointError:
    names = names_in(file.parent)
    step = "name a directory as transformers' save_pretrained writes it, or a .gguf file"
    if isinstance(file, ObjectPath) and not names:
        step = "check the names of bucket and folder: the folder is empty, or there is no such bucket"
    if any(name in names for name in ("_METADATA", "_CHECKPOINT_METADATA", "items")):
        step = (
            "this is an Orbax checkpoint, which does not say what the model is: make a folder with the config.json and "
            'the tokenizer of the HF model, and maxtext.json: {"checkpoint": "PATH"}; then name that folder'
        )
    step = step_for_folder(file.parent, names) or step
    if UNFINISHED in names:
        step = "an export to this path was interrupted: run it again"
    facts = {"directory": file.parent, "found": some(names) or "nothing"}
    return CheckpointError(f"{file.name} is missing", facts, step)


def _open_local(file: Location) -> MappedSafetensors:
    local = LocalPath(str(file))
    try:
        with local.open("rb") as stream:
            if is_lfs_pointer(stream.read(200)):
                raise lfs_pointer(file)
        return MappedSafetensors(local)
    except OSError as error:
        raise unreadable_weights(file, error) from error


def _no_weights(directory: Location, names: list[str]) -> CheckpointError:
    torch = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    ggufs = [name for name in names if name.endswith(".gguf")]
    step = _step_for_variant(names) or "name a directory that has model.safetensors, or a .gguf file"
    if torch:
        step = "load it with transformers and save it again: save_pretrained writes safetensors (pickles are not read)"
    if ggufs:
        step = f"name the file itself: {directory / ggufs[0]}"
    step = step_for_folder(directory, names) or step
    return CheckpointError(
        "the checkpoint has no safetensors weights",
        {"directory": directory, "expected": f"{WEIGHTS_NAME} or {INDEX_NAME}", "found": some(names) or "nothing"},
        step,
    )


def _step_for_variant(names: Sequence[str]) -> str | None:
    """Name the step for weights under another name, as `variant=` of transformers writes them."""
    found = [name for name in names if name.endswith(".safetensors") and name != ROUTER_BIAS_FILE]
    stems = sorted(name for name in found if name.startswith("model."))
    if not stems:
        return None if len(found) != 1 else f"rename {found[0]} to {WEIGHTS_NAME} if it holds all weights of the model"
    return f"rename {stems[0]} to {WEIGHTS_NAME}: it is a variant, which transformers loads by its name alone"
