"""The teacher's jitted forward that returns encoded taps: what `build` runs, and `train` with the teacher in the loop.

Encoding runs inside the scan over blocks, so that only codes ever exist as stacks and only codes cross the bus. The
LM head runs only where `topk_logits` are recorded; the last block's MLP only where a recorded slot or they need it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from distillcache.models.config import ModelConfig
from distillcache.models.decoder import BlockOutput, Decoder
from distillcache.models.mesh.recording import RecordingMesh
from distillcache.models.routing import RouterSums, router_sums
from distillcache.models.topk import topk_logits
from distillcache.schemas.codecs import Codec
from distillcache.schemas.errors import NonFiniteError
from distillcache.schemas.format.manifest import TOPK_LOGITS, TapPlan
from distillcache.schemas.format.tap_codec import Signs, tap_codec


class SlotSums(NamedTuple):
    """Statistics of one tap over each row's real tokens, `[B, S]` each: float32 sums and maxima, int32 counts.

    Non-finite numbers are left out of the sums; one of them anywhere is an error for the caller to raise.
    """

    square_sum: Array | np.ndarray
    abs_max: Array | np.ndarray
    nonfinite: Array | np.ndarray


class Recording(NamedTuple):
    """codes: tap -> part -> `[B, S, T, W]`, S stored slots, in the order of the disk. sums: tap -> `SlotSums`.

    router: of a teacher with experts, the sums of each row, `[Lm, B, ...]` over its blocks with experts; no tokens in a
    block that was left out.
    """

    codes: Mapping[str, Mapping[str, Array | np.ndarray]]
    sums: Mapping[str, SlotSums]
    router: RouterSums | None = None


class _TapState(NamedTuple):
    """One tap while the blocks are scanned: what is recorded so far, and the codec's carry."""

    codes: dict[str, Array]
    sums: SlotSums
    carry: Any


class _TapRecorder:
    """Puts a tap's slots into place as they come by."""

    def __init__(self, tap: TapPlan, codec: Codec, num_blocks: int) -> None:
        self.tap, self.codec = tap, codec
        # A slot that is not recorded rewrites what lies at place 0: cheaper than a conditional, and in place.
        self._places, self._wanted = np.zeros(num_blocks + 1, np.int32), np.zeros(num_blocks + 1, bool)
        self._places[list(tap.slots)], self._wanted[list(tap.slots)] = np.arange(len(tap.slots)), True

    def start(self, batch: int, tokens: int, hidden: int) -> _TapState:
        codes = {part.part: jnp.zeros((batch, part.slots, tokens, part.width), part.dtype) for part in self.tap.parts}
        slots = len(self.tap.slots)
        sums = SlotSums(jnp.zeros((batch, slots)), jnp.zeros((batch, slots)), jnp.zeros((batch, slots), jnp.int32))
        return _TapState(codes, sums, self.codec.start((batch, tokens, hidden)))

    def put(self, state: _TapState, value: Float[Array, "B T D"], slot: Array, real: Array) -> _TapState:
        """The state with the value of a slot, where that slot is recorded."""
        place, keep = jnp.asarray(self._places)[slot], jnp.asarray(self._wanted)[slot]
        carry, encoded = self.codec.encode_slot(state.carry, value, place)
        codes = {
            part.part: _put(
                state.codes[part.part], encoded[part.part], place // part.every, keep & (place % part.every == 0)
            )
            for part in self.tap.parts
        }
        new = slot_sums(value, real)
        sums = SlotSums(*(_put(was, now, place, keep) for was, now in zip(state.sums, new, strict=True)))
        carry = jax.tree.map(lambda now, was: jnp.where(keep, now, was), carry, state.carry)
        return _TapState(codes, sums, carry)


def _placed(state: _TapState, places: RecordingMesh | None) -> _TapState:
    """The state with each device's part of it on that device, from block to block."""
    if places is None:
        return state
    return _TapState(
        {part: places.stacks(codes) for part, codes in state.codes.items()},
        SlotSums(*map(places.sums, state.sums)),
        jax.tree.map(places.values, state.carry),
    )


RecordFunction = Callable[[Any, Int[Array, "B T"], Int[Array, "B T"], Int[Array, "B T"]], Recording]


def make_recorder(
    decoder: Decoder, taps: Sequence[TapPlan], signs: Signs, mesh: Mesh | None = None
) -> tuple[RecordFunction, Any]:
    """The jitted recorder of these taps, and the parameters to call it with: `record(parameters, tokens, positions,
    segment_ids) -> Recording`.

    The parameters are an argument, not a constant of the jit: a constant would be folded into the program.

    Args:
        mesh: where the decoder's parameters lie; the recording is then dealt out over it (mesh/recording.py), and says
            nothing of the routing.
    """
    graph, parameters = nnx.split(decoder)
    named = tuple((name, np.asarray(value, np.int8).tobytes()) for name, value in sorted(signs.items()))
    return _program(graph, decoder.config, tuple(taps), named, mesh), parameters


