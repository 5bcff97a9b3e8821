"""One blockwise training step: every block's gradient is computed inside its own iteration of the scan over blocks.

Every student block gets the teacher's `resid[l]` as its input, so no block's loss depends on another block. The scan's
body takes block l's codes out of the stacks, decodes them, and differentiates block l's loss by block l's parameters:
what is alive at a time is one block's, whatever L is.

*Trained parameters* are the attention sublayers: for every group of the decoder and every place of its pattern, the
`nnx.State` of that stacked `Attention`. Nothing else of the student is touched, nor needed here.

Source: NVIDIA Puzzle (arXiv 2411.19146), blockwise local distillation; MaxText's parallel blockwise distillation.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from models.config import ModelConfig
from models.decoder import BlockContext, Decoder
from models.rope import rope_tables
from schemas.codecs import Codec, take_slot
from schemas.config import FeatureLossConfig
from trainer.feed import CacheSource
from trainer.losses import MaskedSum, feature_loss
from trainer.optimizer import init_blocks, update_blocks

Places = tuple[tuple[Any, ...], ...]  # one entry for every place of every group's pattern
StreamState = tuple[Array, Any]  # the next place to decode, and the codec's carry
Visit = Callable[[Callable[[Any], Array], Any, Array, Array], Any]


@dataclass(frozen=True)
class TapTable:
    """Where block l's tensors lie in a batch: places on the stacks' slot axis, and the codecs.

    trained: whether block l has both tensors and counts; the places of the others are 0 and mean nothing.
    """

    resid: tuple[int, ...]
    attn_out: tuple[int, ...]
    trained: tuple[bool, ...]
    resid_codec: Codec
    attn_out_codec: Codec

    @property
    def in_step(self) -> bool:
        """Whether block l's stream lies at place l: decoding then goes one place a block."""
        return all(self.trained) and self.resid == tuple(range(len(self.resid)))


class TrainState(NamedTuple):
    """What a step changes: trained parameters, and the optimizer's state of each block."""

    parameters: Places
    optimizer: Places


class AttentionStack:
    """The static part of a student's attention sublayers: graphs, sizes, and the order of the blocks."""

    def __init__(self, decoder: Decoder) -> None:
        self.config: ModelConfig = decoder.config
        self.graphs = tuple(tuple(nnx.graphdef(block.attention) for block in group.blocks) for group in decoder.groups)

    @staticmethod
    def parameters(decoder: Decoder) -> Places:
        """Copies of the decoder's attention parameters, each leaf with the repeats in front.

        Copies, because a step gives its state's memory away.
        """
        states = [[nnx.state(block.attention) for block in group.blocks] for group in decoder.groups]
        return jax.tree.map(jnp.copy, tuple(tuple(group) for group in states))

    @staticmethod
    def install(decoder: Decoder, parameters: Places) -> None:
        """Put copies of trained parameters into the decoder."""
        for group, states in zip(decoder.groups, parameters, strict=True):
            for block, state in zip(group.blocks, states, strict=True):
                nnx.update(block.attention, jax.tree.map(jnp.copy, state))

    def context(self, batch: Mapping[str, Any]) -> BlockContext:
        """What the blocks need to know of the rows; computed once, outside the scan."""
        config = self.config
        cos, sin = rope_tables(config.rope, config.head_dim, batch["positions"], config.max_positions)
        return BlockContext(cos, sin, batch["segment_ids"])

    def numbers(self) -> tuple[tuple[list[int], ...], ...]:
        """Block numbers by group, place and repeat."""
        found, start = [], 0
        for group, layers in zip(self.graphs, self.config.layers, strict=True):
            size, repeats = len(group), layers.repeats
            found.append(tuple([start + repeat * size + place for repeat in range(repeats)] for place in range(size)))
            start += size * repeats
        return tuple(found)

    def in_block_order(self, places: Sequence[Sequence[Array]]) -> Float[Array, "L"]:
        """Values `[repeats]` of every place as one `[L]`."""
        return jnp.concatenate([jnp.stack(group, axis=1).reshape(-1) for group in places])


def tap_table(num_blocks: int, source: CacheSource) -> TapTable:
    """The table of a source's stacks, with its blocks trained."""
    chosen = set(source.blocks)

    def places(tap: str) -> tuple[int, ...]:
        return tuple(source.reads[tap].at[block] if block in chosen else 0 for block in range(num_blocks))

    trained = tuple(block in chosen for block in range(num_blocks))
    return TapTable(places("resid"), places("attn_out"), trained, source.codecs["resid"], source.codecs["attn_out"])


