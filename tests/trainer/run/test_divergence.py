"""Runs that end worse than they began: how they are judged, what is said, and the exit code."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distillcache.schemas.config.train import TrainConfig
from distillcache.schemas.errors import DivergedError, Interrupted, NonFiniteError
from distillcache.schemas.runtime.peers import _peer_error
from distillcache.tools import cli
from distillcache.trainer import loop
from distillcache.trainer.run import evaluate
from distillcache.trainer.run.divergence import best_checkpoint, find_divergence, stage_losses
from distillcache.trainer.run.evaluate import Evaluation
from distillcache.trainer.run.folder import read_evaluations
from distillcache.trainer.run.metrics_log import read_metrics
from distillcache.trainer.run.stages import Stage, resolve_stages
from distillcache.trainer.train import train
from tests.trainer.test_train import Stop, config

MLP: dict[str, Any] = {"mlp": {"weight": 1.0}}
TOKENS: dict[str, Any] = {"mode": "feature", "loss": {"feature": {"weight": 0.0}}}
HOT = {"optimizer": {"learning_rate": 10.0, "warmup_steps": 0}}


def last_stage(**changes: Any) -> Stage:
    config = TrainConfig.model_validate({"run": "r", "cache": "c", "steps": 40, **changes})
    return resolve_stages(config, config.mesh)[-1]


def evaluation(step: int, perplexity: float = 40.0, cosine: float | None = None, kl: float | None = None) -> Evaluation:
    blocks = () if cosine is None else (0, 1)
    return Evaluation(step=step, perplexity=perplexity, blocks=blocks, cosine=(cosine,) * len(blocks), kl=kl)  # type: ignore[arg-type]


def lines(*losses: float, **others: float) -> list[dict[str, float]]:
    """Metrics of a blockwise run with these feature losses; others: the same on every line."""
    return [
        {"step": at + 1, "distill/total_loss": loss, "feature/mean": loss, "distill/beta_feature": 1.0, **others}
        for at, loss in enumerate(losses)
    ]


@pytest.mark.parametrize(
    ("stage", "before", "after", "diverged"),
    [
        # The quantity is what the stage trains, whatever the others do.
        ({}, evaluation(0, 40, 0.30), evaluation(40, 30, 0.99), True),
        ({}, evaluation(0, 40, 0.30), evaluation(40, 400, 0.10), False),
        (TOKENS, evaluation(0, 40, 0.30), evaluation(40, 400, 0.10), True),
        (TOKENS, evaluation(0, 40, 0.30), evaluation(40, 30, 0.99), False),
        (TOKENS | {"loss": {"alpha": 1.0}}, evaluation(0, 40, kl=0.5), evaluation(40, 20, kl=0.9), True),
        (TOKENS | {"loss": {"alpha": 1.0}}, evaluation(0, 40, kl=0.5), evaluation(40, 90, kl=0.3), False),
        # Noise does not trip it.
        ({}, evaluation(0, 40, 0.30), evaluation(40, 40, 0.31), False),
        ({}, evaluation(0, 40, 1e-9), evaluation(40, 40, 5e-3), False),
        ({}, evaluation(0, 40, 1e-9), evaluation(40, 40, 0.02), True),
        (TOKENS, evaluation(0, 40), evaluation(40, 43), False),
        (TOKENS, evaluation(0, 40), evaluation(40, 45), True),
    ],
)
def test_held_out_rows_decide(stage, before, after, diverged):
    found = find_divergence(last_stage(**stage), [before, evaluation(20, 1e9, 1.0, 9.0), after], lines(1.0, 9.0, 9.0))
    assert (found is not None) == diverged
    if found:
        assert found.before.value < found.limit.value < found.after.value


NOISE = 0.3 * np.random.default_rng(0).normal(size=40)


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [
        ([0.3, 0.2, 0.25, 0.2], False),
        ([0.3, 0.25, 0.31, 0.45], False),  # four batches: noise
        ([0.3, 0.5, 3.0, 6e8], True),
        (1 + NOISE, False),
        (1 + NOISE + np.linspace(0, 0.1, 40), False),
        (1 + NOISE + np.linspace(0, 1, 40), True),
        ([3e-5] * 10 + [2e-3] * 30, False),  # an untouched block that wanders
        ([0.3], False),
    ],
)
def test_without_held_out_rows_the_losses_decide(losses, diverged):
    assert (find_divergence(last_stage(), [], lines(*losses)) is not None) == diverged


def test_losses_are_weighted_alike():
    """A ramp of a weight makes a total loss grow, and is not worse."""
    ramp = lines(*[0.3] * 40)
    for line in ramp:
        line["distill/beta_feature"] = 0.1 * line["step"]
        line["distill/total_loss"] = line["distill/beta_feature"] * 0.3
    assert find_divergence(last_stage(), [], ramp) is None


def test_only_the_last_stage_counts_where_losses_decide():
    stages = [{"mode": "blockwise", "steps": 20}, {"mode": "feature", "steps": 20, "loss": {"token_weight": 0.0}}]
    both = lines(*[0.1] * 20, *[0.9] * 20)
    assert find_divergence(last_stage(stages=stages), [], both) is None
    worse = lines(*[0.1] * 20, *np.linspace(0.9, 3, 20))
    assert find_divergence(last_stage(stages=stages), [], worse) is not None


@pytest.mark.parametrize(
    ("cosine", "mlp", "diverged"),
    [(0.05, np.linspace(0.5, 0.1, 40), False), (0.0, np.linspace(0.5, 9, 40), True), (0.05, [0.5] * 40, True)],
)
def test_mlps_count_by_their_loss(cosine, mlp, diverged):
    """No evaluation measures an MLP: attention that wandered from nothing does not undo what the MLPs learned."""
    plain = zip(lines(*[0.0] * 40), mlp, strict=True)
    found = [line | {"distill/gamma_mlp": 1.0, "mlp/block_00": value} for line, value in plain]
    evaluations = [evaluation(0, 40, 0.0), evaluation(40, 40, cosine)]
    assert (find_divergence(last_stage(loss=MLP), evaluations, found) is not None) == diverged


@pytest.mark.parametrize(
    ("name", "weight", "stage"),
    [
        ("block", "distill/delta_block", {"loss": {"feature": {"weight": 0.0}, "block": {"weight": 1.0}}}),
        (
            "stream",
            "distill/epsilon_stream",
            {
                "mode": "feature",
                "loss": {"feature": {"weight": 0.0}, "token_weight": 0.0, "stream": {"weight": 1.0}},
            },
        ),
    ],
)
def test_streams_count_by_their_loss(name, weight, stage):
    """No evaluation measures them."""
    evaluations = [evaluation(0, 40, 0.0), evaluation(40, 40, 0.05)]
    for last, diverged in ((0.1, False), (9.0, True)):
        plain = [{"step": at, "distill/total_loss": value} for at, value in enumerate(np.linspace(0.5, last, 40), 1)]
        found = [line | {weight: 1.0, f"{name}/block_00": line["distill/total_loss"]} for line in plain]
        assert (find_divergence(last_stage(**stage), evaluations, found) is not None) == diverged


def test_the_best_of_what_is_kept():
    blockwise, evaluations = last_stage(), [evaluation(0, 9, 0.1), evaluation(10, 50, 0.2), evaluation(20, 40, 0.3)]
    found = best_checkpoint(blockwise, [10, 20], evaluations, [])
    assert found is not None
    assert (found.step, found.flag) == (10, "--step 10")  # `--best` would be that of the lowest perplexity
    found = best_checkpoint(last_stage(**TOKENS), [10, 20], evaluations, [])
    assert found is not None
    assert (found.step, found.flag) == (20, "--best")
    found = best_checkpoint(blockwise, [1, 3], [], lines(3.0, 2.0, 4.0))
    assert found is not None
    assert (found.step, found.flag) == (1, "--step 1")
    assert best_checkpoint(blockwise, [], evaluations, []) is None


@pytest.fixture(scope="module")
def hot(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A run whose learning rate is far too high, evaluated halfway. Read only."""
    run = tmp_path_factory.mktemp("run") / "hot"
    assert train(config(run, cache, **HOT, eval_every=4)).diverged
    return run


