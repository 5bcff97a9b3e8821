"""Losses over the whole vocabulary against NumPy in double precision: values, gradients, masks, meshes and memory."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from distillcache.models.head import LogitShape
from distillcache.trainer.head_losses import (
    Divergence,
    HeadLosses,
    HeadSums,
    HeadWeights,
    Side,
)

DIVERGENCES = [
    Divergence("forward"),
    Divergence("reverse"),
    Divergence("skew", 0.1),
    Divergence("jsd", 0.5),
    Divergence("jsd", 0.1),
]
WEIGHTS = HeadWeights(0.7, 0.3, 1.7)
BATCH, LENGTH = 3, 13
IDS = 97


def fields(ids: int = IDS) -> dict[str, np.ndarray]:
    """Packed rows: two documents and padding in one, a mask with holes in another."""
    rng = np.random.default_rng(1)
    segments = np.ones((BATCH, LENGTH), np.int32)
    segments[0, 6:], segments[1, 9:] = 2, 0
    mask = np.ones((BATCH, LENGTH), bool)
    mask[2, ::3] = False
    return {
        "tokens": rng.integers(0, ids, (BATCH, LENGTH)).astype(np.int32),
        "segment_ids": segments,
        "loss_mask": mask,
    }


def sides(
    losses: HeadLosses, columns: tuple[int, int] = (IDS, IDS), widths: tuple[int, int] = (16, 24)
) -> tuple[Side, Side]:
    rng = np.random.default_rng(0)

    def one(shape: LogitShape, count: int, width: int) -> Side:
        head = rng.normal(size=(width, count)).astype(np.float32)
        stream = rng.normal(size=(BATCH, LENGTH, width)).astype(np.float32)
        return Side(jnp.asarray(stream), jnp.asarray(head.T if shape.tied else head))

    return one(losses.student, columns[0], widths[0]), one(losses.teacher, columns[1], widths[1])


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(log_softmax(logits))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(q, 1e-300))), 0.0).sum(-1)


def distance(divergence: Divergence, t: np.ndarray, s: np.ndarray) -> np.ndarray:
    if divergence.direction in ("forward", "reverse"):
        return kl(t, s) if divergence.direction == "forward" else kl(s, t)
    mixture = divergence.share * t + (1 - divergence.share) * s
    if divergence.direction == "skew":
        return kl(t, mixture)
    return divergence.share * kl(t, mixture) + (1 - divergence.share) * kl(s, mixture)


def by_probability(divergence: Divergence, t: np.ndarray, s: np.ndarray) -> np.ndarray:
    """The derivative of `distance` by s, up to a constant."""
    a = divergence.share
    if divergence.direction == "forward":
        return -t / s
    if divergence.direction == "reverse":
        return np.log(s) - np.log(t)
    mixture = a * t + (1 - a) * s
    if divergence.direction == "skew":
        return -(1 - a) * t / mixture
    return (1 - a) * (np.log(s) - np.log(mixture))


def oracle(
    losses: HeadLosses, student: Side, teacher: Side, weights: HeadWeights, rows: Mapping[str, np.ndarray]
) -> tuple[float, list[float], np.ndarray, np.ndarray]:
    """The loss, its sums in the order of `HeadSums`, and the gradients by the student's stream and head."""
    heads, logits, products = [], [], []
    for shape, side in ((losses.student, student), (losses.teacher, teacher)):
        head = np.asarray(side.head, np.float64)
        heads.append(head.T if shape.tied else head)
        product = np.asarray(side.stream, np.float64) @ heads[-1] / shape.divisor
        products.append(product)
        logits.append(product if shape.softcap is None else shape.softcap * np.tanh(product / shape.softcap))
    real = losses.real_vocab or logits[0].shape[-1]
    z, its = (side[..., :real] for side in logits)
    targets = np.pad(rows["tokens"][:, 1:], ((0, 0), (0, 1)))
    segments = rows["segment_ids"]
    counts = np.zeros_like(rows["loss_mask"])
    counts[:, :-1] = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0) & rows["loss_mask"][:, 1:]
    entropies = [-np.take_along_axis(log_softmax(side), targets[..., None], -1)[..., 0] for side in (z, its)]
    t, s = softmax(its / weights.tau), softmax(z / weights.tau)
    per_token = (
        distance(losses.divergence, t, s),
        kl(softmax(its), softmax(z)),
        *entropies,
        z.argmax(-1) == its.argmax(-1),
        np.ones(counts.shape),
    )
    sums = [float(np.where(counts, value, 0.0).sum()) for value in per_token]
    inner = by_probability(losses.divergence, t, s)
    slope = weights.divergence / weights.tau * s * (inner - (s * inner).sum(-1, keepdims=True))
    slope = slope + weights.cross_entropy * (softmax(z) - (targets[..., None] == np.arange(real)))
    slope = np.where(counts[..., None], slope, 0.0)
    slope = np.pad(slope, ((0, 0), (0, 0), (0, logits[0].shape[-1] - real))) / losses.student.divisor
    if losses.student.softcap is not None:
        slope = slope * (1 - np.tanh(products[0] / losses.student.softcap) ** 2)
    of_head = np.einsum("btd,btv->dv", np.asarray(student.stream, np.float64), slope)
    total = weights.divergence * sums[0] + weights.cross_entropy * sums[2]
    return total, sums, slope @ heads[0].T, of_head.T if losses.student.tied else of_head


