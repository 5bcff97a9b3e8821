"""Routing: the choice of experts for each token, the measures of their load, and two ways to balance it.

Vocabulary: a router's *logits* become *scores* (softmax or sigmoid); the `top_k` experts of the highest *rank* are
chosen; their scores, normalised as the family does, are the *weights* of the mixture. A *bias* is added to the rank
alone: it changes which experts are chosen and never the weights. *Load* is the number of assignments of an expert.

Pure functions of router outputs. Padding counts nowhere.

Sources: Switch Transformer (arXiv 2101.03961; the loss f P, per layer), ST-MoE (arXiv 2202.08906; z-loss), DeepSeek-V3
(arXiv 2412.19437, eq. 16-20; bias for selection, groups, loss per sequence), Qwen's global-batch loss (arXiv
2501.11873), Axolotl's aux-free router (the smoothed bias update).
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from distillcache.models.config import MoeConfig

Scope = Literal["layer", "model", "sequence", "global_batch"]
NEVER = -jnp.inf
# The sum of chosen sigmoids may be zero. DeepSeek, GLM and Bailing add 1e-20, whose inverse square, which the gradient
# has, is no float32; to a sum above 1e-10 either adds nothing.
TINY = 1e-18


class RouterOutput(NamedTuple):
    """One MoE block's routing; stacked, `[L, ...]` over the blocks with experts.

    logits: float32 `[B, T, E]`. probs: float32 `[B, T, E]`, scores that sum to 1. ids: int32 `[B, T, k]`, best first.
    weights: float32 `[B, T, k]`. counts: float32 `[B, E]`, each row's assignments of real tokens.
    """

    logits: Array
    probs: Array
    ids: Array
    weights: Array
    counts: Array | None = None


class RouterSums(NamedTuple):
    """Sums over real tokens, float32. load, probs: `[..., E]`; entropy, z: `[...]`, nats and squared nats; tokens.

    They add up over micro-batches and hosts, and everything that is reported or minimised is made of them.
    """

    load: Array
    probs: Array
    entropy: Array
    z: Array
    tokens: Array


def route(logits: Float[Array, "*B E"], bias: Float[Array, "*#B E"] | None, moe: MoeConfig) -> RouterOutput:
    """Compute everything that a block's router returns, in float32."""
    logits = logits.astype(jnp.float32)
    ids, weights = select_experts(
        logits,
        bias,
        top_k=moe.top_k,
        scores=moe.scores,
        renormalise=moe.renormalise,
        scaling=moe.scaling,
        sum_eps=moe.sum_eps,
        groups=moe.groups,
        groups_kept=moe.groups_kept,
        bias_on_scores=moe.bias_on_scores,
        group_best=moe.group_best,
    )
    return RouterOutput(logits, router_probs(logits, moe.scores), ids, weights)


def router_probs(logits: Float[Array, "*B E"], scores: str) -> Float[Array, "*B E"]:
    """Scores that sum to 1: the softmax, or sigmoids over their sum (DeepSeek-V3 eq. 19)."""
    if scores == "softmax":
        return jax.nn.softmax(logits, axis=-1)
    found = jax.nn.sigmoid(logits)
    return found / jnp.maximum(jnp.sum(found, axis=-1, keepdims=True), TINY)


def select_experts(
    logits: Float[Array, "*B E"],
    bias: Float[Array, "*#B E"] | None,
    *,
    top_k: int,
    scores: Literal["softmax", "sigmoid", "sigmoid_input"] = "softmax",
    renormalise: bool = True,
    scaling: float = 1.0,
    sum_eps: float = 0.0,
    groups: int = 1,
    groups_kept: int = 1,
    bias_on_scores: bool = False,
    group_best: int = 2,
) -> tuple[Int[Array, "*B k"], Float[Array, "*B k"]]:
    """The chosen experts and the weights of their mixture.

    Args:
        logits: float32.
        bias: added to the rank: to the logits of `softmax` and `sigmoid_input` (0.1 on probabilities of 128 experts
            would decide nearly every choice), to the sigmoids of `sigmoid`; with `bias_on_scores` to the probabilities
            of `softmax`, as a family's files mean it. None: no bias, which zeros are as well.
        groups: of neighbouring experts. A group ranks by the sum of its `group_best` best, of `softmax` their
            probabilities; experts outside the best `groups_kept` are never chosen.

    See `MoeConfig` for the others.

    Returns:
        ids: int32, by falling rank; of equals the one with the lower number. weights: float32, without the bias.
    """
    if scores == "softmax":
        own = jax.nn.softmax(logits, axis=-1)
        rank = own if bias_on_scores else logits
    else:
        own = jax.nn.sigmoid(logits)
        rank = own if scores == "sigmoid" else logits
    of_logits = scores == "softmax" and not bias_on_scores
    rank = rank if bias is None else rank + bias
    if groups > 1:
        shares = jax.nn.softmax(rank, axis=-1) if of_logits else rank
        rank = _within_groups(rank, shares, groups, groups_kept, group_best)
    ids = jax.lax.top_k(rank, top_k)[1]
    weights = jnp.take_along_axis(own, ids, axis=-1)
    if renormalise:
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights / (total if scores == "softmax" else total + (sum_eps or TINY))
    return ids, weights * scaling if scaling != 1.0 else weights


