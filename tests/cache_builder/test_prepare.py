"""Text to rows: what is read, how it is packed (against plain Python), what is held out, and what is refused."""

import gzip
import io
import json
import os
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from distillcache.cache_builder.prepare import open_rows, prepare_rows
from distillcache.cache_builder.text import rows_files
from distillcache.cache_builder.text.digest import inputs_digest
from distillcache.cache_builder.text.documents import documents
from distillcache.cache_builder.text.files.inputs import input_files
from distillcache.cache_builder.text.packing import draw_eval_rows, mark_document, pack_tokens
from distillcache.models.text.tokenizer import TextTokenizer
from distillcache.schemas.config import DataConfig, PrepareConfig
from distillcache.schemas.errors import ConfigError, DamageError, InputError, PlanMismatchError, StorageError
from distillcache.schemas.format.digest import digest_bytes
from distillcache.schemas.format.rows import RowReader, unpack_rows
from distillcache.schemas.store.store import Store

EOS, BOS, UNKNOWN = 0, 1, 2
LETTERS = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz", 3)}


def make_tokenizer(rule: str = "") -> TextTokenizer:
    """One token a letter; `rule` is the tokenizer's own: any of bos, eos."""
    vocabulary = {"<eos>": EOS, "<bos>": BOS, "<unk>": UNKNOWN, **LETTERS}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if rule:
        parts = [*(["<bos>"] if "bos" in rule else []), "$A", *(["<eos>"] if "eos" in rule else [])]
        backend.post_processor = processors.TemplateProcessing(
            single=parts, special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
        )
    return TextTokenizer(backend, EOS)


def write_lines(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


def make_config(tmp_path: Path, texts: list[str], *, out: str = "out", **data: object) -> PrepareConfig:
    path = write_lines(tmp_path / "corpus.jsonl", texts)
    values = {"path": str(path), "row_tokens": 8, "eval_rows": 0, **data}
    return PrepareConfig(out=str(tmp_path / out), data=DataConfig(**values))


def pack_by_hand(arrays: list[list[int]], row_tokens: int) -> np.ndarray:
    """[N, 3, T], one token at a time."""
    rows, row, segment, position = [], [], 0, 0
    for array in arrays:
        segment, position = segment + 1, 0
        for token in array:
            if len(row) == row_tokens:
                rows.append(row)
                row, segment, position = [], 1, 0
            row.append((token, position, segment))
            position += 1
    rows.append(row + [(0, 0, 0)] * (row_tokens - len(row)))
    return np.array(rows, np.int32).transpose(0, 2, 1)


def pack(arrays: list[list[int]], row_tokens: int) -> np.ndarray:
    stream = np.concatenate([mark_document(np.array(array, np.int32)) for array in arrays])
    packed = pack_tokens(stream, row_tokens)
    np.testing.assert_array_equal(packed[:, 3], packed[:, 2] > 0)  # every token of a text is a target
    return packed[:, :3]


@given(
    arrays=st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=40), min_size=1, max_size=12),
    row_tokens=st.integers(1, 17),
)
@settings(deadline=None, max_examples=200)
def test_packing_is_concatenate_then_split(arrays: list[list[int]], row_tokens: int) -> None:
    np.testing.assert_array_equal(pack(arrays, row_tokens), pack_by_hand(arrays, row_tokens), strict=True)


def test_a_long_document_is_cut_at_row_ends_and_starts_anew() -> None:
    tokens, positions, segment_ids = pack([[5, 6], [7] * 9], 4).transpose(1, 0, 2)
    assert tokens.tolist() == [[5, 6, 7, 7], [7, 7, 7, 7], [7, 7, 7, 0]]
    assert positions.tolist() == [[0, 1, 0, 1], [0, 1, 2, 3], [0, 1, 2, 0]]
    assert segment_ids.tolist() == [[1, 1, 2, 2], [1, 1, 1, 1], [1, 1, 1, 0]]


