"""The student's blocks in a scan: the inputs of each block, and what is computed there.

The scan's body takes block l's codes out of the stacks and decodes them; what is alive at a time is one block's,
whatever L is. Training (blockwise.py) and evaluation (run/evaluate.py) differ in what they do there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from distillcache.models.adapters import merged
from distillcache.models.config import ModelConfig
from distillcache.models.decoder import Decoder
from distillcache.models.layers.context import BlockContext, block_context
from distillcache.models.layers.norm import rms_norm
from distillcache.models.layers.sublayer import second_input
from distillcache.schemas.codecs import take_slot
from distillcache.schemas.errors import ConfigError
from distillcache.trainer.step.optimizer import put_block, take_block
from distillcache.trainer.step.parameters import PROJECTOR, StackAddress, cast, sublayer
from distillcache.trainer.step.targets import BlockTargets, TapReading, Targets
from distillcache.trainer.terms.parts import Outputs

Taps = Mapping[str, Mapping[str, Array]]  # tap -> part -> [S, B, T, W]


class Given(NamedTuple):
    """The teacher's tensors that a block trains with, float32 `[B, T, Dt]`.

    resid enters the span; attn_out is what its attentions added; mlp_out what its MLPs did; leaving: the stream that
    leaves it. None where nobody asks.
    """

    resid: Array
    attn_out: Array | None
    mlp_out: Array | None = None
    leaving: Array | None = None

    @property
    def outputs(self) -> Outputs:
        """The outputs of the span, to compare with."""
        return Outputs(self.attn_out, self.mlp_out, stream=self.leaving)


@dataclass(frozen=True)
class BlockRules:
    """Rules for running a block. See `TrainConfig.mlp_input`; compute_dtype is of parameters and activations.

    own_stream: no stream is recorded, so a block is given the student's own, in the student's width.
    teacher_norm_eps: of the teacher's attention norms, where `StudentStack.run` is given their weights.
    adapter_alpha: of the adapters among the parameters (models/adapters.py).
    """

    mlp_input: str = "teacher"
    runs_mlp: bool = False
    compute_dtype: str = "float32"
    own_stream: bool = False
    teacher_norm_eps: float = 1e-6
    adapter_alpha: float | None = None

    def used(self, parameters: Mapping[str, Array]) -> dict[str, Array]:
        """A block's parameters as they are computed with."""
        whole = parameters if self.adapter_alpha is None else merged(parameters, self.adapter_alpha)
        return cast(whole, self.compute_dtype)


# `cross(address, of_block, fixed, stream)`: the student's own stream behind a block.
Cross = Callable[[StackAddress, Any, Any, Array], Array]
# `visit(of_block, fixed, given, row) -> (of_block, y)`: what one block's turn does with what the scan carries for it.
Visit = Callable[[StackAddress, Any, Any, Given, BlockTargets], tuple[Any, Any]]


def no_student(config: ModelConfig) -> ConfigError:
    """The error for a student whose blocks cannot be computed alone."""
    return ConfigError(
        "this model cannot be a student: its blocks need more than the stream that enters them",
        {
            "family": config.family,
            "found": "blocks that take over keys and values, or have inputs of their own",
            "expected": "blocks that are computed from the stream alone",
        },
        "use it as a teacher, and make the student of another model with this tokenizer",
    )


