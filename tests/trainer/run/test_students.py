"""Students that are not the teacher, cut: another width, another depth, few trained parameters; end to end."""

import fcntl
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from distillcache.cache_builder.build import build_cache
from distillcache.models.checkpoint import load_pretrained, save_pretrained
from distillcache.models.config import BlockKind, LayerGroup
from distillcache.models.decoder import Decoder
from distillcache.schemas.config.teacher import TapsConfig
from distillcache.schemas.config.train import StudentConfig, TrainConfig
from distillcache.schemas.errors import CheckpointError, ConfigError, InputError, Interrupted, StorageError
from distillcache.tools.commands import export
from distillcache.trainer.run.checkpoints import load_student
from distillcache.trainer.run.folder import read_evaluations
from distillcache.trainer.run.metrics_log import read_metrics
from distillcache.trainer.step.parameters import all_parameters
from distillcache.trainer.train import train
from tests.conftest import TINY, build_config
from tests.trainer.test_train import Stop, assert_same_run, config

NARROW = replace(TINY, hidden_size=16, num_heads=4, layers=(LayerGroup((BlockKind(),), 2),))
STAGES = [{"mode": "blockwise", "steps": 3}, {"mode": "feature", "steps": 2}]


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> StudentConfig:
    """Two blocks of width 16 for the teacher's three of width 24: blocks 0 and 1, and block 2."""
    folder = tmp_path_factory.mktemp("narrow") / "student"
    save_pretrained(Decoder(NARROW, rngs=nnx.Rngs(4)), folder)
    return StudentConfig(init=str(folder), projector="linear", layer_map=[0, 2])


