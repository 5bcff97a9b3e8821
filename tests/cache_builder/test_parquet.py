"""Parquet inputs: a column of texts, chats in a table, and what is refused."""

from pathlib import Path

import pytest

from cache_builder.inputs import input_files
from schemas.config import DataConfig
from schemas.errors import InputError
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
