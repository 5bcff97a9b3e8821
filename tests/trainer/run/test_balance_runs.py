"""Runs of students with experts: what they log, keep and export, how they go on, and what they do on meshes."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from distillcache.cache_builder.build import build_cache
from distillcache.models.checkpoint import load_pretrained
from distillcache.models.config import BlockKind, MoeConfig, plan_layers
from distillcache.models.files.tensors import ROUTER_BIAS_FILE
from distillcache.schemas.config import TrainConfig
from distillcache.schemas.config.train import MeshConfig, StudentConfig
from distillcache.schemas.errors import ConfigError
from distillcache.schemas.store.store import Store
from distillcache.tools import cli
from distillcache.trainer import loop
from distillcache.trainer.feed.open import Sources
from distillcache.trainer.mesh.placement import to_host
from distillcache.trainer.run.checkpoints import Checkpoints, load_student, restored_balance
from distillcache.trainer.run.metrics_log import PIXELS, read_loads, read_metrics
from distillcache.trainer.run.stage import StageRun, plan_stage
from distillcache.trainer.run.stages import resolve_stages
from distillcache.trainer.step.parameters import ROUTER_BIAS, all_parameters, install
from distillcache.trainer.train import train
from tests.conftest import TINY, build_config, save_teacher
from tests.trainer.conftest import cache_of_all_rows
from tests.trainer.mesh.test_mesh import replica_groups
from tests.trainer.run.events import logged_images
from tests.trainer.test_train import TIMED, _failing_at, config, timeless

DENSE, SPARSE = BlockKind(), BlockKind(moe=True)
E = 4
MOE = MoeConfig(num_experts=E, top_k=2, expert_size=12)
QWEN = replace(TINY, family="qwen3_moe", qk_norm="head", layers=plan_layers([DENSE, SPARSE, SPARSE]), moe=MOE)
MIXTRAL = replace(TINY, family="mixtral", layers=plan_layers([SPARSE] * 3), moe=replace(MOE, jitter=0.05))
GLM_MOE = replace(MOE, scores="sigmoid", bias=True, native_bias=True, float32_router=True, scaling=1.5)
GLM = replace(TINY, family="glm4_moe", layers=QWEN.layers, moe=GLM_MOE)
UNIT = "groups/1/blocks/0/"  # of the blocks with experts, 1 and 2
MIXTRAL_BIAS = "groups/0/blocks/0/" + ROUTER_BIAS
MLP = {"mlp": {"weight": 1.0}}
AUXILIARY = {"loss": {**MLP, "load_balance": {"weight": 0.1}, "router_z": 0.01}}
NOAUX = {"loss": MLP, "moe_balance_type": "noaux_tc", "moe_update_rate": 0.5}
CUT = {"surgery": [{"op": "query_heads", "to": 2, "by": "index"}]}
SHORT: dict[str, Any] = {"student": {}, "steps": 5, "checkpoint_every": 2}


@pytest.fixture(scope="session")
def moe_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "qwen", QWEN)


@pytest.fixture(scope="session")
def moe_cache(tmp_path_factory: pytest.TempPathFactory, moe_teacher: Path, corpus: Path) -> Path:
    """Of the tiny teacher with experts, with held-out rows."""
    folder = tmp_path_factory.mktemp("cache") / "moe"
    build_cache(build_config(folder, moe_teacher, corpus))
    return folder


@pytest.fixture(scope="session")
def moe_rows(tmp_path_factory: pytest.TempPathFactory, moe_teacher: Path, corpus: Path) -> Path:
    """The same without held-out rows: runs that are not evaluated take half of the time."""
    return cache_of_all_rows(tmp_path_factory, moe_teacher, corpus)


def moe_config(run: Path, cache: Path, **changes: Any) -> TrainConfig:
    return config(run, cache, **{**SHORT, **changes})


@pytest.fixture(scope="module")
def noaux(tmp_path_factory: pytest.TempPathFactory, moe_cache: Path) -> Path:
    """A run with biases that was never interrupted. Read only."""
    run = tmp_path_factory.mktemp("run") / "noaux"
    train(moe_config(run, moe_cache, **NOAUX))
    return run


# What a run logs.

OF_LOOP = {"step", "learning/current_learning_rate", *TIMED}
OF_STEP = {
    "distill/total_loss",
    "distill/out_proj_feature_loss",
    "distill/beta_feature",
    "distill/mlp_loss",
    "distill/gamma_mlp",
    "feature/mean",
    *(f"{term}/block_{block:02d}" for term in ("feature", "mlp") for block in range(3)),
    "router/load_balance",
    *(f"router/{name}{block}" for name in ("max_violation", "entropy") for block in ("", "_block_01", "_block_02")),
}


@pytest.mark.slow
def test_the_names_of_a_run_with_biases(noaux):
    start, *lines, last = read_metrics(noaux)
    names = OF_LOOP | OF_STEP | {f"router/bias_norm{block}" for block in ("", "_block_01", "_block_02")}
    assert all(set(line) == names for line in lines)
    assert names <= set(last)
    evaluated = {name for name in last if name.startswith("eval/router")}
    assert evaluated == {name for name in start if name.startswith("eval/router")} == {"eval/router_max_violation"}
    norms = [line["router/bias_norm"] for line in (*lines, last)]
    assert norms[0] > 0
    biases = all_parameters(load_student(str(noaux)).decoder)[UNIT + ROUTER_BIAS]
    assert norms[-1] == pytest.approx(np.linalg.norm(biases, axis=-1).mean(), rel=1e-5)


@pytest.mark.slow
def test_a_loss_of_whole_blocks_trains_experts_and_moves_their_biases(tmp_path, moe_rows):
    loss = {"feature": {"weight": 0.0}, "block": {"weight": 1.0}}
    train(moe_config(tmp_path / "run", moe_rows, **{**NOAUX, "loss": loss, "student": CUT, "steps": 2}))
    start = all_parameters(load_pretrained(tmp_path / "run" / "student"))
    end = all_parameters(load_student(str(tmp_path / "run")).decoder)
    moved = {name.split("/", 4)[-1] for name in start if not np.array_equal(start[name], end[name])}
    assert moved >= {"attention/q", "mlp/router", "mlp/up", "mlp/down", "mlp/norm", ROUTER_BIAS}
    assert {"distill/block_loss", "router/bias_norm"} <= set(read_metrics(tmp_path / "run")[-1])


@pytest.mark.slow
def test_shares_of_every_expert_are_logged(noaux):
    """At the first step, at checkpoints and at the end; as lines and as images, a block a row of pixels."""
    lines = read_loads(noaux)
    assert [line["step"] for line in lines] == [1, 2, 4, 5]
    images = {step: image for _, step, image in logged_images(noaux / "tensorboard")}
    assert list(images) == [1, 2, 4, 5]
    metrics = read_metrics(noaux)
    for line in lines:
        assert line["blocks"] == [1, 2]
        shares = np.asarray(line["share"])
        np.testing.assert_allclose(shares.sum(1), 1.0, atol=1e-5)
        found = metrics[line["step"]]
        violation = [found[f"router/max_violation_block_{block:02d}"] for block in line["blocks"]]
        np.testing.assert_allclose(E * shares.max(1) - 1, violation, atol=1e-4)
        image = images[line["step"]]
        assert image.shape[:2] == (2 * PIXELS, E * PIXELS)
        grey = image[PIXELS // 2 :: PIXELS, PIXELS // 2 :: PIXELS]
        grey = grey[..., 0] if grey.ndim == 3 else grey
        np.testing.assert_allclose(grey, np.clip(shares * E / 2, 0, 1), atol=1 / 250)


# How it goes on.


def kept(run: Path, step: int) -> dict[str, np.ndarray]:
    """All of a checkpoint that a run goes on from but the optimizer's state."""
    checkpoints = Checkpoints(Store(str(run)))
    found: dict[str, Any] = dict(checkpoints.restore_parameters(step))
    for unit, state in restored_balance(checkpoints.open(step)).items():
        found |= {f"{unit}{name}": value for name, value in state._asdict().items()}
    return {name: np.asarray(value) for name, value in found.items()}


