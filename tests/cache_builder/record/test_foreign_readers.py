"""A cache opened without us, as docs/cache.md shows: its own lines are run."""

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from distillcache.models.checkpoint import load_pretrained
from distillcache.schemas.cache.segment import open_cache
from distillcache.schemas.store.store import Store

DOCS = Path(__file__).parents[3] / "docs" / "cache.md"


@pytest.mark.parametrize("library", ["tensorstore", "zarr"])
def test_the_lines_of_the_docs_read_what_the_teacher_did(cache: Path, teacher: Path, library: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    lines = next(block for block in blocks if f"import {library}" in block)
    names: dict[str, object] = {}
    exec(lines.replace("caches/mine", str(cache)).replace("[17, 3]", "[17, 2]"), names)
    found = np.asarray(names["row"])
    assert found.dtype == ml_dtypes.bfloat16
    row = open_cache(Store(str(cache)))[0].row(17)
    fields = (getattr(row, name)[None] for name in ("tokens", "positions", "segment_ids"))
    expected = load_pretrained(teacher)(*fields, taps=("attn_out",)).taps["attn_out"][2, 0]
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=2**-7, atol=1e-5)  # bfloat16 keeps 8 bits
