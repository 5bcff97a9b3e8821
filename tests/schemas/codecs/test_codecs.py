"""Each codec against its error bound, an independent NumPy reading of its bytes, and the ways in which it is used."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distillcache.schemas.codecs import CODECS, Codec, get_codec, make_signs, take_slot
from distillcache.schemas.codecs.quantise import LARGEST, Quantiser
from distillcache.schemas.codecs.rotate import Rotation, block_size, hadamard
from distillcache.schemas.errors import ConfigError
from distillcache.schemas.format.layout import ITEM_BYTES
from tests.rounding import assert_rounded

HIDDEN = 96  # three groups of 32; a Hadamard block of 32
SIGNS = make_signs("a plan", HIDDEN)
INTEGERS: list[dict[str, Any]] = [
    {"name": name, "group": group, "signs": signs}
    for name in ("int8", "int4")
    for group in (None, 0)
    for signs in (None, SIGNS)
]
EVERY: list[dict[str, Any]] = [{"name": name} for name in ("bf16", "f32", "fp8")] + INTEGERS
COMMON = settings(max_examples=25, deadline=None)


def label(options: dict[str, Any]) -> str:
    rotated = "-rotated" if options.get("signs") is not None else ""
    return f"{options['name']}-{options.get('group')}{rotated}"


codecs = functools.partial(pytest.mark.parametrize, "options", ids=label)


@functools.cache
def jitted(key: int) -> tuple[Codec, Any, Any]:
    """The codec of `EVERY[key]`; its jitted encode and decode."""
    codec = get_codec(**EVERY[key])
    return codec, jax.jit(codec.encode), jax.jit(codec.decode)


def compiled(options: dict[str, Any]) -> tuple[Codec, Any, Any]:
    return jitted(next(key for key, value in enumerate(EVERY) if value is options))


def by_fours(run: Callable[[Any], Any], given: Any) -> Any:
    """The results for all rows of calls of four each: the shape that the tests here have compiled already."""
    count = len(jax.tree.leaves(given)[0])
    found = [run(jax.tree.map(lambda leaf, at=at: leaf[at : at + 4], given)) for at in range(0, count, 4)]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)


def heavy_tailed(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    """Mostly normal numbers with outliers in fixed dimensions, as residual streams have."""
    random = np.random.default_rng(seed)
    x = random.standard_t(4, shape) * scale
    x[..., 3] *= 300
    return x.astype(np.float32)


def numpy_hadamard(size: int) -> np.ndarray:
    """By its closed form: entry (i, j) is -1 to the number of ones that i and j share."""
    rows = np.arange(size)
    shared = np.bitwise_count(rows[:, None] & rows[None, :])
    return (-1.0) ** shared / np.sqrt(size)


def numpy_rotate(x: np.ndarray, signs: np.ndarray | None) -> np.ndarray:
    if signs is None:
        return x.astype(np.float64)
    size = block_size(x.shape[-1])
    return ((x * signs).reshape(*x.shape[:-1], -1, size) @ numpy_hadamard(size)).reshape(x.shape)


def numpy_scales(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale bytes read as their documentation says, by arithmetic instead of bits: values and shapes."""
    top = stored[..., :1].astype(np.int64)
    steps = (stored[..., 1:] & 127).astype(np.int64)
    octave, mantissa = np.divmod(steps, 8)
    exponent = top - 127 - 15 + octave
    return np.where(steps == 0, 0.0, 2.0**exponent * (1 + mantissa / 8)), stored[..., 1:] >> 7


