"""The recorder's program: one for all decoders of a shape in a process, whatever their weights are."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distillcache.models.config import BlockKind, LayerGroup, ModelConfig
from distillcache.models.decoder import Decoder
from distillcache.models.recorder import RecordFunction, make_recorder
from distillcache.schemas.codecs import make_signs
from distillcache.schemas.config import TapConfig
from distillcache.schemas.format.manifest import TapPlan
from distillcache.schemas.format.tap_plan import tap_plan

CONFIG = ModelConfig(
    vocab_size=31,
    hidden_size=8,
    intermediate_size=8,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    layers=(LayerGroup((BlockKind(),), 2),),
)


def decoder(seed: int = 0, config: ModelConfig = CONFIG) -> Decoder:
    return Decoder(config, rngs=nnx.Rngs(seed))


def resid(slots: tuple[int, ...] = (0, 1, 2), **values: object) -> list[TapPlan]:
    return [tap_plan("resid", TapConfig.model_validate(values), slots, 8)]


def test_a_second_teacher_of_a_shape_is_not_compiled_anew() -> None:
    shape = jnp.zeros((1, 4), jnp.int32)
    first, parameters = make_recorder(decoder(0), resid(), {})
    second, others = make_recorder(decoder(1), resid(), {})
    recorded = [record(values, shape, shape, shape + 1) for record, values in ((first, parameters), (second, others))]
    assert second is first
    assert first._cache_size() == 1  # type: ignore[attr-defined]
    assert not np.array_equal(*(found.codes["resid"]["codes"] for found in recorded))  # each its own weights


ROTATED = {"codec": "int4", "group": 4, "rotate": True}
SIGNS = {"signs.resid": make_signs("resid", 8)}


def record_of(change: str) -> RecordFunction:
    mesh = jax.make_mesh((1, 1, 1, 1), ("data", "fsdp", "tensor", "expert")) if change == "mesh" else None
    config = replace(CONFIG, norm_eps=0.5) if change == "config" else CONFIG
    taps = resid((0,) if change == "slots" else (0, 1, 2), **ROTATED)
    signs = {name: -value for name, value in SIGNS.items()} if change == "signs" else SIGNS
    return make_recorder(decoder(config=config), taps, signs, mesh)[0]


@pytest.mark.parametrize("change", ["config", "slots", "signs", "mesh"])
def test_whatever_is_in_the_program_makes_it_another(change: str) -> None:
    assert record_of("nothing") is record_of("nothing")
    assert record_of(change) is not record_of("nothing")
