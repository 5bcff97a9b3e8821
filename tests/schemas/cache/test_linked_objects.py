"""Objects of a cache that are links to files outside: no reader follows them, even where the bytes are right."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from distillcache.cache_builder.grow.copy import copy_cache
from distillcache.schemas.cache.segment import open_cache
from distillcache.schemas.config import CopyConfig
from distillcache.schemas.errors import DamageError, StorageError
from distillcache.schemas.store.store import Store
from distillcache.tools.cli import main
from distillcache.tools.look.stored_rows import StoredRows
from distillcache.trainer.feed.cache_source import CacheSource


@pytest.fixture
def linked(cache: Path, tmp_path: Path) -> Path:
    """A cache whose objects of `attn_out` lie outside, whole, with links in their places."""
    place, outside = shutil.copytree(cache, tmp_path / "c"), tmp_path / "outside"
    outside.mkdir()
    for number, path in enumerate(sorted(place.glob("segments/0000/taps/attn_out/c/**/*"))):
        if path.is_file():
            path.rename(outside / str(number))
            path.symlink_to(outside / str(number))
    assert len(list(outside.iterdir())) == 5
    return place


def transcoded(cache: Path) -> None:
    taps = {"attn_out": {"codec": "fp8"}, "resid": {"codec": "fp8"}}
    copy_cache(CopyConfig.model_validate({"src": str(cache), "dst": f"{cache}.copy", "taps": taps}))


READERS: dict[str, Callable[[Path], object]] = {
    "feed": lambda cache: CacheSource(str(cache))[[9]],
    "feed_through_tensorstore": lambda cache: CacheSource(str(cache), direct=False)[[9]],
    "row": lambda cache: list(StoredRows(str(cache)).slots(9, "attn_out")),
    "copy": lambda cache: copy_cache(CopyConfig(src=str(cache), dst=f"{cache}.copy")),
    "transcode": transcoded,
}


@pytest.mark.parametrize("reader", READERS)
def test_a_linked_object_is_not_followed(linked: Path, reader: str) -> None:
    with pytest.raises((StorageError, DamageError), match="leads out"):
        READERS[reader](linked)


@pytest.mark.parametrize("words", [("show", "--row", "9"), ("stats", "--rows", "3"), ("verify",)], ids=lambda it: it[0])
def test_commands_name_the_link(linked: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    code = main([words[0], str(linked), *words[1:]])
    told = capsys.readouterr()
    assert code != 0
    assert "leads out" in told.out + told.err


def test_a_linked_folder_of_an_array_is_not_followed(cache: Path, tmp_path: Path) -> None:
    place = shutil.copytree(cache, tmp_path / "c")
    (place / "segments/0000/taps/attn_out").rename(tmp_path / "outside")
    (place / "segments/0000/taps/attn_out").symlink_to(tmp_path / "outside")
    (segment,) = open_cache(Store(str(place)))
    (part,) = next(tap for tap in segment.plan.taps if tap.name == "attn_out").parts
    with pytest.raises(StorageError, match="leads out"):
        segment.open_array(part)


def test_a_link_within_the_cache_is_followed(cache: Path, tmp_path: Path) -> None:
    place = shutil.copytree(cache, tmp_path / "c")
    path = place / "segments/0000/taps/attn_out/c/1/0/0/0"
    path.rename(place / "elsewhere")
    path.symlink_to(place / "elsewhere")
    for direct in (True, False):
        assert CacheSource(str(place), direct=direct)[[9]]["attn_out"]["codes"].any()