def run(
    losses: HeadLosses, student: Side, teacher: Side, weights: HeadWeights, rows: Mapping[str, Any]
) -> tuple[Any, HeadSums, Any, Any]:
    def loss(stream: Any, head: Any) -> Any:
        return losses(Side(stream, head), teacher, weights, **rows)

    (total, sums), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*student)
    assert np.array_equal(jax.jit(lambda stream, head: loss(stream, head)[0])(*student), total)
    return total, sums, *gradients


def near(found: Any, expected: Any, relative: float = 1e-6) -> None:
    """Within `relative` of the largest number."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=relative * np.abs(expected).max())


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize(
    "shapes",
    [
        (LogitShape(), LogitShape()),
        (LogitShape(2.0, 15.0), LogitShape(1.5, 30.0, tied=True)),
        (LogitShape(softcap=5.0, tied=True), LogitShape()),
    ],
    ids=["plain", "capped", "tied"],
)
def test_values_and_gradients(divergence: Divergence, shapes: tuple[LogitShape, LogitShape]) -> None:
    losses = HeadLosses(divergence, *shapes, tile_logits=7 * IDS)  # the last of the tiles is not full
    student, teacher = sides(losses)
    total, sums, of_stream, of_head = run(losses, student, teacher, WEIGHTS, fields())
    expected = oracle(losses, student, teacher, WEIGHTS, fields())
    near(total, expected[0])
    for found, right in zip(sums, expected[1], strict=True):
        near(found, right)
    near(of_stream, expected[2])
    near(of_head, expected[3])


@pytest.mark.parametrize("columns", [(101, 101), (IDS, 104), (112, 99)])
@pytest.mark.parametrize("tied", [False, True])
def test_padded_vocabularies(columns: tuple[int, int], tied: bool) -> None:
    losses = HeadLosses(Divergence("jsd"), LogitShape(tied=tied), LogitShape(tied=tied), real_vocab=IDS)
    student, teacher = sides(losses, columns)
    total, sums, of_stream, of_head = run(losses, student, teacher, WEIGHTS, fields())
    expected = oracle(losses, student, teacher, WEIGHTS, fields())
    near(total, expected[0])
    near(sums, expected[1])
    near(of_stream, expected[2])
    near(of_head, expected[3])
    of_padding = of_head[IDS:] if tied else of_head[:, IDS:]
    assert not np.any(of_padding)


def test_heads_of_other_lengths_need_the_vocabulary() -> None:
    losses = HeadLosses()
    with pytest.raises(ValueError, match="97 and 104 columns"):
        losses(*sides(losses, (97, 104)), WEIGHTS, **fields())


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("distance_of_logits", [1e-2, 1e-4, 1e-6])
def test_near_convergence(divergence: Divergence, distance_of_logits: float) -> None:
    """Logits are the streams themselves (the heads are ones on a diagonal): all of the error is the divergence's."""
    rng = np.random.default_rng(2)
    its = rng.normal(scale=4.0, size=(BATCH, LENGTH, IDS)).astype(np.float32)
    own = (its + rng.normal(scale=distance_of_logits, size=its.shape)).astype(np.float32)
    one = np.eye(IDS, dtype=np.float32)
    student, teacher = Side(jnp.asarray(own), jnp.asarray(one)), Side(jnp.asarray(its), jnp.asarray(one))
    losses, weights = HeadLosses(divergence), HeadWeights(1.0, 0.0, 1.0)
    total, sums, of_stream, _ = run(losses, student, teacher, weights, fields())
    t, s = log_softmax(its.astype(np.float64)), log_softmax(own.astype(np.float64))
    x = s - t
    terms = {  # series of each up to x^3, which is below 1e-6 of it at these distances: the plain formula loses digits
        "forward": x**2 / 2 + x**3 / 6,
        "reverse": x**2 / 2 + x**3 / 3,
    }.get(divergence.direction)
    if terms is None or distance_of_logits > 1e-3:
        expected = oracle(losses, student, teacher, weights, fields())
        tolerance = 1e-5 if distance_of_logits > 1e-5 else 1e-2  # of the oracle: it subtracts what is nearly equal
        near(total, expected[0], tolerance)
        near(of_stream, expected[2], 1e-5)
        return
    counts = np.asarray(oracle_counts(fields()))
    near(total, (np.exp(t) * terms).sum(-1)[counts].sum(), 2e-5)
    near(sums.kl, (np.exp(t) * (x**2 / 2 + x**3 / 6)).sum(-1)[counts].sum(), 2e-5)


