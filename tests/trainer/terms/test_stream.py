"""`loss.stream`: the student's own stream against chosen slots of the teacher's."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distillcache.cache_builder.build import build_cache
from distillcache.models.checkpoint import load_pretrained
from distillcache.models.config import BlockKind, LayerGroup
from distillcache.models.decoder import Decoder
from distillcache.schemas.codecs import get_codec
from distillcache.schemas.config import DataConfig, TapConfig, TapsConfig, TrainConfig
from distillcache.schemas.config.train import LossConfig, OptimizerConfig
from distillcache.schemas.errors import ConfigError, Interrupted
from distillcache.trainer.feed.cache_source import CacheSource
from distillcache.trainer.feed.open import Sources
from distillcache.trainer.run.folder import read_evaluations
from distillcache.trainer.run.metrics_log import read_metrics
from distillcache.trainer.run.stage import plan_stage
from distillcache.trainer.run.stages import resolve_stages
from distillcache.trainer.step.feature import FeatureStep
from distillcache.trainer.step.feature_program import feature_update
from distillcache.trainer.step.optimizer import make_optimizer
from distillcache.trainer.step.parameters import all_parameters, make_projectors
from distillcache.trainer.step.program import init_state, jit_step
from distillcache.trainer.step.stack import StudentStack
from distillcache.trainer.step.targets import TapReading, block_targets, student_spans
from distillcache.trainer.train import train
from tests.conftest import TINY, build_config, save_teacher
from tests.trainer.conftest import random_batch
from tests.trainer.terms.numpy_student import blocks_of, distance, own_streams, slope
from tests.trainer.test_train import Stop, assert_same_run, config

SHARES = {"relative_l2": 1.0, "cosine": 0.5, "l2": 0.25}
LOSS = {"token_weight": 0.0, "feature": {"weight": 0.0}, "stream": {"weight": 1.5, **SHARES}}
RUN = {"mode": "feature", "loss": {**LOSS, "stream": {"weight": 1.0}}}


def step_of(
    decoder: Decoder, compared: dict[int, int], loss: dict = LOSS, hidden: int | None = None, **options: Any
) -> tuple[FeatureStep, tuple]:
    """A step on batches whose `resid` holds the slots of `compared` (block -> slot), one after the other."""
    model = decoder.config
    places = {"resid": {slot: at for at, slot in enumerate(sorted(compared.values()))}}
    spans = student_spans(model, model.num_blocks, None)
    targets = block_targets(model, spans, [places] * len(spans), {}, needs_entering=False, compared=compared)
    reading = TapReading({"resid": get_codec("f32")}, hidden or model.hidden_size, in_step=False)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3, warmup_steps=0, weight_decay=0.1), 10, clips=False)
    made = LossConfig.model_validate(loss), optimizer, None, 10
    return FeatureStep(nnx.graphdef(decoder), StudentStack(decoder), reading, *made, **options), targets


@partial(jax.jit, static_argnums=0)
def jitted_gradients(step: FeatureStep, parameters: dict, batch: dict, targets: tuple) -> tuple[dict, Any]:
    return step.gradients(parameters, {}, batch, targets, jnp.int32(0))


def batch_of(decoder: Decoder, compared: dict[int, int], width: int | None = None) -> dict:
    """Four packed rows: a short one, and one of nothing but padding."""
    model = decoder.config if width is None else replace(decoder.config, hidden_size=width)
    batch = random_batch(model, rows=4, codec="f32")
    batch["segment_ids"][2, 1:] = 0
    batch["segment_ids"][3] = 0
    batch["resid"] = {"codes": jnp.asarray(batch["resid"]["codes"])[jnp.asarray(sorted(compared.values()))]}
    return {name: value for name, value in batch.items() if name != "attn_out"}


@pytest.mark.parametrize("remat", ["block", "none"])
def test_against_numpy(mixed, remat):
    """Loss and gradient of parameters before, at and behind the compared slots."""
    compared = {1: 2, 3: 4}
    batch, (step, targets) = batch_of(mixed, compared), step_of(mixed, compared, remat=remat)
    gradients, sums = jitted_gradients(step, all_parameters(mixed), batch, targets)
    mask, teacher = batch["segment_ids"] > 0, np.float64(batch["resid"]["codes"])
    blocks, rng = blocks_of(mixed), np.random.default_rng(0)

    def total(parameters: dict[str, np.ndarray], of: int = 0) -> float:
        changed = [(kind, parameters if at == of else p) for at, (kind, p) in enumerate(blocks)]
        own = own_streams(mixed, changed, batch)
        found = [distance(own[block], teacher[at], mask, SHARES) for at, block in enumerate(compared)]
        return float(np.mean(found)) * 1.5 / mask.sum()

    own = own_streams(mixed, blocks, batch)
    for at, block in enumerate(compared):
        expected = distance(own[block], teacher[at], mask, SHARES)
        assert sums.blocks["stream"][block] == pytest.approx(expected, rel=1e-5)
    assert not np.asarray(sums.blocks["stream"])[[0, 2, 4]].any()
    for block, place, repeat in ((0, "groups/0/blocks/0", 0), (3, "groups/0/blocks/1", 1)):
        for name in ("attention/q", "attention/norm", "mlp/up", "mlp/down"):
            way = rng.normal(size=gradients[f"{place}/{name}"].shape[1:])
            expected = slope(partial(total, of=block), blocks[block][1], name.replace("/", "."), way)
            found = float(np.vdot(np.float64(gradients[f"{place}/{name}"][repeat]), way))
            assert found == pytest.approx(expected, rel=5e-4, abs=1e-6), (block, name)
    assert not any(np.asarray(value).any() for name, value in gradients.items() if name.startswith("groups/1"))
    assert np.asarray(gradients["embed"]).any()


def test_uneven_micro_batches_give_the_whole_batch_s_gradient(student):
    compared = {0: 1, 3: 4}
    batch = batch_of(student, compared)
    found = []
    for count in (1, 4):
        step, targets = step_of(student, compared, micro_batches=count)
        found.append(jitted_gradients(step, all_parameters(student), batch, targets))
    np.testing.assert_allclose(found[1][1].blocks["stream"], found[0][1].blocks["stream"], rtol=1e-5)
    for name, value in found[0][0].items():
        np.testing.assert_allclose(found[1][0][name], value, rtol=3e-4, atol=2e-6, err_msg=name)


def test_padding_alone_gives_zero(student):
    batch, (step, targets) = batch_of(student, {2: 3}), step_of(student, {2: 3})
    batch["segment_ids"][:] = 0
    found, sums = jitted_gradients(step, all_parameters(student), batch, targets)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves((found, sums.blocks)))


def test_widths_meet_through_the_out_projector(student):
    """In the teacher's width, block by block; a projector of a block that is not compared has no gradient."""
    compared, width = {1: 2, 3: 4}, 24
    batch, (step, targets) = batch_of(student, compared, width), step_of(student, compared, hidden=width)
    projectors = make_projectors({(0, 0): 4}, 32, width, seed=0)
    out = np.float64(projectors["groups/0/blocks/0/projector/out"])
    gradients, sums = jitted_gradients(step, all_parameters(student) | projectors, batch, targets)
    own, mask = own_streams(student, blocks_of(student), batch), batch["segment_ids"] > 0
    for at, block in enumerate(compared):
        expected = distance(own[block] @ out[block], batch["resid"]["codes"][at], mask, SHARES)
        assert sums.blocks["stream"][block] == pytest.approx(expected, rel=1e-5)
    moved = np.abs(gradients["groups/0/blocks/0/projector/out"]).max((1, 2))
    assert (moved > 0).tolist() == [False, True, False, True]
    # A step: weight decay shrinks neither the other projectors nor blocks behind the last slot.
    everything = all_parameters(student) | projectors
    frozen = {name: everything.pop(name) for name in ("final_norm", "head", "groups/0/blocks/0/projector/in")}
    before, state = jax.tree.map(np.asarray, everything), init_state(step.stack, everything, step.optimizer)
    after = jit_step(feature_update(step), state, None)(state, frozen, batch, targets)[0].parameters
    name = "groups/0/blocks/0/projector/out"
    kept = [np.array_equal(*pair) for pair in zip(np.asarray(after[name]), before[name], strict=True)]
    assert kept == [True, False, True, False]


