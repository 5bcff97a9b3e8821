"""Both models' ends: the last streams, normed, and the heads, as the exact losses take them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Array

from distillcache.models.config import ModelConfig
from distillcache.models.decoder import Decoder, normed_head
from distillcache.models.head import LogitShape, OutputHead
from distillcache.models.layers.norm import rms_norm
from distillcache.trainer.head_losses import Divergence, HeadLosses, Side
from distillcache.trainer.step.parameters import TEACHER_HEAD, TEACHER_NORM
from distillcache.trainer.step.stack import TapDecoder
from distillcache.trainer.step.targets import TapReading, TeacherEnd


def teacher_end(head: OutputHead, place: int) -> TeacherEnd:
    """The static side of a teacher's end; place: of its last stream in a batch's stack of `resid`."""
    return TeacherEnd(place, head.norm_eps, head.logit_shape, "centred" if head.centred else "wide")


def teacher_arrays(head: OutputHead) -> dict[str, np.ndarray]:
    """The arrays of a teacher's end, by the names that a step's frozen parameters have for them."""
    return {TEACHER_NORM: head.norm, TEACHER_HEAD: head.weight}


def head_losses(
    divergence: Divergence, reading: TapReading, student: ModelConfig, real_vocab: int | None
) -> HeadLosses:
    """The exact losses of a student against the teacher of a reading that has its end.

    Args:
        real_vocab: see losses.without_padding.
    """
    end = _end(reading)
    return HeadLosses(divergence, LogitShape.of_model(student), end.shape, real_vocab)


def teacher_side(
    reading: TapReading, arrays: Mapping[str, Array], taps: Mapping[str, Any], rows: tuple[int, int]
) -> Side:
    """The teacher's last stream, decoded and normed in float32, and its head.

    Args:
        arrays: those of `teacher_arrays`, and others. taps: of the batch, encoded. rows: (B, T).
    """
    end = _end(reading)
    stream = TapDecoder(reading, taps, needs_mlp=False).slot(end.place, rows)
    normed = rms_norm(stream, arrays[TEACHER_NORM], end.norm_eps, product=end.norm_product)
    return Side(normed, arrays[TEACHER_HEAD])


def student_side(decoder: Decoder, stream: Array) -> Side:
    """The student's last stream, normed, and its head as it lies."""
    config = decoder.config
    normed = rms_norm(stream, decoder.final_norm[...], config.norm_eps, product=config.norm_product)
    if config.tie_embeddings:
        return Side(normed, normed_head(decoder.embed[...].T).T if config.norm_head else decoder.embed[...])
    return Side(normed, normed_head(decoder.head[...]) if config.norm_head else decoder.head[...])


def _end(reading: TapReading) -> TeacherEnd:
    if reading.end is None:
        raise ValueError("this reading has no teacher's end")
    return reading.end
