"""A dense MLP made into experts computes what it did, and is a model that everybody has."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from distillcache.models.config import ModelConfig
from distillcache.models.decoder import Decoder
from distillcache.models.surgery import Scores, apply_surgery
from distillcache.schemas.config.student import SurgeryOp
from distillcache.schemas.errors import ConfigError
from tests.models.conftest import randomized
from tests.models.surgery.test_operate import blocks_of, logits_of

TOKENS = jnp.arange(11)[None]


def upcycle(**values: object) -> SurgeryOp:
    return SurgeryOp.model_validate({"op": "upcycle", "experts": 4, **values})


def same(found: Decoder, expected: Decoder) -> None:
    """Equal to rounding, of logits up to about 5."""
    np.testing.assert_allclose(logits_of(found, TOKENS), logits_of(expected, TOKENS), atol=2e-5)


@pytest.mark.parametrize(
    ("change", "family"),
    [({}, "mixtral"), ({"qk_norm": "head"}, "qwen3_moe"), ({"qkv_bias": True}, "qwen2_moe")],
    ids=["llama", "qwen3", "qwen2"],
)
def test_copies_compute_the_dense_model(tiny_config: ModelConfig, change: dict, family: str):
    """Whatever the router says: the weights of the chosen ones sum to 1."""
    teacher = randomized(Decoder(replace(tiny_config, **change)))
    student = apply_surgery(teacher, [upcycle(router_std=1.0)])
    assert (student.config.family, student.config.moe_config.expert_size) == (family, 40)
    same(student, teacher)
    for old, new in zip(blocks_of(teacher), blocks_of(student), strict=True):
        for name, value in old.items():
            expected = (
                np.broadcast_to(value, (4, *value.shape)) if name in ("mlp/gate", "mlp/up", "mlp/down") else value
            )
            np.testing.assert_array_equal(new[name], expected)


@pytest.mark.parametrize("by", ["index", "weight_norm", "importance"])
def test_all_parts_together_are_the_dense_model(tiny: Decoder, by: str):
    scores = Scores(tuple({"F": np.random.default_rng(at).random(40)} for at in range(3)), np.zeros(36))
    student = apply_surgery(tiny, [upcycle(how="partition", top_k=4, router_std=0.0, by=by)], scores)
    assert student.config.moe_config.expert_size == 10
    same(student, tiny)
    for at, (old, new) in enumerate(zip(blocks_of(tiny), blocks_of(student), strict=True)):
        columns = np.concatenate(list(new["mlp/gate"]), axis=1)
        order = [int(np.flatnonzero((old["mlp/gate"] == column[:, None]).all(0))[0]) for column in columns.T]
        assert sorted(order) == list(range(40))
        if by == "index":
            assert order == sorted(order)
        if by == "importance":  # dealt out by falling worth: the four best are with four experts
            best = np.argsort(-scores.blocks[at]["F"])[:4]
            assert len({order.index(int(neuron)) // 10 for neuron in best}) == 4


def test_noise_and_router_depend_on_the_seed_alone(tiny: Decoder):
    first, again, other = (
        blocks_of(apply_surgery(tiny, [upcycle(noise=0.1, seed=seed, top_k=1)])) for seed in (3, 3, 4)
    )
    for name in ("mlp/gate", "mlp/down", "mlp/router"):
        np.testing.assert_array_equal(first[1][name], again[1][name])
        assert not np.array_equal(first[1][name], other[1][name])
    spread = np.std(first[1]["mlp/gate"] - blocks_of(tiny)[1]["mlp/gate"])
    assert abs(spread / np.std(blocks_of(tiny)[1]["mlp/gate"]) - 0.1) < 0.01
    assert abs(np.std(first[1]["mlp/router"]) - 0.02) < 0.004


def test_some_blocks_alone(tiny_config: ModelConfig):
    teacher = randomized(Decoder(replace(tiny_config, qk_norm="head")))
    student = apply_surgery(teacher, [upcycle(blocks=[1])])
    assert [kind.moe for kind in student.config.kinds] == [False, True, False]
    same(student, teacher)


def test_cut_and_then_upcycled(tiny: Decoder):
    ops = [SurgeryOp(op="mlp_width", to=32), upcycle(how="partition", experts=8)]
    assert apply_surgery(tiny, ops).config.moe_config.expert_size == 4


@pytest.mark.parametrize(
    ("change", "values", "named"),
    [
        ({}, {"how": "partition", "experts": 3}, "a divisor of 40"),
        ({}, {"top_k": 5}, "at most 4"),
        ({}, {"blocks": [7]}, "0 to 2"),
        ({"mlp_bias": True}, {}, "biases in the MLPs"),
        ({"norms": "both"}, {}, "not mixtral"),
    ],
    ids=["width", "top_k", "blocks", "biases", "family"],
)
def test_refusals(tiny_config: ModelConfig, change: dict, values: dict, named: str):
    with pytest.raises(ConfigError, match="cannot be done") as caught:
        apply_surgery(Decoder(replace(tiny_config, **change)), [upcycle(**values)])
    assert named in str(caught.value)
    assert "upcycle" in str(caught.value)
