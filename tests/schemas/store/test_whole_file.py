"""Files of a user are replaced as a whole: whoever is killed, and whatever fails, leaves the old one or the new one."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest

from distillcache.schemas.errors import ConfigError, StorageError
from distillcache.schemas.store import whole_file
from distillcache.schemas.store.whole_file import refuse_foreign_file, staged_folder, write_file, writing
from distillcache.tools.bench.students.routing import write_plot
from distillcache.tools.demo.command import _write_json
from distillcache.tools.demo.report import write_chart
from distillcache.tools.look.export_samples import write as write_samples
from distillcache.tools.look.stats import SlotStats, write_dimensions
from tests.tools.bench.students.test_routing import results


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_made_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_file(str(path), b"old")
    path.chmod(0o640)
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert names(tmp_path) == ["f"]


def test_the_umask_holds_for_new_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "f", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_what_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def write() -> None:
        with writing(path) as stream:
            stream.write(b"new")
            if moment == "write":
                full()

    if moment != "write":
        monkeypatch.setattr(whole_file.os, moment, full)
    with pytest.raises(StorageError, match="cannot be written") as caught:
        write()
    monkeypatch.undo()
    assert "No space left" in str(caught.value)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["f"]


def test_it_is_durable_before_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(whole_file.os, name, lambda *a, _r=real, _n=name: (calls.append(_n), _r(*a))[1])
    write_file(tmp_path / "f", b"x")
    assert calls == ["fsync", "replace", "fsync"]


def test_links_devices_and_pipes(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    write_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"
    write_file("/dev/null", b"x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_file(tmp_path / "pipe", b"through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)


@pytest.mark.parametrize("place", ["file/f", "file/deep/f", "."])
def test_places_that_cannot_be_are_told(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot be written"):
        write_file(tmp_path / place, b"x")


def test_a_missing_folder_is_made_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        write_file(tmp_path / "deep/er/f", b"x")
    assert (tmp_path / "deep/er/f").read_bytes() == b"x"
    assert f"made the folder {tmp_path}/deep/er" in caplog.text


@pytest.mark.parametrize(
    ("place", "told"), [("folder", "a folder is where"), ("file/f", "a file is where"), ("file/deep/f", "a file is")]
)
def test_places_that_cannot_be_are_refused_before_the_work(tmp_path: Path, place: str, told: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=told):
        refuse_foreign_file(tmp_path / place, "--out", b"made by us")


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "t"
    target.mkdir()
    (target / "old").write_bytes(b"old")

    def stage(fails: bool) -> None:
        with staged_folder(target) as fresh:
            (fresh / "new").write_bytes(b"new")
            if fails:
                raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="cannot be written"):
        stage(fails=True)
    real, count = os.rename, [0]

    def second_fails(a: object, b: object) -> None:
        count[0] += 1
        if count[0] == 2:
            raise OSError(5, "Input/output error")
        real(a, b)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(whole_file.os, "rename", second_fails)
        with pytest.raises(StorageError, match="cannot be written"):
            stage(fails=False)
    assert names(target) == ["old"]
    (tmp_path / "link").symlink_to(target)
    target = tmp_path / "link"
    stage(fails=False)
    assert names(tmp_path / "t") == ["new"]
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path) == ["link", "t"]


FIGURES = {"cosine_distance": {"block": [0, 1], "cut": [0.1, 0.2], "recovered": [0.01, 0.02]}}
PERPLEXITY = {
    "perplexity": {"teacher": 1.0, "cut": 3.0, "recovered": 2.0},
    "curve": {"step": [0, 6], "perplexity": [3.0, 2.0]},
    "gap_closed": 0.5,
}
ONES = np.ones(3)
STATS = SlotStats(count=4, total=ONES, square=ONES, fourth=ONES, largest=ONES)
WRITERS = {
    "stats": lambda path: write_dimensions(str(path), {("resid", 0): STATS}),
    "samples.npz": lambda path: write_samples(str(path), {"a": np.zeros(3)}),
    "samples.safetensors": lambda path: write_samples(str(path), {"a": np.zeros(3)}),
    "demo.json": lambda path: _write_json(path, {"a": 1}),
    "chart.png": lambda path: write_chart({**FIGURES, **PERPLEXITY}, path),
    "plot.svg": lambda path: write_plot(results(), path),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_command_replaces_its_file_as_a_whole(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full as the file is made durable leaves what was there, byte for byte."""
    path = tmp_path / kind
    path.write_bytes(b"of the user")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(whole_file.os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        WRITERS[kind](path)
    assert path.read_bytes() == b"of the user"
    assert names(tmp_path) == [kind]


FOREIGN = b"<html>my own notes</html>"


def test_a_foreign_file_is_not_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Only a file that the command itself wrote, which is said; an empty one, or none, is no loss."""
    target = tmp_path / "report.html"
    caplog.set_level("INFO", "distillcache")
    refuse_foreign_file(target, "--out", b"made by us")
    target.touch()
    refuse_foreign_file(target, "--out", b"made by us")
    assert not caplog.text
    for foreign in (FOREIGN, bytes(200_000)):
        target.write_bytes(foreign)
        with pytest.raises(ConfigError, match=r"did not make it[\s\S]*--out +.*report\.html[\s\S]*another file"):
            refuse_foreign_file(target, "--out", b"made by us")
        assert target.read_bytes() == foreign
    for own in (b"made by us" + bytes(200_000), bytes(200_000) + b"made by us"):
        target.write_bytes(own)
        refuse_foreign_file(target, "--out", b"something else", b"made by us")
        assert "replaced" not in caplog.text
        write_file(target, b"new", says=True)
        assert f"replaced {target}" in caplog.text
        caplog.clear()
    refuse_foreign_file(Path("/dev/null"), "--out", b"made by us")
