"""Accuracy and cost of each codec, measured on a teacher's own activations.

A *distance* is a cosine distance, 1 - cos, averaged over tokens and blocks. It is taken of five things, since that of
the stored numbers alone hides what matters (a few outlier dimensions carry the norm of a residual stream):

    attn_out    as decoded
    resid       as decoded, all slots
    mlp_out     derived from both: resid[l + 1] - resid[l] - attn_out[l]
    normed      the attention's input, from the decoded stream, after its norm
    attention   the teacher's own attention, fed with the decoded stream, against the recorded output

`bits` counts all parts, scales and keyframes included. `bound_bits` is how many more bits the codec spends than the
best possible code of independent normal numbers at the same distance: that bound is 2^(-2b - 1) at b bits a number.
Negative: the numbers were easier than normal ones, as differences are.
"""

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from distillcache.models.decoder import Decoder
from distillcache.models.layers.context import BlockContext
from distillcache.models.layers.norm import rms_norm
from distillcache.schemas.codecs import Codec, get_codec, make_signs
from distillcache.schemas.format.layout import ITEM_BYTES

TAPS = ("resid", "attn_out")
FLOAT32_DISTANCE = 2.0**-49  # of unit vectors that differ by float32's rounding
REPEATS = 5  # the best of these counts
SPEED_SLOTS = 8  # of resid: one keyframe and what follows


@dataclass(frozen=True)
class CodecChoice:
    """A codec for both taps. Integer codecs are rotated. Differences are for resid only: keyframe_every None: none."""

    label: str
    codec: str
    keyframe_every: int | None = None

    def make(self, tap: str, hidden: int) -> Codec:
        if not self.codec.startswith("int"):
            return get_codec(self.codec)
        signs = make_signs(f"bench/{tap}", hidden)
        if tap == "resid" and self.keyframe_every is not None:
            return get_codec(self.codec, signs=signs, delta=True, keyframe_every=self.keyframe_every)
        return get_codec(self.codec, signs=signs)


CHOICES = (
    CodecChoice("bf16", "bf16"),
    CodecChoice("fp8", "fp8"),
    CodecChoice("int8", "int8"),
    CodecChoice("int8_delta_no_keys", "int8", 0),
    CodecChoice("int8_delta", "int8", 8),
    CodecChoice("int4", "int4"),
    CodecChoice("int4_delta_no_keys", "int4", 0),
    CodecChoice("int4_delta", "int4", 8),
)

# (figure, at most). Sizes are shares of bf16's; keyframes every 8 blocks may add 0.07.
GOALS = (
    ("int8.attn_out", 1.7e-5),
    ("int4.attn_out", 4.3e-3),
    ("int8_delta_no_keys.resid", 2e-6),
    ("int8_delta.resid", 2e-6),
    ("int4_delta_no_keys.resid", 5.5e-4),
    ("int4_delta.resid", 5.5e-4),
    ("int8_delta_no_keys.mlp_out", 2e-4),
    ("int8_delta.mlp_out", 2e-4),
    ("int4_delta_no_keys.mlp_out", 1.8e-2),
    ("int4_delta.mlp_out", 1.8e-2),
    ("int8_delta_no_keys.normed", 2.5e-6),
    ("int8_delta.normed", 2.5e-6),
    ("int8.attn_out_size", 0.52),
    ("int4.attn_out_size", 0.27),
    ("int8_delta_no_keys.resid_size", 0.52),
    ("int4_delta_no_keys.resid_size", 0.27),
    ("int8_delta.key_size", 0.07),
    ("int4_delta.key_size", 0.07),
)


@jax.jit
def cosine_distance(x: Float[Array, "*A D"], y: Float[Array, "*A D"]) -> Float[Array, ""]:
    """The mean of 1 - cos, as half the squared distance of the unit vectors: float32's 1 - cos ends at 6e-8."""
    unit_x, unit_y = (v / jnp.maximum(jnp.linalg.norm(v, axis=-1, keepdims=True), 1e-30) for v in (x, y))
    return jnp.mean(jnp.sum(jnp.square(unit_x - unit_y), -1)) / 2


def collect_taps(decoder: Decoder, tokens: Int[np.ndarray, "N T"], batch_rows: int = 2) -> dict[str, np.ndarray]:
    """The taps of some rows, float32 `[S, N, T, D]`; each row is one document."""
    graph, parameters = nnx.split(decoder)

    @jax.jit
    def forward(parameters: Any, tokens: Array) -> dict[str, Array]:
        return nnx.merge(graph, parameters)(tokens, taps=TAPS, logits=False).taps

    batches = [forward(parameters, tokens[start : start + batch_rows]) for start in range(0, len(tokens), batch_rows)]
    return {tap: np.concatenate([np.asarray(batch[tap], np.float32) for batch in batches], 1) for tap in TAPS}


