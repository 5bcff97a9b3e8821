"""A model's end: from the stream that leaves the last block to logits.

    logits = softcap(rms_norm(stream, norm) @ weight.T / divisor)

A teacher's, with the last slot of `resid`, gives its logits again. It is read from its checkpoint, or from a cache
whose build kept it (`taps.resid.head`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Float

from distillcache.models.config import ModelConfig
from distillcache.models.decoder import Decoder, normed_head
from distillcache.schemas.cache.segment import Segment
from distillcache.schemas.errors import MEND_NEXT, DamageError
from distillcache.schemas.format import layout

BFLOAT16_BITS = "weight.bits_of_bfloat16"  # safetensors' own NumPy reader has no such type


@dataclass(frozen=True)
class LogitShape:
    """The computation from a normed stream and a head to logits: `softcap(stream @ head / divisor)`.

    tied: the head is a table of embeddings, `[V, D]`: used as it lies, since a transposed copy would cost its memory.
    """

    divisor: float = 1.0
    softcap: float | None = None
    tied: bool = False

    @property
    def vocabulary_axis(self) -> int:
        """The head's axis of V."""
        return 0 if self.tied else 1

    @classmethod
    def of_model(cls, config: ModelConfig) -> "LogitShape":
        """The shape of a decoder's own head."""
        return cls(config.logits_divisor, config.logits_softcap, config.tie_embeddings)


@dataclass(frozen=True, eq=False)
class OutputHead:
    """The arrays and numbers of a model's end.

    norm: the last norm's factors, float32, also for a family that stores them minus one. weight: of the head, in the
    model's dtype, normed where the family norms it. centred: the norm takes the mean away first.
    """

    norm: Float[np.ndarray, " D"]
    weight: Float[np.ndarray, "V D"]
    norm_eps: float
    divisor: float = 1.0
    softcap: float | None = None
    centred: bool = False

    @property
    def logit_shape(self) -> LogitShape:
        """The computation of the logits."""
        return LogitShape(self.divisor, self.softcap, tied=True)

    def to_bytes(self) -> bytes:
        """The head as a safetensors file."""
        numbers = np.asarray([self.norm_eps, self.divisor, self.softcap or 0.0, *[1.0] * self.centred], np.float64)
        is_bfloat16 = self.weight.dtype == ml_dtypes.bfloat16
        named = {BFLOAT16_BITS: self.weight.view(np.uint16)} if is_bfloat16 else {"weight": self.weight}
        arrays = {"norm": self.norm, "numbers": numbers, **named}
        return safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})

    @classmethod
    def from_bytes(cls, data: bytes, where: str, hidden: int, vocab: int) -> "OutputHead":
        """The reverse.

        Args:
            hidden, vocab: D and V of the teacher that the cache's plan describes.

        Raises:
            DamageError: the bytes are something else.
        """
        try:
            arrays = safetensors.numpy.load(data)
            named = arrays.get("weight")
            weight = arrays[BFLOAT16_BITS].view(ml_dtypes.bfloat16) if named is None else named
            eps, divisor, softcap, *more = arrays["numbers"].tolist()
            found = cls(arrays["norm"], weight, eps, divisor, softcap or None, bool(more))
        except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
            raise DamageError(
                "a file of the cache cannot be read", {"file": where, "cause": error}, MEND_NEXT
            ) from error
        if (found.norm.shape, found.weight.shape) != ((hidden,), (vocab, hidden)):
            raise DamageError(
                "a file of the cache contradicts itself or another one",
                {
                    "file": where,
                    "found": f"a norm {list(found.norm.shape)} and a head {list(found.weight.shape)}",
                    "expected": f"[{hidden}] and [{vocab}, {hidden}], as the plan says",
                },
                MEND_NEXT,
            )
        return found


def head_of(config: ModelConfig, parameters: Mapping[str, Any]) -> OutputHead:
    """The end of a model.

    Args:
        parameters: `final_norm`, and `embed` where the head is tied to it, else `head` `[D, V]`.
    """
    offset = np.float32(1.0 if config.norm_product == "offset" else 0.0)
    head = parameters["embed"].T if config.tie_embeddings else parameters["head"]
    weight = np.ascontiguousarray(np.asarray(normed_head(head) if config.norm_head else head).T)
    norm = np.asarray(parameters["final_norm"], np.float32) + offset
    centred = config.norm_product == "centred"
    return OutputHead(norm, weight, config.norm_eps, config.logits_divisor, config.logits_softcap, centred)


def head_of_decoder(decoder: Decoder) -> OutputHead:
    """The end of a decoder whose parameters lie on this process's devices."""
    names = ("final_norm", "embed" if decoder.config.tie_embeddings else "head")
    return head_of(decoder.config, {name: getattr(decoder, name)[...] for name in names})


def read_head(segment: Segment) -> OutputHead:
    """The teacher's end, from a segment whose plan keeps it.

    Raises:
        DamageError: the file is missing, or is not what was committed.
    """
    teacher, where = segment.plan.teacher, segment.store.where(layout.head_key(segment.plan.segment))
    data = segment.small_file(layout.HEAD_FILE)
    return OutputHead.from_bytes(data, where, teacher.hidden_size, teacher.vocab_size)
