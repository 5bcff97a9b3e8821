"""Training steps lowered for TPUs, on a machine without one (tests/models/test_tpu_lowering.py)."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import pytest
from flax import nnx

from distillcache.models.config import BlockKind, plan_layers
from distillcache.models.decoder import Decoder, with_attention
from distillcache.schemas.codecs import get_codec
from distillcache.schemas.config.train import LossConfig, OptimizerConfig
from distillcache.trainer.step.blockwise_program import blockwise_update
from distillcache.trainer.step.feature import FeatureStep
from distillcache.trainer.step.feature_program import feature_update
from distillcache.trainer.step.optimizer import make_optimizer
from distillcache.trainer.step.parameters import all_parameters
from distillcache.trainer.step.program import init_state
from distillcache.trainer.step.stack import BlockRules, StudentStack
from distillcache.trainer.step.targets import TapReading, block_targets, student_spans
from tests.models.test_tpu_lowering import EXPERTS, KERNEL, lowered, on_tpu
from tests.models.test_tpu_lowering import PLAIN as TWO_KINDS
from tests.trainer.conftest import blockwise, parameters_of, random_batch

assert on_tpu  # a fixture of every test here
PLAIN = replace(TWO_KINDS, layers=plan_layers([BlockKind(window=64)] * 2))  # each kind is lowered by itself


def student(config: Any) -> Decoder:
    return with_attention(Decoder(config), "splash")


@pytest.mark.parametrize("config", [PLAIN, EXPERTS], ids=["dense", "experts"])
def test_a_blockwise_step(config: Any):
    decoder = student(config)
    loss = LossConfig.model_validate({"mlp": {"weight": 1.0}})
    step, targets = blockwise(decoder, loss, codec="int8", rules=BlockRules(runs_mlp=True))
    trained, frozen = parameters_of(decoder, "attention", "mlp")
    state = jax.eval_shape(partial(init_state, step.stack, optimizer=step.optimizer), trained)
    batch = random_batch(config, tokens=200, codec="int8")
    found = lowered(jax.jit(blockwise_update(step)), state, frozen, batch, targets)
    assert KERNEL in found
    assert ("ragged_dot" in found) == (config is EXPERTS)


@pytest.mark.parametrize("remat", ["block", "none"])
def test_a_feature_step(remat: str):
    decoder = student(replace(PLAIN, attention_softcap=20.0))
    depth = PLAIN.num_blocks
    places = {"attn_out": {at: at for at in range(depth)}}
    weights = dict.fromkeys(range(depth), 1.0)
    targets = block_targets(PLAIN, student_spans(PLAIN, depth, None), [places] * depth, weights)
    reading = TapReading({"attn_out": get_codec("int8")}, PLAIN.hidden_size, in_step=False)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3), 10, clips=False)  # type: ignore[arg-type]
    stack, graph = StudentStack(decoder), nnx.graphdef(decoder)
    step = FeatureStep(graph, stack, reading, LossConfig(), optimizer, 1.0, 10, remat=remat)  # type: ignore[arg-type]
    parameters = all_parameters(decoder)
    state = jax.eval_shape(partial(init_state, stack, optimizer=optimizer), parameters)
    batch = random_batch(PLAIN, tokens=200, codec="int8")
    del batch["resid"]
    found = lowered(jax.jit(feature_update(step)), state, {}, batch, targets)
    assert found.count(KERNEL) >= 2  # forward and backward
