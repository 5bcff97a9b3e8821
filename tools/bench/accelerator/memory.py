"""A random teacher: the memory of its recorder and its speed, and what a student's step needs beside its arguments.

teacher_parameters_b           billions of parameters, bfloat16
recorder_arguments_gb, recorder_temporaries_gb, recorder_codes_gb   as XLA plans them, for a batch
recorder_tokens_per_s          of the jitted recorder of attn_out and resid, without copies to the host
step_<mode>_temporaries_gb     of a student of the teacher's size, for the same batch, beside its arguments
peak_gb                        that the device has held up to then, where it says so
"""

import sys
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distillcache.models.config import BlockKind, LayerGroup, ModelConfig
from distillcache.models.decoder import Decoder, with_attention
from distillcache.models.layers.kernels import chosen_kernel
from distillcache.models.recorder import make_recorder
from distillcache.schemas.config import TapConfig
from distillcache.schemas.format.tap_plan import tap_plan
from distillcache.tools.bench.accelerator.kernels import median_seconds
from distillcache.tools.bench.steps.step import StepSizes, abstract_student, temporaries

DTYPE = "bfloat16"
ONE_BILLION = ModelConfig(
    vocab_size=32_000,
    hidden_size=2048,
    intermediate_size=8192,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    layers=(LayerGroup((BlockKind(),), 16),),
    tie_embeddings=True,
)
REPEATS = 3


@dataclass(frozen=True)
class MemorySizes:
    """teacher: random weights. rows, tokens: of a batch."""

    teacher: ModelConfig = ONE_BILLION
    rows: int = 8
    tokens: int = 1024


def random_teacher(sizes: MemorySizes) -> Decoder:
    """A teacher of these sizes, with the attention that a build would choose here."""
    decoder = Decoder(sizes.teacher, dtype=DTYPE, rngs=nnx.Rngs(0))
    return with_attention(decoder, chosen_kernel("auto", decoder.config, DTYPE))


def measure_memory(decoder: Decoder, sizes: MemorySizes) -> dict[str, float]:
    """All figures."""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(decoder, nnx.Param)))
    figures = {"teacher_parameters_b": parameters / 1e9} | _recorder(decoder, sizes)
    steps = StepSizes(batch_rows=sizes.rows, row_tokens=sizes.tokens)
    config = replace(sizes.teacher, attention=decoder.config.attention)
    for mode in ("blockwise", "feature"):
        student = abstract_student(config, config.num_blocks)
        found = temporaries(student, steps, DTYPE, ("bf16", False), mode=mode)
        figures[f"step_{mode}_temporaries_gb"] = found / 1e9
        print(f"bench: step, {mode}, {found / 1e9:.3g} GB of temporaries", file=sys.stderr)
    return figures | peak_gb()


def peak_gb() -> dict[str, float]:
    """The most that the first device has held so far, where its client says so."""
    stats = jax.devices()[0].memory_stats() or {}
    return {"peak_gb": stats["peak_bytes_in_use"] / 1e9} if "peak_bytes_in_use" in stats else {}


def _recorder(decoder: Decoder, sizes: MemorySizes) -> dict[str, float]:
    config = decoder.config
    slots = {"attn_out": range(config.num_blocks), "resid": range(config.num_blocks + 1)}
    taps = [tap_plan(name, TapConfig(codec="bf16"), each, config.hidden_size) for name, each in slots.items()]
    record, parameters = make_recorder(decoder, taps, {})
    shape = (sizes.rows, sizes.tokens)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, shape, np.int32))
    positions = jnp.broadcast_to(jnp.arange(sizes.tokens, dtype=jnp.int32), shape)
    given = (parameters, tokens, positions, jnp.ones(shape, jnp.int32))
    compiled = jax.jit(record).lower(*given).compile()
    planned = compiled.memory_analysis()
    speed = {"recorder_tokens_per_s": tokens.size / median_seconds(lambda: compiled(*given), REPEATS)}
    if planned is None:  # not every client plans
        return speed
    return speed | {
        "recorder_arguments_gb": planned.argument_size_in_bytes / 1e9,
        "recorder_temporaries_gb": planned.temp_size_in_bytes / 1e9,
        "recorder_codes_gb": planned.output_size_in_bytes / 1e9,
    }
