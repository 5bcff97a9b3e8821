"""Arrays in boxes: written by several processes, read by boxes, compared with their digests."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from distillcache.schemas.errors import DamageError
from distillcache.schemas.format import checkpoint
from distillcache.schemas.format.checkpoint import (
    ArrayInfo,
    CheckpointRecord,
    Held,
    SavedArrays,
    commit,
    held_whole,
    nothing_of,
    read_receipt,
    write_arrays,
)
from distillcache.schemas.store.store import Store

RNG = np.random.default_rng(0)
MATRIX, VECTOR = RNG.normal(size=(7, 6)).astype(np.float32), np.arange(5, dtype=np.int32)


def part_of(value: np.ndarray, *boxes: tuple[slice, ...]) -> Held:
    """These boxes of an array, as a process holds them."""
    info = ArrayInfo(dtype=str(value.dtype), shape=value.shape)
    return Held(info, tuple((tuple(axis.start for axis in box), value[box]) for box in boxes))


def save(folder: Path, *of_processes: Mapping[str, Held]) -> SavedArrays:
    """A committed checkpoint to which each process gave this."""
    store, parts = Store(str(folder)), []
    for number, arrays in enumerate(of_processes):
        write_arrays(store, "c", number, "attempt", arrays)
        found = read_receipt(store, "c", number)
        assert found is not None
        parts.append(found[1])
    commit(store, "c", CheckpointRecord(step=3, feed={"seed": 1, "next_step": 3}, parts=tuple(parts)))
    return SavedArrays(store, "c")


def quarters() -> list[Mapping[str, Held]]:
    """MATRIX in four unequal boxes of two processes, VECTOR of the first alone."""
    upper, lower, left, right = slice(0, 3), slice(3, 7), slice(0, 4), slice(4, 6)
    first = part_of(MATRIX, (upper, left), (lower, right))
    second = part_of(MATRIX, (upper, right), (lower, left))
    return [{"p/m": first, "p/v": held_whole(VECTOR)}, {"p/m": second, "p/v": nothing_of(held_whole(VECTOR))}]


@pytest.mark.parametrize("box", [(slice(0, 7), slice(0, 6)), (slice(2, 4), slice(3, 5)), (slice(6, 7), slice(0, 6))])
def test_any_box_is_made_of_the_saved_boxes(tmp_path, box):
    saved = save(tmp_path, *quarters())
    (found,) = saved.boxes("p", "m", [box])
    assert np.array_equal(found, MATRIX[box])
    assert np.array_equal(saved.whole("p", "v"), VECTOR)
    assert saved.names("p") == ["m", "v"]
    assert saved.record.feed == {"seed": 1, "next_step": 3}


def test_scalars_empty_arrays_and_no_arrays(tmp_path):
    scalar, empty = np.asarray(7, np.int32), np.zeros((0, 3), np.float32)
    saved = save(tmp_path, {"o/count": held_whole(scalar), "o/empty": held_whole(empty)}, {})
    assert saved.whole("o", "count") == 7
    assert saved.whole("o", "empty").shape == (0, 3)


def test_large_arrays_are_cut_into_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 60)
    saved = save(tmp_path, {"p/m": held_whole(MATRIX), "p/v": held_whole(VECTOR)})
    assert len(list((tmp_path / "c").glob("*.safetensors"))) == 4  # rows of 24 bytes by twos, the vector with the last
    assert np.array_equal(saved.whole("p", "m"), MATRIX)


def test_files_are_plain_safetensors(tmp_path):
    save(tmp_path, {"p/m": held_whole(MATRIX)})
    (file,) = (tmp_path / "c").glob("*.safetensors")
    (found,) = load_file(file).values()
    assert np.array_equal(found, MATRIX)


def read_all(folder: Path) -> None:
    saved = SavedArrays(Store(str(folder)), "c")
    assert np.array_equal(saved.whole("p", "m"), MATRIX)
    assert np.array_equal(saved.whole("p", "v"), VECTOR)


def test_a_flipped_byte_is_found(tmp_path):
    save(tmp_path, *quarters())
    for file in sorted((tmp_path / "c").iterdir()):
        whole = file.read_bytes()
        # Of a data file the values count; its header is for other readers.
        first = 8 + int.from_bytes(whole[:8], "little") if file.suffix == ".safetensors" else 0
        for place in {first, (first + len(whole)) // 2, len(whole) - 1}:
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(DamageError):
                read_all(tmp_path)
        file.write_bytes(whole)
    read_all(tmp_path)


def test_a_receipt_of_another_attempt_is_not_taken(tmp_path):
    first, second = quarters()
    saved = save(tmp_path, first, second)
    write_arrays(saved._store, "c", 1, "another", {"p/m": second["p/m"]})
    with pytest.raises(DamageError, match="damaged"):
        SavedArrays(Store(str(tmp_path)), "c")


def test_boxes_that_do_not_cover_an_array_are_damage(tmp_path):
    saved = save(tmp_path, quarters()[0])
    with pytest.raises(DamageError) as caught:
        saved.whole("p", "m")
    assert "do not make up" in str(caught.value)
