"""The message over a cache that another config began: fields with two values, causes before what follows from them."""

from pathlib import Path

import pytest

from distillcache.cache_builder.build import build_cache
from distillcache.schemas.errors import PlanMismatchError
from tests.conftest import build_config


def test_other_rows_are_told_field_by_field(cache: Path, teacher: Path, corpus: Path) -> None:
    config = build_config(cache, teacher, corpus)
    longer = config.model_copy(update={"data": config.data.model_copy(update={"row_tokens": 8})})
    with pytest.raises(PlanMismatchError) as caught:
        build_cache(longer)
    assert caught.value.facts == {"cache": str(cache), "data.row_tokens": "there 16, here 8"}


def test_another_codec_is_told_by_its_field(cache: Path, teacher: Path, corpus: Path) -> None:
    with pytest.raises(PlanMismatchError) as caught:
        build_cache(build_config(cache, teacher, corpus, taps={"attn_out": {"codec": "int8"}}))
    assert caught.value.facts == {"cache": str(cache), "taps.attn_out.codec": 'there "bf16", here "int8"'}
