"""Meshes of simulated devices: the single device's numbers to rounding, and nothing exchanged between block groups."""

import re
import shutil

import jax
import numpy as np
import pytest

from distillcache.cache_builder.build import build_cache
from distillcache.models.checkpoint import load_pretrained
from distillcache.models.config import BlockKind, LayerGroup, ModelConfig
from distillcache.schemas.config.teacher import TapConfig, TapsConfig
from distillcache.schemas.config.train import MeshConfig, OptimizerConfig
from distillcache.schemas.errors import ConfigError
from distillcache.trainer.feed.block_groups import blocks_of_groups
from distillcache.trainer.feed.open import Sources
from distillcache.trainer.mesh.sharding import make_mesh, parameter_sharding
from distillcache.trainer.run.evaluate import Evaluation
from distillcache.trainer.run.folder import read_evaluations
from distillcache.trainer.run.metrics_log import read_metrics
from distillcache.trainer.run.stage import StageRun, plan_stage
from distillcache.trainer.run.stages import resolve_stages
from distillcache.trainer.step.parameters import all_parameters
from distillcache.trainer.train import train
from tests.conftest import TINY, build_config, save_teacher
from tests.trainer.test_train import config

pytestmark = pytest.mark.slow  # programs for eight devices take long to compile

# Five blocks do not divide by two or four; delta keyframes every two slots lie across the groups' borders.
DEEP = ModelConfig(**{**TINY.__dict__, "layers": (LayerGroup((BlockKind(),), 5),), "num_heads": 4, "vocab_size": 264})
TAPS = TapsConfig(attn_out=TapConfig(codec="int8"), resid=TapConfig(codec="int8", delta=True, keyframe_every=2))
CUT = {"surgery": [{"op": "query_heads", "to": 1, "by": "index"}]}
BLOCKWISE = {
    "loss": {"mlp": {"weight": 0.5}},
    "student": CUT,
    "steps": 3,
    "optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=0),
}
FEATURE = {**BLOCKWISE, "mode": "feature", "loss": {}}
# Whole blocks, and the student's own stream at two slots: nothing but the stream is read.
WHOLE = {**BLOCKWISE, "loss": {"feature": {"weight": 0.0}, "block": {"weight": 1.0}}}
STREAM = {**FEATURE, "loss": {"feature": {"weight": 0.0}, "stream": {"weight": 1.0, "slots": [2, 5]}}}

KL = {**FEATURE, "loss": {"alpha": 0.5, "tau": 2.0, "kl": {"targets": "head"}, "feature": {"weight": 0.0}}}


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mesh")
    teacher = save_teacher(folder / "teacher", DEEP)
    text = folder / "text.txt"
    text.write_text("the same few words, again and again. " * 12)
    build_cache(build_config(folder / "cache", teacher, text, taps=TAPS))
    return folder / "cache"


def numbers(run) -> list[list[float]]:
    """Losses and evaluations, without times."""
    lines = [[v for k, v in line.items() if not k.startswith("perf/")] for line in read_metrics(run)]
    found: list[Evaluation] = read_evaluations(run)
    return [*lines, *([entry.kl or 0.0, entry.perplexity, *entry.cosine] for entry in found)]


@pytest.fixture(scope="module")
def alone(deep, tmp_path_factory):
    """The numbers of one device, by mode."""
    found = {}
    modes = {"blockwise": BLOCKWISE, "feature": FEATURE, "whole": WHOLE, "stream": STREAM, "kl": KL}
    for name, settings in modes.items():
        run = tmp_path_factory.mktemp("alone") / name
        train(config(run, deep, **settings))
        found[name] = numbers(run)
    return found


def assert_close(found, expected):
    for left, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(left, right, rtol=2e-4, atol=1e-7)


MESHES = [{"block": 2}, {"block": 4, "data": 2}, {"block": 2, "fsdp": 2, "tensor": 2}]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_blockwise_on_a_mesh(tmp_path, deep, alone, mesh):
    train(config(tmp_path / "run", deep, mesh=mesh, micro_batches=2, **BLOCKWISE))
    assert_close(numbers(tmp_path / "run"), alone["blockwise"])


def test_feature_mode_on_a_mesh(tmp_path, deep, alone):
    train(config(tmp_path / "run", deep, mesh={"data": 2, "fsdp": 2, "tensor": 2}, **FEATURE))
    assert_close(numbers(tmp_path / "run"), alone["feature"])


def test_whole_blocks_on_a_mesh(tmp_path, deep, alone):
    train(config(tmp_path / "run", deep, mesh={"block": 4, "data": 2}, micro_batches=2, **WHOLE))
    assert_close(numbers(tmp_path / "run"), alone["whole"])


def test_streams_on_a_mesh(tmp_path, deep, alone):
    train(config(tmp_path / "run", deep, mesh={"data": 2, "tensor": 2}, micro_batches=2, **STREAM))
    assert_close(numbers(tmp_path / "run"), alone["stream"])


