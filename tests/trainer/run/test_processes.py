"""A run by several real processes, with gloo between them: the same numbers however many there are; stopped, killed."""

import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from distillcache.models.checkpoint import read_config
from distillcache.schemas.errors import Interrupted
from distillcache.schemas.runtime.peers import ALONE, Peers
from distillcache.trainer import __main__
from distillcache.trainer.feed.open import Sources
from distillcache.trainer.run.checkpoints import load_student
from distillcache.trainer.run.folder import read_evaluations
from distillcache.trainer.run.metrics_log import read_metrics
from distillcache.trainer.run.yardstick import measure_teacher
from distillcache.trainer.train import train
from tests.processes.command import Command
from tests.trainer.run.test_in_bucket import config

ENDED = re.compile(r"(stopped|error): ")


def start(run: Path, caches: list[Path], devices: int, *words: str) -> list[Command]:
    """Processes of `distillcache train`, one for each of these paths, with so many devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = re.sub(r"device_count=\d+", f"device_count={devices}", os.environ["XLA_FLAGS"])
    together = ["--config", str(run.parent / "run.yaml"), "--run", str(run)]
    together += ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(len(caches)), "--timeout-s", "10"]
    return [
        Command(
            __main__.main,
            [*together, "--cache", str(cache), "--process-id", str(number), *words],
            {**os.environ, "XLA_FLAGS": flags},
        )
        for number, cache in enumerate(caches)
    ]


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in read_metrics(run)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ends(processes: list[Command], code: int) -> list[str]:
    """What they say of their end, all with this exit code."""
    found = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), found
    assert [out for out, _ in found[1:]] == [""] * (len(found) - 1)
    return [err[match.start() :] if (match := ENDED.search(err)) else "" for _, err in found]


@pytest.mark.slow
@pytest.mark.longest
def test_four_processes_then_two_then_one(tmp_path, cache, monkeypatch):
    """Four are stopped by a SIGTERM to one of them; of two, one is killed; one goes on alone."""
    run, values = tmp_path / "run", {"steps": 3000, "eval_every": 4}
    (tmp_path / "run.yaml").write_text(
        "{student: {surgery: [{op: query_heads, to: 2, by: index}]}, batch_rows: 4, checkpoint_every: 2, steps: 3000, "
        "eval_every: 4, eval_teacher: false}"
    )
    four = start(run, [cache] * 4, 1, "--mesh.block", "2", "--mesh.fsdp", "2")
    wait_for_step(run, 3)
    four[2].send_signal(signal.SIGTERM)
    assert len(set(ends(four, 143))) == 1  # one message, one step
    reached = read_metrics(run)[-1]["step"]

    two = start(run, [cache] * 2, 2, "--mesh.data", "4")
    wait_for_step(run, reached + 3)
    (victim,) = Path(f"/proc/{two[1].pid}/task/{two[1].pid}/children").read_text().split()
    os.kill(int(victim), signal.SIGKILL)
    first, second = ends(two, 2)
    assert "is gone: 1 on" in first
    assert "killed by SIGKILL" in second
    reached = read_metrics(run)[-1]["step"]

    # Alone, on another mesh; then all of it alone. Both are stopped at the same step.
    monkeypatch.setattr(Peers, "should_stop", lambda peers, stop, step: step == reached + 2)
    found = []
    for folder in (run, tmp_path / "whole"):
        with pytest.raises(Interrupted):
            train(config(str(folder), cache, **values))
        found.append(
            [(line["step"], line.get("distill/total_loss"), line.get("eval/cosine")) for line in read_metrics(folder)]
        )
    together, alone = (np.asarray(lines, float) for lines in found)
    # Sums over devices round in another order, and Adam's first steps divide by almost nothing: 1e-6 grows to 1e-4.
    np.testing.assert_allclose(together, alone, rtol=1e-3)
    assert len(alone) == reached + 3


@pytest.mark.slow
def test_adapters_of_two_processes_and_of_one(tmp_path, cache):
    """Rows and weights are divided over two processes; what is trained is what one process trains."""
    lora = {"rank": 2, "targets": ["attention", "mlp/down"]}
    values = {
        "student": {"surgery": [{"op": "query_heads", "to": 2, "by": "index"}], "lora": lora},
        "checkpoint_every": 2,
        "eval_teacher": False,
        "steps": 4,
    }
    values |= {"stages": [{"mode": "blockwise", "steps": 2}, {"mode": "feature", "steps": 2}], "batch_rows": 4}
    run = tmp_path / "run"
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    ends(start(run, [cache] * 2, 2, "--mesh.data", "2", "--mesh.fsdp", "2"), 0)
    train(config(str(tmp_path / "whole"), cache, **values))
    students = [load_student(str(folder)).decoder for folder in (run, tmp_path / "whole")]
    for left, right in zip(*(jax.tree.leaves(nnx.state(student)) for student in students), strict=True):
        np.testing.assert_allclose(left, right, atol=2e-5)
    perplexities = [[entry.perplexity for entry in read_evaluations(folder)] for folder in (run, tmp_path / "whole")]
    np.testing.assert_allclose(*perplexities, rtol=1e-4)


@pytest.mark.slow
def test_the_teachers_figure_is_that_of_one_process(tmp_path, cache):
    """Two processes share the held-out rows, and each says the same of the whole."""
    (tmp_path / "run.yaml").write_text(
        "{student: {surgery: [{op: query_heads, to: 2, by: index}]}, batch_rows: 4, steps: 2, eval_batch_rows: 2}"
    )
    ends(start(tmp_path / "run", [cache] * 2, 1, "--mesh.data", "2"), 0)
    together = read_evaluations(tmp_path / "run")
    settings = config(str(tmp_path / "alone"), cache, eval_teacher=True)
    sources = Sources(settings)
    alone = measure_teacher(
        settings.eval_teacher, settings.eval_batch_rows, sources, read_config(sources.rows.plan.teacher.path), ALONE
    )
    assert [entry.teacher_perplexity for entry in together] == [pytest.approx(alone.perplexity, rel=1e-5)] * 2


@pytest.mark.slow
def test_a_process_that_cannot_begin_ends_the_others(tmp_path, cache):
    """It says why, and the others say which one it was, and why."""
    (tmp_path / "run.yaml").write_text("{batch_rows: 4, student: {surgery: [{op: query_heads, to: 2, by: index}]}}")
    first, second = ends(start(tmp_path / "run", [cache, tmp_path / "nothing"], 1, "--mesh.data", "2"), 2)
    assert second.startswith("error: there is no cache here")
    assert re.match(r"error: process 1, on .*, has ended: there is no cache here", first)
