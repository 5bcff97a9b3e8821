"""The chunked gated delta rule against the recurrence itself: NumPy in float64, one token after the other."""

from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillcache.models.layers.recurrent.convolution import document_runs
from distillcache.models.layers.recurrent.delta_rule import channel_delta_rule, gated_delta_rule, unit_lower_inverse

# Of the largest value, in float32.
OUTPUT, GRADIENT = 2e-6, 2e-5


class Given(NamedTuple):
    """Arguments of the rule, float64."""

    q: Any
    k: Any
    v: Any
    log_decay: Any
    strength: Any


def drawn(
    length: int, *, batch: int = 2, groups: int = 2, served: int = 3, rate: float = 0.1, channels: bool = False
) -> Given:
    """Random arguments; rate: of the decay, of which some tokens have a hundred times as much. channels: it is each
    channel's of the key."""
    rng = np.random.default_rng(0)
    heads = groups * served
    q, k = rng.normal(size=(2, batch, length, groups, 5))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    decay = -rate * rng.exponential(size=(batch, length, heads)) * rng.choice([1, 1, 1, 100], size=(batch, length, 1))
    if channels:
        decay = decay[..., None] * rng.choice([0.01, 1, 1, 30], size=(batch, length, heads, 5))
    return Given(q, k, rng.normal(size=(batch, length, heads, 7)), decay, rng.uniform(size=(batch, length, heads)))


