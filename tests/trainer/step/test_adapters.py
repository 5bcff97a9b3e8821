"""Adapters in a step: their gradient against that of whole weights, in both modes, and what they may be."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distillcache.models.adapters import adapted_matrices, adapter_names, is_adapter, sides
from distillcache.models.decoder import Decoder
from distillcache.schemas.codecs import get_codec
from distillcache.schemas.config.student import LoraConfig
from distillcache.schemas.config.train import LossConfig, OptimizerConfig
from distillcache.schemas.errors import ConfigError
from distillcache.trainer.step.adapters import make_adapters
from distillcache.trainer.step.feature import FeatureStep
from distillcache.trainer.step.optimizer import make_optimizer
from distillcache.trainer.step.parameters import Parameters, all_parameters, choose_trained
from distillcache.trainer.step.stack import BlockRules, StudentStack
from distillcache.trainer.step.targets import TapReading, block_targets, student_spans
from tests.rounding import SUMS
from tests.trainer.conftest import blockwise, random_batch

RANK, ALPHA = 3, 7.0
BOTH = LossConfig.model_validate({"mlp": {"weight": 0.5}})
TARGETS = ["attention", "mlp"]
RULES = BlockRules(runs_mlp=True, mlp_input="student")


def assert_close(found: Any, expected: Any) -> None:
    """Two programs, one of them with a factor more in each product."""
    largest = np.abs(expected).max(initial=0.0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=3 * SUMS * largest)


def adapters_of(decoder: Decoder, targets: list[str] | None = None) -> Parameters:
    """Neither side of them zeros."""
    shapes = {name: value.shape for name, value in all_parameters(decoder).items()}
    made = make_adapters(LoraConfig(rank=RANK, alpha=ALPHA, targets=targets or TARGETS), shapes, seed=1)
    rng = np.random.default_rng(2)
    return {name: jnp.asarray(rng.normal(0, 0.2, value.shape), jnp.float32) for name, value in made.items()}


def with_added(parameters: Parameters, adapters: Parameters) -> Parameters:
    """By NumPy in double precision."""
    found = dict(parameters)
    for matrix in adapted_matrices(adapters):
        a, b = (np.asarray(adapters[name], np.float64) for name in adapter_names(matrix))
        added = ALPHA / RANK * np.einsum("lir,lro->lio", a, b).reshape(found[matrix].shape)
        found[matrix] = jnp.asarray(np.asarray(found[matrix], np.float64) + added, jnp.float32)
    return found


def chained(gradients: Parameters, adapters: Parameters) -> dict[str, np.ndarray]:
    """The adapters' gradients of those of whole weights: dA = s dW B', dB = s A' dW."""
    found = {}
    for matrix in adapted_matrices(adapters):
        names = adapter_names(matrix)
        a, b = (np.asarray(adapters[name], np.float64) for name in names)
        of_whole = np.asarray(gradients[matrix], np.float64).reshape(len(a), a.shape[1], b.shape[2])
        found[names[0]] = ALPHA / RANK * np.einsum("lio,lro->lir", of_whole, b)
        found[names[1]] = ALPHA / RANK * np.einsum("lir,lio->lro", a, of_whole)
    return found


def blocks_of(parameters: Parameters) -> Parameters:
    return {name: value for name, value in parameters.items() if name.startswith("groups/")}


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_blockwise_gradient_is_that_of_whole_weights(mixed: Decoder, micro_batches: int) -> None:
    """The whole weights' is that of one micro-batch."""
    batch, rules = random_batch(mixed.config, codec="f32"), replace(RULES, adapter_alpha=ALPHA)
    own, adapters = blocks_of(all_parameters(mixed)), adapters_of(mixed)
    step, targets = blockwise(mixed, BOTH, codec="f32", rules=rules, micro_batches=micro_batches)
    found, sums, _ = jax.jit(step.gradients)(adapters, own, batch, targets, jnp.int32(0))
    plain, targets = blockwise(mixed, BOTH, codec="f32", rules=RULES)
    whole = with_added(own, adapters)
    matrices = {name: whole[name] for name in adapted_matrices(adapters)}
    rest = {name: value for name, value in whole.items() if name not in matrices}
    expected, of_whole, _ = jax.jit(plain.gradients)(matrices, rest, batch, targets, jnp.int32(0))
    assert set(found) == set(adapters)
    for name, value in chained(expected, adapters).items():
        assert_close(found[name], value)
        assert np.abs(value).max() > 0
    jax.tree.map(assert_close, sums, of_whole)


