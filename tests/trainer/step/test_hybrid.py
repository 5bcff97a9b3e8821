"""Training decoders whose blocks differ in their mixer: FLOPs, what stays float32, what decays, what a loss reaches."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from distillcache.models.adapters import sides
from distillcache.models.config import BlockKind, plan_layers
from distillcache.models.decoder import Decoder
from distillcache.models.layers.recurrent.gated_delta import GatedDelta
from distillcache.schemas.config.train import OptimizerConfig
from distillcache.trainer.step.flops import step_flops
from distillcache.trainer.step.optimizer import make_optimizer, update_one
from distillcache.trainer.step.parameters import all_parameters, cast
from tests.models.layers.recurrent import test_mamba, test_short_conv
from tests.models.layers.recurrent.test_gated_delta import CONFIG, DELTA

RECURRENT = "groups/0/blocks/0/attention/"


def test_flops_of_a_mixer_are_its_own():
    """By hand, two recurrent blocks and one with gated attention."""
    config, shapes = CONFIG, jax.eval_shape(lambda: all_parameters(Decoder(CONFIG)))
    width, heads = config.hidden_size, config.num_heads * config.head_dim
    keys, values = DELTA.key_heads * DELTA.key_dim, DELTA.value_heads * DELTA.value_dim
    channels = 2 * keys + values
    projections = width * (channels + values + 2 * DELTA.value_heads + values) + channels * DELTA.taps
    recurrent = projections + 3 * DELTA.value_heads * DELTA.key_dim * DELTA.value_dim
    attention = width * (3 * heads + 2 * config.num_kv_heads * config.head_dim) + heads * 50
    mlps = 3 * 3 * width * config.intermediate_size
    expected = 6.0 * 100 * (2 * recurrent + attention + mlps + width * config.vocab_size)
    assert step_flops(config, shapes, 100, 50) == expected


def test_flops_and_adapters_of_a_short_convolution():
    """By hand, two blocks with one and one with attention. Of its matrices only the projections may have adapters."""
    config = test_short_conv.CONFIG
    shapes = jax.eval_shape(lambda: all_parameters(Decoder(config)))
    width, heads = config.hidden_size, config.num_heads * config.head_dim
    conv = 4 * width * width + width * config.short_conv_config.taps
    attention = width * (2 * heads + 2 * config.num_kv_heads * config.head_dim) + heads * 50
    mlps = 3 * 3 * width * config.intermediate_size
    assert step_flops(config, shapes, 100, 50) == 6.0 * 100 * (2 * conv + attention + mlps + width * config.vocab_size)
    first = {name: value.shape for name, value in shapes.items() if name.startswith(RECURRENT)}
    assert {name.rsplit("/", 1)[-1] for name, shape in first.items() if sides(name, shape)} == {
        *("in_gate", "out_gate", "value", "o")
    }


def test_flops_and_adapters_of_mamba_beside_attention():
    """By hand, two blocks with both."""
    config = replace(test_mamba.CONFIG, layers=plan_layers([BlockKind(mixer="attention_mamba2")] * 2))
    shapes, mamba = jax.eval_shape(lambda: all_parameters(Decoder(config))), test_mamba.MAMBA
    width, heads = config.hidden_size, config.num_heads * config.head_dim
    inner, channels = mamba.heads * mamba.head_dim, mamba.heads * mamba.head_dim + 2 * mamba.groups * mamba.state
    recurrent = width * (2 * inner + channels + mamba.heads) + channels * mamba.taps
    recurrent += 2 * mamba.heads * mamba.state * mamba.head_dim
    attention = width * (2 * heads + 2 * config.num_kv_heads * config.head_dim) + heads * 50
    blocks = 2 * (recurrent + attention + 3 * width * config.intermediate_size)
    assert step_flops(config, shapes, 100, 50) == 6.0 * 100 * (blocks + width * config.vocab_size)
    able = {name.rsplit("/", 1)[-1] for name, value in shapes.items() if sides(name, value.shape)}
    assert able == {*"qkvo", *("mamba_" + name for name in "qkvzo"), "gate", "up", "down"}


def test_rates_of_decay_stay_float32():
    given = all_parameters(Decoder(CONFIG))
    found = cast(given, "bfloat16")
    wide = {name for name, value in found.items() if value.dtype == jnp.float32}
    assert wide == {name for name in given if name.rsplit("/", 1)[-1] in GatedDelta.float32}
    assert f"{RECURRENT}a_log" in wide


def test_matrices_decay_and_rates_do_not():
    """Without a gradient only weight decay moves a parameter."""
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5), 10)
    given = {f"attention/{name}": jnp.full(3, 2.0) for name in ("q", "conv_q", "a_log", "dt_bias", "out_norm")}
    nothing = jax.tree.map(jnp.zeros_like, given)
    moved, _ = update_one(optimizer, nothing, optimizer.init(given), given)
    assert {name for name, value in moved.items() if (value != 2).any()} == {"attention/q", "attention/conv_q"}


def test_adapters_of_gates_and_not_of_convolutions():
    shapes = {name: value.shape for name, value in all_parameters(Decoder(replace(CONFIG))).items()}
    able = {name.rsplit("/", 1)[-1] for name, shape in shapes.items() if "attention" in name and sides(name, shape)}
    assert able == {"q", "k", "v", "o", "z", "gate"}
    assert sides(f"{RECURRENT}z", shapes[f"{RECURRENT}z"]) == (36, 42)