def visit_blocks(
    stack: AttentionStack, parameters: Places, batch: Mapping[str, Any], table: TapTable, visit: Visit
) -> Places:
    """Call `visit(attend, block_parameters, resid, target)` for every trained block, inside scans over the blocks.

    `attend(block_parameters)` is the block's attention output `[B, T, D]` on the teacher's stream; `resid` and `target`
    are the teacher's, decoded, float32. For other blocks the results are zeros.

    Returns: what `visit` returns, stacked over the repeats, for every place of every group.
    """
    context = stack.context(batch)
    inputs, targets, trained = (jnp.asarray(row) for row in (table.resid, table.attn_out, table.trained))
    stream = _Stream(table, batch["resid"], stack.config.hidden_size)

    def visit_block(graph: Any, state: Any, block: Array, at: StreamState) -> tuple[StreamState, Any]:
        # Indexed here, not passed as scan inputs: slices of a stack given to a scan are copied whole, and XLA on CPU
        # would also lift their decoding out of the scan.
        at, resid = stream.decode(at, inputs[block])
        target = _take(table.attn_out_codec, batch["attn_out"], targets[block], stack.config.hidden_size)
        return at, visit(lambda state: nnx.merge(graph, state)(resid, context), state, resid, target)

    def skip(run: Callable[..., Any], state: Any, block: Array, at: StreamState) -> tuple[StreamState, Any]:
        _, shapes = jax.eval_shape(run, state, block, at)
        return at, jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

    at, results, start = stream.start(batch["positions"].shape), [], 0
    for graphs, states, layers in zip(stack.graphs, parameters, stack.config.layers, strict=True):

        def body(at: StreamState, step: tuple[Any, Array], graphs: Any = graphs, start: int = start) -> Any:
            sliced, repeat = step
            visited = []
            for place, (graph, state) in enumerate(zip(graphs, sliced, strict=True)):
                block, run = start + repeat * len(graphs) + place, partial(visit_block, graph)
                if all(table.trained):
                    at, found = run(state, block, at)
                else:  # only one of the two is executed
                    at, found = jax.lax.cond(trained[block], run, partial(skip, run), state, block, at)
                visited.append(found)
            return at, tuple(visited)

        at, stacked = jax.lax.scan(body, at, (states, jnp.arange(layers.repeats)))
        results.append(stacked)
        start += len(graphs) * layers.repeats
    return tuple(results)


class _Stream:
    """Decodes the stream's slots in order; a delta codec needs what it decoded before."""

    def __init__(self, table: TapTable, parts: Mapping[str, Array], hidden: int) -> None:
        self._codec, self._stacks, self._hidden, self._in_step = table.resid_codec, parts, hidden, table.in_step

    def start(self, rows: tuple[int, ...]) -> StreamState:
        return jnp.zeros((), jnp.int32), self._codec.start((*rows, self._hidden))

    def decode(self, at: StreamState, place: Array) -> tuple[StreamState, Float[Array, "B T D"]]:
        """The slot at `place`, float32, and where decoding stands after it."""
        ready, carry = at
        if carry is None or self._in_step:
            carry, value = self._slot(carry, place)
            return (place + 1, carry), value

        def one(place: Array, state: tuple[Any, Array]) -> tuple[Any, Array]:
            return self._slot(state[0], place)

        begin = jnp.maximum(ready, self._codec.first_slot(place))  # type: ignore[arg-type]
        carry, value = jax.lax.fori_loop(begin, place + 1, one, (carry, jnp.zeros(carry.shape, jnp.float32)))
        return (place + 1, carry), value

    def _slot(self, carry: Any, place: Array) -> tuple[Any, Array]:
        parts = take_slot(self._stacks, self._codec.parts(self._hidden), place)
        carry, value = self._codec.decode_slot(carry, parts, place)
        return carry, value.astype(jnp.float32)


def block_gradients(
    stack: AttentionStack, parameters: Places, batch: Mapping[str, Any], table: TapTable, loss: FeatureLossConfig
) -> tuple[Places, MaskedSum]:
    """The gradient of every block's mean loss by its own parameters, and the losses' `[L]` sums.

    The loss is `weight * (relative_l2 * ... + cosine * ... + l2 * ...)`, a mean over real tokens; blocks that are not
    trained have zero loss and zero gradient.
    """
    mask = batch["segment_ids"] > 0
    tokens = jnp.sum(mask, dtype=jnp.float32)
    shares = {name: loss.weight * getattr(loss, name) for name in ("relative_l2", "cosine", "l2")}

    def visit(attend: Callable[[Any], Array], state: Any, resid: Array, target: Array) -> tuple[Any, Array]:
        def mean(state: Any) -> tuple[Array, Array]:
            sums = feature_loss(attend(state), target, mask, **shares)
            # Divided here: a division of the stacked gradients afterwards would be a second stack.
            return sums.mean, sums.total

        gradient, total = jax.grad(mean, has_aux=True)(state)
        return gradient, total

    visited = visit_blocks(stack, parameters, batch, table, visit)
    gradients = tuple(tuple(place[0] for place in group) for group in visited)
    totals = stack.in_block_order([[place[1] for place in group] for group in visited])
    return gradients, MaskedSum(totals, tokens)


def init_state(stack: AttentionStack, decoder: Decoder, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    parameters = stack.parameters(decoder)
    return TrainState(
        parameters, tuple(tuple(init_blocks(optimizer, place) for place in group) for group in parameters)
    )


def make_step(
    stack: AttentionStack, optimizer: optax.GradientTransformation, loss: FeatureLossConfig, table: TapTable
) -> Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, MaskedSum]]:
    """The jitted step `(state, batch) -> (state, feature loss [L])`; the state's memory is given away.

    What is minimised is the sum of the blocks' means over tokens, so a block's gradient does not depend on L.
    """
    trained = [[[table.trained[block] for block in place] for place in group] for group in stack.numbers()]

    def step(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, MaskedSum]:
        gradients, sums = block_gradients(stack, state.parameters, batch, table, loss)
        updated = [
            [
                update_blocks(optimizer, gradient, moments, parameters, jnp.asarray(mask))
                for gradient, moments, parameters, mask in zip(*group, strict=True)
            ]
            for group in zip(gradients, state.optimizer, state.parameters, trained, strict=True)
        ]
        parameters, moments = (tuple(tuple(place[k] for place in group) for group in updated) for k in (0, 1))
        return TrainState(parameters, moments), sums

    return jax.jit(step, donate_argnums=0)


def _take(codec: Codec, stacks: Mapping[str, Array], place: Array, hidden: int) -> Float[Array, "B T D"]:
    return codec.decode(take_slot(stacks, codec.parts(hidden), place)).astype(jnp.float32)
