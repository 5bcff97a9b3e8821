"""`loss.block`: the stream that leaves a block against the one that leaves the teacher's span."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distillcache.cache_builder.build import build_cache
from distillcache.models.checkpoint import load_pretrained
from distillcache.models.config import BlockKind, LayerGroup
from distillcache.models.decoder import Decoder
from distillcache.schemas.config import DataConfig, TapConfig, TapsConfig, TrainConfig
from distillcache.schemas.config.train import BlockLossConfig, FeatureLossConfig, LossConfig
from distillcache.schemas.errors import ConfigError, InputError, Interrupted
from distillcache.trainer.feed.cache_source import CacheSource
from distillcache.trainer.run.checkpoints import load_student
from distillcache.trainer.run.folder import read_evaluations
from distillcache.trainer.run.metrics_log import read_metrics
from distillcache.trainer.run.stages import resolve_stages
from distillcache.trainer.step.parameters import all_parameters, at_address, make_projectors
from distillcache.trainer.step.stack import BlockRules
from distillcache.trainer.step.targets import block_targets, student_spans
from distillcache.trainer.train import train
from tests.conftest import TINY, build_config, save_teacher
from tests.trainer.conftest import EVEN, MIXED, blockwise, parameters_of, random_batch
from tests.trainer.step.test_blockwise import ORDERS, jitted_gradients
from tests.trainer.terms.numpy_student import block_outputs, blocks_of, distance, slope
from tests.trainer.test_train import Stop, assert_same_run, config

SHARES = {"relative_l2": 1.0, "cosine": 0.5, "l2": 0.25}
ALONE = LossConfig(feature=FeatureLossConfig(weight=0.0), block=BlockLossConfig(weight=2.0, **SHARES))
RULES = BlockRules(runs_mlp=True, mlp_input="student")
RUN = {"loss": {"feature": {"weight": 0.0}, "block": {"weight": 1.0}}}


def gradients_of(step: Any, targets: Any, trained: dict, frozen: dict, batch: dict) -> tuple[dict, np.ndarray]:
    """Gradients by name, and the block loss's sums `[L]`."""
    gradients, sums, _ = jitted_gradients(step, trained, frozen, batch, targets, jnp.int32(0))
    return gradients, np.asarray(step.stack.in_block_order({p: s.terms["block"] for p, s in sums.items()}))


def without_attn_out(step: Any, targets: Any, batch: dict) -> tuple[Any, tuple, dict]:
    """The same on a batch that has the stream alone."""
    reading = replace(step.reading, codecs={"resid": step.reading.codecs["resid"]})
    rows = {name: value for name, value in batch.items() if name != "attn_out"}
    return replace(step, reading=reading), tuple(replace(group, attn_out=None) for group in targets), rows


@pytest.mark.parametrize(
    ("kind", "blocks", "inject"),
    [("student", (0, 1, 2, 3), "resid"), ("mixed", (1, 4), "resid"), ("student", (0, 3), "attn_in")],
    ids=["one kind", "some of two kinds", "attn_in"],
)
def test_against_numpy(request, kind, blocks, inject):
    """Loss and gradient of every parameter of every block, on packed and padded rows that hold the stream alone."""
    decoder: Decoder = request.getfixturevalue(kind)
    batch, (trained, frozen) = random_batch(decoder.config, codec="f32"), parameters_of(decoder, "attention", "mlp")
    batch["segment_ids"][2] = 0  # a row of nothing but padding
    rng, shape = np.random.default_rng(0), (decoder.config.num_blocks, decoder.config.hidden_size)
    norms = rng.uniform(0.5, 2, shape).astype(np.float32) if inject == "attn_in" else None
    step, targets = blockwise(decoder, ALONE, blocks=blocks, codec="f32", rules=RULES, norms=norms)
    step, targets, batch = without_attn_out(step, targets, batch)
    gradients, sums = gradients_of(step, targets, trained, frozen, batch)
    mask, resid = batch["segment_ids"] > 0, np.float64(batch["resid"]["codes"])
    for block in range(decoder.config.num_blocks):
        layer, (address, repeat) = blocks_of(decoder)[block], ORDERS[kind][block]
        if block not in blocks:
            assert sums[block] == 0
            continue

        def total(parameters: dict[str, np.ndarray], layer: Any = layer, block: int = block) -> float:
            if norms is not None:
                parameters = parameters | {"attention.norm": np.float64(norms[block])}
            attn, mlp = block_outputs(decoder, (layer[0], parameters), resid[block], batch["segment_ids"])
            return distance(resid[block] + attn + mlp, resid[block + 1], mask, SHARES)

        assert sums[block] == pytest.approx(total(layer[1]), rel=1e-5)
        for name, value in at_address(gradients, address).items():
            way = rng.normal(size=value.shape[1:])
            expected = 2.0 * slope(total, layer[1], name.replace("/", "."), way) / mask.sum()
            found = float(np.vdot(np.float64(value[repeat]), way))
            assert found == pytest.approx(expected, rel=2e-4, abs=2e-5), (block, name)


