"""Parquet inputs: a column of texts, chats in a table, and what is refused."""

import datetime
import decimal
from pathlib import Path

import pytest

from distillcache.cache_builder.text.documents import documents
from distillcache.cache_builder.text.files.inputs import InputReader, input_files
from distillcache.cache_builder.text.files.parquet import table_records
from distillcache.cache_builder.text.skipped import Skipped
from distillcache.schemas.config import DataConfig
from distillcache.schemas.errors import InputError, RecordError
from distillcache.tools.plan.command import unpacked_bytes
from tests.cache_builder.text.test_chat import CHATML, HELLO, chat_tokenizer, encoded, write_chats
from tests.cache_builder.text.test_documents import found_in

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
    assert caught.value.facts["row"] == f"{path} row 1"


def test_a_table_of_chats_that_is_read_as_text_is_named_as_such(tmp_path: Path) -> None:
    for name, table in {"chats": {"messages": [HELLO]}, "empty": {}}.items():
        parquet.write_table(pyarrow.table(table), tmp_path / f"{name}.parquet")
    with pytest.raises(InputError, match="lacks the column") as caught:
        found_in(tmp_path / "chats.parquet")
    assert "data.format to chat" in caught.value.next
    with pytest.raises(InputError, match="lacks the column") as caught:
        found_in(tmp_path / "empty.parquet")
    assert (caught.value.facts["found"], "data.text_field" in caught.value.next) == ("no column", True)


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


@pytest.mark.parametrize("chat", [False, True])
def test_a_text_that_a_thousand_rows_share_is_in_memory_once(tmp_path: Path, chat: bool) -> None:
    """A file of a kilobyte says a mebibyte 100 times: 100 MiB that no reader should hold."""
    text, path = "a" * (1 << 20), tmp_path / "a.parquet"
    messages = [{"role": "user", "content": text}]
    column = [messages] * 100 if chat else pyarrow.array([text] * 100)
    parquet.write_table(pyarrow.table({"messages" if chat else "text": column}), path, compression="zstd")
    assert path.stat().st_size < 5000
    data = DataConfig(path=str(path), format="chat" if chat else "auto")
    (file,) = input_files(data)
    pool, count = pyarrow.default_memory_pool(), 0
    before = pool.bytes_allocated()
    with InputReader(file) as reader:
        for _, record in table_records(file, reader, data):
            assert not isinstance(record, Skipped)
            count += len(str(record["messages" if chat else "text"])) >= len(text)
            assert pool.bytes_allocated() - before < 20 << 20
    assert count == 100


def test_row_groups_with_texts_of_their_own_are_read_alike(tmp_path: Path) -> None:
    texts = [f"text {number % 7 if number < 1500 else number}" for number in range(3000)]
    for number, dictionary in enumerate([True, False]):
        path = tmp_path / f"{number}.parquet"
        parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=700, use_dictionary=dictionary)
        assert found_in(path) == texts


def test_maps_in_a_table_are_mappings_and_give_each_key_once(tmp_path: Path) -> None:
    message = pyarrow.map_(pyarrow.string(), pyarrow.string())
    chats = [
        [[("role", "user"), ("content", "Hi")], [("role", "assistant"), ("content", "Ho")]],
        [[("role", "user"), ("content", "Hi"), ("content", "Hu")]],
    ]
    column = pyarrow.array(chats, pyarrow.list_(message))
    parquet.write_table(pyarrow.table({"messages": column}), tmp_path / "a.parquet")
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", CHATML)
    lines = write_chats(tmp_path / "a.jsonl", {"messages": HELLO})
    table = lines.model_copy(update={"path": str(tmp_path / "a.parquet"), "on_error": "skip"})
    assert encoded(table, tokenizer) == encoded(lines, tokenizer)
    with pytest.raises(RecordError, match="cannot be read") as caught:
        encoded(table.model_copy(update={"on_error": "stop"}), tokenizer)
    assert caught.value.facts["record"] == f"{tmp_path / 'a.parquet'} row 2"


@pytest.mark.parametrize(
    "value", [datetime.date(2025, 1, 1), datetime.datetime(2025, 1, 1), decimal.Decimal("1.5"), b"a"]
)
def test_values_that_are_no_text_are_refused_in_chats(tmp_path: Path, value: object) -> None:
    call = {"function": {"name": "f", "arguments": {"x": value}}}
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": chat}]), tmp_path / "a.parquet")
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", CHATML)
    with pytest.raises(RecordError, match="neither text nor number") as caught:
        encoded(DataConfig(path=str(tmp_path / "a.parquet"), format="chat"), tokenizer)
    assert caught.value.facts["field"] == "messages[1].tool_calls[0].function.arguments.x"
    assert caught.value.facts["found"] == type(value).__name__


def test_what_is_wrong_with_a_row_is_told_of_a_row(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": [5]}), tmp_path / "t.parquet")
    with pytest.raises(RecordError) as caught:
        list(documents(DataConfig(path=str(tmp_path / "t.parquet"))))
    assert "row   " in str(caught.value)
    assert "correct or remove the row" in str(caught.value)
    assert "line" not in str(caught.value)
