"""The compression bench on small numbers: figures of every kind, and sizes against objects measured another way."""

from pathlib import Path

import numpy as np
import pytest

from distillcache.schemas.cache.segment import open_cache
from distillcache.schemas.store.store import Store
from distillcache.tools.bench.compress import COMPRESSIONS, measure_compression


def test_figures(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    taps = {
        name: rng.standard_normal((slots, 2, 64, 64), np.float32).astype("float32")
        for name, slots in (("resid", 3), ("attn_out", 2))
    }
    figures = measure_compression(taps, tmp_path, ("bf16", "int8"))
    kinds = ("size", "encode_mb_per_s", "read_mb_per_s")
    assert figures.keys() == {
        f"compress.{codec}.{tap}.{compress}.{kind}"
        for codec in ("bf16", "int8")
        for tap in taps
        for compress in COMPRESSIONS
        for kind in kinds
    }
    assert all(value > 0 for value in figures.values())
    own = 2 * 3 * 64 * 64 * 2
    for compress in COMPRESSIONS:
        folder = tmp_path / f"bf16-{compress}"
        plan = open_cache(Store(str(folder)))[0].plan
        assert {tap.name: tap.compress for tap in plan.taps}["resid"] == compress
        (file,) = (path for path in folder.glob("segments/0000/taps/resid/c/**/0") if path.is_file())
        assert figures[f"compress.bf16.resid.{compress}.size"] == pytest.approx(file.stat().st_size / own)
    assert figures["compress.bf16.resid.zstd.size"] < 0.9 < figures["compress.bf16.resid.none.size"]
