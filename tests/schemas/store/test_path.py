"""Places in buckets: what they share with `pathlib.Path`, whole reads, ranges, and configs that lie there."""

from pathlib import Path

import pytest

from distillcache.schemas.command_line import load_yaml
from distillcache.schemas.errors import ConfigError, StorageError
from distillcache.schemas.store import store
from distillcache.schemas.store.path import ObjectPath, local_path, locate
from distillcache.schemas.store.store import Store
from distillcache.tools.plan.command import free_bytes
from tests.servers.fixtures import Bucket


def test_which_place_a_text_names(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert (
        locate("~/model") == locate("file:///home/me/model") == locate(Path("/home/me/model")) == Path("/home/me/model")
    )
    place = locate("gs://bucket/deep/model.gguf/")
    assert isinstance(place, ObjectPath)
    assert (str(place), place.name, place.suffix) == ("gs://bucket/deep/model.gguf", "model.gguf", ".gguf")
    assert str(place.parent / "other") == "gs://bucket/deep/other"
    assert locate(place) is place
    assert str(locate("s3://bucket")) == str(place.parent.parent).replace("gs", "s3") == "s3://bucket"


def test_reads_like_a_path(gcs: Bucket):
    Store(gcs.url).write("deep/a.txt", "ä".encode())
    Store(gcs.url).write("deep/folder/b", b"")
    folder = locate(f"{gcs.url}/deep")
    assert [place.name for place in folder.iterdir()] == ["a.txt", "folder"]
    assert (folder / "a.txt").exists()
    assert (folder / "folder" / "b").exists()
    assert not (folder / "folder").exists()
    assert (folder / "a.txt").read_text(encoding="utf-8") == "ä"
    assert (folder / "folder" / "b").read_bytes() == b""
    for missing in (folder / "c", folder.parent):
        with pytest.raises(FileNotFoundError):
            missing.read_bytes()


def test_a_range_is_there_whole_or_not_at_all(gcs: Bucket):
    place = locate(f"{gcs.url}/key")
    assert isinstance(place, ObjectPath)
    place.write_bytes(b"value")
    assert [place.read_range(*ends)[0] for ends in ((1, 3), (4, 5), (4, 6), (5, 6), (9, 12))] == [
        b"al",
        b"e",
        *[None] * 3,
    ]


def test_an_object_that_comes_short_is_read_again(gcs: Bucket, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "AGAIN_S", (0.0,) * 10)
    place, value = locate(f"{gcs.url}/key"), bytes(range(256))
    place.write_bytes(value)
    with gcs.server.faults(share=0.3, seed=1, kinds=["short"]):
        assert all(place.read_bytes() == value for _ in range(20))
        assert gcs.server.requests()["faults"]["short"] > 3
    with gcs.server.faults(share=1, kinds=["short"]), pytest.raises(StorageError):
        place.read_bytes()


def test_a_config_in_a_bucket(gcs: Bucket):
    Store(gcs.url).write("build.yaml", b"cache: here\n")
    assert load_yaml(f"{gcs.url}/build.yaml") == {"cache": "here"}
    with pytest.raises(ConfigError, match="cannot be read"):
        load_yaml(f"{gcs.url}/other.yaml")
    Store(gcs.url).write("build.yaml", b"[")
    with pytest.raises(ConfigError, match="cannot be used as YAML"):
        load_yaml(f"{gcs.url}/build.yaml")


def test_what_has_to_be_local_refuses_a_bucket():
    assert local_path("file:///tmp/x", "--out") == Path("/tmp/x")
    with pytest.raises(ConfigError, match="local disk"):
        local_path("gs://bucket/x", "--out")


def test_a_home_that_nobody_has_is_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert locate("~/x") == Path("/home/me/x")
    assert locate("~no-such-user/x") == Path("~no-such-user/x")


@pytest.mark.parametrize("url", ["gs://", "gs:///rows", "s3://", "s3:///a/b", "gs:// /x"])
def test_a_url_without_a_bucket_is_no_local_folder(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`gs://$BUCKET/rows` with no BUCKET: the folder `gs:` was made, and the rows went there."""
    monkeypatch.chdir(tmp_path)
    for ask in (Store, locate, free_bytes):
        with pytest.raises(ConfigError, match="names no bucket"):
            ask(url)
    assert not list(tmp_path.iterdir())


def test_the_room_for_an_impossible_path_is_not_asked_for() -> None:
    with pytest.raises(ConfigError, match="no file system has such a path"):
        free_bytes("c" * 300)
    with pytest.raises(StorageError, match="cannot be opened"):
        free_bytes("http://host/cache")
    assert free_bytes("gs://bucket/cache") is None
