"""Rows without a single target: means over targets are undefined, and nobody prints them as numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from distillcache.schemas.config.report import ReportConfig
from distillcache.schemas.errors import InputError
from distillcache.schemas.format.rows import num_targets, pack_rows
from distillcache.tools import cli
from distillcache.tools.report.command import write_report
from distillcache.trainer.feed.cache_source import CacheSource
from distillcache.trainer.run.checkpoints import kept_steps
from distillcache.trainer.run.evaluate import Evaluation
from distillcache.trainer.run.folder import best_evaluation, best_of, read_evaluations
from distillcache.trainer.run.metrics_log import read_metrics
from distillcache.trainer.train import train
from tests.tools.report.report_reading import ReadPage
from tests.trainer.run.events import logged_scalars
from tests.trainer.test_train import config

UNDEFINED = ("perplexity", "kl_div", "hard_loss", "soft_loss", "teacher_loss", "targets_covered")


def write_tokens(folder: Path, masks: list[list[bool]]) -> Path:
    """A document of tokens for each mask, in an ArrayRecord file."""
    rng, records = np.random.default_rng(0), []
    for mask in masks:
        tokens = rng.integers(0, 250, len(mask)).astype(np.int32)
        records.append(safetensors.numpy.save({"tokens": tokens, "loss_mask": np.asarray(mask, np.uint8)}))
    folder.mkdir(parents=True)
    (folder / "a.array_record").write_bytes(pack_rows(records))
    return folder


def build_flags(cache: Path, teacher: Path, text: Path, eval_rows: int) -> list[str]:
    return [
        *("--cache", str(cache), "--teacher.path", str(teacher), "--data.path", str(text)),
        *("--data.row-tokens", "16", "--data.eval-rows", str(eval_rows), "--batch-rows", "4"),
        *("--taps.topk-logits", "{k: 4}"),
    ]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("text") / "tokens", [[False] * 31] * 5)


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory, teacher: Path, text: Path) -> Path:
    """Ten rows, three held out, no target. Read only."""
    folder = tmp_path_factory.mktemp("cache") / "silent"
    assert cli.main(["build", *build_flags(folder, teacher, text, 3)]) == 0
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, silent: Path) -> Path:
    """A blockwise run on it."""
    folder = tmp_path_factory.mktemp("run") / "blockwise"
    train(config(folder, silent, steps=4, eval_every=2, checkpoint_every=2, eval_batch_rows=4))
    return folder


@pytest.mark.parametrize("command", ["prepare", "build", "plan"])
def test_who_makes_rows_says_that_none_has_a_target(
    command: str, tmp_path: Path, teacher: Path, text: Path, console: pytest.CaptureFixture[str]
) -> None:
    flags = build_flags(tmp_path / "cache", teacher, text, 3)
    if command == "prepare":
        flags = ["--out", str(tmp_path / "rows"), "--data.tokenizer", str(teacher), *flags[4:10]]
    assert cli.main([command, *flags]) == 0
    said = " ".join(" ".join(console.readouterr()).split())
    assert "warning: no token of the rows to train on or the held-out rows is a target" in said


def test_inspect_says_so(silent: Path, cache: Path, console: pytest.CaptureFixture[str]) -> None:
    for each, says in ((silent, True), (cache, False)):
        assert cli.main(["inspect", str(each), "--json"]) == 0
        warnings = json.loads(console.readouterr().out)["warnings"]
        assert any("rows to train on or the held-out rows is a target" in said for said in warnings) == says


def test_a_blockwise_run_needs_none(run: Path, silent: Path, console: pytest.CaptureFixture[str]) -> None:
    found = read_evaluations(run)
    assert [entry.step for entry in found] == [0, 2, 4]
    assert [(entry.perplexity, entry.kl) for entry in found] == [(None, None)] * 3
    assert all(entry.mean_cosine for entry in found)
    lines = read_metrics(run)
    names = {name for line in lines for name in line} | {tag for tag, _ in logged_scalars(run / "tensorboard")}
    assert not [name for name in names if any(word in name for word in UNDEFINED)]
    assert {"eval/cosine", "distill/total_loss"} <= names
    words = ["--run", str(run), "--cache", str(silent), "--student.surgery", "[{op: query_heads, to: 2, by: index}]"]
    words += ["--optimizer.learning-rate", "3e-3", "--optimizer.warmup-steps", "2", "--steps", "4", "--eval-every", "2"]
    words += ["--batch-rows", "4", "--checkpoint-every", "2", "--eval-batch-rows", "4"]
    assert cli.main(["train", *words]) == 0
    said = console.readouterr().err
    assert "note: no token of the rows to train on or the held-out rows is a target" in said
    assert "held-out perplexity undefined (no token is a target)" in said
    assert cli.main(["train", *words, "--json"]) == 0
    assert json.loads(console.readouterr().out)["after"]["perplexity"] is None


def test_the_best_is_the_nearest_then(run: Path, tmp_path: Path, console: pytest.CaptureFixture[str]) -> None:
    trained = read_evaluations(run)[1:]
    nearest = min(trained, key=lambda entry: entry.mean_cosine or 1)
    assert best_evaluation(str(run)) == nearest
    assert nearest.step in kept_steps(str(run))
    assert cli.main(["export", str(run), str(tmp_path / "out"), "--best"]) == 0
    said = console.readouterr().err
    assert f"step {nearest.step} of {run}, the best with a held-out cosine distance of " in said
    assert cli.main(["export", f"{run}/checkpoints/best", str(tmp_path / "again")]) in (0, 2)


def evaluation(step: int, perplexity: float | None, cosine: tuple[float, ...] = ()) -> Evaluation:
    return Evaluation(step=step, perplexity=perplexity, blocks=tuple(range(len(cosine))), cosine=cosine)


@pytest.mark.parametrize(
    ("found", "best"),
    [
        ([(1, 3.0, (0.1,)), (2, 2.0, (0.2,))], 2),  # perplexity goes first
        ([(1, None, (0.2,)), (2, None, (0.1, 0.2)), (3, 5.0, ())], 3),  # and what has none is not the best
        ([(1, None, (0.2,)), (2, None, (0.1, 0.2)), (3, None, ())], 2),
        ([(1, None, ()), (2, None, ())], None),
        ([], None),
    ],
)
def test_which_evaluation_is_the_best(found: list, best: int | None) -> None:
    entry = best_of([evaluation(*each) for each in found])
    assert (entry and entry.step) == best


def test_pages_and_diffs_have_a_dash(run: Path, tmp_path: Path, console: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.html"
    said = write_report(ReportConfig(target=str(run), out=str(out)))
    assert any("No token of the held-out rows is a target" in words for words in said["warnings"])
    page = ReadPage(out.read_text())
    assert page.tables["The run"].row("Last held-out perplexity") == ["undefined (no token is a target)"]
    assert "perplexity" not in " ".join(page.figures)
    assert cli.main(["diff", str(run), str(run)]) == 0
    assert cli.main(["diff", str(run), str(run), "--json"]) == 0
    assert json.loads(console.readouterr().out.splitlines()[-1])["evaluations"][0]["perplexity"] == [None, None]


def test_losses_over_targets_are_refused_before_the_first_step(silent: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(InputError, match="no token of the rows to train on is a target"):
        train(config(run, silent, mode="feature", loss={"alpha": 0.5, "tau": 2, "feature": {"weight": 0.3}}))
    assert not run.exists()


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """Twelve rows, none held out; a third of them has targets."""
    masks = [[(row % 3 == 0) and place % 2 == 0 for place in range(15)] for row in range(12)]
    text = write_tokens(tmp_path_factory.mktemp("text") / "sparse", masks)
    folder = tmp_path_factory.mktemp("cache") / "sparse"
    assert cli.main(["build", *build_flags(folder, teacher, text, 0)]) == 0
    return folder


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_batch_without_targets_has_no_such_figures(weight: float, sparse: Path, tmp_path: Path) -> None:
    """Each row once, one a batch: as many lines have them as there are rows with targets."""
    source, run = CacheSource(str(sparse), (), split="train"), tmp_path / "run"
    rows = [source[[number]] for number in range(len(source))]
    having = sum(num_targets(row["segment_ids"], row["loss_mask"]) > 0 for row in rows)
    assert 0 < having < len(rows)
    loss = {"alpha": 0.5, "tau": 2, "feature": {"weight": weight}}
    result = train(config(run, sparse, mode="feature", loss=loss, steps=len(rows), batch_rows=1))
    lines = read_metrics(run)
    assert len(lines) == len(rows)
    for name in ("hard_loss", "student_perplexity", "teacher_perplexity", "kl_div_at_T", "soft_loss"):
        found = [line[f"distill/{name}"] for line in lines if f"distill/{name}" in line]
        assert len(found) == having, name
        assert min(found) > 0, name
    whole = [line for line in lines if "distill/total_loss" in line]
    assert len(whole) == (len(rows) if weight else having)  # without another loss the total is undefined, too
    assert result.tokens_per_s > 0
    assert result.loss == lines[-1].get("distill/total_loss")


def test_counting_targets_is_by_document() -> None:
    """The first token of a document is nobody's target, nor is padding; whatever the mask says."""
    segments = np.asarray([[1, 1, 2, 2, 0, 0], [1, 0, 0, 0, 0, 0]], np.int32)
    mask = np.ones((2, 6), bool)
    assert num_targets(segments, mask) == 2
    assert num_targets(segments[1], mask[1]) == 0
    mask[0, 1] = False
    assert num_targets(segments, mask) == 1
