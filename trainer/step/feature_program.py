"""The `StepProgram` of feature mode."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from distillcache.models.adapters import LORA
from distillcache.trainer.step.balance import BlockRouting, biases, loads_by_unit
from distillcache.trainer.step.feature import MODE, FeatureStep, FeatureSums
from distillcache.trainer.step.optimizer import PROGRAMS, clip_all, make_optimizer, update_blocks, update_one
from distillcache.trainer.step.parameters import (
    BEHIND_BLOCKS,
    IN_BLOCK,
    INDEXER,
    PROJECTOR,
    ROUTER_BIAS,
    ROUTING,
    Parameters,
    PathRules,
    StackAddress,
    address_prefix,
    at_address,
    from_addresses,
    outer,
)
from distillcache.trainer.step.program import OUTER, Setting, TrainState, Update, check_attention
from distillcache.trainer.step.targets import TapReading, Targets
from distillcache.trainer.terms import Terms


class FeatureProgram:
    """The student as a whole, from tokens."""

    blocks_apart: ClassVar[bool] = False
    usual_rate: ClassVar[float] = 3e-4

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.terms = Terms.of_mode(MODE)
        self.optimizer = make_optimizer(setting.optimizer, setting.steps, clips=False)  # type: ignore[arg-type]
        self._counting = self.terms.counting(setting.loss)
        self.compares_blocks, self.injects_norms = self._counting.read("attn_out"), False
        self.compares_streams, self.needs_leaving = self._counting.read("stream"), False
        check_attention(
            setting,
            {"loss.feature.weight": self.compares_blocks},
            "set loss.feature.weight: 0, and loss.stream.weight to compare streams",
        )
        self.row_fields: tuple[str, ...] = ("tokens", "loss_mask")
        places = {term.teacher_distribution(setting.loss, setting) for term in self._counting.logits} - {None}
        self.reads_head = "head" in places
        self.taps: tuple[str, ...] = (
            *(["attn_out"] if self.compares_blocks else []),
            *(["topk_logits"] if "topk" in places else []),
        )

    def rules(self) -> PathRules:
        return (
            (IN_BLOCK + ROUTER_BIAS, False),
            (IN_BLOCK + INDEXER, False),
            (f"{IN_BLOCK}{PROJECTOR}/in", False),
            (IN_BLOCK + "*", True),
            ("embed", True),
            *((name, bool(self._counting.logits)) for name in BEHIND_BLOCKS),
        )

    def holds(self, name: str) -> bool:
        return True

    def computes(self, name: str) -> bool:
        return bool(self._counting.logits) or name not in BEHIND_BLOCKS

    def update(self, reading: TapReading) -> Update:
        setting, spec = self._setting, self._setting.spec
        step = FeatureStep(
            setting.graph,
            setting.stack,
            replace(reading, in_step=False),  # each stream that is compared is decoded by itself
            setting.loss,
            self.optimizer,
            setting.optimizer.clip_norm,
            setting.steps,
            spec.micro_batches,
            spec.remat,
            spec.compute_dtype,
            setting.balancing,
            setting.real_vocab,
            adapter_alpha=setting.adapter_alpha,
        )
        return feature_update(step)

    @staticmethod
    def sums_specs(split: Any, same: Any) -> Any:
        return same

    def means(self, sums: FeatureSums) -> dict[str, Any]:
        tokens, targets = float(sums.tokens), float(sums.targets)
        found: dict[str, Any] = {name: np.asarray(total, np.float64) / tokens for name, total in sums.blocks.items()}
        if targets:  # a mean of nothing is left out
            found |= {name: float(total) / targets for name, total in sums.logits.items()}
        return found

    def routing(self, sums: FeatureSums) -> BlockRouting | None:
        return sums.routing


@lru_cache(maxsize=PROGRAMS)
def feature_update(step: FeatureStep) -> Update:
    """The feature step on a state: one norm of all gradients, then AdamW, per block as in blockwise mode."""

    def update(
        state: TrainState, frozen: Parameters, batch: Mapping[str, Any], targets: Targets
    ) -> tuple[TrainState, FeatureSums]:
        fixed = {**frozen, **biases(state.balance)}
        gradients, sums = step.gradients(state.parameters, fixed, batch, targets, state.step)
        gradients = clip_all(gradients, step.clip_norm)
        new, moments = {}, {}
        for address, repeats in step.stack.places().items():
            unit = address_prefix(address)
            mine = at_address(gradients, address), state.moments[unit], at_address(state.parameters, address)
            every = jnp.broadcast_to(state.step >= 0, (repeats,))  # no constant, see update_blocks
            new[address], moments[unit] = update_blocks(step.optimizer, *mine, every)
            new[address] = _where_reached(new[address], mine[2], targets, address, step)
        parameters = from_addresses(new)
        if OUTER in state.moments:
            rest = outer(gradients), state.moments[OUTER], outer(state.parameters)
            moved, moments[OUTER] = update_one(step.optimizer, *rest)
            parameters |= moved
        balance = state.balance
        if step.balancing is not None and sums.routing is not None:
            loads = loads_by_unit(sums.routing.loads, step.stack.config)
            balance = step.balancing.after_step(balance, loads, state.step)
        return TrainState(parameters, moments, state.step + 1, balance), sums

    return update


def _last_router(step: FeatureStep) -> int:
    """The last block whose routing a loss reaches; -1 without such a loss."""
    balances = step.balancing is not None and step.balancing.with_loss
    return max(step.stack.config.moe_blocks, default=-1) if balances else -1


def _where_reached(
    new: Mapping[str, Array], old: Mapping[str, Array], targets: Targets, address: StackAddress, step: FeatureStep
) -> dict[str, Array]:
    """Keep what no gradient reaches as it is: weight decay does not shrink it either.

    Without losses on tokens that is everything behind the last attention or stream that is compared and the last router
    with a loss: an attention that is compared is followed by its block's MLP, a stream is not. And with any loss the
    projectors of blocks that are not compared.
    """
    group = targets[address[0]].at(slice(None), address[1])
    streams = jnp.zeros_like(group.trained) if group.compared is None else group.compared
    last_router, last_stream = _last_router(step), _last_of(targets, "compared")
    last = jnp.maximum(_last_of(targets, "trained"), last_router)

    def one(name: str, value: Array) -> Array:
        if name.startswith(f"{PROJECTOR}/"):
            reached = group.trained | streams
        elif step.counting.logits:
            return value
        elif name.removeprefix(f"{LORA}/").startswith("mlp/"):
            reached = (group.block < last) | (group.block <= last_stream)
        else:
            reached = group.block <= jnp.maximum(last, last_stream)
        if name in ROUTING:
            reached |= group.block == last_router
        return jnp.where(reached.reshape(-1, *[1] * (value.ndim - 1)), value, old[name])

    return {name: one(name, value) for name, value in new.items()}


def _last_of(targets: Targets, column: str) -> Array:
    """The last block that a column of the targets names; -1 without one."""
    named = [(group.block, getattr(group, column)) for group in targets]
    chosen = [jnp.max(jnp.where(column, block, -1)) for block, column in named if column is not None]
    return jnp.max(jnp.stack(chosen)) if chosen else jnp.asarray(-1)
