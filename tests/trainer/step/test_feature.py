"""Feature mode: the whole loss against NumPy in double precision, micro-batches, and what a run of it does."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distillcache.cache_builder.build import build_cache
from distillcache.models.config import BlockKind, LayerGroup, ModelConfig
from distillcache.models.decoder import Decoder
from distillcache.schemas.codecs import get_codec, get_topk_codec
from distillcache.schemas.config.teacher import TapsConfig, TopKConfig
from distillcache.schemas.config.train import LossConfig, OptimizerConfig
from distillcache.trainer.run.checkpoints import load_student
from distillcache.trainer.run.metrics import term_metrics
from distillcache.trainer.run.metrics_log import read_metrics
from distillcache.trainer.step.feature import FeatureStep, FeatureSums
from distillcache.trainer.step.feature_program import feature_update
from distillcache.trainer.step.optimizer import make_optimizer
from distillcache.trainer.step.parameters import all_parameters, install
from distillcache.trainer.step.program import TrainState, init_state, jit_step
from distillcache.trainer.step.stack import StudentStack
from distillcache.trainer.step.targets import TapReading, block_targets, student_spans
from distillcache.trainer.terms import Terms
from distillcache.trainer.terms.parts import Means
from distillcache.trainer.train import train
from tests.conftest import build_config
from tests.trainer.conftest import random_batch
from tests.trainer.test_train import config

SMALL = ModelConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    layers=(LayerGroup((BlockKind(),), 3),),
)
LOSS = LossConfig.model_validate(
    {"alpha": 0.3, "tau": 2.0, "feature": {"weight": 1.5, "relative_l2": 0.0, "l2": 1.0, "blocks": [0, 2]}}
)
K = 5


@pytest.fixture(scope="module")
def small() -> Decoder:
    return nnx.jit(lambda: Decoder(SMALL, rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def batch() -> dict:
    found = random_batch(SMALL, rows=4, codec="f32")
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(4, 10, SMALL.vocab_size)).astype(np.float32) * 2
    ids = np.argsort(-logits, axis=-1)[..., :K].astype(np.int32)
    found["topk_logits"] = {
        "codes": np.take_along_axis(logits, ids, -1)[None],
        "ids": ids[None],
        "logsumexp": np.log(np.exp(logits).sum(-1, keepdims=True))[None],
    }
    found["segment_ids"][2, 3:] = 0
    found["loss_mask"][0, 4] = False
    return found


def step_of(decoder: Decoder, loss: LossConfig, **options: object) -> tuple[FeatureStep, tuple]:
    spans = student_spans(SMALL, 3, None)
    places = {"attn_out": {at: at for at in range(3)}, "topk_logits": {0: 0}}
    weights = {0: 1.0, 2: 2.0}
    targets = block_targets(SMALL, spans, [places] * 3, weights)
    codecs = {"attn_out": get_codec("f32"), "topk_logits": get_topk_codec(K, "f32")}
    reading = TapReading(codecs, SMALL.hidden_size, in_step=False)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3, warmup_steps=0), 10, clips=False)
    step = FeatureStep(nnx.graphdef(decoder), StudentStack(decoder), reading, loss, optimizer, 1.0, 10, **options)
    return step, targets


@partial(jax.jit, static_argnums=0)
def jitted_gradients(step: FeatureStep, parameters: dict, batch: dict, targets: tuple) -> tuple[dict, object]:
    return step.gradients(parameters, {}, batch, targets, jnp.int32(0))


def gradients(decoder: Decoder, batch: dict, loss: LossConfig = LOSS, **options: object) -> tuple[dict, object]:
    step, targets = step_of(decoder, loss, **options)
    return jitted_gradients(step, all_parameters(decoder), batch, targets)


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def by_hand(decoder: Decoder, batch: dict) -> dict[str, float]:
    """Every term of `LOSS`, in double precision, from the decoder's own outputs."""
    out = decoder(batch["tokens"], batch["positions"], batch["segment_ids"], taps=("attn_out",))
    logits = np.asarray(out.logits, np.float64)
    segments, mask = batch["segment_ids"], batch["segment_ids"] > 0
    counts = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0) & batch["loss_mask"][:, 1:]
    ce = -np.take_along_axis(log_softmax(logits)[:, :-1], batch["tokens"][:, 1:, None], -1)[..., 0]
    top = {name: np.asarray(value[0], np.float64) for name, value in batch["topk_logits"].items()}
    chosen = np.take_along_axis(logits, batch["topk_logits"]["ids"][0], -1)
    found = {"ce": ce[counts].mean()}
    for name, tau in (("kl", 2.0), ("kl_1", 1.0)):
        teacher, student = log_softmax(top["codes"] / tau), log_softmax(chosen / tau)
        found[name] = (np.exp(teacher) * (teacher - student)).sum(-1)[:, :-1][counts].mean()
    target = np.asarray(batch["attn_out"]["codes"], np.float64)
    error = np.square(np.asarray(out.taps["attn_out"], np.float64) - target).mean(-1)
    feature = [(error[block] * mask).sum() / mask.sum() for block in range(3)]
    found["feature"] = (feature[0] + 2.0 * feature[2]) / 2
    return found | {"total": 0.3 * 4.0 * found["kl"] + 0.7 * found["ce"] + 1.5 * found["feature"]}


