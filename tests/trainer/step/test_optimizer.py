"""The schedule, and per-block AdamW with clipping against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distillcache.schemas.config.train import MeshConfig, OptimizerConfig, TrainConfig
from distillcache.trainer.run.stages import resolve_stages, warm_up_note
from distillcache.trainer.step.optimizer import (
    clip_all,
    init_blocks,
    learning_rate_schedule,
    make_optimizer,
    update_blocks,
)


def test_schedule_rises_and_falls():
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=4, final_fraction=0.25), steps=24)
    rates = np.array([float(schedule(step)) for step in range(25)])
    np.testing.assert_allclose(rates[:5], [0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6)
    progress = np.arange(21) / 20
    np.testing.assert_allclose(rates[4:], 0.5 + 1.5 * (1 + np.cos(np.pi * progress)) / 2, rtol=1e-5)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 5), (10, 2), (1, 1)])
def test_short_runs_have_a_rate(warmup, steps):
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=warmup), steps)
    assert all(0 < float(schedule(step)) <= 1 for step in range(steps))


@pytest.mark.parametrize(("warmup", "steps", "highest"), [(10, 5, 0.5), (10, 10, 0.95), (1, 1, 0.5), (100, 1, 0.015)])
def test_a_stage_that_ends_within_its_warm_up_is_told(warmup: int, steps: int, highest: float) -> None:
    optimizer = {"learning_rate": 1.0, "warmup_steps": warmup}
    spec = TrainConfig.model_validate({"run": "r", "cache": "c", "steps": steps, "optimizer": optimizer})
    [stage] = resolve_stages(spec, MeshConfig())
    rates = [float(learning_rate_schedule(stage.optimizer, steps)(step)) for step in range(steps)]
    note = warm_up_note(stage)
    assert note is not None
    assert max(rates) == pytest.approx(highest, abs=0.05)
    assert f"reaches {max(rates):.2g} at most, not 1;" in note
    assert "optimizer.warmup_steps" in note


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (10, 11), (4, 24)])
def test_a_stage_that_reaches_its_rate_is_not(warmup: int, steps: int) -> None:
    spec = TrainConfig.model_validate({"run": "r", "cache": "c", "steps": steps, "optimizer": {"warmup_steps": warmup}})
    [stage] = resolve_stages(spec, MeshConfig())
    assert warm_up_note(stage) is None
    assert max(float(learning_rate_schedule(stage.optimizer, steps)(step)) for step in range(steps)) == pytest.approx(
        stage.optimizer.learning_rate
    )


def adam_by_hand(
    config: OptimizerConfig, rates: np.ndarray, gradients: list[np.ndarray], value: np.ndarray
) -> np.ndarray:
    """AdamW with clipping, one block, one matrix, double precision."""
    first = second = np.zeros_like(value)
    for count, gradient in enumerate(gradients, start=1):
        clipped = gradient * min(1.0, config.clip_norm / np.linalg.norm(gradient))
        first = config.b1 * first + (1 - config.b1) * clipped
        second = config.b2 * second + (1 - config.b2) * clipped**2
        step = (first / (1 - config.b1**count)) / (np.sqrt(second / (1 - config.b2**count)) + config.eps)
        value = value - rates[count - 1] * (step + config.weight_decay * value)
    return value


def test_each_block_is_clipped_and_moved_alone():
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, clip_norm=1.0, weight_decay=0.1)
    optimizer, rng = make_optimizer(config, 10), np.random.default_rng(0)
    value = rng.normal(size=(3, 4, 5))
    # Block 1's gradient is huge: clipped together, the others would hardly move.
    gradients = [rng.normal(size=(3, 4, 5)) * np.array([0.1, 1e4, 1.0])[:, None, None] for _ in range(3)]
    trained = jnp.ones(3, bool)
    parameters = {"q": jnp.float32(value)}
    state = init_blocks(optimizer, parameters)
    for gradient in gradients:
        parameters, state = update_blocks(optimizer, {"q": jnp.float32(gradient)}, state, parameters, trained)
    rates = np.array([float(learning_rate_schedule(config, 10)(step)) for step in range(3)])
    for block in range(3):
        expected = adam_by_hand(config, rates, [gradient[block] for gradient in gradients], value[block])
        np.testing.assert_allclose(parameters["q"][block], expected, rtol=1e-5)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e10, 1e20, 1e38])
def test_clipping_is_that_of_optax_and_holds_where_squares_overflow(size: float):
    rng = np.random.default_rng(0)
    unit = {"q": rng.normal(size=(4, 5)), "norm": rng.uniform(-1, 1, 4)}
    gradients = {name: jnp.asarray(size * value, jnp.float32) for name, value in unit.items()}
    found = clip_all(gradients, 2.0)
    if size < 1e19:
        jax.tree.map(
            np.testing.assert_array_equal,
            found,
            optax.clip_by_global_norm(2.0).update(gradients, optax.EmptyState())[0],
        )
    norm = np.sqrt(sum(np.square(value).sum() for value in unit.values()))
    factor = min(1.0, 2.0 / (norm * size)) * size
    for name, value in unit.items():
        np.testing.assert_allclose(found[name], value * factor, rtol=1e-5)


def test_every_leaf_of_the_state_has_the_block_axis():
    state = init_blocks(
        make_optimizer(OptimizerConfig(learning_rate=1e-3), 10), {"q": jnp.ones((3, 4, 5)), "norm": jnp.ones((3, 4))}
    )
    assert {leaf.shape[0] for leaf in jax.tree.leaves(state)} == {3}
    assert sum(leaf.shape == (3,) for leaf in jax.tree.leaves(state)) == 2  # the counts of Adam and of the schedule


def test_a_block_that_is_not_trained_stands_still():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3, weight_decay=0.5), 10)
    parameters = {"q": jnp.ones((2, 4, 5))}
    state = init_blocks(optimizer, parameters)
    moved, new = update_blocks(optimizer, parameters, state, parameters, jnp.array([True, False]))
    np.testing.assert_array_equal(moved["q"][1], parameters["q"][1])
    assert not np.array_equal(moved["q"][0], parameters["q"][0])
    for after, before in zip(jax.tree.leaves(new), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(after[1], before[1])


def test_norms_and_biases_do_not_decay():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3, weight_decay=0.5, warmup_steps=0), 10)
    parameters = {name: jnp.ones((2, 4)) for name in ("norm", "q_bias", "q")}
    zeros = jax.tree.map(jnp.zeros_like, parameters)
    moved, _ = update_blocks(optimizer, zeros, init_blocks(optimizer, parameters), parameters, jnp.ones(2, bool))
    assert {name: bool((value == 1).all()) for name, value in moved.items()} == {
        "norm": True,
        "q_bias": True,
        "q": False,
    }