def test_a_document_that_ends_with_its_row_leaves_no_padding() -> None:
    tokens, _, segment_ids = pack([[5] * 4, [6] * 8], 4).transpose(1, 0, 2)
    assert tokens.tolist() == [[5] * 4, [6] * 4, [6] * 4]
    assert (segment_ids == 1).all()


def test_one_short_document_is_one_padded_row(tmp_path: Path) -> None:
    config = make_config(tmp_path, ["abc"])
    index = prepare_rows(config, tokenizer=make_tokenizer())
    (row,) = RowReader(Store(config.out))
    assert row.tokens.tolist() == [3, 4, 5, EOS, 0, 0, 0, 0]
    assert row.positions.tolist() == [0, 1, 2, 3, 0, 0, 0, 0]
    assert row.segment_ids.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert row.loss_mask.tolist() == [True] * 4 + [False] * 4
    assert (index.rows, index.documents, index.tokens, index.vocab_size, index.eos_id) == (1, 1, 4, 29, EOS)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("", [3, 4, EOS]), ("bos", [BOS, 3, 4, EOS]), ("eos", [3, 4, EOS]), ("bos eos", [BOS, 3, 4, EOS])],
)
def test_bos_by_the_tokenizers_rule_and_eos_once(tmp_path: Path, rule: str, expected: list[int]) -> None:
    config = make_config(tmp_path, ["ab", "", " \n", "ab"], row_tokens=2 * len(expected))
    index = prepare_rows(config, tokenizer=make_tokenizer(rule))
    assert index.documents == 2  # documents of white space alone are none
    (row,) = RowReader(Store(config.out))
    assert row.tokens.tolist() == expected * 2


