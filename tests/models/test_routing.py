"""Choice of experts, load-balance and z-loss, and the update of biases: against NumPy in double precision, loops and
all; against other systems' formulas, each with its factor to ours; and against transformers itself."""

import functools
import json
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillcache.models.config import MoeConfig
from distillcache.models.routing import (
    BalanceState,
    RouterOutput,
    Scope,
    expert_load,
    load_balance_loss,
    max_violation,
    route,
    router_probs,
    router_sums,
    router_z_loss,
    select_experts,
    update_router_bias,
)
from tests.models.conftest import GOLDEN
from tests.rounding import assert_rounded

# One set of shapes, so that operations compile once. No two axes are equal.
L, B, T, E, K = 2, 3, 5, 6, 4
Scores = Literal["softmax", "sigmoid", "sigmoid_input"]
Rule = Literal["ema", "sign"]
SCORES = ("softmax", "sigmoid", "sigmoid_input")
# One program for each shape and option, where single operations would be compiled one by one.
compiled_loss = jax.jit(load_balance_loss, static_argnames=("num_experts", "top_k", "scope"))
compiled_sums = jax.jit(router_sums)
load_of = functools.partial(jax.jit(expert_load, static_argnums=2), num_experts=E)
SCOPES = ("layer", "model", "sequence", "global_batch")
MASK = np.arange(T) < np.array([5, 2, 0])[:, None]  # a full row, a padded one, one that is padding


