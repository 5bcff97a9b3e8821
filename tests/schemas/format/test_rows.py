"""Rows, their bytes and their index: round trips, determinism, and every kind of damage."""

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from pydantic import Field

from distillcache.schemas.config import Config, DataConfig
from distillcache.schemas.errors import DamageError, InputError
from distillcache.schemas.format.canonical import from_canonical, to_canonical
from distillcache.schemas.format.digest import digest_bytes
from distillcache.schemas.format.rows import (
    Row,
    RowReader,
    RowsFile,
    RowsIndex,
    decode_row,
    encode_row,
    pack_rows,
    unpack_rows,
)
from distillcache.schemas.store.store import Store


def make_row(seed: int, row_tokens: int = 8) -> Row:
    generator = np.random.default_rng(seed)
    segment_ids = np.sort(generator.integers(0, 3, row_tokens))[::-1].astype(np.int32)
    return Row(
        tokens=generator.integers(0, 50_000, row_tokens).astype(np.int32),
        positions=np.arange(row_tokens, dtype=np.int32),
        segment_ids=segment_ids,
        loss_mask=segment_ids > 0,
        split="eval" if seed % 3 == 0 else "train",
    )


def assert_same(one: Row, other: Row) -> None:
    for name in ("tokens", "positions", "segment_ids", "loss_mask"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), strict=True)
    assert one.split == other.split


@given(seed=st.integers(0, 10_000), row_tokens=st.integers(1, 300))
@settings(deadline=None, max_examples=50)
def test_a_row_comes_back_as_it_was(seed: int, row_tokens: int) -> None:
    row = make_row(seed, row_tokens)
    record = encode_row(row)
    assert record == encode_row(row)
    assert_same(decode_row(record), row)


def test_strided_and_wider_arrays_are_stored_by_value() -> None:
    row = make_row(1, 16)
    strided = Row(
        row.tokens[::2], row.positions[::2], row.segment_ids.astype(np.int64)[::2], row.loss_mask[::2], "train"
    )
    assert_same(
        decode_row(encode_row(strided)),
        Row(
            *(
                np.ascontiguousarray(a)
                for a in (row.tokens[::2], row.positions[::2], row.segment_ids[::2], row.loss_mask[::2])
            ),
            "train",
        ),
    )


def record_with(**changes: np.ndarray | None) -> bytes:
    tensors = safetensors.numpy.load(encode_row(make_row(1)))
    return safetensors.numpy.save({k: v for k, v in {**tensors, **changes}.items() if v is not None})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"", "safetensors"),
        (encode_row(make_row(1))[:-1], "safetensors"),
        (record_with(tokens=None), "tensors"),
        (record_with(extra=np.zeros(8, np.int32)), "tensors"),
        (record_with(tokens=np.zeros(8, np.int64)), "int64"),
        (record_with(positions=np.zeros(7, np.int32)), "positions int32[7]"),
        (record_with(segment_ids=np.zeros((8, 1), np.int32)), "segment_ids int32[8, 1]"),
        (record_with(split=np.zeros(2, np.uint8)), "split"),
        (record_with(split=np.full(1, 2, np.uint8)), "split 2"),
        (record_with(loss_mask=np.full(8, 255, np.uint8)), "loss_mask 255"),
    ],
)
def test_other_bytes_are_no_row(record: bytes, message: str) -> None:
    with pytest.raises(DamageError) as caught:
        decode_row(record, "shard 7 row 3")
    assert message in str(caught.value)
    assert "shard 7 row 3" in str(caught.value)


@pytest.mark.parametrize("count", [0, 1, 2, 700])
def test_a_file_of_rows_comes_back_and_is_the_same_every_time(count: int) -> None:
    records = [encode_row(make_row(seed, 256)) for seed in range(count)]
    packed = pack_rows(records)
    assert unpack_rows(packed, count) == records
    assert unpack_rows(packed) == records
    assert all(pack_rows(records) == packed for _ in range(3))


def test_a_file_with_another_number_of_rows_is_damage() -> None:
    packed = pack_rows([b"a", b"b"])
    with pytest.raises(DamageError, match="wrong number of rows") as caught:
        unpack_rows(packed, 3, "gs://bucket/rows/00000.array_record")
    assert caught.value.facts == {"object": "gs://bucket/rows/00000.array_record", "found": 2, "expected": 3}


@pytest.mark.parametrize("cut", [0, 100, 70_000, -1])
def test_a_cut_file_of_rows_is_damage(cut: int) -> None:
    packed = pack_rows([encode_row(make_row(seed, 2048)) for seed in range(20)])
    with pytest.raises(DamageError, match="damaged"):
        unpack_rows(packed[:cut], 20)


class Sample(Config):
    zebra: int
    apple: float
    text: str
    nested: dict[str, float] = Field({})


samples = st.builds(
    Sample,
    zebra=st.integers(-(2**40), 2**40),
    apple=st.floats(allow_nan=False, allow_infinity=False),
    text=st.text(st.characters(exclude_categories=["Cs"])),
    nested=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])), st.floats(allow_nan=False, allow_infinity=False)
    ),
)


@given(sample=samples)
@settings(deadline=None)
def test_canonical_json_comes_back(sample: Sample) -> None:
    data = to_canonical(sample)
    assert from_canonical(Sample, data, "here") == sample
    assert to_canonical(from_canonical(Sample, data, "here")) == data


