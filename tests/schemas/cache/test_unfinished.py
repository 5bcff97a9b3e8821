"""What is said about an unfinished cache: nothing is to be done while somebody builds it, else the right command."""

import shutil
import time
from pathlib import Path

import pytest

from distillcache.schemas.cache.lease_file import this_process_lease
from distillcache.schemas.cache.segment import open_cache
from distillcache.schemas.errors import InputError
from distillcache.schemas.format.canonical import to_canonical
from distillcache.schemas.format.layout import DEMO_MARKER, lease_key
from distillcache.schemas.store.store import Store
from distillcache.tools.cli import main


@pytest.fixture
def begun(tmp_path: Path, cache: Path) -> Path:
    """A cache of which nothing is committed."""
    own = Path(shutil.copytree(cache, tmp_path / "cache"))
    (own / "manifest.json").unlink()
    (own / "segments/0000/index.bin").unlink()
    return own


def said(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["inspect", str(folder)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    with pytest.raises(InputError, match="not finished") as caught:
        open_cache(Store(str(folder)))
    assert caught.value.next in shown
    return shown


def test_nobody_works_on_it(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = said(begun, capsys)
    assert "run the same `distillcache build` again" in shown
    assert "204 kB when finished" in shown


def test_of_the_demo(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (begun.parent / DEMO_MARKER).write_text("{}")
    assert f"run the same `distillcache demo --out {begun.parent}` again" in said(begun, capsys)


def test_a_builder_is_alive(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (begun.parent / DEMO_MARKER).write_text("{}")
    lease = this_process_lease(time.time() + 30, time.time())
    store = Store(str(begun))
    store.write(lease_key("0000", 1), to_canonical(lease))
    shown = said(begun, capsys)
    assert f"process {lease.pid} on {lease.host} is working on it" in shown
    assert "nothing else is to be done" in shown
    assert "distillcache build" not in shown
    store.write(lease_key("0000", 1), to_canonical(lease.model_copy(update={"expires": time.time() - 600})))
    assert "is working on it" not in said(begun, capsys)


def test_of_a_copy(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["copy", str(cache), str(tmp_path / "copy"), "--compress", "zstd"]) == 0
    capsys.readouterr()
    main(["inspect", str(tmp_path / "copy")])
    assert "size (of uncompressed)" in capsys.readouterr().out
    (tmp_path / "copy" / "manifest.json").unlink()
    (tmp_path / "copy" / "segments/0000/index.bin").unlink()
    assert "run the same `distillcache copy` again" in said(tmp_path / "copy", capsys)
