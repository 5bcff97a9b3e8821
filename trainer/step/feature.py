"""One step in feature mode: the student runs as a whole, from tokens.

What is minimised is the sum of the terms (trainer/terms): those of logits are means over next tokens that count
(losses.next_token_loss), those of blocks the mean over the blocks that count of a mean over real tokens; and of
`lambda * load_balance + zeta * router_z`, means over the blocks with experts; all of the whole batch, however it is cut
into micro-batches. Logits exist for one row at a time, forward and backward; without a term on them there are none.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from distillcache.models.adapters import adapted_matrices, adapter_names, is_adapter, merged
from distillcache.models.decoder import Adapt, BlockOutput, BodyWrap, Decoder
from distillcache.models.layers.context import BlockContext
from distillcache.models.routing import RouterSums
from distillcache.schemas.config.train import LossConfig
from distillcache.trainer.losses import counted_predictions
from distillcache.trainer.step.balance import Balancing, BlockRouting, Totals, router_weights
from distillcache.trainer.step.heads import head_losses, student_side, teacher_side
from distillcache.trainer.step.parameters import (
    BESIDE,
    PROJECTOR,
    TEACHER_HEAD,
    TEACHER_NORM,
    Parameters,
    address_prefix,
    cast,
    sublayer_of,
)
from distillcache.trainer.step.schedules import weight_at
from distillcache.trainer.step.stack import StudentStack, TapDecoder
from distillcache.trainer.step.targets import BlockTargets, TapReading, Targets, in_block_order
from distillcache.trainer.terms import Terms
from distillcache.trainer.terms.parts import BlockTerm, LogitRow, Outputs, distance
from distillcache.trainer.terms.tokens import divergence_of

REMAT: dict[str, BodyWrap | None] = {
    "none": None,
    "block": jax.checkpoint,
    "dots": partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
}
ROW_FIELDS = ("tokens", "segment_ids", "loss_mask")
MODE = "feature"


class FeatureSums(NamedTuple):
    """Results of a step: sums, their counts, and the terms' weights at this step.

    blocks: by term, `[L]`, over real tokens. logits: of the terms on logits, over next tokens that count. tokens,
    targets: how many those are, also where there is none. routing: of the blocks with experts, where it is collected.
    """

    blocks: dict[str, Array]
    tokens: Array
    logits: dict[str, Array]
    targets: Array
    weights: dict[str, Array]
    routing: BlockRouting | None = None


@dataclass(frozen=True)
class FeatureStep:
    """The static side of a step. See `TrainConfig` for remat and compute_dtype, `BlockwiseStep` for the others.

    terms: all of feature mode.
    """

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
    adapter_alpha: float | None = None  # of the adapters among the parameters
    terms: Terms = field(default_factory=partial(Terms.of_mode, MODE))

    def __hash__(self) -> int:
        return hash((self.stack, self.reading, self.steps, self.micro_batches, self.remat, self.compute_dtype))

    @cached_property
    def counting(self) -> Terms:
        """The terms that are computed."""
        return self.terms.counting(self.loss)

    def weights(self, step: Array) -> dict[str, Array]:
        """The terms' weights at a step, and lambda and zeta where they may count."""
        weights = self.terms.weights(self.loss) | router_weights(self.balancing, self.loss)
        return {name: weight_at(weight, step, self.steps) for name, weight in weights.items()}

    def gradients(
        self, trained: Parameters, frozen: Parameters, batch: Mapping[str, Any], targets: Targets, step: Array
    ) -> tuple[Parameters, FeatureSums]:
        """The gradient of the whole batch's loss, and its sums."""
        weights, counts = self.weights(step), _Counts.of(batch)
        rows = {name: value for name, value in batch.items() if not isinstance(value, Mapping)}
        rows["row"] = jnp.arange(counts.rows)
        taps = {name: value for name, value in batch.items() if isinstance(value, Mapping)}
        gradient = jax.grad(partial(self._loss, frozen, in_block_order(targets), weights, counts, step), has_aux=True)
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
        targets: BlockTargets,
        weights: Mapping[str, Array],
        counts: "_Counts",
        step: Array,
        trained: Parameters,
        load_before: Array | None,
        rows: Mapping[str, Array],
        taps: Mapping[str, Any],
    ) -> tuple[Array, FeatureSums]:
        own = {name: value for name, value in frozen.items() if name not in (TEACHER_NORM, TEACHER_HEAD)}
        everything = {**own, **trained}
        matrices = adapted_matrices(everything)
        wide = {*matrices, *(name for matrix in matrices for name in adapter_names(matrix))}  # until they are added
        parameters = cast(everything, self.compute_dtype, wide)
        decoder = merge_decoder(self.graph, parameters)
        context = decoder.context(rows["positions"], rows["segment_ids"])
        if self.balancing is not None:
            context = self.balancing.context(context, rows["row"], counts.rows, step)
        stream, of_blocks, router = self._run(decoder, context, parameters, targets, rows, taps)
        if self.reading.end is not None:
            total, of_logits = self._head_sums(decoder, frozen, stream, weights, counts, rows, taps)
        else:
            of_logits = self._logit_sums(decoder, stream, weights, rows, taps) if self.counting.logits else {}
            total = jnp.zeros(())
            for term in self.counting.logits:
                total = total + term.value(of_logits, weights, counts.targets)
        for term in self.counting.blocks:
            per_block = of_blocks[term.name] * targets.weight if term.weighs_blocks else of_blocks[term.name]
            mean = weights[term.name] * jnp.sum(per_block) / jnp.maximum(jnp.sum(_compared_by(term, targets)), 1)
            total = total + mean / counts.tokens
        routing = None
        if router is not None and self.balancing is not None:
            routing = self.balancing.of_blocks(router, rows["row"], counts.rows, counts.totals, load_before)
            if "load_balance" in weights:
                total = total + weights["load_balance"] * jnp.mean(routing.balance) / counts.tokens
                total = total + weights["router_z"] * jnp.mean(routing.sums.z) / counts.tokens
        return total, FeatureSums(of_blocks, counts.totals.tokens, of_logits, counts.found, dict(weights), routing)

    def _run(
        self,
        decoder: Decoder,
        context: BlockContext,
        parameters: Mapping[str, Array],
        targets: BlockTargets,
        rows: Mapping[str, Array],
        taps: Mapping[str, Any],
    ) -> tuple[Array, dict[str, Array], RouterSums | None]:
        """The stream that leaves the last block; by term the blocks' sums, `[L]`; and the routing of each row in the
        blocks with experts, `[Lm, B, ...]`, where it is collected."""
        mask, depth = rows["segment_ids"] > 0, self.stack.config.num_blocks
        balancing = self.balancing if self.balancing is not None and self.balancing.collects else None
        terms, needs = self.counting.blocks, self.counting.reads
        reader = TapDecoder(self.reading, taps, needs_mlp=False)
        projectors = self._projectors(parameters)

        def emit(carry: None, out: BlockOutput, block: Array) -> tuple[None, dict[str, Any]]:
            kept = {}
            if balancing is not None and out.router is not None:
                kept["router"] = balancing.of_rows(out.router, mask)
            if not terms:
                return carry, {"blocks": {}, **kept}
            row, outward = targets.at(block), None if projectors is None else projectors[block]
            own = _own_outputs(out, outward, needs)
            teacher = Outputs(reader.target(row), stream=_stream_target(reader, row, own.stream))
            found = {
                term.name: jnp.where(_compared_by(term, row), distance(term, self.loss, own, teacher, mask), 0.0)
                for term in terms
            }
            return carry, {"blocks": found, **kept}

        x = decoder.embed_tokens(rows["tokens"])
        adapt = self._adapt(parameters) if any(map(is_adapter, parameters)) else None
        stream, _, found = decoder.scan_layers(x, context, emit, None, wrap=REMAT[self.remat], adapt=adapt)
        nothing = {term.name: jnp.zeros(depth) for term in self.terms.blocks}
        return stream, nothing | {n: v.reshape(depth) for n, v in found["blocks"].items()}, found.get("router")

    def _logit_sums(
        self,
        decoder: Decoder,
        stream: Array,
        weights: Mapping[str, Array],
        rows: Mapping[str, Array],
        taps: Mapping[str, Any],
    ) -> dict[str, Array]:
        """Sums of the terms on logits; these exist for one row at a time."""
        codec: Any = self.reading.codecs.get("topk_logits")

        @jax.checkpoint
        def row_sums(row: tuple[Array, Mapping[str, Array], Any]) -> dict[str, Array]:
            x, fields, parts = jax.tree.map(lambda leaf: leaf[None], row)
            recorded = None if codec is None else codec.decode(parts)
            one = LogitRow(decoder.logits(x), fields, recorded, self.real_vocab)
            found = (term.sums(self.loss, one, weights) for term in self.counting.logits)
            return {name: value for sums in found for name, value in sums.items()}

        fields = {name: rows[name] for name in ROW_FIELDS}
        parts = None if codec is None else {name: value[0] for name, value in taps["topk_logits"].items()}
        found = jax.lax.map(row_sums, (stream, fields, parts))
        return {name: jnp.sum(value) for name, value in found.items()}

    def _head_sums(
        self,
        decoder: Decoder,
        frozen: Parameters,
        stream: Array,
        weights: Mapping[str, Array],
        counts: "_Counts",
        rows: Mapping[str, Array],
        taps: Mapping[str, Any],
    ) -> tuple[Array, dict[str, Array]]:
        """The objective of the terms on logits, and their sums, from both models' streams and heads."""
        (term,) = self.counting.logits
        teacher = teacher_side(self.reading, frozen, taps, (stream.shape[0], stream.shape[1]))
        found, sums = head_losses(divergence_of(self.loss.kl), self.reading, decoder.config, self.real_vocab)(
            student_side(decoder, stream),
            teacher,
            term.head_weights(self.loss, weights, counts.targets),
            *(rows[name] for name in ROW_FIELDS),
        )
        return found, term.head_sums(sums)

    def _adapt(self, parameters: Mapping[str, Array]) -> Adapt:
        """Adds a repeat's adapters to its matrices, inside the scan: no second stack of weights is made."""
        alpha, dtype = self.adapter_alpha, self.compute_dtype
        if alpha is None:
            raise ValueError("parameters have adapters, and nothing says how much they count")

        def adapt(number: int, stacked: nnx.State) -> tuple[Any, Callable[[Any], nnx.State]]:
            prefix = f"groups/{number}/"
            own = {n.removeprefix(prefix): v for n, v in parameters.items() if n.startswith(prefix) and is_adapter(n)}

            def used(sliced: tuple[nnx.State, dict[str, Array]]) -> nnx.State:
                state, adapters = sliced
                flat = dict(nnx.to_flat_state(state))
                named = {"/".join(map(str, path)): path for path in flat}
                matrices = {name: flat[named[name]].get_value() for name in adapted_matrices(adapters)}
                whole = merged({**matrices, **adapters}, alpha)
                changed = {named[n]: flat[named[n]].replace(value.astype(dtype)) for n, value in whole.items()}
                return nnx.from_flat_state(list((flat | changed).items()))

            return (stacked, own), used

        return adapt

    def _projectors(self, parameters: Mapping[str, Array]) -> Array | None:
        """`out` of every block, `[L, Ds, Dt]`."""
        found = {
            address: parameters[f"{address_prefix(address)}{PROJECTOR}/out"]
            for address in self.stack.places()
            if f"{address_prefix(address)}{PROJECTOR}/out" in parameters
        }
        if not found:
            return None
        groups = [
            jnp.stack([found[g, p] for p in range(len(layers.pattern))], axis=1)
            for g, layers in enumerate(self.stack.config.layers)
        ]
        return jnp.concatenate([group.reshape(-1, *group.shape[2:]) for group in groups])


