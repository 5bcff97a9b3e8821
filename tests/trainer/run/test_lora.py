"""Runs of students with adapters: what they keep, how they go on, what they export, on meshes and with experts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from distillcache.models.adapters import is_adapter
from distillcache.models.checkpoint import load_pretrained
from distillcache.schemas.config import TrainConfig
from distillcache.schemas.config.student import LoraConfig
from distillcache.schemas.errors import ConfigError, PlanMismatchError
from distillcache.schemas.format.checkpoint import SavedArrays
from distillcache.schemas.store.store import Store
from distillcache.tools import cli
from distillcache.trainer import loop
from distillcache.trainer.feed.open import Sources
from distillcache.trainer.run.checkpoints import load_student
from distillcache.trainer.run.folder import read_evaluations
from distillcache.trainer.run.held_out import held_out
from distillcache.trainer.run.metrics_log import read_metrics
from distillcache.trainer.step.adapters import make_adapters
from distillcache.trainer.step.parameters import ROUTER_BIAS, all_parameters
from distillcache.trainer.train import train
from tests.models.files.test_adapter import changes
from tests.trainer.run.test_balance_runs import moe_rows, moe_teacher
from tests.trainer.test_train import _failing_at, assert_same_run, config, timeless

__all__ = ["moe_rows", "moe_teacher"]  # fixtures

CUT = [{"op": "query_heads", "to": 2, "by": "index"}]
STAGES = [
    {"mode": "blockwise", "steps": 4},
    {"mode": "feature", "steps": 4, "loss": {"alpha": 0.0, "feature": {"weight": 0.5}}},
]


def lora_config(run: Path, cache: Path, **changes: Any) -> TrainConfig:
    lora = {"rank": 2, "alpha": 6, "targets": ["attention/q", "attention/o", "mlp/down"]}
    values = {"student": {"surgery": CUT, "lora": lora}, "stages": STAGES, "micro_batches": 2}
    return config(run, cache, **{**values, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A run of two stages that was never interrupted; the first does not reach the MLPs. Read only."""
    run = tmp_path_factory.mktemp("run") / "lora"
    train(lora_config(run, cache))
    return run


def test_it_learns(whole: Path) -> None:
    """Blocks in the first stage, predictions in the second."""
    first, middle, last = read_evaluations(whole)
    lines = [line for line in read_metrics(whole) if "distill/total_loss" in line]
    assert lines[3]["feature/mean"] < 0.97 * lines[0]["feature/mean"]
    start, then, end = (float(entry.perplexity or 0) for entry in (first, middle, last))
    assert end < 0.95 * min(start, then)


def test_a_checkpoint_holds_adapters_alone(whole: Path) -> None:
    """Parameters, both moments, and counts; none as large as a matrix."""
    blockwise, feature = (SavedArrays(Store(str(whole)), f"checkpoints/{step:08d}") for step in (6, 8))
    at = "groups/0/blocks/0/lora"
    trained = [f"{at}/{name}/{side}" for name in ("attention/o", "attention/q", "mlp/down") for side in "ab"]
    assert feature.names("parameters") == sorted(trained)
    assert blockwise.names("adapters") == ["alpha"]
    moments = [name for name in feature.names("optimizer") if name.split("/")[-1] in "ab"]
    assert {name[name.index("lora/") :] for name in moments} == {name[name.index("lora/") :] for name in trained}
    assert len(moments) == 2 * len(trained)
    sizes = {name: np.prod(feature.info("optimizer", name).shape) for name in feature.names("optimizer")}
    rest = [size for name, size in sizes.items() if name not in moments]
    assert max(rest) <= 3  # a count for each block
    files = sum(path.stat().st_size for path in (whole / "checkpoints" / "00000008").glob("*.safetensors"))
    numbers = sum(np.prod(feature.info("parameters", name).shape) for name in trained)
    assert files < 4 * (3 * numbers + sum(rest)) + 4096
    assert files < (whole / "student" / "model.safetensors").stat().st_size / 3


