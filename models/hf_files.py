"""The files of an HF directory: which of them hold the weights, and their tensors, on a local disk or in a bucket."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from models.ranges import REQUESTS, SpanReader
from models.safetensors_file import RemoteSafetensors, StoredTensor, open_remote
from models.tensors import INDEX_NAME, ROUTER_BIAS_FILE, WEIGHTS_NAME, some
from schemas.errors import CheckpointError
from schemas.object_path import ObjectPath, Place

# In a bucket, where nothing is renamed whole: lies in a folder from an export's first write to its last.
UNFINISHED = ".export-unfinished"


class SafetensorsSource:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` lists.

    On a local disk they are memory-mapped; in a bucket each is fetched by range reads into its shard.
    """

    def __init__(self, directory: Place) -> None:
        self.where = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._files: dict[str, Place] = {}
        self._stored: dict[str, StoredTensor] = {}
        files = weight_files(directory)
        remote = dict(zip(files, open_all(files), strict=True)) if isinstance(directory, ObjectPath) else {}
        for file in files:
            self._index(file, _remote_tensors(remote[file]) if remote else _local_tensors(file))
            self._stored |= remote[file].tensors if remote else {}
        self._check_index()
        self._reader = SpanReader() if remote else None

    def announce(self, names: Sequence[str]) -> None:
        """See `TensorSource`."""
        if self._reader is not None:
            self._reader.announce(self._stored[name].span for name in names)

    def read(self, name: str) -> np.ndarray:
        """A tensor, on a local disk a copy of the mapped bytes."""
        if self._reader is None:
            with _open_safetensors(self._files[name]) as tensors:
                return tensors.get_tensor(name)
        return self._stored[name].view(self._reader.read(self._stored[name].span))

    def close(self) -> None:
        """Stop the reader's threads, where there are any."""
        if self._reader is not None:
            self._reader.close()

    def _index(self, file: Place, tensors: Iterator[tuple[str, tuple[int, ...], str]]) -> None:
        for name, shape, dtype in tensors:
            if name in self._files:
                raise CheckpointError(
                    "a tensor is stored twice",
                    {"tensor": name, "found": f"in {self._files[name]} and in {file}"},
                    "remove the shard that does not belong to this checkpoint",
                )
            self._files[name], self.shapes[name], self.dtypes[name] = file, shape, dtype

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


def open_all(files: Sequence[Place]) -> list[RemoteSafetensors]:
    """The headers of files in a bucket, several at once: a large model has hundreds."""
    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(open_remote, (file for file in files if isinstance(file, ObjectPath))))


def _remote_tensors(header: RemoteSafetensors) -> Iterator[tuple[str, tuple[int, ...], str]]:
    return ((name, tensor.shape, tensor.dtype) for name, tensor in header.tensors.items())


def _local_tensors(file: Place) -> Iterator[tuple[str, tuple[int, ...], str]]:
    with _open_safetensors(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118 - a method of safe_open, not of a dict
            view = tensors.get_slice(name)
            yield name, tuple(view.get_shape()), view.get_dtype()


def weight_files(directory: Place) -> list[Place]:
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
    missing = [file for file in files if file not in names and not (directory / file).exists()]
    if missing:
        raise CheckpointError(
            "shards of the checkpoint are missing",
            {"index": directory / INDEX_NAME, "missing": some(missing), "of": f"{len(files)} shards"},
            "copy the missing files beside the index",
        )
    return [*(directory / file for file in files), *beside]


def names_in(directory: Place) -> list[str]:
    """What lies in a folder, sorted; one request, where asking for each name would be one each."""
    return sorted(each.name for each in directory.iterdir())


def read_json(file: Place) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _missing(file) from error
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{file.name} cannot be read as JSON", {"file": file, "found": error}, "copy the file again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{file.name} is not a JSON object", {"file": file, "found": type(value).__name__}, "copy the file again"
        )
    return value


def _missing(file: Place) -> CheckpointError:
    names = names_in(file.parent)
    step = "name a directory as transformers' save_pretrained writes it, or a .gguf file"
    if isinstance(file, ObjectPath) and not names:
        step = "check the names of bucket and folder: nothing lies there, or there is no such bucket"
    if UNFINISHED in names:
        step = "an export to this place was stopped: run it again"
    facts = {"directory": file.parent, "found": some(names) or "nothing"}
    return CheckpointError(f"{file.name} is missing", facts, step)


def _open_safetensors(file: Place) -> Any:
    try:
        return safe_open(str(file), framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            "a weight file is damaged, truncated or not a safetensors file",
            {"file": file, "bytes": Path(str(file)).stat().st_size, "found": error},
            "copy the file again",
        ) from error


def _no_weights(directory: Place, names: list[str]) -> CheckpointError:
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
