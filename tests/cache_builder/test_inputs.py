"""Which files data.path names, and what is refused by first bytes, lengths and fields given twice."""

import bz2
import glob
import gzip
import lzma
import os
import zipfile
from pathlib import Path

import pytest

from cache_builder.inputs import input_files
from schemas.config import DataConfig
from schemas.errors import InputError, RecordError
from tests.cache_builder.test_array_records import example
from tests.cache_builder.test_documents import found_in


def names_of(path: object) -> list[str]:
    return [Path(str(file)).name for file in input_files(DataConfig(path=str(path)))]


def test_links_to_folders_are_followed_and_circles_end(tmp_path: Path) -> None:
    corpus, real = tmp_path / "corpus", tmp_path / "real"
    for folder in (corpus / "sub", real / "deep"):
        folder.mkdir(parents=True)
    (corpus / "own.jsonl").write_text("{}")
    (corpus / "sub" / "inner.jsonl").write_text("{}")
    (real / "deep" / "x.jsonl").write_text("{}")
    (corpus / "part").symlink_to(os.path.join("..", "real"))
    for number in range(4):  # Python's own `**` never comes back from these
        (corpus / f"loop{number}").symlink_to(".")
        (real / f"up{number}").symlink_to(os.path.join("..", "corpus"))
    expected = ["own.jsonl", "x.jsonl", "inner.jsonl"]
    assert names_of(corpus) == names_of(corpus / "**" / "*.jsonl") == names_of(tmp_path / "c*" / "**") == expected
    assert names_of(corpus / "**" / "deep") == ["x.jsonl"]
    assert names_of(corpus / "p*") == ["x.jsonl", "own.jsonl", "inner.jsonl"]


@pytest.mark.parametrize("pattern", ["**/*.txt", "a/**", "**/b/**/*.txt", "**/.h/*.txt", "a/**/c.txt", "**/**/c.txt"])
def test_two_stars_match_what_pythons_glob_does(tmp_path: Path, pattern: str) -> None:
    for name in ("c.txt", "a/c.txt", "a/b/c.txt", "a/b/d/e.txt", "a/.h/f.txt", ".h/g.txt", "b/.x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found = map(Path, glob.glob(str(tmp_path / pattern), recursive=True))
    files = {path for path in found if path.is_file()}
    assert {Path(str(file)) for file in input_files(DataConfig(path=str(tmp_path / pattern)))} == files


def zipped(path: Path) -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jsonl", "{}")
    return path.read_bytes()


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet"])
@pytest.mark.parametrize(
    ("packed", "found", "advice"),
    [
        (gzip.compress(b"{}"), "gzip", "gz"),
        (bz2.compress(b"{}"), "bzip2", "bzip2 -d"),
        (lzma.compress(b"{}"), "xz", "xz -d"),
        (b"\x28\xb5\x2f\xfd\x20\x02\x11\x00\x00{}", "zstd", "zstd -d"),
        (None, "a ZIP archive", "unzip"),
        ("{}".encode("utf-16"), "text in UTF-16", "iconv"),
    ],
)
def test_a_packed_file_under_another_name_is_recognised(
    tmp_path: Path, name: str, packed: bytes | None, found: str, advice: str
) -> None:
    (tmp_path / name).write_bytes(packed if packed is not None else zipped(tmp_path / "z"))
    with pytest.raises(InputError, match="what its name says") as caught:
        found_in(tmp_path / name)
    assert caught.value.facts["found"] == found
    assert advice in caught.value.next


@pytest.mark.parametrize(("data", "found"), [(b'{"text": "x"}', "not packed"), (b"PAR1....", "parquet")])
def test_a_gz_that_is_none_is_recognised(tmp_path: Path, data: bytes, found: str) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    with pytest.raises(InputError, match="what its name says") as caught:
        found_in(tmp_path / "a.jsonl.gz")
    assert caught.value.facts["found"] == found


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.jsonl", "a.txt", "a.array_record", "a.parquet"])
def test_a_document_longer_than_stated_is_refused(tmp_path: Path, name: str) -> None:
    import pyarrow.parquet
    from array_record.python.array_record_module import ArrayRecordWriter

    path, text = tmp_path / name, "0" * (1 << 20) + "1"
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), path)
    elif name == "a.array_record":
        writer = ArrayRecordWriter(str(path), "group_size:1")
        writer.write(example(text=[text.encode()]))
        writer.close()
    else:
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    with pytest.raises(InputError, match="too long") as caught:
        found_in(path, max_document_mib=1)
    assert str(path) in str(caught.value)


def test_a_bomb_is_unpacked_no_further_than_a_line_may_be_long(tmp_path: Path) -> None:
    import tracemalloc

    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(bytes(64 << 20), 1))
    tracemalloc.start()
    with pytest.raises(InputError, match="too long"):
        found_in(tmp_path / "a.jsonl.gz", max_document_mib=1)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


def test_a_field_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a \\"text\\" \\"text\\"", "meta": {"text": 1}}\n{"text": "a", "text": "b"}\n')
    with pytest.raises(RecordError, match="gives a field twice") as caught:
        found_in(path)
    assert caught.value.facts == {"line": f"{path}:2", "field": "text"}


def test_a_feature_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    one, two = example(text=[b"one"]), example(text=[b"two"])
    body = bytes([len(one) - 2 + len(two) - 2]) + one[2:] + two[2:]  # Features with both entries
    writer.write(b"\x0a" + body)
    writer.close()
    with pytest.raises(RecordError, match="gives a feature twice"):
        found_in(tmp_path / "a.array_record")