class StudentStack:
    """The static part of a student's blocks: their graphs and sizes. Two of equal students are equal."""

    def __init__(self, decoder: Decoder) -> None:
        if decoder.config.has_joined_blocks:
            raise no_student(decoder.config)
        self.config: ModelConfig = decoder.config
        self.graphs: dict[StackAddress, dict[str, nnx.GraphDef[Any]]] = {
            (g, p): {"attention": nnx.graphdef(block.attention), "mlp": nnx.graphdef(block.mlp)}
            for g, group in enumerate(decoder.groups)
            for p, block in enumerate(group.blocks)
        }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StudentStack) and (self.config, self.graphs) == (other.config, other.graphs)

    def __hash__(self) -> int:
        return hash(self.config)

    def places(self) -> dict[StackAddress, int]:
        """Every place and its repeats."""
        return {address: self.config.layers[address[0]].repeats for address in self.graphs}

    def context(self, batch: Mapping[str, Any]) -> BlockContext:
        """Compute the inputs that the blocks need about the rows; once, outside the scan."""
        return block_context(self.config, batch["positions"], batch["segment_ids"])

    def run(
        self,
        address: StackAddress,
        parameters: Mapping[str, Array],
        given: Given,
        context: BlockContext,
        rules: BlockRules,
        norm: Array | None = None,
    ) -> Outputs:
        """A block's outputs, in the teacher's width; the stream that leaves it where its MLP runs on a recorded one.

        Args:
            norm: the weight of the teacher's attention norm, where that takes the place of the block's own (`inject:
                attn_in`: `BlockTargets.norm`).
        """
        parameters = rules.used(parameters)
        into, out = (parameters.get(f"{PROJECTOR}/{side}") for side in ("in", "out"))

        def inward(x: Array) -> Array:
            x = x.astype(rules.compute_dtype)
            return x if into is None or rules.own_stream else x @ into

        def outward(x: Array) -> Array:
            return x if out is None else x @ out

        attention = sublayer(self.graphs[address]["attention"], "attention", parameters)
        if norm is None:
            own = attention(inward(given.resid), context)
        else:
            own = attention.attend(inward(rms_norm(given.resid, norm, rules.teacher_norm_eps)), context)
        if not rules.runs_mlp:
            return Outputs(outward(own), None)
        own_input = rules.mlp_input == "student" or rules.own_stream
        middle = inward(given.resid) + own if own_input else inward(given.resid + given.attn_out)  # type: ignore[operator]
        mlp = sublayer(self.graphs[address]["mlp"], "mlp", parameters)
        mlp_out, router = mlp(second_input(attention, inward(given.resid), middle), context)
        own, mlp_out = outward(own), outward(mlp_out)
        return Outputs(own, mlp_out, router, None if rules.own_stream else given.resid + own + mlp_out)

    def cross(
        self,
        address: StackAddress,
        parameters: Mapping[str, Array],
        stream: Array,
        context: BlockContext,
        rules: BlockRules,
    ) -> Array:
        """The student's own stream behind a block, without gradient."""
        parameters = rules.used(parameters)
        x = stream.astype(rules.compute_dtype)
        attention = sublayer(self.graphs[address]["attention"], "attention", parameters)
        middle = x + attention(x, context)
        mlp = sublayer(self.graphs[address]["mlp"], "mlp", parameters)
        x = middle + mlp(second_input(attention, x, middle), context)[0]
        return jax.lax.stop_gradient(x).astype(stream.dtype)

    def in_block_order(self, by_address: Mapping[StackAddress, Array]) -> Float[Array, " L"]:
        """Values `[repeats]` of every place as one `[L]`."""
        groups = [
            jnp.stack([by_address[g, p] for p in range(len(layers.pattern))], axis=1).reshape(-1)
            for g, layers in enumerate(self.config.layers)
        ]
        return jnp.concatenate(groups)


def scan_blocks(
    stack: StudentStack,
    targets: Targets,
    reading: TapReading,
    taps: Taps,
    rows: tuple[int, int],
    visit: Visit,
    carried: Mapping[StackAddress, Any],
    fixed: Mapping[StackAddress, Any],
    *,
    needs_mlp: bool,
    needs_leaving: bool = False,
    own: tuple[Array, Cross] | None = None,
) -> tuple[dict[StackAddress, Any], dict[StackAddress, Any]]:
    """Give every trained block its turn, in order.

    Args:
        rows: (B, T).
        carried: what `visit` gets and gives back for its block, stacked `[repeats, ...]`, updated in place.
        fixed: what it only gets, likewise stacked.
        needs_mlp, needs_leaving: `Given.mlp_out`, `Given.leaving` are wanted.
        own: where no stream is recorded: the one that enters block 0, `[B, T, Ds]`, and how it crosses a block.

    Returns:
        carried as it ended, and what `visit` returned, stacked likewise; zeros where a block is not trained.
    """
    decoder = TapDecoder(reading, taps, needs_mlp, needs_leaving)
    stream, carried, results = own[0] if own else decoder.start(rows), dict(carried), {}
    for number, layers in enumerate(stack.config.layers):
        members = [(number, p) for p in range(len(layers.pattern))]
        repeats = targets[number].trained.shape[0]

        def body(state: Any, repeat: Array, members: Sequence[StackAddress] = members, number: int = number) -> Any:
            stream, stacks = state
            ys = []
            for p, address in enumerate(members):
                row = targets[number].at(repeat, p)
                mine, given_fixed = take_block(stacks[address], repeat), take_block(fixed[address], repeat)

                def run(
                    stream: Any, mine: Any, address: StackAddress = address, row: Any = row, kept: Any = given_fixed
                ) -> Any:
                    behind, given = decoder.decode(stream, row)
                    new, y = visit(address, mine, kept, given, row)
                    if row.runs is None:
                        return behind, new, y
                    return keep_if(row.trained, (behind, new, y), (stream, mine, zeros_like(y)))

                # A branch for every block, trained or not: see optimizer.update_blocks.
                behind = own[1](address, mine, given_fixed, stream) if own else None
                stream, mine, y = jax.lax.cond(row.computed, run, _skipped(run), stream, mine)
                stream = stream if behind is None else behind
                stacks = {**stacks, address: put_block(stacks[address], mine, repeat)}
                ys.append(y)
            return (stream, stacks), tuple(ys)

        mine = {address: carried[address] for address in members}
        (stream, mine), ys = jax.lax.scan(body, (stream, mine), jnp.arange(repeats))
        carried |= mine
        results |= dict(zip(members, ys, strict=True))
    return carried, results


