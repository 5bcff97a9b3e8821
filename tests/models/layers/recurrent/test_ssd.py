"""The chunked recurrence of Mamba-2 against the recurrence itself, in float64, one token after the other."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillcache.models.layers.recurrent.convolution import document_runs
from distillcache.models.layers.recurrent.ssd import state_space
from tests.models.layers.recurrent.test_delta_rule import GRADIENT, OUTPUT, assert_close, packed_ids


class Given(NamedTuple):
    """Arguments, float64."""

    q: Any
    k: Any
    v: Any
    log_decay: Any


def drawn(length: int, *, rate: float = 0.1, seed: int = 0) -> Given:
    """Random arguments of two groups of three heads; rate: of the decay, of which some tokens have a hundred times as
    much."""
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(2, 2, length, 2, 5))
    decay = -rate * rng.exponential(size=(2, length, 6)) * rng.choice([1, 1, 1, 100], size=(2, length, 1))
    return Given(q, k, rng.normal(size=(2, length, 6, 7)), decay)


def stepwise(given: Given, ids: np.ndarray) -> Any:
    """The recurrence, with a state that is cleared where a document begins."""
    starts = jnp.asarray(np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)), constant_values=True))

    def step(state: Any, part: Any) -> Any:
        q, k, v, decay, start = part
        q, k = (jnp.repeat(each, 3, axis=1) for each in (q, k))
        state = jnp.where(start[:, None, None, None], 0, state) * jnp.exp(decay)[..., None, None]
        state = state + k[..., None] * v[..., None, :]
        return state, jnp.einsum("bnd,bnde->bne", q, state)

    parts = jax.tree.map(lambda part: jnp.swapaxes(part, 0, 1), (*given, starts))
    return jnp.swapaxes(jax.lax.scan(step, jnp.zeros((2, 6, 5, 7)), parts)[1], 0, 1)


def both(given: Given, ids: np.ndarray, chunk: int) -> tuple[Any, Any, Any, Any]:
    """Outputs and gradients: of the chunks in float32, and of the recurrence in float64."""
    above = np.random.default_rng(1).normal(size=given.v.shape)

    def of(way: Any, *parts: Any) -> Any:
        def loss(parts: Any) -> Any:
            out = way(Given(*parts))
            return jnp.sum(out * above), out

        (_, out), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(parts)
        return np.asarray(out), [np.asarray(slope) for slope in slopes]

    runs = document_runs(jnp.asarray(ids))
    found = of(lambda given: state_space(*given, runs, chunk=chunk), *map(jnp.float32, given))
    with jax.enable_x64(True):
        expected = of(lambda given: stepwise(given, ids), *map(jnp.asarray, given))
    assert expected[0].dtype == np.float64
    return *found, *expected


@pytest.mark.parametrize(
    ("length", "chunk", "packed"), [(1, 64, False), (37, 8, True), (64, 64, False), (150, 64, True)]
)
def test_chunks_are_the_recurrence(length: int, chunk: int, packed: bool):
    """Lengths that chunks divide and do not; documents that begin within chunks and on their edges."""
    given, ids = drawn(length, rate=0.01 if packed else 0.1), np.ones((2, length), int)
    if packed:
        ids = packed_ids(length)
        ids[:, chunk:] += ids[:, chunk:] > 0
    out, slopes, expected, expected_slopes = both(given, ids, chunk)
    assert_close(out, expected, OUTPUT)
    for found, exact in zip(slopes, expected_slopes, strict=True):
        # Of a row of one token the decay has no gradient.
        assert np.abs(found - exact).max() <= GRADIENT * np.abs(exact).max()


def test_rows_do_not_depend_on_what_is_padding():
    given, ids = drawn(40), packed_ids(40)
    real = ids > 0
    other = Given(*(np.where(real.reshape(*ids.shape, *[1] * (p.ndim - 2)), p, 0.3 * p) for p in given))
    runs = document_runs(jnp.asarray(ids))
    run = jax.jit(lambda *parts: state_space(*parts, runs, chunk=16))
    found, changed = (np.asarray(run(*map(jnp.float32, each))) for each in (given, other))
    np.testing.assert_array_equal(found[real], changed[real])
    assert np.isfinite(changed).all()


def test_strong_decay_leaves_the_digits_of_weak_one():
    """One token forgets all; a difference of sums from the chunk's start would round those behind it to 1e-4."""
    given, ids = drawn(64, rate=1e-3), np.ones((2, 64), int)
    given.log_decay[:, 9] = -3e3
    out, _, expected, _ = both(given, ids, 64)
    assert_close(out, expected, OUTPUT)
