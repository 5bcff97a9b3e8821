"""Routers in a step: losses against an unrolled oracle of models/routing.py, biases against NumPy, and what is refused.

The student is small: a dense block and two with experts, in two layer groups; its batch has a padded row and one that
is nothing but padding. Compiling is what costs, so an oracle is one program for all scopes: their weights, the mask and
the loads are arguments.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distillcache.models.config import BlockKind, ModelConfig, MoeConfig, plan_layers
from distillcache.models.decoder import Decoder
from distillcache.models.layers.context import BlockContext
from distillcache.models.routing import BalanceState, RouterOutput, Scope, load_balance_loss, route, router_z_loss
from distillcache.models.surgery import add_router_bias
from distillcache.schemas.codecs import get_codec
from distillcache.schemas.config.train import LossConfig, MeshConfig, OptimizerConfig, TrainConfig
from distillcache.schemas.errors import ConfigError
from distillcache.trainer.losses import feature_loss
from distillcache.trainer.run.stages import resolve_stages
from distillcache.trainer.step.balance import (
    Balancing,
    Totals,
    loads_by_unit,
    make_balancing,
    mean_biases,
    regrouped,
    start_balance,
)
from distillcache.trainer.step.blockwise_program import block_routing, blockwise_update
from distillcache.trainer.step.feature import FeatureStep, merge_decoder
from distillcache.trainer.step.feature_program import feature_update
from distillcache.trainer.step.flops import step_flops
from distillcache.trainer.step.modes import MODES
from distillcache.trainer.step.optimizer import make_optimizer
from distillcache.trainer.step.parameters import (
    ROUTER_BIAS,
    Parameters,
    all_parameters,
    at_address,
    choose_trained,
    reached_by,
    sublayer,
)
from distillcache.trainer.step.program import init_state, jit_step
from distillcache.trainer.step.stack import BlockRules, StudentStack
from distillcache.trainer.step.targets import TapReading, block_targets, student_spans
from tests.rounding import assert_rounded
from tests.trainer.conftest import blockwise, parameters_of, random_batch
from tests.trainer.step.test_modes import program_of

E, K = 4, 2
DENSE, SPARSE = BlockKind(), BlockKind(moe=True)
SMALL = ModelConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    layers=plan_layers([DENSE, SPARSE, SPARSE]),
    moe=MoeConfig(num_experts=E, top_k=K, expert_size=12),
)
UNIT = "groups/1/blocks/0/"  # of the blocks with experts
PLACES = {0: ((0, 0), 0), 1: ((1, 0), 0), 2: ((1, 0), 1)}  # (place, repeat) of every block
LAMBDA, ZETA = 0.5, 0.25
ROWS, TOKENS = 4, 10
TAPS = ("resid", "attn_out")
SCOPES: tuple[Scope, ...] = ("layer", "model", "sequence", "global_batch")


def made(config: TrainConfig, *given: Any) -> Balancing | None:
    """`make_balancing` with a config's spec, mesh and mode."""
    return make_balancing(config, config.mesh, *given, blocks_apart=MODES[config.mode].blocks_apart)


def loss_config(scope: Any = "layer", **more: Any) -> LossConfig:
    """Features, MLPs, load balance and z; no logits."""
    values = {
        "token_weight": 0.0,
        "mlp": {"weight": 1.0},
        "load_balance": {"weight": LAMBDA, "scope": scope},
        "router_z": ZETA,
    }
    return LossConfig.model_validate({**values, **more})


NO_BALANCE: dict[str, Any] = {"load_balance": {"weight": 0.0}, "router_z": 0.0}


def train_config(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({"run": "run", "cache": "cache", **changes})


def balancing_of(loss: LossConfig, mode: str = "blockwise", moe: ModelConfig = SMALL, **changes: Any) -> Balancing:
    found = made(train_config(mode=mode, **changes), loss, moe, "stage 0")
    assert found is not None
    return found


@pytest.fixture(scope="module")
def student() -> Decoder:
    """Read only. Filled by NumPy: JAX's random numbers take seconds to compile."""
    rng = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(SMALL)))

    def fill(path: Any, leaf: Any) -> jax.Array:
        noise = rng.normal(scale=SMALL.hidden_size**-0.5, size=leaf.shape)
        return jnp.asarray(1.0 + 0.2 * noise if "norm" in jax.tree_util.keystr(path) else noise, jnp.float32)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, state))


@pytest.fixture(scope="module")
def batch() -> dict[str, Any]:
    """Read only. Uneven rows, so that a mean of rows' or micro-batches' means is not the mean over tokens."""
    found = random_batch(SMALL, rows=ROWS, tokens=TOKENS, codec="f32")
    found["segment_ids"][2, 3:] = 0
    found["segment_ids"][3] = 0
    found["loss_mask"] = found["segment_ids"] > 0
    return found


# The oracles: router outputs of every block by the decoder's own sublayers, and what is minimised, written out.

Objective = Callable[..., tuple[Any, Any]]


def balance_terms(
    routers: list[RouterOutput], weights: Mapping[str, Any], mask: Any, loads: Any, together: bool
) -> Any:
    """The weighted sum of every scope's loss and the z-loss. together: mean over the blocks, else their sum."""
    groups = [routers] if together else [[router] for router in routers]
    scopes: tuple[Scope, ...] = SCOPES if together else ("layer", "sequence", "global_batch")
    total = 0.0
    for number, group in enumerate(groups):
        probs, ids = (jnp.stack([getattr(router, name) for router in group]) for name in ("probs", "ids"))
        load = loads if together else loads[number : number + 1]
        for scope in scopes:
            seen = {"load": load} if scope == "global_batch" else {}
            found = load_balance_loss(probs, ids, mask, num_experts=E, top_k=K, scope=scope, **seen)
            total += weights[scope] * found
        total += weights["router_z"] * sum(router_z_loss(router.logits, mask) for router in group) / len(group)
    return total