@given(texts=st.lists(st.text(st.sampled_from("abcxyz"), min_size=1, max_size=30), min_size=4, max_size=20))
@settings(deadline=None, max_examples=20)
def test_rows_hold_the_corpus_in_order(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    config = make_config(tmp_path_factory.mktemp("prepare"), texts)
    index = prepare_rows(config, tokenizer=make_tokenizer(), rows_per_file=3)
    expected = pack_by_hand([[LETTERS[letter] for letter in text] + [EOS] for text in texts], 8)
    rows = list(RowReader(Store(config.out)))
    np.testing.assert_array_equal([[row.tokens, row.positions, row.segment_ids] for row in rows], expected)
    assert all((row.loss_mask == (row.segment_ids > 0)).all() for row in rows)
    assert index.tokens == sum(int(row.loss_mask.sum()) for row in rows)


def folder_bytes(folder: str) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    texts = ["abcdefgh" * n for n in range(1, 20)]
    one = make_config(tmp_path, texts, out="one", eval_rows=5)
    other = make_config(tmp_path, texts, out="other", eval_rows=5)
    for config in (one, other):
        prepare_rows(config, tokenizer=make_tokenizer(), rows_per_file=50)
    first = folder_bytes(one.out)
    assert sorted(first) == ["rows.json", *(f"rows/0000{n}.array_record" for n in range(4)), "tokenizer.json"]
    assert folder_bytes(other.out) == first
    assert first["tokenizer.json"].decode() == make_tokenizer().to_json()


def test_content_digest_does_not_depend_on_the_files(tmp_path: Path) -> None:
    texts = ["abcdefgh" * n for n in range(1, 12)]
    indices = [
        prepare_rows(
            make_config(tmp_path, texts, out=str(size), eval_rows=5), tokenizer=make_tokenizer(), rows_per_file=size
        )
        for size in (1, 7, 1000)
    ]
    assert [len(index.files) for index in indices] == [indices[0].rows, -(-indices[0].rows // 7), 1]
    assert len({index.content_digest for index in indices}) == 1
    records = unpack_rows(Path(tmp_path, "1000", indices[2].files[0].name).read_bytes())
    assert indices[2].content_digest == digest_bytes(b"".join(records))


def test_eval_rows_are_drawn_from_the_whole_corpus() -> None:
    drawn = draw_eval_rows(1000, 100, 0)
    assert len(set(drawn)) == 100
    assert list(drawn) == sorted(drawn)
    assert 0 <= drawn[0] < 100 < 900 < drawn[-1] < 1000
    assert drawn == draw_eval_rows(1000, 100, 0) != draw_eval_rows(1000, 100, 1)
    assert draw_eval_rows(1, 0, 0) == ()
    assert len(draw_eval_rows(5, 4, 0)) == 4


def test_the_split_is_in_the_rows(tmp_path: Path) -> None:
    config = make_config(tmp_path, ["abcdefg"] * 40, eval_rows=7, eval_seed=3)
    index = prepare_rows(config, tokenizer=make_tokenizer(), rows_per_file=16)
    splits = [row.split for row in RowReader(Store(config.out))]
    assert tuple(n for n, split in enumerate(splits) if split == "eval") == index.eval_indices
    assert index.eval_indices == draw_eval_rows(40, 7, 3)


@pytest.mark.parametrize("eval_rows", [5, 6])
def test_a_row_must_be_left_to_train_on(tmp_path: Path, eval_rows: int) -> None:
    config = make_config(tmp_path, ["abcdefg"] * 5, eval_rows=eval_rows)
    with pytest.raises(InputError, match="too short") as caught:
        prepare_rows(config, tokenizer=make_tokenizer())
    assert "5 rows in all" in str(caught.value)
    assert "data.eval_rows to 4 or less" in str(caught.value)
    assert not Path(config.out, "rows.json").exists()


def test_of_a_single_row_none_can_be_held_out() -> None:
    with pytest.raises(InputError, match="text is too short") as caught:
        draw_eval_rows(1, 64, 0)
    assert "set data.eval_rows to 0, or name more text" in str(caught.value)


def test_a_limit_that_leaves_no_row_to_train_on_is_named_as_such() -> None:
    with pytest.raises(InputError, match="all rows would be held out") as caught:
        draw_eval_rows(3, 64, 0, max_rows=3)
    assert "data.eval_rows to 2 or less, or data.max_rows to 65 or more" in str(caught.value)


def test_settings_that_do_nothing_for_these_files_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "text.txt").write_text("abcdefg" * 9)
    data = DataConfig(
        path=str(tmp_path / "text.txt"), row_tokens=4, eval_rows=1, text_field="body", chat_date=date(2025, 1, 31)
    )
    prepare_rows(PrepareConfig(out=str(tmp_path / "out"), data=data), tokenizer=make_tokenizer())
    assert "data.text_field body has no effect: a .txt file has no fields" in caplog.text
    assert "data.chat_date 2025-01-31 has no effect: data.format is auto, not chat" in caplog.text


def test_documents_know_how_much_of_the_input_is_read(tmp_path: Path) -> None:
    config = make_config(tmp_path, ["ab", "", "cde"])
    size = (tmp_path / "corpus.jsonl").stat().st_size
    (tmp_path / "more.txt").write_text("more")
    data = config.data.model_copy(update={"path": [str(tmp_path / "corpus.jsonl"), str(tmp_path / "more.txt")]})
    read = [document.read_bytes for document in documents(data)]
    assert read == sorted(read)
    assert read[-2:] == [size, size + 4]


def test_max_rows_ends_the_rows_early(tmp_path: Path) -> None:
    whole = make_config(tmp_path, ["abcdefg"] * 50)
    every = prepare_rows(whole, tokenizer=make_tokenizer())
    first = whole.model_copy(update={"out": str(tmp_path / "first")})
    first = first.model_copy(update={"data": whole.data.model_copy(update={"max_rows": 6})})
    index = prepare_rows(first, tokenizer=make_tokenizer())
    assert (index.rows, index.tokens) == (6, 6 * index.row_tokens)
    assert index.documents < every.documents
    for number in range(6):
        ours, theirs = (RowReader(Store(config.out))[number] for config in (first, whole))
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)


def test_finished_rows_are_used_again(tmp_path: Path) -> None:
    config = make_config(tmp_path, ["abcdefg"] * 5)
    index = prepare_rows(config, tokenizer=make_tokenizer())
    before = {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*")}
    moved = tmp_path / "moved.jsonl"
    os.rename(tmp_path / "corpus.jsonl", moved)
    again = config.model_copy(update={"data": config.data.model_copy(update={"path": [str(moved)]})})
    assert prepare_rows(again, tokenizer=make_tokenizer()) == index  # identity is content, not its name
    assert {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"row_tokens": 4}, "data.row_tokens"),
        ({"eval_rows": 1}, "data.eval_rows"),
        ({"eval_seed": 1}, "data.eval_seed"),
        ({"texts": ["abcdefg"] * 6}, "the text's digest"),
        ({"rule": "bos"}, "the tokenizer's digest"),
    ],
)
def test_rows_of_another_config_are_refused(tmp_path: Path, change: dict, named: str) -> None:
    prepare_rows(make_config(tmp_path, ["abcdefg"] * 5), tokenizer=make_tokenizer())
    rule, texts = change.pop("rule", ""), change.pop("texts", ["abcdefg"] * 5)
    other = make_config(tmp_path, texts, **change)
    with pytest.raises(PlanMismatchError, match="another config") as caught:
        prepare_rows(other, tokenizer=make_tokenizer(rule))
    assert named in caught.value.facts
    assert "there" in str(caught.value.facts[named])