def oracle_counts(rows: Mapping[str, np.ndarray]) -> np.ndarray:
    segments = rows["segment_ids"]
    counts = np.zeros_like(rows["loss_mask"])
    counts[:, :-1] = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0) & rows["loss_mask"][:, 1:]
    return counts


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_a_teacher_as_its_own_student(divergence: Divergence) -> None:
    losses = HeadLosses(divergence, LogitShape(softcap=30.0), LogitShape(softcap=30.0))
    student, _ = sides(losses)
    total, sums, of_stream, _ = run(losses, student, student, HeadWeights(1.0, 0.0, 2.0), fields())
    # XLA may fuse the two soft caps differently, so their logits differ in the last bit.
    assert 0 <= total < 1e-9
    assert 0 <= sums.kl < 1e-9
    assert sums.agreement == sums.targets > 0
    assert np.abs(of_stream).max() < 1e-6


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_logits_that_are_far_apart(divergence: Divergence) -> None:
    """A student that is sure of what the teacher rules out: differences of some 300, where e^x is beyond float32."""
    losses = HeadLosses(divergence)
    student, teacher = sides(losses)
    student, teacher = Side(20 * student.stream, student.head), Side(-9 * student.stream, student.head)
    total, _, of_stream, of_head = run(losses, student, teacher, HeadWeights(1.0, 0.1, 1.0), fields())
    expected = oracle(losses, student, teacher, HeadWeights(1.0, 0.1, 1.0), fields())
    assert expected[0] > 10
    near(total, expected[0])
    if divergence.direction != "forward":  # the oracle's t / s has no meaning where s is 0
        near(of_stream, expected[2], 5e-5)  # float32 rounds logits of 300 to 3e-5
    assert np.all(np.isfinite(of_stream))
    assert np.all(np.isfinite(of_head))


def test_masked_tokens_reach_nothing() -> None:
    losses = HeadLosses(tile_logits=5 * IDS)
    student, teacher = sides(losses)
    rows = fields()
    counts = oracle_counts(rows)
    clean = run(losses, student, teacher, WEIGHTS, rows)
    dirty = [Side(jnp.where(counts[..., None], side.stream, jnp.nan), side.head) for side in (student, teacher)]
    found = run(losses, *dirty, WEIGHTS, rows)
    jax.tree.map(np.testing.assert_array_equal, found, clean)
    assert not np.any(np.asarray(found[2])[~counts])
    rows["loss_mask"][:] = False
    total, sums, *gradients = run(losses, *dirty, WEIGHTS, rows)
    assert total == 0
    assert not any(sums)
    assert not any(np.any(gradient) for gradient in gradients)


def test_tiles_do_not_matter() -> None:
    losses = HeadLosses(Divergence("skew", 0.2))
    student, teacher = sides(losses)
    whole = run(losses, student, teacher, WEIGHTS, fields())
    for tokens in (1, 38):
        found = run(replace(losses, tile_logits=int(tokens * IDS)), student, teacher, WEIGHTS, fields())
        jax.tree.map(lambda a, b: near(a, b, 1e-6), found, whole)


