"""The files of one checkpoint: arrays in boxes, each written by the process that holds it.

    <run>/checkpoints/00000100/p0003-000.safetensors   the bytes of process 3's boxes
    <run>/checkpoints/00000100/p0003.json              which boxes these are, with their digests
    <run>/checkpoints/00000100/checkpoint.json         written last, by process 0: without it there is no checkpoint

A *saved box* is a box of one array, contiguous in its file. An array is named by its item and its own name
(`parameters/embed`, `optimizer/groups/0/...`), and its boxes cover it once, however many processes wrote them: who
reads asks for boxes of an array and is given them from whatever boxes there are, so a run may go on on other devices.
The files are plain safetensors. Every box is compared with its digest when it is read.

Orbax would do for local disks and Google Cloud Storage. It does not write to S3 (0.12), goes to buckets by a second
library with credentials and retries of its own, and keeps no digests of what it stores.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import xxhash
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer
from safetensors.numpy import save

from distillcache.schemas.base import Config, Count, Hex, Name
from distillcache.schemas.errors import DamageError, StorageError
from distillcache.schemas.format.canonical import from_canonical, to_canonical
from distillcache.schemas.format.digest import digest_bytes
from distillcache.schemas.format.run_identity import IDENTITY, read_identity
from distillcache.schemas.store.disk_errors import is_in_the_way
from distillcache.schemas.store.store import Store

RECORD = "checkpoint.json"
INCOMPLETE = "boxes that do not make up the whole array"
FILE_BYTES = 512 << 20  # of a data file, about: one write holds it in memory
Box = tuple[slice, ...]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]


class SavedBox(Config):
    """A box of an array: `start` and `shape`, one entry an axis. offset: of its first byte in the file."""

    array: str
    start: tuple[Count, ...]
    shape: tuple[Count, ...]
    file: Name
    offset: Count
    digest: Digest


class ArrayInfo(Config):
    """Shape, dtype and layout of a whole array."""

    dtype: str = Field(pattern=r"^(bool|bfloat16|float8_\w+|u?int(4|8|16|32|64)|float(16|32|64))$")
    shape: tuple[Count, ...]


class ProcessReceipt(Config):
    """The receipt of what one process wrote. attempt: identifies the process of the run, so that leftovers of a killed
    process are not mistaken for it.
    """

    process: Count
    attempt: str
    arrays: dict[str, ArrayInfo]
    pieces: tuple[SavedBox, ...]  # the boxes; the name on disk


class FiguresDigest(Config):
    """Entries of a file of figures that were written up to a checkpoint: how many, and the xxh3-128 of them."""

    count: Count
    digest: Hex


class CheckpointRecord(Config):
    """The record that commits a checkpoint. parts: the digest of every process's receipt, by process number; feed: the
    feed's position; run: the digest of the run's run.json; figures: by file, the evaluations and the lines of metrics
    up to here. Versions before this wrote neither of the last two.
    """

    step: Count
    feed: dict[str, int]
    parts: tuple[str, ...]
    run: Hex | None = None
    figures: dict[str, FiguresDigest] | None = None

    @model_serializer(mode="wrap")
    def _as_versions_before(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is not known: the one spelling of a record of an earlier version is its own."""
        return {name: value for name, value in serialise(self).items() if value is not None}


@dataclass(frozen=True, eq=False)
class Held:
    """The boxes of an array that a process holds on the host: (start, values) of each."""

    info: ArrayInfo
    boxes: tuple[tuple[tuple[int, ...], np.ndarray], ...]


def held_whole(value: np.ndarray) -> Held:
    """An array that this process holds all of."""
    info = ArrayInfo(dtype=str(value.dtype), shape=value.shape)
    return Held(info, (((0,) * value.ndim, value),))


def nothing_of(value: Held) -> Held:
    """The same array, held by another process."""
    return Held(value.info, ())


def receipt_key(folder: str, process: int) -> str:
    return f"{folder}/p{process:04d}.json"


def write_arrays(store: Store, folder: str, process: int, attempt: str, arrays: Mapping[str, Held]) -> ProcessReceipt:
    """Write what this process holds, data first."""
    pieces: list[SavedBox] = []
    for number, group in enumerate(_files(arrays)):
        file = f"p{process:04d}-{number:03d}.safetensors"
        data, offsets = _pack([values for _, _, values in group])
        store.write(f"{folder}/{file}", data)
        for (array, start, values), offset in zip(group, offsets, strict=True):
            digest = xxhash.xxh3_64_hexdigest(values.tobytes())
            pieces.append(
                SavedBox(array=array, start=start, shape=values.shape, file=file, offset=offset, digest=digest)
            )
    infos = {name: held.info for name, held in arrays.items()}
    receipt = ProcessReceipt(process=process, attempt=attempt, arrays=infos, pieces=tuple(pieces))
    store.write(receipt_key(folder, process), to_canonical(receipt))
    return receipt


