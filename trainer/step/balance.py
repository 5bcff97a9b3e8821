"""Routing in a training step: the auxiliary losses, or the bias updates that replace them.

Two ways to keep experts evenly loaded, one at a time: `load_balance` is a loss with a gradient; `noaux_tc` has none and
moves a bias of each expert after the optimizer's step, by the step's loads (models/routing.py). Both, and the metrics,
are made of sums over each row's real tokens, so that a batch may be cut into micro-batches and over devices.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from distillcache.models.config import ModelConfig, MoeConfig
from distillcache.models.layers.context import BlockContext
from distillcache.models.routing import (
    BalanceState,
    RouterOutput,
    RouterSums,
    Scope,
    balance_of,
    pooled,
    router_sums,
    update_router_bias,
)
from distillcache.schemas.config.train import LossConfig, MeshConfig, TrainSpec, Weight
from distillcache.schemas.errors import ConfigError
from distillcache.trainer.step.parameters import ROUTER_BIAS, Parameters, StackAddress, address_prefix
from distillcache.trainer.step.schedules import may_count


class Totals(NamedTuple):
    """Totals of a whole batch: real tokens, and rows that have any."""

    tokens: Array
    rows: Array

    @classmethod
    def of(cls, mask: Bool[Array, "B T"]) -> "Totals":
        return cls(jnp.sum(mask, dtype=jnp.float32), jnp.sum(jnp.any(mask, axis=1), dtype=jnp.float32))


class BlockRouting(NamedTuple):
    """Routing of one block (or, stacked, of each) in a step. balance: its load-balance loss times the batch's real
    tokens, so that it is divided as the other losses are. loads: `[G, E]`, of the rows of each bias.
    """

    sums: RouterSums
    balance: Array
    loads: Array


@dataclass(frozen=True)
class Balancing:
    """The static side: what is collected from routers, and how it is used.

    scope: of the load-balance loss. with_loss: it or the z-loss may count. update: the arguments of
    `update_router_bias` after every step but the first `warmup`; None: biases stay as they are. bias_groups: how many
    biases an expert has, each for an equal run of a batch's rows. seed: of the noise on the router's input.
    """

    moe: MoeConfig
    scope: Scope = "layer"
    with_loss: bool = False
    update: tuple[tuple[str, Any], ...] | None = None
    warmup: int = 0
    bias_groups: int = 1
    seed: int = 0

    @property
    def collects(self) -> bool:
        """Return whether anything is to be known of the routing."""
        return self.with_loss or self.update is not None

    def context(self, context: BlockContext, rows: Int[Array, " B"], batch_rows: int, step: Array) -> BlockContext:
        """The blocks' context in training.

        Args:
            rows: the numbers of these rows in the whole batch of `batch_rows`.
        """
        if self.bias_groups > 1:
            context = context._replace(bias_groups=rows * self.bias_groups // batch_rows)
        if self.moe.jitter:
            key = jax.random.fold_in(jax.random.key(self.seed), step)
            context = context._replace(noise=jax.vmap(jax.random.fold_in, (None, 0))(key, rows))
        return context

    def of_rows(self, router: RouterOutput, mask: Bool[Array, "B T"]) -> RouterSums:
        """The sums of each row of one block, `[B, ...]`."""
        return jax.vmap(router_sums)(router, mask)

    def of_block(
        self,
        sums: RouterSums,
        rows: Int[Array, " B"],
        batch_rows: int,
        totals: Totals,
        load_before: Array | None = None,
    ) -> BlockRouting:
        """Compute one block's routing from the sums of its rows.

        Args:
            load_before: `[E]`, of the step's micro-batches before this one, for scope `global_batch`.
        """
        whole = pooled(sums)
        if self.scope == "sequence":
            balance = jnp.sum(balance_of(sums)) / jnp.maximum(totals.rows, 1.0) * totals.tokens
        else:
            seen = None if self.scope != "global_batch" or load_before is None else load_before + whole.load
            balance = balance_of(whole, seen) * whole.tokens
        groups = jnp.arange(self.bias_groups)[:, None] == rows * self.bias_groups // batch_rows
        return BlockRouting(whole, balance, groups.astype(jnp.float32) @ sums.load)

    def of_blocks(
        self, sums: RouterSums, rows: Int[Array, " B"], batch_rows: int, totals: Totals, load_before: Array | None
    ) -> BlockRouting:
        """The same of several blocks at once, `[L, B, ...]`; scope `model` needs them all."""

        def one(mine: RouterSums, before: Array | None) -> BlockRouting:
            return self.of_block(mine, rows, batch_rows, totals, before)

        found = jax.vmap(one, (0, None if load_before is None else 0))(sums, load_before)
        if self.scope != "model":
            return found
        whole = pooled(found.sums)
        of_all = balance_of(whole) * whole.tokens / found.balance.shape[0]
        return found._replace(balance=jnp.broadcast_to(of_all, found.balance.shape))

    def nothing(self) -> BlockRouting:
        """That of a block without experts."""
        experts, zero = jnp.zeros(self.moe.num_experts), jnp.zeros(())
        loads = jnp.zeros((self.bias_groups, self.moe.num_experts))
        return BlockRouting(RouterSums(experts, experts, zero, zero, zero), zero, loads)

    def after_step(self, state: Mapping[str, BalanceState], loads: Mapping[str, Array], step: Array) -> Any:
        """The biases after step number `step` (from 0), by unit; `loads`: `[repeats, G, E]`."""
        if self.update is None:
            return state

        def moved(unit: str, old: BalanceState) -> BalanceState:
            new = update_router_bias(old, loads[unit], **dict(self.update or ()))
            return BalanceState(*(jnp.where(step >= self.warmup, n, o) for n, o in zip(new, old, strict=True)))

        return {unit: moved(unit, old) for unit, old in state.items()}


def make_balancing(
    spec: TrainSpec, mesh: MeshConfig, loss: LossConfig, model: ModelConfig, stage: str, *, blocks_apart: bool
) -> Balancing | None:
    """Choose the balancing that a stage applies to this student's routers; None if it has no experts.

    Args:
        blocks_apart: blocks are trained apart from each other (`StepProgram`).

    Raises:
        ConfigError: something is requested that the student, the mode or the mesh does not allow.
    """
    balances, weighs_z = may_count(loss.load_balance.weight), may_count(loss.router_z)
    if model.moe is None:
        _refuse_without_experts(spec.moe_balance_type, mesh, loss, stage)
        return None
    if spec.moe_balance_type == "gshard" and not balances:
        raise ConfigError(
            "moe_balance_type: gshard balances by the auxiliary loss, which has no weight",
            {"stage": stage, "loss.load_balance.weight": loss.load_balance.weight},
            "give it one, 0.01 for example",
        )
    if balances and loss.load_balance.scope == "model" and blocks_apart:
        raise ConfigError(
            "blocks are trained independently, so their load cannot be balanced together",
            {"stage": stage, "loss.load_balance.scope": "model"},
            "use scope layer, sequence or global_batch, or mode: feature",
        )
    update = None
    if spec.moe_balance_type == "noaux_tc":
        update = (
            ("rate", spec.moe_update_rate),
            ("momentum", spec.moe_update_momentum),
            ("cap", spec.moe_bias_cap),
            ("rule", spec.moe_update_rule),
        )
    return Balancing(
        model.moe,
        loss.load_balance.scope,
        balances or weighs_z,
        update,
        spec.moe_afb_warmup_steps,
        _bias_groups(mesh, spec.expert_parallel_size, spec.moe_bias_sync_group),
        spec.seed,
    )


def router_weights(balancing: Balancing | None, loss: LossConfig) -> dict[str, Weight]:
    """lambda and zeta, where they may count."""
    if balancing is None or not balancing.with_loss:
        return {}
    return {"load_balance": loss.load_balance.weight, "router_z": loss.router_z}


def _refuse_without_experts(balance_type: str | None, mesh: MeshConfig, loss: LossConfig, stage: str) -> None:
    asked = {
        "loss.load_balance.weight": may_count(loss.load_balance.weight),
        "loss.router_z": may_count(loss.router_z),
        "moe_balance_type": balance_type is not None,
        "mesh.expert": mesh.expert > 1,
    }
    if names := [name for name, asks in asked.items() if asks]:
        raise ConfigError(
            "the student has no experts to balance or to split",
            {"stage": stage, "asked for": ", ".join(names)},
            "leave these out, or train a student with experts",
        )


def _bias_groups(mesh: MeshConfig, size: int, sync_group: str) -> int:
    """Return the number of biases of an expert: one, or one for each group of devices that hold all experts once."""
    world = mesh.data * mesh.fsdp * mesh.expert
    if world % size:
        raise ConfigError(
            "the devices cannot be divided into expert-parallel groups of this size",
            {"expert_parallel_size": size, "mesh.data * mesh.fsdp * mesh.expert": world},
            "choose a divisor",
        )
    if sync_group == "world":
        return 1
    if size % mesh.expert:
        raise ConfigError(
            "an expert-parallel group holds all experts, so it has all devices of the axis expert",
            {"expert_parallel_size": size, "mesh.expert": mesh.expert},
            "make expert_parallel_size a multiple of mesh.expert",
        )
    return world // size


def biases(state: Mapping[str, BalanceState]) -> Parameters:
    """The parameters that a step routes with."""
    return {unit + ROUTER_BIAS: value.bias for unit, value in state.items()}


def loads_by_unit(loads: Float[Array, "Lm G E"], model: ModelConfig) -> dict[str, Array]:
    """Loads of the blocks with experts, in order, by unit, `[repeats, G, E]`."""
    numbers: dict[str, list[int]] = {}
    for block, group, _, address in model.places():
        if block in model.moe_blocks:
            numbers.setdefault(address_prefix((group, address)), []).append(model.moe_blocks.index(block))
    return {unit: loads[np.asarray(of_unit)] for unit, of_unit in numbers.items()}


def mean_balance(sums: RouterSums, moe: MoeConfig, scope: Scope) -> float | None:
    """The load-balance loss of a batch's rows, `[L, B, ...]`, as a step reports it: the mean over blocks that ran; None
    where none did."""
    rows = sums.tokens.shape[1]
    totals = Totals(jnp.max(jnp.sum(sums.tokens, axis=1)), jnp.max(jnp.sum(sums.tokens > 0, axis=1)))
    found = Balancing(moe, scope).of_blocks(sums, jnp.arange(rows), rows, totals, None)
    ran = np.asarray(found.sums.tokens) > 0
    return float(np.mean(np.asarray(found.balance)[ran]) / np.asarray(totals.tokens)) if ran.any() else None


def start_balance(parameters: Parameters, places: Mapping[StackAddress, int], groups: int) -> dict[str, BalanceState]:
    """The biases before the first step of a stage, as the parameters have them, by unit: `[repeats, G, E]`."""
    found = {}
    for unit in map(address_prefix, places):
        if unit + ROUTER_BIAS in parameters:
            found[unit] = _fresh(parameters[unit + ROUTER_BIAS], groups)
    return found


def regrouped(state: BalanceState, groups: int) -> BalanceState:
    """The same for another number of groups: each begins with the mean of those that were."""
    if state.bias.shape[-2] == groups:
        return state
    return BalanceState(*(jnp.repeat(jnp.mean(value, axis=-2, keepdims=True), groups, axis=-2) for value in state))


def mean_biases(state: Mapping[str, BalanceState]) -> Parameters:
    """The parameters that these biases are outside of training: the mean over groups, `[repeats, E]`."""
    return {unit + ROUTER_BIAS: jnp.mean(value.bias, axis=-2) for unit, value in state.items()}


def _fresh(bias: Array, groups: int) -> BalanceState:
    wide = jnp.repeat(bias[:, None], groups, axis=1)
    return BalanceState(wide, jnp.zeros_like(wide))
