"""One blockwise training step: every block's gradient is computed inside its own turn in the scan over blocks.

Every student block gets the teacher's stream as its input, so no block's loss depends on another block: what is alive
at a time is one block's activations, whatever L is. The block's update can follow at once (`optimizer.inside_scan`);
then one block's gradient is alive too, and no more.

What is minimised is the sum over blocks of the terms (trainer/terms), each a mean over the batch's real tokens times
its weight, so a block's gradient depends neither on L nor on how the batch is cut into micro-batches; and of
`lambda * load_balance + zeta * router_z` of a block with experts.

Source: NVIDIA Puzzle (arXiv 2411.19146), blockwise local distillation; MaxText's parallel blockwise distillation.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from distillcache.models.layers.context import BlockContext, context_of_block
from distillcache.models.routing import RouterOutput
from distillcache.schemas.config.train import LossConfig
from distillcache.trainer.step.balance import Balancing, BlockRouting, Totals, router_weights
from distillcache.trainer.step.optimizer import update_blocks, update_one
from distillcache.trainer.step.parameters import Parameters, StackAddress, at_address, from_addresses
from distillcache.trainer.step.schedules import weight_at
from distillcache.trainer.step.stack import BlockRules, Cross, Given, StudentStack, scan_blocks
from distillcache.trainer.step.targets import BlockTargets, TapReading, Targets
from distillcache.trainer.terms import Terms
from distillcache.trainer.terms.parts import distance

MODE = "blockwise"


class BlockSums(NamedTuple):
    """Terms of every block by name, sums over real tokens, `[L]` each (inside the scan `[]`); routing where it is
    collected, of blocks without experts zeros."""

    terms: dict[str, Array]
    routing: BlockRouting | None = None


class StepSums(NamedTuple):
    """Results of a step. blocks: for every layer group, sums `[repeats, places]`; tokens: their divisor; weights:
    the terms' at this step.
    """

    blocks: tuple[BlockSums, ...]
    tokens: Array
    weights: dict[str, Array]


@dataclass(frozen=True)
class BlockwiseStep:
    """The static side of a step: how blocks are run and compared. Equal ones share their compiled program.

    steps: of the stage, over which weights change. micro_batches: parts of a batch, one after the other. balancing: of
    a student with experts. terms: all of blockwise mode: what is at hand is measured, also without a weight.
    """

    stack: StudentStack
    reading: TapReading
    rules: BlockRules
    loss: LossConfig
    optimizer: optax.GradientTransformation
    steps: int
    micro_batches: int = 1
    inside_scan: bool = True
    balancing: Balancing | None = None
    terms: Terms = field(default_factory=partial(Terms.of_mode, MODE))

    def __hash__(self) -> int:
        return hash((self.stack, self.reading, self.rules, self.steps, self.micro_batches, self.inside_scan))

    def weights(self, step: Array) -> dict[str, Array]:
        """The terms' weights at a step, and lambda and zeta where they may count."""
        weights = self.terms.weights(self.loss) | router_weights(self.balancing, self.loss)
        return {name: weight_at(weight, step, self.steps) for name, weight in weights.items()}

    def gradients(
        self, trained: Parameters, frozen: Parameters, batch: Mapping[str, Any], targets: Targets, step: Array
    ) -> tuple[Parameters, dict[StackAddress, BlockSums], Array]:
        """The gradient of every block's loss, stacked, the losses' sums, and the real tokens."""
        turn = _Turn(self, batch, step)

        def visit(address: StackAddress, mine: Any, kept: Any, given: Given, row: BlockTargets) -> tuple[Any, Any]:
            gradient, sums = turn.gradient(address, kept[0], kept[1], given, row)
            return mine, (gradient, sums)

        def cross(address: StackAddress, mine: Any, kept: Any, stream: Array) -> Array:
            return turn.cross(address, kept[0], kept[1], stream)

        places = self.stack.places()
        fixed = {address: (at_address(trained, address), at_address(frozen, address)) for address in places}
        nothing = dict.fromkeys(places, ())
        _, found = self._scan(batch, targets, visit, nothing, fixed, turn.own_stream(batch, frozen, cross))
        gradients = from_addresses({address: y[0] for address, y in found.items()})
        return gradients, {address: y[1] for address, y in found.items()}, turn.tokens

    def update(
        self,
        trained: Parameters,
        moments: dict[StackAddress, Any],
        frozen: Parameters,
        batch: Mapping[str, Any],
        targets: Targets,
        step: Array,
    ) -> tuple[Parameters, dict[StackAddress, Any], dict[StackAddress, BlockSums], Array]:
        """New parameters and optimizer state, the losses' sums before the update, and the real tokens."""
        if not self.inside_scan:
            gradients, sums, tokens = self.gradients(trained, frozen, batch, targets, step)
            new: dict[StackAddress, Any] = {}
            for address in self.stack.places():
                mine = at_address(gradients, address), moments[address], at_address(trained, address)
                column = targets[address[0]].at(slice(None), address[1])
                new[address] = update_blocks(self.optimizer, *mine, column.trained, column.runs)
            return from_addresses({p: n[0] for p, n in new.items()}), {p: n[1] for p, n in new.items()}, sums, tokens
        turn = _Turn(self, batch, step)

        def visit(address: StackAddress, mine: Any, kept: Any, given: Given, row: BlockTargets) -> tuple[Any, Any]:
            parameters, state = mine
            gradient, sums = turn.gradient(address, parameters, kept, given, row)
            return update_one(self.optimizer, gradient, state, parameters), sums

        def cross(address: StackAddress, mine: Any, kept: Any, stream: Array) -> Array:
            return turn.cross(address, mine[0], kept, stream)

        places = self.stack.places()
        carried = {address: (at_address(trained, address), moments[address]) for address in places}
        fixed = {address: at_address(frozen, address) for address in places}
        carried, sums = self._scan(batch, targets, visit, carried, fixed, turn.own_stream(batch, frozen, cross))
        parameters = from_addresses({address: mine[0] for address, mine in carried.items()})
        return parameters, {address: mine[1] for address, mine in carried.items()}, sums, turn.tokens

    def _scan(self, batch: Mapping[str, Any], targets: Targets, visit: Any, carried: Any, fixed: Any, own: Any) -> Any:
        counting = self.terms.counting(self.loss)
        return scan_blocks(
            self.stack,
            targets,
            self.reading,
            {name: batch[name] for name in self.reading.codecs},
            batch["segment_ids"].shape,
            visit,
            carried,
            fixed,
            needs_mlp=counting.read("mlp_out"),
            needs_leaving=counting.read("stream"),
            own=own,
        )


