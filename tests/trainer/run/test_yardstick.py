"""The teacher's own perplexity beside the student's: measured as the student's is, once, or said why not."""

import contextlib
import gc
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from distillcache.cache_builder.build import build_cache
from distillcache.models.checkpoint import load_pretrained
from distillcache.schemas.config.report import ReportConfig
from distillcache.schemas.errors import Interrupted
from distillcache.schemas.runtime.peers import ALONE
from distillcache.tools import cli
from distillcache.tools.report.command import write_report
from distillcache.trainer import train as training
from distillcache.trainer.feed.cache_source import CacheSource
from distillcache.trainer.run import yardstick
from distillcache.trainer.run.evaluate import Evaluation, gap_closed
from distillcache.trainer.run.folder import read_evaluations
from distillcache.trainer.run.yardstick import told_gap
from distillcache.trainer.train import train
from tests.conftest import build_config
from tests.tools.report.report_reading import ReadPage
from tests.tools.viewer.serving import read, viewer
from tests.trainer.test_train import Stop, config


def judging(run: Path, cache: Path, **changes: Any):
    return config(run, cache, **{"eval_teacher": True, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A run with its teacher's figure. Read only."""
    folder = tmp_path_factory.mktemp("run") / "judged"
    train(judging(folder, cache, eval_every=4))
    return folder


def by_hand(teacher: Path, cache: Path) -> float:
    """exp of the teacher's mean cross-entropy on the held-out rows, by NumPy from its logits."""
    batch = CacheSource(str(cache), (), split="eval")[range(4)]
    decoder = load_pretrained(teacher, dtype="float32")
    logits = np.asarray(decoder(*(jnp.asarray(batch[n]) for n in ("tokens", "positions", "segment_ids"))).logits, float)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    segments = batch["segment_ids"]
    counts = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0) & batch["loss_mask"][:, 1:]
    loss = -np.take_along_axis(logs[:, :-1], batch["tokens"][:, 1:, None], -1)[..., 0]
    return float(np.exp(loss[counts].mean()))


def test_every_evaluation_has_it_and_the_gap(run: Path, cache: Path, teacher: Path) -> None:
    found = read_evaluations(run)
    assert [entry.step for entry in found] == [0, 4, 8]
    expected = by_hand(teacher, cache)
    start = found[0].perplexity
    for entry in found:
        assert entry.teacher_perplexity == pytest.approx(expected, rel=1e-5)
        assert entry.teacher_unknown is None
        assert entry.perplexity is not None
    for entry in found[1:]:
        assert entry.gap_closed == gap_closed(entry.teacher_perplexity, start, entry.perplexity)


@pytest.mark.parametrize(
    ("teacher", "start", "now", "gap"),
    [
        (25.3, 236.8, 40.8, (236.8 - 40.8) / (236.8 - 25.3)),  # the demo's
        (20.0, 30.0, 40.0, -1.0),  # it grew
        (20.0, 30.0, 15.0, 1.5),  # better than its teacher
        (20.0, 20.0, 15.0, None),  # there was none
        (20.0, 10.0, 15.0, None),
        (None, 30.0, 20.0, None),
        (20.0, None, None, None),
    ],
)
def test_the_share_of_the_gap(teacher: float | None, start: float | None, now: float | None, gap: float | None) -> None:
    assert gap_closed(teacher, start, now) == (None if gap is None else pytest.approx(gap))


def evaluation(step: int, perplexity: float | None, **others: Any) -> Evaluation:
    return Evaluation(step=step, perplexity=perplexity, blocks=(), cosine=(), **others)


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (
            {"perplexity": 40.8, "teacher_perplexity": 25.3, "gap_closed": 0.927},
            "held-out perplexity: teacher 25.30, start 236.80, now 40.80: 92.7% of the gap closed",
        ),
        (
            {"perplexity": 40.8, "teacher_unknown": "no such checkpoint"},
            "held-out perplexity: start 236.80, now 40.80; the teacher's is not known: no such checkpoint",
        ),
        ({"perplexity": 40.8, "teacher_perplexity": 300.0}, "teacher 300.00, start 236.80, now 40.80: no gap to close"),
        ({"perplexity": None}, "held-out perplexity undefined (no token is a target)"),
    ],
)
def test_how_it_is_said(now: dict[str, Any], said: str) -> None:
    assert said in told_gap(evaluation(0, 236.8), evaluation(60, **now))


