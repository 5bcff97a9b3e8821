"""`train` on a disk that becomes full: one error within seconds, and nothing is lost once there is room."""

import subprocess
import time
from pathlib import Path

import pytest

from distillcache.trainer import __main__
from distillcache.trainer.run.checkpoints import load_student
from distillcache.trainer.run.metrics_log import read_metrics
from tests.processes.command import Command
from tests.trainer.run.events import logged_scalars
from tests.trainer.run.test_metrics_log import small_disk

__all__ = ["small_disk"]  # a fixture

STEPS = 160


def resize(disk: Path, kib: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kib}k", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("kib", [pytest.param(316, id="metrics"), pytest.param(400, id="checkpoint")])
def test_a_full_disk_ends_training_which_goes_on_when_there_is_room(small_disk: Path, cache: Path, kib: int) -> None:
    """The student takes 140 KiB, a checkpoint 100, and 50 steps of metrics 70: full behind the first checkpoint."""
    run = small_disk / "run"
    words = ["--run", str(run), "--cache", str(cache), "--steps", str(STEPS), "--checkpoint-every", "50"]
    words += ["--batch-rows", "4", "--log-every", "1", "--eval-every", "0", "--eval-batch-rows", "4"]
    words += ["--eval-teacher", "false", "--student.surgery", "[{op: query_heads, to: 2, by: index}]"]
    resize(small_disk, kib)
    ended = Command(__main__.main, words)
    _, told = ended.communicate(timeout=120)
    last_write = max(path.stat().st_mtime for path in run.rglob("*"))
    assert time.time() - last_write < 15, "a full disk is told within seconds"
    assert ended.returncode == 2, told
    assert told.count("error:") == 1
    assert "No space left" in told
    assert "Traceback" not in told
    assert load_student(str(run)).step == 50
    logged = [line["step"] for line in read_metrics(run)]
    assert logged == list(range(len(logged)))
    assert 50 < len(logged) <= STEPS
    resize(small_disk, 4096)
    assert __main__.main(words) == 0
    assert [line["step"] for line in read_metrics(run)] == list(range(STEPS + 1))
    losses = [step for name, step in logged_scalars(run / "tensorboard") if name == "distill/total_loss"]
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert load_student(str(run)).step == STEPS