def read_receipt(store: Store, folder: str, process: int) -> tuple[ProcessReceipt, str] | None:
    """A process's receipt and its digest; None where it is not there yet."""
    key, step = receipt_key(folder, process), _without(store.where(folder))
    with _as_damage(store.where(key), store.where(folder)):
        return store.read_checked(
            key, lambda data: (from_canonical(ProcessReceipt, data, store.where(key), step), digest_bytes(data))
        )


def read_record(store: Store, folder: str) -> CheckpointRecord | None:
    """The record of a checkpoint of this run; None where there is none.

    Raises:
        DamageError: it is not what was committed, or is of another run.
    """
    where = store.where(f"{folder}/{RECORD}")
    with _as_damage(where, store.where(folder)):
        found = store.read_checked(
            f"{folder}/{RECORD}",
            lambda data: from_canonical(CheckpointRecord, data, where, _without(store.where(folder))),
        )
    identity = None if found is None else read_identity(store)
    if found is not None and identity is not None and found.run != identity.digest:
        raise DamageError(
            "a checkpoint and the run's record are of two runs",
            {
                "object": where,
                "of run": found.run or "of an earlier version",
                "expected": identity.digest or "the same",
            },
            f"put back the {IDENTITY} that belongs to the checkpoints; if the checkpoint is the foreign one, "
            f"{_without(store.where(folder))}",
        )
    return found


def commit(store: Store, folder: str, record: CheckpointRecord) -> None:
    """From now on the checkpoint is there."""
    store.write(f"{folder}/{RECORD}", to_canonical(record))


class SavedArrays:
    """The arrays of a committed checkpoint."""

    def __init__(self, store: Store, folder: str) -> None:
        """
        Raises:
            DamageError: a record or a receipt is missing, or not what was committed.
        """
        self._store, self._folder = store, folder
        found = read_record(store, folder)
        if found is None:
            raise self._damage(store.where(f"{folder}/{RECORD}"), "nothing")
        self.record: CheckpointRecord = found
        self._infos: dict[str, ArrayInfo] = {}
        self._boxes: dict[str, list[SavedBox]] = {}
        for process, digest in enumerate(self.record.parts):
            receipt = read_receipt(store, folder, process)
            if receipt is None or receipt[1] != digest:
                raise self._damage(
                    store.where(receipt_key(folder, process)), "nothing" if receipt is None else "another receipt"
                )
            self._infos |= receipt[0].arrays
            for saved in receipt[0].pieces:
                self._boxes.setdefault(saved.array, []).append(saved)
        for array, boxes in self._boxes.items():
            shape = self._infos[array].shape if array in self._infos else ()
            if not all(_is_inside(saved, shape) for saved in boxes):
                raise self._damage(store.where(folder), f"boxes of {array} that are not inside it")

    def names(self, item: str) -> list[str]:
        """The names of the item's arrays, without the item."""
        return sorted(name.removeprefix(f"{item}/") for name in self._infos if name.startswith(f"{item}/"))

    def info(self, item: str, name: str) -> ArrayInfo:
        array = f"{item}/{name}"
        if array not in self._infos:
            raise self._damage(self._store.where(self._folder), f"no {array}")
        return self._infos[array]

    def whole(self, item: str, name: str) -> np.ndarray:
        """All of an array."""
        shape = self.info(item, name).shape
        return self.boxes(item, name, [tuple(slice(0, size) for size in shape)])[0]

    def boxes(self, item: str, name: str, wanted: Sequence[Box]) -> list[np.ndarray]:
        """These boxes of an array; each box that any of them needs is read once.

        Raises:
            DamageError: a saved box is missing or damaged, or the saved boxes do not cover a wanted one.
        """
        array = f"{item}/{name}"
        dtype, volume = np.dtype(self._infos[array].dtype), math.prod(self._infos[array].shape)
        if sum(math.prod(saved.shape) for saved in self._boxes.get(array, [])) < volume:  # before memory is taken
            raise self._damage(f"{self._store.where(self._folder)} {array}", INCOMPLETE)
        found = [np.empty([axis.stop - axis.start for axis in box], dtype) for box in wanted]
        filled = [0] * len(found)
        for saved in self._boxes.get(array, []):
            overlaps = [(at, overlap) for at, box in enumerate(wanted) if (overlap := _overlap(saved, box)) is not None]
            if not overlaps:
                continue
            values = self._read(saved, dtype)
            for at, (inside, target) in overlaps:
                found[at][target] = values[inside]
                filled[at] += math.prod(axis.stop - axis.start for axis in target)
        if any(count != box.size for count, box in zip(filled, found, strict=True)):
            raise self._damage(f"{self._store.where(self._folder)} {array}", INCOMPLETE)
        return found

    def _read(self, saved: SavedBox, dtype: np.dtype) -> np.ndarray:
        key = f"{self._folder}/{saved.file}"
        length = math.prod(saved.shape) * dtype.itemsize

        def check(data: bytes | None) -> np.ndarray:
            if data is None or xxhash.xxh3_64_hexdigest(data) != saved.digest:
                found = "nothing, or less than was written" if data is None else f"another digest of {saved.array}"
                raise self._damage(self._store.where(key), found)
            return np.frombuffer(data, dtype).reshape(saved.shape)

        with _as_damage(self._store.where(key), self._store.where(self._folder)):
            return self._store.checked(
                lambda: self._store.read_range(key, saved.offset, saved.offset + length)[0], check
            )

    def _damage(self, where: str, found: str) -> DamageError:
        return _damage(where, self._store.where(self._folder), found)


