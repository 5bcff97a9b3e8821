"""Corpora in buckets, on real servers: what is listed and read, that it is the local corpus, and what is refused."""

import gzip
import importlib.util
import json
import os
from pathlib import Path

import fsspec
import pytest

from distillcache.cache_builder.prepare import prepare_rows
from distillcache.cache_builder.text.digest import inputs_digest
from distillcache.cache_builder.text.documents import documents
from distillcache.cache_builder.text.files import buckets as remote_module
from distillcache.cache_builder.text.files.buckets import BlockReader, filesystem
from distillcache.cache_builder.text.files.inputs import InputReader, input_files
from distillcache.schemas.config import DataConfig, PrepareConfig, StorageConfig
from distillcache.schemas.errors import InputError
from distillcache.schemas.store.store import use
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
    library = {"gcs": "gcsfs", "s3": "s3fs"}[request.param]
    if importlib.util.find_spec(library) is None:  # not imported yet: gcsfs reads its environment when it is
        pytest.skip(f"needs {library}")
    return request.getfixturevalue(request.param)


def put(bucket: Bucket, files: dict[str, bytes], prefix: str = "corpus") -> str:
    """The files in the bucket, below a prefix of it; the prefix's URL."""
    url = f"{bucket.url}/{prefix}"
    for name, data in files.items():
        filesystem(url).pipe_file(f"{url}/{name}", data)
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
    for named in ("", "/", "/**", "/*.jsonl"):
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
    rows = filesystem(url).cat_file(f"{bucket.url}/rows/{index.files[0].name}")
    assert rows == folder_bytes(here.out)[index.files[0].name]
    bucket.server.clear_requests()
    assert prepare_rows(there, tokenizer=make_tokenizer()) == index  # finished: its versions say so
    assert bucket.server.count("read", "a.jsonl") == 0
    filesystem(url).pipe_file(f"{url}/a.jsonl", texts["a.jsonl"])  # another version, of the same bytes
    assert prepare_rows(there, tokenizer=make_tokenizer()) == index


def test_long_files_come_in_blocks(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "BLOCK_BYTES", 1000)
    text = "".join(f"{number} " for number in range(5000))
    url = put(bucket, {"a.txt": text.encode(), "b.txt.gz": gzip.compress(text.encode())})
    assert texts_of(url) == [text, text]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{url}/nothing", "nothing there"),
        ("{url}/*.parquet", "nothing there"),
        ("{url}/README.md", "not a text file"),
        ("{url}/READ*", "1 other files"),
        ("{scheme}no-such-bucket-here/a.txt", "no such bucket"),
        ("{scheme}no-such-bucket-here/*.txt", "no such bucket"),
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
    with bucket.server.faults(permanent=403), pytest.raises(InputError, match="may not be read") as caught:
        input_files(DataConfig(path=url))
    assert caught.value.next.startswith(("run `gcloud auth", "check AWS_PROFILE"))


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
    use(StorageConfig(s3_endpoint=endpoint))
    try:
        assert texts_of(f"{url}/a.jsonl") == ["first", "second"]
    finally:
        use(StorageConfig())


def test_a_missing_library_says_which_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://elsewhere.invalid")  # so that none is remembered
    with pytest.raises(InputError, match="library is missing") as caught:
        input_files(DataConfig(path="gs://bucket/a.txt"))
    assert caught.value.next == "in the project's folder: pip install -e '.[gcs]'"


def test_cut_and_failing_blocks_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "FIRST_PAUSE_S", 0.0)
    data, asked = os.urandom(100), []

    class Flaky:
        def cat_file(self, url: str, start: int, end: int) -> bytes:
            asked.append(start)
            if len(asked) == 1:
                return data[start : end - 1]
            if len(asked) == 2:
                raise OSError("connection reset")
            return data[start:end]

    assert remote_module._fetch(Flaky(), "gs://bucket/a", 0, 100) == data
    assert asked == [0, 0, 0]


def test_a_block_reader_reads_ahead_and_stops() -> None:
    data, asked = os.urandom(10 * remote_module.READ_AHEAD), []

    def fetch(start: int, stop: int) -> bytes:
        asked.append(start)
        return data[start:stop]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote_module, "BLOCK_BYTES", 5)
        with BlockReader(fetch, len(data)) as reader:
            assert reader.read(3) == data[:3]
            assert len(asked) <= remote_module.READ_AHEAD + 1
            assert reader.read() == data[3:]
            assert reader.read(1) == b""
    assert sorted(asked) == list(range(0, len(data), 5))
