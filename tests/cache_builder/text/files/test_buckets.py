"""Corpora in buckets, on real servers: what is listed and read, that it is the local corpus, and what is refused."""

import gzip
import hashlib
import json
import os
import urllib.request
from pathlib import Path

import pytest

from distillcache.cache_builder.prepare import prepare_rows
from distillcache.cache_builder.text.digest import inputs_digest
from distillcache.cache_builder.text.documents import documents
from distillcache.cache_builder.text.files import buckets as remote_module
from distillcache.cache_builder.text.files import inputs
from distillcache.cache_builder.text.files.buckets import BlockReader
from distillcache.cache_builder.text.files.inputs import InputReader, input_files
from distillcache.schemas.config import DataConfig, PrepareConfig, StorageConfig
from distillcache.schemas.errors import InputError, StorageError
from distillcache.schemas.store.store import Store, using
from tests.cache_builder.test_prepare import folder_bytes, make_tokenizer
from tests.servers.fixtures import Bucket

FILES = {
    "a.jsonl": b'{"text": "first"}\n{"text": "second"}\n',
    "b/c.txt": b"of a folder",
    "b-d.txt.gz": gzip.compress(b"packed", mtime=0),
    "b/.hidden.txt": b"not seen",
    "README.md": b"no text",
}


@pytest.fixture(params=["gcs", "s3"])
def bucket(request: pytest.FixtureRequest) -> Bucket:
    return request.getfixturevalue(request.param)


def put(bucket: Bucket, files: dict[str, bytes], prefix: str = "corpus") -> str:
    """The files in the bucket, below a prefix of it; the prefix's URL."""
    url = f"{bucket.url}/{prefix}"
    for name, data in files.items():
        Store(url).write(name, data)
    return url


