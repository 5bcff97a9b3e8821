"""One step in feature mode: the student runs as a whole, from tokens.

    total = token_weight * (alpha * tau^2 * KL + (1 - alpha) * CE) + beta * feature
          + lambda * load_balance + zeta * router_z

KL and CE are means over next tokens that count (losses.next_token_loss), feature is the mean over the blocks that count
of a mean over real tokens, the routers' losses are means over the blocks with experts, all of the whole batch, however
it is cut into micro-batches. Logits exist for one row at a time, forward and backward; with a token_weight of 0 there
are none.

Source: Hinton et al. 2015 (tau^2), MaxText distillation_utils (the sum and its names).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from distillcache.models.decoder import BlockOutput, BodyWrap, Decoder
from distillcache.models.layers.context import BlockContext
from distillcache.models.routing import RouterSums
from distillcache.schemas.config.train import LossConfig
from distillcache.trainer.losses import (
    counted_predictions,
    feature_loss,
    next_token_loss,
    support_kl,
    support_logits,
    topk_cross_entropy,
    without_padding,
)
from distillcache.trainer.step.balance import Balancing, BlockRouting, Totals, biases, loads_by_unit
from distillcache.trainer.step.blockwise import shares
from distillcache.trainer.step.optimizer import PROGRAMS, clip_all, update_blocks, update_one
from distillcache.trainer.step.parameters import (
    PROJECTOR,
    Parameters,
    Place,
    cast,
    of_place,
    of_places,
    outer,
    place_prefix,
)
from distillcache.trainer.step.program import OUTER, TrainState, Update
from distillcache.trainer.step.schedules import may_count, weight_at
from distillcache.trainer.step.stack import StudentStack, TapDecoder
from distillcache.trainer.step.targets import Table, TapReading

REMAT: dict[str, BodyWrap | None] = {
    "none": None,
    "block": jax.checkpoint,
    "dots": partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
}
ROW_FIELDS = ("tokens", "segment_ids", "loss_mask")
TO_ROUTER = ("mlp/norm", "mlp/router", "mlp/logit_bias")  # what a router's loss reaches of its own MLP


class FeatureSums(NamedTuple):
    """Results of a step: sums, their counts, and the terms' weights at this step.

    feature: `[L]`, over real tokens. token_losses: over next tokens that count: `ce`, if logits are computed; with
    recorded logits `kl` (at tau), `kl_1` (at 1), `teacher` (its own cross-entropy, or less) and `covered` (targets
    among its top k). tokens, targets: how many those are, also where there is none. routing: of the blocks with
    experts, where it is collected.
    """

    feature: Array
    tokens: Array
    token_losses: dict[str, Array]
    targets: Array
    weights: dict[str, Array]
    routing: BlockRouting | None = None


@dataclass(frozen=True)
class FeatureStep:
    """The static side of a step. See `TrainConfig` for remat and compute_dtype, `BlockwiseStep` for the others."""

    graph: nnx.GraphDef[Decoder]
    stack: StudentStack
    reading: TapReading
    loss: LossConfig
    optimizer: optax.GradientTransformation
    clip_norm: float | None
    steps: int
    micro_batches: int = 1
    remat: str = "block"
    compute_dtype: str = "float32"
    balancing: Balancing | None = None
    real_vocab: int | None = None  # see losses.without_padding

    def __hash__(self) -> int:
        return hash((self.stack, self.reading, self.steps, self.micro_batches, self.remat, self.compute_dtype))

    @property
    def compares_tokens(self) -> bool:
        """Return whether any loss needs logits."""
        return may_count(self.loss.token_weight)

    def weights(self, step: Array) -> dict[str, Array]:
        """That of the token losses, alpha, tau and beta at a step, and lambda and zeta where they may count."""
        loss = self.loss
        terms = {"tokens": loss.token_weight, "alpha": loss.alpha, "tau": loss.tau, "feature": loss.feature.weight}
        if self.balancing is not None and self.balancing.with_loss:
            terms |= {"load_balance": loss.load_balance.weight, "router_z": loss.router_z}
        return {name: weight_at(weight, step, self.steps) for name, weight in terms.items()}

    def gradients(
        self, trained: Parameters, frozen: Parameters, batch: Mapping[str, Any], table: Table, step: Array
    ) -> tuple[Parameters, FeatureSums]:
        """The gradient of the whole batch's loss, and its sums."""
        weights, counts = self.weights(step), _Counts.of(batch)
        rows = {name: value for name, value in batch.items() if not isinstance(value, Mapping)}
        rows["row"] = jnp.arange(counts.rows)
        taps = {name: value for name, value in batch.items() if isinstance(value, Mapping)}
        gradient = jax.grad(partial(self._loss, frozen, flat_table(table), weights, counts, step), has_aux=True)
        if self.micro_batches == 1:
            return gradient(trained, None, rows, taps)

        def one(total: Any, number: Array) -> tuple[Any, None]:
            parts = _part(rows, 0, self.micro_batches, number), _part(taps, 1, self.micro_batches, number)
            routing = total[1].routing
            found = gradient(trained, routing and routing.sums.load, *parts)
            return jax.tree.map(jnp.add, total, found), None

        shapes = jax.eval_shape(gradient, trained, None, rows, taps)
        zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        gradients, sums = jax.lax.scan(one, zeros, jnp.arange(self.micro_batches))[0]
        return gradients, sums._replace(tokens=counts.totals.tokens, targets=counts.found, weights=weights)

    def _loss(
        self,
        frozen: Parameters,
        rows_of_table: Mapping[str, Array],
        weights: Mapping[str, Array],
        counts: "_Counts",
        step: Array,
        trained: Parameters,
        load_before: Array | None,
        rows: Mapping[str, Array],
        taps: Mapping[str, Any],
    ) -> tuple[Array, FeatureSums]:
        parameters = cast({**frozen, **trained}, self.compute_dtype)
        decoder = merge_decoder(self.graph, parameters)
        context = decoder.context(rows["positions"], rows["segment_ids"])
        if self.balancing is not None:
            context = self.balancing.context(context, rows["row"], counts.rows, step)
        stream, feature, router = self._run(decoder, context, parameters, rows_of_table, rows, taps)
        counted = jnp.sum(rows_of_table["trained"])
        per_block = feature * rows_of_table["weight"]
        total = weights["feature"] * jnp.sum(per_block) / jnp.maximum(counted, 1) / counts.tokens
        losses: dict[str, Array] = {}
        if self.compares_tokens:
            losses = self._token_losses(decoder, stream, weights["tau"], rows, taps)
            soft = jnp.square(weights["tau"]) * losses.get("kl", 0.0) / counts.targets
            hard = losses["ce"] / counts.targets
            total = weights["tokens"] * (weights["alpha"] * soft + (1.0 - weights["alpha"]) * hard) + total
        routing = None
        if router is not None and self.balancing is not None:
            routing = self.balancing.of_blocks(router, rows["row"], counts.rows, counts.totals, load_before)
            if "load_balance" in weights:
                total = total + weights["load_balance"] * jnp.mean(routing.balance) / counts.tokens
                total = total + weights["router_z"] * jnp.mean(routing.sums.z) / counts.tokens
        return total, FeatureSums(feature, counts.totals.tokens, losses, counts.found, dict(weights), routing)

    def _run(
        self,
        decoder: Decoder,
        context: BlockContext,
        parameters: Mapping[str, Array],
        table: Mapping[str, Array],
        rows: Mapping[str, Array],
        taps: Mapping[str, Any],
    ) -> tuple[Array, Array, RouterSums | None]:
        """The stream that leaves the last block; every block's feature loss, `[L]` sums; and the routing of each row in
        the blocks with experts, `[Lm, B, ...]`, where it is collected."""
        mask, depth = rows["segment_ids"] > 0, self.stack.config.num_blocks
        balancing = self.balancing if self.balancing is not None and self.balancing.collects else None
        compares = may_count(self.loss.feature.weight)
        reader = TapDecoder(self.reading, taps, needs_mlp=False)
        outward = self._projectors(parameters)

        def emit(carry: None, out: BlockOutput, block: Array) -> tuple[None, dict[str, Any]]:
            kept = {}
            if balancing is not None and out.router is not None:
                kept["router"] = balancing.of_rows(out.router, mask)
            if not compares:
                return carry, {"feature": jnp.zeros(()), **kept}
            row = {name: values[block] for name, values in table.items()}
            own = out.attn_out if outward is None else out.attn_out @ outward[block]
            found = feature_loss(own, reader.target(row), mask, **shares(self.loss.feature)).total
            return carry, {"feature": jnp.where(row["trained"], found, 0.0), **kept}

        x = decoder.embed_tokens(rows["tokens"])
        stream, _, found = decoder.scan_blocks(x, context, emit, None, wrap=REMAT[self.remat])
        return stream, found["feature"].reshape(depth), found.get("router")

    def _token_losses(
        self, decoder: Decoder, stream: Array, tau: Array, rows: Mapping[str, Array], taps: Mapping[str, Any]
    ) -> dict[str, Array]:
        """Sums of the losses that need logits; these exist for one row at a time."""
        codec: Any = self.reading.codecs.get("topk_logits")

        @jax.checkpoint
        def row_losses(row: tuple[Array, Mapping[str, Array], Any]) -> dict[str, Array]:
            x, fields, parts = jax.tree.map(lambda leaf: leaf[None], row)
            logits = decoder.logits(x)
            losses = {"ce": next_token_loss(without_padding(logits, self.real_vocab), **fields).total}
            if codec is None:
                return losses
            recorded = codec.decode(parts)
            counts = counted_predictions(fields["segment_ids"], fields["loss_mask"])
            support = support_logits(
                logits,
                recorded.values,
                recorded.ids,
                recorded.logsumexp,
                counts,
                rest_bucket=self.loss.rest_bucket,
                real_vocab=self.real_vocab,
            )
            teacher = topk_cross_entropy(*recorded, **fields)
            return losses | {
                "kl": support_kl(support, counts, tau).total,
                "kl_1": support_kl(jax.lax.stop_gradient(support), counts, 1.0).total,
                "teacher": teacher.at_least.total,
                "covered": teacher.share.total,
            }

        fields = {name: rows[name] for name in ROW_FIELDS}
        parts = None if codec is None else {name: value[0] for name, value in taps["topk_logits"].items()}
        found = jax.lax.map(row_losses, (stream, fields, parts))
        return {name: jnp.sum(value) for name, value in found.items()}

    def _projectors(self, parameters: Mapping[str, Array]) -> Array | None:
        """`out` of every block, `[L, Ds, Dt]`."""
        found = {
            place: parameters[f"{place_prefix(place)}{PROJECTOR}/out"]
            for place in self.stack.places()
            if f"{place_prefix(place)}{PROJECTOR}/out" in parameters
        }
        if not found:
            return None
        groups = [
            jnp.stack([found[g, p] for p in range(len(layers.pattern))], axis=1)
            for g, layers in enumerate(self.stack.config.layers)
        ]
        return jnp.concatenate([group.reshape(-1, *group.shape[2:]) for group in groups])


