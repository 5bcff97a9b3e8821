"""ArrayRecord inputs: texts, tokens that pass through unchanged, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordWriter

from distillcache.cache_builder.prepare import prepare_rows
from distillcache.schemas.config import DataConfig, PrepareConfig
from distillcache.schemas.errors import InputError
from distillcache.schemas.format.rows import RowReader
from distillcache.schemas.store.store import Store
from tests.cache_builder.test_prepare import make_tokenizer, write_lines
from tests.cache_builder.text.files.test_tf_example import example
from tests.cache_builder.text.test_documents import found_in


def write_records(path: Path, *records: bytes) -> Path:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


def test_records_of_text_are_tokenised(tmp_path: Path) -> None:
    two = example(text=["zwö".encode(), b""])
    path = write_records(tmp_path / "a.array_record", example(text=[b"one"], id=[7]), two)
    assert found_in(path) == ["one", "zwö"]
    renamed = path.rename(tmp_path / "train.array_record-00000-of-00001")
    assert found_in(renamed) == ["one", "zwö"]
    body = write_records(tmp_path / "b.arrayrecord", example(body=[b"of another field"]))
    assert found_in(body, text_field="body") == ["of another field"]


def test_records_of_tokens_are_taken_as_they_are(tmp_path: Path) -> None:
    packed = example(inputs=[5, 6, 7, 8, 0], inputs_segmentation=[1, 1, 2, 2, 0], completion_mask=[0, 1, 1, 0, 0])
    said = np.array([0, 1, 1, 2], np.uint8)
    own = safetensors.numpy.save({"tokens": np.arange(3, 7, dtype=np.uint16), "loss_mask": said})
    path = write_records(tmp_path / "a.array_record", packed, own, example(text=[9, 10]), example(tokens=[]))
    expected = [([5, 6], [0, 1]), ([7, 8], [1, 0]), ([3, 4, 5, 6], [0, 1, 1, 1]), ([9, 10], [1, 1])]
    assert found_in(path) == expected
    config = PrepareConfig(out=str(tmp_path / "rows"), data=DataConfig(path=str(path), row_tokens=10, eval_rows=0))
    index = prepare_rows(config, tokenizer=make_tokenizer())
    (row,) = RowReader(Store(config.out))
    assert (index.documents, index.tokens) == (4, 10)
    assert row.tokens.tolist() == [token for tokens, _ in expected for token in tokens]
    assert row.loss_mask.astype(int).tolist() == [mark for _, mask in expected for mark in mask]
    assert row.segment_ids.tolist() == [1, 1, 2, 2, 3, 3, 3, 3, 4, 4]


def test_rows_packed_again_are_the_same_rows(tmp_path: Path) -> None:
    text = write_lines(tmp_path / "text.jsonl", ["abcdefgh" * n for n in range(1, 9)])
    first = PrepareConfig(out=str(tmp_path / "one"), data=DataConfig(path=str(text), row_tokens=16, eval_rows=0))
    index = prepare_rows(first, tokenizer=make_tokenizer())
    data = DataConfig(path=str(tmp_path / "one" / "rows" / "*.array_record"), row_tokens=16, eval_rows=0)
    again = prepare_rows(PrepareConfig(out=str(tmp_path / "two"), data=data), tokenizer=make_tokenizer())
    assert (again.content_digest, again.tokens) == (index.content_digest, index.tokens)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"\xff\xff", "neither a tf.train.Example"),
        (b"", "neither a tf.train.Example"),
        (example(body=[b"x"], id=[1]), "body, id"),
        (example(text=[b"\xff"]), "not UTF-8"),
        (example(tokens=[0.5]), "float32[1]"),
        (example(tokens=[-1]), "not token ids"),
        (example(tokens=[2**40]), "not token ids"),
        (example(tokens=[29]), "does not have"),
        (example(tokens=[1, 2], loss_mask=[1]), "whole numbers [2]"),
        (safetensors.numpy.save({"tokens": np.zeros((2, 2), np.int32)}), "int32[2, 2]"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(tmp_path: Path, record: bytes, message: str) -> None:
    path = write_records(tmp_path / "a.array_record", example(tokens=[3]), record)
    config = PrepareConfig(out=str(tmp_path / "rows"), data=DataConfig(path=str(path), eval_rows=0))
    with pytest.raises(InputError) as caught:
        prepare_rows(config, tokenizer=make_tokenizer())
    assert message in str(caught.value)
    assert f"{path} record 1" in str(caught.value)