def blockwise_objective(decoder: Decoder, batch: Mapping[str, Any], mlp_input: str = "teacher") -> Objective:
    """What a step minimises of the tokens in `mask`, as a function of the parameters: no scan."""
    stack = StudentStack(decoder)
    resid, target = (jnp.asarray(batch[tap]["codes"]) for tap in ("resid", "attn_out"))
    context, whole = stack.context(batch), jnp.sum(batch["segment_ids"] > 0)

    def total(parameters: Parameters, weights: Mapping[str, Any], mask: Any, loads: Any) -> tuple[Any, Any]:
        objective, routers = 0.0, []
        for block, (address, repeat) in PLACES.items():
            own = {name: value[repeat] for name, value in at_address(parameters, address).items()}
            out = sublayer(stack.graphs[address]["attention"], "attention", own)(resid[block], context)
            middle = resid[block] + (out if mlp_input == "student" else target[block])
            mlp_out, router = sublayer(stack.graphs[address]["mlp"], "mlp", own)(middle, context)
            wanted = resid[block + 1] - resid[block] - target[block]
            objective += feature_loss(out, target[block], mask, relative_l2=1.0).total / whole
            objective += feature_loss(mlp_out, wanted, mask, relative_l2=1.0).total / whole
            if router is not None:
                routers.append(router)
        return objective + balance_terms(routers, weights, mask, loads, together=False), routers

    return total


def feature_objective(decoder: Decoder, batch: Mapping[str, Any]) -> Objective:
    """The same in feature mode, of the whole decoder's own routing."""
    graph, target = nnx.graphdef(decoder), jnp.asarray(batch["attn_out"]["codes"])
    rows = [batch[name] for name in ("tokens", "positions", "segment_ids")]
    whole = jnp.sum(batch["segment_ids"] > 0)

    def total(parameters: Parameters, weights: Mapping[str, Any], mask: Any, loads: Any) -> tuple[Any, Any]:
        out = merge_decoder(graph, parameters)(*rows, taps=("attn_out",), logits=False, router=True)
        found = [
            feature_loss(out.taps["attn_out"][at], target[at], mask, relative_l2=1.0).total / whole for at in range(3)
        ]
        routers = [jax.tree.map(lambda leaf, at=at: leaf[at], out.router) for at in range(2)]
        return sum(found) / 3 + balance_terms(routers, weights, mask, loads, together=True), routers

    return total


class Oracle:
    """An objective's gradient, compiled once, of whole batches and of what is cut from them."""

    def __init__(self, objective: Objective, parameters: Parameters, frozen: Parameters, batch: Mapping[str, Any]):
        def of_trained(trained: Parameters, *rest: Any) -> Any:
            return objective({**frozen, **trained}, *rest)

        self._run = jax.jit(jax.grad(of_trained, has_aux=True))
        self._trained, self._mask = parameters, np.asarray(batch["segment_ids"] > 0)
        self._tokens = self._mask.sum()

    def part(self, scope: str, mask: np.ndarray, before: np.ndarray) -> tuple[Parameters, list[RouterOutput]]:
        """The gradient of the rows in `mask`: their share of the batch's. before: loads of the parts before this."""
        share = mask.sum() / self._tokens
        weights = dict.fromkeys(SCOPES, 0.0) | {scope: LAMBDA * share, "router_z": ZETA * share}
        weights = {name: np.float32(value) for name, value in weights.items()}
        _, routers = self._run(self._trained, weights, mask, np.ones((2, E), np.float32))
        gradient, _ = self._run(self._trained, weights, mask, before + load_of(routers, mask))
        return gradient, routers

    def whole(self, scope: str) -> tuple[Parameters, list[RouterOutput]]:
        return self.part(scope, self._mask, np.zeros((2, E), np.float32))

    def in_parts(self, scope: str, count: int) -> Parameters:
        """Micro-batch n has every row whose number is n modulo `count`."""
        before, total = np.zeros((2, E), np.float32), None
        for number in range(count):
            mask = self._mask & (np.arange(ROWS) % count == number)[:, None]
            gradient, routers = self.part(scope, mask, before)
            before = before + load_of(routers, mask)
            total = gradient if total is None else jax.tree.map(jnp.add, total, gradient)
        assert total is not None
        return total


def load_of(routers: list[RouterOutput], mask: np.ndarray) -> np.ndarray:
    """Assignments of real tokens by block and expert, counted."""
    return np.stack([np.bincount(np.asarray(router.ids)[mask].ravel(), minlength=E) for router in routers]).astype("f4")


@pytest.fixture(scope="module")
def blocks_oracle(student: Decoder, batch: dict) -> Oracle:
    trained, frozen = parameters_of(student, "mlp")
    return Oracle(blockwise_objective(student, batch), trained, frozen, batch)


@pytest.fixture(scope="module")
def whole_oracle(student: Decoder, batch: dict) -> Oracle:
    trained, frozen = feature_parameters(student)
    return Oracle(feature_objective(student, batch), trained, frozen, batch)