def test_canonical_json_is_sorted_compact_and_ends_in_its_digest() -> None:
    body = b'{"apple":0.5,"nested":{},"text":"\xc3\xa9","zebra":1}'
    expected = body[:-1] + b',"digest":"' + digest_bytes(body).encode() + b'"}'
    assert to_canonical(Sample(zebra=1, apple=0.5, text="é")) == expected


def test_every_flipped_bit_of_canonical_json_is_damage() -> None:
    data = to_canonical(Sample(zebra=1, apple=0.5, text="é"))
    for place in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            with pytest.raises(DamageError) as caught:
                from_canonical(Sample, bytes(flipped), "gs://b/plan.json")
            assert "gs://b/plan.json" in str(caught.value)


def with_digest(body: bytes) -> bytes:
    return body[:-1] + b',"digest":"' + digest_bytes(body).encode() + b'"}'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not what was committed"),
        (b"null", "not what was committed"),
        (b'{"digest":"' + b"0" * 32 + b'"}', "not what was committed"),
        (to_canonical(Sample(zebra=1, apple=0.5, text="")) + b"\n", "not what was committed"),
        (b" " + to_canonical(Sample(zebra=1, apple=0.5, text="")), "not what was committed"),
        (with_digest(b'{"apple":0.5,"nested":{},"text":"","zebra":1 }'), "not in canonical form"),
        (with_digest(b'{"apple":0.5,"nested":{},"zebra":1,"text":""}'), "not in canonical form"),
        (with_digest(b'{"apple":0.5,"text":"","zebra":1}'), "not in canonical form"),
        (with_digest(b'{"apple":0.5,"nested":{},"text":"","zebra":1.0}'), "not in canonical form"),
        (with_digest(b'{"apple":0.5,"nested":{},"new":1,"text":"","zebra":1}'), "fields that this version writes"),
        (with_digest(b'{"apple":0.5,"nested":{},"text":""}'), "fields that this version writes"),
    ],
)
def test_only_one_spelling_is_accepted(data: bytes, message: str) -> None:
    with pytest.raises(DamageError, match=message):
        from_canonical(Sample, data, "here")


def test_not_a_number_cannot_be_stored() -> None:
    with pytest.raises(ValueError, match="finite number"):
        to_canonical(Sample(zebra=1, apple=float("nan"), text=""))


def write_folder(path: Path, count: int, rows_per_file: int, prefix: str = "") -> Store:
    store, files = Store(str(path)), []
    records = [encode_row(make_row(seed)) for seed in range(count)]
    for number, start in enumerate(range(0, count, rows_per_file)):
        part = records[start : start + rows_per_file]
        name, packed = f"rows/{number:05d}.array_record", pack_rows(part)
        store.write(prefix + name, packed)
        files.append(RowsFile(name=name, rows=len(part), length=len(packed), digest=digest_bytes(packed)))
    index = RowsIndex(
        rows=count,
        row_tokens=8,
        eval_indices=tuple(range(0, count, 3)),
        documents=1,
        tokens=1,
        vocab_size=50_000,
        eos_id=0,
        tokenizer_digest="",
        text_digest="",
        content_digest=digest_bytes(b"".join(records)),
        data=DataConfig(path="text"),
        rows_per_file=rows_per_file,
        files=tuple(files),
    )
    store.write(prefix + "rows.json", to_canonical(index))
    return store


@pytest.mark.parametrize("rows_per_file", [1, 3, 4, 100])
@pytest.mark.parametrize("prefix", ["", "segments/0000/prepared/"])
def test_a_reader_finds_every_row_by_its_number(tmp_path: Path, rows_per_file: int, prefix: str) -> None:
    reader = RowReader(write_folder(tmp_path, 10, rows_per_file, prefix), prefix)
    assert len(reader) == 10
    assert reader.index.eval_rows == 4
    for number in (9, 0, 5, 5, 2, 7):
        assert_same(reader[number], make_row(number))
    for row, number in zip(reader.slice(2, 9), range(2, 9), strict=True):
        assert_same(row, make_row(number))
    assert reader.slice(4, 4) == []
    assert len(list(reader)) == 10
    for outside in (-1, 10):
        with pytest.raises(IndexError):
            reader[outside]


def test_a_folder_without_an_index_holds_no_rows(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no finished rows") as caught:
        RowReader(Store(str(tmp_path)))
    assert str(tmp_path / "rows.json") in str(caught.value)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    store = write_folder(tmp_path, 10, 4)
    file = tmp_path / "rows" / "00001.array_record"
    whole = file.read_bytes()
    assert_same(RowReader(store)[3], make_row(3))
    for place in range(0, len(whole), 4999):
        flipped = bytearray(whole)
        flipped[place] ^= 16
        file.write_bytes(flipped)
        reader = RowReader(store)
        with pytest.raises(DamageError) as caught:
            reader[4]
        assert str(file) in str(caught.value)
        assert_same(reader[3], make_row(3))  # the other files are whole
    file.unlink()
    with pytest.raises(DamageError, match="not what was committed"):
        RowReader(store)[4]
    (tmp_path / "rows.json").write_bytes((tmp_path / "rows.json").read_bytes().replace(b'"rows":10', b'"rows":11'))
    with pytest.raises(DamageError, match="not what was committed"):
        RowReader(store)