@pytest.mark.parametrize("token_weight", [0.0, 1.0])
def test_nothing_behind_the_last_slot_moves(student, token_weight):
    """The last compared block's MLP does, unlike that of a compared attention. Tokens reach everything."""
    batch, loss = batch_of(student, {1: 2}), {**LOSS, "token_weight": token_weight}
    step, targets = step_of(student, {1: 2}, loss)
    everything = all_parameters(student)
    frozen = {} if token_weight else {name: everything.pop(name) for name in ("final_norm", "head")}
    before, state = jax.tree.map(np.asarray, everything), init_state(step.stack, everything, step.optimizer)
    after = jit_step(feature_update(step), state, None)(state, frozen, batch, targets)[0].parameters
    for name, value in before.items():
        moved = [not np.array_equal(*pair) for pair in zip(np.asarray(after[name]), value, strict=True)]
        assert any(moved), name
        assert not name.startswith("groups/") or moved == [True, True, bool(token_weight), bool(token_weight)], name


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory, teacher: Path, corpus: Path) -> Path:
    """A lossless cache of the stream alone."""
    folder = tmp_path_factory.mktemp("cache") / "streams"
    build_cache(build_config(folder, teacher, corpus, taps=TapsConfig(attn_out=None, resid=TapConfig(codec="f32"))))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, streams: Path) -> Path:
    """A run on it that was never interrupted. Read only."""
    run = tmp_path_factory.mktemp("run") / "whole"
    train(config(run, streams, **RUN))
    return run


