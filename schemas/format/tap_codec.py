"""From a plan's words about a tap to the codec that reads and writes it."""

from collections.abc import Mapping
from typing import cast

import numpy as np

from distillcache.schemas.codecs import Codec, get_codec, get_topk_codec, make_signs
from distillcache.schemas.format.manifest import Plan, TapPlan

Signs = Mapping[str, np.ndarray]  # `signs.<tap>` -> int8 [D], as the segment's side file holds them


def signs_of(plan: Plan) -> dict[str, np.ndarray]:
    """The sign vectors of the plan's rotated taps, for its side file. Readers take them from there."""
    hidden = plan.teacher.hidden_size
    return {f"signs.{tap.name}": make_signs(tap.name, hidden) for tap in plan.taps if tap.rotate}


def tap_codec(tap: TapPlan, signs: Signs) -> Codec:
    """The tap's codec.

    That of `topk_logits` is a `TopKCodec`: used like any other, but what it encodes and decodes is a `TopK`.
    """
    if tap.k is not None:
        return cast("Codec", get_topk_codec(tap.k, tap.codec))
    if not tap.rotate and not tap.delta and tap.group is None:
        return get_codec(tap.codec)
    return get_codec(
        tap.codec,
        group=tap.group,
        signs=signs[f"signs.{tap.name}"] if tap.rotate else None,
        delta=tap.delta,
        keyframe_every=tap.keyframe_every,
    )
