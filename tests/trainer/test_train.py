"""The loop: runs end to end, goes on to the same bits, refuses other work, says when it diverges."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from distillcache.models.checkpoint import load_pretrained
from distillcache.schemas.config import TrainConfig
from distillcache.schemas.config.train import FeatureLossConfig, LossConfig, OptimizerConfig, StudentConfig, SurgeryOp
from distillcache.schemas.errors import (
    CheckpointError,
    ConfigError,
    DamageError,
    Interrupted,
    NonFiniteError,
    PlanMismatchError,
)
from distillcache.schemas.format.checkpoint import commit, read_record
from distillcache.schemas.format.run import checkpoint_key, digest_evaluations
from distillcache.schemas.runtime.signals import StopRequest
from distillcache.schemas.store.store import Store
from distillcache.tools import cli
from distillcache.trainer import __main__, loop
from distillcache.trainer.feed.cache_source import CacheSource
from distillcache.trainer.run.checkpoints import load_student
from distillcache.trainer.run.evaluate import Evaluation
from distillcache.trainer.run.folder import read_evaluations, with_values_of
from distillcache.trainer.run.held_out import held_out
from distillcache.trainer.run.metrics_log import read_metrics
from distillcache.trainer.step.parameters import all_parameters, at_address
from distillcache.trainer.train import train
from tests.processes.command import Command
from tests.trainer.run.events import logged_scalars
from tests.trainer.run.test_damage import as_version_before

TIMED = ("perf/step_time_seconds", "perf/tokens_per_second", "perf/data_wait_share", "perf/tflops_per_second")


def config(run: Path, cache: Path, **changes: object) -> TrainConfig:
    values: dict[str, object] = {
        "run": str(run),
        "cache": str(cache),
        "student": StudentConfig(surgery=[SurgeryOp(op="query_heads", to=2, by="index")]),
        "optimizer": OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        "steps": 8,
        "batch_rows": 4,
        "checkpoint_every": 3,
        "eval_batch_rows": 3,
        "eval_teacher": False,  # tests/trainer/run/test_yardstick.py has it on
    }
    return TrainConfig.model_validate({**values, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A run that was never interrupted. Read only."""
    run = tmp_path_factory.mktemp("run") / "whole"
    train(config(run, cache))
    return run


def timeless(run: Path) -> list[dict]:
    return [{name: value for name, value in line.items() if name not in TIMED} for line in read_metrics(run)]


def parameters(run: Path) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(load_student(str(run)).decoder))]


def assert_same_run(found: Path, expected: Path) -> None:
    """The same losses, evaluations and parameters, bit for bit."""
    assert timeless(found) == timeless(expected)
    assert read_evaluations(found) == read_evaluations(expected)
    for left, right in zip(parameters(found), parameters(expected), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("data", [None, b"", b'{"step": 0}\n'])
def test_a_finished_run_without_its_metrics(whole, cache, tmp_path, data):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "metrics.jsonl").unlink()
    if data is not None:
        (run / "metrics.jsonl").write_bytes(data)
    with pytest.raises(DamageError, match="no line of a step"):
        train(config(run, cache))


def test_a_run_from_start_to_end(whole, cache, console):
    result = train(config(whole, cache))
    assert "nothing to do" in console.readouterr().err
    assert (result.steps, result.resumed_from) == (8, 8)
    assert result.after.mean_cosine < result.before.mean_cosine
    assert result.loss < read_metrics(whole)[1]["distill/total_loss"]
    assert result.tokens_per_s > 0
    assert [line["step"] for line in read_metrics(whole)] == list(range(9))
    assert sorted(path.name for path in whole.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "eval.json",
        "lock",
        "metrics.jsonl",
        "run.json",
        "student",
        "summary.json",
        "surgery.json",
        "tensorboard",
    ]
    assert sorted(int(path.name) for path in (whole / "checkpoints").iterdir()) == [6, 8]


def test_the_names_of_the_metrics(whole):
    training = {
        "step",
        "distill/total_loss",
        "distill/out_proj_feature_loss",
        "distill/beta_feature",
        "feature/mean",
        "learning/current_learning_rate",
        *TIMED,
        *(f"feature/block_{block:02d}" for block in range(3)),
    }
    evaluation = {
        "distill/student_perplexity",  # a blockwise step has none of its own
        "eval/student_perplexity",
        "eval/cosine",
        "eval/relative_recovery",
        *(f"eval/cosine_block_{block:02d}" for block in range(3)),
    }
    lines = read_metrics(whole)
    assert set(lines[0]) == {"step", *evaluation}
    assert all(set(line) == training for line in lines[1:-1])
    assert set(lines[-1]) == training | evaluation