def test_a_run_and_its_metrics(whole):
    lines = read_metrics(whole)
    for line in lines[1:]:
        of_blocks = [line[f"stream/block_{block:02d}"] for block in range(3)]
        assert line["distill/total_loss"] == line["distill/stream_loss"] == pytest.approx(np.mean(of_blocks))
        assert line["distill/epsilon_stream"] == 1.0
        assert not {"feature/mean", "distill/beta_feature", "distill/hard_loss"} & line.keys()
    assert lines[-1]["distill/stream_loss"] < 0.9 * lines[1]["distill/stream_loss"]
    assert all(entry.perplexity for entry in read_evaluations(whole))


def test_online_is_the_cache_to_the_bit_and_so_is_a_run_that_goes_on(tmp_path, streams, whole, monkeypatch):
    train(config(tmp_path / "online", streams, source="online", **RUN))
    assert_same_run(tmp_path / "online", whole)
    with monkeypatch.context() as patch:
        Stop(patch, after=4)
        with pytest.raises(Interrupted):
            train(config(tmp_path / "stopped", streams, **RUN))
    assert train(config(tmp_path / "stopped", streams, **RUN)).resumed_from == 4
    assert_same_run(tmp_path / "stopped", whole)


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A cache of seven blocks' differences of the stream, with keyframes every three slots; no row is held out."""
    folder = tmp_path_factory.mktemp("coded")
    data = DataConfig(path=str(corpus), row_tokens=16, eval_rows=0)
    teacher = save_teacher(folder / "teacher", replace(TINY, layers=(LayerGroup((BlockKind(),), 7),)))
    taps = TapsConfig(attn_out=TapConfig(), resid=TapConfig(codec="int8", group=8, delta=True, keyframe_every=3))
    build_cache(build_config(folder / "cache", teacher, corpus, data=data, taps=taps))
    return folder / "cache"


DROPPED = {"surgery": [{"op": "drop_blocks", "blocks": [1, 2, 5]}]}  # ends at slots 3, 4, 6 and 7
NARROW = {"surgery": [{"op": "hidden_size", "to": 16, "by": "index"}], "projector": "linear"}


@pytest.mark.parametrize(
    ("student", "slots", "ends"),
    [
        (DROPPED, "all", {0: 3, 1: 4, 2: 6, 3: 7}),
        (DROPPED, [4, "last"], {1: 4, 3: 7}),
        ({"surgery": [{"op": "query_heads", "to": 2, "by": "index"}]}, [5], {4: 5}),
    ],
    ids=["all", "two", "one"],
)
def test_slots_of_a_delta_codec(tmp_path, coded, student, slots, ends):
    """The first step's losses, from what the cache decodes to and the student before it, in NumPy."""
    loss = {**LOSS, "stream": {"weight": 1.0, "slots": slots}}
    train(config(tmp_path / "run", coded, student=student, mode="feature", loss=loss, steps=1, batch_rows=38))
    [line] = [line for line in read_metrics(tmp_path / "run") if line["step"] == 1]
    source = CacheSource(str(coded), ("resid",), split="train")
    batch = source[range(38)]
    resid, mask = source.decode(batch, "resid"), batch["segment_ids"] > 0
    decoder = load_pretrained(tmp_path / "run" / "student")
    own = own_streams(decoder, blocks_of(decoder), batch)
    for block, slot in ends.items():
        expected = distance(own[block], resid[slot], mask, {"relative_l2": 1.0}) / mask.sum()
        assert line[f"stream/block_{block:02d}"] == pytest.approx(expected, rel=1e-4)
    assert {name for name in line if name.startswith("stream/")} == {f"stream/block_{block:02d}" for block in ends}