def _is_inside(saved: SavedBox, shape: tuple[int, ...]) -> bool:
    """Return whether a saved box lies inside an array of this shape."""
    if not len(saved.start) == len(saved.shape) == len(shape):
        return False
    return all(first + size <= most for first, size, most in zip(saved.start, saved.shape, shape, strict=True))


def _files(arrays: Mapping[str, Held]) -> Iterator[list[tuple[str, tuple[int, ...], np.ndarray]]]:
    """(array, start, values) of all boxes, those that go into one file together."""
    together: list[tuple[str, tuple[int, ...], np.ndarray]] = []
    size = 0
    for name, held in arrays.items():
        for start, values in held.boxes:
            for begin, cut in _cut(start, np.asarray(values, order="C")):
                if together and size + cut.nbytes > FILE_BYTES:
                    yield together
                    together, size = [], 0
                together.append((name, begin, cut))
                size += cut.nbytes
    if together:
        yield together


def _cut(start: tuple[int, ...], values: np.ndarray) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """A box in runs of its first axis that fit into a file each, where that is possible."""
    rows = values.shape[0] if values.ndim else 1
    share = max(1, rows * FILE_BYTES // max(values.nbytes, 1))
    if rows <= share:
        yield start, values
        return
    for at in range(0, rows, share):
        yield (start[0] + at, *start[1:]), values[at : at + share]


def _pack(boxes: Sequence[np.ndarray]) -> tuple[bytes, list[int]]:
    """A safetensors file of these values, and where each begins in it."""
    names = [f"{number:06d}" for number in range(len(boxes))]
    data = save(dict(zip(names, boxes, strict=True)))
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return data, [8 + length + header[name]["data_offsets"][0] for name in names]


def _overlap(saved: SavedBox, box: Box) -> tuple[Box, Box] | None:
    """Intersect a saved box and a wanted one. Returns the overlap within each of the two; None if it is
    empty.
    """
    inside, target = [], []
    for first, size, axis in zip(saved.start, saved.shape, box, strict=True):
        low, high = max(first, axis.start), min(first + size, axis.stop)
        if low >= high:
            return None
        inside.append(slice(low - first, high - first))
        target.append(slice(low - axis.start, high - axis.start))
    return tuple(inside), tuple(target)


@contextlib.contextmanager
def _as_damage(where: str, folder: str) -> Iterator[None]:
    """Take something else in the place of a checkpoint's file for what it is: damage, which can be deleted."""
    try:
        yield
    except StorageError as error:
        cause = str(error.facts.get("cause", ""))
        if not is_in_the_way(cause):
            raise
        raise _damage(where, folder, cause) from error


def _damage(where: str, folder: str, found: str) -> DamageError:
    return DamageError("a checkpoint is damaged", {"object": where, "found": found}, _without(folder))


def _without(folder: str) -> str:
    """Say what to do about a damaged checkpoint."""
    return (
        f"delete {folder}: the run resumes from the checkpoint before it, or from its beginning; "
        "another checkpoint can be exported with --step"
    )