def feature_parameters(decoder: Decoder) -> tuple[Parameters, Parameters]:
    """MLPs and routers, to be trained, and the others; a block's gradient comes through the blocks behind it."""
    everything = all_parameters(decoder)
    reached = [name for name in everything if not name.endswith(ROUTER_BIAS)]
    chosen = choose_trained(list(everything), ["mlp"], reached)
    return (
        {name: value for name, value in everything.items() if name in chosen},
        {name: value for name, value in everything.items() if name not in chosen},
    )


RUNS_MLP = BlockRules(runs_mlp=True)


def block_step(decoder: Decoder, loss: LossConfig, balancing: Balancing | None, **options: Any) -> Any:
    options = {"rules": RUNS_MLP, **options}
    return blockwise(decoder, loss, codec="f32", balancing=balancing, **options)


@partial(jax.jit, static_argnums=0)
def jitted_gradients(step: Any, *given: Any) -> Any:
    """Compiled once for all steps of equal values."""
    return step.gradients(*given)


def block_gradients(
    decoder: Decoder, batch: dict, loss: LossConfig, balancing: Balancing | None, **options: Any
) -> Callable[..., Any]:
    """By step: gradients by name, and every block's `BlockSums`."""
    step, targets = block_step(decoder, loss, balancing, **options)
    trained, frozen = parameters_of(decoder, "mlp")
    return lambda at=0: jitted_gradients(step, trained, frozen, batch, targets, jnp.int32(at))[:2]


def whole_step(
    decoder: Decoder, loss: LossConfig, balancing: Balancing | None, blocks: tuple[int, ...] = (0, 1, 2), **options: Any
) -> Any:
    spans = student_spans(decoder.config, 3, None)
    places = {"attn_out": {at: at for at in range(3)}}
    targets = block_targets(decoder.config, spans, [places] * 3, dict.fromkeys(blocks, 1.0))
    reading = TapReading({"attn_out": get_codec("f32")}, SMALL.hidden_size, in_step=False)
    adam = options.pop("adam", OptimizerConfig(learning_rate=1e-3, warmup_steps=0))
    graph, stack = nnx.graphdef(decoder), StudentStack(decoder)
    optimizer = make_optimizer(adam, 10, clips=False)
    step = FeatureStep(graph, stack, reading, loss, optimizer, 1.0, 10, balancing=balancing, **options)
    return step, targets


def whole_gradients(
    decoder: Decoder, batch: dict, loss: LossConfig, balancing: Balancing | None, **options: Any
) -> Callable[..., Any]:
    """By step: gradients by name, and `FeatureSums`."""
    step, targets = whole_step(decoder, loss, balancing, **options)
    trained, frozen = feature_parameters(decoder)
    return lambda at=0: jitted_gradients(step, trained, frozen, without_stream(batch), targets, jnp.int32(at))


def without_stream(batch: dict) -> dict:
    return {name: value for name, value in batch.items() if name != "resid"}


def assert_close(found: Parameters, expected: Parameters) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-4, atol=2e-6, err_msg=name)


# The losses.


@pytest.mark.parametrize("scope", SCOPES)
def test_sums_of_rows_make_the_loss_of_the_batch(scope):
    """Value and gradient, of the whole and of its halves, without a decoder."""
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(2, ROWS, TOKENS, E)).astype(np.float32))
    mask = jnp.arange(TOKENS) < jnp.array([10, 8, 3, 0])[:, None]
    balancing, totals = Balancing(SMALL.moe_config, scope), Totals.of(mask)

    def ours(logits: jax.Array, parts: tuple[tuple[int, ...], ...]) -> Any:
        total, before = 0.0, jnp.zeros((2, E))
        for part in parts:
            rows = np.array(part)
            router = route(logits[:, rows], None, SMALL.moe_config)
            sums = jax.vmap(balancing.of_rows, (0, None))(router, mask[rows])
            found = balancing.of_blocks(sums, jnp.asarray(rows), ROWS, totals, before)
            before = before + found.sums.load
            total += jnp.mean(LAMBDA * found.balance + ZETA * found.sums.z) / totals.tokens
        return total

    def expected(logits: jax.Array) -> jax.Array:
        router = route(logits, None, SMALL.moe_config)
        balance = load_balance_loss(router.probs, router.ids, mask, num_experts=E, top_k=K, scope=scope)
        return LAMBDA * balance + ZETA * (router_z_loss(logits[0], mask) + router_z_loss(logits[1], mask)) / 2

    wanted = jax.jit(jax.value_and_grad(expected))(logits)
    whole = tuple(range(ROWS))
    halves = ((0, 2), (1, 3)) if scope == "sequence" else (whole,)  # the others are products of the parts' own sums
    for parts in {(whole,), halves}:
        found = jax.jit(jax.value_and_grad(ours), static_argnums=1)(logits, parts)
        np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
        np.testing.assert_allclose(found[1], wanted[1], rtol=1e-5, atol=1e-8)


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("scope", "count"),
    [("global_batch", 2), slow("layer", 1), slow("sequence", 2)],
)
def test_blockwise_gradients_equal_the_unrolled_ones(student, batch, blocks_oracle, scope, count):
    loss = loss_config(scope)
    gradients, sums = block_gradients(student, batch, loss, balancing_of(loss), micro_batches=count)()
    whole, routers = blocks_oracle.whole(scope)
    assert_close(gradients, whole if scope == "sequence" else blocks_oracle.in_parts(scope, count))
    dense, sparse = sums[0, 0].routing, sums[1, 0].routing
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(dense))
    assert_sums(sparse, routers, batch["segment_ids"] > 0, scope if count == 1 or scope == "sequence" else None)


