"""A link to itself or a directory in the place of a cache's file: one message in every command, and a way on."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from distillcache.cache_builder.repair import check_shard
from distillcache.schemas.cache.segment import Segment
from distillcache.schemas.errors import StorageError
from distillcache.schemas.format.manifest import Plan
from distillcache.schemas.store.store import Store
from distillcache.tools.cli import main

OBJECT, INDEX, ROWS = (
    f"segments/0000/{name}" for name in ("taps/resid/c/3/0/0/0", "index.bin", "rows/00001.array_record")
)
COMMANDS = {
    "verify": ["verify", "{cache}"],
    "quick": ["verify", "{cache}", "--quick"],
    "inspect": ["inspect", "{cache}"],
    "show": ["show", "{cache}", "--row", "29"],
    "stats": ["stats", "{cache}"],
    "diff": ["diff", "{whole}", "{cache}"],
    "copy": ["copy", "{cache}", "{copy}"],
    "repair": ["build", "--repair", "--cache", "{cache}"],
}


def damaged(cache: Path, folder: Path, key: str, kind: str) -> Path:
    shutil.copytree(cache, folder, copy_function=os.link)
    (folder / key).unlink()
    if kind == "loop":
        (folder / key).symlink_to(Path(key).name)
    else:
        (folder / key).mkdir()
    return folder


@pytest.mark.parametrize("kind", ["loop", "directory"])
@pytest.mark.parametrize("key", [OBJECT, INDEX, ROWS])
def test_every_command_ends_in_one_message(
    cache: Path, tmp_path: Path, key: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = damaged(cache, tmp_path / "c", key, kind)
    names = {"cache": str(place), "whole": str(cache), "copy": str(tmp_path / "copy")}
    for name, words in COMMANDS.items():
        if name == "repair" and key != INDEX:
            continue  # it needs the teacher: below
        code = main([word.format(**names) for word in words])
        out, err = capsys.readouterr()
        assert code in (0, 2)
        assert err.count("error:") <= 1
        if name in ("verify", "quick"):
            assert code == 2
            assert (Path(key).name in out + err) or key == OBJECT
        assert "writable" not in err


@pytest.mark.parametrize("kind", ["loop", "directory"])
def test_verify_and_repair_agree(
    cache: Path, tmp_path: Path, teacher: Path, corpus: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = damaged(cache, tmp_path / "c", OBJECT, kind)
    assert main(["verify", str(place)]) == 2
    assert "build --repair" in capsys.readouterr().err
    argv = ["build", "--repair", "--cache", str(place)]
    assert main(argv) == 2  # it does not delete what it did not write, but says that this has to go
    assert {"loop": "delete the link", "directory": "move the directory away"}[kind] in capsys.readouterr().err
    (place / OBJECT).rmdir() if kind == "directory" else (place / OBJECT).unlink()
    assert main(argv) == 0
    assert main(["verify", str(place)]) == 0


def refused(*_: object, **__: object) -> None:
    raise StorageError("an object cannot be read", {"cause": f"UNKNOWN: {os.strerror(errno.EACCES)}"})


@pytest.mark.parametrize("command", [["verify"], ["show", "--row", "29"]], ids=lambda each: each[0])
def test_what_may_not_be_read_is_not_to_be_computed_again(
    cache: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As root nothing is forbidden: the store's own answer stands for it."""
    right = check_shard._check_bytes

    def check(store: Store, plan: Plan, stored: check_shard.StoredObject) -> check_shard.Fault | None:
        return refused() if stored.key == OBJECT else right(store, plan, stored)

    monkeypatch.setattr(check_shard, "_check_bytes", check)
    if command[0] == "show":
        monkeypatch.setattr(Segment, "chunk_digests", lambda *_: [0] * 99)  # whatever is read, it is looked at again
    main([command[0], str(cache), *command[1:]])
    said = "".join(capsys.readouterr())
    assert "make it readable for this user" in said
    assert "recompute" not in said
