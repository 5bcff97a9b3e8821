"""Rotary frequencies against HF transformers' (tests/golden/rope.json), and what rotation must keep."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillcache.models.config import RopeConfig
from distillcache.models.families import rope_from_hf
from distillcache.models.layers.rope import rope_tables, rotate
from tests.models.conftest import GOLDEN

CASES = json.loads((GOLDEN / "rope.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_amplitude(name: str):
    case = CASES[name]
    rope = rope_from_hf({"rope_parameters": case["rope_parameters"]}, 4096, Path("config.json"))
    positions = jnp.array([[0, 1]])
    cos, sin = rope_tables(rope, 64, positions, 4096)
    frequencies = np.array(case["frequencies"] * 2)
    # The golden models prove the angles at larger positions; at position 1 the angle is the frequency.
    np.testing.assert_allclose(cos[0, 1, 0], case["amplitude"] * np.cos(frequencies), atol=2e-7 * case["amplitude"])
    np.testing.assert_allclose(sin[0, 1, 0], case["amplitude"] * np.sin(frequencies), atol=2e-7 * case["amplitude"])
    np.testing.assert_allclose(cos[0, 0, 0], case["amplitude"], rtol=1e-6)


def test_dynamic_stretches_only_beyond_the_trained_length():
    dynamic, plain = RopeConfig(kind="dynamic", factor=2.0), RopeConfig()
    inside, outside = jnp.arange(16)[None], jnp.arange(24)[None]
    np.testing.assert_array_equal(rope_tables(dynamic, 8, inside, 16)[0], rope_tables(plain, 8, inside, 16)[0])
    longer = rope_tables(dynamic, 8, outside, 16)[0]
    # Source: transformers' formula, in float64: theta * (factor * n / trained - (factor - 1)) ** (d / (d - 2)).
    theta = 10_000.0 * (2.0 * 24 / 16 - 1.0) ** (8 / 6)
    angles = np.arange(24)[:, None] * theta ** -(np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(longer[0, :, 0, :4], np.cos(angles), atol=2e-5)


@pytest.mark.bits
@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(kind="dynamic", factor=2.0),
        RopeConfig(kind="longrope", original_max_positions=8, short_factor=(1, 1.5, 2, 3), long_factor=(2, 3, 4, 5)),
    ],
    ids=lambda rope: rope.kind,
)
def test_a_document_in_a_row_is_rotated_as_it_is_alone(rope: RopeConfig):
    """One of 6 tokens and one of 10, padding, and a neighbour of 19, where 8 positions were trained."""
    positions = np.array([[*range(6), *range(10), 0, 0, 0], range(19)])
    segments = np.array([[1] * 6 + [2] * 10 + [0] * 3, [1] * 19])
    together = rope_tables(rope, 8, jnp.asarray(positions), 8, jnp.asarray(segments))
    for row, start, length in ((0, 0, 6), (0, 6, 10), (1, 0, 19)):
        alone = rope_tables(rope, 8, jnp.arange(length)[None], 8)
        for one, other in zip(together, alone, strict=True):
            # Of another length: the last few of a row may go through another approximation of the cosine.
            np.testing.assert_allclose(one[row, start : start + length], other[0], rtol=0, atol=1e-6)


def test_longrope_divides_by_one_list_or_the_other():
    """Source: transformers' formula, in float64: 1 / (factor * theta ** (2i / d)), amplitude by the two lengths."""
    short, long = (1.0, 1.5, 2.0, 3.0), (2.0, 3.0, 4.0, 5.0)
    rope = RopeConfig(100.0, "longrope", 4.0, 8, short_factor=short, long_factor=long)
    amplitude = np.sqrt(1 + np.log(4.0) / np.log(8.0))
    for length, factors in ((8, short), (9, long)):
        angles = np.arange(length)[:, None] / (np.array(factors) * 100.0 ** (np.arange(0, 8, 2) / 8))
        cos, sin = rope_tables(rope, 8, jnp.arange(length)[None], 64)
        np.testing.assert_allclose(cos[0, :, 0, :4], amplitude * np.cos(angles), atol=1e-6)
        np.testing.assert_allclose(sin[0, :, 0, 4:], amplitude * np.sin(angles), atol=1e-6)


def test_rotation_keeps_norms_and_depends_on_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    positions = jnp.array([[3, 10, 13, 20]])
    cos, sin = rope_tables(RopeConfig(theta=100.0), 8, positions, 64)
    many = (1, 4, 1, 8)
    rotated_q, rotated_k = (rotate(jnp.broadcast_to(x, many), cos, sin, RopeConfig(theta=100.0)) for x in (q, k))
    np.testing.assert_allclose(jnp.linalg.norm(rotated_q, axis=-1), jnp.linalg.norm(q), rtol=1e-5)
    near = jnp.vdot(rotated_q[0, 1], rotated_k[0, 0])  # 7 apart
    far = jnp.vdot(rotated_q[0, 3], rotated_k[0, 2])  # 7 apart
    np.testing.assert_allclose(near, far, rtol=1e-4)
