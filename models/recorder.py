"""The teacher's jitted forward that returns encoded taps: what `build` runs, and `train` with the teacher in the loop.

Encoding runs inside the scan over blocks, so that only codes ever exist as stacks and only codes cross the bus. The
LM head is never run; the last block's MLP only where a recorded slot needs it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from models.decoder import BlockOutput, Decoder
from schemas.codecs import get_codec
from schemas.manifest import TapPlan


class SlotSums(NamedTuple):
    """Statistics of one tap over each row's real tokens, `[B, S]` each: float32 sums and maxima, int32 counts.

    Non-finite numbers are left out of the sums; one of them anywhere is an error for the caller to raise.
    """

    square_sum: Array | np.ndarray
    abs_max: Array | np.ndarray
    nonfinite: Array | np.ndarray


class Recording(NamedTuple):
    """codes: tap -> part -> `[B, S, T, W]`, S stored slots, in the order of the disk. sums: tap -> `SlotSums`."""

    codes: dict[str, dict[str, Array]]
    sums: dict[str, SlotSums]


RecordFunction = Callable[[Any, Int[Array, "B T"], Int[Array, "B T"], Int[Array, "B T"]], Recording]


def make_recorder(decoder: Decoder, taps: Sequence[TapPlan]) -> tuple[RecordFunction, Any]:
    """The jitted recorder of these taps, and the parameters to call it with: `record(parameters, tokens, positions,
    segment_ids) -> Recording`.

    The parameters are an argument, not a constant of the jit: a constant would be folded into the program.
    """
    graph, parameters = nnx.split(decoder)
    num_blocks = decoder.config.num_blocks

    @jax.jit
    def record(
        parameters: Any, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
    ) -> Recording:
        model = nnx.merge(graph, parameters)
        real = segment_ids > 0

        def emit(carry: Recording, out: BlockOutput, block: Array) -> tuple[Recording, None]:
            return _record_slot(carry, taps, block, num_blocks, real, lambda name: getattr(out, name)), None

        last, recording, _ = model.scan_blocks(
            model.embed_tokens(tokens),
            model.context(positions, segment_ids),
            emit,
            _empty_recording(taps, tokens.shape[0], tokens.shape[1], decoder.config.hidden_size),
            skip_last_mlp=not _last_mlp_needed(taps, num_blocks),
        )
        leaving = [tap for tap in taps if tap.name == "resid"]
        return _record_slot(recording, leaving, jnp.asarray(num_blocks), num_blocks, real, lambda _: last)

    return record, parameters


def _record_slot(
    carry: Recording,
    taps: Sequence[TapPlan],
    slot: Array,
    num_blocks: int,
    real: Array,
    value_of: Callable[[str], Float[Array, "B T D"]],
) -> Recording:
    """The recording with the taps' values of one slot put in where that slot is recorded."""
    codes, sums = dict(carry.codes), dict(carry.sums)
    for tap in taps:
        # A slot that is not recorded rewrites what lies at place 0: cheaper than a conditional, and in place.
        places = np.zeros(num_blocks + 1, np.int32)
        wanted = np.zeros(num_blocks + 1, bool)
        places[list(tap.slots)], wanted[list(tap.slots)] = np.arange(len(tap.slots)), True
        place, keep = jnp.asarray(places)[slot], jnp.asarray(wanted)[slot]
        value = value_of(tap.name)
        encoded = get_codec(tap.codec).encode(value)
        codes[tap.name] = {part: _put(codes[tap.name][part], encoded[part], place, keep, 1) for part in encoded}
        new = _slot_sums(value, real)
        old = sums[tap.name]
        sums[tap.name] = SlotSums(*(_put(was, now, place, keep, 1) for was, now in zip(old, new, strict=True)))
    return Recording(codes, sums)


def _put(buffer: Array | np.ndarray, value: Array | np.ndarray, place: Array, keep: Array, axis: int) -> Array:
    current = jax.lax.dynamic_index_in_dim(buffer, place, axis, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(buffer, jnp.where(keep, value, current), place, axis)


def _slot_sums(value: Float[Array, "B T D"], real: Array) -> SlotSums:
    wide = jnp.where(real[..., None], value.astype(jnp.float32), 0)
    finite = jnp.isfinite(wide)
    clean = jnp.where(finite, wide, 0)
    inner = (1, 2)
    return SlotSums(
        jnp.sum(jnp.square(clean), inner), jnp.max(jnp.abs(clean), inner), jnp.sum(~finite, inner, dtype=jnp.int32)
    )


def _empty_recording(taps: Sequence[TapPlan], batch: int, tokens: int, hidden: int) -> Recording:
    codes, sums = {}, {}
    for tap in taps:
        slots = len(tap.slots)
        codes[tap.name] = {
            part.name: jnp.zeros((batch, slots, tokens, part.width), part.dtype)
            for part in get_codec(tap.codec).parts(hidden)
        }
        sums[tap.name] = SlotSums(
            jnp.zeros((batch, slots)), jnp.zeros((batch, slots)), jnp.zeros((batch, slots), jnp.int32)
        )
    return Recording(codes, sums)


def _last_mlp_needed(taps: Sequence[TapPlan], num_blocks: int) -> bool:
    needed: Mapping[str, int] = {"resid": num_blocks, "mlp_out": num_blocks - 1}
    return any(needed.get(tap.name) in tap.slots for tap in taps)