def assert_sums(routing: Any, routers: list[RouterOutput], mask: Any, scope: str | None) -> None:
    """Of every block with experts. scope: of the load-balance loss, where it is the whole batch's."""
    tokens = mask.sum()
    np.testing.assert_array_equal(routing.sums.load, load_of(routers, mask))
    np.testing.assert_array_equal(routing.loads[:, 0], routing.sums.load)
    np.testing.assert_array_equal(routing.sums.tokens, [tokens, tokens])
    probs = [np.asarray(router.probs, np.float64)[mask] for router in routers]
    np.testing.assert_allclose(routing.sums.probs, [block.sum(0) for block in probs], rtol=1e-5)
    np.testing.assert_allclose(routing.sums.entropy, [-(p * np.log(p)).sum() for p in probs], rtol=1e-5)
    z = [float(router_z_loss(router.logits, mask)) for router in routers]
    np.testing.assert_allclose(np.asarray(routing.sums.z) / tokens, z, rtol=1e-5)
    if scope in ("layer", "sequence"):
        balance = [
            load_balance_loss(r.probs[None], r.ids[None], mask, num_experts=E, top_k=K, scope=scope) for r in routers
        ]
        np.testing.assert_allclose(np.asarray(routing.balance) / tokens, balance, rtol=1e-5)


@pytest.mark.slow
def test_fed_with_the_students_own_attention_the_losses_reach_it(student, batch):
    loss, rules = loss_config("sequence"), BlockRules(runs_mlp=True, mlp_input="student")
    trained, frozen = parameters_of(student, "attention", "mlp")
    oracle = Oracle(blockwise_objective(student, batch, "student"), trained, frozen, batch)
    step, targets = block_step(student, loss, balancing_of(loss), rules=rules)
    gradients, _, _ = jax.jit(lambda p: step.gradients(p, frozen, batch, targets, jnp.int32(0)))(trained)
    assert_close(gradients, oracle.whole("sequence")[0])


@pytest.mark.parametrize(
    ("scope", "count"),
    [slow("model", 1), slow("layer", 1), slow("sequence", 2), slow("global_batch", 4)],
)
def test_feature_gradients_equal_the_unrolled_ones(student, batch, whole_oracle, scope, count):
    loss = loss_config(scope, mlp={"weight": 0.0})
    gradients, sums = whole_gradients(student, batch, loss, balancing_of(loss, "feature"), micro_batches=count)()
    whole, routers = whole_oracle.whole(scope)
    assert_close(gradients, whole if scope == "sequence" else whole_oracle.in_parts(scope, count))
    assert_sums(sums.routing, routers, batch["segment_ids"] > 0, scope if count == 1 else None)
    if scope == "model":
        probs, ids = (jnp.stack([getattr(router, name) for router in routers]) for name in ("probs", "ids"))
        pooled = load_balance_loss(probs, ids, batch["segment_ids"] > 0, num_experts=E, top_k=K, scope="model")
        np.testing.assert_allclose(np.mean(sums.routing.balance) / sums.tokens, pooled, rtol=1e-5)


def test_model_scope_is_for_feature_mode():
    with pytest.raises(ConfigError, match="cannot be balanced together"):
        balancing_of(loss_config("model"))
    assert balancing_of(loss_config("model"), "feature").scope == "model"


def test_nothing_is_collected_where_nobody_asks(student, batch):
    """The very program of a step that knows nothing of routers, and no sums of them."""
    loss = loss_config(**NO_BALANCE)
    balancing = balancing_of(loss)
    assert not balancing.collects
    trained, frozen = parameters_of(student, "mlp")
    programs = []
    for given in (balancing, None):
        step, targets = block_step(student, loss, given)

        def run(trained: Parameters, step: Any = step, targets: Any = targets) -> Any:
            return step.gradients(trained, frozen, batch, targets, jnp.int32(0))

        traced = jax.jit(run).trace(trained)
        assert traced.out_info[1][1, 0].routing is None
        programs.append(str(traced.jaxpr))
    assert programs[0] == programs[1]


def test_nothing_is_collected_in_feature_mode_either(student, batch):
    loss = loss_config(mlp={"weight": 0.0}, **NO_BALANCE)
    step, targets = whole_step(student, loss, balancing_of(loss, "feature"))
    trained, frozen = feature_parameters(student)
    _, sums = jax.eval_shape(step.gradients, trained, frozen, batch, targets, jnp.int32(0))
    assert sums.routing is None
    assert set(sums.weights) == {"tokens", "alpha", "tau", "feature", "stream"}


@pytest.mark.slow
def test_weight_decay_leaves_alone_what_router_losses_do_not_reach(student, batch):
    """Features of block 0 alone: the routers' losses reach up to the last router, but not the experts behind it."""
    loss = loss_config(mlp={"weight": 0.0})
    adam = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, weight_decay=0.1)
    step, targets = whole_step(student, loss, balancing_of(loss, "feature"), blocks=(0,), adam=adam)
    trained, frozen = feature_parameters(student)
    before, state = jax.tree.map(np.array, trained), init_state(step.stack, trained, step.optimizer)
    state, _ = jit_step(feature_update(step), state, None)(state, frozen, without_stream(batch), targets)
    for name, value in state.parameters.items():
        moved = [not np.array_equal(*pair) for pair in zip(value, before[name], strict=True)]
        routes = name.endswith(("mlp/norm", "mlp/router"))
        assert moved == ([True, routes] if name.startswith(UNIT) else [True]), name


# Biases that move.

