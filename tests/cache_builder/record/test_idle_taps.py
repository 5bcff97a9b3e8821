"""Options of a codec that a tap's codec does not have are named."""

from pathlib import Path
from typing import Any

import pytest

from distillcache.cache_builder.build import build_cache
from distillcache.cache_builder.record.plan import idle_options
from distillcache.schemas.config import TapsConfig
from tests.conftest import build_config

IDLE = {
    "group": {"group": 16},
    "rotate": {"codec": "fp8", "rotate": False},
    "keyframe_every": {"codec": "int8", "keyframe_every": 4},
}


@pytest.mark.parametrize("option", IDLE)
@pytest.mark.parametrize("tap", ["attn_out", "resid", "mlp_out"])
def test_an_option_without_its_codec(option: str, tap: str) -> None:
    (note,) = idle_options(TapsConfig.model_validate({tap: IDLE[option]}))
    assert note.startswith(f"taps.{tap}.{option} does nothing in this build: it needs ")


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
    assert idle_options(TapsConfig.model_validate({"resid": tap})) == []


def test_a_build_says_it_and_goes_on(
    tmp_path: Path, teacher: Path, corpus: Path, console: pytest.CaptureFixture[str]
) -> None:
    taps = TapsConfig.model_validate({"attn_out": IDLE["rotate"]})
    build_cache(build_config(tmp_path / "cache", teacher, corpus, taps=taps))
    assert "taps.attn_out.rotate does nothing in this build" in console.readouterr().err