def _within_groups(
    rank: Float[Array, "*B E"], shares: Float[Array, "*B E"], groups: int, kept: int, counted: int
) -> Float[Array, "*B E"]:
    """The rank of the experts in the best groups, by the sums of their `counted` best `shares`; the others can never be
    chosen."""
    split = rank.reshape(*rank.shape[:-1], groups, -1)
    best = jax.lax.top_k(shares.reshape(split.shape), min(counted, split.shape[-1]))[0]
    of_group = jnp.sum(best, axis=-1)
    chosen = jax.lax.top_k(of_group, kept)[1]
    inside = jnp.any(chosen[..., None] == jnp.arange(groups), axis=-2)
    return jnp.where(inside[..., None], split, NEVER).reshape(rank.shape)


def router_sums(router: RouterOutput, mask: Bool[Array, "*B"]) -> RouterSums:
    """The sums of one block (or, stacked over blocks, of each: then give a `mask` of all their axes).

    Summed over the mask's axes; probs and z carry gradients, the load does not, as it cannot.
    """
    over = tuple(range(mask.ndim))
    safe = jnp.where(router.probs > 0, router.probs, 1.0)
    entropy = -jnp.sum(safe * jnp.log(safe), axis=-1)
    return RouterSums(
        expert_load(router.ids, mask, router.probs.shape[-1]),
        jnp.sum(jnp.where(mask[..., None], router.probs, 0.0), axis=over),
        jnp.sum(jnp.where(mask, entropy, 0.0), axis=over),
        _sum_of_z(router.logits, mask),
        jnp.sum(mask, dtype=jnp.float32),
    )


def _sum_of_z(logits: Float[Array, "*B E"], mask: Bool[Array, "*B"]) -> Float[Array, ""]:
    """The squared logsumexp, summed over real tokens. Masked before it is computed, for the gradient's sake."""
    z = jnp.square(jax.nn.logsumexp(jnp.where(mask[..., None], logits, 0.0), axis=-1))
    return jnp.sum(jnp.where(mask, z, 0.0))


def expert_load(ids: Int[Array, "*B k"], mask: Bool[Array, "*B"], num_experts: int) -> Float[Array, " E"]:
    """Count the assignments of real tokens to each expert."""
    chosen = jax.nn.one_hot(jnp.where(mask[..., None], ids, num_experts), num_experts, dtype=jnp.float32)
    return jnp.sum(chosen, axis=tuple(range(ids.ndim)))


def balance_of(sums: RouterSums, load: Float[Array, "*L E"] | None = None) -> Float[Array, "*L"]:
    """`E * sum f P` of every block's sums: 1 when balanced, whatever `top_k`; 0 without tokens.

    Args:
        load: what f is the share of, where it is not `sums.load`: of more tokens than these.
    """
    load = sums.load if load is None else load
    share = load / jnp.maximum(jnp.sum(load, axis=-1, keepdims=True), 1.0)
    mean = sums.probs / jnp.maximum(sums.tokens, 1.0)[..., None]
    return sums.load.shape[-1] * jnp.sum(jax.lax.stop_gradient(share) * mean, axis=-1)