def put_locally(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def texts_of(path: object) -> list[str]:
    return [document.text for document in documents(DataConfig(path=path))]


def test_the_same_files_are_the_same_corpus_wherever_they_lie(bucket: Bucket, tmp_path: Path) -> None:
    url, folder = put(bucket, FILES), put_locally(tmp_path / "corpus", FILES)
    for named in ("", "/", "/**", "/*.jsonl", "/?", "/**/c.*", "/b/.hid*", "/[ab]*"):
        assert texts_of(url + named) == texts_of(f"{folder}{named}")
        assert inputs_digest(DataConfig(path=url + named)) == inputs_digest(DataConfig(path=f"{folder}{named}"))
    assert texts_of([f"{url}/b/c.txt", url]) == ["of a folder", "first", "second", "packed"]  # once, in order
    assert [str(file) for file in input_files(DataConfig(path=f"{url}/b"))] == [f"{url}/b/c.txt"]


def test_rows_are_those_of_the_local_corpus_and_the_text_is_read_once(bucket: Bucket, tmp_path: Path) -> None:
    texts = {"a.jsonl": b"".join(json.dumps({"text": "abcdefg" * n}).encode() + b"\n" for n in range(1, 30))}
    url, folder = put(bucket, texts), put_locally(tmp_path / "corpus", texts)
    there = PrepareConfig(out=f"{bucket.url}/rows", data=DataConfig(path=url, row_tokens=16, eval_rows=4))
    here = PrepareConfig(out=str(tmp_path / "rows"), data=DataConfig(path=str(folder), row_tokens=16, eval_rows=4))
    index = prepare_rows(there, tokenizer=make_tokenizer())
    expected = prepare_rows(here, tokenizer=make_tokenizer())
    assert index.model_copy(update={"data": expected.data}) == expected
    rows = Store(there.out).read(index.files[0].name)
    assert rows == folder_bytes(here.out)[index.files[0].name]
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(inputs, "open_remote")
        assert prepare_rows(there, tokenizer=make_tokenizer()) == index  # finished: its versions say so
    Store(url).write("a.jsonl", texts["a.jsonl"])  # another version, of the same bytes
    assert prepare_rows(there, tokenizer=make_tokenizer()) == index


def test_long_files_come_in_blocks(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "BLOCK_BYTES", 1000)
    text = "".join(f"{number} " for number in range(5000))
    url = put(bucket, {"a.txt": text.encode(), "b.txt.gz": gzip.compress(text.encode()), "c.txt": b"x" * 2000})
    assert texts_of(url) == [text, text, "x" * 2000]


def test_the_length_of_an_object_is_found(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "TAIL_BYTES", 8)
    sizes = [0, 1, 7, 8, 9, 127, 128, 129, 1000, 5000]
    url = put(bucket, {f"{number}.txt": b"x" * size for number, size in enumerate(sizes)})
    assert [file.size for file in input_files(DataConfig(path=url))] == sizes


def test_of_many_objects_some_are_measured(gcs: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "MEASURED", 3)
    url = put(gcs, {f"{number}.txt": b"x" * (10 + number) for number in range(5)})
    assert [file.size for file in input_files(DataConfig(path=url))] == [10, 12, 12, 12, 14]
    assert texts_of(url) == ["x" * (10 + number) for number in range(5)]
    gcs.server.clear_requests()
    input_files(DataConfig(path=url))
    assert gcs.server.count("list", "") == 1


def test_versions_are_those_that_the_store_tells_its_other_clients(bucket: Bucket) -> None:
    """`rows/inputs.json` of the version before, which read through gcsfs and s3fs, is still good."""
    (file,) = input_files(DataConfig(path=put(bucket, {"a.txt": b"text"})))
    if bucket.url.startswith("s3://"):
        assert file.version == hashlib.md5(b"text").hexdigest()
    else:
        address = f"{os.environ['TENSORSTORE_GCS_HTTP_URL']}/storage/v1/b/{bucket.url[5:]}/o/corpus%2Fa.txt"
        assert file.version == str(json.loads(urllib.request.urlopen(address).read())["generation"])


def test_other_spellings_of_the_schemes_are_read(bucket: Bucket) -> None:
    url = put(bucket, FILES)
    other = url.replace("gs://", "gcs://").replace("s3://", "s3a://")
    assert input_files(DataConfig(path=f"{other}/*.jsonl")) == input_files(DataConfig(path=f"{url}/*.jsonl"))


def test_a_text_is_read_whatever_the_bucket_answers(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a body that says it is whole, a range that came short, 503, resets: all that docs/storage.md lists."""
    monkeypatch.setattr(remote_module, "BLOCK_BYTES", 1000)
    text = "".join(f"{number} " for number in range(2000))
    url = put(bucket, {f"{name}.txt": text.encode() for name in "abc"})
    with using(StorageConfig(first_delay_s=0.01, max_delay_s=0.1)), bucket.server.faults(share=0.2, seed=3):
        assert texts_of(url) == [text] * 3


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{url}/nothing", "nothing there"),
        ("{url}/*.parquet", "nothing there"),
        ("{url}/README.md", "not a text file"),
        ("{url}/READ*", "1 other files"),
    ],
)
def test_what_is_not_there_is_named(bucket: Bucket, path: str, message: str) -> None:
    url = put(bucket, FILES)
    named = path.format(url=url, scheme=url.split("bucket")[0])
    with pytest.raises(InputError) as caught:
        input_files(DataConfig(path=named))
    assert message in str(caught.value)
    assert named in str(caught.value)


def test_no_permission_is_named(bucket: Bucket) -> None:
    url = put(bucket, FILES)
    with bucket.server.faults(permanent=403), pytest.raises(StorageError) as caught:
        input_files(DataConfig(path=url))
    assert caught.value.next.startswith(("check that this account may", "check that these credentials may"))


@pytest.mark.parametrize("name", ["a.txt", "*.txt", ""])
def test_a_bucket_that_is_not_there_is_named(bucket: Bucket, name: str) -> None:
    url = f"{bucket.url.partition('://')[0]}://no-such-bucket-here/{name}"
    with pytest.raises((InputError, StorageError), match="no-such-bucket-here") as caught:
        input_files(DataConfig(path=url))
    assert "bucket" in str(caught.value)


def test_a_file_that_changes_while_it_is_read_is_an_error(bucket: Bucket) -> None:
    url = put(bucket, {"a.jsonl": FILES["a.jsonl"]})
    (file,) = input_files(DataConfig(path=url))
    put(bucket, {"a.jsonl": FILES["a.jsonl"].replace(b"first", b"other")})
    with InputReader(file) as reader, pytest.raises(InputError, match="changed while it was read"):
        reader.finish()


def test_the_storage_configs_endpoint_is_s3s(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    url, endpoint = put(s3, FILES), os.environ["AWS_ENDPOINT_URL"]
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    with using(StorageConfig(s3_endpoint=endpoint)):
        assert texts_of(f"{url}/a.jsonl") == ["first", "second"]


def test_a_block_reader_reads_ahead_and_stops() -> None:
    data, asked = os.urandom(10 * remote_module.READ_AHEAD), []

    def fetch(start: int, stop: int) -> bytes:
        asked.append(start)
        return data[start:stop]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote_module, "BLOCK_BYTES", 7)
        with BlockReader(fetch) as reader:
            assert reader.read(3) == data[:3]
            assert len(asked) <= remote_module.READ_AHEAD + 1
            assert reader.read() == data[3:]
            assert reader.read(1) == b""
    assert sorted(asked)[: len(data) // 7 + 1] == list(range(0, len(data), 7))
    assert len(asked) == len(set(asked)) <= len(data) // 7 + 1 + remote_module.READ_AHEAD


def test_a_short_object_is_one_block() -> None:
    asked = []
    with BlockReader(lambda start, stop: asked.append(start) or b"short") as reader:
        assert reader.read() == b"short"
    assert asked == [0]
