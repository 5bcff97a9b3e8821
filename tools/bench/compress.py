"""Gain and cost of lossless compression, on a teacher's own activations.

A cache of one shard is written in each codec (`resid` in int8 and int4 as differences) and each compression, and read
whole, a batch of all rows at a time. Figures are named `compress.<codec>.<tap>.<compression>.<figure>`:

    size              stored bytes over the codes' own bytes, scales and the objects' indexes included
    encode_mb_per_s   codes to objects in memory, as the build's writing thread does it (`encode_object`)
    read_mb_per_s     files, in the page cache, to a batch with its digests checked, as the feed does it

Rates count the codes' own bytes, so that they compare across compressions: the best of some rounds, by turns. Without
compression a local file is read straight into the batch; compressed ones are read through TensorStore.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from distillcache.cache_builder.record.objects import encode_object
from distillcache.schemas.config import TapConfig
from distillcache.schemas.format.layout import Compression
from distillcache.schemas.format.manifest import Plan
from distillcache.schemas.format.tap_codec import signs_of, tap_codec
from distillcache.tools.bench.synthetic_cache import synthetic_plan, write_cache
from distillcache.trainer.feed.cache_source import CacheSource

COMPRESSIONS: tuple[Compression, ...] = get_args(Compression)
CODECS = ("bf16", "int8", "int4")
ROWS = 4  # of 512 tokens: 73 MB of bf16 a tap
ROUNDS = 3

Codes = dict[str, np.ndarray]  # array name -> [N, S, T, W]


def measure_compression(
    taps: Mapping[str, Float[np.ndarray, "S N T D"]], folder: Path, codecs: tuple[str, ...] = CODECS
) -> dict[str, float]:
    """All figures.

    Args:
        taps: `resid` with one slot more than `attn_out`.
        folder: where the caches are written; the caller removes them.
    """
    figures: dict[str, float] = {}
    for codec in codecs:
        plans = {each: make_plan(taps, codec, each) for each in COMPRESSIONS}
        codes = encode_taps(taps, plans["none"])
        for compress, plan in plans.items():
            write_cache(folder / f"{codec}-{compress}", plan, lambda shard, codes=codes: codes)
        for _, (compress, tap) in product(range(ROUNDS), product(COMPRESSIONS, taps)):
            found = _measure_once(folder / f"{codec}-{compress}", plans[compress], codes, tap)
            for name, value in found.items():
                key = f"compress.{codec}.{tap}.{compress}.{name}"
                figures[key] = max(value, figures.get(key, 0.0))
        print(f"bench: compression of {codec}", file=sys.stderr)
    return figures


def make_plan(taps: Mapping[str, np.ndarray], codec: str, compress: Compression) -> Plan:
    """Plan a cache of these taps with all rows in one shard."""
    slots, rows, tokens, hidden = taps["attn_out"].shape
    chosen = {
        tap: TapConfig.model_validate(
            {"codec": codec, "delta": tap == "resid" and codec.startswith("int"), "compress": compress}
        )
        for tap in taps
    }
    return synthetic_plan(rows, (slots, tokens, hidden), chosen, shard_rows=rows)


def encode_taps(taps: Mapping[str, np.ndarray], plan: Plan) -> Codes:
    """The codes that a build of this plan would store."""
    codes, signs = {}, signs_of(plan)
    for tap in plan.taps:
        parts = jax.jit(tap_codec(tap, signs).encode)(jnp.asarray(taps[tap.name]))
        codes |= {part.array: np.moveaxis(np.asarray(parts[part.part]), 0, 1) for part in tap.parts}
    return codes


def encode_tap(plan: Plan, codes: Codes, name: str) -> Iterator[bytes]:
    """The objects of one tap of the only shard."""
    for tap in plan.taps:
        for part in tap.parts if tap.name == name else ():
            for start, stop in part.object_ranges():
                yield encode_object(plan, part, codes[part.array][:, start:stop])


def _measure_once(cache: Path, plan: Plan, codes: Codes, tap: str) -> dict[str, float]:
    start = time.perf_counter()
    stored = sum(map(len, encode_tap(plan, codes, tap)))
    encode_s = time.perf_counter() - start
    own = sum(codes[part.array].nbytes for each in plan.taps if each.name == tap for part in each.parts)
    source = CacheSource(str(cache), (tap,))
    source[range(len(source))]  # memory for a batch, and the index's record, are there from now on
    start = time.perf_counter()
    source[range(len(source))]
    read_s = time.perf_counter() - start
    return {"size": stored / own, "encode_mb_per_s": own / 1e6 / encode_s, "read_mb_per_s": own / 1e6 / read_s}
