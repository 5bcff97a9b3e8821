"""A run's metrics, read back: lines, and TensorBoard's scalars and images of routers."""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from distillcache.schemas.errors import DamageError, FolderTakenError, StorageError
from distillcache.schemas.store.store import Store
from distillcache.trainer.run.metrics_log import PIXELS, MetricsLog, read_loads, read_metrics
from tests.trainer.run.events import logged_images, logged_scalars


def test_lines_and_events_say_the_same(tmp_path: Path) -> None:
    log = MetricsLog(Store(str(tmp_path)), -1)
    for step in range(3):
        log.log(step, {"distill/total_loss": 0.5 / (step + 1), "perf/tokens_per_s": 1e6 + step})
    log.close()
    lines = read_metrics(tmp_path)
    assert len(lines) == 3
    scalars = logged_scalars(tmp_path / "tensorboard")
    assert len(scalars) == 6
    for line in lines:
        step = line.pop("step")
        assert {name: np.float32(value) for name, value in line.items()} == {
            name: np.float32(scalars[name, step]) for name in line
        }


def test_what_a_killed_run_repeats_is_plotted_once(tmp_path: Path) -> None:
    """A run that goes on from step 1 purges what the one before it wrote from step 2 on."""
    store = Store(str(tmp_path))
    for last, value in ((-1, 1.0), (1, 2.0)):
        log = MetricsLog(store, last)
        for step in range(last + 1, 4):
            log.log(step, {"distill/total_loss": value})
        log.close()
    expected = {("distill/total_loss", step): 1.0 if step < 2 else 2.0 for step in range(4)}
    assert logged_scalars(tmp_path / "tensorboard") == expected
    assert [line["distill/total_loss"] for line in read_metrics(tmp_path)] == [1.0, 1.0, 2.0, 2.0]