def test_the_summary_the_report_and_the_viewer_show_all_four(
    run: Path, cache: Path, tmp_path: Path, console: pytest.CaptureFixture[str]
) -> None:
    first, *_, last = read_evaluations(run)
    flags = tmp_path / "train.yaml"
    flags.write_text(yaml.safe_dump(judging(run, cache, eval_every=4).model_dump(mode="json")))
    assert cli.main(["train", "--config", str(flags)]) == 0
    assert told_gap(first, last) in console.readouterr().err
    assert cli.main(["train", "--config", str(flags), "--json"]) == 0
    assert json.loads(console.readouterr().out)["after"]["teacher_perplexity"] == last.teacher_perplexity
    out = tmp_path / "run.html"
    write_report(ReportConfig(target=str(run), out=str(out)))
    for page in (ReadPage(out.read_text()), read(viewer(run, "run"), "/")):
        facts = page.tables["The run"]
        assert facts.row("Teacher's held-out perplexity") == [f"{last.teacher_perplexity:.5g}"]
        assert facts.row("Held-out perplexity at the start") == [f"{first.perplexity:.5g}"]
        assert facts.row("Last held-out perplexity") == [f"{last.perplexity:.5g}"]


def test_it_is_measured_once_a_run(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on finds it in eval.json."""
    calls = []
    real = yardstick.held_out
    monkeypatch.setattr(yardstick, "held_out", lambda *args: calls.append(1) or real(*args))
    with monkeypatch.context() as patch:
        patch.setattr(training, "watch_for_stop", lambda **_: contextlib.nullcontext(Stop(patch, 3)))
        with pytest.raises(Interrupted):
            train(judging(tmp_path / "run", cache))
    train(judging(tmp_path / "run", cache))
    assert len(calls) == 1
    found = read_evaluations(tmp_path / "run")
    assert found[-1].teacher_perplexity == found[0].teacher_perplexity
    assert isinstance(found[0].teacher_perplexity, float)


def test_the_teacher_is_freed(cache: Path, tmp_path: Path) -> None:
    settings = judging(tmp_path / "run", cache)
    sources = yardstick.Sources(settings)
    student = load_pretrained(sources.rows.plan.teacher.path).config
    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())
    assert yardstick.measure_teacher(
        settings.eval_teacher, settings.eval_batch_rows, sources, student, ALONE
    ).perplexity
    assert sum(array.nbytes for array in jax.live_arrays()) <= before + 1024


@pytest.mark.parametrize("case", ["gone", "other", "off", "large"])
def test_why_it_is_not_known(
    case: str, tmp_path: Path, teacher: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved, cache = shutil.copytree(teacher, tmp_path / "teacher"), tmp_path / "cache"
    build_cache(build_config(cache, moved, corpus))
    expected = {
        "gone": "the cache's teacher cannot be opened",
        "other": "not the one that the cache was built with",
        "off": "eval_teacher is off",
        "large": "do not fit on a device",
    }[case]
    settings = judging(tmp_path / "run", cache, eval_teacher=case != "off")
    if case == "gone":
        shutil.rmtree(moved)
    elif case == "other":
        weights = bytearray((moved / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (moved / "model.safetensors").write_bytes(bytes(weights))
    elif case == "large":
        monkeypatch.setattr(yardstick, "_free_bytes", lambda: 1000)
    sources = yardstick.Sources(settings)
    found = yardstick.measure_teacher(
        settings.eval_teacher, settings.eval_batch_rows, sources, load_pretrained(teacher).config, ALONE
    )
    assert found.perplexity is None
    assert expected in str(found.unknown)
    if case == "gone":  # but where the student is made of it, it is at hand
        again = judging(tmp_path / "run", cache, student={"init": str(teacher)})
        sources = yardstick.Sources(again)
        found = yardstick.measure_teacher(
            again.eval_teacher, again.eval_batch_rows, sources, load_pretrained(teacher).config, ALONE
        )
        assert found.perplexity == pytest.approx(by_hand(teacher, cache), rel=1e-5)


def test_in_the_loop_it_is_the_teacher_there(tmp_path: Path, cache: Path, teacher: Path) -> None:
    settings = judging(tmp_path / "run", cache, source="online")
    sources = yardstick.Sources(settings)
    found = yardstick.measure_teacher(
        settings.eval_teacher, settings.eval_batch_rows, sources, load_pretrained(teacher).config, ALONE
    )
    assert found.perplexity == pytest.approx(by_hand(teacher, cache), rel=1e-5)
