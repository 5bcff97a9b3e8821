"""Every number of every setting is one that programs can hold, or refused by the field's own name."""

import importlib
import math
import pkgutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

import distillcache.schemas.config as shelf
from distillcache.schemas.base import SMALLEST, Config
from distillcache.schemas.config.student import SurgeryOp
from distillcache.schemas.config.train import FeatureLossConfig, OptimizerConfig, Ramp
from distillcache.trainer.step.optimizer import learning_rate_schedule
from distillcache.trainer.step.schedules import weight_at

FLOATS = [0.0, -0.0, -1.0, 0.5, 1e-60, 1e-45, 1e-18, 1e11, 1e18, 1e40, 1e300, 0.99999999, math.nan, math.inf, -math.inf]
HOSTILE = [0, -1, 1, 2**31, 2**63, -(2**63), 10**11, 10**400, True, "1", "1e40", *FLOATS]
UNSIZED = {"seed", "eval_seed", "max_rows", "row", "rows"}  # counted in 64 bits

DECAYS = {"b1", "b2", "moe_update_momentum"}


def settings() -> list[type[Config]]:
    def below(model: type[Config]) -> Iterator[type[Config]]:
        for each in model.__subclasses__():
            yield each
            yield from below(each)

    for module in pkgutil.iter_modules(shelf.__path__):
        importlib.import_module(f"{shelf.__name__}.{module.name}")
    return sorted({each for each in below(Config) if each.__module__.startswith(shelf.__name__)}, key=str)


def accepted(model: type[Config], name: str, value: Any) -> list[Any]:
    """The numbers that a field makes of a value; none where it refuses it."""
    fresh = SurgeryOp.model_construct(op="upcycle", experts=4) if model is SurgeryOp else model.model_construct()
    try:
        model.__pydantic_validator__.validate_assignment(fresh, name, value)
    except ValidationError as error:
        if any(name in finding["loc"] for finding in error.errors()):
            return []
    found = getattr(fresh, name, None)
    found = found if isinstance(found, list) else [found]
    return [each for each in found if isinstance(each, int | float) and not isinstance(each, bool)]


@pytest.mark.parametrize("model", settings(), ids=lambda model: model.__name__)
def test_numbers_that_float32_or_the_widths_of_integers_cannot_hold_are_refused(model: type[Config]) -> None:
    for name in model.model_fields:
        for value in [*HOSTILE, *([each] for each in HOSTILE)]:
            for number in accepted(model, name, value):
                if isinstance(number, int):
                    assert -(2**31) <= number < (2**63 if name in UNSIZED else 2**31), (name, value)
                else:
                    held = float(np.float32(number))
                    assert math.isfinite(held), (name, value)
                    assert (held == 0) == (number == 0), (name, value)
                    assert held < 1 or name not in DECAYS, (name, value)


def test_a_product_of_two_of_the_smallest_or_largest_weights_is_in_float32() -> None:
    for weight in (SMALLEST, 1e12):
        loss = FeatureLossConfig(weight=weight, relative_l2=weight)
        assert isinstance(loss.weight, float)
        product = np.float32(loss.weight) * np.float32(loss.relative_l2)
        assert np.finfo(np.float32).tiny <= product < np.inf


@pytest.mark.parametrize("rate", [SMALLEST, 1e-3, 1e12])
@pytest.mark.parametrize("warmup", [0, 1, 2**31 - 1])
@pytest.mark.parametrize("steps", [1, 10, 2**31 - 1])
def test_schedules_of_the_extremes_are_numbers(rate: float, warmup: int, steps: int) -> None:
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=rate, warmup_steps=warmup), steps)
    assert np.isfinite(np.asarray([schedule(step) for step in (0, steps // 2, steps)])).all()
    ramp = Ramp(start=0, end=rate, schedule="cosine")
    assert np.isfinite(np.asarray([weight_at(ramp, step, steps) for step in (0, steps - 1)])).all()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"block_weights": [0, 0]}, "block_weights .* weighs no block"),
        ({"block_weights": []}, "block_weights .* weighs no block"),
        ({"blocks": []}, "blocks is empty"),
        ({"block_weights": [1, -1]}, "greater than or equal to 0"),
        ({"blocks": [-1]}, "greater than or equal to 0"),
    ],
    ids=str,
)
def test_a_loss_that_compares_no_block_is_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        FeatureLossConfig.model_validate(values)