RATE, MOMENTUM, CAP = 0.8, 0.5, 0.06
STEPS, WARMUP = 5, 1
UPDATE = (("rate", RATE), ("momentum", MOMENTUM), ("cap", CAP), ("rule", "ema"))


def logits_by_hand(parameters: Mapping[str, np.ndarray], batch: Mapping[str, Any], block: int) -> np.ndarray:
    """A router's, of the teacher's stream between attention and MLP, in double precision."""
    repeat = block - 1
    x = sum(np.asarray(batch[tap]["codes"][block], np.float64) for tap in ("resid", "attn_out"))
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + SMALL.norm_eps) * parameters[UNIT + "mlp/norm"][repeat]
    return x @ np.float64(parameters[UNIT + "mlp/router"][repeat])


def load_by_hand(logits: np.ndarray, bias: np.ndarray, mask: np.ndarray) -> np.ndarray:
    chosen = np.argsort(-(logits + bias), axis=-1)[..., :K]
    return np.bincount(chosen[mask].ravel(), minlength=E).astype(np.float64)


class Moved:
    """Some steps of a student with two biases to an expert; only blocks 0 and 2 are trained. Lists are by step."""

    def __init__(self, student: Decoder) -> None:
        decoder, loss = add_router_bias(student), loss_config(**NO_BALANCE)
        balancing = Balancing(decoder.config.moe_config, update=UPDATE, warmup=WARMUP, bias_groups=2)
        adam = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.1)
        step, targets = block_step(decoder, loss, balancing, blocks=(0, 2), optimizer=adam)
        trained, frozen = parameters_of(decoder, "mlp")
        balance = start_balance({**trained, **frozen}, step.stack.places(), 2)
        self.state = init_state(step.stack, trained, step.optimizer, balance)
        run = jit_step(blockwise_update(step), self.state, None)
        self.batches = [random_batch(SMALL, seed, ROWS, TOKENS, "f32") for seed in range(STEPS)]
        self.batches[2]["segment_ids"][:] = 0  # a batch of padding alone
        self.parameters, self.balance, self.sums = [], [], []
        for batch in self.batches:
            self._note()
            self.state, sums = run(self.state, frozen, batch, targets)
            self.sums.append(block_routing(sums, step.stack))
        self._note()

    def _note(self) -> None:
        self.parameters.append(jax.tree.map(np.array, self.state.parameters))
        self.balance.append(jax.tree.map(np.array, self.state.balance[UNIT]))


@pytest.fixture(scope="module")
def moved(student: Decoder) -> Moved:
    return Moved(student)


def test_each_half_of_the_rows_has_its_own_bias(moved):
    """Loads by NumPy: the step's parameters and the bias of each half choose its experts."""
    differs = False
    for number, batch in enumerate(moved.batches):
        mask = batch["segment_ids"] > 0
        logits = logits_by_hand(moved.parameters[number], batch, 2)
        for group, rows in enumerate((slice(0, 2), slice(2, 4))):
            bias = moved.balance[number].bias[1, group]
            found = moved.sums[number].loads[1, group]
            np.testing.assert_array_equal(found, load_by_hand(logits[rows], bias, mask[rows]))
            other = load_by_hand(logits[rows], moved.balance[number].bias[1, 1 - group], mask[rows])
            differs |= not np.array_equal(found, other)
    assert differs  # else this would say nothing of which bias is whose


def test_biases_follow_the_load(moved):
    """The smoothed share and the bias after every step, from the step's loads, in double precision."""
    bias, smoothed, capped = np.zeros((2, E)), np.zeros((2, E)), False
    for number, sums in enumerate(moved.sums):
        load = sums.loads[1]
        if number >= WARMUP and load.any():
            smoothed = MOMENTUM * smoothed + (1 - MOMENTUM) * load / load.sum(-1, keepdims=True)
            wanted = 1 / E - smoothed
            free = bias + RATE * (wanted - wanted.mean(-1, keepdims=True))
            bias = np.clip(free, -CAP, CAP)
            capped |= bool((free != bias).any())
        np.testing.assert_allclose(moved.balance[number + 1].smoothed[1], smoothed, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(moved.balance[number + 1].bias[1], bias, rtol=1e-5, atol=1e-7)
    assert capped
    assert np.abs(bias[0] - bias[1]).max() > 0.01  # the halves went different ways


def test_biases_stand_still_in_warm_up_and_without_tokens(moved):
    first, second, third, fourth, *_ = moved.balance
    assert moved.sums[0].loads.any()
    assert not any(value.any() for value in (*first, *second))
    assert third.bias[1].any()
    assert third.smoothed[1].any()
    assert not moved.sums[2].loads.any()
    for before, after in zip(third, fourth, strict=True):
        np.testing.assert_array_equal(after, before)


def test_a_block_that_is_not_trained_keeps_its_biases(moved):
    assert not any(value[0].any() for balance in moved.balance for value in balance)
    assert not any(sums.loads[0].any() for sums in moved.sums)


def test_biases_have_no_gradient_and_no_optimizer_state(moved, student, batch):
    assert not any(name.endswith("router_bias") for name in moved.state.parameters)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(moved.state.moments)[0]]
    assert any("mlp/router" in path for path in paths)
    assert not any("router_bias" in path for path in paths)
    decoder = add_router_bias(student)
    own = {name: value[0] for name, value in at_address(all_parameters(decoder), (1, 0)).items()}
    context, graph = StudentStack(decoder).context(batch), StudentStack(decoder).graphs[1, 0]["mlp"]

    def total(bias: jax.Array) -> jax.Array:
        mlp = sublayer(graph, "mlp", {**own, "mlp/router_bias": bias})
        return jnp.sum(mlp(jnp.asarray(batch["resid"]["codes"][0]), context)[0])

    np.testing.assert_array_equal(jax.jit(jax.grad(total))(jnp.full(E, 0.3)), np.zeros(E))