def test_every_term_against_numpy(small, batch):
    _, sums = gradients(small, batch)
    expected = by_hand(small, batch)
    for name in ("ce", "kl", "kl_1"):
        assert float(sums.logits[name] / sums.targets) == pytest.approx(expected[name], rel=1e-5)
    means = np.asarray(sums.blocks["feature"]) / float(sums.tokens)
    assert means[1] == 0
    assert (means[0] + 2.0 * means[2]) / 2 == pytest.approx(expected["feature"], rel=1e-5)


def test_the_gradient_is_that_of_the_sum(small, batch):
    """Along a random direction, against the difference of two totals computed by hand."""
    found, _ = gradients(small, batch)
    rng, parameters = np.random.default_rng(0), all_parameters(small)
    way = {name: rng.normal(size=value.shape).astype(np.float32) for name, value in parameters.items()}
    totals = []
    for sign in (1, -1):
        moved = nnx.clone(small)
        install(moved, {name: value + sign * 1e-3 * way[name] for name, value in parameters.items()})
        totals.append(by_hand(moved, batch)["total"])
    slope = sum(float(jnp.vdot(found[name], way[name])) for name in found)
    assert slope == pytest.approx((totals[0] - totals[1]) / 2e-3, rel=5e-3)  # a difference quotient in float32 forwards


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"micro_batches": 4}, {"remat": "none"}, {"remat": "dots"}], ids=str)
def test_how_it_is_computed_changes_nothing(small, batch, options):
    (found, sums), (expected, others) = gradients(small, batch, **options), gradients(small, batch)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(sums.logits["kl"], others.logits["kl"], rtol=1e-5)
    np.testing.assert_allclose(sums.blocks["feature"], others.blocks["feature"], rtol=1e-5)
    assert (sums.tokens, sums.targets) == (others.tokens, others.targets)


def test_padding_alone_gives_zero(small, batch):
    empty = {**batch, "segment_ids": np.zeros_like(batch["segment_ids"])}
    found, sums = gradients(small, empty)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves((found, sums.blocks, sums.logits)))


@pytest.fixture(scope="module")
def alone(small, batch) -> tuple[dict, TrainState, FeatureSums]:
    """The parameters before, and state and sums after, a step on features alone: clipped, with weight decay."""
    step, targets = step_of(small, LOSS.model_copy(update={"token_weight": 0.0}))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3, warmup_steps=0, weight_decay=0.1), 10, clips=False)
    step, everything = replace(step, clip_norm=1e-3, optimizer=optimizer), all_parameters(small)
    frozen = {name: everything.pop(name) for name in ("final_norm", "head")}
    before, state = jax.tree.map(np.asarray, everything), init_state(step.stack, everything, optimizer)
    rows = {name: value for name, value in batch.items() if name != "topk_logits"}
    return before, *jit_step(feature_update(step), state, None)(state, frozen, rows, targets)


def test_the_whole_gradient_is_clipped_to_one_norm(alone):
    _, state, _ = alone
    leaves = jax.tree_util.tree_flatten_with_path(state.moments)[0]
    mu = [leaf for path, leaf in leaves if ".mu" in jax.tree_util.keystr(path)]
    norm = np.sqrt(sum(float(jnp.sum(jnp.square(leaf))) for leaf in mu)) / (1 - 0.9)
    assert norm == pytest.approx(1e-3, rel=1e-4)