def test_unfinished_rows_are_written_again(tmp_path: Path) -> None:
    config = make_config(tmp_path, ["abcdefg"] * 5)
    prepare_rows(config, tokenizer=make_tokenizer())
    whole = folder_bytes(config.out)
    Path(config.out, "rows.json").unlink()
    Path(config.out, "rows", "00000.array_record").write_bytes(b"cut")
    prepare_rows(config, tokenizer=make_tokenizer())
    assert folder_bytes(config.out) == whole


def test_a_damaged_index_is_not_overwritten(tmp_path: Path) -> None:
    config = make_config(tmp_path, ["abcdefg"] * 5)
    prepare_rows(config, tokenizer=make_tokenizer())
    Path(config.out, "rows.json").write_bytes(b"{}")
    with pytest.raises(DamageError):
        prepare_rows(config, tokenizer=make_tokenizer())


def test_a_place_that_cannot_be_written_shows_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    config = make_config(tmp_path, ["abcdefg"], out="file/rows")
    monkeypatch.setattr(rows_files, "token_arrays", lambda *_: pytest.fail("tokenised before"))
    with pytest.raises(StorageError):
        prepare_rows(config, tokenizer=make_tokenizer())


def test_a_full_temporary_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full, a device that is always full")
    real = tempfile.TemporaryFile  # which also keeps what the tokenizers library prints

    def full(**options: Any) -> Any:
        return io.BufferedWriter(io.FileIO("/dev/full", "w")) if options else real()

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(StorageError, match="temporary folder") as caught:
        prepare_rows(make_config(tmp_path, ["abcdefg"]), tokenizer=make_tokenizer())
    assert "No space left" in str(caught.value)


def test_the_tokenizer_is_loaded_from_its_path(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(make_tokenizer().to_json())
    config = make_config(tmp_path, ["abcdefg"], tokenizer=str(path), eos_token="<eos>")
    assert prepare_rows(config).tokenizer_digest == make_tokenizer().digest
    with pytest.raises(ConfigError, match="no tokenizer is named"):
        prepare_rows(make_config(tmp_path, ["abcdefg"]))


def test_a_tokenizer_that_does_not_know_a_character_is_an_error(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="<unk>"))
    with pytest.raises(InputError, match="cannot encode") as caught:
        prepare_rows(make_config(tmp_path, ["a", "b"]), tokenizer=TextTokenizer(backend, 0))
    assert "corpus.jsonl:1" in str(caught.value)


