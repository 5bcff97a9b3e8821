"""Codecs of activations as pure JAX functions; they run inside the teacher's and the student's compiled steps.

parts.py     the codec interface, and the stored parts that it is made of
cast.py      floating point: bf16, f32, and fp8 with a scale for each token
quantise.py  int8 and int4 with a scale and a shape for each group
rotate.py    random rotation that spreads outliers over a group
scales.py    storage of scales: bfloat16, or one byte with a shared exponent
delta.py     differences between consecutive slots, with keyframes
topk.py      the largest logits of a token and the logsumexp of all

A codec turns numbers `[..., D]` into *parts*: arrays of codes (and, for some, scales) that are stored one zarr array
each. Every part keeps the leading axes, so a row, a block or a token can be read alone.

    codec = get_codec("int8", signs=make_signs("any text", 576))
    parts = codec.encode(x)          # {"codes": int8 [..., 576], "scale": uint8 [..., 19]}
    x = codec.decode(parts)          # float32 [..., 576]

    bf16, f32    cast.py      the floats themselves
    fp8          cast.py      eight-bit floats, one scale a token
    int8, int4   quantise.py  integers, one scale a group; rotated first (rotate.py) where signs are given
    delta=True   delta.py     int8 or int4 of the difference from the slot before
    get_topk_codec  topk.py   a token's largest logits: bf16 or f32 values, ids, logsumexp

In a scan over slots every codec is used alike: `start`, then `encode_slot` or `decode_slot` (parts.Codec).
"""

import numpy as np

from distillcache.schemas.codecs.cast import CastCodec, Fp8Codec
from distillcache.schemas.codecs.delta import DeltaCodec
from distillcache.schemas.codecs.parts import Carry, Codec, CodePart, take_slot
from distillcache.schemas.codecs.quantise import Int4Codec, Int8Codec, default_group
from distillcache.schemas.codecs.rotate import Rotation, make_signs
from distillcache.schemas.codecs.topk import TopK, TopKCodec
from distillcache.schemas.errors import ConfigError

__all__ = [
    "CODECS",
    "Carry",
    "CodePart",
    "Codec",
    "TopK",
    "TopKCodec",
    "default_group",
    "get_codec",
    "get_topk_codec",
    "make_signs",
    "take_slot",
]

_CASTS = {
    "bf16": CastCodec("bf16", "bfloat16", "uint16"),
    "f32": CastCodec("f32", "float32", "float32"),
}
_FLOATS: dict[str, Codec] = {**_CASTS, "fp8": Fp8Codec()}
_INTEGERS = {"int8": Int8Codec, "int4": Int4Codec}
CODECS = (*_FLOATS, *_INTEGERS)


def get_codec(
    name: str,
    *,
    group: int | None = None,
    signs: np.ndarray | None = None,
    delta: bool = False,
    keyframe_every: int = 8,
) -> Codec:
    """The codec of this name.

    Args:
        group: numbers that share a scale (integer codecs); 0: the whole token; None: `default_group`.
        signs: int8 [D], +1 and -1: rotate with them (integer codecs); None: no rotation.
        delta: code each slot as its difference from the one before (integer codecs).
        keyframe_every: with delta, slots from one keyframe to the next; 0: none.

    Raises:
        ConfigError: there is no such codec, or it has no such option.
    """
    if name not in CODECS:
        raise ConfigError("there is no such codec", {"found": name, "expected": ", ".join(CODECS)})
    if name in _FLOATS:
        if delta or group is not None or signs is not None:
            raise ConfigError(
                "groups, rotation and delta are for integer codecs",
                {"codec": name},
                f"leave them out, or choose {' or '.join(_INTEGERS)}",
            )
        return _FLOATS[name]
    if keyframe_every < 0:
        raise ConfigError("keyframe_every cannot be negative", {"found": keyframe_every}, "use 0 for no keyframes")
    kind = _INTEGERS[name]
    codec = kind(group, Rotation(signs))
    return DeltaCodec(codec, keyframe_every) if delta else codec


def get_topk_codec(k: int, dtype: str) -> TopKCodec:
    """The codec of a token's `k` largest logits.

    Args:
        dtype: of the values, bf16 or f32.

    Raises:
        ConfigError: logits cannot be stored in this dtype.
    """
    if dtype not in _CASTS:
        raise ConfigError("logits cannot be stored in this dtype", {"found": dtype, "expected": " or ".join(_CASTS)})
    return TopKCodec(k, _CASTS[dtype])