def test_a_large_vocabulary() -> None:
    ids = 151_936
    losses = HeadLosses(tile_logits=4 * ids)
    student, teacher = (Side(side.stream[:1, :7], side.head / 2) for side in sides(losses, (ids, ids), widths=(4, 4)))
    rows = {name: value[:1, :7] for name, value in fields(ids).items()}
    total, sums, of_stream, of_head = run(losses, student, teacher, WEIGHTS, rows)
    expected = oracle(losses, student, teacher, WEIGHTS, rows)
    near(total, expected[0])
    for found, right in zip(sums, expected[1], strict=True):
        near(found, right)
    near(of_stream, expected[2], 3e-6)  # tests compile unoptimised sums, one number after the other
    near(of_head, expected[3])


def test_bfloat16_is_compared_in_float32() -> None:
    """Streams and heads in bfloat16 against the oracle on the same rounded numbers."""
    losses = HeadLosses()
    student, teacher = jax.tree.map(lambda x: x.astype(jnp.bfloat16), sides(losses))
    total, _, of_stream, of_head = run(losses, student, teacher, WEIGHTS, fields())
    expected = oracle(losses, student, teacher, WEIGHTS, fields())
    near(total, expected[0])
    assert of_stream.dtype == of_head.dtype == jnp.bfloat16
    near(of_stream.astype(np.float32), expected[2], 2**-7)  # the gradients themselves are rounded


@pytest.mark.parametrize(
    ("axes", "ids", "tied"),
    [((2, 1, 2), 96, False), ((1, 3, 1), IDS, False), ((1, 1, 4), 96, True), ((3, 1, 2), IDS, True)],
)
def test_meshes(axes: tuple[int, int, int], ids: int, tied: bool) -> None:
    """Rows over data and fsdp, the vocabulary over tensor, where it can be cut."""
    rows = fields(ids)
    rows = {name: np.concatenate([value, value[::-1]]) for name, value in rows.items()}
    losses = HeadLosses(
        Divergence("jsd", 0.3), LogitShape(softcap=20.0, tied=tied), real_vocab=ids - 3, tile_logits=4 * ids
    )
    rows["tokens"] %= ids - 3
    student, teacher = sides(losses, (ids, ids))
    student, teacher = (
        Side(jnp.concatenate([side.stream, 0.5 * side.stream]), side.head) for side in (student, teacher)
    )
    expected = run(losses, student, teacher, WEIGHTS, rows)
    devices = np.array(jax.devices()[: int(np.prod(axes))]).reshape(axes)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        found = run(losses, student, teacher, WEIGHTS, rows)
    jax.tree.map(lambda a, b: near(a, b, 2e-6), found, expected)


def temporaries(loss: Any, *arguments: Any) -> int:
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile()
    analysis = compiled.memory_analysis()
    return analysis.temp_size_in_bytes


def test_logits_exist_for_a_few_tokens_at_a_time() -> None:
    """XLA's own count of a gradient's temporaries, at the sizes of an 0.6B student, against the plain formula's."""
    ids, width, shape = 151_936, 1024, (8, 512)
    stream, head = jax.ShapeDtypeStruct((*shape, width), jnp.float32), jax.ShapeDtypeStruct((width, ids), jnp.float32)
    rows = {
        "tokens": jnp.zeros(shape, jnp.int32),
        "segment_ids": jnp.ones(shape, jnp.int32),
        "loss_mask": jnp.ones(shape, bool),
    }

    def ours(stream: Any, head: Any, its: Any, teacher: Any) -> Any:
        return HeadLosses()(Side(stream, head), Side(its, teacher), HeadWeights(1.0, 0.0, 1.0), **rows)[0]

    def plain(stream: Any, head: Any, its: Any, teacher: Any) -> Any:
        own, target = jax.nn.log_softmax(stream @ head), jax.nn.log_softmax(its @ teacher)
        return jnp.sum(jnp.exp(target) * (target - own))

    arguments = stream, head, stream, head
    assert temporaries(ours, *arguments) < temporaries(plain, *arguments) / 8


def test_a_frozen_head_costs_no_gradient() -> None:
    losses = HeadLosses()
    student, teacher = sides(losses)

    def products(names: tuple[int, ...]) -> int:
        def loss(stream: Any, head: Any) -> Any:
            return losses(Side(stream, head), teacher, WEIGHTS, **fields())[0]

        return str(jax.make_jaxpr(jax.grad(loss, names))(*student)).count("dot_general")

    assert products((0, 1)) == 4  # both sides' logits, and two gradients
    assert products((0,)) == products((1,)) == 3