def packed_ids(length: int, batch: int = 2) -> np.ndarray:
    """Documents of odd lengths, the last of each row behind another number of tokens, and padding."""
    ids = np.zeros((batch, length), int)
    for row in range(batch):
        ends = [0, length // 5 + row, length // 5 + row + 1, (2 * length) // 3, length - 1 - row]
        for number, (start, stop) in enumerate(pairwise(ends), 1):
            ids[row, start:stop] = number
    return ids


def recurrence(given: Given, ids: np.ndarray) -> np.ndarray:
    """Step by step, with a state that is cleared where a document begins."""
    batch, length, groups, _ = given.q.shape
    served = given.v.shape[2] // groups
    out = np.zeros_like(given.v)
    for row, head in np.ndindex(batch, given.v.shape[2]):
        state = np.zeros((given.k.shape[-1], given.v.shape[-1]))
        for token in range(length):
            if token and ids[row, token] != ids[row, token - 1]:
                state = np.zeros_like(state)
            q, k = given.q[row, token, head // served], given.k[row, token, head // served]
            state = state * np.exp(np.reshape(given.log_decay[row, token, head], (-1, 1)))
            write = given.strength[row, token, head] * (given.v[row, token, head] - k @ state)
            state = state + np.outer(k, write)
            out[row, token, head] = q @ state
    return out


def rule(given: Given, ids: np.ndarray, chunk: int) -> Any:
    runs = document_runs(jnp.asarray(ids))
    return jax.jit(lambda *parts: rule_of(given)(*parts, runs, chunk=chunk))(*map(jnp.float32, given))


def rule_of(given: Given) -> Any:
    return gated_delta_rule if given.log_decay.ndim == 3 else channel_delta_rule


def assert_close(found: Any, expected: np.ndarray, tolerance: float) -> None:
    assert np.shape(found) == expected.shape
    assert np.abs(np.asarray(found, np.float64) - expected).max() < tolerance * np.abs(expected).max()


@pytest.mark.parametrize(("length", "chunk"), [(1, 64), (7, 4), (16, 16), (37, 8), (64, 64), (150, 64)])
def test_chunks_are_the_recurrence(length: int, chunk: int):
    """Lengths that chunks divide and do not; each row is one document."""
    given, ids = drawn(length), np.ones((2, length), int)
    assert_close(rule(given, ids, chunk), recurrence(given, ids), OUTPUT)


@pytest.mark.parametrize(("length", "chunk"), [(37, 8), (150, 64)])
def test_documents_of_a_row_do_not_see_each_other(length: int, chunk: int):
    """Boundaries within chunks and on their edges, where the recurrence clears its state; with weak decay,
    so that what leaks would be seen."""
    given, ids = drawn(length, rate=0.01), packed_ids(length)
    ids[:, chunk:] += ids[:, chunk:] > 0  # one more boundary, at a chunk's start
    assert_close(rule(given, ids, chunk), recurrence(given, ids), OUTPUT)


@pytest.mark.parametrize(("length", "chunk"), [(1, 64), (37, 8), (150, 64)])
def test_each_channel_may_decay_at_its_own_rate(length: int, chunk: int):
    """In rows of one document, and of several; strengths up to 2, and a token that forgets all."""
    given = drawn(length, channels=True, served=1, rate=0.01)
    given.strength[:] *= 2
    given.log_decay[:, length // 3] = -3e3
    for ids in (np.ones((2, length), int), packed_ids(length)):
        assert_close(rule(given, ids, chunk), recurrence(given, ids), OUTPUT)


def test_rows_do_not_depend_on_what_is_padding():
    given, ids = drawn(40), packed_ids(40)
    real = ids > 0
    other = Given(*(np.where(real.reshape(*ids.shape, *[1] * (p.ndim - 2)), p, 0.3 * p) for p in given))
    found, changed = (np.asarray(rule(each, ids, 16)) for each in (given, other))
    np.testing.assert_array_equal(found[real], changed[real])
    assert np.isfinite(changed).all()


def test_strong_decay_leaves_the_digits_of_weak_one():
    """One token forgets all; a difference of sums from the chunk's start would round those behind it to 1e-4."""
    given, ids = drawn(64, rate=1e-3), np.ones((2, 64), int)
    given.log_decay[:, 9] = -3e3
    assert_close(rule(given, ids, 64), recurrence(given, ids), OUTPUT)


def test_equal_keys_without_decay():
    """Each token overwrites the one before it; powers of the system's matrix would reach 1e17."""
    given, ids = drawn(64), np.ones((2, 64), int)
    given.k[:] = given.k[:, :1]
    given.log_decay[:] = 0
    given.strength[:] = 1
    assert_close(rule(given, ids, 64), recurrence(given, ids), OUTPUT)


def stepwise(given: Given, ids: np.ndarray) -> jax.Array:
    """The recurrence in JAX, for its gradient."""
    if given.log_decay.ndim == 3:
        given = given._replace(log_decay=given.log_decay[..., None])
    served = given.v.shape[2] // given.q.shape[2]
    starts = jnp.asarray(np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)), constant_values=True))

    def step(state: Any, part: Any) -> Any:
        q, k, v, decay, strength, start = part
        q, k = (jnp.repeat(each, served, axis=1) for each in (q, k))
        state = jnp.where(start[:, None, None, None], 0, state) * jnp.exp(decay)[..., None]
        write = strength[..., None] * (v - jnp.einsum("bnd,bnde->bne", k, state))
        state = state + k[..., None] * write[..., None, :]
        return state, jnp.einsum("bnd,bnde->bne", q, state)

    batch, _, heads, width = given.v.shape
    state = jnp.zeros((batch, heads, given.k.shape[-1], width))
    parts = jax.tree.map(lambda part: jnp.swapaxes(part, 0, 1), (*given, starts))
    return jnp.swapaxes(jax.lax.scan(step, state, parts)[1], 0, 1)


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize(("length", "chunk"), [(100, 64)])
def test_gradients_are_those_of_the_recurrence(length: int, chunk: int, channels: bool):
    served = 1 if channels else 3
    given, ids = Given(*map(jnp.float32, drawn(length, channels=channels, served=served))), packed_ids(length)
    runs, above = document_runs(jnp.asarray(ids)), jnp.float32(np.random.default_rng(1).normal(size=given.v.shape))

    def of(way: Any) -> Any:
        return jax.jit(jax.grad(lambda given: jnp.sum(way(given) * above)))(given)

    found = of(lambda given: rule_of(given)(*given, runs, chunk=chunk))
    expected = of(lambda given: stepwise(given, ids))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, np.asarray(other, np.float64), GRADIENT)


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_the_inverse_and_its_gradient(size: int):
    rng = np.random.default_rng(2)
    lower = np.tril(rng.normal(size=(3, 2, size, size)) * size**-0.5, -1)
    exact = np.linalg.inv(np.eye(size) + lower)
    assert_close(unit_lower_inverse(jnp.float32(lower)), exact, OUTPUT)
    above = rng.normal(size=exact.shape)
    slope = jax.grad(lambda x: jnp.sum(unit_lower_inverse(x) * jnp.float32(above)))(jnp.float32(lower))
    turned = exact.swapaxes(-1, -2)
    expected = np.tril(-turned @ above @ turned, -1)
    np.testing.assert_allclose(slope, expected, rtol=0, atol=GRADIENT * max(np.abs(expected).max(), 1e-9))
