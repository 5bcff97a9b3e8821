"""The losses from recorded logits against softmaxes written out in float64, and at the edges."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillcache.trainer.losses import (
    NO_MASS,
    counted_predictions,
    next_token_loss,
    support_kl,
    support_logits,
    topk_cross_entropy,
    topk_kl_loss,
)

BATCH, TOKENS, VOCAB = 3, 9, 23
# One program for each shape and option, where single operations would be compiled one by one.
compiled_kl = jax.jit(topk_kl_loss, static_argnames=("rest_bucket", "real_vocab"))
TAUS = (0.5, 1.0, 4.0)


@partial(jax.jit, static_argnames="rest_bucket")
@jax.value_and_grad
def sloped_kl(student: jax.Array, *recorded: jax.Array, tau: float, rest_bucket: bool) -> jax.Array:
    """The total of `topk_kl_loss` and its slope on the student's logits."""
    return topk_kl_loss(student, *recorded, tau=tau, rest_bucket=rest_bucket).total  # type: ignore[arg-type]


class Example(NamedTuple):
    """Both sides' logits `[B, T, V]`, and the rows' fields."""

    student: np.ndarray
    teacher: np.ndarray
    tokens: np.ndarray
    segment_ids: np.ndarray
    loss_mask: np.ndarray

    def recorded(self, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """values, ids and logsumexp of the teacher, float64."""
        ids = np.argsort(-self.teacher, axis=-1, kind="stable")[..., :k]
        total = np.log(np.exp(self.teacher).sum(-1))
        return np.take_along_axis(self.teacher, ids, -1), ids.astype(np.int32), total

    @property
    def rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.tokens, self.segment_ids, self.loss_mask

    def counted(self) -> list[tuple[int, int]]:
        """(row, position) of every prediction that counts."""
        segments = self.segment_ids
        return [
            (b, t)
            for b in range(BATCH)
            for t in range(TOKENS - 1)
            if segments[b, t] == segments[b, t + 1] != 0 and self.loss_mask[b, t + 1]
        ]


@pytest.fixture(scope="module")
def example() -> Example:
    rng = np.random.default_rng(0)
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1] * 9, [1, 2, 2, 2, 2, 2, 2, 2, 3]], np.int32)
    mask = rng.random((BATCH, TOKENS)) < 0.8
    mask[0, 3] = mask[1, 5] = False
    return Example(
        rng.normal(size=(BATCH, TOKENS, VOCAB)) * 2,
        rng.normal(size=(BATCH, TOKENS, VOCAB)) * 3,
        rng.integers(0, VOCAB, (BATCH, TOKENS), np.int32),
        segments,
        mask,
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def numpy_kl(example: Example, k: int, tau: float, rest_bucket: bool) -> tuple[float, int]:
    """Sum and count; the rest by summing what is outside, not by a difference."""
    values, ids, _ = example.recorded(k)
    total = 0.0
    for b, t in example.counted():
        teacher, student = values[b, t], example.student[b, t, ids[b, t]]
        outside = np.setdiff1d(np.arange(VOCAB), ids[b, t])
        if rest_bucket and len(outside):
            rests = (np.log(np.exp(side[b, t, outside]).sum()) for side in (example.teacher, example.student))
            teacher, student = (np.append(side, rest) for side, rest in zip((teacher, student), rests, strict=True))
        p, q = softmax(teacher / tau), softmax(student / tau)
        total += (p * np.log(p / q)).sum()
    return total, len(example.counted())


def f32(*arrays: np.ndarray) -> list[jax.Array]:
    return [jnp.asarray(array, jnp.float32 if array.dtype == np.float64 else None) for array in arrays]


def kl(example: Example, k: int, student: np.ndarray | None = None, **options: object):
    student = example.student if student is None else student
    return compiled_kl(*f32(student, *example.recorded(k), *example.rows), **options)


@pytest.mark.parametrize("rest_bucket", [False, True])
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("k", [1, 5, VOCAB - 1, VOCAB])
def test_kl_against_numpy(example: Example, k: int, tau: float, rest_bucket: bool) -> None:
    found = kl(example, k, tau=tau, rest_bucket=rest_bucket)
    total, count = numpy_kl(example, k, tau, rest_bucket)
    # One logit outside has a mass near 1e-6, of which a float32 logsumexp keeps one digit; tau 4 makes that a 30th.
    rtol = 0.02 if rest_bucket and k == VOCAB - 1 and tau > 1 else 1e-5
    np.testing.assert_allclose(found.total, total, rtol=rtol, atol=1e-5)
    assert found.weight == count == 13
    assert found.total.dtype == jnp.float32


@pytest.mark.parametrize("k", [1, 5, VOCAB])
@pytest.mark.parametrize("rows", [VOCAB, VOCAB + 1, VOCAB + 9])
def test_the_rest_has_no_padding(example: Example, rows: int, k: int) -> None:
    """A record of the tokenizer's ids, and a student with rows of padding: as if it had none, and no slope on them."""
    padded = np.concatenate([example.student, np.full((BATCH, TOKENS, rows - VOCAB), 30.0)], axis=-1)

    def loss(student: jax.Array) -> jax.Array:
        recorded = f32(*example.recorded(k), *example.rows)
        return topk_kl_loss(student, *recorded, tau=2.0, rest_bucket=True, real_vocab=VOCAB).total

    found, slope = jax.jit(jax.value_and_grad(loss))(jnp.asarray(padded, jnp.float32))
    np.testing.assert_allclose(found, numpy_kl(example, k, 2.0, rest_bucket=True)[0], rtol=1e-5)
    assert np.isfinite(slope).all()
    assert not np.asarray(slope)[..., VOCAB:].any()


def test_an_older_record_may_have_a_rest_that_no_student_can_have(example: Example) -> None:
    """Every id that counts lies in the top k, and logsumexp is of the teacher's rows of padding, too."""
    k = VOCAB
    values, ids, total = example.recorded(k)
    recorded = f32(values, ids, total + 1.0, *example.rows)  # padding has 63% of the mass
    padded = np.pad(example.student, ((0, 0), (0, 0), (0, 4)), constant_values=20.0)
    student = jnp.asarray(padded, jnp.float32)
    found = topk_kl_loss(student, *recorded, tau=1.0, rest_bucket=True, real_vocab=VOCAB).total
    np.testing.assert_allclose(found, numpy_kl(example, k, 1.0, rest_bucket=True)[0], rtol=1e-5)


@pytest.mark.parametrize("rest_bucket", [False, True])
@pytest.mark.parametrize("tau", TAUS)
def test_with_all_logits_it_is_the_whole_divergence(example: Example, tau: float, rest_bucket: bool) -> None:
    expected = 0.0
    for b, t in example.counted():
        p, q = softmax(example.teacher[b, t] / tau), softmax(example.student[b, t] / tau)
        expected += (p * (np.log(p) - np.log(q))).sum()
    np.testing.assert_allclose(kl(example, VOCAB, tau=tau, rest_bucket=rest_bucket).total, expected, rtol=1e-5)


def test_the_rest_is_the_mass_outside_at_temperature_one(example: Example) -> None:
    """By the chain rule the whole KL at 1 is that with the rest, and what the rest's inside adds."""
    k = 6
    whole, bucket = kl(example, VOCAB, tau=1.0, rest_bucket=False), kl(example, k, tau=1.0, rest_bucket=True)
    _, ids, _ = example.recorded(k)
    inside = 0.0
    for b, t in example.counted():
        outside = np.setdiff1d(np.arange(VOCAB), ids[b, t])
        p, q = softmax(example.teacher[b, t])[outside], softmax(example.student[b, t])[outside]
        inside += (p * np.log((p / p.sum()) / (q / q.sum()))).sum()
    np.testing.assert_allclose(whole.total, bucket.total + inside, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rest_bucket", [False, True])
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("k", [4, VOCAB])
def test_the_gradient_is_that_of_the_softmaxes(example: Example, k: int, tau: float, rest_bucket: bool) -> None:
    """(q - p) / tau on the support; the rest's share spreads as the student's own softmax outside."""
    values, ids, _ = example.recorded(k)
    expected = np.zeros_like(example.student)
    for b, t in example.counted():
        outside = np.setdiff1d(np.arange(VOCAB), ids[b, t])
        teacher, student = values[b, t], example.student[b, t, ids[b, t]]
        bucket = rest_bucket and len(outside) > 0
        if bucket:
            rests = (np.log(np.exp(side[b, t, outside]).sum()) for side in (example.teacher, example.student))
            teacher, student = (np.append(side, rest) for side, rest in zip((teacher, student), rests, strict=True))
        slope = (softmax(student / tau) - softmax(teacher / tau)) / tau
        expected[b, t, ids[b, t]] = slope[:k]
        if bucket:
            expected[b, t, outside] = slope[k] * softmax(example.student[b, t, outside])
    arrays = f32(example.student, *example.recorded(k), *example.rows)
    gradient = sloped_kl(*arrays, tau=tau, rest_bucket=rest_bucket)[1]
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("rest_bucket", [False, True])
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("k", [1, 4, VOCAB])
def test_a_student_like_the_teacher_has_no_loss(example: Example, k: int, tau: float, rest_bucket: bool) -> None:
    arrays = f32(example.teacher, *example.recorded(k), *example.rows)
    value, gradient = sloped_kl(*arrays, tau=tau, rest_bucket=rest_bucket)
    np.testing.assert_allclose(value, 0, atol=2e-6)  # 13 sums of some ten float32 terms
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_both_sides_have_one_support(example: Example) -> None:
    """A student that differs outside the top k alone has no loss over the top k, and some with the rest."""
    _, ids, _ = example.recorded(4)
    student = example.teacher + 2.0
    np.put_along_axis(student, ids, np.take_along_axis(example.teacher, ids, -1), -1)
    np.testing.assert_allclose(kl(example, 4, student, tau=2.0, rest_bucket=False).total, 0, atol=2e-6)
    assert kl(example, 4, student, tau=2.0, rest_bucket=True).total > 0.1


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("error", [0.0, 0.1, -1e-7, 1e-7])
def test_a_rest_that_rounding_took_away_is_none(example: Example, tau: float, error: float) -> None:
    """The recorded logsumexp says that there is less than the values hold, as much, or a rounding more."""
    values, ids, _ = example.recorded(5)
    inside = np.log(np.exp(values).sum(-1))
    arrays = f32(example.student, values, ids, inside - error, *example.rows)
    value, gradient = sloped_kl(*arrays, tau=tau, rest_bucket=True)
    assert np.isfinite(value)
    assert value >= 0
    assert np.isfinite(gradient).all()
    support = support_logits(*arrays[:4], counted_predictions(*arrays[5:]), rest_bucket=True)
    assert set(np.unique(support.teacher[..., -1]).tolist()) == {np.float32(NO_MASS)}
    p = [softmax(values[b, t] / tau) for b, t in example.counted()]
    q = [student_with_rest(example.student[b, t], ids[b, t], tau) for b, t in example.counted()]
    expected = sum((p * np.log(p / q)).sum() for p, q in zip(p, q, strict=True))
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def student_with_rest(logits: np.ndarray, ids: np.ndarray, tau: float) -> np.ndarray:
    """The student's shares of the ids, its rest counted in."""
    outside = np.log(np.exp(np.delete(logits, ids)).sum())
    return softmax(np.append(logits[ids], outside) / tau)[:-1]


@pytest.mark.parametrize("k", [5, VOCAB])
@pytest.mark.parametrize("tau", TAUS)
def test_values_of_eight_bits(example: Example, k: int, tau: float) -> None:
    """Rounding to bfloat16 moves a small rest by more than its size, but never to NaN."""
    values, ids, logsumexp = example.recorded(k)
    rounded = np.asarray(jnp.asarray(values, jnp.bfloat16).astype(jnp.float32), np.float64)
    arrays = f32(example.student, rounded, ids, logsumexp, *example.rows)
    value, gradient = sloped_kl(*arrays, tau=tau, rest_bucket=True)
    assert value >= 0
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    alone = compiled_kl(*arrays, tau=tau, rest_bucket=False)
    np.testing.assert_allclose(alone.total, numpy_kl(example, k, tau, False)[0], rtol=0.02)  # 2^-9 of values up to 9


def test_a_student_that_rules_everything_else_out(example: Example) -> None:
    """-inf outside the top k, as masked vocabularies have it."""
    _, ids, _ = example.recorded(4)
    student = np.full_like(example.student, -np.inf)
    np.put_along_axis(student, ids, np.take_along_axis(example.student, ids, -1), -1)
    arrays = f32(student, *example.recorded(4), *example.rows)
    gradient = sloped_kl(*arrays, tau=1.0, rest_bucket=True)[1]
    assert np.isfinite(gradient).all()
    found = kl(example, 4, student, tau=2.0, rest_bucket=False)
    np.testing.assert_allclose(found.total, kl(example, 4, tau=2.0, rest_bucket=False).total, rtol=1e-6)


def test_padding_alone_is_zero(example: Example) -> None:
    arrays = f32(example.student, *example.recorded(4), example.tokens, 0 * example.segment_ids, example.loss_mask)
    for rest_bucket in (False, True):
        value, gradient = sloped_kl(*arrays, tau=2.0, rest_bucket=rest_bucket)
        assert value == 0
        assert not gradient.any()
    found = topk_cross_entropy(*arrays[1:])
    assert [(float(each.total), float(each.weight)) for each in found] == [(0, 0)] * 3
    assert all(np.isnan(each.mean) for each in found)


@pytest.mark.parametrize("rest_bucket", [False, True])
def test_what_is_not_finite_in_the_padding_stays_there(example: Example, rest_bucket: bool) -> None:
    student, values, ids, logsumexp, *rows = f32(example.student, *example.recorded(4), *example.rows)
    counts = counted_predictions(*rows[1:])
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        dirty = [jnp.where(counts[..., None], array, bad) for array in (student, values)]
        total = jnp.where(counts, logsumexp, bad)

        def loss(s: jax.Array, values: jax.Array, logsumexp: jax.Array) -> jax.Array:
            return topk_kl_loss(s, values, ids, logsumexp, *rows, tau=2.0, rest_bucket=rest_bucket).total

        value, gradient = jax.value_and_grad(loss)(dirty[0], dirty[1], total)
        clean, expected = jax.value_and_grad(loss)(student, values, logsumexp)
        assert value == clean
        np.testing.assert_array_equal(gradient, expected)
        assert not gradient[~counts].any()
        for one, other in zip(
            topk_cross_entropy(dirty[1], ids, total, *rows),
            topk_cross_entropy(values, ids, logsumexp, *rows),
            strict=True,
        ):
            np.testing.assert_array_equal(one, other)


def test_the_mask_is_the_targets(example: Example) -> None:
    """Masking token t + 1 takes out the prediction of position t, and no other."""
    student, values, ids, logsumexp, *_ = f32(example.student, *example.recorded(4), *example.rows)
    ones, all_on = jnp.ones((BATCH, TOKENS), jnp.int32), jnp.ones((BATCH, TOKENS), bool)

    def gradient(mask: jax.Array) -> jax.Array:
        def loss(s: jax.Array) -> jax.Array:
            return topk_kl_loss(s, values, ids, logsumexp, ones, ones, mask, tau=1.0, rest_bucket=True).total

        return jax.grad(loss)(student)

    whole, without = gradient(all_on), gradient(all_on.at[1, 5].set(False))
    changed = np.argwhere(np.any(np.asarray(whole != without), axis=-1)).tolist()
    assert changed == [[1, 4]]
    assert not without[1, 4].any()
    assert not whole[:, -1].any()
    assert not gradient(all_on.at[:, 1:].set(False)).any()  # a first token is nobody's target


def test_all_token_losses_count_the_same(example: Example) -> None:
    rows = f32(*example.rows)
    logits, record = f32(example.student)[0], f32(*example.recorded(4))
    counts = counted_predictions(*rows[1:])
    assert sorted(map(tuple, np.argwhere(counts).tolist())) == sorted(example.counted())
    weights = [
        next_token_loss(logits, *rows).weight,
        topk_kl_loss(logits, *record, *rows, tau=1.0, rest_bucket=False).weight,
        topk_cross_entropy(*record, *rows).share.weight,
        topk_cross_entropy(*record, *rows).at_least.weight,
    ]
    assert {float(weight) for weight in weights} == {13.0}


def test_row_by_row_and_by_halves(example: Example) -> None:
    """What a caller with a large vocabulary does: rows mapped, one support for several temperatures."""
    arrays = f32(example.student, *example.recorded(4), *example.rows)
    counts = counted_predictions(*arrays[5:])

    def one(row: list[jax.Array]) -> list[jax.Array]:
        student, values, ids, logsumexp, mask = (value[None] for value in row)
        support = support_logits(student, values, ids, logsumexp, mask, rest_bucket=True)
        return [support_kl(support, mask, tau).total for tau in TAUS]

    totals = jax.lax.map(one, [*arrays[:4], counts])
    for tau, total in zip(TAUS, totals, strict=True):
        whole = topk_kl_loss(*arrays, tau=tau, rest_bucket=True)
        np.testing.assert_allclose(jnp.sum(total), whole.total, rtol=1e-6)


def test_temperature_may_be_traced_and_bfloat16_is_widened(example: Example) -> None:
    arrays = f32(example.student, *example.recorded(4), *example.rows)
    low = arrays[0].astype(jnp.bfloat16)
    found = jax.jit(lambda tau: topk_kl_loss(low, *arrays[1:], tau=tau, rest_bucket=True))(2.0)
    wide = topk_kl_loss(low.astype(jnp.float32), *arrays[1:], tau=2.0, rest_bucket=True)
    assert found.total.dtype == jnp.float32
    np.testing.assert_allclose(found.total, wide.total, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 5, VOCAB])
def test_the_teachers_own_cross_entropy(example: Example, k: int) -> None:
    values, ids, logsumexp = example.recorded(k)
    covered, least, true = [], [], []
    for b, t in example.counted():
        logits, target = example.teacher[b, t], example.tokens[b, t + 1]
        loss = np.log(np.exp(logits).sum()) - logits[target]
        true.append(loss)
        if target in ids[b, t]:
            covered.append(loss)
        least.append(loss if target in ids[b, t] else logsumexp[b, t] - values[b, t, -1])
    found = topk_cross_entropy(*f32(values, ids, logsumexp, *example.rows))
    np.testing.assert_allclose(found.covered.total, sum(covered), rtol=1e-5, atol=1e-6)
    assert found.covered.weight == len(covered)
    np.testing.assert_allclose(found.share.mean, len(covered) / len(true), rtol=1e-6)
    np.testing.assert_allclose(found.at_least.mean, np.mean(least), rtol=1e-5)
    assert found.at_least.total <= sum(true) * (1 + 1e-6)
    if k == VOCAB:
        np.testing.assert_allclose(found.covered.mean, np.mean(true), rtol=1e-5)
        assert found.share.mean == 1