@pytest.mark.slow
def test_biases_of_zero_change_nothing(student, batch):
    loss, found = loss_config(**NO_BALANCE), []
    decoder = add_router_bias(student)
    noaux = balancing_of(loss, moe=decoder.config, moe_balance_type="noaux_tc")
    for each, balancing in ((student, None), (decoder, noaux)):
        gradients, sums = block_gradients(each, batch, loss, balancing)()
        found.append({**gradients, **{str(address): value.terms["mlp"] for address, value in sums.items()}})
    assert found[1].keys() == found[0].keys()
    for name, value in found[0].items():
        assert_rounded(found[1][name], value)


@pytest.mark.slow
def test_biases_move_in_feature_mode(student, batch):
    """Loads of the decoder's own routing; with a token loss or without, all blocks with experts run."""
    decoder, loss = add_router_bias(student), loss_config(mlp={"weight": 0.0}, **NO_BALANCE)
    balancing = replace(
        balancing_of(loss, "feature", decoder.config, moe_balance_type="noaux_tc", moe_update_rule="sign"),
        bias_groups=2,
    )
    step, targets = whole_step(decoder, loss, balancing, micro_batches=2)
    trained, frozen = feature_parameters(decoder)
    state = init_state(step.stack, trained, step.optimizer, start_balance(frozen, step.stack.places(), 2))
    run, rows = jit_step(feature_update(step), state, None), without_stream(batch)
    graph, fields = nnx.graphdef(decoder), [batch[name] for name in ("tokens", "positions", "segment_ids")]
    forward = jax.jit(lambda parameters: merge_decoder(graph, parameters)(*fields, logits=False, router=True).router)
    mask, bias = batch["segment_ids"] > 0, np.zeros((2, 2, E))
    for _ in range(2):
        before = np.array(state.balance[UNIT].bias)
        # Block 2 comes behind experts that were chosen with biases, so only block 1 has the same logits without them.
        logits = np.asarray(forward({**frozen, **state.parameters}).logits)
        state, sums = run(state, frozen, rows, targets)
        for group, part in enumerate((slice(0, 2), slice(2, 4))):
            expected = load_by_hand(logits[0][part], before[0, group], mask[part])
            np.testing.assert_array_equal(sums.routing.loads[0, group], expected)
        load = np.asarray(sums.routing.loads, np.float64)
        bias = bias + 0.01 * np.sign(load.mean(-1, keepdims=True) - load)
        np.testing.assert_allclose(state.balance[UNIT].bias, bias, rtol=1e-5)


def test_an_expert_with_just_its_share_stays_under_the_sign_rule():
    """Compiled, 41 / 164 is not 1/4: XLA multiplies by the inverse."""
    balancing = Balancing(SMALL.moe_config, update=(*UPDATE[:3], ("rule", "sign")))
    state, load = {UNIT: BalanceState(jnp.zeros(E), jnp.zeros(E))}, jnp.asarray([41.0, 41.0, 82.0, 0.0])
    found = jax.jit(balancing.after_step)(state, {UNIT: load}, jnp.int32(0))
    np.testing.assert_array_equal(found[UNIT].bias, np.array([0.0, 0.0, -CAP, CAP], np.float32))


def test_outside_of_training_a_bias_is_the_mean_over_its_groups():
    rng = np.random.default_rng(0)
    state = BalanceState(*(jnp.asarray(rng.normal(size=(2, 3, E)), jnp.float32) for _ in range(2)))
    (found,) = mean_biases({UNIT: state}).values()
    np.testing.assert_allclose(found, state.bias.mean(1), rtol=1e-6)
    assert regrouped(state, 3) is state
    for groups in (1, 2):
        for value, mean in zip(regrouped(state, groups), state, strict=True):
            np.testing.assert_allclose(value, np.repeat(np.mean(mean, 1, keepdims=True), groups, 1), rtol=1e-6)
    again = start_balance({UNIT + "mlp/router_bias": found}, {(0, 0): 1, (1, 0): 2}, 2)
    np.testing.assert_array_equal(again[UNIT].bias, np.repeat(found[:, None], 2, 1))
    assert not again[UNIT].smoothed.any()


def test_loads_go_to_the_places_of_their_blocks():
    """A pattern of two kinds with experts behind a dense block: its blocks take turns."""
    kinds = [DENSE, *[SPARSE, BlockKind(window=3, moe=True)] * 2]
    found = loads_by_unit(jnp.arange(4.0).reshape(4, 1, 1), replace(SMALL, layers=plan_layers(kinds)))
    assert {unit: value.ravel().tolist() for unit, value in found.items()} == {
        "groups/1/blocks/0/": [0.0, 2.0],
        "groups/1/blocks/1/": [1.0, 3.0],
    }


def test_without_an_update_biases_stay():
    balancing = balancing_of(loss_config())
    state = {UNIT: BalanceState(jnp.ones((2, 1, E)), jnp.ones((2, 1, E)))}
    assert balancing.after_step(state, {}, jnp.int32(7)) is state


# Noise on the experts' input.

NOISY = replace(SMALL, moe=replace(SMALL.moe_config, jitter=0.1))