def test_features_alone_reach_up_to_the_last_compared_attention(alone):
    """Block 2's is the last one: its MLP stays as it is, in spite of the weight decay. Everything else moves."""
    before, state, _ = alone
    for name, value in state.parameters.items():
        moved = [not np.array_equal(*pair) for pair in zip(value, before[name], strict=True)]
        assert any(moved), name
        assert name == "embed" or moved == [True, True, "/mlp/" not in name], name


def test_features_alone_need_no_logits(small, batch, alone):
    _, _, sums = alone
    assert sums.logits == {}
    losses = {"feature": np.asarray(sums.blocks["feature"]) / float(sums.tokens)}
    weights = {name: float(value) for name, value in sums.weights.items()}
    metrics = term_metrics(Terms.of_mode("feature"), Means(losses, {0: 1.0, 2: 2.0}, weights))
    assert metrics["distill/total_loss"] == pytest.approx(1.5 * by_hand(small, batch)["feature"], rel=1e-5)
    assert not {"distill/hard_loss", "distill/student_perplexity"} & metrics.keys()


@pytest.fixture(scope="module")
def logits_cache(tmp_path_factory: pytest.TempPathFactory, teacher: Path, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "logits"
    build_cache(build_config(folder, teacher, corpus, taps=TapsConfig(topk_logits=TopKConfig(k=8))))
    return folder


def test_blockwise_then_feature_in_one_run(tmp_path, logits_cache):
    ramp = {"start": 1.0, "end": 0.0}
    stages = [
        {"mode": "blockwise", "steps": 3},
        {"mode": "feature", "steps": 3, "loss": {"alpha": 0.5, "tau": 2.0, "feature": {"weight": ramp}}},
    ]
    whole, cut = config(tmp_path / "whole", logits_cache, stages=stages), tmp_path / "cut"
    result = train(whole)
    assert result.steps == 6
    assert result.after.kl < result.before.kl
    lines = read_metrics(tmp_path / "whole")
    names = {"total_loss", "soft_loss", "hard_loss", "teacher_loss", "kl_div_at_T", "kl_div_T1", "student_perplexity"}
    names |= {"teacher_perplexity", "out_proj_feature_loss", "temperature", "alpha", "beta_feature", "token_weight"}
    assert {name for name in lines[4] if name.startswith("distill/")} == {f"distill/{name}" for name in names}
    assert [line["distill/beta_feature"] for line in lines[4:]] == [1.0, 0.5, 0.0]
    assert lines[4]["distill/soft_loss"] == pytest.approx(4 * lines[4]["distill/kl_div_at_T"])
    for step, stands_in in ((0, True), (3, True), (6, False)):  # where there is a batch's own it stays
        line = lines[step]
        assert (line["distill/student_perplexity"] == line["eval/student_perplexity"]) is stands_in
    assert lines[6]["distill/student_perplexity"] == pytest.approx(np.exp(lines[6]["distill/hard_loss"]))
    # Stopped in the second stage: the same numbers, and all that either stage trained is there.
    train(config(cut, logits_cache, stages=[stages[0], {**stages[1], "steps": 3}], checkpoint_every=2, steps=6))
    found = [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in read_metrics(cut)]
    assert found == [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]
    moved = load_student(str(tmp_path / "whole")).decoder
    start = load_student(str(tmp_path / "whole"), 3).decoder
    before, after = all_parameters(start), all_parameters(moved)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert {"embed", "final_norm", "groups/0/blocks/0/mlp/up"} <= changed
    assert json.loads((tmp_path / "whole" / "eval.json").read_text())[1]["step"] == 3


def test_without_compared_blocks_it_does_not_matter_which_are_recorded(tmp_path, teacher, corpus):
    build_cache(build_config(tmp_path / "c", teacher, corpus, blocks=[2]))
    train(config(tmp_path / "run", tmp_path / "c", mode="feature", loss={"feature": {"weight": 0.0}}, steps=1))
    assert read_metrics(tmp_path / "run")[-1]["distill/hard_loss"] > 0
