"""Delta coding: errors that do not add up, keyframes, and a scan that may begin at any of them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distillcache.schemas.codecs import Codec, get_codec, make_signs, take_slot
from distillcache.schemas.codecs.quantise import LARGEST

HIDDEN, SLOTS, EVERY = 64, 19, 8
SIGNS = make_signs("a plan", HIDDEN)
NAMES = pytest.mark.parametrize("name", ["int8", "int4"])


@functools.cache
def compiled(name: str, keyframe_every: int = EVERY) -> tuple[Codec, Any, Any]:
    codec = get_codec(name, signs=SIGNS, delta=True, keyframe_every=keyframe_every)
    return codec, jax.jit(codec.encode), jax.jit(codec.decode)


def stream(seed: int, step: float = 0.1) -> np.ndarray:
    """A stream of SLOTS slots for two tokens: large at once, then changing by little, `[S, 2, D]`."""
    random = np.random.default_rng(seed)
    start = random.normal(size=(1, 2, HIDDEN)) * 10
    steps = random.normal(size=(SLOTS - 1, 2, HIDDEN)) * step
    return np.concatenate([start, start + np.cumsum(steps, 0)]).astype(np.float32)


def rms(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(np.square(x), (1, 2)))


@NAMES
@given(seed=st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_errors_are_those_of_a_step_and_do_not_add_up(name: str, seed: int) -> None:
    _, encode, decode = compiled(name, 0)
    x = stream(seed)
    error = rms(np.asarray(decode(encode(x))) - x)
    share = {"int8": 0.01, "int4": 0.13}[name]
    # From slot 2 on a difference is a step and what the slot before lacked.
    assert (error[4:] < share * 0.12).all()
    assert error[-4:].mean() < 1.5 * error[4:8].mean()


@NAMES
def test_differences_are_closer_than_coding_each_slot(name: str) -> None:
    _, encode, decode = compiled(name)
    codec = get_codec(name, signs=SIGNS)
    alone = jax.jit(lambda x: codec.decode(codec.encode(x)))
    x = stream(0)
    ours = rms(np.asarray(decode(encode(x))) - x).mean()
    assert ours < 0.05 * rms(np.asarray(alone(x)) - x).mean()


@NAMES
def test_keyframes_are_closer_than_bfloat16_and_have_their_own_slots(name: str) -> None:
    codec, encode, decode = compiled(name)
    x = stream(1)
    parts = encode(x)
    declared = {part.name: ((part.slots(SLOTS), 2, part.width), part.dtype) for part in codec.parts(HIDDEN)}
    assert {key: (part.shape, str(part.dtype)) for key, part in parts.items()} == declared
    assert declared["key"][0][0] == 3
    error = rms(np.asarray(decode(parts)) - x)[::EVERY]
    bf16 = rms(np.asarray(x.astype(jnp.bfloat16), np.float32) - x)[::EVERY]
    assert (error < (0.1 if name == "int8" else 1.0) * bf16).all()


@pytest.mark.bits
@NAMES
@pytest.mark.parametrize("wanted", [0, 7, 8, 13, 18])
def test_a_scan_may_begin_at_the_keyframe_before(name: str, wanted: int) -> None:
    codec, encode, decode = compiled(name)
    parts = encode(stream(2))
    meta = codec.parts(HIDDEN)
    first = codec.first_slot(wanted)
    assert first % EVERY == 0
    carry = codec.start((2, HIDDEN)) + 7  # a keyframe must not look at what came before it
    step = jax.jit(codec.decode_slot)
    for slot in range(first, wanted + 1):
        carry, x = step(carry, take_slot(parts, meta, slot), slot)
    np.testing.assert_allclose(x, decode(parts)[wanted], rtol=1e-6, atol=1e-5)


@pytest.mark.bits
@NAMES
@pytest.mark.parametrize("keyframe_every", [0, EVERY])
def test_encoder_and_decoder_carry_the_same_bits(name: str, keyframe_every: int) -> None:
    codec, _, _ = compiled(name, keyframe_every)
    encode, decode = jax.jit(codec.encode_slot), jax.jit(codec.decode_slot)
    ours = theirs = codec.start((2, HIDDEN))
    for slot, x in enumerate(stream(3)):
        ours, parts = encode(ours, x, slot)
        theirs, _ = decode(theirs, parts, slot)
        np.testing.assert_array_equal(ours, theirs)


@NAMES
def test_parts_of_other_slots_are_not_looked_at(name: str) -> None:
    codec, encode, _ = compiled(name)
    parts = take_slot(encode(stream(4)), codec.parts(HIDDEN), 3)
    carry = codec.start((2, HIDDEN))
    other = parts | {"key": jnp.full_like(parts["key"], 99), "key_scale": jnp.full_like(parts["key_scale"], 255)}
    decode = jax.jit(codec.decode_slot)
    np.testing.assert_array_equal(decode(carry, parts, 3)[1], decode(carry, other, 3)[1])


@NAMES
def test_what_is_not_finite_lasts_until_the_next_keyframe(name: str) -> None:
    _, encode, decode = compiled(name)
    x = stream(5)
    x[2, 1, 7] = np.nan
    got = np.asarray(decode(encode(x)))
    assert np.isnan(got[2:EVERY, 1]).any(-1).all()
    assert np.isfinite(got[EVERY:]).all()
    assert np.isfinite(got[:, 0]).all()
    assert np.isfinite(got[:2]).all()


@NAMES
@pytest.mark.parametrize("keyframe_every", [0, EVERY])
@pytest.mark.parametrize("scale", [1e30, 5e37, float(np.finfo(np.float32).max)])
def test_every_finite_number_has_a_finite_code(name: str, keyframe_every: int, scale: float) -> None:
    """A stream that changes its sign from slot to slot: no difference is larger."""
    _, encode, decode = compiled(name, keyframe_every)
    x = np.broadcast_to(np.where(np.arange(SLOTS)[:, None, None] % 2, -scale, scale) * SIGNS, (SLOTS, 2, HIDDEN))
    got = np.asarray(decode(encode(x.astype(np.float32))), np.float64)
    assert np.isfinite(got).all()
    small = decode(encode((np.clip(x, -LARGEST, LARGEST) * 2.0**-100).astype(np.float32)))
    np.testing.assert_array_equal(got, np.asarray(small, np.float64) * 2.0**100)


@NAMES
def test_zeros_are_exact(name: str) -> None:
    _, encode, decode = compiled(name)
    assert not np.asarray(decode(encode(np.zeros((SLOTS, 2, HIDDEN), np.float32)))).any()