def test_images_of_routers(tmp_path: Path) -> None:
    """A row of squares is a block, a column an expert: black without tokens, grey at the mean, white at twice it."""
    log = MetricsLog(Store(str(tmp_path)), -1)
    load = np.asarray([[5.0, 5.0, 5.0, 5.0], [0.0, 10.0, 10.0, 20.0]], np.float32)
    log.log_load(7, [2, 3], load)
    log.close()
    ((tag, step, image),) = logged_images(tmp_path / "tensorboard")
    assert (tag, step, image.shape[:2]) == ("router/load", 7, (2 * PIXELS, 4 * PIXELS))
    grey = image[PIXELS // 2 :: PIXELS, PIXELS // 2 :: PIXELS]
    grey = grey[..., 0] if grey.ndim == 3 else grey
    np.testing.assert_allclose(grey, [[0.5] * 4, [0, 0.5, 0.5, 1]], atol=1 / 250)
    assert read_loads(tmp_path) == [{"step": 7, "blocks": [2, 3], "share": [[0.25] * 4, [0, 0.25, 0.25, 0.5]]}]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB in memory, of its own, so that it can be filled."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a disk of a test's own is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def log_until_it_fails(log: MetricsLog) -> None:
    for step in range(1, 10_000):
        log.log(step, {f"distill/loss_{number}": 0.1 for number in range(40)})


def test_a_full_disk_ends_the_log_with_one_error_and_whole_lines(small_disk: Path) -> None:
    log = MetricsLog(Store(str(small_disk)), -1)
    with pytest.raises(StorageError, match="metrics cannot be written") as caught:
        log_until_it_fails(log)
    assert "No space left" in str(caught.value)
    log.close()  # says nothing more, and waits for nobody
    lines = read_metrics(small_disk)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert (small_disk / "metrics.jsonl").read_bytes().endswith(b"\n")


def test_going_on_with_a_full_disk_loses_no_step(small_disk: Path) -> None:
    store = Store(str(small_disk))
    log = MetricsLog(store, -1)
    for step in range(1, 201):
        log.log(step, {"distill/total_loss": 1.0})
    log.close()
    with (small_disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(bytes(4096)):
            pass
    with pytest.raises(StorageError):
        MetricsLog(store, 150)
    assert len(read_metrics(small_disk)) == 200  # what was there before, to the last step
    (small_disk / "filler").unlink()
    log = MetricsLog(store, 150)
    log.log(151, {"distill/total_loss": 2.0})
    log.close()
    assert [line["step"] for line in read_metrics(small_disk)] == list(range(1, 152))


def test_cut_lines_are_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is killed while lines are cut has the old file or the new one."""
    store = Store(str(tmp_path))
    log = MetricsLog(store, -1)
    for step in range(1, 11):
        log.log(step, {"distill/total_loss": 1.0})
    log.close()

    def stop(*_: object) -> None:
        raise StorageError("stopped before the write")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", stop)
        with pytest.raises(StorageError, match="stopped"):
            MetricsLog(store, 5)
    assert len(read_metrics(tmp_path)) == 10


LINE = {"metrics": {"step": 3, "distill/total_loss": 1.0}, "router": {"step": 3, "blocks": [0], "share": [[0.5, 0.5]]}}
GARBLED = [
    b"",
    b"x" * 200,
    b"\0" * 60,
    b'{"step": 3, "distill/to',
    b'{"distill/total_loss": 1.0}',
    b'{"step": "3"}',
    b'{"step": -1}',
    b'{"step": true}',
    b'{"step": 3, "distill/total_loss": "1.0"}',
    b'{"step": 3, "distill/total_loss": null}',
    b"[3]",
    b"3",
    b"[" * 100_000,
    b"\xff\xfe",
    b'{"step": 3}}',
    b"1" * 5_000,
    b'{"step": 3, "blocks": [0], "share": [[0.5], [0.5]]}',
    b'{"step": 3, "blocks": [0, 1], "share": [[0.5], [0.5, 0.5]]}',
]


@pytest.mark.parametrize("name", ["metrics", "router"])
@pytest.mark.parametrize("garbled", GARBLED, ids=range(len(GARBLED)))
def test_a_garbled_line_is_named(tmp_path: Path, name: str, garbled: bytes) -> None:
    """By whoever reads the lines, and by a run that goes on; the file stays as it is."""
    whole = json.dumps(LINE[name]).encode()
    data = b"\n".join([whole, garbled, whole, b""])
    path = tmp_path / f"{name}.jsonl"
    path.write_bytes(data)
    readers = [lambda: MetricsLog(Store(str(tmp_path)), 10), lambda: READERS[name](tmp_path)]
    for reader in readers:
        with pytest.raises(DamageError, match="is damaged") as caught:
            reader()
        assert caught.value.facts["line"] == 2
        assert str(path) in str(caught.value)
        assert "delete line 2" in caught.value.next
        assert len(str(caught.value)) < 1_000
    assert path.read_bytes() == data
    path.write_bytes(b"\n".join([whole, whole, garbled]))  # a killed run's last line
    assert READERS[name](tmp_path) == [LINE[name]] * 2


READERS = {"metrics": read_metrics, "router": read_loads}


def test_lines_are_durable_before_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(Store(str(tmp_path)), -1)
    synced: list[str] = []

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr("distillcache.trainer.run.metrics_log.os.fsync", fsync)
    log.log(1, {"distill/total_loss": 1.0})
    assert str(tmp_path / "metrics.jsonl") not in synced
    log.flush()
    assert str(tmp_path / "metrics.jsonl") in synced
    log.close()


def test_a_late_file_is_not_opened_in_the_run_of_another(tmp_path: Path) -> None:
    """A run that was paused while its folder was given to another has not opened router.jsonl yet."""
    run = tmp_path / "run"
    lost = [False]

    def check() -> None:
        if lost[0]:
            raise FolderTakenError("lost")

    log = MetricsLog(Store(str(run)).guarded(check), -1)
    (run / "router.jsonl").write_text(json.dumps(LINE["router"]) + "\n")  # another's
    lost[0] = True
    with pytest.raises(FolderTakenError):
        log.log_load(7, [0], np.ones((1, 2), np.float32))
    log.close()
    assert read_loads(run) == [LINE["router"]]
