"""A finished cache that lacks data is not called finished, and something else in a file's place is named."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distillcache.cache_builder.build import build_cache
from distillcache.cache_builder.grow.copy import copy_cache
from distillcache.cache_builder.record.presence import data_keys
from distillcache.schemas.cache.segment import read_plan
from distillcache.schemas.config import CopyConfig
from distillcache.schemas.errors import DistillcacheError
from distillcache.schemas.store.store import Store
from distillcache.tools.cli import main
from tests.conftest import build_config

SIZES = ["--data.row-tokens", "16", "--data.eval-rows", "4"]
ROWS, OBJECT = "segments/0000/rows/00001.array_record", "segments/0000/taps/resid/c/2/0/0/0"


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.fixture
def own(tmp_path: Path, cache: Path) -> Path:
    return Path(shutil.copytree(cache, tmp_path / "own"))


def test_the_keys_are_those_of_a_build(cache: Path) -> None:
    plan = read_plan(Store(str(cache)), "0000")
    assert plan is not None
    found = {key for key in Store(str(cache)).keys("segments/0000/") if "/rows/" in key or "/c/" in key}
    assert set(data_keys(plan)) == found


@pytest.mark.parametrize("damage", [Path.unlink, folder])
@pytest.mark.parametrize("name", [ROWS, OBJECT])
@pytest.mark.parametrize("extend", [False, True])
def test_a_finished_cache_without_all_of_its_data(
    own: Path, teacher: Path, corpus: Path, name: str, damage: Callable[[Path], Any], extend: bool
) -> None:
    damage(own / name)
    with pytest.raises(DistillcacheError) as caught:
        build_cache(build_config(own, teacher, corpus, extend=extend))
    assert str(own / name) in str(caught.value)
    assert ("--repair" if damage is Path.unlink else "move") in caught.value.next
    assert caught.value.exit_code == 2


def test_a_finished_copy_without_all_of_its_data(tmp_path: Path, cache: Path) -> None:
    config = CopyConfig(src=str(cache), dst=str(tmp_path / "copy"))
    copy_cache(config)
    copy_cache(config)
    next((tmp_path / "copy").glob("segments/*/taps/resid/c/*/*/0/0")).unlink()
    with pytest.raises(DistillcacheError, match="lacks rows or objects") as caught:
        copy_cache(config)
    assert "copy` with --repair" in caught.value.next
    copy_cache(config.model_copy(update={"repair": True}))
    copy_cache(config)


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "tokenizer.json",
        *(
            f"segments/0000/{n}"
            for n in (
                "plan.json",
                "stats.json",
                "index.bin",
                "side.safetensors",
                "times.json",
                "taps/resid/zarr.json",
                "rows/00001.array_record",
                "taps/resid/c/2/0/0/0",
            )
        ),
    ],
)
@pytest.mark.parametrize("damage", [folder, pipe])
@pytest.mark.parametrize("command", [["verify"], ["verify", "--quick"], ["inspect"], ["stats", "--rows", "99"]])
def test_something_else_in_a_files_place_is_not_called_missing(
    own: Path, name: str, damage: Callable[[Path], Any], command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(own / name)
    code = main([command[0], str(own), *command[1:]])
    printed = "".join(capsys.readouterr())
    assert "Traceback" not in printed
    said = "Is a directory" if damage is folder else "named pipe"
    if code or name in printed:
        assert said in printed, printed
    if command[0] == "verify":
        assert code == 2


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("command", ["verify", "inspect", "report", "repair", "train", "build"])
def test_a_folder_in_the_place_of_a_plan_is_no_lost_plan(
    own: Path, teacher: Path, corpus: Path, finished: bool, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder(own / "segments/0000/plan.json")
    if not finished:
        (own / "manifest.json").unlink()
    argv = {
        "repair": ["build", "--repair", "--cache"],
        "train": ["train", "--run", str(own.parent / "run"), "--cache"],
        "build": ["build", "--teacher.path", str(teacher), "--data.path", str(corpus), *SIZES, "--cache"],
    }.get(command, [command])
    assert main([*argv, str(own)]) == 2
    said = capsys.readouterr().err
    assert "Is a directory" in said
    assert "plan.json" in said
    assert "missing" not in said.replace("which says what is missing", "")