def wide(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def normals(*shape: int, seed: int = 0, scale: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=scale, size=shape).astype(np.float32)


def best(values: dict[int, float], count: int) -> list[int]:
    """Keys by falling value; of equals the lower first."""
    return sorted(values, key=lambda key: (-values[key], key))[:count]


def chosen_by_hand(
    logits: np.ndarray,
    bias: np.ndarray | None,
    *,
    top_k: int,
    scores: str = "softmax",
    renormalise: bool = True,
    scaling: float = 1.0,
    groups: int = 1,
    groups_kept: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """`select_experts` of logits `[N, E]`, a token at a time."""
    ids, weights = [], []
    for token in wide(logits):
        own = softmax(token) if scores == "softmax" else sigmoid(token)
        rank = (own if scores == "sigmoid" else token) + (0.0 if bias is None else bias)
        size = len(token) // groups
        members = {group: range(group * size, (group + 1) * size) for group in range(groups)}
        shares = softmax(rank) if scores == "softmax" else rank
        of_group = {group: float(sum(sorted(shares[list(inside)])[-2:])) for group, inside in members.items()}
        kept = best(of_group, groups_kept) if groups > 1 else [0]
        mine = best({expert: rank[expert] for group in kept for expert in members[group]}, top_k)
        share = own[mine] / (own[mine].sum() if renormalise else 1.0) * scaling
        ids.append(mine)
        weights.append(share)
    return np.array(ids), np.array(weights)


# Which experts, with which weights.

CHOICES = [
    {"top_k": 1},
    {"top_k": K},
    {"top_k": E},
    {"top_k": 2, "groups": 3, "groups_kept": 2},
    {"top_k": 3, "groups": 2, "groups_kept": 1},
    {"top_k": 2, "groups": E, "groups_kept": 3},  # groups of one expert, which ranks alone
]


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_experts_are_chosen_as_by_hand(scores: Scores, choice: dict[str, Any]):
    logits = normals(15, E)
    bias = normals(E, seed=1, scale=0.5)
    for renormalise, scaling in ((False, 1.0), (True, 2.5)):
        how = {**choice, "scores": scores, "renormalise": renormalise, "scaling": scaling}
        for added in (None, jnp.asarray(bias)):
            ids, weights = select_experts(jnp.asarray(logits), added, **how)
            assert (ids.dtype, weights.dtype) == (jnp.int32, jnp.float32)
            expected = chosen_by_hand(logits, None if added is None else bias, **how)
            np.testing.assert_array_equal(ids, expected[0])
            np.testing.assert_allclose(weights, expected[1], rtol=2e-6)


@pytest.mark.parametrize("scores", SCORES)
def test_a_bias_changes_the_choice_and_never_the_weights(scores: Scores):
    logits = jnp.asarray([[3.0, 2.0, 1.0, 0.0, -1.0, -2.0]])
    bias = jnp.asarray([0.0, 0.0, 0.0, 0.0, 0.0, 9.0])  # lifts the last before all others
    how = {"top_k": 3, "scores": scores, "renormalise": False}
    plain, biased = select_experts(logits, None, **how), select_experts(logits, bias, **how)
    np.testing.assert_array_equal(plain[0], [[0, 1, 2]])
    np.testing.assert_array_equal(biased[0], [[5, 0, 1]])
    np.testing.assert_array_equal(biased[1][:, 1:], plain[1][:, :2])
    own = softmax(wide(logits)) if scores == "softmax" else sigmoid(wide(logits))
    np.testing.assert_allclose(biased[1][0, 0], own[0, 5], rtol=1e-6)
    gradient = jax.grad(lambda bias: jnp.sum(select_experts(logits, bias, top_k=3, scores=scores)[1][0, 0]))(bias)
    np.testing.assert_array_equal(gradient, np.zeros(E))


@pytest.mark.bits
def test_a_bias_may_differ_between_rows():
    logits, biases = normals(B, T, E), normals(B, E, seed=1)
    together = select_experts(jnp.asarray(logits), jnp.asarray(biases)[:, None], top_k=K)
    for row in range(B):
        alone = select_experts(jnp.asarray(logits[row]), jnp.asarray(biases[row]), top_k=K)
        np.testing.assert_array_equal(together[0][row], alone[0])
        assert_rounded(together[1][row], alone[1])


@pytest.mark.bits
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("groups", [1, 3])
def test_a_bias_of_zero_is_no_bias_to_the_bit(scores: Scores, groups: int):
    logits = jnp.asarray(normals(15, E)).at[:5, :3].set(0.5)  # with ties
    how = {"top_k": 2, "scores": scores, "groups": groups, "groups_kept": min(groups, 2)}
    plain, zero = select_experts(logits, None, **how), select_experts(logits, jnp.zeros(E), **how)
    np.testing.assert_array_equal(plain[0], zero[0])
    np.testing.assert_array_equal(plain[1], zero[1])


@pytest.mark.parametrize("scores", SCORES)
def test_of_equals_the_lower_number_comes_first(scores: Scores):
    logits = jnp.asarray([[0.0] * E, [1.0, 3.0, 3.0, 2.0, 3.0, 3.0]])
    ids, _ = select_experts(logits, None, top_k=3, scores=scores)
    np.testing.assert_array_equal(ids, [[0, 1, 2], [1, 2, 4]])
    ids, _ = select_experts(logits, None, top_k=3, scores=scores, groups=3, groups_kept=2)
    np.testing.assert_array_equal(ids, [[0, 1, 2], [2, 4, 5]])


@pytest.mark.parametrize("scores", SCORES)
def test_probabilities_sum_to_one(scores: Scores):
    logits = normals(15, E)
    own = np.exp(wide(logits)) if scores == "softmax" else sigmoid(wide(logits))
    found = router_probs(jnp.asarray(logits), scores)
    np.testing.assert_allclose(found, own / own.sum(-1, keepdims=True), rtol=2e-6)


@functools.partial(jax.jit, static_argnums=1)
@jax.value_and_grad
def weighed_choice(logits: jax.Array, scores: Scores) -> jax.Array:
    weight = jnp.arange(E, dtype=jnp.float32)
    _, weights = select_experts(logits, None, top_k=K, scores=scores)
    return jnp.sum(weights * weight[:K]) + jnp.sum(router_probs(logits, scores) * weight)


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("logit", [-200.0, -50.0, 0.0, 200.0])
def test_saturated_routers_have_finite_weights_and_gradients(scores: Scores, logit: float):
    """Sigmoids of all experts may be zero, or too small for their inverse square to be a float32."""
    value, gradient = weighed_choice(np.full((1, E), logit, np.float32) + 0.01 * np.arange(E, dtype=np.float32), scores)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_route_is_float32_and_follows_the_config():
    logits, bias = normals(B, T, E), normals(E, seed=1)
    moe = MoeConfig(E, 2, 8, scores="sigmoid", scaling=2.5, groups=3, groups_kept=2, bias=True)
    found = route(jnp.asarray(logits, jnp.bfloat16), jnp.asarray(bias), moe)
    rounded = np.float32(jnp.asarray(logits, jnp.bfloat16)).reshape(-1, E)
    how = {"top_k": 2, "scores": "sigmoid", "scaling": 2.5, "groups": 3, "groups_kept": 2}
    ids, weights = chosen_by_hand(rounded, bias, **how)
    np.testing.assert_array_equal(found.ids, ids.reshape(B, T, 2))
    np.testing.assert_allclose(found.weights, weights.reshape(B, T, 2), rtol=2e-6)
    np.testing.assert_array_equal(found.logits.reshape(-1, E), rounded)
    assert {value.dtype for value in (found.logits, found.probs, found.weights)} == {jnp.dtype("float32")}


# The load-balance loss.

Cell = tuple[int, int, int]


def balance_by_hand(probs: np.ndarray, ids: np.ndarray, cells: Iterable[Cell], load: np.ndarray | None = None) -> float:
    """E sum f P over these (block, row, token)."""
    cells = list(cells)
    if not cells:
        return 0.0
    counts, mass = np.zeros(probs.shape[-1]), np.zeros(probs.shape[-1])
    for cell in cells:
        mass += probs[cell]
        for expert in ids[cell]:
            counts[expert] += 1
    counts = counts if load is None else load
    return float(probs.shape[-1] * sum(counts / counts.sum() * mass / len(cells)))


def loss_by_hand(
    probs: np.ndarray, ids: np.ndarray, mask: np.ndarray, scope: Scope, load: np.ndarray | None = None
) -> float:
    def cells(blocks: Iterable[int], rows: Iterable[int]) -> list[Cell]:
        return [(at, row, t) for at in blocks for row in rows for t in range(mask.shape[1]) if mask[row, t]]

    blocks, rows = range(probs.shape[0]), range(probs.shape[1])
    if scope == "model":
        return balance_by_hand(probs, ids, cells(blocks, rows))
    if scope == "sequence":
        filled = [row for row in rows if mask[row].any()]
        return float(np.mean([balance_by_hand(probs, ids, cells([at], [row])) for at in blocks for row in filled]))
    loads = [None] * len(blocks) if load is None else load
    return float(np.mean([balance_by_hand(probs, ids, cells([at], rows), loads[at]) for at in blocks]))


def routing(top_k: int = K, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """probs `[L, B, T, E]`, ids `[L, B, T, k]`."""
    probs = softmax(normals(L, B, T, E, seed=seed))
    return probs, np.argsort(-probs, axis=-1)[..., :top_k]


def loss(probs, ids, mask, scope: Scope, load=None) -> jax.Array:
    return compiled_loss(probs, ids, mask, num_experts=probs.shape[-1], top_k=ids.shape[-1], scope=scope, load=load)


@pytest.mark.parametrize("top_k", [1, K])
@pytest.mark.parametrize("scope", SCOPES)
def test_load_balance_loss_is_the_one_computed_by_hand(scope: Scope, top_k: int):
    probs, ids = routing(top_k)
    for mask in (MASK, np.ones_like(MASK)):
        np.testing.assert_allclose(loss(probs, ids, mask, scope), loss_by_hand(probs, ids, mask, scope), rtol=1e-6)


def test_load_balance_loss_with_the_load_of_more_tokens():
    probs, ids = routing()
    load = np.random.default_rng(3).integers(0, 50, (L, E)).astype(np.float32)
    expected = loss_by_hand(probs, ids, MASK, "global_batch", load)
    np.testing.assert_allclose(loss(probs, ids, MASK, "global_batch", load), expected, rtol=1e-6)
    own = np.stack([load_of(block, MASK) for block in ids])
    assert own.sum() == MASK.sum() * K * L
    assert loss(probs, ids, MASK, "global_batch", own) == loss(probs, ids, MASK, "layer")


def test_the_gradient_is_that_of_the_mean_probability():
    """The load has none: dL/dP = E f / tokens, in every block over L."""
    probs, ids = routing()
    found = jax.grad(lambda p: loss(p, ids, MASK, "layer"))(jnp.asarray(probs))
    load = np.stack([load_of(block, MASK) for block in ids])
    share = load / load.sum(-1, keepdims=True)
    expected = np.where(MASK[None, ..., None], E * share[:, None, None] / MASK.sum() / L, 0.0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_a_balanced_load_costs_one(scope: Scope, top_k: int):
    """Exactly, whatever top_k: with an even load whatever the probabilities, and with even probabilities whatever the
    load."""
    experts, tokens = 8, 8
    ids = (np.arange(tokens)[:, None] * top_k + np.arange(top_k)) % experts
    ids = np.broadcast_to(ids, (L, 1, tokens, top_k))
    probs = softmax(normals(L, 1, tokens, experts)).astype(np.float32)
    mask = np.ones((1, tokens), bool)
    even = np.full_like(probs, 1 / experts)
    assert loss(even, ids, mask, scope) == 1.0
    assert loss(even, np.zeros_like(ids[..., :1]), mask, scope) == 1.0
    np.testing.assert_allclose(loss(probs, ids, mask, scope), 1.0, rtol=1e-6)


def test_all_on_one_expert_costs_as_much_as_there_are_experts():
    probs = np.zeros((L, B, T, E), np.float32)
    probs[..., 2] = 1.0
    assert loss(probs, np.full((L, B, T, 1), 2), MASK, "layer") == E


def test_pooled_blocks_hide_each_others_imbalance():
    """Half of the experts for one block and the other half for the other: even together, and nowhere."""
    probs = np.zeros((2, 1, 2, 4), np.float32)
    probs[0, :, :, :2] = probs[1, :, :, 2:] = 0.5
    ids = np.array([[0, 1], [2, 3]])[:, None, :, None]
    mask = np.ones((1, 2), bool)
    assert loss(probs, ids, mask, "model") == 1.0
    assert loss(probs, ids, mask, "layer") == 2.0


@pytest.mark.parametrize("scope", SCOPES)
def test_padding_counts_nowhere(scope: Scope):
    """More of it, on any side, with anything inside: the same value and the same gradient, of which it gets none."""
    probs, ids = routing()
    value, gradient = jax.jit(jax.value_and_grad(lambda p: loss(p, ids, MASK, scope)))(jnp.asarray(probs))
    pads = ((0, 0), (1, 1), (0, 2), (0, 0))
    padded = np.pad(np.where(MASK[None, ..., None], probs, np.nan), pads, constant_values=np.nan)
    numbers = np.pad(np.where(MASK[None, ..., None], ids, 99), pads, constant_values=-7)
    mask = np.pad(MASK, pads[1:3])
    found, slope = jax.jit(jax.value_and_grad(lambda p: loss(p, numbers, mask, scope)))(jnp.asarray(padded))
    np.testing.assert_allclose(found, value, rtol=1e-6)
    np.testing.assert_allclose(slope[:, 1:-1, :-2], gradient, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(slope)[:, ~mask], 0.0)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_order_of_tokens_rows_and_experts_does_not_matter(scope: Scope):
    probs, ids = routing()
    expected = loss(probs, ids, MASK, scope)
    rng = np.random.default_rng(1)
    rows, tokens, experts = rng.permutation(B), rng.permutation(T), rng.permutation(E)
    np.testing.assert_allclose(
        loss(probs[:, rows][:, :, tokens], ids[:, rows][:, :, tokens], MASK[rows][:, tokens], scope),
        expected,
        rtol=1e-6,
    )
    renamed = np.argsort(experts)[ids]  # expert `experts[n]` is now called n
    np.testing.assert_allclose(loss(probs[..., experts], renamed, MASK, scope), expected, rtol=1e-6)


@pytest.mark.parametrize("scope", SCOPES)
def test_nothing_but_padding_costs_nothing(scope: Scope):
    probs, ids = routing()
    value, gradient = jax.jit(jax.value_and_grad(lambda p: loss(p, ids, np.zeros_like(MASK), scope)))(probs)
    assert value == 0.0
    np.testing.assert_array_equal(gradient, np.zeros_like(probs))


WRONG = {
    "other experts": {"num_experts": E + 1},
    "other top_k": {"top_k": K - 1},
    "ids of fewer tokens": {"ids": (L, B, T - 1, K)},
    "ids of fewer blocks": {"ids": (1, B, T, K)},
    "a mask of one row": {"mask": (1, T)},
    "a mask of one token": {"mask": (B, 1)},
    "a mask of blocks": {"mask": (L, B, T)},
    "a load of one block": {"scope": "global_batch", "load": (E,)},
    "a load of other experts": {"scope": "global_batch", "load": (L, 1)},
    "a load for another scope": {"load": (L, E)},
    "an unknown scope": {"scope": "expert"},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused(wrong: dict):
    shapes = {"probs": (L, B, T, E), "ids": (L, B, T, K), "mask": (B, T), "load": None}
    shapes |= {name: shape for name, shape in wrong.items() if name in shapes}
    given = {"num_experts": E, "top_k": K, "scope": "layer"} | {k: v for k, v in wrong.items() if k not in shapes}
    load = None if shapes["load"] is None else jnp.ones(shapes["load"])
    arrays = jnp.ones(shapes["probs"]), jnp.zeros(shapes["ids"], int), jnp.ones(shapes["mask"], bool)
    with pytest.raises(ValueError):  # noqa: PT011
        load_balance_loss(*arrays, load=load, **given)


# Other systems' load-balance losses: their formula in their own terms, and what ours is to be multiplied with.


def transformers_loss(probs: np.ndarray, ids: np.ndarray, mask: np.ndarray) -> float:
    """`load_balancing_loss_func` of modeling_mixtral: all blocks pooled, assignments over tokens."""
    experts = probs.shape[-1]
    tokens = mask.sum() * probs.shape[0]
    per_expert = np.array([(ids == e).sum(-1)[:, mask].sum() for e in range(experts)]) / tokens
    return experts * (per_expert * probs[:, mask].sum((0, 1)) / tokens).sum()


def switch_loss(probs: np.ndarray, top1: np.ndarray) -> float:
    """Switch Transformer, eq. 4 to 6 without alpha, of one layer: N sum f_i P_i."""
    count = probs.shape[-1]
    fraction = [np.mean(top1 == expert) for expert in range(count)]
    return count * float(np.dot(fraction, probs.reshape(-1, count).mean(0)))


def megablocks_loss(probs: np.ndarray, ids: np.ndarray) -> float:
    """`batched_load_balancing_loss` of megablocks/layers/moe.py without its weight."""
    blocks, rows, length, count = probs.shape
    tokens = rows * length
    counts = np.concatenate([np.bincount(block.ravel(), minlength=count) for block in ids])
    scores = np.concatenate([block.reshape(-1, count).mean(0) for block in probs])
    return count / (blocks * tokens * ids.shape[-1]) * float(counts @ scores)


def deepseek_loss(affinities: np.ndarray, top_k: int) -> float:
    """DeepSeek-V3, eq. 17 to 20 without alpha, of one sequence: s `[T, N_r]`, sigmoids."""
    length, count = affinities.shape
    chosen = np.argsort(-affinities, axis=-1)[:, :top_k]
    f = np.array([(chosen == i).sum() for i in range(count)]) * count / (top_k * length)
    p = (affinities / affinities.sum(-1, keepdims=True)).mean(0)
    return float(f @ p)


def maxtext_loss(probs: np.ndarray, ids: np.ndarray) -> float:
    """`RoutedMoE.load_balance_loss` of MaxText's layers/moe.py, without its weight, of one layer."""
    count = probs.shape[-1]
    one_hot = (ids[..., None] == np.arange(count)).sum(2)  # [B, T, E]
    density, density_prob = one_hot.mean(1), probs.mean(1)
    return float((density * density_prob).mean() * count**2)


def qwen_loss(probs: list[np.ndarray], ids: list[np.ndarray]) -> float:
    """arXiv 2501.11873, of one layer: N_E sum f_i P_i in every micro-batch, f_i of all of them."""
    count = probs[0].shape[-1]
    everything = np.concatenate([part.ravel() for part in ids])
    f = np.bincount(everything, minlength=count) / len(everything)
    return float(np.mean([count * (f @ part.reshape(-1, count).mean(0)) for part in probs]))


EVERYWHERE = np.ones((B, T), bool)


@pytest.mark.parametrize("mask", [MASK, EVERYWHERE], ids=["padded", "full"])
def test_transformers_is_top_k_times_ours_of_all_blocks(mask: np.ndarray):
    probs, ids = routing()
    np.testing.assert_allclose(transformers_loss(probs, ids, mask), K * loss(probs, ids, mask, "model"), rtol=1e-6)


def test_switch_is_ours_of_a_layer():
    probs, ids = routing(top_k=1)
    mean = np.mean([switch_loss(probs[at], ids[at, ..., 0]) for at in range(L)])
    np.testing.assert_allclose(mean, loss(probs, ids, EVERYWHERE, "layer"), rtol=1e-6)


def test_megablocks_is_ours_of_a_layer():
    probs, ids = routing()
    np.testing.assert_allclose(megablocks_loss(probs, ids), loss(probs, ids, EVERYWHERE, "layer"), rtol=1e-6)


def test_deepseek_is_ours_of_a_sequence():
    logits = normals(L, B, T, E)
    affinities = sigmoid(wide(logits))
    probs = np.asarray(router_probs(jnp.asarray(logits), "sigmoid"))
    ids = np.asarray(select_experts(jnp.asarray(logits), None, top_k=2, scores="sigmoid")[0])
    expected = np.mean([deepseek_loss(row, 2) for block in affinities for row in block])
    np.testing.assert_allclose(loss(probs, ids, EVERYWHERE, "sequence"), expected, rtol=1e-6)


def test_maxtext_is_top_k_times_ours_of_a_sequence():
    """Padding counts there; here it does not, so the rows are full."""
    probs, ids = routing()
    mean = np.mean([maxtext_loss(probs[at], ids[at]) for at in range(L)])  # over layers, as its loss_fn takes it
    np.testing.assert_allclose(mean, K * loss(probs, ids, EVERYWHERE, "sequence"), rtol=1e-6)


def test_qwens_is_ours_with_the_whole_batchs_load():
    """The mean over equal micro-batches; and with the whole load it is what one large batch has."""
    probs, ids = routing()
    load = np.stack([load_of(block, EVERYWHERE) for block in ids])
    parts = [loss(probs[:, [row]], ids[:, [row]], EVERYWHERE[[row]], "global_batch", load) for row in range(B)]
    expected = np.mean([qwen_loss(list(probs[at]), list(ids[at])) for at in range(L)])
    np.testing.assert_allclose(np.mean(parts), expected, rtol=1e-6)
    np.testing.assert_allclose(np.mean(parts), loss(probs, ids, EVERYWHERE, "layer"), rtol=1e-6)


def test_transformers_itself():
    """Value and gradient by the logits, as tests/golden/make_load_balance.py stored them."""
    golden = json.loads((GOLDEN / "load_balance.json").read_text())
    logits, mask = jnp.asarray(golden["logits"], jnp.float32), np.array(golden["mask"], bool)
    assert len(golden["cases"]) == 6

    def ours(logits: jax.Array, top_k: int, mask: np.ndarray) -> jax.Array:
        ids, _ = select_experts(logits, None, top_k=top_k)
        return top_k * loss(router_probs(logits, "softmax"), ids, mask, "model")

    of = jax.jit(jax.value_and_grad(ours), static_argnums=1)
    for case in golden["cases"]:
        real = mask if case["masked"] else np.ones_like(mask)
        value, gradient = of(logits, case["top_k"], real)
        np.testing.assert_allclose(value, case["loss"], rtol=1e-6)
        np.testing.assert_allclose(gradient, case["gradient"], rtol=1e-4, atol=1e-8)


# Sums, z-loss, and what is reported.


def test_router_sums_are_those_by_hand():
    logits = normals(B, T, E)
    router = route(jnp.asarray(logits), None, MoeConfig(E, K, 8))
    found = compiled_sums(router, MASK)
    real = wide(logits)[MASK]
    probs = softmax(real)
    np.testing.assert_array_equal(found.load, np.bincount(np.asarray(router.ids)[MASK].ravel(), minlength=E))
    np.testing.assert_allclose(found.probs, probs.sum(0), rtol=1e-6)
    np.testing.assert_allclose(found.entropy, -(probs * np.log(probs)).sum(), rtol=1e-6)
    np.testing.assert_allclose(found.z, (np.log(np.exp(real).sum(-1)) ** 2).sum(), rtol=1e-6)
    assert found.tokens == MASK.sum()


def test_router_sums_add_up_over_rows_and_blocks():
    routed = route(jnp.asarray(normals(L, B, T, E)), None, MoeConfig(E, K, 8))
    router = RouterOutput(*map(np.asarray, routed[:4]))
    mask = np.broadcast_to(MASK, (L, B, T))
    whole = compiled_sums(router, mask)
    parts = [
        compiled_sums(RouterOutput(*(value[at, row] for value in router[:4])), mask[at, row])
        for at in range(L)
        for row in range(B)
    ]
    for name, value in whole._asdict().items():
        np.testing.assert_allclose(sum(getattr(part, name) for part in parts), value, rtol=1e-6)


def test_router_sums_of_certain_routers_and_of_padding():
    """A probability of zero adds no entropy; what stands in padding adds nothing, whatever it is."""
    probs = jnp.zeros((B, T, E)).at[..., 1].set(1.0)
    nan = jnp.full((B, T, E), jnp.nan)
    ids = jnp.ones((B, T, 1), jnp.int32)
    real = jnp.asarray(MASK)[..., None]
    router = RouterOutput(jnp.where(real, 0.0, nan), jnp.where(real, probs, nan), jnp.where(real, ids, 77), probs)
    found = compiled_sums(router, MASK)
    assert found.entropy == 0.0
    np.testing.assert_allclose(found.z, MASK.sum() * np.log(E) ** 2, rtol=1e-6)
    np.testing.assert_array_equal(found.probs, np.eye(E)[1] * MASK.sum())
    np.testing.assert_array_equal(found.load, np.eye(E)[1] * MASK.sum())


def test_router_z_loss_is_the_one_computed_by_hand():
    logits = normals(B, T, E)
    expected = np.mean([np.log(np.exp(token).sum()) ** 2 for token in wide(logits)[MASK]])
    np.testing.assert_allclose(router_z_loss(jnp.asarray(logits), jnp.asarray(MASK)), expected, rtol=1e-6)
    half = router_z_loss(jnp.asarray(logits, jnp.bfloat16), jnp.asarray(MASK))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, expected, rtol=2e-2)
    assert router_z_loss(jnp.asarray(logits), jnp.zeros((B, T), bool)) == 0.0


def test_the_z_loss_of_padding_has_neither_value_nor_gradient():
    real = MASK[..., None]
    logits = normals(B, T, E)
    of = jax.jit(jax.value_and_grad(lambda x: router_z_loss(x, jnp.asarray(MASK))))
    summed = jax.jit(jax.grad(lambda x: router_sums(route(x, None, MoeConfig(E, K, 8)), jnp.asarray(MASK)).z))
    value, gradient = of(np.where(real, logits, 0.0))
    for garbage in (np.nan, np.inf, -1e30):
        found, slope = of(np.where(real, logits, np.float32(garbage)))
        assert found == value
        np.testing.assert_array_equal(slope, gradient)
        slope = summed(np.where(real, logits, np.float32(garbage)))
        np.testing.assert_allclose(slope, np.asarray(gradient) * MASK.sum(), rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(gradient)[~MASK], 0.0)


def test_max_violation():
    load = jnp.asarray([[2.0, 2.0, 2.0, 2.0], [8.0, 0.0, 0.0, 0.0], [3.0, 2.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(max_violation(load), [0.0, 3.0, 0.5, 0.0])


# Balancing by biases.

RULE = {"rate": 0.1, "momentum": 0.9, "cap": None}


def fresh(*shape: int) -> BalanceState:
    return BalanceState(jnp.zeros(shape), jnp.zeros(shape))


@pytest.mark.parametrize("rule", ["ema", "sign"])
@pytest.mark.parametrize("cap", [None, 0.0, -1.0, 0.03])
def test_biases_move_as_by_hand(rule: Rule, cap: float | None):
    """Over several steps, of several blocks, one of them without tokens now and then."""
    loads = np.random.default_rng(0).integers(0, 40, (7, L, E)).astype(np.float32)
    loads[2, 0] = 0.0
    loads[4] = 0.0
    state = fresh(L, E)
    bias, smoothed = np.zeros((L, E)), np.zeros((L, E))
    for load in loads:
        state = update_router_bias(state, jnp.asarray(load), rate=0.1, momentum=0.9, cap=cap, rule=rule)
        for at in range(L):
            if load[at].sum() == 0:
                continue
            share = load[at] / load[at].sum()
            smoothed[at] = 0.9 * smoothed[at] + 0.1 * share
            push = 1 / E - smoothed[at]
            bias[at] += 0.1 * (np.sign(load[at].sum() - E * load[at]) if rule == "sign" else push - push.mean())
            if cap is not None and cap > 0:
                bias[at] = np.minimum(np.maximum(bias[at], -cap), cap)
        np.testing.assert_allclose(state.bias, bias, atol=1e-7)
        np.testing.assert_allclose(state.smoothed, smoothed, atol=1e-7)
    assert np.abs(bias).max() > 0.02
    if cap is not None and cap > 0:
        assert np.abs(state.bias).max() <= np.float32(cap)


def test_biases_of_the_smoothed_rule_sum_to_zero():
    state = fresh(L, E)
    for load in np.random.default_rng(0).integers(0, 40, (20, L, E)):
        state = update_router_bias(state, jnp.asarray(load, jnp.float32), **RULE)
    np.testing.assert_allclose(np.sum(state.bias, -1), 0.0, atol=1e-6)
    assert np.abs(state.bias).min() > 1e-4


def test_nothing_moves_without_tokens():
    state = BalanceState(jnp.asarray([0.3, -0.2]), jnp.asarray([0.6, 0.4]))
    for rule in ("ema", "sign"):
        found = update_router_bias(state, jnp.zeros(2), **RULE, rule=rule)
        np.testing.assert_array_equal(found.bias, state.bias)
        np.testing.assert_array_equal(found.smoothed, state.smoothed)


@pytest.mark.parametrize("rule", ["ema", "sign"])
def test_an_even_load_moves_no_bias(rule: Rule):
    """E = 6 is no power of two: the mean share must be the very number that it is compared with."""
    found = update_router_bias(BalanceState(jnp.ones(E), jnp.full(E, 1 / E)), jnp.full(E, 7.0), **RULE, rule=rule)
    np.testing.assert_allclose(found.bias, np.ones(E), atol=0 if rule == "sign" else 1e-8)


def test_biases_balance_a_lopsided_router():
    """Every token prefers the same experts: in 400 steps the biases have evened out what they choose."""
    preference = np.array([2.0, 1.5, 1.0, 0.0, -0.5, -1.0])
    logits = jnp.asarray(normals(200, E, scale=1.0) + preference, jnp.float32)
    real = jnp.ones(200, bool)

    @jax.jit
    def after(state: BalanceState) -> tuple[BalanceState, jax.Array]:
        def step(state: BalanceState, _: None) -> tuple[BalanceState, None]:
            load = expert_load(select_experts(logits, state.bias, top_k=2)[0], real, E)
            return update_router_bias(state, load, **RULE), None

        state = jax.lax.scan(step, state, length=400)[0]
        return state, expert_load(select_experts(logits, state.bias, top_k=2)[0], real, E)

    before = expert_load(select_experts(logits, None, top_k=2)[0], real, E)
    state, load = after(fresh(E))
    assert max_violation(before) > 0.8
    assert max_violation(load) < 0.1
    assert np.all(np.diff(state.bias) > 0)  # the less an expert is wanted, the more it is lifted