@pytest.mark.slow  # two runs, each with programs of its own
def test_a_narrow_shallow_student(tmp_path, cache, narrow, monkeypatch):
    """Both stages, stopped in the second and gone on; projectors are trained, kept and left out of the export."""
    values = {"student": narrow, "stages": STAGES, "loss": {"mlp": {"weight": 0.5}}, "checkpoint_every": 1}
    result = train(config(tmp_path / "whole", cache, **values))
    assert result.steps == 5
    evaluations = read_evaluations(tmp_path / "whole")
    assert [entry.step for entry in evaluations] == [0, 3, 5]
    assert evaluations[0].blocks == ()  # in feature mode the maps of the teacher's stream stay untrained
    with monkeypatch.context() as patch:
        Stop(patch, after=4)
        with pytest.raises(Interrupted):
            train(config(tmp_path / "cut", cache, **values))
    assert train(config(tmp_path / "cut", cache, **values)).resumed_from == 4
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    export.run([str(tmp_path / "whole"), str(tmp_path / "out")], "export", False)
    exported, trained = load_pretrained(tmp_path / "out"), load_student(str(tmp_path / "whole")).decoder
    assert exported.config.hidden_size == 16
    for name, value in all_parameters(exported).items():
        np.testing.assert_array_equal(value, all_parameters(trained)[name])
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projector": "none"}, "disagree on the hidden size"),
        ({"layer_map": None}, "disagree on the number of blocks"),
        ({"layer_map": [0, 3]}, "layer_map does not fit"),
        ({"layer_map": [2, 0]}, "layer_map does not fit"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(tmp_path, cache, narrow, change, message):
    with pytest.raises(ConfigError, match=message):
        train(config(tmp_path / "run", cache, student=narrow.model_copy(update=change)))
    assert not (tmp_path / "run").exists()


def test_only_what_is_named_is_trained(tmp_path, all_rows):
    train(config(tmp_path / "run", all_rows, train_only=["attention/o", "groups/0/blocks/0/attention/q"], steps=2))
    student = load_student(str(tmp_path / "run")).decoder
    start = all_parameters(load_pretrained(tmp_path / "run" / "student", dtype="float32"))
    moved = {name for name, value in all_parameters(student).items() if not np.array_equal(value, start[name])}
    assert moved == {"groups/0/blocks/0/attention/o", "groups/0/blocks/0/attention/q"}


@pytest.mark.parametrize(
    ("names", "message"),
    [(["attn"], "names no parameter"), (["embed"], "no loss reaches")],
    ids=["unknown", "unreached"],
)
def test_names_that_train_nothing_are_refused(tmp_path: Path, cache: Path, names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(config(tmp_path / "run", cache, stages=[*STAGES, {**STAGES[0], "train_only": names}]))
    assert not (tmp_path / "run").exists()


def test_a_trace_is_written_where_it_is_asked_for(tmp_path, all_rows):
    train(config(tmp_path / "run", all_rows, profile="steps=2:3", steps=3))
    assert list((tmp_path / "run" / "traces").rglob("*.xplane.pb"))
    assert len(read_metrics(tmp_path / "run")) == 3


@pytest.fixture(scope="module")
def without_stream(tmp_path_factory: pytest.TempPathFactory, teacher: Path, corpus: Path) -> Path:
    """A cache of attention outputs alone: half the size."""
    folder = tmp_path_factory.mktemp("cache") / "no-stream"
    build_cache(build_config(folder, teacher, corpus, taps=TapsConfig(resid=None)))
    return folder


def test_a_cache_without_the_stream(tmp_path, without_stream):
    train(config(tmp_path / "run", without_stream, steps=6))
    losses = [line["feature/mean"] for line in read_metrics(tmp_path / "run") if line["step"]]
    assert losses[-1] < losses[0]
    for change in ({"inject": "attn_in"}, {"mesh": {"block": 2}}, {"loss": {"mlp": {"weight": 1.0}}}):
        with pytest.raises(ConfigError, match="lacks the stream that enters the blocks"):
            train(config(tmp_path / "other", without_stream, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mesh": {"expert": 2}}, "no experts"),
        ({"profile": "steps=3:2"}, "cannot be profiled"),
        ({"student": {"projector": "linear"}}, "of another width"),
        ({"loss": {"feature": {"blocks": [0, 0]}}}, "named twice"),
        ({"loss": {"feature": {"blocks": [5]}}}, "no such blocks"),
        ({"loss": {"feature": {"block_weights": [1.0]}}}, "block_weights does not fit"),
        ({"mode": "feature", "loss": {"alpha": 0.5, "kl": {"targets": "topk"}}}, "lacks"),
        ({"inject": "attn_in", "train_only": ["attention/norm"]}, "no loss reaches"),
        ({"mode": "feature", "loss": {"token_weight": 0.0, "feature": {"weight": 0.0}}}, "no loss has a weight"),
        ({"mode": "feature", "loss": {"token_weight": 0.0}, "train_only": ["head"]}, "no loss reaches"),
        ({"mode": "feature", "loss": {"mlp": {"weight": 0.5}}}, "loss.mlp.weight would do nothing"),
        ({"mode": "feature", "inject": "attn_in"}, "inject would do nothing"),
        ({"stages": STAGES, "mlp_input": "student"}, "mlp_input would do nothing"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_the_run_begins(tmp_path, cache, change, message):
    with pytest.raises((ConfigError, InputError), match=message):
        train(config(tmp_path / "run", cache, **change))
    assert not (tmp_path / "run").exists()


def test_one_process_at_a_time(tmp_path, all_rows):
    run = tmp_path / "run"
    train(config(run, all_rows, steps=1))
    with (run / "lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process"):
            train(config(run, all_rows, steps=1))


def test_a_damaged_checkpoint_is_named(tmp_path, all_rows):
    run = tmp_path / "run"
    train(config(run, all_rows, steps=1))
    (path,) = (run / "checkpoints" / "00000001").glob("*.safetensors")
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        load_student(str(run))
    assert caught.value.facts["object"] == str(path)


def test_an_export_that_cannot_be_written_is_said(tmp_path, all_rows):
    train(config(tmp_path / "run", all_rows, steps=1))
    (tmp_path / "file").touch()
    with pytest.raises((StorageError, CheckpointError)):
        export.run([str(tmp_path / "run"), str(tmp_path / "file" / "out")], "export", False)


@pytest.mark.parametrize("only", ["head", "embed"])
def test_a_run_may_train_nothing_of_any_block(only: str, all_rows: Path, tmp_path: Path) -> None:
    """The optimizer's state of the blocks is empty then, which ended in a traceback of JAX's; and a resume finds it."""
    values = {
        "run": str(tmp_path / "run"),
        "cache": str(all_rows),
        "mode": "feature",
        "student": {"surgery": [{"op": "query_heads", "to": 2, "by": "index"}]},
        "train_only": [only],
        "steps": 2,
        "batch_rows": 4,
        "checkpoint_every": 1,
        "eval_teacher": False,
    }
    train(TrainConfig.model_validate(values))
    weights = {step: load_student(values["run"], step).decoder for step in (1, 2)}
    shutil.rmtree(tmp_path / "run/checkpoints/00000002")
    (tmp_path / "run/summary.json").unlink()
    train(TrainConfig.model_validate(values))
    weights["again"] = load_student(values["run"], 2).decoder
    found = {step: nnx.to_flat_state(nnx.state(each, nnx.Param)) for step, each in weights.items()}
    changed = {
        "/".join(map(str, path))
        for (path, before), (_, after) in zip(found[1], found[2], strict=True)
        if not np.array_equal(before.get_value(), after.get_value())
    }
    assert changed == {only}
    for (_, first), (_, second) in zip(found[2], found["again"], strict=True):
        np.testing.assert_array_equal(first.get_value(), second.get_value())