def test_a_run_that_ended_worse_exits_with_3(hot, console):
    assert cli.main(["train", "--config", str(hot / "config.yaml"), "--json"]) == 3
    said = console.readouterr()
    found = json.loads(said.out)
    before, after = read_evaluations(hot)[0], read_evaluations(hot)[-1]
    assert after.mean_cosine > 2 * before.mean_cosine
    assert found["diverged"] is True
    assert found["best_checkpoint"] in (4, 8)
    assert "error: the training ended worse than it began" in said.err
    assert "write the student" not in said.err
    assert f"best checkpoint  step {found['best_checkpoint']}: cosine distance" in said.err
    assert f"distillcache export {hot} <folder> --" in said.err
    kept = json.loads((hot / "summary.json").read_text())
    assert {name: kept[name] for name in found} | {"resumed_from": 8} == found


def test_a_healthy_run_says_so(tmp_path, cache):
    assert train(config(tmp_path / "run", cache)).diverged is None
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["diverged"] is False


def test_a_run_that_goes_on_is_compared_with_its_start(tmp_path, cache, hot, monkeypatch):
    run, values = tmp_path / "run", {**HOT, "eval_every": 4}
    with monkeypatch.context() as patch:
        Stop(patch, after=5)
        with pytest.raises(Interrupted):
            train(config(run, cache, **values))
    assert not (run / "summary.json").exists()
    found = train(config(run, cache, **values)).diverged
    assert found is not None
    said = str(found).replace(str(run), str(hot))
    assert said == json.loads((hot / "summary.json").read_text())["error"]


