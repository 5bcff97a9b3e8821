"""Every loss against NumPy in double precision, and what masks and zeros do to it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distillcache.trainer.losses import (
    blockwise_cosine_loss,
    blockwise_l2_loss,
    blockwise_relative_l2_loss,
    feature_loss,
    next_token_loss,
)

LOSSES = [blockwise_cosine_loss, blockwise_l2_loss, blockwise_relative_l2_loss]


@pytest.fixture
def features() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """student and teacher `[L, B, T, D]`, mask `[B, T]`."""
    rng = np.random.default_rng(0)
    mask = rng.random((3, 7)) > 0.3
    return rng.normal(size=(4, 3, 7, 16)), rng.normal(size=(4, 3, 7, 16)), mask


def cosine(s: np.ndarray, t: np.ndarray) -> np.ndarray:
    size = np.sqrt(np.maximum((s**2).sum(-1), 1e-6)) * np.sqrt(np.maximum((t**2).sum(-1), 1e-6))
    return 1 - (s * t).sum(-1) / size


ORACLES = {
    blockwise_cosine_loss: cosine,
    blockwise_l2_loss: lambda s, t: ((s - t) ** 2).mean(-1),
    blockwise_relative_l2_loss: lambda s, t: ((s - t) ** 2).sum(-1) / (t**2).sum(-1),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_against_numpy(loss, features):
    student, teacher, mask = features
    found = loss(jnp.float32(student), jnp.float32(teacher), mask)
    expected = np.where(mask, ORACLES[loss](student, teacher), 0).sum((1, 2))
    np.testing.assert_allclose(found.total, expected, rtol=2e-6)
    assert found.weight == mask.sum()
    np.testing.assert_allclose(found.mean, expected / mask.sum(), rtol=2e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_one_block_is_a_slice_of_the_stack(loss, features):
    student, teacher, mask = (jnp.asarray(value) for value in features)
    one = loss(student[2], teacher[2], mask)
    assert one.total.shape == ()
    np.testing.assert_allclose(one.total, loss(student, teacher, mask).total[2], rtol=1e-6)


def test_maxtext_means(features):
    """MaxText divides the masked sum of all blocks by tokens times blocks; ours is the mean of the blocks' means."""
    student, teacher, mask = (jnp.asarray(value, jnp.float32 if value.dtype != bool else bool) for value in features)
    valid = jnp.sum(mask) * student.shape[0]
    distance = optax.cosine_distance(student, teacher, axis=-1, epsilon=1e-6)
    square = jnp.mean(jnp.square(student - teacher), axis=-1)
    for loss, values in ((blockwise_cosine_loss, distance), (blockwise_l2_loss, square)):
        maxtext = jnp.sum(values * mask[None]) / valid
        np.testing.assert_allclose(jnp.mean(loss(student, teacher, mask).mean), maxtext, rtol=1e-6)