def test_the_student_is_the_teacher_cut_and_trained(whole, teacher, cache):
    trained, original = load_student(str(whole)), load_pretrained(teacher, dtype="float32")
    assert (trained.step, trained.decoder.config.num_heads) == (8, 4)
    assert (Path(trained.tokenizer) / "tokenizer.json").exists()
    for name in ("embed", "final_norm", "head"):
        np.testing.assert_array_equal(getattr(trained.decoder, name)[...], getattr(original, name)[...])
    found = held_out(trained.decoder, CacheSource(str(cache), (), split="eval"), 4).perplexity
    assert found == pytest.approx(read_evaluations(whole)[-1].perplexity, rel=1e-5)


def test_perplexity_against_numpy(teacher, cache):
    decoder, source = load_pretrained(teacher, dtype="float32"), CacheSource(str(cache), (), split="eval")
    batch = source[list(range(len(source)))]
    logits = np.asarray(decoder(batch["tokens"], batch["positions"], batch["segment_ids"]).logits, np.float64)
    chosen = np.take_along_axis(logits[:, :-1], batch["tokens"][:, 1:, None], -1)[..., 0]
    loss = np.log(np.exp(logits[:, :-1]).sum(-1)) - chosen
    segments = batch["segment_ids"]
    counts = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0) & batch["loss_mask"][:, 1:]
    assert held_out(decoder, source, 3).perplexity == pytest.approx(np.exp(loss[counts].mean()), rel=1e-5)