class _Counts(NamedTuple):
    """Divisors of the whole batch's sums, `tokens` and `targets`, at least 1; and as they are its targets
    (`found`), totals and rows.
    """

    tokens: Array
    targets: Array
    found: Array
    totals: Totals
    rows: int

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> "_Counts":
        mask = batch["segment_ids"] > 0
        totals = Totals.of(mask)
        nexts = jnp.sum(counted_predictions(batch["segment_ids"], batch["loss_mask"]), dtype=jnp.float32)
        return cls(jnp.maximum(totals.tokens, 1.0), jnp.maximum(nexts, 1.0), nexts, totals, mask.shape[0])


@lru_cache(maxsize=PROGRAMS)
def feature_update(step: FeatureStep) -> Update:
    """The feature step on a state: one norm of all gradients, then AdamW, per block as in blockwise mode."""

    def update(
        state: TrainState, frozen: Parameters, batch: Mapping[str, Any], table: Table
    ) -> tuple[TrainState, FeatureSums]:
        fixed = {**frozen, **biases(state.balance)}
        gradients, sums = step.gradients(state.parameters, fixed, batch, table, state.step)
        gradients = clip_all(gradients, step.clip_norm)
        new, moments = {}, {}
        for place, repeats in step.stack.places().items():
            unit = place_prefix(place)
            mine = of_place(gradients, place), state.moments[unit], of_place(state.parameters, place)
            every = jnp.broadcast_to(state.step >= 0, (repeats,))  # no constant, see update_blocks
            new[place], moments[unit] = update_blocks(step.optimizer, *mine, every)
            if not step.compares_tokens:
                new[place] = _where_reached(new[place], mine[2], table, place, _last_router(step))
        parameters = of_places(new)
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
    new: Mapping[str, Array], old: Mapping[str, Array], table: Table, place: Place, last_router: int
) -> dict[str, Array]:
    """Without losses on tokens no gradient reaches what lies behind the last attention that is compared and the last
    router with a loss: it stays as it is, and weight decay does not shrink it either."""
    last = jnp.max(jnp.stack([jnp.max(jnp.where(group["trained"], group["block"], -1)) for group in table]))
    last = jnp.maximum(last, last_router)
    block = jnp.asarray(table[place[0]]["block"])[:, place[1]]

    def one(name: str, value: Array) -> Array:
        reached = block < last if name.startswith("mlp/") else block <= last
        if name in TO_ROUTER:
            reached |= block == last_router
        return jnp.where(reached.reshape(-1, *[1] * (value.ndim - 1)), value, old[name])

    return {name: one(name, value) for name, value in new.items()}


def merge_decoder(graph: nnx.GraphDef[Decoder], parameters: Mapping[str, Array]) -> Decoder:
    """The decoder with these parameters; projectors are left aside."""
    flat = [
        (tuple(int(part) if part.isdigit() else part for part in name.split("/")), value)
        for name, value in parameters.items()
        if f"/{PROJECTOR}/" not in name
    ]
    return nnx.merge(graph, nnx.from_flat_state([(path, nnx.Param(value)) for path, value in flat]))


def flat_table(table: Table) -> dict[str, Array]:
    """A table's rows in the order of the blocks, `[L, ...]`."""
    return {
        name: jnp.concatenate([jnp.asarray(group[name]).reshape(-1, *group[name].shape[2:]) for group in table])
        for name in table[0]
    }


def _part(tree: Any, axis: int, count: int, number: Array) -> Any:
    """Every count-th row, not a run of rows: the rows of every device stay there."""

    def take(x: Array) -> Array:
        split = x.reshape(*x.shape[:axis], -1, count, *x.shape[axis + 1 :])
        return jax.lax.dynamic_index_in_dim(split, number, axis + 1, keepdims=False)

    return jax.tree.map(take, tree)
