"""A link to itself or a directory in the place of a cache's file: one message in every command, and a way on."""

import os
import shutil
from pathlib import Path

import pytest

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
