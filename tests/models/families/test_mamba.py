"""Lists of blocks in configs of families with Mamba-2."""

import json
from pathlib import Path
from typing import Any

import pytest

from distillcache.models.config import ModelConfig
from distillcache.models.families import config_from_hf
from distillcache.schemas.errors import CheckpointError
from tests.models.conftest import GOLDEN


def read(name: str, **changes: Any) -> ModelConfig:
    return config_from_hf(json.loads((GOLDEN / name / "config.json").read_text()) | changes, Path("config.json"))


def test_bamba_may_name_a_block_twice():
    """Counted twice, it would leave none for Mamba-2."""
    assert read("bamba", attn_layer_indices=[1, 1]) == read("bamba")


@pytest.mark.parametrize("names", [[["mamba"]], [{}], [None]], ids=str)
def test_layers_of_nemotron_are_names(names: list[Any]):
    with pytest.raises(CheckpointError, match="layers_block_type"):
        read("nemotron_h", layers_block_type=names)