def keep_if(condition: Array, new: Any, old: Any) -> Any:
    """One of two trees."""
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def zeros_like(tree: Any) -> Any:
    """Zeros of these shapes."""
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), tree)


def _skipped(run: Callable[..., Any]) -> Callable[..., Any]:
    def skip(stream: Any, mine: Any) -> Any:
        return stream, mine, zeros_like(jax.eval_shape(run, stream, mine)[2])

    return skip


class StreamState(NamedTuple):
    """Progress of decoding the stream: the next slot, the codec's carry, and the slot decoded last."""

    ready: Array
    carry: Any
    value: Array


class TapDecoder:
    """Decodes the inputs of a block.

    Stacks are indexed here and not passed to the scan: slices given to a scan are copied whole, and XLA on CPU would
    also lift their decoding out of it.
    """

    def __init__(self, reading: TapReading, taps: Taps, needs_mlp: bool, needs_leaving: bool = False) -> None:
        self._reading, self._taps = reading, taps
        self._codec: Any = reading.codecs.get("resid")  # None: no stream is recorded, or none is requested
        self._derives = needs_mlp and not reading.records_mlp
        self._needs_mlp, self._needs_leaving = needs_mlp, needs_leaving
        self._follows = self._derives or needs_leaving

    def start(self, rows: tuple[int, int]) -> StreamState | None:
        """None for a codec without memory: every slot is decoded for itself."""
        shape = (*rows, self._reading.hidden)
        carry = self._codec.start(shape)
        if carry is None:
            return None
        state = StreamState(jnp.zeros((), jnp.int32), carry, jnp.zeros(shape, jnp.float32))
        if self._reading.in_step and self._follows:  # the slot entering block 0; each block then decodes the next
            state = self._next(state)
        return state

    def decode(self, state: Any, row: BlockTargets) -> tuple[Any, Given]:
        """A block's tensors, and where decoding stands after them."""
        if self._codec is None:  # the student's own stream, as it is
            return state, Given(state, self.target(row), self._sum("mlp_out", row) if self._needs_mlp else None)
        state, resid = self._slot(state, row.resid, ahead=False)
        attn_out = self.target(row)
        mlp_out = leaving = None
        if self._follows:
            state, leaving = self._slot(state, row.leaving, ahead=True)
        if self._derives:
            mlp_out = leaving - resid - attn_out  # type: ignore[operator]
        elif self._needs_mlp:
            mlp_out = self._sum("mlp_out", row)
        return state, Given(resid, attn_out, mlp_out, leaving if self._needs_leaving else None)

    def target(self, row: BlockTargets) -> Array | None:
        """Return the contribution of the attentions of a block's span; None where it is not read."""
        return None if row.attn_out is None else self._sum("attn_out", row)

    def slot(self, place: int | Array, rows: tuple[int, int]) -> Array:
        """Return the stream at one place of a batch's stack, decoded for itself: of a delta codec from its keyframe on.

        Args:
            rows: (B, T).
        """
        index, carry = jnp.asarray(place, jnp.int32), self._codec.start((*rows, self._reading.hidden))
        if carry is None:
            return self._take("resid", index)
        # Only the last one's value is used, so those before it are not rotated back.
        first = self._codec.first_slot(index)
        carry = jax.lax.fori_loop(first, index, lambda at, before: self._decode_at(at, before)[0], carry)
        return self._decode_at(index, carry)[1]

    def _slot(self, state: StreamState | None, index: Any, *, ahead: bool) -> tuple[StreamState | None, Array]:
        if state is None:
            return None, self._take("resid", index)
        if self._reading.in_step:
            if ahead or not self._follows:
                state = self._next(state)
            return state, state.value

        def one(at: Array, found: tuple[Any, Array]) -> tuple[Any, Array]:
            return self._decode_at(at, found[0])

        begin = jnp.maximum(state.ready, self._codec.first_slot(index))
        carry, value = jax.lax.fori_loop(begin, index + 1, one, (state.carry, state.value))
        return StreamState(index + 1, carry, value), value

    def _next(self, state: StreamState) -> StreamState:
        carry, value = self._decode_at(state.ready, state.carry)
        return StreamState(state.ready + 1, carry, value)

    def _decode_at(self, index: Array, carry: Any) -> tuple[Any, Array]:
        parts = take_slot(self._taps["resid"], self._codec.parts(self._reading.hidden), index)
        carry, value = self._codec.decode_slot(carry, parts, index)
        return carry, value.astype(jnp.float32)

    def _sum(self, tap: str, row: BlockTargets) -> Array:
        """Return the contribution of the span's blocks."""
        places = getattr(row, tap)
        total = self._take(tap, places[0])
        for number in range(1, places.shape[0]):  # spans of a few blocks
            more = self._take(tap, places[number])
            total = total + jnp.where(number < row.count, more, 0.0)
        return total

    def _take(self, tap: str, index: Array) -> Array:
        codec = self._reading.codecs[tap]
        parts = take_slot(self._taps[tap], codec.parts(self._reading.hidden), index)
        return codec.decode(parts).astype(jnp.float32)
