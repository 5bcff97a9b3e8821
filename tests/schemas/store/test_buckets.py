"""Buckets whose answers go wrong: what is made again until it succeeds, and what is said when it cannot."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distillcache.schemas.config.storage import StorageConfig
from distillcache.schemas.errors import DamageError, StorageError
from distillcache.schemas.format.canonical import read_canonical, to_canonical
from distillcache.schemas.format.manifest import Manifest
from distillcache.schemas.store import buckets
from distillcache.schemas.store import store as storage
from distillcache.schemas.store.store import Store, using
from tests.servers.fixtures import Bucket

QUICK = StorageConfig(first_delay_s=0.01, max_delay_s=0.2)
MANIFEST = Manifest(segments=(), tokenizer_digest="00", rows=1, tokens=2)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Waits that are shorter than a user's."""
    monkeypatch.setattr(storage, "AGAIN_S", (0.01,) * 12)
    with using(QUICK):
        yield


@pytest.fixture(params=["gcs", "s3"])
def bucket(request: pytest.FixtureRequest) -> Bucket:
    return request.getfixturevalue(request.param)


def test_transient_faults_are_not_seen(bucket: Bucket) -> None:
    store = Store(f"{bucket.url}/place")
    values = {f"key{number}": bytes([number]) * number * 99 for number in range(6)}
    with bucket.server.faults(0.3, seed=1, stall_s=0.05, kinds=["503", "429", "reset", "stall", "cut", "short"]):
        for key, value in values.items():
            store.write(key, value)
        assert {key: store.read(key) for key in store.keys()} == values  # noqa: SIM118
        for key, value in values.items():
            assert store.length_is(key, len(value))
            assert not store.length_is(key, len(value) + 1)
        assert store.read("key5", slice(3, 200)) == values["key5"][3:200]
        store.delete_keys("key")
        assert store.keys() == []
    assert sum(bucket.server.requests()["faults"].values()) > 3


def test_a_write_whose_answer_was_lost_is_known_as_ours(bucket: Bucket) -> None:
    store = Store(bucket.url)
    with bucket.server.faults(0.5, seed=3, kinds=["lost"], only=["write"]):
        for number in range(12):
            key = f"lease{number}"
            assert store.create(key, b"ours %d" % number)
            assert not store.create(key, b"theirs")
            _, generation = store.read_with_generation(key)
            assert store.replace(key, b"renewed", generation)
            assert not store.replace(key, b"late", generation)
    assert bucket.server.requests()["faults"]["lost"] > 3


def test_an_answer_that_came_short_is_no_damage(bucket: Bucket) -> None:
    store = Store(bucket.url)
    store.write("whole", to_canonical(MANIFEST))
    store.write("damaged", to_canonical(MANIFEST)[:-3])
    with bucket.server.faults(0.5, seed=1, kinds=["short"]):
        for _ in range(6):
            assert read_canonical(store, "whole", Manifest) == MANIFEST
            with pytest.raises(DamageError):
                read_canonical(store, "damaged", Manifest)
    assert bucket.server.requests()["faults"]["short"] > 3


def test_metadata_that_came_short_is_asked_for_again(gcs: Bucket) -> None:
    """A read of no bytes asks Google for the object's metadata: what a guarded write does first."""
    store = Store(gcs.url)
    guarded = store.guarded(lambda: None)
    guarded.write("key", b"first")
    with gcs.server.faults(0.5, seed=1, kinds=["short"]):
        for number in range(6):
            guarded.write("key", b"value %d" % number)
            assert store.read("key", slice(0, 0)) == b""
    assert store.read("key") == b"value 5"
    assert gcs.server.requests()["faults"]["short"] > 3
    with gcs.server.faults(1, kinds=["short"]), pytest.raises(StorageError) as caught:
        guarded.write("key", b"late")
    assert "metadata: the response was cut short" in str(caught.value)
    assert "the store kept failing" in str(caught.value)