def attend(
    decoder: Decoder, resid: Float[Array, "S B T D"], segment_ids: Int[Array, "B T"]
) -> tuple[Float[Array, "L B T D"], Float[Array, "L B T D"]]:
    """Every block's attention on a given stream: its normed input and its output. resid's last slot is not used."""
    positions = jnp.broadcast_to(jnp.arange(resid.shape[2]), segment_ids.shape)
    context = decoder.context(positions, segment_ids)
    stacks, start = [], 0
    for group in decoder.groups:
        graph, parameters = nnx.split(group)
        size, stop = len(group.blocks), start + len(group.blocks) * group.repeats
        streams = resid[start:stop].reshape(group.repeats, size, *resid.shape[1:])

        def body(_: None, step: tuple[Any, Array], graph: Any = graph) -> tuple[None, tuple[Array, Array]]:
            return None, _attend_pattern(nnx.merge(graph, step[0]), step[1], context)

        _, outputs = jax.lax.scan(body, None, (parameters, streams))
        stacks.append([output.reshape(-1, *output.shape[2:]) for output in outputs])
        start = stop
    normed, out = (jnp.concatenate(parts) for parts in zip(*stacks, strict=True))
    return normed, out


def _attend_pattern(group: Any, streams: Float[Array, "k B T D"], context: BlockContext) -> tuple[Array, Array]:
    normed = [
        rms_norm(x, block.attention.norm[...], block.attention.config.norm_eps)
        for block, x in zip(group.blocks, streams, strict=True)
    ]
    out = [block.attention(x, context) for block, x in zip(group.blocks, streams, strict=True)]
    return jnp.stack(normed), jnp.stack(out)


def bits_per_number(codec: Codec, slots: int, hidden: int, only: Callable[[str], bool] = lambda _: True) -> float:
    """Stored bits over numbers of a tap with `slots` slots, of the parts whose names are requested."""
    parts = [part for part in codec.parts(hidden) if only(part.name)]
    return sum(8 * ITEM_BYTES[part.dtype] * part.width * part.slots(slots) for part in parts) / (slots * hidden)


def bound_distance(distance: float, bits: float) -> float:
    """Bits a number above the Gaussian bound 2^(-2b - 1). Distances below float32's own count as that."""
    return bits + (math.log2(max(distance, FLOAT32_DISTANCE)) + 1) / 2


def _round_trip(codec: Codec) -> Callable[[Float[Array, "S B T D"]], Float[Array, "S B T D"]]:
    return jax.jit(lambda x: codec.decode(codec.encode(x)).astype(jnp.float32))


class _Truth:
    """The teacher's taps `[S, N, T, D]`, and its attention's inputs, computed once for all choices."""

    def __init__(self, decoder: Decoder, taps: Mapping[str, np.ndarray]) -> None:
        graph, self._parameters = nnx.split(decoder)
        self._run = jax.jit(lambda parameters, resid, segments: attend(nnx.merge(graph, parameters), resid, segments))
        self.taps, self.rows = taps, taps["resid"].shape[1]
        self._normed = [np.asarray(self.attend(self.row(row)["resid"])[0]) for row in range(self.rows)]

    def row(self, row: int) -> dict[str, Array]:
        """Its taps, `[S, 1, T, D]`: a whole stack is decoded at a time, so rows are taken one by one."""
        return {tap: jnp.asarray(self.taps[tap][:, row : row + 1]) for tap in TAPS}

    def attend(self, resid: Float[Array, "S B T D"]) -> tuple[Array, Array]:
        return self._run(self._parameters, resid, jnp.ones(resid.shape[1:3], jnp.int32))

    def pairs(self, row: int, got: Mapping[str, Array]) -> dict[str, tuple[Array | np.ndarray, Array]]:
        """(decoded, true) by the name of the figure; got: a row's decoded taps."""
        true, (normed, attention) = self.row(row), self.attend(got["resid"])
        return {
            **{tap: (got[tap], true[tap]) for tap in TAPS},
            "mlp_out": (_mlp_out(got), _mlp_out(true)),
            "normed": (normed, jnp.asarray(self._normed[row])),
            "attention": (attention, true["attn_out"]),
        }


