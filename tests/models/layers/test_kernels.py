"""Splash attention, interpreted, against XLA's; which kernel is chosen where; what cuDNN computes on a GPU."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from distillcache.models.config import BlockKind, ModelConfig, plan_layers
from distillcache.models.decoder import Decoder, with_attention
from distillcache.models.layers.context import BlockContext
from distillcache.models.layers.kernels import attend, chosen_kernel, runs_of_tokens
from distillcache.schemas.errors import ConfigError

PLAIN = ModelConfig(97, 32, 40, 4, 2, 8, plan_layers([BlockKind()] * 2))
# Two orders of summation in float32, in softmax and products; the worst found was 1.1e-6 of the largest value.
TOLERANCE = 1e-5


def context_of(segments: list[list[int]]) -> BlockContext:
    """Documents of these lengths in each row; a length of 0 ends them, and padding follows up to the longest row."""
    width = max(sum(row) for row in segments)
    ids, positions = np.zeros((2, len(segments), width), np.int32)
    for row, lengths in enumerate(segments):
        start = 0
        for number, length in enumerate(lengths, 1):
            ids[row, start : start + length], positions[row, start : start + length] = number, np.arange(length)
            start += length
    none: Any = None
    return BlockContext(none, none, jnp.asarray(ids), jnp.asarray(positions))


def drawn(config: ModelConfig, context: BlockContext, width: int = 8) -> list[jax.Array]:
    rng = np.random.default_rng(1)
    shape, heads = context.segment_ids.shape, (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    widths = (config.head_dim, config.head_dim, width)
    return [
        jnp.asarray(rng.normal(size=(*shape, number, wide)), jnp.float32)
        for number, wide in zip(heads, widths, strict=True)
    ]


def outputs_and_gradients(config: ModelConfig, kind: BlockKind, context: BlockContext, sinks: Any, width: int) -> Any:
    """Of the real tokens; the gradients by queries, keys and values, and by sinks."""
    real = (context.segment_ids > 0)[..., None, None]

    def loss(parts: list[jax.Array], sinks: Any) -> tuple[jax.Array, jax.Array]:
        out = jnp.where(real, attend(*parts, context, kind, config, sinks), 0)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    return jax.jit(jax.grad(loss, argnums=(0, 1) if sinks is not None else 0, has_aux=True))(
        drawn(config, context, width), sinks
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes", "sinks", "width"),
    [
        (BlockKind(), {}, False, 8),
        (BlockKind(window=70), {"attention_softcap": 2.0}, False, 8),
        (BlockKind(chunk=50), {"attention_scale": 0.5}, False, 8),
        (BlockKind(), {"num_kv_heads": 4}, False, 6),
        (BlockKind(window=3), {}, True, 8),
    ],
)
def test_splash_attention_is_xlas(kind: BlockKind, changes: dict[str, Any], sinks: bool, width: int):
    """Packed rows with padding, of a length that is no multiple of anything."""
    config = replace(PLAIN, **changes)
    context = context_of([[100, 30, 71], [33, 90]])
    given = jnp.asarray([0.5, -1.0, 2.0, 0.0]) if sinks else None
    expected = outputs_and_gradients(config, kind, context, given, width)
    found = outputs_and_gradients(replace(config, attention="splash"), kind, context, given, width)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = np.abs(other).max()
        assert scale > 0
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE * scale)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 1), (2, 1, 2), (1, 2, 2)])
def test_splash_attention_on_a_mesh(sizes: tuple[int, ...]):
    """Each device its own rows and heads, by the mesh around the computation."""
    context = context_of([[100, 28], [128], [60], [1, 2, 3]])
    config = replace(PLAIN, attention="splash")
    parts = drawn(config, context)
    expected = attend(*parts, context, BlockKind(), PLAIN)
    mesh = Mesh(
        np.asarray(jax.devices()[:4]).reshape(sizes), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
    )

    def on_mesh(parts: list[jax.Array]) -> jax.Array:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return attend(*parts, context, BlockKind(), config)

    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
    found = jax.jit(on_mesh)(jax.device_put(parts, rows))
    real = np.asarray(context.segment_ids > 0)
    np.testing.assert_allclose(np.asarray(found)[real], np.asarray(expected)[real], rtol=0, atol=1e-5)


def test_runs_end_with_documents_and_with_chunks_of_them():
    context = context_of([[5, 3], [2]])
    found = np.asarray(runs_of_tokens(context, BlockKind(chunk=2)))
    np.testing.assert_array_equal(found[0], [0, 0, 1, 1, 2, 3, 3, 4])
    np.testing.assert_array_equal(found[1, :3], [0, 0, 1])  # a document of two, then padding
    assert runs_of_tokens(context, BlockKind()) is context.segment_ids


@pytest.mark.slow
def test_a_decoder_with_splash_attention_has_the_logits_of_one_without():
    decoder = Decoder(PLAIN)
    tokens = jnp.arange(2 * 40).reshape(2, 40) % 97
    other = with_attention(decoder, "splash")
    assert other.config.attention == "splash"
    assert decoder.config.attention == "xla"
    expected = decoder(tokens).logits
    assert expected is not None
    np.testing.assert_allclose(other(tokens).logits, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_a_decoder_shares_its_parameters_with_its_copies():
    decoder = Decoder(PLAIN)
    assert with_attention(decoder, "xla") is decoder
    assert with_attention(decoder, "splash").embed[...] is decoder.embed[...]


def test_the_kernel_that_is_chosen(monkeypatch: pytest.MonkeyPatch):
    capped, wide = replace(PLAIN, attention_softcap=30.0), replace(PLAIN, head_dim=256)
    for platform, config, dtype, expected in [
        ("cpu", PLAIN, "bfloat16", "xla"),
        ("tpu", capped, "float32", "splash"),
        ("gpu", PLAIN, "bfloat16", "cudnn"),
        ("gpu", PLAIN, "float32", "xla"),
        ("gpu", capped, "bfloat16", "xla"),
        ("gpu", wide, "bfloat16", "xla"),
        ("gpu", replace(PLAIN, sinks=True), "bfloat16", "xla"),
    ]:
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        assert chosen_kernel("auto", config, dtype) == expected
        assert chosen_kernel("xla", config, dtype) == "xla"


@pytest.mark.parametrize(
    ("platform", "way", "config", "dtype", "found"),
    [
        ("cpu", "splash", PLAIN, "float32", "this machine computes on cpu"),
        ("cpu", "cudnn", PLAIN, "bfloat16", "this machine computes on cpu"),
        ("gpu", "cudnn", PLAIN, "float32", "attention in float32"),
        ("gpu", "cudnn", replace(PLAIN, head_dim=12), "bfloat16", "heads of 12"),
        ("gpu", "cudnn", replace(PLAIN, attention_softcap=1.0), "bfloat16", "soft caps on attention scores"),
    ],
)
def test_kernels_that_cannot_be_used(
    platform: str, way: str, config: ModelConfig, dtype: str, found: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    with pytest.raises(ConfigError) as caught:
        chosen_kernel(way, config, dtype)
    assert caught.value.facts["attention"] == way
    assert caught.value.facts["found"] == found


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN's attention runs on NVIDIA GPUs")
@pytest.mark.parametrize("kind", [BlockKind(), BlockKind(window=70)])
def test_cudnn_attention_is_xlas(kind: BlockKind):
    context = context_of([[100, 28], [128]])
    parts = [part.astype(jnp.bfloat16) for part in drawn(PLAIN, context)]
    expected = attend(*parts, context, kind, PLAIN)
    found = attend(*parts, context, kind, replace(PLAIN, attention="cudnn"))
    np.testing.assert_allclose(found, expected, atol=0.02)  # bfloat16 has steps of 2^-8 below one