def test_the_whole_distribution_on_a_mesh(tmp_path, deep, alone):
    """Rows over data, heads over tensor: 264 rows of the vocabulary divide by two."""
    train(config(tmp_path / "run", deep, mesh={"data": 2, "fsdp": 2, "tensor": 2}, **KL))
    assert_close(numbers(tmp_path / "run"), alone["kl"])
    assert read_evaluations(tmp_path / "run")[-1].kl == pytest.approx(alone["kl"][-1][0], rel=2e-4)


def test_a_run_goes_on_on_another_mesh(tmp_path, deep, alone):
    run = tmp_path / "run"
    first = config(run, deep, mesh={"block": 2, "data": 2}, checkpoint_every=1, **BLOCKWISE)
    train(first)
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name) == 3:
            shutil.rmtree(folder)
    assert train(first.model_copy(update={"mesh": MeshConfig()})).resumed_from == 2
    assert_close(numbers(run), alone["blockwise"])


def step_of(cache, tmp_path, **mesh):
    settings = config(tmp_path / "run", cache, mesh=mesh, **BLOCKWISE)
    sources = Sources(settings)
    decoder = load_pretrained(sources.rows.plan.teacher.path, dtype="float32")
    (stage,) = resolve_stages(settings, settings.mesh)
    parameters = all_parameters(decoder)
    plan = plan_stage(settings, settings.mesh, stage, decoder, parameters, sources)
    return StageRun(plan, parameters)


def test_nothing_but_scalars_crosses_block_groups(deep, tmp_path):
    """From the compiled program: every collective's replica groups lie within one group of devices."""
    run = step_of(deep, tmp_path, block=2, data=2, tensor=2)
    batch = run.plan.place(run.plan.source[[0, 1, 2, 3]])
    compiled = run.compiled(batch).as_text()
    found = [
        (re.findall(r"\[([\d,]*)\]", line.split(name)[0]), re.search(r"(?:replica_groups|pairs)=(\S+)", line)[1])
        for line in compiled.splitlines()
        for name in re.findall(r" (all-reduce|all-gather|all-to-all|collective-\w+|reduce-scatter)(?:-start)?\(", line)
    ]
    assert len(found) > 5  # data and tensor axes do exchange
    for sizes, groups in found:
        crossing = any(len({device // 4 for device in members}) > 1 for members in replica_groups(groups))
        assert not crossing or not any(sizes), (sizes, groups)


def replica_groups(text: str) -> list[list[int]]:
    """`{{0,1},{2,3}}` or `[4,2]<=[2,2,2]T(1,0,2)` as lists of devices."""
    if text.startswith("{{"):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]
    shape, source, order = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    devices = np.arange(8).reshape([int(n) for n in source.split(",")])
    if order:
        devices = devices.transpose([int(n) for n in order.split(",")])
    return devices.reshape([int(n) for n in shape.split(",")]).tolist()


def test_replica_groups_are_understood():
    assert replica_groups("{{0,1},{2,3}},") == [[0, 1], [2, 3]]
    assert replica_groups("[2,4]<=[2,2,2]T(1,0,2),") == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_each_group_reads_its_own_slots(deep, tmp_path):
    run = step_of(deep, tmp_path, block=4)
    assert blocks_of_groups(DEEP, 4) == [[0, 1], [2, 3], [4], []]
    wanted = [source.slots["resid"] for source in run.plan.source.sources[:3]]
    assert [list(slots) for slots in wanted] == [[0, 1, 2], [2, 3, 4], [4, 5]]
    batch = run.plan.place(run.plan.source[[0, 1]])
    codes = batch["resid"]["codes"]
    assert codes.shape[0] == 4
    assert {shard.data.shape[0] for shard in codes.addressable_shards} == {1}


def test_parameters_lie_as_declared():
    mesh = make_mesh(MeshConfig(block=2, fsdp=2, tensor=2))
    spec = parameter_sharding(mesh, "groups/0/blocks/0/attention/q", (4, 24, 6, 8)).spec
    assert tuple(spec) == ("block", "fsdp", "tensor", None)
    assert tuple(parameter_sharding(mesh, "groups/0/blocks/0/attention/k", (4, 24, 3, 8)).spec) == (
        "block",
        "fsdp",
        None,
        None,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mesh": {"block": 16}}, "more devices"),
        ({"mesh": {"data": 8}}, "distributed evenly"),
        ({"mesh": {"block": 2}, "mode": "feature"}, "depend on each other"),
        ({"micro_batches": 3}, "split into so many micro-batches"),
    ],
    ids=lambda value: str(value),
)
def test_what_does_not_fit_is_refused(tmp_path, cache, change, message):
    with pytest.raises(ConfigError, match=message):
        train(config(tmp_path / "run", cache, **change))
    assert not (tmp_path / "run").exists()


def test_there_are_eight_devices():
    assert jax.device_count() == 8
