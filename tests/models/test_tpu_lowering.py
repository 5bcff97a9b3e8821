"""Lowering for TPUs, on a machine without one: what a TPU cannot be asked to do is an error here already.

`jax.export` lowers for a named platform, Pallas kernels included; it compiles nothing.
"""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from distillcache.models.config import BlockKind, DeltaConfig, ModelConfig, MoeConfig, plan_layers
from distillcache.models.decoder import Decoder, with_attention
from distillcache.models.recorder import make_recorder
from distillcache.schemas.codecs import make_signs
from distillcache.schemas.config import TapConfig
from distillcache.schemas.format.tap_plan import tap_plan

WIDTH, ROW_TOKENS = 256, 300  # a row that is no multiple of a TPU's lanes
PLAIN = ModelConfig(97, WIDTH, 384, 4, 2, 128, plan_layers([BlockKind(), BlockKind(window=64)] * 2))
EXPERTS = replace(
    PLAIN,
    layers=plan_layers([BlockKind(moe=True)] * 2),
    moe=MoeConfig(num_experts=8, top_k=2, expert_size=128),
    experts="ragged",
)
HYBRID = replace(
    PLAIN,
    layers=plan_layers([BlockKind(mixer="gated_delta"), BlockKind()] * 2),
    delta=DeltaConfig(key_heads=2, value_heads=4, key_dim=64, value_dim=64, taps=4),
    output_gate=True,
)
KERNEL = "tpu_custom_call"  # a Pallas kernel in a lowered program


@pytest.fixture(autouse=True)
def on_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels ask for the platform to know whether Pallas has to interpret them."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")


def lowered(function: jax.stages.Wrapped, *args: object) -> str:
    return jax.export.export(function, platforms=["tpu"])(*args).mlir_module()


def recorded(config: ModelConfig, codec: str, slots: Sequence[int]) -> str:
    """The lowered recorder of all taps, with splash attention."""
    decoder = with_attention(Decoder(config), "splash")
    values = {"codec": codec, "rotate": codec == "int4"}
    delta = codec in ("int8", "int4")
    taps = [
        tap_plan("attn_out", TapConfig.model_validate(values), slots[:-1], WIDTH),
        tap_plan("resid", TapConfig.model_validate({**values, "delta": delta}), slots, WIDTH),
    ]
    signs = {f"signs.{name}": make_signs(name, WIDTH) for name in ("attn_out", "resid")}
    record, parameters = make_recorder(decoder, taps, signs)
    rows = jnp.zeros((2, ROW_TOKENS), jnp.int32)
    return lowered(record, parameters, rows, rows, rows + 1)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_recurrent_teacher_beside_attention():
    """Its states walk from chunk to chunk within the scan over blocks; attention keeps its kernel."""
    found = recorded(HYBRID, "bf16", range(5))
    assert KERNEL in found
    assert found.count("stablehlo.while") >= 2  # blocks, and chunks within them
    assert "triangular_solve" not in found


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4", "fp8"])
def test_a_teacher_with_its_taps(codec: str):
    found = recorded(PLAIN, codec, range(5))
    assert KERNEL in found
    assert "stablehlo.while" in found  # blocks are scanned: the program does not grow with them


@pytest.mark.parametrize("head_dim", [64, 80])  # narrower than the lanes, and no divisor of them
def test_a_teacher_with_other_heads(head_dim: int):
    assert KERNEL in recorded(replace(PLAIN, head_dim=head_dim), "bf16", range(5))


def test_a_teacher_with_experts():
    found = recorded(EXPERTS, "int8", range(3))
    assert KERNEL in found
    assert "ragged_dot" in found