def test_it_goes_on_to_the_same_bits(whole: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (3, 7):  # in either stage, before its first checkpoint or after
        with monkeypatch.context() as patch:
            patch.setattr(loop.RunLoop, "_settle", _failing_at(step))
            with pytest.raises(RuntimeError, match=f"at step {step}"):
                train(lora_config(tmp_path / "run", cache, checkpoint_every=2))
    assert train(lora_config(tmp_path / "run", cache, checkpoint_every=2)).resumed_from == 6
    assert_same_run(tmp_path / "run", whole)


def test_the_export_is_what_was_trained(whole: Path, cache: Path, tmp_path: Path) -> None:
    """Merged weights predict what the evaluation said; everything without an adapter is as it was."""
    student, base = load_student(str(whole)).decoder, load_pretrained(whole / "student")
    sources = Sources(lora_config(whole, cache))
    now, before = (held_out(decoder, sources.held_out, 3).perplexity for decoder in (student, base))
    first, *_, last = read_evaluations(whole)
    assert now == pytest.approx(last.perplexity, rel=1e-5)
    assert before == pytest.approx(first.perplexity, rel=1e-5)
    old = all_parameters(base)
    changed = {name for name, value in all_parameters(student).items() if not np.array_equal(value, old[name])}
    assert {name.split("blocks/0/")[1] for name in changed} == {"attention/q", "attention/o", "mlp/down"}


def test_export_writes_either_form(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--adapter`: base and adapter are the merged export, tensor by tensor."""
    merged, adapter = tmp_path / "merged", tmp_path / "adapter"
    assert cli.main(["export", str(whole), str(merged)]) == 0
    assert cli.main(["export", str(whole), str(adapter), "--adapter", "--step", "8"]) == 0
    assert f"as adapters of the model in {adapter}/base" in capsys.readouterr().err
    added = changes(adapter)
    assert len(added) == 9
    after = load_file(merged / "model.safetensors")
    for name, value in load_file(adapter / "base" / "model.safetensors").items():
        np.testing.assert_allclose(after[name], value + added.get(name, 0.0), atol=1e-6)
    assert (adapter / "base" / "tokenizer.json").exists()


def test_a_run_without_adapters_has_none_to_export(
    all_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config(tmp_path / "run", all_rows, steps=1))
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--adapter"]) == 2
    assert "the run trained no adapters" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    words = ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--adapter", "--format", "maxtext"]
    assert cli.main(words) == 2
    assert "adapter is for peft" in capsys.readouterr().err


def test_the_next_run_may_begin_with_it(whole: Path, all_rows: Path, tmp_path: Path) -> None:
    """A run as `student.init`: its merged weights are the next one's own."""
    train(config(tmp_path / "run", all_rows, student={"init": str(whole)}, steps=1))
    own = all_parameters(load_pretrained(tmp_path / "run" / "student"))
    for name, value in all_parameters(load_student(str(whole)).decoder).items():
        np.testing.assert_array_equal(value, own[name])


@pytest.mark.parametrize(
    "changes",
    [{"mesh": {"block": 2, "data": 2}}, {"mode": "feature", "mesh": {"data": 2, "fsdp": 2, "tensor": 2}}],
    ids=str,
)
def test_a_mesh_trains_the_same(changes: dict[str, Any], all_rows: Path, tmp_path: Path) -> None:
    """Three blocks over two groups of devices, so that one is padding; and every axis of feature mode."""
    options: dict[str, Any] = {"stages": None, "steps": 3, "micro_batches": 1, "loss": {"mlp": {"weight": 0.5}}}
    if "mode" in changes:
        del options["loss"]
    train(lora_config(tmp_path / "one", all_rows, **options, **{**changes, "mesh": {}}))
    train(lora_config(tmp_path / "mesh", all_rows, **options, **changes))
    for left, right in zip(timeless(tmp_path / "mesh"), timeless(tmp_path / "one"), strict=True):
        assert left == pytest.approx(right, rel=2e-5, abs=1e-6)
    pair = [all_parameters(load_student(str(tmp_path / name)).decoder) for name in ("mesh", "one")]
    for name, value in pair[0].items():
        np.testing.assert_allclose(value, pair[1][name], atol=2e-5)


def test_experts_are_balanced_beside_adapters(
    moe_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Biases of routers follow the load while adapters train; an adapter folder cannot hold them and says so."""
    lora = {"targets": ["attention", "groups/0"]}
    options = {"student": {"lora": lora}, "stages": None, "mode": "feature", "steps": 2, "compute_dtype": "bfloat16"}
    train(lora_config(tmp_path / "run", moe_rows, **options, moe_balance_type="noaux_tc"))
    names = SavedArrays(Store(str(tmp_path / "run")), "checkpoints/00000002").names("parameters")
    assert {name for name in names if not is_adapter(name)} == {f"groups/1/blocks/0/{ROUTER_BIAS}"}
    assert "groups/0/blocks/0/lora/mlp/up/a" in names
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--adapter"]) == 2
    error = capsys.readouterr().err
    assert "changed more than its adapters" in error
    assert ROUTER_BIAS in error


@pytest.mark.parametrize(
    ("lora", "train_only", "what"),
    [
        ({"rank": 100}, None, "student.lora.rank is larger than a matrix"),
        ({"targets": ["attention/w"]}, None, "names no matrix that can have an adapter"),
        ({}, ["attention/norm"], "train_only names no parameter of the student that is trained"),
        ({"targets": ["mlp"]}, None, "no loss of this stage reaches an adapter"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    lora: dict[str, Any], train_only: list[str] | None, what: str, cache: Path, tmp_path: Path
) -> None:
    """Before anything is written: nothing is left of the run."""
    student = {"surgery": CUT, "lora": lora}
    with pytest.raises(ConfigError, match=what):
        train(config(tmp_path / "run", cache, student=student, train_only=train_only))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lora", [{"rank": 0}, {"alpha": 0}, {"targets": []}, {"targets": "attention"}, {"r": 8}])
def test_settings_that_are_none(lora: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"student\.lora"):
        config(tmp_path / "run", cache, student={"lora": lora})


def test_another_adapter_is_another_run(whole: Path, cache: Path) -> None:
    student = {"surgery": CUT, "lora": {"rank": 2, "alpha": 7, "targets": ["attention/q", "attention/o", "mlp/down"]}}
    with pytest.raises(PlanMismatchError, match=r"student\.lora\.alpha"):
        train(lora_config(whole, cache, student=student))


def test_runs_of_before_know_nothing_of_adapters(cache: Path, tmp_path: Path) -> None:
    """A config without adapters is spelled as it was."""
    spelled = json.loads(config(tmp_path / "run", cache).model_dump_json())
    assert "lora" not in spelled["student"]


def test_what_no_gradient_reaches_keeps_its_bits(all_rows: Path, tmp_path: Path) -> None:
    """Without losses on tokens nothing lies behind the last block's MLP: weight decay leaves its adapter alone, too."""
    loss = {"token_weight": 0.0, "feature": {"weight": 1.0}}
    options = {"stages": None, "mode": "feature", "steps": 2, "micro_batches": 1, "loss": loss}
    train(lora_config(tmp_path / "run", all_rows, **options))
    name = "groups/0/blocks/0/lora/mlp/down/a"
    saved = SavedArrays(Store(str(tmp_path / "run")), "checkpoints/00000002").whole("parameters", name)
    shapes = {n: v.shape for n, v in all_parameters(load_pretrained(tmp_path / "run" / "student")).items()}
    first = np.asarray(
        make_adapters(lora_config(tmp_path, all_rows).student.lora or LoraConfig(), shapes, seed=0)[name]
    )
    same = [np.array_equal(now, then) for now, then in zip(saved, first, strict=True)]
    assert same == [False, False, True]


def test_train_only_chooses_among_adapters(all_rows: Path, tmp_path: Path) -> None:
    options = {"stages": None, "steps": 1, "micro_batches": 1, "train_only": ["attention/q"]}
    train(lora_config(tmp_path / "run", all_rows, **options))
    names = SavedArrays(Store(str(tmp_path / "run")), "checkpoints/00000001").names("parameters")
    assert names == [f"groups/0/blocks/0/lora/attention/q/{side}" for side in "ab"]