def test_a_block_loss_adds_to_the_others(student):
    """Its gradient is the same beside the feature loss; block weights count for both."""
    batch, (trained, frozen) = random_batch(EVEN, codec="f32"), parameters_of(student, "attention", "mlp")
    both = ALONE.model_copy(update={"feature": FeatureLossConfig(weight=1.0)})
    feature = LossConfig(feature=FeatureLossConfig(weight=1.0))
    found = []
    for loss in (both, ALONE, feature):
        step, targets = blockwise(student, loss, codec="f32", rules=RULES)
        targets = tuple(replace(group, weight=3.0 * group.weight) for group in targets)
        found.append(gradients_of(step, targets, trained, frozen, batch)[0])
    plain, _ = gradients_of(*blockwise(student, ALONE, codec="f32", rules=RULES), trained, frozen, batch)
    for name, value in found[0].items():
        np.testing.assert_allclose(value, found[1][name] + found[2][name], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found[1][name], 3.0 * plain[name], rtol=1e-4, atol=1e-6)


def test_uneven_micro_batches_give_the_whole_batch_s_gradient(student):
    batch, (trained, frozen) = random_batch(EVEN, rows=4), parameters_of(student, "attention", "mlp")
    batch["segment_ids"][2, 1:] = 0
    batch["segment_ids"][3] = 0
    found = [
        gradients_of(*blockwise(student, ALONE, rules=RULES, micro_batches=count), trained, frozen, batch)
        for count in (1, 4)
    ]
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-5)
    for name, value in found[0][0].items():
        np.testing.assert_allclose(found[1][0][name], value, rtol=2e-4, atol=2e-6)


def test_what_is_in_padding_changes_nothing(student):
    batch, (trained, frozen) = random_batch(EVEN), parameters_of(student, "attention", "mlp")
    padding = (batch["segment_ids"] == 0)[None, ..., None]
    other = {**batch, "resid": {"codes": jnp.where(padding, 7, batch["resid"]["codes"])}}
    step, targets = blockwise(student, ALONE, rules=RULES)
    found = [gradients_of(step, targets, trained, frozen, each) for each in (batch, other)]
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-6)
    batch["segment_ids"][:] = 0
    gradients, sums = gradients_of(step, targets, trained, frozen, batch)
    assert not sums.any()
    assert not any(np.asarray(leaf).any() for leaf in gradients.values())