class Stop(StopRequest):
    """Asked to stop after some steps, without a signal."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        super().__init__()
        keep = loop.RunLoop._keep

        def counted(run, stage, number, *rest):
            run.stop.requested = number == after
            keep(run, stage, number, *rest)

        monkeypatch.setattr(loop.RunLoop, "_keep", counted)


@pytest.mark.bits
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, cache, whole, monkeypatch, console):
    with monkeypatch.context() as patch:
        Stop(patch, after=4)
        with pytest.raises(Interrupted, match="asked to stop"):
            train(config(tmp_path / "run", cache))
    assert load_student(str(tmp_path / "run")).step == 4
    result = train(config(tmp_path / "run", cache))
    assert result.resumed_from == 4
    assert_same_run(tmp_path / "run", whole)
    said = console.readouterr().err
    for evaluation in (result.before, result.after):
        assert f"step {evaluation.step}: held-out perplexity {evaluation.perplexity:.5g}" in said


def test_steps_past_the_checkpoint_are_done_again(tmp_path, cache, whole, monkeypatch):
    """As after a kill between two checkpoints: metrics and evaluations of lost steps are cut, a torn line too."""
    with monkeypatch.context() as patch:
        patch.setattr(loop.RunLoop, "_settle", _failing_at(5))
        with pytest.raises(RuntimeError, match="at step 5"):
            train(config(tmp_path / "run", cache))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 5, "distill/to')
    assert train(config(tmp_path / "run", cache, checkpoint_every=2, prefetch_batches=3)).resumed_from == 3
    assert_same_run(tmp_path / "run", whole)


def _failing_at(step):
    settle = loop.RunLoop._settle

    def fail(run, stage, number, *rest):
        if number == step:
            raise RuntimeError(f"at step {step}")
        return settle(run, stage, number, *rest)

    return fail


@pytest.mark.slow
@pytest.mark.longest
def test_killed_again_and_again(tmp_path, cache, whole):
    run = tmp_path / "run"
    words = ["--run", str(run), "--cache", str(cache), "--steps", "8"]
    words += ["--batch-rows", "4", "--checkpoint-every", "1", "--eval-batch-rows", "3"]
    words += ["--student.surgery", "[{op: query_heads, to: 2, by: index}]", "--eval-teacher", "false"]
    words += ["--optimizer.learning-rate", "3e-3", "--optimizer.warmup-steps", "2"]
    rng, kills = np.random.default_rng(0), 0
    for _ in range(30):
        process = Command(__main__.main, words)
        try:
            code = process.wait(timeout=rng.uniform(0.5, 1.5) + 0.5 * kills)
        except subprocess.TimeoutExpired:
            process.kill()
            assert process.wait() == -signal.SIGKILL
            kills += 1
            continue
        assert code == 0, process.communicate()
        break
    assert kills
    assert_same_run(run, whole)


def test_sigterm_ends_with_a_checkpoint(tmp_path, cache, monkeypatch):
    keep = loop.RunLoop._keep

    def send(run, stage, number, *rest):
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        keep(run, stage, number, *rest)

    monkeypatch.setattr(loop.RunLoop, "_keep", send)
    run = tmp_path / "run"
    words = ["--run", str(run), "--cache", str(cache), "--steps", "4", "--batch-rows", "2"]
    words += ["--student.surgery", "[{op: query_heads, to: 2, by: index}]"]
    assert __main__.main(words) == 143
    assert load_student(str(run)).step == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"steps": 9}, "steps"),
        ({"seed": 1}, "seed"),
        ({"optimizer": OptimizerConfig(learning_rate=1.0, warmup_steps=2)}, "optimizer.learning_rate"),
    ],
)
def test_another_config_is_refused(whole, cache, change, named):
    with pytest.raises(PlanMismatchError) as caught:
        train(config(whole, cache, **change))
    assert set(caught.value.facts) == {"run", named}


def test_a_run_keeps_the_defaults_that_it_was_begun_with(whole, cache):
    """An earlier version wrote them down as values."""
    cut = StudentConfig(surgery=[SurgeryOp(op="query_heads", to=2)])
    assert train(config(whole, cache, optimizer=OptimizerConfig(warmup_steps=2), student=cut)).resumed_from == 8
    begun = {
        "optimizer": {"learning_rate": 0.5},
        "stages": [{"optimizer": {"learning_rate": 0.25}}, {"optimizer": None}],
        "student": {"surgery": [{"op": "drop_blocks", "by": "index"}, {"op": "mlp_width", "by": "weight_norm"}]},
    }
    optimizer = {"warmup_steps": 2}
    stages = [{"mode": "blockwise", "steps": 1, "optimizer": optimizer}, {"mode": "feature", "steps": 1}]
    surgery = [{"op": "drop_blocks", "blocks": [0]}, {"op": "mlp_width", "to": 2, "by": "index"}]
    found = with_values_of(
        config(whole, cache, optimizer=optimizer, stages=stages, student={"surgery": surgery}), begun
    )
    assert found.optimizer.learning_rate == 0.5
    assert [stage.optimizer and stage.optimizer.learning_rate for stage in found.stages] == [0.25, None]
    assert [op.by for op in found.student.surgery] == ["index", "index"]  # the second is named


def test_another_cache_is_refused(whole, sparse_cache):
    with pytest.raises(PlanMismatchError, match="another config or cache"):
        train(config(whole, sparse_cache))


def test_a_moved_cache_is_the_same(tmp_path, whole, cache):
    moved, run = shutil.copytree(cache, tmp_path / "moved"), shutil.copytree(whole, tmp_path / "run")
    assert train(config(run, moved)).resumed_from == 8


def test_some_blocks_without_evaluation(tmp_path, sparse_cache):
    loss = LossConfig(feature=FeatureLossConfig(blocks=[2]))
    result = train(config(tmp_path / "run", sparse_cache, loss=loss, steps=2))
    assert result.before is None
    assert result.after is None
    student, start = load_student(str(tmp_path / "run")).decoder, load_pretrained(tmp_path / "run" / "student")
    moved = jax.tree.map(
        lambda x, y: (x != y).reshape(len(x), -1).any(1).tolist(),
        at_address(all_parameters(student), (0, 0)),
        at_address(all_parameters(start), (0, 0)),
    )
    for name, blocks in moved.items():
        assert blocks == [False, False, name.startswith("attention/")]


def test_divergence_names_step_and_block(tmp_path, cache, monkeypatch):
    settle = loop.RunLoop._settle

    def poisoned(sums):
        (group,) = sums.blocks
        feature = group.terms["feature"].copy()
        feature[1] = np.nan
        return sums._replace(blocks=(group._replace(terms={**group.terms, "feature": feature}),))

    def broken(run, stage, number, sums, *rest):
        return settle(run, stage, number, poisoned(sums) if number == 2 else sums, *rest)

    monkeypatch.setattr(loop.RunLoop, "_settle", broken)
    with pytest.raises(NonFiniteError) as caught:
        train(config(tmp_path / "run", cache))
    assert (caught.value.facts["step"], caught.value.facts["block"]) == (2, "1")


def test_nothing_to_train_is_refused(tmp_path, cache):
    with pytest.raises(ConfigError, match="no loss has a weight"):
        train(config(tmp_path / "run", cache, loss=LossConfig(feature=FeatureLossConfig(weight=0))))
    assert not (tmp_path / "run").exists()


def test_a_foreign_folder_is_refused(tmp_path, cache):
    (tmp_path / "notes.txt").write_text("mine")
    assert __main__.main(["--run", str(tmp_path), "--cache", str(cache)]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_config_that_failed_at_the_start_may_be_corrected(tmp_path, cache):
    wrong = StudentConfig(surgery=[SurgeryOp(op="query_heads", to=7, by="index")])
    with pytest.raises(ConfigError):
        train(config(tmp_path / "run", cache, student=wrong, steps=1))
    assert not (tmp_path / "run").exists()
    (tmp_path / "run" / ".student.killed").mkdir(parents=True)
    assert train(config(tmp_path / "run", cache, steps=1)).steps == 1
    assert not (tmp_path / "run" / ".student.killed").exists()


def test_a_teacher_that_changed_is_refused(tmp_path, cache, teacher, monkeypatch):
    monkeypatch.setattr("distillcache.trainer.feed.teacher.weights_digest", lambda _: "0" * 32)
    with pytest.raises(CheckpointError, match="not the one that the cache was built with"):
        train(config(tmp_path / "run", cache))


def test_a_student_of_another_width_is_refused(tmp_path, cache, teacher):
    from dataclasses import replace

    from distillcache.models.checkpoint import read_config, save_pretrained
    from distillcache.models.decoder import Decoder

    save_pretrained(Decoder(replace(read_config(teacher), hidden_size=32)), tmp_path / "wide")
    with pytest.raises(ConfigError, match="disagree on the hidden size") as caught:
        train(config(tmp_path / "run", cache, student=StudentConfig(init=str(tmp_path / "wide"))))
    assert {"cache", "student"} == set(caught.value.facts)


def check_dtypes(run: Path, out: Path) -> None:
    """An export is stored as the checkpoint was that the student was made of, unless another dtype is asked for."""
    as_version_before(run)  # whose student's files have no digests: these are edited here
    file = run / "student" / "config.json"
    noted = json.loads(file.read_text())
    assert noted["distillcache_source_dtype"] == "float32"
    for written, asked, expected in (
        ("bfloat16", [], "bfloat16"),
        ("bfloat16", ["--dtype", "float16"], "float16"),
        (None, [], "float32"),  # as runs of the version before
    ):
        file.write_text(json.dumps(noted | {"distillcache_source_dtype": written}))
        assert cli.main(["export", str(run), str(out), *asked]) == 0
        config = json.loads((out / "config.json").read_text())
        assert (config["dtype"], config["torch_dtype"]) == (expected, expected)
        assert "distillcache_source_dtype" not in config
        exported, trained = load_pretrained(out), load_student(str(run)).decoder
        assert exported.dtype == expected
        for name, value in all_parameters(trained).items():
            np.testing.assert_array_equal(all_parameters(exported)[name], value.astype(expected))
    assert cli.main(["export", str(run), str(out), "--dtype", "float64"]) == 2


def as_evaluated(run: Path, found: list[Evaluation]) -> None:
    """Make a run of these evaluations: its newest checkpoint knows them."""
    store, key = Store(str(run)), checkpoint_key(8)
    entries = [entry.model_dump(mode="json") for entry in found]
    (run / "eval.json").write_text(json.dumps(entries))
    record = read_record(store, key)
    assert record is not None
    figures = (record.figures or {}) | {"eval.json": digest_evaluations(entries)}
    commit(store, key, record.model_copy(update={"figures": figures}))


def test_the_best_checkpoint_is_exported(tmp_path, whole, console):
    run, out = shutil.copytree(whole, tmp_path / "run"), tmp_path / "out"
    first, last = read_evaluations(whole)
    better = last.model_copy(update={"step": 6, "perplexity": last.perplexity / 2})
    lost = better.model_copy(update={"step": 3, "perplexity": 1.0})  # its checkpoint is gone
    for found, step in (([first, lost, better, last], 6), ([first, last], 8)):
        as_evaluated(run, found)
        assert cli.main(["export", str(run), str(out), "--best"]) == 0
        assert f"step {step} of {run}" in console.readouterr().err
    exported, trained = load_pretrained(out), load_student(str(run)).decoder
    for name, value in all_parameters(trained).items():
        np.testing.assert_array_equal(all_parameters(exported)[name], value)
    check_dtypes(run, out)
    (run / "eval.json").write_text(json.dumps([first.model_dump()]))
    assert cli.main(["export", str(run), str(out), "--best"]) == 2
    assert "no checkpoint of the run has a held-out evaluation" in console.readouterr().err
    assert cli.main(["export", str(run), str(out), "--best", "--step", "8"]) == 2
    assert "both name a checkpoint" in console.readouterr().err


def test_the_summary_as_json(whole, cache, console):
    argv = ["--config", str(whole / "config.yaml"), "--json"]
    assert __main__.main(argv) == 0
    found = json.loads(console.readouterr().out)
    assert found["steps"] == 8
    assert found["after"]["blocks"] == [0, 1, 2]


def test_tensorboard_gets_the_same_numbers(whole):
    """Of every step, read back from the event files."""
    scalars = logged_scalars(whole / "tensorboard")
    lines = {(name, line["step"]): value for line in read_metrics(whole) for name, value in line.items()}
    expected = {place: np.float32(value) for place, value in lines.items() if place[0] != "step"}
    assert {place: np.float32(value) for place, value in scalars.items()} == expected