@lru_cache(maxsize=16)  # a second stage, or the next of several caches, neither traces nor compiles its teacher anew
def _program(
    graph: nnx.GraphDef[Decoder],
    config: ModelConfig,
    taps: tuple[TapPlan, ...],
    named: tuple[tuple[str, bytes], ...],
    mesh: Mesh | None,
) -> RecordFunction:
    """The jitted recorder of every decoder of this graph.

    Args:
        named: the taps' signs, as bytes that can be compared.
    """
    signs, num_blocks = {name: np.frombuffer(value, np.int8) for name, value in named}, config.num_blocks
    recorders = {
        tap.name: _TapRecorder(tap, tap_codec(tap, signs), num_blocks) for tap in taps if tap.name != TOPK_LOGITS
    }
    topk = next((tap for tap in taps if tap.name == TOPK_LOGITS), None)

    def record(
        parameters: Any, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
    ) -> Recording:
        """The encoded taps of a batch."""
        batch, row_tokens = tokens.shape
        places = None if mesh is None else RecordingMesh.of(mesh, batch, row_tokens)
        own = (lambda x: x) if places is None else places.own
        model = nnx.merge(graph, parameters if places is None else places.gathered(parameters))
        real = own(segment_ids > 0)

        skip_last_mlp = not _last_mlp_needed(taps, num_blocks)

        def emit(states: dict[str, _TapState], out: BlockOutput, block: Array) -> tuple[dict[str, _TapState], Any]:
            recorded = {
                name: _placed(recorder.put(states[name], own(getattr(out, name)), block, real), places)
                for name, recorder in recorders.items()
            }
            if out.router is None or places is not None:
                return recorded, {}
            ran = real & (block < num_blocks - 1) if skip_last_mlp else real
            return recorded, {"router": jax.vmap(router_sums)(out.router, ran)}

        last, states, kept = model.scan_layers(
            model.embed_tokens(tokens) if places is None else places.stream(model.embed_tokens(tokens)),
            model.context(positions, segment_ids, tokens),
            emit,
            {
                name: _placed(recorder.start(batch, row_tokens, config.hidden_size), places)
                for name, recorder in recorders.items()
            },
            skip_last_mlp=skip_last_mlp,
            wrap=None if places is None else places.of_blocks,
        )
        if "resid" in recorders:
            found = recorders["resid"].put(states["resid"], own(last), jnp.asarray(num_blocks), real)
            states["resid"] = _placed(found, places)
        codes = {name: state.codes for name, state in states.items()}
        sums = {name: state.sums for name, state in states.items()}
        if topk is not None:
            codes[TOPK_LOGITS], sums[TOPK_LOGITS] = _record_topk(model, topk, own(last), real, places)
        return Recording(codes, sums, kept.get("router"))

    if mesh is None:
        return jax.jit(record)

    def on_mesh(*args: Any) -> Recording:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # experts are split by it (layers/experts.py)
            return record(*args)

    return jax.jit(on_mesh)


def _record_topk(
    decoder: Decoder,
    tap: TapPlan,
    stream: Float[Array, "B T D"],
    real: Bool[Array, "B T"],
    places: RecordingMesh | None,
) -> tuple[dict[str, Array], SlotSums]:
    """The encoded logits of the stream that leaves the last block, and the statistics of their values; one slot."""
    k = tap.numbers_per_token(decoder.config.hidden_size)
    found = topk_logits(decoder, stream, k, places, tap.vocab_size)
    parts = tap_codec(tap, {}).encode(found)  # type: ignore[arg-type]
    return {name: part[:, None] for name, part in parts.items()}, SlotSums(
        *(value[:, None] for value in slot_sums(found.values, real))
    )


def _put(buffer: Array | np.ndarray, value: Array | np.ndarray, place: Array, keep: Array) -> Array:
    """`buffer` `[B, S, ...]` with `value` `[B, ...]` at slot `place`, or as it was."""
    current = jax.lax.dynamic_index_in_dim(buffer, place, 1, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(buffer, jnp.where(keep, value, current), place, 1)


def slot_sums(value: Float[Array, "B T D"], real: Array) -> SlotSums:
    """The statistics of one slot over each row's real tokens, `[B]` each."""
    wide = jnp.where(real[..., None], value.astype(jnp.float32), 0)
    finite = jnp.isfinite(wide)
    clean = jnp.where(finite, wide, 0)
    inner = (1, 2)
    return SlotSums(
        jnp.sum(jnp.square(clean), inner), jnp.max(jnp.abs(clean), inner), jnp.sum(~finite, inner, dtype=jnp.int32)
    )


def raise_if_too_large(
    tap: str, slots: tuple[int, ...], square_sum: np.ndarray, abs_max: np.ndarray, rows: Sequence[int]
) -> None:
    """Raise `NonFiniteError` where finite activations are so large that their squares are not, in float32.

    Norms, cosines and losses could not be computed from them either.

    Args:
        square_sum, abs_max: `[rows, S]`.
        rows: their numbers.
    """
    places = np.argwhere(~np.isfinite(square_sum)).tolist()
    if not places:
        return
    row, slot = min(places, key=lambda place: (place[1], place[0]))
    raise NonFiniteError(
        "the teacher gave numbers whose squares overflow float32",
        {
            "row": rows[row],
            **({} if tap == TOPK_LOGITS else {"block": slots[slot]}),
            "tap": tap,
            "found": f"numbers up to {abs_max[row, slot]:.3g}",
            "expected": "a sum of squares below 3.4e38",
        },
        "check the teacher's weights: no loss can be computed from such numbers",
    )


def _last_mlp_needed(taps: Sequence[TapPlan], num_blocks: int) -> bool:
    needed: Mapping[str, int] = {"resid": num_blocks, "mlp_out": num_blocks - 1}
    return any(tap.name == TOPK_LOGITS or needed.get(tap.name) in tap.slots for tap in taps)