def test_spans_and_projectors_against_numpy():
    """Two blocks for a teacher of five, of another width: what leaves them is compared in the teacher's width."""
    model = replace(MIXED, layers=(LayerGroup((BlockKind(),), 2),))
    small, width = Decoder(model, rngs=nnx.Rngs(1)), 24
    batch = random_batch(replace(MIXED, hidden_size=width), codec="f32")
    places = {"resid": {0: 0, 3: 3, 5: 5}}
    targets = block_targets(model, student_spans(model, 5, [0, 3]), [places] * 2, {0: 1.0, 1: 1.0}, needs_leaving=True)
    step, _ = blockwise(small, ALONE, codec="f32", rules=RULES)
    step, _, batch = without_attn_out(step, targets, batch)
    step = replace(step, reading=replace(step.reading, hidden=width))
    trained, frozen = parameters_of(small, "attention", "mlp")
    trained |= make_projectors({(0, 0): 2}, 32, width, seed=0)
    gradients, sums = gradients_of(step, targets, trained, frozen, batch)
    mask, resid = batch["segment_ids"] > 0, np.float64(batch["resid"]["codes"])
    rng = np.random.default_rng(0)
    for block, (first, last) in enumerate(((0, 3), (3, 5))):
        kind, layer = blocks_of(small)[block]
        own = at_address(trained, (0, 0))
        given = layer | {f"projector.{side}": np.float64(own[f"projector/{side}"][block]) for side in ("in", "out")}

        def total(p: dict[str, np.ndarray], kind: Any = kind, first: int = first, last: int = last) -> float:
            x = resid[first] @ p["projector.in"]
            added = sum(block_outputs(small, (kind, p), x, batch["segment_ids"])) @ p["projector.out"]
            return distance(resid[first] + added, resid[last], mask, SHARES)

        assert sums[block] == pytest.approx(total(given), rel=1e-5)
        for name in ("projector/in", "projector/out", "attention/q", "mlp/down"):
            found = gradients[f"groups/0/blocks/0/{name}"][block]
            way = rng.normal(size=found.shape)
            expected = 2.0 * slope(total, given, name.replace("/", "."), way) / mask.sum()
            assert float(np.vdot(np.float64(found), way)) == pytest.approx(expected, rel=2e-4, abs=2e-5), name


def test_the_blocks_are_those_of_the_decoder(mixed):
    """Fed with its own streams every block leaves the next slot behind: no loss at all, float32."""
    batch = random_batch(MIXED, codec="f32")
    rows = (batch[name] for name in ("tokens", "positions", "segment_ids"))
    out = nnx.jit(lambda model, *rows: model(*rows, taps=("resid",), logits=False))(mixed, *rows)
    batch["resid"] = {"codes": out.taps["resid"]}
    step, targets = blockwise(mixed, ALONE, codec="f32", rules=RULES)
    _, sums = gradients_of(step, targets, *parameters_of(mixed, "attention", "mlp"), batch)
    assert sums.max() < 1e-6


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory, teacher: Path, corpus: Path) -> Path:
    """A lossless cache of the stream alone."""
    folder = tmp_path_factory.mktemp("cache") / "streams"
    taps = TapsConfig(attn_out=None, resid=TapConfig(codec="f32"))
    build_cache(build_config(folder, teacher, corpus, taps=taps))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, streams: Path) -> Path:
    """A run on it that was never interrupted. Read only."""
    run = tmp_path_factory.mktemp("run") / "whole"
    train(config(run, streams, **RUN))
    return run