def test_the_mix_is_the_weighted_sum(features):
    student, teacher, mask = (jnp.asarray(value) for value in features)
    mixed = feature_loss(student, teacher, mask, relative_l2=0.5, cosine=2.0, l2=3.0)
    parts = (
        (0.5, blockwise_relative_l2_loss),
        (2.0, blockwise_cosine_loss),
        (3.0, blockwise_l2_loss),
    )
    expected = sum(share * loss(student, teacher, mask).total for share, loss in parts)
    np.testing.assert_allclose(mixed.total, expected, rtol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_zeros_have_finite_losses_and_gradients(loss):
    ones, zeros, mask = jnp.ones((2, 3, 8)), jnp.zeros((2, 3, 8)), jnp.ones((2, 3), bool)
    for student, teacher in ((zeros, ones), (ones, zeros), (zeros, zeros)):
        value, gradient = jax.value_and_grad(lambda s, t=teacher: loss(s, t, mask).total)(student)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_nan_in_the_padding_stays_there(loss, features):
    student, teacher, mask = (jnp.asarray(value) for value in features)
    dirty = [jnp.where(mask[..., None], value, jnp.nan) for value in (student, teacher)]
    value, gradient = jax.value_and_grad(lambda s: loss(s, dirty[1], mask).total.sum())(dirty[0])
    clean, expected = jax.value_and_grad(lambda s: loss(s, teacher, mask).total.sum())(student)
    assert value == clean
    np.testing.assert_array_equal(gradient, expected)
    assert not gradient[:, ~mask].any()


@pytest.mark.parametrize("loss", LOSSES)
def test_padding_alone_is_zero(loss, features):
    student, teacher, mask = (jnp.asarray(value) for value in features)
    nothing = jnp.zeros_like(mask)
    value, gradient = jax.value_and_grad(lambda s: loss(s, teacher, nothing).total.sum())(student)
    assert value == 0
    assert not gradient.any()
    assert np.isnan(loss(student, teacher, nothing).mean).all()  # a mean of nothing is no number


@pytest.mark.parametrize("loss", [blockwise_l2_loss, blockwise_relative_l2_loss])
def test_equal_features_have_no_loss(loss, features):
    _, teacher, mask = (jnp.asarray(value) for value in features)
    value, gradient = jax.value_and_grad(lambda s: loss(s, teacher, mask).total.sum())(teacher)
    assert value == 0
    assert not gradient.any()


def test_bfloat16_is_widened_first(features):
    student, _, mask = (jnp.asarray(value) for value in features)
    close = (student * 1.01).astype(jnp.bfloat16)
    s, t = np.asarray(student.astype(jnp.bfloat16), np.float64), np.asarray(close, np.float64)
    expected = np.where(mask, ORACLES[blockwise_relative_l2_loss](s, t), 0).sum((1, 2))
    found = blockwise_relative_l2_loss(student.astype(jnp.bfloat16), close, mask)
    assert found.total.dtype == jnp.float32
    np.testing.assert_allclose(found.total, expected, rtol=1e-5)


def test_next_tokens_within_documents():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(2, 6, 11)) * 5
    tokens = rng.integers(0, 11, (2, 6))
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
    counts = np.ones((2, 6), bool)
    counts[1, 4] = False
    total, weight = 0.0, 0
    for b in range(2):
        for t in range(5):
            if segments[b, t] == segments[b, t + 1] != 0 and counts[b, t + 1]:
                row = logits[b, t]
                total += np.log(np.exp(row).sum()) - row[tokens[b, t + 1]]
                weight += 1
    found = next_token_loss(jnp.float32(logits), jnp.asarray(tokens), jnp.asarray(segments), jnp.asarray(counts))
    np.testing.assert_allclose(found.total, total, rtol=1e-6)
    assert found.weight == weight == 7


SIZES = [(np.float32, 1e20), (np.float32, 3e38), (jnp.bfloat16, 1e20), (jnp.bfloat16, 3e38), (np.float16, 6e4)]


@pytest.mark.parametrize(("dtype", "size"), SIZES, ids=str)
@pytest.mark.parametrize("loss", [blockwise_cosine_loss, blockwise_relative_l2_loss])
def test_scale_free_losses_hold_where_squares_overflow(loss, dtype, size, features):
    rng = np.random.default_rng(1)
    student, teacher = (jnp.asarray(size * rng.uniform(-1, 1, (3, 7, 16)), dtype) for _ in range(2))
    mask = jnp.asarray(features[2])
    found, slope = jax.value_and_grad(lambda s: loss(s, teacher, mask).total)(student.astype(jnp.float32))
    s, t = (np.asarray(each, np.float64) for each in (student, teacher))
    np.testing.assert_allclose(found, np.where(mask, ORACLES[loss](s, t), 0).sum(), rtol=1e-5)
    assert np.isfinite(slope).all()
    if size > 1e30:
        return  # of such slopes float32 knows none
    unit = jnp.asarray(s / size, jnp.float32)
    expected = jax.grad(lambda s: loss(s, jnp.asarray(t / size, jnp.float32), mask).total)(unit)
    np.testing.assert_allclose(np.asarray(slope, np.float64) * size, expected, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("loss", [blockwise_cosine_loss, blockwise_relative_l2_loss])
def test_one_side_may_be_large(loss):
    """A student's outputs that explode beside an ordinary teacher: the cosine is right, the rest no number."""
    student, teacher = np.float32([[[3e25, 4e25]]]), np.float32([[[1.0, 0.0]]])
    found = float(loss(jnp.asarray(student), jnp.asarray(teacher), jnp.ones((1, 1), bool)).total)
    assert found == (pytest.approx(0.4) if loss is blockwise_cosine_loss else np.inf)  # the trainer stops at inf