def _own_outputs(out: BlockOutput, outward: Array | None, needs: Collection[str]) -> Outputs:
    """The student's outputs in the teacher's width; outward: the block's projector, `[Ds, Dt]`."""

    def wide(x: Array) -> Array:
        return x if outward is None else x @ outward

    stream = wide(out.resid + out.attn_out + out.mlp_out) if "stream" in needs else None
    return Outputs(wide(out.attn_out) if "attn_out" in needs else None, stream=stream)


def _stream_target(reader: TapDecoder, row: BlockTargets, own: Array | None) -> Array | None:
    """The teacher's stream that leaves a block's span; where none is compared the student's own, at no distance."""
    if own is None or row.compared is None or row.leaving is None:
        return None
    still, place = jax.lax.stop_gradient(own).astype(jnp.float32), row.leaving
    return jax.lax.cond(row.compared, lambda: reader.slot(place, (still.shape[0], still.shape[1])), lambda: still)


def _compared_by(term: BlockTerm, targets: BlockTargets) -> Array:
    """Return whether a term compares the blocks of these targets."""
    if "stream" not in term.reads:
        return targets.trained
    return jnp.zeros_like(targets.trained) if targets.compared is None else targets.compared


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


def merge_decoder(graph: nnx.GraphDef[Decoder], parameters: Mapping[str, Array]) -> Decoder:
    """The decoder with these parameters; projectors and adapters are left aside."""
    flat = [
        (tuple(int(part) if part.isdigit() else part for part in name.split("/")), value)
        for name, value in parameters.items()
        if sublayer_of(name) not in BESIDE
    ]
    return nnx.merge(graph, nnx.from_flat_state([(path, nnx.Param(value)) for path, value in flat]))


def _part(tree: Any, axis: int, count: int, number: Array) -> Any:
    """Every count-th row, not a run of rows: the rows of every device stay there."""

    def take(x: Array) -> Array:
        split = x.reshape(*x.shape[:axis], -1, count, *x.shape[axis + 1 :])
        return jax.lax.dynamic_index_in_dim(split, number, axis + 1, keepdims=False)

    return jax.tree.map(take, tree)