def plan_of(cache: Path, **values: Any) -> Any:
    settings = config(Path("none"), cache, mode="feature", **values)
    sources = Sources(settings)
    decoder = load_pretrained(sources.rows.plan.teacher.path, dtype="float32")
    [stage] = resolve_stages(settings, settings.mesh)
    parameters = all_parameters(decoder)
    return plan_stage(settings, settings.mesh, stage, decoder, parameters, sources)


def test_exactly_the_chosen_slots_are_read(coded, sparse_cache):
    plan = plan_of(coded, loss={**LOSS, "stream": {"weight": 1.0, "slots": [2, 7]}})
    [source] = plan.sources
    assert source.slots == {"resid": (2, 7)}
    codes = next(part for part in source.taps["resid"].parts if part.part == "codes")
    assert [slot for _, slot in source.reads["resid"].of_part(codes)] == [0, 1, 2, 6, 7]  # from their keyframes on
    # Beside compared attentions; a cache of some blocks has some slots.
    loss = {"stream": {"weight": 1.0}, "feature": {"weight": 1.0, "blocks": [2]}}
    plan = plan_of(sparse_cache, loss=loss)
    assert (plan.streams, list(plan.weights)) == ({0: 1, 1: 2, 2: 3}, [2])
    assert plan.sources[0].slots == {"attn_out": (2,), "resid": (1, 2, 3)}


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([0], "slot 0 is the embedding"),
        ([1, 1], "named twice"),
        ([], "names no slot"),
        ([9], "no block of the student ends"),
    ],
    ids=str,
)
def test_slots_that_cannot_be_compared(coded, slots, message):
    with pytest.raises(ConfigError, match=message):
        plan_of(coded, loss={**LOSS, "stream": {"weight": 1.0, "slots": slots}})


def test_what_lies_within_a_span_is_no_end_of_a_block(tmp_path, coded):
    loss = {**LOSS, "stream": {"weight": 1.0, "slots": [3, 5]}}
    with pytest.raises(ConfigError, match="no block of the student ends") as caught:
        train(config(tmp_path / "run", coded, student=DROPPED, mode="feature", loss=loss, steps=1))
    assert "[3, 4, 6, 7]" in str(caught.value)
    assert not (tmp_path / "run").exists()
    settings = TrainConfig.model_validate({"run": "r", "cache": "c", "loss": {"stream": {"weight": 1.0}}})
    with pytest.raises(ConfigError, match=r"loss\.stream\.weight would do nothing"):
        resolve_stages(settings, settings.mesh)


def test_a_narrow_student_is_trained_through_its_projectors(tmp_path, coded):
    loss = {**LOSS, "stream": {"weight": 1.0, "slots": [2, "last"]}}
    run = config(tmp_path / "run", coded, student=NARROW, mode="feature", loss=loss, train_only=["projector", "mlp"])
    train(run)
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["distill/stream_loss"] < lines[0]["distill/stream_loss"]


def test_it_does_not_get_in_the_way_of_the_last_slots_kl(tmp_path, coded):
    """Both read the same coded stream, each at its own slots: the first step's figures are those of either alone."""
    stream, tokens = {"stream": {"weight": 1.0, "slots": [2, 4]}}, {"alpha": 0.5, "token_weight": 1.0}
    nothing = {"feature": {"weight": 0.0}, "token_weight": 0.0}
    found = []
    for name, loss in (("both", {**stream, **tokens}), ("stream", stream), ("tokens", tokens)):
        train(config(tmp_path / name, coded, mode="feature", loss={**nothing, **loss}, steps=1))
        found.append(read_metrics(tmp_path / name)[0])
    for alone in found[1:]:
        names = [name for name in alone if name.startswith(("stream/", "distill/kl", "distill/hard", "distill/stream"))]
        assert len(names) > 2
        assert [found[0][name] for name in names] == pytest.approx([alone[name] for name in names], rel=1e-5)
