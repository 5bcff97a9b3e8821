"""Imports what commands import, and traces the tiny teacher's recorder, without a device: for the fork server alone."""

import gc

import jax
import jax.numpy as jnp
from flax import nnx
from jax._src import xla_bridge

import distillcache.cache_builder.__main__
import distillcache.cache_builder.repair.from_teacher
import distillcache.tools.commands.copy
import distillcache.tools.commands.prepare
import distillcache.trainer.__main__  # noqa: F401
from distillcache.cache_builder.record.plan import chosen_taps, with_objects
from distillcache.models.decoder import abstract_decoder
from distillcache.models.recorder import make_recorder
from distillcache.schemas.config import BuildConfig
from tests.conftest import TINY, build_config


def trace_recorder(config: BuildConfig) -> None:
    """Trace what `build` compiles; a child that compiles the same finds it traced."""
    row_tokens, shard_rows = config.data.row_tokens, config.shard_rows or config.batch_rows
    taps = with_objects(chosen_taps(config, TINY), row_tokens, shard_rows, config.object_mib)
    record, parameters = make_recorder(nnx.merge(*abstract_decoder(TINY, jnp.dtype("float32"))), taps, {})
    numbers = jax.ShapeDtypeStruct((config.batch_rows, row_tokens), jnp.int32)
    jax.eval_shape(record, parameters, numbers, numbers, numbers)


trace_recorder(build_config("cache", "teacher", "corpus", shard_rows=24))
gc.collect()
gc.freeze()  # what is looked at for garbage is copied into every child
if xla_bridge.backends_are_initialized():
    raise RuntimeError("the fork server has threads of XLA by now, which its children would wait for")