def test_a_run_on_a_cache_of_streams_alone(whole):
    lines = read_metrics(whole)
    names = {"distill/total_loss", "distill/block_loss", "distill/delta_block"}
    names |= {f"block/block_{block:02d}" for block in range(3)}
    for line in lines[1:]:
        assert {name for name in line if name.startswith(("distill/", "feature/", "mlp/", "block/"))} - {
            "distill/student_perplexity"
        } == names
        assert line["distill/total_loss"] == line["distill/block_loss"] > 0
    assert lines[-1]["distill/block_loss"] < 0.8 * lines[1]["distill/block_loss"]
    assert all(entry.blocks == () and entry.perplexity for entry in read_evaluations(whole))
    start, end = (
        all_parameters(each) for each in (load_pretrained(whole / "student"), load_student(str(whole)).decoder)
    )
    moved = {name.split("/", 4)[-1] for name in start if not np.array_equal(start[name], end[name])}
    assert moved >= {"attention/q", "attention/norm", "mlp/up", "mlp/down", "mlp/norm"}
    assert not moved & {"embed", "final_norm", "head"}


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
def coded(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[Path, Path]:
    """A teacher of seven blocks, and a cache of differences of its stream, with keyframes every three slots.

    No row is held out: runs that are not evaluated take half of the time.
    """
    folder = tmp_path_factory.mktemp("coded")
    data = DataConfig(path=str(corpus), row_tokens=16, eval_rows=0)
    teacher = save_teacher(folder / "teacher", replace(TINY, layers=(LayerGroup((BlockKind(),), 7),)))
    taps = TapsConfig(attn_out=None, resid=TapConfig(codec="int8", group=8, delta=True, keyframe_every=3))
    build_cache(build_config(folder / "cache", teacher, corpus, data=data, taps=taps))
    return teacher, folder / "cache"


@pytest.mark.parametrize(
    ("student", "blocks", "spans"),
    [
        ({"surgery": [{"op": "query_heads", "to": 2, "by": "index"}]}, "all", [(at, at + 1) for at in range(7)]),
        ({"surgery": [{"op": "drop_blocks", "blocks": [1, 2, 5]}]}, "all", [(0, 3), (3, 4), (4, 6), (6, 7)]),
        ({"surgery": [{"op": "query_heads", "to": 2, "by": "index"}]}, [2, 6], [(at, at + 1) for at in range(7)]),
    ],
    ids=["in step", "spans", "some"],
)
def test_deltas_and_spans(tmp_path, coded, student, blocks, spans):
    """The first step's losses, from what the cache decodes to and the student before it, in NumPy."""
    _, cache = coded
    loss = {**RUN["loss"], "feature": {"weight": 0.0, "blocks": blocks}}
    train(config(tmp_path / "run", cache, student=student, loss=loss, steps=1, batch_rows=38))
    [line] = [line for line in read_metrics(tmp_path / "run") if line["step"] == 1]
    source = CacheSource(str(cache), ("resid",), split="train")
    batch = source[range(38)]
    resid, mask = np.float64(source.decode(batch, "resid")), batch["segment_ids"] > 0
    decoder, trained = load_pretrained(tmp_path / "run" / "student"), range(len(spans)) if blocks == "all" else blocks
    for block in trained:
        first, last = spans[block]
        added = sum(block_outputs(decoder, blocks_of(decoder)[block], resid[first], batch["segment_ids"]))
        expected = distance(resid[first] + added, resid[last], mask, {"relative_l2": 1.0}) / mask.sum()
        assert line[f"block/block_{block:02d}"] == pytest.approx(expected, rel=1e-4)
    assert {name for name in line if name.startswith("block/")} == {f"block/block_{block:02d}" for block in trained}


@pytest.fixture(scope="module")
def chosen_slots(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The streams of a teacher of six blocks at some slots, beside all of its attention outputs."""
    folder = tmp_path_factory.mktemp("slots")
    teacher = save_teacher(folder / "teacher", replace(TINY, layers=(LayerGroup((BlockKind(),), 6),)))
    taps = TapsConfig.model_validate({"attn_out": {}, "resid": {"codec": "f32", "slots": [0, 2, 5, "last"]}})
    build_cache(build_config(folder / "cache", teacher, corpus, taps=taps))
    return folder / "cache"


def test_slots_at_the_ends_of_spans_are_enough(tmp_path, chosen_slots):
    """For the step and for the evaluation, which needs those that enter blocks."""
    ends = {"surgery": [{"op": "drop_blocks", "blocks": [1, 3, 4]}]}  # begins at 0, 2 and 5
    result = train(config(tmp_path / "run", chosen_slots, student=ends, **RUN))
    line = result.metrics
    assert {name for name in line if name.startswith("block/")} == {f"block/block_{block:02d}" for block in range(3)}
    assert result.after.blocks == (0, 1, 2)
    assert result.after.mean_cosine < result.before.mean_cosine
    apart = {
        "surgery": [{"op": "drop_blocks", "blocks": [2]}]
    }  # begins at 0, 1, 3, 4 and 5; only the last one is whole
    result = train(config(tmp_path / "some", chosen_slots, student=apart, steps=2, **RUN))
    assert {name for name in result.metrics if name.startswith("block/")} == {"block/block_04"}
    assert result.after.blocks == (0, 4)
    none = {**RUN["loss"], "feature": {"weight": 0.0, "blocks": [1, 4]}}
    with pytest.raises(ConfigError, match="lacks the taps") as caught:
        train(config(tmp_path / "none", chosen_slots, student=apart, steps=2, loss=none))
    assert "[0, 2, 5, 6]" in str(caught.value)


def stage_of(**values: Any) -> Any:
    settings = TrainConfig.model_validate({"run": "r", "cache": "c", **values})
    return settings, resolve_stages(settings, settings.mesh)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "teacher"),
        ({"loss": {"block": {"weight": 0.5}}}, "student"),
        ({"loss": {"block": {"weight": {"start": 0.0, "end": 1.0}}}}, "student"),
        (
            {"stages": [{"mode": "feature", "steps": 1}, {"mode": "blockwise", "steps": 1, "loss": RUN["loss"]}]},
            "student",
        ),
        ({**RUN, "mlp_input": "student"}, "student"),
    ],
)
def test_a_whole_block_s_mlp_reads_its_own_attention(values, expected):
    settings, _ = stage_of(**values)
    assert settings.mlp_input == expected
    assert TrainConfig.model_validate(settings.model_dump()) == settings


def test_what_it_cannot_be_used_with_is_refused(tmp_path, streams, teacher, corpus):
    with pytest.raises(ConfigError, match="attention added"):
        stage_of(**RUN, mlp_input="teacher")
    with pytest.raises(ConfigError, match=r"loss\.block\.weight would do nothing"):
        stage_of(mode="feature", loss={"block": {"weight": 1.0}})
    with pytest.raises(ConfigError, match="compares nothing"):
        stage_of(loss={"block": {"weight": 1.0, "relative_l2": 0.0}})
    build_cache(build_config(tmp_path / "own", teacher, corpus, taps=TapsConfig(resid=None)))
    with pytest.raises(ConfigError, match="lacks the stream that enters the blocks") as caught:
        train(config(tmp_path / "run", tmp_path / "own", **RUN))
    assert "loss.block.weight" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "needed", "advice"),
    [
        ({"loss": {"block": {"weight": 1.0}}}, r"loss\.feature\.weight\n", "loss.block.weight: 1"),
        ({"loss": {"mlp": {"weight": 1.0}}}, r"loss\.feature\.weight, loss\.mlp\.weight, mlp_input", "loss.block"),
        ({"mode": "feature"}, r"loss\.feature\.weight\n", "loss.stream.weight"),
    ],
)
def test_a_cache_without_attention_outputs_says_what_it_is_enough_for(tmp_path, streams, values, needed, advice):
    with pytest.raises(InputError, match=rf"lacks this tap[\s\S]*needed for +{needed}") as caught:
        train(config(tmp_path / "run", streams, **values))
    assert advice in str(caught.value)
    assert "build --extend" in str(caught.value)


@pytest.mark.parametrize("resid", [None, {}], ids=["own stream", "stream"])
def test_recorded_outputs_of_mlps_need_no_attention_outputs(tmp_path, teacher, corpus, resid):
    """Where an MLP reads its own attention, and its output is recorded."""
    taps = TapsConfig.model_validate({"attn_out": None, "mlp_out": {}, "resid": resid})
    build_cache(build_config(tmp_path / "cache", teacher, corpus, taps=taps))
    loss = {"feature": {"weight": 0.0}, "mlp": {"weight": 1.0}}
    train(config(tmp_path / "run", tmp_path / "cache", loss=loss, mlp_input="student"))
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["distill/total_loss"] == lines[-1]["distill/mlp_loss"] < lines[1]["distill/mlp_loss"]
    assert "distill/beta_feature" not in lines[-1]


def test_runs_from_before_there_was_a_block_loss_compare_equal():
    assert not {"block", "stream"} & TrainConfig(run="r", cache="c").model_dump(mode="json")["loss"].keys()
