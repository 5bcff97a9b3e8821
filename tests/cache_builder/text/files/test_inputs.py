"""Which files data.path names, and what is refused by first bytes, lengths and fields given twice."""

import bz2
import glob
import gzip
import io
import lzma
import os
import socket
import tarfile
import zipfile
from pathlib import Path

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from distillcache.cache_builder.text.files.inputs import input_files
from distillcache.schemas.config import DataConfig
from distillcache.schemas.errors import InputError, RecordError
from tests.cache_builder.text.files.test_array_records import example
from tests.cache_builder.text.test_documents import found_in


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
        (gzip.compress(b"{}", mtime=0), "gzip", "gz"),
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


@pytest.mark.parametrize("named", ["folder", "glob", "name"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path, kind: str, named: str) -> None:
    (tmp_path / "a.txt").write_text("a")
    place = tmp_path / "b.txt"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "device":
        place.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(place))
    path = {"folder": tmp_path, "glob": tmp_path / "*.txt", "name": place}[named]
    with pytest.raises(InputError, match="no regular file") as caught:
        input_files(DataConfig(path=str(path)))
    assert caught.value.facts["file"] == place
    assert kind in str(caught.value.facts["found"])


HELLO_JSON = b'{"text": "hello, world"}\n'


def archive(name: str) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    return packed.getvalue()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize(
    ("content", "found", "advice"),
    [
        (HELLO_JSON.decode().encode("utf-32"), "UTF-32", "iconv -f UTF-32 "),
        (HELLO_JSON.decode().encode("utf-16"), "UTF-16", "iconv -f UTF-16 "),
        (HELLO_JSON.decode().encode("utf-16-le"), "UTF-16LE", "iconv -f UTF-16LE "),
        (HELLO_JSON.decode().encode("utf-16-be"), "UTF-16BE", "iconv -f UTF-16BE "),
        (archive("a.txt"), "a tar archive", "tar -xf"),
        (gzip.compress(HELLO_JSON, mtime=0), "gzip", ""),
        (b"PAR1....PAR1", "parquet", ""),
    ],
)
def test_first_bytes_are_looked_at_inside_gzip_too(
    tmp_path: Path, name: str, packed: bool, content: bytes, found: str, advice: str
) -> None:
    file = tmp_path / (name + ".gz" if packed else name)
    file.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(InputError, match="what its name says") as caught:
        found_in(file)
    assert found in str(caught.value.facts["found"])
    assert advice in caught.value.next
    assert not packed or "gzip" in str(caught.value.facts["found"])


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 5\n", "a Git LFS pointer"),
        (gzip.compress(HELLO_JSON, mtime=0), "gzip"),
        (b"PAR1....PAR1", "parquet"),
    ],
)
def test_a_record_file_that_is_something_else_is_recognised(tmp_path: Path, content: bytes, found: str) -> None:
    (tmp_path / "a.array_record").write_bytes(content)
    with pytest.raises(InputError, match="what its name says") as caught:
        found_in(tmp_path / "a.array_record")
    assert caught.value.facts["found"] == found


def test_a_record_file_of_another_name_is_recognised(tmp_path: Path) -> None:
    writer = ArrayRecordWriter(str(tmp_path / "a.txt"), "group_size:1")
    writer.write(b"a")
    writer.close()
    with pytest.raises(InputError, match="what its name says") as caught:
        found_in(tmp_path / "a.txt")
    assert "set data.format to array_record" in caught.value.next


@pytest.mark.parametrize("content", ['[{"text": "a"},\n{"text": "b"}]', '[{"text": "a"}]', '{\n "text": "a"\n}\n'])
def test_json_that_is_not_one_record_a_line_is_told_so(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(RecordError) as caught:
        found_in(tmp_path / "a.jsonl")
    assert "one object a line" in caught.value.next


def test_a_field_that_is_given_twice_in_other_letters_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "te\\u0078t": "b"}\n')
    with pytest.raises(RecordError, match="twice"):
        found_in(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"text": "\\u0041", "x": 1, "\\u0078": 2}\n')
    assert found_in(tmp_path / "b.jsonl") == ["A"]


def test_a_line_of_many_small_objects_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "x": [' + "{}," * 60_000 + "0]}\n")
    with pytest.raises(InputError, match="too long"):
        found_in(tmp_path / "a.jsonl", max_document_mib=1)
    assert found_in(tmp_path / "a.jsonl", max_document_mib=2) == ["a"]


def test_a_limit_that_no_machine_could_hold_is_refused() -> None:
    assert DataConfig(path="a", max_document_mib=1 << 20).max_document_mib == 1 << 20
    with pytest.raises(ValueError, match="less than or equal"):
        DataConfig(path="a", max_document_mib=99999999999999)