@pytest.mark.parametrize(
    ("status", "operation"),
    [(403, "read"), (403, "write"), (403, "keys"), (401, "read"), (404, "write"), (404, "check_writable")],
)
def test_what_is_permanent_is_said_at_once(bucket: Bucket, status: int, operation: str) -> None:
    store = Store(f"{bucket.url}/place")
    arguments = {"read": ("key",), "write": ("key", b"value")}.get(operation, ())
    with bucket.server.faults(0, permanent=status), pytest.raises(StorageError) as caught:
        getattr(store, operation)(*arguments)
    told = str(caught.value)
    name = bucket.url[5:]
    if status == 404:
        assert f"check the bucket's name, {name}" in told
    else:
        who = "gcloud auth application-default login" if bucket.server.kind == "gcs" else "AWS_PROFILE"
        assert who in told
        assert name in told
    assert bucket.server.requests()["statuses"].get(str(status), 0) < 12


def test_a_bucket_that_is_not_there(bucket: Bucket) -> None:
    with pytest.raises(StorageError) as caught:
        Store(f"{bucket.url[:5]}no-such-bucket/place").check_writable()
    assert "check the bucket's name, no-such-bucket" in str(caught.value)


def test_a_listing_of_gcs_that_is_an_error_page_is_no_empty_listing(gcs: Bucket) -> None:
    store = Store(f"{gcs.url}/place")
    assert store.keys() == []
    with gcs.server.faults(0, permanent=403), pytest.raises(StorageError):
        store.keys()


def test_the_rate_is_limited(gcs: Bucket) -> None:
    store = Store(gcs.url, StorageConfig(read_rate=20, write_rate=None))
    started = time.monotonic()
    for _ in range(30):
        assert store.read("absent") is None
    assert time.monotonic() - started > 0.5  # 1.5 s of them, less what had been saved up


def test_stores_share_one_context() -> None:
    assert storage.context() is storage.context()
    one = storage.context()
    with using(QUICK.model_copy()):
        assert storage.context() is one
    with using(StorageConfig(request_concurrency=3)):
        store = Store("gs://bucket/place")
        assert storage.context() is store.context() is not one
    assert storage.context() is one
    assert store.context() is not one  # a store keeps its settings
    assert Store("gs://bucket/place").settings == QUICK
    assert storage.context({"cache_pool": {"total_bytes_limit": 0}}) is not storage.context()


def test_specs_of_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    plain = StorageConfig(read_rate=None, write_rate=None)
    assert buckets.bucket_spec("gs://b/a b/c/", plain) == {"driver": "gcs", "bucket": "b", "path": "a b/c/"}
    assert buckets.bucket_spec("s3://b", plain) == {"driver": "s3", "bucket": "b", "path": ""}
    assert buckets.bucket_spec("memory://b", plain) is None
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://one/")
    there = {"endpoint": "http://one", "aws_region": "us-east-1"}
    assert buckets.bucket_spec("s3://b", plain) == {"driver": "s3", "bucket": "b", "path": "", **there}
    limited = buckets.bucket_spec("gs://b", StorageConfig(read_rate=10))
    assert limited is not None
    assert limited["experimental_gcs_rate_limiter"] == "experimental_gcs_rate_limiter"


@pytest.mark.slow
def test_a_wrong_address_is_told_within_seconds(gcs: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(StorageError, match="cannot be used") as caught:
        Store("gs://another-bucket/place").read("key")
    assert time.monotonic() - started < 15
    assert "check the network" in str(caught.value)


@pytest.mark.slow
def test_no_credentials_are_told_within_seconds(gcs: Bucket) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    del environment["GOOGLE_AUTH_TOKEN_FOR_TESTING"]
    command = [sys.executable, "-m", "distillcache.tools.cli", "inspect", f"{gcs.url}/cache"]
    with gcs.server.faults(0, permanent=401):
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "gcloud auth application-default login" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_unreachable_bucket_is_told_by_our_message_alone(tmp_path: Path) -> None:
    """No credentials, and nobody at the address: Google's client logs where it looked for them."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GOOGLE", "CLOUDSDK"))}
    environment |= {"HOME": str(tmp_path), "TENSORSTORE_GCS_HTTP_URL": "http://127.0.0.1:9"}
    asks = "from distillcache.schemas.store.store import Store; Store('gs://nobody-has-this/c').read('a')"
    code = f"import sys\ntry:\n    {asks}\nexcept Exception as error:\n    print(error, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.startswith("error: the store cannot be used"), done.stderr