def load_balance_loss(
    probs: Float[Array, "L B T E"],
    ids: Int[Array, "L B T k"],
    mask: Bool[Array, "B T"],
    *,
    num_experts: int,
    top_k: int,
    scope: Scope,
    load: Float[Array, "L E"] | None = None,
) -> Float[Array, ""]:
    """`E * sum f_i P_i` with f_i the share of assignments (sums to 1) and P_i the mean router probability.

    Of all blocks at once; what a step sums block by block (`balance_of`) is compared with it.

    1 when balanced, whatever `top_k`. Other systems leave out the division by `top_k` or scale otherwise: docs/moe.md
    has their factors.

    Args:
        scope: over which f and P are taken before their product.
            `layer`: each block, then the mean over blocks (Switch).
            `model`: all blocks together, so that one block's imbalance can cancel another's (transformers).
            `sequence`: each row, then the mean over rows with tokens and over blocks (DeepSeek-V3).
            `global_batch`: P as `layer`, f from `load` (Qwen).
        load: for `global_batch`, the assignments of every block in all micro-batches of the step so far, this one
            included; None: of this one.

    Raises:
        ValueError: shapes and arguments do not fit each other.
    """
    _check_shapes(probs, ids, mask, num_experts, top_k)
    if scope not in get_args(Scope):
        raise ValueError(f"scope is one of {', '.join(get_args(Scope))}, not {scope}")
    if load is not None and scope != "global_batch":
        raise ValueError(f"load is for scope global_batch, not {scope}")
    if load is not None and load.shape != (probs.shape[0], num_experts):
        raise ValueError(f"load {load.shape} is not of {probs.shape[0]} blocks, {num_experts} experts")

    def sums(probs: Array, ids: Array, mask: Array) -> RouterSums:
        return router_sums(RouterOutput(jnp.zeros_like(probs), probs, ids, jnp.zeros(ids.shape)), mask)

    by_block = jax.vmap(sums, in_axes=(0, 0, None))
    if scope == "sequence":
        found = jax.vmap(by_block, in_axes=(1, 1, 0), out_axes=1)(probs, ids, mask)  # [L, B]
        return jnp.sum(balance_of(found)) / jnp.maximum(jnp.sum(found.tokens > 0), 1)
    found = by_block(probs, ids, mask)
    if scope == "model":
        return balance_of(pooled(found))
    return jnp.mean(balance_of(found, load))


def _check_shapes(probs: Array, ids: Array, mask: Array, num_experts: int, top_k: int) -> None:
    if probs.shape[-1] != num_experts or ids.shape[-1] != top_k:
        raise ValueError(f"probs {probs.shape} and ids {ids.shape} are not of {num_experts} experts, {top_k} a token")
    if probs.ndim != 4 or ids.shape[:-1] != probs.shape[:-1] or mask.shape != probs.shape[1:-1]:
        raise ValueError(f"probs {probs.shape} and ids {ids.shape} are not of the tokens of mask {mask.shape}")


def pooled(sums: RouterSums) -> RouterSums:
    """The sums of all blocks, or of all rows, together: `[N, ...]` to `[...]`."""
    return RouterSums(*(jnp.sum(value, axis=0) for value in sums))


def router_z_loss(logits: Float[Array, "*B E"], mask: Bool[Array, "*B"]) -> Float[Array, ""]:
    """The mean over real tokens of the squared logsumexp of a router's logits (ST-MoE eq. 5)."""
    return _sum_of_z(logits.astype(jnp.float32), mask) / jnp.maximum(jnp.sum(mask), 1)


def max_violation(load: Float[Array, "*L E"]) -> Float[Array, "*L"]:
    """Compute the load of the fullest expert over the mean, `max / mean - 1`; 0 without load."""
    mean = jnp.mean(load, axis=-1)
    return jnp.where(mean > 0, jnp.max(load, axis=-1) / jnp.where(mean > 0, mean, 1.0) - 1.0, 0.0)


class BalanceState(NamedTuple):
    """The state of loss-free balancing for each expert, float32 `[..., E]`.

    bias: added to the rank. smoothed: the moving average of the load's share; starts at 0.
    """

    bias: Array
    smoothed: Array


def update_router_bias(
    state: BalanceState,
    load: Float[Array, "*L E"],
    *,
    rate: float,
    momentum: float,
    cap: float | None,
    rule: Literal["ema", "sign"] = "ema",
) -> BalanceState:
    """The bias after a step with this load: up for experts that get too little, down for those that get too much.

        m <- momentum m + (1 - momentum) share;    b <- clip(b + rate (mean(u) subtracted from u), +-cap),  u = 1/E - m

    `sign` (DeepSeek-V3): `b + rate sign(1/E - share)`, of this step's share alone. Without load nothing moves.

    Args:
        cap: None or at most 0: the bias has no bounds.
    """
    total = jnp.sum(load, axis=-1, keepdims=True)
    share = load / jnp.maximum(total, 1.0)
    smoothed = momentum * state.smoothed + (1.0 - momentum) * share
    if rule == "sign":
        push = jnp.sign(total - load.shape[-1] * load)  # exact in counts; of shares, rounding would move a full one
    else:
        wanted = 1.0 / load.shape[-1] - smoothed
        push = wanted - jnp.mean(wanted, axis=-1, keepdims=True)
    bias = state.bias + rate * push
    if cap is not None and cap > 0:
        bias = jnp.clip(bias, -cap, cap)
    moved = BalanceState(bias, smoothed)
    return BalanceState(*(jnp.where(total > 0, new, old) for new, old in zip(moved, state, strict=True)))