@pytest.mark.slow
def test_a_run_with_biases_goes_on_to_the_same_bits(tmp_path, moe_cache, noaux, monkeypatch):
    """Killed between two checkpoints; biases and smoothed loads are the ones of a run that was not."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop.RunLoop, "_settle", _failing_at(4))
        with pytest.raises(RuntimeError, match="at step 4"):
            train(moe_config(run, moe_cache, **NOAUX))
    assert train(moe_config(run, moe_cache, **NOAUX)).resumed_from == 2
    assert timeless(run) == timeless(noaux)
    assert read_loads(run) == read_loads(noaux)
    found, expected = kept(run, 5), kept(noaux, 5)
    assert found.keys() == expected.keys()
    assert {UNIT + ROUTER_BIAS, UNIT + "bias", UNIT + "smoothed"} <= found.keys()
    assert all(expected[UNIT + at].any() for at in ("bias", "smoothed"))
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)
    np.testing.assert_array_equal(found[UNIT + ROUTER_BIAS], found[UNIT + "bias"][:, 0])


@pytest.mark.slow
def test_it_goes_on_with_another_number_of_biases(tmp_path, moe_rows, monkeypatch):
    """Two groups of devices with a bias each, on two groups of blocks; then one device, which has their mean."""
    settings = moe_config(
        tmp_path / "run", moe_rows, **NOAUX, moe_bias_sync_group="ep", mesh={"block": 2, "data": 2}, steps=3
    )
    with monkeypatch.context() as patch:
        patch.setattr(loop.RunLoop, "_settle", _failing_at(3))
        with pytest.raises(RuntimeError, match="at step 3"):
            train(settings)
    before = kept(tmp_path / "run", 2)
    bias, smoothed = before[UNIT + "bias"], before[UNIT + "smoothed"]
    assert bias.shape == smoothed.shape == (2, 2, E)
    assert np.abs(bias[:, 0] - bias[:, 1]).max() > 0.01
    np.testing.assert_allclose(before[UNIT + ROUTER_BIAS], bias.mean(1), rtol=1e-6)
    restored, begin = [], StageRun.__init__

    def noted(run: StageRun, *given: Any) -> None:
        begin(run, *given)
        restored.append(jax.tree.map(np.array, run.state.balance[UNIT]))

    monkeypatch.setattr(StageRun, "__init__", noted)
    assert train(settings.model_copy(update={"mesh": MeshConfig()})).resumed_from == 2
    np.testing.assert_allclose(restored[0].bias, bias.mean(1, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(restored[0].smoothed, smoothed.mean(1, keepdims=True), rtol=1e-6)
    assert kept(tmp_path / "run", 3)[UNIT + "bias"].shape == (2, 1, E)
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3]


# What is exported.


@partial(jax.jit, static_argnums=0)
def logits(graph: Any, state: Any, tokens: jax.Array) -> jax.Array:
    return nnx.merge(graph, state)(tokens).logits


@pytest.mark.slow
def test_biases_of_mixtral_go_into_a_file_of_their_own(tmp_path, moe_rows, console):
    start = save_teacher(tmp_path / "mixtral", MIXTRAL)
    student = StudentConfig(init=str(start))
    run, out = tmp_path / "run", tmp_path / "out"
    train(moe_config(run, moe_rows, **NOAUX, student=student, steps=2))
    assert cli.main(["export", str(run), str(out)]) == 0
    assert ROUTER_BIAS_FILE in console.readouterr().err
    beside, trained = load_file(out / ROUTER_BIAS_FILE), load_student(str(run)).decoder
    biases = np.asarray(all_parameters(trained)[MIXTRAL_BIAS])
    assert biases.any(axis=1).all()
    assert len(beside) == 3
    np.testing.assert_array_equal(np.stack([beside[name] for name in sorted(beside)]), biases)
    assert not any("bias" in name for name in load_file(out / "model.safetensors"))
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 12))
    exported, expected = load_pretrained(out), logits(*nnx.split(trained), tokens)
    assert exported.config == trained.config
    np.testing.assert_array_equal(logits(*nnx.split(exported), tokens), expected)
    install(exported, {MIXTRAL_BIAS: jnp.zeros_like(biases)})
    assert np.abs(logits(*nnx.split(exported), tokens) - expected).max() > 1e-3


NATIVE = "model.layers.{}.mlp.gate.e_score_correction_bias"


@pytest.mark.slow
@pytest.mark.parametrize("moves", [True, False], ids=["noaux", "unset"])
def test_biases_of_glm_stay_where_they_are(tmp_path, moe_rows, moves):
    """In the family's own place, moved; or as they were, to the bit."""
    start = save_teacher(tmp_path / "glm", GLM)
    weights = load_file(start / "model.safetensors")
    rng = np.random.default_rng(0)
    for block in (1, 2):
        weights[NATIVE.format(block)] = rng.normal(scale=0.1, size=E).astype(np.float32)
    save_file(weights, start / "model.safetensors", metadata={"format": "pt"})
    run, out = tmp_path / "run", tmp_path / "out"
    settings = NOAUX if moves else {"loss": {**MLP, "load_balance": {"weight": 0.1}}}
    train(moe_config(run, moe_rows, **settings, student=StudentConfig(init=str(start)), steps=2))
    assert cli.main(["export", str(run), str(out)]) == 0
    assert not (out / ROUTER_BIAS_FILE).exists()
    exported = load_file(out / "model.safetensors")
    assert exported.keys() == weights.keys()
    for block in (1, 2):
        name = NATIVE.format(block)
        assert exported[name].dtype == np.float32
        assert np.array_equal(exported[name], weights[name]) is not moves
    router = "model.layers.1.mlp.gate.weight"
    assert not np.array_equal(exported[router], weights[router])


