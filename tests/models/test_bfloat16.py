"""The decoder in bfloat16: no further from the float32 truth than transformers (tests/golden/make_bfloat16.py)."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from distillcache.models.checkpoint import load_pretrained
from distillcache.models.config import RopeConfig
from distillcache.models.layers.experts import gated
from distillcache.models.layers.rope import rope_tables, rotate
from tests.golden.deep_models import SEEDS, deep_tokens, save_deep
from tests.models.conftest import GOLDEN

PEER: dict[str, float] = json.loads((GOLDEN / "bfloat16.json").read_text())


@partial(jax.jit, static_argnums=0)
def stream(graph: Any, state: Any, tokens: jax.Array) -> jax.Array:
    """Every slot of the stream: one program for all seeds of a model."""
    return nnx.merge(graph, state)(tokens, taps=("resid",), logits=False).taps["resid"]


def median_error(name: str) -> float:
    """As the golden script takes it: over 48 tokens, of each slot but the first, then the slots' mean."""
    graph, state = nnx.split(load_pretrained(GOLDEN / name, dtype="bfloat16"))
    expected = load_file(GOLDEN / name / "expected.safetensors")
    found, truth = np.asarray(stream(graph, state, jnp.asarray(expected["tokens"])), np.float32), expected["resid"]
    error = np.linalg.norm(found - truth, axis=-1) / np.linalg.norm(truth, axis=-1)
    return float(np.mean(np.median(error[1:].reshape(len(error) - 1, -1), axis=1)))


# One family for each kind of block: latent attention, soft caps, sinks, blocks without positions, norms of queries and
# keys, norms behind the sublayers, multipliers, long rotations, recurrences.
FAST = ("deepseek_v3", "gemma2", "gpt_oss", "llama4", "qwen3", "olmo2", "granite", "phi3", "qwen3_next")


@pytest.mark.parametrize("name", FAST)
def test_a_family_is_not_further_from_the_truth_than_transformers(name: str):
    assert median_error(name) < 1.1 * PEER[name]


@pytest.mark.slow  # in one test, since it takes the mean of all
def test_no_family_is_and_together_they_are_nearer():
    ratios = {name: median_error(name) / peer for name, peer in PEER.items()}
    assert {name: ratio for name, ratio in ratios.items() if ratio >= 1.1} == {}
    assert np.exp(np.mean(np.log(list(ratios.values())))) < 0.95


def test_rotation_and_gate_round_once():
    """Each is within half a step of bfloat16, 2^-9 of the larger operands, of the exact value of its inputs."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 64, 2, 32)), jnp.bfloat16)
    cos, sin = rope_tables(RopeConfig(), 32, jnp.arange(64)[None], 64)
    exact = np.asarray(rotate(x.astype(jnp.float32), cos, sin, RopeConfig()))
    np.testing.assert_array_equal(rotate(x, cos, sin, RopeConfig()), exact.astype(jnp.bfloat16))
    gate, up = (jnp.asarray(rng.normal(size=256), jnp.bfloat16) for _ in range(2))
    exact = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    found = gated(lambda gate, up: jax.nn.silu(gate) * up, gate, up)
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


DEEP_PEER: dict[str, list[float]] = json.loads((GOLDEN / "bfloat16_deep.json").read_text())


def deep_error(name: str, depth: int, seed: int, folder: Path) -> float:
    """Of a model of so many blocks, as `median_error`; the truth is the same decoder in float32 (test_parity.py)."""
    saved, tokens = save_deep(folder, name, depth, seed), jnp.asarray(deep_tokens(seed))

    def resid(dtype: str) -> np.ndarray:
        return np.asarray(stream(*nnx.split(load_pretrained(saved, dtype=dtype)), tokens), np.float32)

    truth = resid("float32")
    error = np.linalg.norm(resid("bfloat16") - truth, axis=-1) / np.linalg.norm(truth, axis=-1)
    return float(np.mean(np.median(error[1:].reshape(depth, -1), axis=1)))


def deep_ratio(key: str, folder: Path) -> float:
    """Our error over transformers', the geometric mean over all seeds."""
    name, depth = key.rsplit("-", 1)
    ours = [deep_error(name, int(depth), seed, folder / f"{key}-{seed}") for seed in SEEDS]
    return float(np.exp(np.mean(np.log(np.divide(ours, DEEP_PEER[key])))))


def test_a_deep_stack_is_nearer_to_the_truth_than_transformers(tmp_path: Path):
    assert deep_ratio("llama_tied-12", tmp_path) < 0.95


@pytest.mark.slow
def test_no_family_is_further_from_the_truth_in_deep_stacks(tmp_path: Path):
    """Of 24 blocks. Single seeds differ by a tenth in either direction, so families may by half of that."""
    ratios = [deep_ratio(key, tmp_path) for key in DEEP_PEER if key.endswith("-24")]
    assert len(ratios) == 7
    assert max(ratios) < 1.1
    assert np.exp(np.mean(np.log(ratios))) < 0.97