def feature_step(decoder: Decoder, alpha: float | None, **options: Any) -> tuple[FeatureStep, Any]:
    depth = decoder.config.num_blocks
    places = [{"attn_out": {at: at for at in range(depth)}}] * depth
    targets = block_targets(
        decoder.config, student_spans(decoder.config, depth, None), places, {0: 1.0, depth - 1: 2.0}
    )
    reading = TapReading({"attn_out": get_codec("f32")}, decoder.config.hidden_size, in_step=False)
    made = make_optimizer(OptimizerConfig(learning_rate=1e-3), 10, clips=False)  # type: ignore[arg-type]
    graph, stack = nnx.graphdef(decoder), StudentStack(decoder)
    return FeatureStep(graph, stack, reading, LossConfig(), made, 1.0, 10, adapter_alpha=alpha, **options), targets


@pytest.mark.parametrize(
    ("model", "place", "options"),
    [
        ("mixed", 1, {"remat": "none"}),  # two layer groups, one with two places
        ("student", 0, {"remat": "block", "micro_batches": 3}),
        ("student", 0, {"remat": "dots"}),
    ],
    ids=str,
)
def test_feature_gradient_is_that_of_whole_weights(
    model: str, place: int, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """The stream of every block reaches the next."""
    decoder: Decoder = request.getfixturevalue(model)
    batch = random_batch(decoder.config, codec="f32")
    del batch["resid"]
    own = all_parameters(decoder)
    adapters = adapters_of(decoder, ["attention", "mlp/up", f"groups/0/blocks/{place}/mlp/down"])
    step, targets = feature_step(decoder, ALPHA, **options)
    found, sums = jax.jit(step.gradients)(adapters, own, batch, targets, jnp.int32(0))
    plain, _ = feature_step(decoder, None)
    whole = with_added(own, adapters)
    matrices = {name: whole[name] for name in adapted_matrices(adapters)}
    rest = {name: value for name, value in whole.items() if name not in matrices}
    expected, of_whole = jax.jit(plain.gradients)(matrices, rest, batch, targets, jnp.int32(0))
    assert set(found) == set(adapters)
    for name, value in chained(expected, adapters).items():
        assert_close(found[name], value)
        assert np.abs(value).max() > 0
    jax.tree.map(assert_close, sums, of_whole)


def test_bfloat16_rounds_the_sum(student: Decoder) -> None:
    """W + A B in float32, then bfloat16: an addition below bfloat16's steps of W alone is not lost."""
    own, adapters = blocks_of(all_parameters(student)), adapters_of(student, ["attention/q"])
    block = {name.split("blocks/0/")[1]: value[0] for name, value in {**own, **adapters}.items()}
    used = BlockRules(compute_dtype="bfloat16", adapter_alpha=ALPHA).used(block)
    assert not any(map(is_adapter, used))
    expected = with_added(own, adapters)["groups/0/blocks/0/attention/q"][0].astype(jnp.bfloat16)
    np.testing.assert_array_equal(used["attention/q"], expected)


@pytest.mark.parametrize("remat", ["dots", "block"])
def test_no_stack_of_whole_weights_is_made(student: Decoder, remat: str) -> None:
    """Neither of merged weights nor of their gradient: the backward pass adds a block's adapters again."""
    batch = random_batch(student.config, codec="f32")
    own, adapters = all_parameters(student), adapters_of(student, ["mlp/gate"])
    step, targets = feature_step(student, ALPHA, remat=remat)
    text = jax.jit(step.gradients).lower(adapters, own, batch, targets, jnp.int32(0)).as_text()
    repeats, width, inner = own["groups/0/blocks/0/mlp/gate"].shape
    lines = [line for line in text.splitlines() if f"-> tensor<{repeats}x{width}x{inner}xf32>" in line]
    assert [line for line in lines if "dynamic_update_slice" in line] == []


# Which matrices, and how they begin.


def shapes_of(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in all_parameters(decoder).items()}


def test_they_begin_as_nothing(mixed: Decoder) -> None:
    shapes = shapes_of(mixed)
    made = make_adapters(LoraConfig(rank=4), shapes, seed=3)
    assert {name.split("/lora/")[1] for name in made} == {f"attention/{n}/{side}" for n in "qkvo" for side in "ab"}
    for name, value in made.items():
        matrix = name.replace("lora/", "")[:-2]
        into, out = sides(matrix, shapes[matrix]) or (0, 0)
        if name.endswith("/b"):
            assert value.shape == (shapes[matrix][0], 4, out)
            assert not value.any()
        else:
            assert value.shape == (shapes[matrix][0], into, 4)
            assert 0.9 * into**-0.5 < np.abs(value).max() <= into**-0.5
    again, other = (make_adapters(LoraConfig(rank=4), shapes, seed) for seed in (3, 4))
    for name, value in made.items():
        np.testing.assert_array_equal(value, again[name])
        assert name.endswith("/b") or not np.array_equal(value, other[name])


@pytest.mark.parametrize(
    ("values", "what", "facts"),
    [
        ({"targets": ["attention/nope"]}, "names no matrix", ["no parameter of this name", "attention/q, attention/k"]),
        ({"targets": ["embed"]}, "names no matrix", ["found      embed"]),
        ({"targets": ["attention/*norm"]}, "names no matrix", ["attention/norm"]),
        ({"targets": ["attention/q", "mlp/router"]}, "names no matrix", ["no parameter"]),
        ({"rank": 17}, "rank is larger than a matrix", ["attention/k", "at most 16"]),
    ],
)
def test_what_cannot_be_adapted(mixed: Decoder, values: dict[str, Any], what: str, facts: list[str]) -> None:
    with pytest.raises(ConfigError, match=what) as error:
        make_adapters(LoraConfig.model_validate(values), shapes_of(mixed), seed=0)
    text = " ".join(str(error.value).split())
    assert all(" ".join(fact.split()) in text for fact in facts), text


def test_experts_are_refused_by_name() -> None:
    shapes = {
        "groups/0/blocks/0/mlp/gate": (1, 8, 12),
        "groups/1/blocks/0/mlp/gate": (2, 4, 8, 12),
        "groups/1/blocks/0/mlp/router": (2, 8, 4),
        "groups/1/blocks/0/mlp/shared_gate": (2, 8, 12),
    }
    make = partial(make_adapters, shapes=shapes, seed=0)
    for target in ("mlp", "mlp/gate", "groups/1"):
        with pytest.raises(ConfigError, match="matrices of experts cannot have adapters"):
            make(LoraConfig(targets=[target]))
    with pytest.raises(ConfigError, match=r"(?s)names no matrix.*mlp/router"):
        make(LoraConfig(targets=["mlp/router"]))
    made = make(LoraConfig(targets=["groups/0", "shared_*"]))
    assert sorted(name for name in made if name.endswith("/a")) == [
        "groups/0/blocks/0/lora/mlp/gate/a",
        "groups/1/blocks/0/lora/mlp/shared_gate/a",
    ]


def test_adapters_alone_are_trained() -> None:
    q, up, norm, projector = "attention/q", "lora/mlp/up/a", "attention/norm", "projector/in"
    names = [f"groups/0/blocks/0/{each}" for each in (q, f"lora/{q}/a", f"lora/{q}/b", up, norm, projector)]
    reached = [name for name in names if "lora/mlp" not in name]
    assert choose_trained(names, None, reached) == {names[1], names[2], names[5]}
    assert choose_trained(names, ["attention"], reached) == {names[1], names[2]}
    for pattern in ("attention/norm", "embed"):
        with pytest.raises(ConfigError, match="train_only names no parameter of the student that is trained"):
            choose_trained(names, ["attention", pattern], reached)
    with pytest.raises(ConfigError, match="no loss reaches what train_only names"):
        choose_trained(names, ["mlp"], reached)
    with pytest.raises(ConfigError, match="no loss of this stage reaches an adapter"):
        choose_trained([names[0], up.join(["groups/0/blocks/0/", ""])], None, [names[0]])
