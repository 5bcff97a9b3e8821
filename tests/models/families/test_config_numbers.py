"""Every number of a config.json is one that float32 computes with, or refused by its key."""

import copy
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distillcache.models.config import ModelConfig
from distillcache.models.families import config_from_hf
from distillcache.models.layers.rope import context_length
from distillcache.schemas.errors import CheckpointError
from tests.models.conftest import GOLDEN

HOSTILE = [0, -1, math.nan, math.inf, 1e300, 1e-300, 1e40, 1e-50, 0.5, "3", None, True, [1], {}, 2**40, 10**400]
CONFIGS = sorted(GOLDEN.glob("*/config.json"))


def places(values: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The keys that lead to each number."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from ((key, *inner) for inner in places(value))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield (key,)


def numbers(config: Any) -> Iterator[float]:
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if dataclasses.is_dataclass(value):
            yield from numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield value


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.parent.name)
def test_numbers_that_float32_cannot_hold_are_refused(file: Path) -> None:
    stated = json.loads(file.read_text())
    for place in [*places(stated), ("rope_theta",)]:
        for value in HOSTILE:
            changed = copy.deepcopy(stated)
            inner = changed
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            try:
                config = config_from_hf(changed, file)
            except CheckpointError:
                continue
            assert isinstance(config, ModelConfig)
            assert context_length(config) > 0
            for number in numbers(config):
                held = float(np.float32(number))
                assert math.isfinite(held), (place, value)
                assert (held == 0) == (number == 0), (place, value)
