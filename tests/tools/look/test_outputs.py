"""Files that commands write at the user's wish: another's file in their place is never lost."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from distillcache.tools.cli import main
from tests.tools.report.test_command import write_run

COMMANDS = {
    "report.html": ["report", "{cache}", "--rows", "0", "--out", "{file}"],
    "dimensions.npz": ["stats", "{cache}", "--rows", "2", "--out", "{file}"],
    "row.svg": ["show", "{cache}", "--image", "{file}"],
    "row.png": ["show", "{cache}", "--image", "{file}"],
    "samples.npz": ["export-samples", "{cache}", "{file}", "--rows", "[0]"],
    "samples.safetensors": ["export-samples", "{cache}", "{file}", "--rows", "[0]"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_of_the_user_is_kept_and_one_of_ours_replaced(
    name: str, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / name
    command = [word.format(cache=cache, file=file) for word in COMMANDS[name]]
    file.write_bytes(b"what the user has there")
    assert main(command) == 2
    assert "this command did not make it" in capsys.readouterr().err
    assert file.read_bytes() == b"what the user has there"
    file.unlink()
    assert main(command) == 0
    assert "replaced" not in capsys.readouterr().err
    made = file.read_bytes()
    assert main(command) == 0
    assert f"replaced {file}, which an earlier command wrote" in capsys.readouterr().err
    assert len(file.read_bytes()) == len(made)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_fails_does_not_say_that_it_replaces(
    name: str, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, file = tmp_path / "cache", tmp_path / name
    shutil.copytree(cache, own)
    command = [word.format(cache=own, file=file) for word in COMMANDS[name]]
    assert main(command) == 0
    before = file.read_bytes()
    capsys.readouterr()
    for damaged in ("manifest.json", "segments/0000/plan.json"):
        (own / damaged).write_bytes(b"{}")
    assert main(command) == 2
    assert "replac" not in capsys.readouterr().err
    assert file.read_bytes() == before


THEIRS = {  # speak of us, or have an array of one of our names, and were taken for ours
    "report.html": b"<!DOCTYPE html><p>distillcache is what made the caches that these notes are about</p>",
    "manifest.json": b'{"format":"distillcache/2","segments":["0000"]}',
    "build.yaml": b"data: {path: distillcache-demo/corpus/*.jsonl}",
    "row.svg": b"<svg><!-- distillcache against others --></svg>",
    "row.png": b"\x89PNG a screenshot of distillcache",
    "samples.safetensors": b'\x20\0\0\0\0\0\0\0{"row":{"dtype":"I64"},"col":{"dtype":"I64"}}',
}


@pytest.mark.parametrize("name", [*THEIRS, "samples.npz", "dimensions.npz"])
def test_a_file_that_only_speaks_of_us_is_kept(name: str, tmp_path: Path, cache: Path) -> None:
    file = tmp_path / name
    if name in THEIRS:
        file.write_bytes(THEIRS[name])
    else:  # as scipy stores a sparse matrix; a tap of another's choice of figures
        np.savez(file, **{"row": np.arange(3), "col": np.arange(3), "resid.slots": np.arange(2)})  # type: ignore[arg-type]
    before = file.read_bytes()
    command = COMMANDS.get(name, COMMANDS["report.html"])
    assert main([word.format(cache=cache, file=file) for word in command]) == 2
    assert file.read_bytes() == before


def test_a_report_does_not_replace_the_manifest_of_its_cache(tmp_path: Path, cache: Path) -> None:
    own = tmp_path / "cache"
    shutil.copytree(cache, own)
    for name in ("manifest.json", "segments/0000/plan.json"):
        before = (own / name).read_bytes()
        assert main(["report", str(own), "--rows", "0", "--out", str(own / name)]) == 2
        assert (own / name).read_bytes() == before


def test_reports_of_a_cache_and_of_a_run_have_names_of_their_own(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(cache), "--rows", "0"]) == 0
    assert main(["report", "run"]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.html")) == ["cache-report.html", "run-report.html"]
