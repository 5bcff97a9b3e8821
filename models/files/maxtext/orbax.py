"""The arrays of an Orbax checkpoint, read by TensorStore as Orbax stores them, on a local disk or in a bucket.

A checkpoint is a folder with `_METADATA`, which lists a tree of arrays. Each is a zarr array (version 2, or 3 where
`use_zarr3` is set) under its path joined by dots, in one OCDBT key-value store for all of them, or in a folder of its
own. Orbax itself is not needed.

Source: orbax.checkpoint 0.12, `tree_metadata` of what its PyTreeCheckpointHandler writes; the tests read what it wrote.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from distillcache.models.files.tensors import Box, whole
from distillcache.schemas.errors import CheckpointError
from distillcache.schemas.store.buckets import FAILURES
from distillcache.schemas.store.path import Location, open_folder

METADATA = "_METADATA"
OCDBT_MANIFEST = "manifest.ocdbt"
CACHE_BYTES = 64 * 2**20  # of the store's own index; chunks are read once
SLAB_BYTES = 256 * 2**20  # of an array that is read through
DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # as safetensors calls them


@dataclass(frozen=True)
class OrbaxArray:
    """dtype: safetensors' name of it, or TensorStore's where it has none."""

    shape: tuple[int, ...]
    dtype: str
    array: ts.TensorStore


class OrbaxArrays:
    """Arrays by name: `params.params.decoder.decoder_norm.scale`."""

    def __init__(self, place: Location) -> None:
        """
        Raises:
            CheckpointError: there is no checkpoint here that can be read.
        """
        self.place = place
        self._metadata = _read_metadata(place)
        self.names = tuple(_names(self._metadata))
        self._context = open_folder(place).context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})

    def open(self, names: Mapping[str, str]) -> dict[str, OrbaxArray]:
        """Some arrays, under names of one's own, all opened at once.

        Args:
            names: one's own name -> the checkpoint's.
        """
        pending = {
            own: ts.open(self._spec(name), context=self._context, open=True, read=True) for own, name in names.items()
        }
        found = {}
        for own, future in pending.items():
            array = self._awaited(names[own], future)
            kind = array.dtype.name
            found[own] = OrbaxArray(tuple(array.shape), DTYPE_NAMES.get(kind, str(kind)), array)
        return found

    def read(self, name: str, array: OrbaxArray, box: Box) -> np.ndarray:
        """A part of an array; each chunk that it touches is fetched once, several at a time."""
        return self._awaited(name, array.array[box].read(order="C"))

    def slabs(self, name: str, array: OrbaxArray) -> Iterator[np.ndarray]:
        """All of an array in C order, some rows at a time: whole chunks of them, so that none is fetched twice."""
        if not array.shape:
            yield self.read(name, array, ())
            return
        chunk_rows = int((array.array.chunk_layout.read_chunk.shape or array.shape)[0] or 1)
        row_bytes = max(1, int(np.prod(array.shape[1:])) * array.array.dtype.numpy_dtype.itemsize)
        rows = chunk_rows * max(1, SLAB_BYTES // (chunk_rows * row_bytes))
        for row in range(0, array.shape[0], rows):
            yield self.read(name, array, (slice(row, min(row + rows, array.shape[0])), *whole(array.shape[1:])))

    def _spec(self, name: str) -> dict[str, Any]:
        folder, parent = self.place.name, open_folder(self.place.parent)
        if self._metadata["use_ocdbt"]:
            kvstore = {"driver": "ocdbt", "base": parent.spec(folder), "path": f"{name}/"}
        else:
            kvstore = parent.spec(f"{folder}/{name}")
        # Where Orbax left out what equals the fill value, a missing chunk is no damage.
        stored = self._metadata.get("store_array_data_equal_to_fill_value", False)
        driver = "zarr3" if self._metadata.get("use_zarr3") else "zarr"
        return {"driver": driver, "kvstore": kvstore, "fill_missing_data_reads": not stored}

    def _awaited(self, name: str, future: Any) -> Any:
        try:
            return future.result()
        except FAILURES as error:
            raise CheckpointError(
                "an array of an Orbax checkpoint cannot be read",
                {"checkpoint": self.place, "array": name, "cause": str(error).split("[tensorstore")[0][:300]},
                "copy the checkpoint again; it must be whole, with all its `d` and `ocdbt.process_*` folders",
            ) from error


def _read_metadata(place: Location) -> dict[str, Any]:
    try:
        found = json.loads((place / METADATA).read_text(encoding="utf-8"))
        found.setdefault("use_ocdbt", (place / OCDBT_MANIFEST).exists())
        _names(found)
        return found
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            "this is not an Orbax checkpoint of a tree of arrays",
            {"folder": place, "file": METADATA, "found": f"{type(error).__name__}: {error}"},
            f"name the folder that holds {METADATA}: MaxText's <run>/checkpoints/<step>/items",
        ) from error


def _names(metadata: Mapping[str, Any]) -> list[str]:
    """List the names of the leaves that are arrays."""
    found = []
    for leaf in metadata["tree_metadata"].values():
        if not leaf["value_metadata"].get("skip_deserialize"):
            name = ".".join(str(part["key"]) for part in leaf["key_metadata"])
            if "/" in name or "\\" in name or name.strip(".") == "":
                raise ValueError(f"the name {name[:80]!r} leads outside its folder")
            found.append(name)
    return found


def is_orbax(place: Location) -> bool:
    """Return whether a folder is an Orbax checkpoint."""
    return place.is_dir() and (place / METADATA).exists() if isinstance(place, Path) else (place / METADATA).exists()