def keys(context: BlockContext) -> np.ndarray:
    assert context.noise is not None
    return np.asarray(jax.random.key_data(context.noise))


def test_noise_is_of_the_seed_the_step_and_the_row_alone(student, batch):
    context = StudentStack(student).context(batch)

    def noise(rows: list[int], step: int = 3, seed: int = 5) -> np.ndarray:
        balancing = Balancing(NOISY.moe_config, seed=seed)
        return keys(balancing.context(context, jnp.asarray(rows), ROWS, jnp.int32(step)))

    whole = noise([0, 1, 2, 3])
    assert len({tuple(key) for key in whole}) == ROWS
    np.testing.assert_array_equal(noise([1, 3]), whole[[1, 3]])
    for other in (noise([0, 1, 2, 3], step=4), noise([0, 1, 2, 3], seed=6)):
        assert not (other == whole).all(1).any()
    still = Balancing(SMALL.moe_config).context(context, jnp.arange(ROWS), ROWS, jnp.int32(3))
    assert still is context


def test_evaluation_has_no_noise(student, batch):
    """Its contexts have no keys, and without keys the sublayer is the one without jitter."""
    noisy = nnx.eval_shape(lambda: Decoder(NOISY))
    rows = batch["positions"], batch["segment_ids"]
    assert noisy.context(*rows).noise is None
    assert StudentStack(noisy).context(batch).noise is None

    def experts(decoder: Decoder) -> Any:
        parameters = {name: value[0] for name, value in at_address(all_parameters(student), (1, 0)).items()}
        mlp = sublayer(StudentStack(decoder).graphs[1, 0]["mlp"], "mlp", parameters)
        return jax.make_jaxpr(lambda x: mlp(x, decoder.context(*rows)))(jnp.asarray(batch["resid"]["codes"][0]))

    assert str(experts(noisy)) == str(experts(student))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["blockwise", "feature"])
def test_noise_and_biases_do_not_depend_on_how_a_batch_is_cut(student, batch, mode):
    """Every row keeps its own noise and its group's bias, and uneven parts are weighed as in the whole."""
    decoder = add_router_bias(student)
    moe = replace(decoder.config.moe_config, bias=True, jitter=0.1)
    noisy = nnx.merge(
        nnx.graphdef(nnx.eval_shape(lambda: Decoder(replace(decoder.config, moe=moe)))), nnx.state(decoder)
    )
    loss = loss_config(**NO_BALANCE, **({} if mode == "blockwise" else {"mlp": {"weight": 0.0}}))
    balancing = Balancing(moe, update=UPDATE, bias_groups=2, seed=5)
    make, split = (block_step, parameters_of) if mode == "blockwise" else (whole_step, feature_parameters)
    trained, frozen = split(noisy, *(["mlp"] if mode == "blockwise" else []))
    bias = np.random.default_rng(4).normal(size=(1, 2, E)).astype(np.float32)
    frozen[UNIT + "mlp/router_bias"] = jnp.repeat(jnp.asarray(bias), 2, axis=0)
    runs = []
    for count in (1, 2):
        step, targets = make(noisy, loss, balancing, micro_batches=count)

        def run(trained: Parameters, batch: dict, at: Any, step: Any = step, targets: Any = targets) -> tuple[Any, Any]:
            gradients, sums, *_ = step.gradients(trained, frozen, batch, targets, at)
            return gradients, sums[1, 0].routing if mode == "blockwise" else sums.routing

        runs.append(jax.jit(run))
    rows = batch if mode == "blockwise" else without_stream(batch)
    (expected, whole), (found, cut), (other, _) = (
        run(trained, rows, jnp.int32(at)) for run, at in ((runs[0], 3), (runs[1], 3), (runs[0], 4))
    )
    assert_close(found, expected)
    compared = 2 if mode == "blockwise" else 1  # behind the last attention nothing has a gradient
    for left, right in zip(other[UNIT + "mlp/router"][:compared], expected[UNIT + "mlp/router"], strict=False):
        assert np.abs(left - right).max() > 1e-4
    np.testing.assert_array_equal(cut.loads, whole.loads)
    np.testing.assert_array_equal(whole.loads.sum(1), whole.sums.load)
    real = (batch["segment_ids"] > 0).sum(1)
    np.testing.assert_array_equal(whole.loads.sum(-1), [[K * real[:2].sum(), K * real[2:].sum()]] * 2)
    if mode == "blockwise":  # blocks of the same parameters, given the same, differ by their noise alone
        twins = {name: value.at[1:].set(value[:1]) for name, value in trained.items()}
        same = {tap: {"codes": jnp.zeros_like(batch[tap]["codes"]).at[:].set(batch[tap]["codes"][0])} for tap in TAPS}
        gradient, _ = runs[0](twins, {**batch, **same}, jnp.int32(3))
        left, right = gradient[UNIT + "mlp/down"]
        assert np.abs(left - right).max() > 1e-4


# What is asked for and cannot be.

DENSE_ONLY = replace(SMALL, layers=plan_layers([DENSE] * 3), moe=None)
NOTHING = loss_config(**NO_BALANCE)
EP = {"moe_balance_type": "noaux_tc", "moe_bias_sync_group": "ep"}


