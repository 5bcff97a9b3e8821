"""A thread or a process that dies ends whoever waits for it, with one error, or is not waited for."""

import io
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from distillcache.cache_builder import prepare as prepare_module
from distillcache.cache_builder.prepare import prepare_rows
from distillcache.cache_builder.record.pipeline import ByteBudget
from distillcache.schemas.cache.lease import Leases
from distillcache.schemas.errors import StorageError
from distillcache.schemas.runtime import supervise as supervise_module
from distillcache.schemas.runtime.supervise import supervise
from distillcache.schemas.store.store import Store
from distillcache.trainer.run.checkpoints import Checkpoints
from distillcache.trainer.run.profile import Trace
from tests.cache_builder.repair.test_paused_repairs import preparation

SOON_S = 20.0  # a process may take some of them to start, on a busy machine


class Closed(io.RawIOBase):
    """Standard output whose reader has gone, or whose disk is full."""

    def writable(self) -> bool:
        return True

    def write(self, _: Any) -> int:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the stream that is broken
def test_a_supervised_child_is_not_held_up_by_a_reader_that_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It prints more than a pipe holds."""
    (tmp_path / "talks.py").write_text(
        "for _ in range(20_000):\n    print('a line of some words')\nraise SystemExit(7)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Closed(), 16), write_through=True))
    begun = time.monotonic()
    code: list[int] = []
    thread = threading.Thread(target=lambda: code.append(supervise("talks", [])), daemon=True)
    monkeypatch.setattr(supervise_module, "FORWARDED", ())  # signals belong to the main thread
    thread.start()
    thread.join(SOON_S)
    assert code == [7]
    assert time.monotonic() - begun < SOON_S


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the stream that is broken
def test_a_process_that_the_child_leaves_behind_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(8)'])\n"
    (tmp_path / "leaves.py").write_text(words)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(supervise_module, "LAST_WORDS_S", 0.2)
    begun = time.monotonic()
    assert supervise("leaves", []) == 0
    assert time.monotonic() - begun < 7


def _stuck(*_: object) -> None:
    """A worker that was paused, or hangs in a disk that does not answer, and hears no SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


def _killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("work", [_stuck, _killed])
def test_a_worker_of_prepare_is_not_waited_for(
    tmp_path: Path, corpus: Path, teacher: Path, work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare_rows(preparation(tmp_path / "alone", corpus, teacher))
    monkeypatch.setattr(prepare_module, "RESUMABLE_BYTES", 0)
    monkeypatch.setattr(prepare_module, "WORKER_ENDS_S", 0.2)
    monkeypatch.setattr(prepare_module, "_work", work)
    monkeypatch.setattr(multiprocessing, "get_context", lambda _, real=multiprocessing.get_context: real("fork"))
    begun = time.monotonic()
    config = preparation(tmp_path / "rows", corpus, teacher).model_copy(update={"workers": 2})
    assert prepare_rows(config).content_digest == whole.content_digest
    assert time.monotonic() - begun < SOON_S
    assert not multiprocessing.active_children()


def test_a_checkpoint_that_failed_is_told_at_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(Store(str(tmp_path)), 2)

    def full(*_: object) -> None:
        raise StorageError("no space left")

    monkeypatch.setattr("distillcache.trainer.run.checkpoints.write_arrays", full)
    checkpoints.save(1, {}, {"parameters/a": np.zeros(3)}, {})
    deadline = time.monotonic() + SOON_S
    pending = checkpoints._pending
    while pending is not None and not pending.done() and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(StorageError, match="a checkpoint cannot be written"):
        checkpoints.check()
    checkpoints.check()  # said once
    checkpoints.close()


@pytest.mark.parametrize("moment", ["start_trace", "stop_trace"])
def test_a_profile_on_a_full_disk_is_one_error(tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: No space left on device")

    for name in ("start_trace", "stop_trace"):
        monkeypatch.setattr(jax.profiler, name, full if name == moment else lambda *_: None)

    def profiled() -> None:
        with Trace("steps=1:2", Store(str(tmp_path))) as trace:
            trace.before(1)
            trace.before(2)

    with pytest.raises(StorageError, match="trace of the profiler"):
        profiled()


def test_a_dead_heartbeat_ends_its_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leases = Leases(Store(str(tmp_path)), "0000", 0.4)
    assert leases.take(0)

    def full(*_: object, **__: object) -> bool:
        raise StorageError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "replace", full)
        deadline = time.monotonic() + SOON_S
        while leases.failure is None and time.monotonic() < deadline:
            time.sleep(0.01)
    with pytest.raises(StorageError, match="no space left"):
        leases.take(1)
    leases.close()


def test_a_writer_that_failed_frees_its_bytes() -> None:
    budget = ByteBudget(10)
    budget.acquire(10)
    waiting = threading.Thread(target=budget.acquire, args=(5,), daemon=True)
    waiting.start()
    budget.release(10)
    waiting.join(SOON_S)
    assert not waiting.is_alive()


def test_lines_of_the_collectives_that_come_into_each_other_are_not_passed_on():
    told = b" is connected to 1 peer ranks. Expected number of connected peer ranks is : 1\n"
    source, target = (
        io.BytesIO(b"one\n[Gloo] Rank [Gloo] Rank 01" + told + told + b"\n[Gloo] Rank 0" + told + b"two\n"),
        io.BytesIO(),
    )
    supervise_module._pass_on(source, target, deque())
    assert target.getvalue() == b"one\ntwo\n"