def test_without_held_out_rows(tmp_path, sparse_cache):
    """The first step's line is there however seldom lines are logged."""
    found = train(config(tmp_path / "run", sparse_cache, **HOT, log_every=100))
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 8]
    assert found.diverged is not None
    assert "training rows" in str(found.diverged)
    assert "best checkpoint  step" in str(found.diverged)


def test_a_loss_that_is_not_finite_exits_with_3(tmp_path, cache, monkeypatch, console):
    losses = loop.StageRun.losses

    def broken(run, sums):
        found = losses(run, sums)
        return found if int(run.state.step) < 6 else {**found, "feature": found["feature"] * math.inf}

    monkeypatch.setattr(loop.StageRun, "losses", broken)
    run = tmp_path / "run"
    (tmp_path / "run.yaml").write_text(json.dumps(config(run, cache).model_dump(mode="json")))
    assert cli.main(["train", "--config", str(tmp_path / "run.yaml"), "--json"]) == 3
    said = console.readouterr()
    assert "error: the training has diverged: the loss of a block is not finite" in said.err
    assert f"distillcache export {run} <folder> --step 3" in said.err
    for found in (json.loads(said.out), json.loads((run / "summary.json").read_text())):
        assert (found["diverged"], found["best_checkpoint"]) == (True, 3)
    monkeypatch.undo()
    assert train(config(run, cache)).resumed_from == 3
    assert json.loads((run / "summary.json").read_text())["diverged"] is False


@pytest.mark.parametrize(("broken", "error"), [(0, NonFiniteError), (8, DivergedError)])
def test_held_out_figures_that_are_not_finite(tmp_path, cache, monkeypatch, broken, error):
    whole, steps = evaluate.held_out, iter((0, 8))

    def nan(*arguments, **named):
        found = whole(*arguments, **named)
        return found if next(steps) != broken else found._replace(perplexity=math.nan)

    monkeypatch.setattr(evaluate, "held_out", nan)
    with pytest.raises(NonFiniteError) as caught:
        train(config(tmp_path / "run", cache))
    assert type(caught.value) is error
    assert caught.value.exit_code == (3 if broken else 2)
    assert [entry.step for entry in read_evaluations(tmp_path / "run")] == ([0] if broken else [])


def test_processes_end_with_the_code_of_the_one_that_diverged():
    said = str(DivergedError("the training has diverged", {"step": 3}, "lower the rate"))
    assert _peer_error(f"0|here|3|{said}").exit_code == 3
    assert _peer_error("0|here|2|error: no|pe").exit_code == 2
    assert "the training has diverged" in str(_peer_error(f"0|here|3|{said}"))


def test_help_lists_the_exit_codes(console):
    assert cli.main(["--help"]) == 0
    assert "    3  train, demo: the training diverged" in console.readouterr().out


def test_steps_without_targets_are_not_compared_with_others() -> None:
    """Their loss lacks the token losses: taken for a loss of 0, they would make the end look better than the start."""
    whole = {"distill/total_loss": 2.0, "distill/hard_loss": 2.0, "distill/alpha": 0.0, "distill/token_weight": 1.0}
    bare = {"distill/total_loss": 0.5, "feature/mean": 0.5, "distill/beta_feature": 1.0}
    mixed = [{"step": step, **(whole if step % 2 else bare)} for step in range(1, 7)]
    assert stage_losses(last_stage(**TOKENS), mixed) == [2.0] * 3
