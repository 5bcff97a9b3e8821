"""`data.on_error: skip`: the rows are those of the text without the bad records, by one process and by many."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordWriter
from pydantic import ValidationError

from distillcache.cache_builder.build import build_cache
from distillcache.cache_builder.prepare import prepare_rows
from distillcache.cache_builder.text import shared, token_stream
from distillcache.cache_builder.text.token_stream import job_fingerprint
from distillcache.models.text.tokenizer import TextTokenizer
from distillcache.schemas.config import DataConfig, PrepareConfig
from distillcache.schemas.errors import InputError
from distillcache.schemas.format.rows import RowsIndex
from distillcache.schemas.store.store import Store
from distillcache.tools import cli
from distillcache.tools.look.verify import verify_cache
from tests.cache_builder.test_prepare import folder_bytes, make_tokenizer
from tests.cache_builder.text.test_chat import HELLO, chat_tokenizer
from tests.cache_builder.text.test_shared import job_of
from tests.conftest import build_config

GOOD = [json.dumps({"text": letters}).encode() for letters in ("abcdefgh", "hgfe", "abc" * 9, "dd", "efgh" * 5)]
BAD = {
    "no JSON": b'{"text": "ab',
    "bad UTF-8": b'{"text": "a\xff"}',
    "a list": b'["a"]',
    "no such field": b'{"other": "a"}',
    "a number": b'{"text": 3}',
    "half a surrogate": b'{"text": "\\ud800"}',
    "too deep": b"[" * 100_000,
}


def prepare(path: Path, out: Path, *, many: bool = False, **data: object) -> RowsIndex:
    config = DataConfig.model_validate({"path": str(path), "row_tokens": 8, "eval_rows": 1, **data})
    tokenizer = make_tokenizer() if config.format != "chat" else None
    prepared = PrepareConfig(out=str(out), data=config, num_processes=2 if many else 1)
    return prepare_rows(prepared, tokenizer=tokenizer, rows_per_file=3)


def listed(out: Path) -> list[str]:
    """Where each skipped record stood."""
    return [json.loads(line)["where"] for line in (out / "skipped.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_stops_or_is_skipped(name: str, tmp_path: Path) -> None:
    bad, good = tmp_path / "bad.jsonl", tmp_path / "good.jsonl"
    bad.write_bytes(b"\n".join([BAD[name], *GOOD[:3], BAD[name], *GOOD[3:]]) + b"\n")
    good.write_bytes(b"\n".join(GOOD) + b"\n")
    with pytest.raises(InputError, match=r"bad\.jsonl"):
        prepare(bad, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "rows.json").exists()
    index, expected = prepare(bad, tmp_path / "skipped", on_error="skip"), prepare(good, tmp_path / "expected")
    assert index.skipped == 2
    assert listed(tmp_path / "skipped") == [f"{bad}:1", f"{bad}:5"]
    assert (index.content_digest, index.documents) == (expected.content_digest, expected.documents)
    assert not (tmp_path / "expected" / "skipped.jsonl").exists()


@pytest.mark.parametrize("max_rows", [None, 3, 7, 12])
def test_many_processes_write_the_same_folder(
    tmp_path: Path, max_rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_stream, "CHUNK_TOKENS", 30)
    monkeypatch.setattr(shared, "POLL_S", 0.01)
    folder = tmp_path / "corpus"
    folder.mkdir()
    bad = list(BAD.values())
    for number in range(4):
        lines = [line for pair in zip(GOOD, [*bad[number:], *bad[:number]], strict=False) for line in pair]
        (folder / f"{number}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    chosen = {"on_error": "skip", "max_rows": max_rows}
    index = prepare(folder, tmp_path / "one", **chosen)
    assert prepare(folder, tmp_path / "many", many=True, **chosen) == index
    assert index.skipped == len(listed(tmp_path / "one")) > 0
    assert folder_bytes(str(tmp_path / "one")) == folder_bytes(str(tmp_path / "many"))


def test_a_pipeline_writes_the_same_folder(tmp_path: Path) -> None:
    pytest.importorskip("apache_beam")
    from distillcache.cache_builder.text.beam import prepare_with_beam

    text = tmp_path / "a.jsonl"
    text.write_bytes(b"\n".join([GOOD[0], BAD["no JSON"], *GOOD[1:]]) + b"\n")
    prepare(text, tmp_path / "one", on_error="skip")
    data = DataConfig(path=str(text), row_tokens=8, eval_rows=1, on_error="skip")
    config = PrepareConfig(out=str(tmp_path / "beam"), data=data)
    prepare_with_beam(config, [], tokenizer=make_tokenizer(), rows_per_file=3)
    assert folder_bytes(str(tmp_path / "one")) == folder_bytes(str(tmp_path / "beam"))


def test_a_document_that_the_tokenizer_cannot_encode_is_found_in_its_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(self: TextTokenizer, texts: list[str]) -> list[list[int]]:
        if "deadbeef" in texts:
            raise ValueError("no such piece")
        return encode_documents(self, texts)

    encode_documents = TextTokenizer.encode_documents
    monkeypatch.setattr(TextTokenizer, "encode_documents", encode)
    text = tmp_path / "a.jsonl"
    text.write_bytes(b"\n".join([*GOOD, b'{"text": "deadbeef"}', *GOOD]) + b"\n")
    with pytest.raises(InputError, match="cannot encode"):
        prepare(text, tmp_path / "stopped")
    assert prepare(text, tmp_path / "rows", on_error="skip").skipped == 1
    assert listed(tmp_path / "rows") == [f"{text}:6"]


def test_a_text_file_is_one_record(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("abcdefgh" * 9)
    (folder / "b.txt").write_bytes(b"a\xff")
    assert prepare(folder, tmp_path / "rows", on_error="skip").skipped == 1
    assert listed(tmp_path / "rows") == [str(folder / "b.txt")]


def test_a_row_of_a_table_is_one_record(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [b"abcdefgh", b"a\xff", b"hgfe" * 3, None, b"efgh"]
    column = pa.array(texts, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="row 2"):
        prepare(tmp_path / "a.parquet", tmp_path / "stopped")
    assert prepare(tmp_path / "a.parquet", tmp_path / "rows", on_error="skip").documents == 3
    assert listed(tmp_path / "rows") == [f"{tmp_path}/a.parquet row {row}" for row in (2, 4)]


def test_a_record_of_tokens_is_one_record(tmp_path: Path) -> None:
    writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for tokens in (np.arange(1, 9), np.arange(2.0), np.arange(1, 9) + 10**6, np.arange(1, 9)):
        writer.write(safetensors.numpy.save({"tokens": tokens}))
    writer.write(b"neither")
    writer.close()
    with pytest.raises(InputError, match="record 1"):
        prepare(tmp_path / "a.array_record", tmp_path / "stopped")
    assert prepare(tmp_path / "a.array_record", tmp_path / "rows", on_error="skip").skipped == 3
    assert sorted(listed(tmp_path / "rows")) == [f"{tmp_path}/a.array_record record {number}" for number in (1, 2, 4)]


def test_a_damaged_file_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00")
    with pytest.raises(InputError, match=r"a\.jsonl\.gz"):
        prepare(tmp_path / "a.jsonl.gz", tmp_path / "rows", on_error="skip")


def test_a_text_of_which_nothing_is_left_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"[]\n[]\n")
    with pytest.raises(InputError, match="2 records"):
        prepare(tmp_path / "a.jsonl", tmp_path / "rows", on_error="skip")


CHATS = [
    {"messages": HELLO},
    {"messages": [{"role": "user", "content": "refuse"}]},
    {"messages": HELLO, "tools": "f"},
    {"messages": []},
    {"messages": [*HELLO, *HELLO]},
]
TURNS = (
    "{% for m in messages %}{% if m.content == 'refuse' %}{{ raise_exception('no') }}{% endif %}"
    "{{ m.role ~ ':' ~ m.content ~ '<|turn|>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_chats_that_cannot_be_written_are_counted(tmp_path: Path, console: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "a.jsonl", tmp_path / "rows"
    text.write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    chat_tokenizer(tmp_path / "tokenizer", TURNS)
    words = ["prepare", "--out", str(out), "--data.path", str(text), "--data.tokenizer", str(tmp_path / "tokenizer")]
    words += ["--data.format", "chat", "--data.eval-rows", "0", "--data.row-tokens", "32"]
    assert cli.main(words) == 2
    assert "a.jsonl:2" in console.readouterr().err
    assert cli.main([*words, "--data.on-error", "skip"]) == 0
    said = console.readouterr().err
    assert re.search(
        rf"rows in {re.escape(str(out))}: \d+ rows? of 32 tokens \(0 held out\) from \d+ documents?, ", said
    )
    assert f"3 records skipped, listed in {out}/" in said
    assert listed(out) == [f"{text}:{line}" for line in (2, 3, 4)]


@pytest.mark.parametrize("template", ["{% for %}", "{{ lipsum() }}"])
def test_a_template_that_can_write_nothing_stops(template: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(CHATS[0]) + "\n")
    chat_tokenizer(tmp_path / "tokenizer", template)
    with pytest.raises(InputError, match="chat template"):
        prepare(
            tmp_path / "a.jsonl",
            tmp_path / "rows",
            on_error="skip",
            format="chat",
            tokenizer=str(tmp_path / "tokenizer"),
        )


def test_the_default_is_written_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD[0])
    stop, skip = (DataConfig(path=str(tmp_path / "a.jsonl"), on_error=each) for each in ("stop", "skip"))
    assert "on_error" not in stop.model_dump()
    one, other = (job_fingerprint(job_of(PrepareConfig(out="rows", data=data))) for data in (stop, skip))
    assert one != other


@pytest.mark.parametrize("value", ["2025-02-30", "2025-13-45", "86400", "20250131", 86400, 0, True, 1.5, "today"])
def test_a_day_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(ValidationError):
        DataConfig.model_validate({"path": "a", "chat_date": value})


def test_a_build_keeps_the_list(
    tmp_path: Path, teacher: Path, corpus: Path, console: pytest.CaptureFixture[str]
) -> None:
    """With the segment, where prepared rows are gone: of a first build, and of an extension by another text."""
    bad, more = tmp_path / "bad.jsonl", tmp_path / "more.jsonl"
    bad.write_text("nothing\n" + corpus.read_text())
    more.write_text(json.dumps({"text": "another text " * 9}) + "\n[]\n{}\n")
    for path, extend in ((bad, False), (more, True)):
        data = DataConfig(path=str(path), row_tokens=16, eval_rows=1, on_error="skip")
        build_cache(build_config(tmp_path / "c", teacher, corpus, data=data, extend=extend))
    found = sorted((tmp_path / "c/segments").glob("*/skipped.jsonl"))
    lines = [[json.loads(line)["where"] for line in file.read_text().splitlines()] for file in found]
    assert lines == [[f"{bad}:1"], [f"{more}:2", f"{more}:3"]]
    said = console.readouterr().err
    assert all(str(file) in said for file in found)
    assert verify_cache(Store(str(tmp_path / "c")))["findings"] == []
    assert not list((tmp_path / "c/segments").glob("*prepared*"))