def measure_choice(truth: _Truth, choice: CodecChoice) -> dict[str, float]:
    """One choice's figures, as the module's docstring names them."""
    hidden = truth.taps["resid"].shape[-1]
    codecs = {tap: choice.make(tap, hidden) for tap in TAPS}
    codes = {tap: _round_trip(codec) for tap, codec in codecs.items()}
    sums: dict[str, float] = dict.fromkeys(("attn_out", "resid", "mlp_out", "normed", "attention"), 0.0)
    for row in range(truth.rows):
        got = {tap: codes[tap](true) for tap, true in truth.row(row).items()}
        for name, (x, y) in truth.pairs(row, got).items():
            sums[name] += float(cosine_distance(x, y)) / truth.rows
    return sums | _sizes(codecs, {tap: truth.taps[tap].shape[0] for tap in TAPS}, hidden, sums)


def _mlp_out(taps: Mapping[str, Array]) -> Float[Array, "L B T D"]:
    return taps["resid"][1:] - taps["resid"][:-1] - taps["attn_out"]


def _sizes(
    codecs: Mapping[str, Codec], slots: Mapping[str, int], hidden: int, distances: Mapping[str, float]
) -> dict[str, float]:
    figures: dict[str, float] = {}
    for tap, codec in codecs.items():
        bits = bits_per_number(codec, slots[tap], hidden)
        figures |= {f"{tap}_bits": bits, f"{tap}_size": bits / 16}
        figures[f"{tap}_bound_bits"] = bound_distance(distances[tap], bits)
    figures["key_size"] = bits_per_number(codecs["resid"], slots["resid"], hidden, lambda name: "key" in name) / 16
    return figures


def measure_speed(resid: Float[np.ndarray, "S B T D"], choice: CodecChoice) -> dict[str, float]:
    """Seconds to encode and to decode a million numbers in a scan over slots, as recorder and train step do it.

    The decoded numbers are summed inside the scan: a train step uses them there, and never has a stack of them.
    """
    x = jnp.asarray(resid[:SPEED_SLOTS])
    codec, millions = choice.make("resid", x.shape[-1]), x.size / 1e6
    shape, slots = x.shape[1:], jnp.arange(len(x))

    def encode(x: Array) -> dict[str, Array]:
        step = lambda carry, slot: codec.encode_slot(carry, x[slot], slot)  # noqa: E731
        return jax.lax.scan(step, codec.start(shape), slots)[1]

    def decode(stacks: dict[str, Array]) -> Array:
        def step(state: tuple[Any, Array], slot: Array) -> tuple[tuple[Any, Array], None]:
            carry, value = codec.decode_slot(state[0], {name: stack[slot] for name, stack in stacks.items()}, slot)
            return (carry, state[1] + value.astype(jnp.float32)), None

        return jax.lax.scan(step, (codec.start(shape), jnp.zeros(shape)), slots)[0][1]

    stacks = jax.jit(encode)(x)
    return {
        "encode_ms_per_million": 1e3 * _best_seconds(jax.jit(encode), x) / millions,
        "decode_ms_per_million": 1e3 * _best_seconds(jax.jit(decode), stacks) / millions,
    }


def _best_seconds(function: Callable[[Any], Any], argument: Any) -> float:
    jax.block_until_ready(function(argument))
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(function(argument))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure_codecs(
    decoder: Decoder, taps: Mapping[str, Float[np.ndarray, "S N T D"]], choices: tuple[CodecChoice, ...] = CHOICES
) -> dict[str, float]:
    """All figures, named `<choice>.<figure>`; the goals among them are `GOALS`.

    Args:
        taps: of the decoder, as `collect_taps` gives them.
    """
    truth = _Truth(decoder, taps)
    figures: dict[str, float] = {}
    for number, choice in enumerate(choices, start=1):
        start = time.perf_counter()
        measured = measure_choice(truth, choice) | measure_speed(taps["resid"], choice)
        figures |= {f"{choice.label}.{name}": value for name, value in measured.items()}
        took = time.perf_counter() - start
        print(f"bench: codec {number} of {len(choices)}, {choice.label}, {took:.0f} s", file=sys.stderr)
    return figures


def check_goals(figures: Mapping[str, float]) -> list[dict[str, Any]]:
    """One entry for every goal whose figure was measured; all of them are upper limits."""
    return [
        {"name": name, "value": figures[name], "goal": goal, "met": figures[name] <= goal}
        for name, goal in GOALS
        if name in figures
    ]
