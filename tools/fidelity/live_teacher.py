"""The live teacher on some rows: the numbers that it would record, before any codec.

It runs the function that `build` runs (models/recorder.py) with taps in float32, one row a call: memory is one row's
taps, whatever is sampled.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from distillcache.models.checkpoint import load_pretrained, weights_digest
from distillcache.models.recorder import make_recorder
from distillcache.schemas.codecs import TopK
from distillcache.schemas.config import TapConfig, TapsConfig, TopKConfig
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import NonFiniteError
from distillcache.schemas.format.manifest import TOPK_LOGITS, TapPlan
from distillcache.schemas.format.rows import Row, teacher_batch
from distillcache.schemas.format.tap_plan import choose_taps
from distillcache.trainer.losses import LARGE, SHRINK

Taps = dict[str, Float[np.ndarray, "S T D"]]
F32 = TapConfig(codec="f32")
CHUNK = 8192  # rows of the embedding compared at a time
# The recorded text as the teacher might have been given it, had something gone wrong between rows and teacher.
VARIANTS = {
    "shifted +1": "the teacher's input was shifted by one token (later) against the rows",
    "shifted -1": "the teacher's input was shifted by one token (earlier) against the rows",
    "one document": "attention crossed document boundaries: the teacher ran without the rows' document boundaries",
}


class LiveTeacher:
    """A checkpoint, loaded."""

    def __init__(self, path: str, dtype: str, taps: Sequence[str], logits: TapPlan | None = None) -> None:
        """
        Args:
            dtype: what it computes in.
            taps: their names.
            logits: the plan of recorded `topk_logits`, of which as many are computed, of the same ids; None: none are.

        Raises:
            CheckpointError: there is no usable checkpoint.
        """
        self.path, self.digest = path, weights_digest(path)
        decoder = load_pretrained(path, dtype=dtype)
        config = decoder.config
        self.num_blocks, self.hidden, self.vocab = config.num_blocks, config.hidden_size, config.vocab_size
        # `resid` always: its slot 0 tells which tokens a teacher saw.
        wanted: dict[str, Any] = {"attn_out": None, **dict.fromkeys(["resid", *filter(comparable, taps)], F32)}
        if logits is not None:
            ids = min(logits.vocab_size or self.vocab, self.vocab)
            wanted[TOPK_LOGITS] = TopKConfig(k=min(logits.numbers_per_token(self.hidden), ids), dtype="f32")
        plans = choose_taps(
            TapsConfig(**wanted),
            tuple(range(self.num_blocks)),
            self.num_blocks,
            self.hidden,
            self.vocab,
            None if logits is None else logits.vocab_size,
        )
        self.names = tuple(plan.name for plan in plans if comparable(plan.name))
        self._record, self._parameters = make_recorder(decoder, plans, {})
        self._decoder = decoder
        self.platform = jax.devices()[0].platform

    def taps(self, row: Row) -> Taps:
        """Compute every tap of a row, all slots of all blocks."""
        return self.taps_and_logits(row)[0]

    def taps_and_logits(self, row: Row) -> tuple[Taps, TopK | None]:
        """`taps`, and its largest logits: values and ids `[T, k]`, logsumexp `[T]`; None where none are requested."""
        arrays = teacher_batch([row], 1, len(row.tokens))
        recording = self._record(self._parameters, *map(jnp.asarray, arrays))
        codes = recording.codes
        for name, sums in recording.sums.items():
            if count := int(np.sum(sums.nonfinite)):
                raise NonFiniteError(
                    "the teacher gives numbers that are not finite",
                    {
                        "teacher": self.path,
                        "tap": name,
                        "found": f"{count} of a row of {counted(len(row.tokens), 'token')}",
                    },
                    "check the teacher's weights: they cannot be cached",
                )
        taps = {name: np.asarray(codes[name]["codes"][0]) for name in self.names}
        if TOPK_LOGITS not in codes:
            return taps, None
        values, ids, logsumexp = (np.asarray(codes[TOPK_LOGITS][part][0, 0]) for part in ("codes", "ids", "logsumexp"))
        return taps, TopK(values, ids, logsumexp[..., 0])  # type: ignore[arg-type]

    def variant(self, row: Row, name: str) -> Taps:
        """Compute the taps of a row with one of the `VARIANTS` of its input."""
        if name == "one document":
            real = row.segment_ids > 0
            positions = np.where(real, np.arange(len(row.tokens)), 0).astype(np.int32)
            return self.taps(replace(row, segment_ids=real.astype(np.int32), positions=positions))
        return self.taps(replace(row, tokens=np.roll(row.tokens, 1 if name == "shifted +1" else -1)))

    def seen_tokens(self, stream: Float[np.ndarray, "t D"]) -> tuple[Int[np.ndarray, " t"], Float[np.ndarray, " t"]]:
        """For a few tokens of `resid` slot 0: the id whose embedding is nearest, and its relative distance."""
        best, distance = np.zeros(len(stream), np.int32), np.full(len(stream), np.inf, np.float32)
        embed: Any = self._decoder.embed[...]
        shrink = np.float32(1 if max(np.abs(stream).max(initial=0), np.abs(embed).max(initial=0)) < LARGE else SHRINK)
        wide, norms = jnp.asarray(stream, jnp.float32) * shrink, np.linalg.norm(stream * shrink, axis=-1)
        for start in range(0, embed.shape[0], CHUNK):
            ids, found = map(np.asarray, _nearest(wide, embed[start : start + CHUNK], shrink))
            better = found < distance
            best, distance = np.where(better, ids + start, best), np.where(better, found, distance)
        return best, distance / np.maximum(norms, 1e-30)


@jax.jit
def _nearest(stream: jax.Array, embed: jax.Array, shrink: jax.Array) -> tuple[jax.Array, jax.Array]:
    wide = embed.astype(jnp.float32) * shrink
    scores = jnp.sum(jnp.square(wide), -1) - 2 * stream @ wide.T
    at = jnp.argmin(scores, -1)
    return at, jnp.linalg.norm(stream - wide[at], axis=-1)


def comparable(name: str) -> bool:
    """Return whether a tap's numbers can be recomputed in float32 block by block."""
    return name != TOPK_LOGITS