def test_prepared_rows_are_opened_by_their_folder(tmp_path: Path) -> None:
    config = make_config(tmp_path, ["abcdefg"] * 5)
    assert open_rows(config.data) is None
    assert open_rows(DataConfig(path=str(tmp_path))) is None
    prepare_rows(config, tokenizer=make_tokenizer())
    for path in (config.out, [config.out], f"file://{config.out}"):
        reader = open_rows(DataConfig(path=path))  # defaults state nothing
        assert reader is not None
        assert len(reader) == 5
    assert open_rows(DataConfig(path=config.out, row_tokens=8)) is not None
    with pytest.raises(ConfigError, match="made with another config") as caught:
        open_rows(DataConfig(path=config.out, row_tokens=16))
    assert caught.value.facts["data.row_tokens"] == "there 8, here 16"


# What is read.


def texts_of(path: object, **data: object) -> list[str]:
    return [document.text for document in documents(DataConfig(path=path, **data))]


@pytest.fixture
def corpus(tmp_path: Path) -> Iterator[Path]:
    """b.txt, a.jsonl, c.txt.gz and sub/d.jsonl.gz, among files that are no text."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("one document\nof two lines\n")
    write_lines(tmp_path / "a.jsonl", ["first", "second"])
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "sub" / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "third"}\n\n  \n{"text": "fourth"}'))
    (tmp_path / "README.md").write_text("not text")
    (tmp_path / ".hidden.txt").write_text("not seen")
    return tmp_path


def test_a_folder_is_read_in_sorted_order_with_its_subfolders(corpus: Path) -> None:
    expected = ["first", "second", "one document\nof two lines\n", "packed", "third", "fourth"]
    assert texts_of(str(corpus)) == expected
    assert texts_of(str(corpus / "**")) == expected
    assert texts_of(f"file://{corpus}") == expected


def test_listed_paths_keep_their_order_and_count_once(corpus: Path) -> None:
    paths = [str(corpus / "c.txt.gz"), str(corpus / "*.jsonl"), str(corpus / "sub"), str(corpus / "*.txt.gz")]
    assert texts_of(paths) == ["packed", "first", "second", "third", "fourth"]


def test_a_name_with_brackets_is_a_name(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("bracket")
    assert texts_of(str(tmp_path / "a[1].txt")) == ["bracket"]


def test_a_document_says_where_it_came_from(corpus: Path) -> None:
    where = [document.where for document in documents(DataConfig(path=str(corpus / "sub")))]
    assert where == [f"{corpus}/sub/d.jsonl.gz:1", f"{corpus}/sub/d.jsonl.gz:4"]


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfmarked")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "also"}\r\n{"text": "windows"}\r\n')
    assert texts_of(str(tmp_path)) == ["marked", "also", "windows"]


def test_a_line_ends_at_a_newline_only(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028document\x85"}\n')
    assert texts_of(str(tmp_path)) == ["one\u2028document\x85"]


def test_another_field_may_hold_the_text(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", ["body"], field="content")
    assert texts_of(str(tmp_path), text_field="content") == ["body"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'["text"]', "no JSON object"),
        (b'{"body": "x", "id": 1}', "body, id"),
        (b'{"text": null}', "NoneType"),
        (b'{"text": ["x"]}', "list"),
        (b'{"text": "\\ud800"}', "not Unicode"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(InputError) as caught:
        texts_of(str(tmp_path))
    assert message in str(caught.value)
    assert f"{tmp_path}/a.jsonl:3" in str(caught.value)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.gz"])
def test_bytes_that_are_not_utf8_are_named(tmp_path: Path, name: str, mark: bytes) -> None:
    data = mark + b'{"text": "good"}\n{"text": "\xff"}\n'
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(InputError, match="not UTF-8") as caught:
        texts_of(str(tmp_path))
    assert caught.value.facts["file"] == tmp_path / name
    assert caught.value.facts["byte"] == data.index(b"\xff")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "not packed"])
def test_a_damaged_gz_is_an_error(tmp_path: Path, name: str, damage: str) -> None:
    packed = gzip.compress(b'{"text": "' + bytes(np.random.default_rng(0).integers(97, 122, 5000, np.uint8)) + b'"}')
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 255
    data = {"cut": packed[:-20], "flipped": bytes(flipped), "empty": b"", "not packed": b'{"text": "x"}'}[damage]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=r"cannot be read|not JSON|not UTF-8") as caught:
        texts_of(str(tmp_path))
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.txt", "no such file or folder"),
        ("*.txt", "no such file or folder"),
        ("other", "1 other files"),
        ("other/*.md", "1 other files"),
        ("other/a.md", "not a text file"),
    ],
)
def test_a_path_without_text_is_named(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.md").write_text("x")
    (tmp_path / "good.jsonl").write_text('{"text": "x"}')
    named = str(tmp_path / path)
    with pytest.raises(InputError) as caught:
        texts_of([str(tmp_path / "good.jsonl"), named])
    assert message in str(caught.value)
    assert named in str(caught.value)


def test_a_url_of_another_kind_is_named() -> None:
    with pytest.raises(StorageError, match=r"cannot be opened[\s\S]*nowhere://bucket"):
        texts_of(["nowhere://bucket/a.txt"])


def test_no_path_and_no_text_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="names no text"):
        input_files(DataConfig(path=[]))
    (tmp_path / "a.txt").write_text(" \n\t\u00a0")
    write_lines(tmp_path / "b.jsonl", ["", "  "])
    with pytest.raises(InputError, match="the text is empty"):
        texts_of(str(tmp_path))


def test_the_inputs_digest_is_of_content_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    both = inputs_digest(DataConfig(path=str(tmp_path)))
    backwards = inputs_digest(DataConfig(path=[str(tmp_path / "b.txt"), str(tmp_path / "a.txt")]))
    (tmp_path / "a.txt").rename(tmp_path / "aa.txt")
    assert inputs_digest(DataConfig(path=str(tmp_path))) == both != backwards
    (tmp_path / "b.txt").rename(tmp_path / "b.jsonl")  # the same bytes, read in another way
    assert inputs_digest(DataConfig(path=str(tmp_path))) != both


@pytest.mark.parametrize(
    "there",
    [
        ["tokenizer.json", "config.json"],
        ["tokenizer.json"],
        ["corpus.txt"],
        ["rows/notes.txt"],
        ["segments/0000/plan.json"],
    ],
)
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, there: list[str]) -> None:
    """A checkpoint's own tokenizer.json has the name of ours, and was replaced."""
    config = make_config(tmp_path, ["abcdefg"] * 5, eval_rows=1)
    for name in there:
        (Path(config.out) / name).parent.mkdir(parents=True, exist_ok=True)
        (Path(config.out) / name).write_bytes(b"the user's")
    before = folder_bytes(config.out)
    with pytest.raises(ConfigError, match="contains something else") as caught:
        prepare_rows(config, tokenizer=make_tokenizer())
    assert there[0].split("/")[0] in str(caught.value.facts["found"])
    assert folder_bytes(config.out) == before


@pytest.mark.parametrize("lost", ["rows.json", "rows.json tokenizer.json"])
def test_rows_that_lost_their_index_are_made_again(tmp_path: Path, lost: str) -> None:
    config = make_config(tmp_path, ["abcdefg"] * 5, eval_rows=1)
    prepare_rows(config, tokenizer=make_tokenizer())
    before = folder_bytes(config.out)
    for name in lost.split():
        (Path(config.out) / name).unlink()
    prepare_rows(config, tokenizer=make_tokenizer())
    assert folder_bytes(config.out) == before