@pytest.mark.parametrize(
    ("model", "loss", "change", "message", "facts"),
    [
        (
            DENSE_ONLY,
            loss_config(),
            {},
            "no experts to balance",
            {"asked for": "loss.load_balance.weight, loss.router_z"},
        ),
        (DENSE_ONLY, NOTHING, {"moe_balance_type": "noaux_tc"}, "no experts", {"asked for": "moe_balance_type"}),
        (
            DENSE_ONLY,
            NOTHING,
            {"mesh": {"expert": 2}},
            "no experts to balance or to split",
            {"asked for": "mesh.expert"},
        ),
        (SMALL, NOTHING, {"moe_balance_type": "gshard"}, "has no weight", {"loss.load_balance.weight": 0.0}),
        (SMALL, loss_config("model"), {}, "cannot be balanced together", {"loss.load_balance.scope": "model"}),
        (
            SMALL,
            NOTHING,
            {**EP, "expert_parallel_size": 3, "mesh": {"data": 2, "fsdp": 2}},
            "cannot be divided into expert-parallel groups",
            {"expert_parallel_size": 3, "mesh.data * mesh.fsdp * mesh.expert": 4},
        ),
        (
            SMALL,
            NOTHING,
            {**EP, "mesh": {"expert": 2, "data": 2}},
            "has all devices of the axis expert",
            {"expert_parallel_size": 1, "mesh.expert": 2},
        ),
    ],
    ids=["losses", "noaux", "mesh", "gshard", "model scope", "not a divisor", "not a multiple"],
)
def test_what_cannot_be_is_refused(model, loss, change, message, facts):
    with pytest.raises(ConfigError, match=message) as caught:
        made(train_config(**change), loss, model, "stage 0")
    assert facts.items() <= caught.value.facts.items()
    assert caught.value.next


def test_a_dense_student_asks_for_nothing():
    assert made(train_config(), NOTHING, DENSE_ONLY, "stage 0") is None


@pytest.mark.parametrize(
    ("change", "groups"),
    [
        ({}, 1),
        ({"mesh": {"data": 4}}, 1),
        ({**EP}, 1),
        ({**EP, "mesh": {"data": 2, "fsdp": 2}}, 4),
        ({**EP, "mesh": {"data": 2, "fsdp": 2}, "expert_parallel_size": 2}, 2),
        ({**EP, "mesh": {"data": 2, "expert": 2}, "expert_parallel_size": 2}, 2),
        ({**EP, "mesh": {"data": 2, "expert": 2}, "expert_parallel_size": 4}, 1),
        ({**EP, "mesh": {"block": 2, "data": 2}}, 2),
    ],
    ids=str,
)
def test_how_many_biases_an_expert_has(change, groups):
    assert balancing_of(NOTHING, **change).bias_groups == groups


def test_the_config_s_numbers_arrive():
    values = {"moe_update_rate": 0.2, "moe_update_momentum": 0.3, "moe_bias_cap": None, "moe_update_rule": "sign"}
    found = balancing_of(NOTHING, moe_balance_type="noaux_tc", moe_afb_warmup_steps=7, seed=9, **values)
    assert dict(found.update or ()) == {"rate": 0.2, "momentum": 0.3, "cap": None, "rule": "sign"}
    assert (found.warmup, found.seed, found.with_loss, found.collects) == (7, 9, False, True)
    plain = balancing_of(NOTHING)
    assert (plain.update, plain.with_loss, plain.collects) == (None, False, False)
    assert balancing_of(loss_config("sequence", router_z=0.0)).with_loss
    assert balancing_of(loss_config(load_balance={"weight": 0.0})).with_loss


def test_biases_turn_the_auxiliary_loss_off_in_every_stage():
    loss = loss_config()
    stages = [{"mode": "blockwise", "steps": 2}, {"mode": "feature", "steps": 2, "loss": loss.model_dump()}]
    found = resolve_stages(train_config(loss=loss, stages=stages, moe_balance_type="noaux_tc"), MeshConfig())
    assert [stage.loss.load_balance.weight for stage in found] == [0.0, 0.0]
    assert [stage.loss.router_z for stage in found] == [ZETA, ZETA]
    kept = resolve_stages(train_config(loss=loss, stages=stages, moe_balance_type="gshard"), MeshConfig())
    assert [stage.loss.load_balance.weight for stage in kept] == [LAMBDA, LAMBDA]


# What else knows of experts.


def test_biases_are_never_chosen_to_be_trained(student):
    names = [UNIT + "mlp/router", UNIT + "mlp/router_bias", UNIT + "mlp/gate"]
    reached = reached_by(program_of(student, "blockwise", loss=loss_config()).rules(), names)
    assert choose_trained(names, None, reached) == {names[0], names[2]}
    assert choose_trained(names, ["mlp/router*"], reached) == {names[0]}
    with pytest.raises(ConfigError, match="no loss reaches") as caught:
        choose_trained(names, ["mlp/router_bias"], reached)
    assert caught.value.facts["losses reach"] == "mlp/gate, mlp/router"


def test_of_the_experts_as_many_are_counted_as_a_token_has(student):
    """By hand: attention, the dense MLP, the routers, and top_k experts of all; then their scores and mixing."""
    width, heads = SMALL.hidden_size, SMALL.num_heads * SMALL.head_dim
    attention = 3 * width * (2 * heads + 2 * SMALL.num_kv_heads * SMALL.head_dim)
    dense = 3 * width * SMALL.intermediate_size
    sparse = 2 * (width * E + K * 3 * width * SMALL.moe_config.expert_size)
    products = attention + dense + sparse + width * SMALL.vocab_size  # the head
    expected = 6.0 * 100 * (products + 3 * heads * TOKENS)
    shapes = jax.eval_shape(lambda: all_parameters(add_router_bias(student)))
    assert step_flops(add_router_bias(student).config, shapes, 100, TOKENS) == expected