# Meshes of simulated devices.


def stage_run(folder: Path, cache: Path, **changes: Any) -> StageRun:
    """The first stage of a run, ready to step; the student is the teacher with noise, so that no loss is near zero."""
    settings = moe_config(folder, cache, **changes)
    sources = Sources(settings)
    decoder = load_pretrained(sources.rows.plan.teacher.path, dtype="float32")
    (stage,) = resolve_stages(settings, settings.mesh)
    rng = np.random.default_rng(0)
    parameters = {
        name: value + rng.normal(scale=0.05, size=value.shape).astype(np.float32)
        for name, value in all_parameters(decoder).items()
    }
    plan = plan_stage(settings, settings.mesh, stage, decoder, parameters, sources)
    return StageRun(plan, parameters)


def steps_of(run: StageRun, count: int = 3) -> list[dict[str, float]]:
    """The metrics of some steps."""
    found = []
    for number in range(count):
        sums = to_host(run.advance(run.plan.place(run.plan.source[list(range(4 * number, 4 * number + 4))])))
        found.append(run.metrics(run.losses(sums), sums))
    return found


def assert_same_losses(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    for left, right in zip(found, expected, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            assert left[name] == pytest.approx(right[name], rel=1e-6, abs=1e-9), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, moe_rows: Path) -> list[dict[str, float]]:
    """The metrics of one device, with losses on routers."""
    return steps_of(stage_run(tmp_path_factory.mktemp("run"), moe_rows, **AUXILIARY))


@pytest.mark.slow
def test_the_names_of_a_balanced_run(alone):
    assert all(set(found) == OF_STEP | {"distill/moe_lb_loss", "distill/router_z_loss"} for found in alone)
    terms = ("out_proj_feature_loss", "mlp_loss", "moe_lb_loss", "router_z_loss")
    for found in alone:
        assert found["distill/total_loss"] == pytest.approx(sum(found[f"distill/{term}"] for term in terms), rel=1e-6)
        assert found["distill/moe_lb_loss"] == pytest.approx(0.1 * found["router/load_balance"], rel=1e-6)
        assert found["distill/router_z_loss"] > 0


@pytest.mark.slow
def test_feature_mode_with_split_experts(tmp_path, moe_rows):
    loss = {"token_weight": 0.0, "load_balance": {"weight": 0.1, "scope": "model"}, "router_z": 0.01}
    settings = {"mode": "feature", "loss": loss, "train_only": ["mlp"]}
    alone = stage_run(tmp_path, moe_rows, **settings)
    split = stage_run(tmp_path, moe_rows, **settings, mesh={"expert": 2, "data": 2})
    assert_same_losses(steps_of(split), steps_of(alone))


@pytest.fixture(scope="module")
def eightfold(tmp_path_factory: pytest.TempPathFactory, moe_rows: Path) -> StageRun:
    """Blocks, experts and the hidden axis each cut in two."""
    mesh = {"block": 2, "expert": 2, "fsdp": 2}
    return stage_run(tmp_path_factory.mktemp("run"), moe_rows, **AUXILIARY, mesh=mesh)


@pytest.mark.slow
def test_no_collective_crosses_block_groups(eightfold):
    """From the compiled program: every collective's devices, and every permute's pairs, hold the same blocks."""
    batch = eightfold.plan.place(eightfold.plan.source[[0, 1, 2, 3]])
    names = r" (all-reduce|all-gather|all-to-all|collective-[\w-]+|reduce-scatter|ragged-all-to-all)(?:-start)?\("
    lines = [line for line in eightfold.compiled(batch).as_text().splitlines() if re.search(names, line)]
    assert len(lines) > 5
    exchanging = set()
    for line in lines:
        found = re.search(r"(?:replica_groups|source_target_pairs)=(\S+)", line)
        assert found, line
        for members in replica_groups(found[1]):
            assert len({device // 4 for device in members}) == 1, line
            exchanging |= {(device // 2 % 2, device % 2) for device in members if len(members) > 1}
    assert len(exchanging) == 4  # along fsdp and expert they do


@pytest.mark.slow
def test_blockwise_mode_with_everything_split(eightfold, alone):
    assert_same_losses(steps_of(eightfold), alone)


# Other teachers and students.


@pytest.mark.slow
def test_a_dense_teacher_trains_a_student_with_experts(tmp_path, moe_teacher, sparse_cache):
    """Blocks 0 and 2, which its cache holds; the last one has experts."""
    run, student = tmp_path / "run", StudentConfig(init=str(moe_teacher))
    train(config(run, sparse_cache, student=student, loss=MLP, steps=12))
    lines = read_metrics(run)
    assert lines[-1]["mlp/block_02"] < 0.9 * lines[0]["mlp/block_02"]
    assert "router/entropy_block_02" not in lines[0]  # nobody asks for it
    before, after = all_parameters(load_pretrained(moe_teacher)), all_parameters(load_student(str(run)).decoder)
    moved = np.abs(after[UNIT + "mlp/router"] - before[UNIT + "mlp/router"]).max(axis=(1, 2))
    assert moved[0] == 0
    assert moved[1] > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [({"mesh": {"expert": 2}}, "no experts to balance or to split"), (NOAUX, "no experts to balance or to split")],
    ids=["mesh", "noaux"],
)
def test_a_dense_student_has_no_experts_to_split(tmp_path, cache, change, message):
    with pytest.raises(ConfigError, match=message):
        train(config(tmp_path / "run", cache, **change))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({**NOAUX, "train_only": ["mlp/router_bias"]}, "no loss reaches what train_only names"),
        ({**NOAUX, "loss": {}}, "no loss of this stage trains them"),
        ({"moe_balance_type": "gshard", "student": CUT}, "which has no weight"),
    ],
    ids=["train_only", "no loss", "gshard"],
)
def test_what_cannot_be_is_refused_before_the_run_begins(tmp_path, moe_rows, change, message):
    with pytest.raises(ConfigError, match=message):
        train(moe_config(tmp_path / "run", moe_rows, **change))
    assert not (tmp_path / "run").exists()
