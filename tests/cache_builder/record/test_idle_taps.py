"""Options of a codec that a tap's codec does not have are refused, before anything is written."""

from pathlib import Path
from typing import Any

import pytest

from distillcache.cache_builder.build import build_cache
from distillcache.cache_builder.record.plan import refuse_idle_taps
from distillcache.schemas.config import TapsConfig
from distillcache.schemas.errors import ConfigError
from tests.conftest import build_config

IDLE = {
    "group": {"group": 16},
    "rotate": {"codec": "fp8", "rotate": False},
    "keyframe_every": {"codec": "int8", "keyframe_every": 4},
}


@pytest.mark.parametrize("option", IDLE)
@pytest.mark.parametrize("tap", ["attn_out", "resid", "mlp_out"])
def test_an_option_without_its_codec(option: str, tap: str) -> None:
    with pytest.raises(ConfigError, match=rf"taps\.{tap}\.{option} would do nothing"):
        refuse_idle_taps(TapsConfig.model_validate({tap: IDLE[option]}))


@pytest.mark.parametrize(
    "tap",
    [
        {},
        {"group": None, "rotate": True, "keyframe_every": 8},
        {"codec": "int4", "group": 0, "rotate": False},
        {"codec": "int8", "delta": True, "keyframe_every": 0},
    ],
    ids=str,
)
def test_what_is_used_or_the_default_is_not(tap: dict[str, Any]) -> None:
    refuse_idle_taps(TapsConfig.model_validate({"resid": tap}))


def test_nothing_is_written(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    taps = TapsConfig.model_validate({"attn_out": IDLE["rotate"]})
    with pytest.raises(ConfigError, match="would do nothing"):
        build_cache(build_config(tmp_path / "cache", teacher, corpus, taps=taps))
    assert not (tmp_path / "cache").exists()
