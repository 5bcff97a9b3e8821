"""Pipes, sockets and devices in the place of files: each reader ends with a message at once, none waits."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distillcache.models.files.gguf.file import open_gguf
from distillcache.models.files.hf import read_json
from distillcache.models.files.identity import weights_digest
from distillcache.models.text.tokenizer import load_tokenizer
from distillcache.schemas.cache.segment import open_cache
from distillcache.schemas.command_line import load_yaml
from distillcache.schemas.config.feed import LocalCacheConfig
from distillcache.schemas.errors import DistillcacheError
from distillcache.schemas.store.path import locate
from distillcache.schemas.store.store import Store
from distillcache.trainer.feed.disk_cache import LocalCache
from distillcache.trainer.run.folder import LOCK, _opened_lock


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """A reader that waits is interrupted."""

    def late(*_: object) -> None:
        raise TimeoutError("a reader waits for ever")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


READERS: dict[str, Callable[[Path], object]] = {
    "manifest.json": lambda folder: open_cache(Store(str(folder))),
    "segments/0000/plan.json": lambda folder: open_cache(Store(str(folder)), partial=True),
    "x": lambda folder: Store(str(folder)).length_is("x", 3),
    "run.yaml": lambda folder: load_yaml(str(folder / "run.yaml")),
    "config.json": lambda folder: read_json(locate(folder) / "config.json"),
    "model.safetensors": lambda folder: weights_digest(folder),
    "tokenizer.json": lambda folder: load_tokenizer(folder / "tokenizer.json"),
    "x.gguf": lambda folder: open_gguf(locate(folder / "x.gguf")),
    "LOCK": lambda folder: _opened_lock(Store(str(folder)).local or folder),
}


@pytest.mark.parametrize("name", READERS)
def test_a_pipe_is_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / (LOCK if name == "LOCK" else name)
    file.parent.mkdir(parents=True, exist_ok=True)
    if name == "model.safetensors":
        (tmp_path / "config.json").write_text("{}")
    os.mkfifo(file)
    with pytest.raises(DistillcacheError, match="a named pipe, not a regular file"):
        READERS[name](tmp_path)


def test_a_socket_and_a_device_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket may have 107 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("config.json")
        with pytest.raises(DistillcacheError, match="a socket, not a regular file"):
            read_json(locate("config.json"))
    with pytest.raises(DistillcacheError, match="a device, not a regular file"):
        load_yaml("/dev/zero")


def test_what_a_shell_hands_over_is_a_config(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.write(write, b"steps: 3\n")
    os.close(write)
    assert load_yaml(f"/dev/fd/{read}") == {"steps": 3}
    os.close(read)


def test_the_local_cache_reads_no_pipe(tmp_path: Path) -> None:
    settings = LocalCacheConfig(dir=str(tmp_path))
    cache = LocalCache(str(settings.dir), 1 << 20)
    os.mkfifo(cache.folder / "kept")
    assert cache.open("kept") is None


def test_paths_made_of_a_place_refuse_too(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    for path in (locate(tmp_path) / "x", locate(tmp_path / "y").parent / "x", next(iter(locate(tmp_path).iterdir()))):
        with pytest.raises(OSError, match="a named pipe"):
            path.read_bytes()