def numpy_restore(name: str, parts: dict[str, np.ndarray]) -> np.ndarray:
    """Rotated numbers in float64."""
    codes = parts["codes"].astype(np.int64)
    if name == "int4":
        codes = 2 * np.concatenate([codes % 16, codes // 16], -1) - 15
    largest, divisor = (127, 64) if name == "int8" else (15, 1)
    scale, shape = numpy_scales(parts["scale"])
    size = codes.shape[-1] // scale.shape[-1]
    scale, shape = np.repeat(scale, size, -1), np.repeat(shape, size, -1)
    bracket = np.where(shape == 0, 20 * largest**2 + 10 * codes**2, 27 * largest**2 + 3 * codes**2)
    return codes * np.floor(bracket / divisor + 0.5 * (divisor > 1)) * scale


def per_group(name: str, y: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    size = y.shape[-1] if name == "fp8" or options.get("group") == 0 else 32
    return y.reshape(*y.shape[:-1], -1, size)


@codecs(EVERY)
def test_parts_are_what_encode_returns(options: dict[str, Any]) -> None:
    codec = compiled(options)[0]
    parts = jax.eval_shape(codec.encode, jnp.ones((2, 3, HIDDEN)))
    declared = {part.name: ((2, 3, part.width), part.dtype) for part in codec.parts(HIDDEN)}
    assert {name: (part.shape, str(part.dtype)) for name, part in parts.items()} == declared
    assert jax.eval_shape(codec.decode, parts).shape == (2, 3, HIDDEN)
    assert all(part.dtype in ITEM_BYTES and part.every == 1 for part in codec.parts(HIDDEN))


@codecs(EVERY)
@given(seed=st.integers(0, 2**32), power=st.integers(-40, 40))
@COMMON
def test_error_stays_within_half_a_level(options: dict[str, Any], seed: int, power: int) -> None:
    _, encode, decode = compiled(options)
    x = heavy_tailed(seed, (4, HIDDEN), 2.0**power)
    got = np.asarray(decode(encode(x)), np.float64)
    y, z = numpy_rotate(x, options.get("signs")), numpy_rotate(got, options.get("signs"))
    name = options["name"]
    if name in ("bf16", "f32"):
        np.testing.assert_allclose(got, x, rtol=2**-8 if name == "bf16" else 0)
        return
    error, largest = (np.abs(per_group(name, array, options)) for array in (y - z, y))
    top = largest.max(-1, keepdims=True)
    if name == "fp8":  # three bits of mantissa, or the spacing of its denormals; the scale itself is rounded
        assert (error <= np.maximum(largest * 2**-4, top * 2**-17) * 1.02).all()
    elif name == "int8":
        # Half the widest spacing (5/3 of a 127th) of the covering scale (at most 9/8 of what is needed).
        assert (error <= top * (5 / 6 / 127 * 9 / 8) * 1.01).all()
    else:  # the search may cut numbers, but only if the group gains: half the widest spacing of shape 1
        assert (np.sqrt(np.mean(error**2, -1, keepdims=True)) <= top * (1.2 / 15 * 9 / 8)).all()


@codecs(INTEGERS)
@given(seed=st.integers(0, 2**32))
@COMMON
def test_bytes_mean_what_the_documentation_says(options: dict[str, Any], seed: int) -> None:
    _, encode, decode = compiled(options)
    x = heavy_tailed(seed, (4, HIDDEN))
    parts = encode(x)
    restored = numpy_restore(options["name"], {name: np.asarray(part) for name, part in parts.items()})
    wanted = numpy_rotate(restored, options["signs"])
    if options["signs"] is not None:  # the transform is its own inverse; the signs come after it
        size = block_size(HIDDEN)
        wanted = (restored.reshape(4, -1, size) @ numpy_hadamard(size)).reshape(4, HIDDEN) * options["signs"]
    np.testing.assert_allclose(decode(parts), wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@given(seed=st.integers(0, 2**32))
@COMMON
def test_fp8_and_bf16_are_the_types_of_ml_dtypes(seed: int) -> None:
    x = heavy_tailed(seed, (4, HIDDEN))
    bits = np.asarray(get_codec("bf16").encode(jnp.asarray(x))["codes"])
    np.testing.assert_array_equal(bits, x.astype(ml_dtypes.bfloat16).view(np.uint16))
    parts = get_codec("fp8").encode(jnp.asarray(x))
    codes, scale = (np.asarray(parts[name]) for name in ("codes", "scale"))
    wanted = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale.view(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(get_codec("fp8").decode(parts), wanted)


@codecs(EVERY)
def test_zeros_are_exact(options: dict[str, Any]) -> None:
    _, encode, decode = compiled(options)
    x = heavy_tailed(0, (4, HIDDEN))
    x[1] = 0
    x[2, 32:] = 0  # whole groups, and whole Hadamard blocks
    got = np.asarray(decode(encode(x)), np.float32)
    assert not got[1].any()
    if options.get("group") is None and options["name"] != "fp8":
        assert not got[2, 32:].any()


@codecs(INTEGERS)
@given(seed=st.integers(0, 2**32), power=st.integers(-30, 30))
@COMMON
def test_a_power_of_two_changes_only_the_scales(options: dict[str, Any], seed: int, power: int) -> None:
    _, encode, decode = compiled(options)
    x = heavy_tailed(seed, (4, HIDDEN))
    plain, scaled = encode(x), encode(x * np.float32(2.0**power))
    np.testing.assert_array_equal(plain["codes"], scaled["codes"])
    np.testing.assert_array_equal(np.asarray(decode(plain)) * np.float32(2.0**power), decode(scaled))


@codecs(EVERY)
@pytest.mark.parametrize("scale", [1e30, 5e37, float(np.finfo(np.float32).max)])
@pytest.mark.parametrize("aligned", [False, True])
def test_every_finite_number_has_a_finite_code(options: dict[str, Any], scale: float, aligned: bool) -> None:
    """Beyond a codec's range as its largest; up to there as 2^-100 times the number is, multiplied in float64."""
    _, encode, decode = compiled(options)
    x = np.random.default_rng(0).uniform(-1, 1, (4, HIDDEN)) * scale
    if aligned:  # all of a Hadamard block end in one number, which is sqrt(32) times as large
        x = np.where(np.arange(4)[:, None] % 2, -scale, scale) * (SIGNS if options.get("signs") is not None else 1.0)
        x = np.broadcast_to(x, (4, HIDDEN))
    got = np.asarray(decode(encode(x.astype(np.float32))), np.float64)
    assert np.isfinite(got).all()
    if options["name"] in ("int8", "int4"):
        small = decode(encode((np.clip(x, -LARGEST, LARGEST) * 2.0**-100).astype(np.float32)))
        np.testing.assert_array_equal(got, np.asarray(small, np.float64) * 2.0**100)
    else:
        bound = {"f32": 0, "bf16": 2**-8, "fp8": 2**-4 * 1.02}[options["name"]]
        assert (np.abs(got - x) <= bound * np.abs(x) + 1e-4 * bound * scale + 1e-7 * scale).all()


@codecs(EVERY)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_seen_and_stays_in_its_token(options: dict[str, Any], bad: float) -> None:
    _, encode, decode = compiled(options)
    x = heavy_tailed(0, (4, HIDDEN))
    clean = np.asarray(decode(encode(x)), np.float32)
    x[2, 40] = bad
    got = np.asarray(decode(encode(x)), np.float32)
    assert not np.isfinite(got[2, 40])
    np.testing.assert_array_equal(got[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.bits
@codecs(EVERY)
def test_same_bits_every_time_and_decoding_in_every_program(options: dict[str, Any]) -> None:
    codec, encode, decode = compiled(options)
    x = heavy_tailed(1, (16, HIDDEN))
    parts = by_fours(encode, x)
    for name, part in by_fours(encode, x).items():
        np.testing.assert_array_equal(part, parts[name])
    # The usual codecs an operation at a time, which takes twenty programs each; the others in another batch.
    eager = not isinstance(codec, Quantiser) or (options["group"] is None and options["signs"] is SIGNS)
    other = codec.encode(jnp.asarray(x)) if eager else encode(np.concatenate([x[::-1], x]))
    codes = np.asarray(other["codes"])[-len(x) :]
    # A multiply-add that one program fuses and another does not moves a number across the edge between two codes.
    assert np.mean(codes != parts["codes"]) < 0.01
    batch = parts if eager else {name: part[:5] for name, part in parts.items()}
    rows = len(batch["codes"])
    assert_rounded((codec.decode if eager else decode)(batch), by_fours(decode, parts)[:rows])
    if isinstance(codec, Quantiser):
        restore = jax.jit(codec.restore)
        again = (codec.restore if eager else restore)(batch)
        np.testing.assert_array_equal(again, by_fours(restore, parts)[:rows])


@pytest.mark.bits
@codecs([one for one in EVERY if one.get("group") is None and one.get("signs", SIGNS) is SIGNS])  # groups know no slots
def test_slots_of_a_memoryless_codec_are_coded_alone(options: dict[str, Any]) -> None:
    codec, encode, decode = compiled(options)
    x = heavy_tailed(2, (4, HIDDEN))
    carry, parts = jax.jit(codec.encode_slot)(codec.start(x.shape), x, 5)
    assert carry is None
    assert codec.first_slot(5) == 5
    assert np.mean(np.asarray(parts["codes"]) != np.asarray(encode(x)["codes"])) < 0.01
    assert_rounded(jax.jit(codec.decode_slot)(None, parts, 5)[1], decode(parts))


def test_groups_and_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="do not fit"):
        get_codec("int8", group=64).parts(HIDDEN)
    with pytest.raises(ConfigError, match="pairs"):
        get_codec("int4").parts(33)
    with pytest.raises(ConfigError, match="no such codec"):
        get_codec("int2")
    with pytest.raises(ConfigError, match="integer codecs"):
        get_codec("bf16", delta=True)
    with pytest.raises(ConfigError, match="keyframe_every"):
        get_codec("int8", delta=True, keyframe_every=-1)


@pytest.mark.parametrize("hidden", [24, 33, 640])
def test_any_hidden_size_has_a_default(hidden: int) -> None:
    x = heavy_tailed(0, (2, hidden))
    for name in CODECS if hidden % 2 == 0 else ("bf16", "fp8", "int8"):
        codec = get_codec(name, signs=make_signs("x", hidden)) if name.startswith("int") else get_codec(name)
        round_trip = jax.jit(lambda x, codec=codec: codec.decode(codec.encode(x)))
        got = np.asarray(round_trip(x), np.float32)
        assert np.linalg.norm(got - x) < 0.12 * np.linalg.norm(x)


@pytest.mark.parametrize(("hidden", "size"), [(576, 64), (24, 8), (33, 1), (4096, 128)])
def test_rotation_is_orthonormal_in_blocks(hidden: int, size: int) -> None:
    assert block_size(hidden) == size
    np.testing.assert_allclose(hadamard(size), numpy_hadamard(size), atol=1e-7)
    rotation, x = Rotation(make_signs("x", hidden)), heavy_tailed(0, (3, hidden))
    y = np.asarray(rotation.forward(jnp.asarray(x)))
    np.testing.assert_allclose(y, numpy_rotate(x, rotation.signs), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(rotation.backward(y), x, rtol=1e-4, atol=1e-3)


def test_signs_are_a_function_of_the_seed() -> None:
    signs = make_signs("a plan", 5000)
    assert signs.dtype == np.int8
    assert set(np.unique(signs)) == {-1, 1}
    assert abs(int(signs.sum())) < 300
    np.testing.assert_array_equal(signs[:HIDDEN], SIGNS)
    assert SIGNS[:16].tolist() == [-1, 1, 1, -1, 1, -1, 1, 1, 1, 1, 1, -1, 1, -1, 1, -1]
    assert (make_signs("another", 5000) != signs).any()


def test_take_slot_indexes_every_part_by_its_own_slots() -> None:
    codec = get_codec("int8", delta=True, keyframe_every=4)
    parts = codec.parts(HIDDEN)
    stacks = {part.name: jnp.arange(part.slots(10))[:, None] for part in parts}
    assert {name: stack.shape[0] for name, stack in stacks.items()} == {
        "codes": 10,
        "scale": 10,
        "key": 3,
        "key_scale": 3,
    }
    taken = jax.jit(lambda slot: take_slot(stacks, parts, slot))(9)
    assert {name: int(value[0]) for name, value in taken.items()} == {"codes": 9, "scale": 9, "key": 2, "key_scale": 2}
