"""No name out of a file and no link leads outside the folder that is read or written."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from distillcache.cache_builder.build import build_cache
from distillcache.models.files.hf import weight_files
from distillcache.schemas.base import Name, RelativeName, SegmentName, is_name_inside
from distillcache.schemas.cache.segment import open_cache, read_plan
from distillcache.schemas.errors import CheckpointError, DamageError, DistillcacheError, StorageError
from distillcache.schemas.format import layout
from distillcache.schemas.format.canonical import to_canonical
from distillcache.schemas.store.store import Store
from tests.conftest import build_config

OUTSIDE = ["", ".", "..", "../x", "a/../x", "/x", "a//b", "a/", ".hidden", "a\\b", "a\x00b", "a\nb", "ä", "a b", "..x"]


@pytest.mark.parametrize("text", OUTSIDE)
@pytest.mark.parametrize("kind", [Name, RelativeName, SegmentName], ids=["name", "relative", "segment"])
def test_such_names_are_none(kind: Any, text: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(kind).validate_python(text)


def test_the_names_of_ours_are_names() -> None:
    for text in ("attn_out", "resid.scale", "topk_logits.ids", "p0003-000.safetensors"):
        assert TypeAdapter(Name).validate_python(text) == text
    for text in ("taps/attn_out/zarr.json", "rows/00000.array_record", "plan.json"):
        assert TypeAdapter(RelativeName).validate_python(text) == text
    for text in ("0000", "0001-1cf04207090f52da"):
        assert TypeAdapter(SegmentName).validate_python(text) == text


@pytest.mark.parametrize("text", ["../../../../x", "/etc/x", "a/b"])
@pytest.mark.parametrize("field", ["array", "tap", "segment", "rows_of"])
def test_a_plan_with_such_a_name_is_damage(cache: Path, tmp_path: Path, field: str, text: str) -> None:
    store = Store(str(shutil.copytree(cache, tmp_path / "c")))
    plan = open_cache(store)[0].plan
    tap = plan.taps[0]
    changed = {
        "array": {"taps": (tap.model_copy(update={"parts": (tap.parts[0].model_copy(update={"array": text}),)}),)},
        "tap": {"taps": (tap.model_copy(update={"name": text}),)},
        "segment": {"segment": text},
        "rows_of": {"rows_of": text},
    }[field]
    store.write(layout.plan_key("0000"), to_canonical(plan.model_copy(update=changed)))
    with pytest.raises(DamageError):
        read_plan(store, "0000")


def linked(tmp_path: Path, name: str) -> tuple[Store, Path]:
    """A store with a link of this name to a folder outside that holds a file."""
    outside, folder = tmp_path / "outside", tmp_path / "store"
    outside.mkdir()
    (outside / "precious").write_text("keep me")
    (folder / name).parent.mkdir(parents=True)
    (folder / name).symlink_to(outside)
    return Store(str(folder)), outside


@pytest.mark.parametrize(
    "work",
    [
        lambda store: store.read("segments/0001/precious"),
        lambda store: store.write("segments/0001/precious", b"x"),
        lambda store: store.create("segments/0001/new", b"x"),
        lambda store: store.put_once("segments/0001/precious", b"x"),
        lambda store: store.delete("segments/0001/precious"),
        lambda store: store.delete_folder("segments/0001"),
        lambda store: store.length_is("segments/0001/precious", 7),
        lambda store: store.read("../outside/precious"),
        lambda store: store.write("../outside/new", b"x"),
    ],
    ids=["read", "write", "create", "put_once", "delete", "delete_folder", "length", "read_up", "write_up"],
)
def test_a_linked_folder_is_not_followed(tmp_path: Path, work) -> None:
    store, outside = linked(tmp_path, "segments/0001")
    with pytest.raises(StorageError, match=r"leads out|link"):
        work(store)
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"precious": "keep me"}


@pytest.mark.parametrize("guarded", [False, True])
def test_a_linked_lock_file_is_not_written_through(tmp_path: Path, guarded: bool) -> None:
    outside, folder = tmp_path / "precious", tmp_path / "store"
    outside.write_text("keep me")
    folder.mkdir()
    (folder / "key.__lock").symlink_to(outside)
    store = Store(str(folder))
    placed = store.guarded(lambda: None) if guarded else store
    store.clear_stale_locks()
    with pytest.raises(StorageError, match="leads out"):
        placed.write("key", b"x")
    assert outside.read_text() == "keep me"
    assert store.stale_locks() == []


def test_deleting_a_link_leaves_its_target(tmp_path: Path) -> None:
    outside, folder = tmp_path / "precious", tmp_path / "store"
    outside.write_text("keep me")
    folder.mkdir()
    (folder / "key").symlink_to(outside)
    Store(str(folder)).delete("key")
    assert not (folder / "key").is_symlink()
    assert outside.read_text() == "keep me"


def test_a_store_that_is_a_link_itself_is_used(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    store = Store(str(tmp_path / "link"))
    store.write("a/b", b"x")
    assert store.read("a/b") == b"x"


def test_an_abandoned_extension_that_is_a_link_is_left_alone(
    cache: Path, tmp_path: Path, teacher: Path, corpus: Path
) -> None:
    place = shutil.copytree(cache, tmp_path / "c")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("keep me")
    (place / "segments/0001").symlink_to(outside)
    with contextlib.suppress(DistillcacheError):
        build_cache(build_config(place, teacher, corpus, abandon=True))
    assert (outside / "precious").read_text() == "keep me"


@pytest.mark.parametrize("text", ["", "../x", "a/../x", "/etc/passwd", "a//b", "a\\b", "a\0b", ".."])
def test_shards_outside_the_checkpoint_are_refused(tmp_path: Path, text: str) -> None:
    assert not is_name_inside(text)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": text}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        weight_files(tmp_path)
