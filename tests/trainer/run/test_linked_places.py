"""Files and folders of a run that are links to places outside: nothing is written through them, nothing is deleted."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from distillcache.schemas.errors import StorageError
from distillcache.schemas.store.store import Store
from distillcache.trainer.run.folder import only_one
from distillcache.trainer.run.metrics_log import MetricsLog
from distillcache.trainer.run.profile import Trace
from tests.trainer.run.test_student import opened


def hold(store: Store) -> None:
    with only_one(store):
        pass


def log(store: Store) -> None:
    MetricsLog(store, -1).log(1, {"distill/total_loss": 1.0})


def profile(store: Store) -> None:
    with Trace("steps=1:2", store) as trace:
        trace.before(1)


WRITERS: dict[str, Callable[[Store], None]] = {
    "lock": hold,
    "metrics.jsonl": log,
    "tensorboard": log,
    "traces": profile,
}


@pytest.mark.parametrize("dangling", [False, True], ids=["there", "dangling"])
@pytest.mark.parametrize("name", WRITERS)
def test_nothing_is_written_through_a_link(tmp_path: Path, name: str, dangling: bool) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    outside.mkdir()
    target = outside / "target"
    if not dangling and "." not in name and name != "lock":
        target.mkdir()
    elif not dangling:
        target.write_bytes(b"")
    (run / name).symlink_to(target)
    before = {path: path.stat().st_mtime_ns for path in [outside, *outside.rglob("*")]}
    with pytest.raises(StorageError, match="leads out"):
        WRITERS[name](Store(str(run)))
    assert {path: path.stat().st_mtime_ns for path in [outside, *outside.rglob("*")]} == before


def test_a_link_that_appears_during_a_run_is_not_written_through(tmp_path: Path) -> None:
    """The lines of routers begin with the first step that has some."""
    run, outside = tmp_path / "run", tmp_path / "precious"
    outside.write_text("keep me\n")
    log = MetricsLog(Store(str(run)), -1)
    (run / "router.jsonl").symlink_to(outside)
    with pytest.raises(StorageError, match="leads out"):
        log.log_load(1, [0], np.ones((1, 2), np.float32))
    log.close()
    assert outside.read_text() == "keep me\n"


def test_a_leftover_student_that_is_a_link_goes_without_its_target(tmp_path: Path, cache: Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    outside.mkdir()
    (outside / "precious").write_text("keep me")
    (run / ".student.0123").symlink_to(outside)
    opened(run, cache, layer_map=[0, 2])
    assert (outside / "precious").read_text() == "keep me"
    assert not (run / ".student.0123").is_symlink()
