"""Paths that no file system can have end in one message, wherever they come in."""

import json
import os
from pathlib import Path

import pytest

from distillcache.cache_builder.prepare import open_rows
from distillcache.models.files.hf import weight_files
from distillcache.schemas.base import is_name_inside
from distillcache.schemas.config import DataConfig
from distillcache.schemas.errors import CheckpointError, ConfigError, StorageError
from distillcache.schemas.store.names import is_possible_path
from distillcache.schemas.store.path import locate
from distillcache.schemas.store.store import Store
from distillcache.tools.cli import main

LONG = "x" * 256


@pytest.mark.parametrize(
    ("path", "possible"),
    [
        ("x" * 255, True),
        (LONG, False),
        (f"a/{LONG}/b", False),
        ("ä" * 127, True),
        ("ä" * 128, False),
        ("/".join(["a" * 200] * 20), True),
        ("/".join(["a" * 200] * 21), False),
        ("a\0b", False),
        ("a\ud800b", False),
        ("", True),
    ],
    ids=range(10),
)
def test_what_a_file_system_can_have(path: str, possible: bool, tmp_path: Path) -> None:
    assert is_possible_path(path) == possible
    if possible:
        Path(path).exists()  # raises for no such path
    else:
        with pytest.raises((OSError, ValueError)):
            (tmp_path / path).open()
        for opened in (locate, Store):
            with pytest.raises(ConfigError, match="no file system has such a path"):
                opened(path)


def test_an_index_that_names_a_file_which_cannot_be(tmp_path: Path) -> None:
    assert is_name_inside("x" * 255)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": LONG}}))
    with pytest.raises(CheckpointError, match="names files outside its folder"):
        weight_files(tmp_path)


@pytest.mark.parametrize("command", [["inspect", LONG], ["report", LONG], ["export", LONG, "out"], ["verify", LONG]])
def test_commands_end_with_one_message(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 2
    assert capsys.readouterr().err.startswith("error: no file system has such a path\n")


def test_a_folder_that_may_not_be_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system answers another user than root; each of these ended in a traceback."""

    def stat(path: object, *rest: object, **named: object) -> object:
        if "locked" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest, **named)

    real = os.stat
    monkeypatch.setattr(os, "stat", stat)
    for opened in (locate, Store, lambda path: open_rows(DataConfig(path=path))):
        with pytest.raises(StorageError, match=r"may not be entered[\s\S]*cause +Permission denied\n"):
            opened(str(tmp_path / "locked" / "a"))
