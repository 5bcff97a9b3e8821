"""Parquet inputs: a column of texts, chats in a table, and what is refused."""

from pathlib import Path

import pytest

from cache_builder.inputs import input_files
from schemas.config import DataConfig
from schemas.errors import InputError, RecordError
from tests.cache_builder.test_chat import CHATML, HELLO, chat_tokenizer, encoded, write_chats
from tests.cache_builder.test_documents import found_in
from tools.plan import unpacked_bytes

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def test_a_column_of_a_table_is_text(tmp_path: Path) -> None:
    texts = [f"text {number} " * (number % 50) for number in range(3000)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": range(3000), "body": texts}), path, row_group_size=700)
    assert found_in(path, text_field="body") == [text for text in texts if text]
    (file,) = input_files(DataConfig(path=str(path)))
    assert unpacked_bytes(file, "body") > unpacked_bytes(file, "id") > 0
    with pytest.raises(InputError, match="lacks the column") as caught:
        found_in(path)
    assert caught.value.facts["found"] == "id, body"
    with pytest.raises(InputError, match="no string") as caught:
        found_in(path, text_field="id")
    assert caught.value.facts["line"] == f"{path} row 1"


def test_chats_may_lie_in_a_table(tmp_path: Path) -> None:
    tokenizer, chats = chat_tokenizer(tmp_path / "tokenizer", CHATML), [HELLO, [*HELLO, HELLO[0]]]
    lines = write_chats(tmp_path / "a.jsonl", *({"messages": messages} for messages in chats))
    parquet.write_table(pyarrow.table({"messages": chats}), tmp_path / "a.parquet")
    table = lines.model_copy(update={"path": str(tmp_path / "a.parquet")})
    assert encoded(table, tokenizer) == encoded(lines, tokenizer)


def test_a_text_that_is_no_utf8_is_named_by_its_row(tmp_path: Path) -> None:
    texts = pyarrow.array([b"good", b"\xff bad"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    with pytest.raises(RecordError, match="not UTF-8") as caught:
        found_in(tmp_path / "a.parquet")
    assert caught.value.facts["record"] == f"{tmp_path / 'a.parquet'} row 2"


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pyarrow.table([["a"], ["b"], [1], [2]], names=["text", "text", "other", "other"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match="two columns of one name") as caught:
        found_in(tmp_path / "a.parquet")
    assert caught.value.facts["column"] == "text"


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
def test_a_flipped_byte_gives_the_rows_or_the_one_error(tmp_path: Path, compression: str) -> None:
    path, texts = tmp_path / "a.parquet", ["first text", "second text", "first text"]
    parquet.write_table(
        pyarrow.table({"text": texts}), path, compression=compression, write_page_checksum=True, store_schema=False
    )
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            found_in(path)
        except InputError:
            refused += 1
    assert refused > 20