class _Turn:
    """Values that all blocks' turns of one step share."""

    def __init__(self, step: BlockwiseStep, batch: Mapping[str, Any], number: Array) -> None:
        self._step, self._weights = step, step.weights(number)
        self._mask = batch["segment_ids"] > 0
        self._rows, self._totals = jnp.arange(self._mask.shape[0]), Totals.of(self._mask)
        self._context = step.stack.context(batch)
        if step.balancing is not None:
            self._context = step.balancing.context(self._context, self._rows, self._mask.shape[0], number)
        self.tokens = self._totals.tokens

    def own_stream(self, batch: Mapping[str, Any], frozen: Parameters, cross: Cross) -> tuple[Array, Cross] | None:
        """The student's own stream before block 0, where no stream is recorded."""
        return (frozen["embed"][batch["tokens"]], cross) if self._step.rules.own_stream else None

    def cross(
        self, address: StackAddress, trained: Mapping[str, Array], frozen: Mapping[str, Array], stream: Array
    ) -> Array:
        """The stream behind a block, as its parameters were before this step."""
        return self._step.stack.cross(address, {**frozen, **trained}, stream, self._context, self._step.rules)

    def gradient(
        self,
        address: StackAddress,
        trained: Mapping[str, Array],
        frozen: Mapping[str, Array],
        given: Given,
        row: BlockTargets,
    ) -> tuple[dict[str, Array], BlockSums]:
        """The gradient of one block's loss by its trained parameters, and the loss's sums."""
        loss = jax.grad(partial(self._loss, address, frozen, row), has_aux=True)
        count = self._step.micro_batches
        everything = (given, context_of_block(self._context, row.block), self._mask, self._rows)
        if count == 1:
            return loss(dict(trained), None, *everything)

        def one(total: Any, number: Array) -> tuple[Any, None]:
            # Every count-th row, not a run of rows: the rows of every device stay there.
            part = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:])[:, number], everything)
            routing = total[1].routing
            return jax.tree.map(jnp.add, total, loss(dict(trained), routing and routing.sums.load, *part)), None

        shapes = jax.eval_shape(loss, dict(trained), None, *everything)
        zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        return jax.lax.scan(one, zeros, jnp.arange(count))[0]

    def _loss(
        self,
        address: StackAddress,
        frozen: Mapping[str, Array],
        row: BlockTargets,
        trained: Mapping[str, Array],
        load_before: Array | None,
        given: Given,
        context: BlockContext,
        mask: Array,
        rows: Array,
    ) -> tuple[Array, BlockSums]:
        step = self._step
        out = step.stack.run(address, {**frozen, **trained}, given, context, step.rules, row.norm)
        total, sums = jnp.zeros(()), dict[str, Array]()
        for term in step.terms.blocks:
            sums[term.name] = distance(term, step.loss, out, given.outputs, mask)
            weight = self._weights[term.name]
            total = total + (weight * row.weight if term.weighs_blocks else weight) * sums[term.name]
        routing = self._routing(out.router, mask, rows, load_before)
        if routing is not None and "load_balance" in self._weights:
            total = total + self._weights["load_balance"] * routing.balance
            total = total + self._weights["router_z"] * routing.sums.z
        # Divided here: a division of stacked gradients afterwards would be a second stack.
        return total / jnp.maximum(self.tokens, 1.0), BlockSums(sums, routing)

    def _routing(
        self, router: RouterOutput | None, mask: Array, rows: Array, load_before: Array | None
    ) -> BlockRouting | None:
        balancing = self._step.balancing
        if balancing is None or not balancing.collects:
            return None
        if router is None:
            return balancing.nothing()
        sums = balancing.of_rows(router, mask)
        return balancing.of_block(sums, rows, self._mask.shape[0], self._totals, load_before)
