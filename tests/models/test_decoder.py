"""The decoder against a NumPy forward pass in float64, and what packing, padding and taps must satisfy."""

import functools
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distillcache.models.config import BlockKind, LayerGroup, ModelConfig, MoeConfig, RopeConfig, plan_layers
from distillcache.models.decoder import BlockOutput, Decoder, DecoderOutput
from tests.models.conftest import randomized
from tests.rounding import assert_rounded

# Two groups of different patterns, a kind that comes twice, and a group with no repeat: 2 * 3 + 1 = 7 blocks.
MIXED = (
    LayerGroup((BlockKind(3), BlockKind(), BlockKind(5)), 2),
    LayerGroup((BlockKind(),), 1),
)


@functools.partial(nnx.jit, static_argnames=("taps", "logits"))
def run(
    decoder: Decoder,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    *,
    taps: tuple[str, ...] = (),
    logits: bool = True,
) -> DecoderOutput:
    """One program for each config and shape, where a call's single operations would be compiled one by one."""
    return decoder(tokens, positions, segment_ids, taps, logits)


def numpy_blocks(decoder: Decoder) -> list[tuple[BlockKind, dict[str, np.ndarray]]]:
    """The parameters of each block in order, by walking the plan: groups, then repeats, then places in the pattern."""
    blocks = []
    for group, layers in zip(decoder.groups, decoder.config.layers, strict=True):
        for repeat in range(layers.repeats):
            for block, kind in zip(group.blocks, layers.pattern, strict=True):
                state = nnx.to_flat_state(nnx.state(block, nnx.Param))
                values = {".".join(map(str, p)): np.float64(np.asarray(v.get_value())[repeat]) for p, v in state}
                blocks.append((kind, values))
    return blocks


def numpy_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def numpy_rotate(x: np.ndarray, theta: float) -> np.ndarray:
    """`[T, hd]` as complex numbers turned by position * frequency: another way to write the rotation of halves."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def numpy_attention(config: ModelConfig, kind: BlockKind, p: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """One document `[T, D]`, head by head and token by token."""
    h = numpy_norm(x, p["attention.norm"], config.norm_eps)
    out = np.zeros_like(x) + p.get("attention.o_bias", 0.0)
    group = config.num_heads // config.num_kv_heads
    for head in range(config.num_heads):
        kv = head // group
        places = {"q": head, "k": kv, "v": kv}
        bias = {n: p[f"attention.{n}_bias"][i] if config.qkv_bias else 0.0 for n, i in places.items()}
        q = numpy_rotate(h @ p["attention.q"][:, head] + bias["q"], config.rope.theta)
        k = numpy_rotate(h @ p["attention.k"][:, kv] + bias["k"], config.rope.theta)
        v = h @ p["attention.v"][:, kv] + bias["v"]
        for t in range(len(x)):
            first = 0 if kind.window is None else max(0, t - kind.window + 1)
            scores = k[first : t + 1] @ q[t] / np.sqrt(config.head_dim)
            weights = np.exp(scores - scores.max())
            out[t] += (weights / weights.sum()) @ v[first : t + 1] @ p["attention.o"][head]
    return out


def numpy_mlp(config: ModelConfig, p: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    h = numpy_norm(x, p["mlp.norm"], config.norm_eps)
    gate = h @ p["mlp.gate"] + p.get("mlp.gate_bias", 0.0)
    up = h @ p["mlp.up"] + p.get("mlp.up_bias", 0.0)
    return gate / (1 + np.exp(-gate)) * up @ p["mlp.down"] + p.get("mlp.down_bias", 0.0)


def numpy_forward(decoder: Decoder, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Logits and taps of one document `[T]`."""
    config = decoder.config
    x = np.float64(decoder.embed[...])[tokens]
    taps: dict[str, list[np.ndarray]] = {"resid": [x], "attn_out": [], "mlp_out": []}
    for kind, parameters in numpy_blocks(decoder):
        taps["attn_out"].append(numpy_attention(config, kind, parameters, x))
        taps["mlp_out"].append(numpy_mlp(config, parameters, x + taps["attn_out"][-1]))
        x = x + taps["attn_out"][-1] + taps["mlp_out"][-1]
        taps["resid"].append(x)
    head = np.float64(decoder.embed[...]).T if config.tie_embeddings else np.float64(decoder.head[...])
    logits = numpy_norm(x, np.float64(decoder.final_norm[...]), config.norm_eps) @ head
    return {"logits": logits, **{name: np.stack(values) for name, values in taps.items()}}


@pytest.mark.parametrize("layers", [(LayerGroup((BlockKind(),), 2),), MIXED], ids=["plain", "mixed"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_against_numpy(tiny_config: ModelConfig, layers: tuple[LayerGroup, ...], bias: bool):
    config = replace(
        tiny_config,
        layers=layers,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        tie_embeddings=bias,
        rope=RopeConfig(100.0),
    )
    decoder = randomized(Decoder(config))
    tokens = np.random.default_rng(0).integers(0, 61, 11)
    out = run(decoder, tokens[None], taps=("attn_out", "resid", "mlp_out"))
    expected = numpy_forward(decoder, tokens)
    # float32 against float64 over at most 7 blocks: measured 2e-6 of values below 10.
    np.testing.assert_allclose(out.logits[0], expected["logits"], atol=2e-5)
    for name, tap in out.taps.items():
        np.testing.assert_allclose(tap[:, 0], expected[name], atol=2e-5)


def packed(lengths: list[int], width: int) -> tuple[np.ndarray, np.ndarray]:
    """positions and segment ids of one row with documents of these lengths, then padding."""
    positions = np.concatenate([*(np.arange(n) for n in lengths), np.zeros(width - sum(lengths), int)])
    segments = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, width - sum(lengths)])
    return positions[None], segments[None]


@pytest.mark.parametrize("layers", [(LayerGroup((BlockKind(),), 2),), MIXED], ids=["plain", "window"])
def test_packed_documents_are_what_they_are_alone(tiny_config: ModelConfig, layers: tuple[LayerGroup, ...]):
    decoder = randomized(Decoder(replace(tiny_config, layers=layers)))
    lengths, width = [7, 1, 9], 20
    tokens = np.random.default_rng(1).integers(0, 61, (1, width))
    positions, segments = packed(lengths, width)
    together = run(decoder, tokens, positions, segments, taps=("attn_out", "resid"))
    start = 0
    for length in lengths:
        alone = run(decoder, tokens[:, start : start + length], taps=("attn_out", "resid"))
        place = slice(start, start + length)
        # Matrix products of another width sum in another order; values are below 10.
        np.testing.assert_allclose(np.asarray(together.logits)[:, place], alone.logits, atol=1e-5)
        for name in ("attn_out", "resid"):
            np.testing.assert_allclose(np.asarray(together.taps[name])[:, :, place], alone.taps[name], atol=1e-5)
        start += length


@pytest.mark.bits
def test_padding_changes_nothing(tiny: Decoder):
    positions, segments = packed([6, 5], 16)
    tokens = np.random.default_rng(2).integers(1, 61, (1, 16))
    other = np.where(np.arange(16) < 11, tokens, (tokens + 17) % 61)
    first, second = (run(tiny, x, positions, segments, taps=("resid",)) for x in (tokens, other))
    one, two = np.asarray(first.logits), np.asarray(second.logits)
    np.testing.assert_array_equal(one[:, :11], two[:, :11])
    assert (one[:, 11:] != two[:, 11:]).any()
    streams = [np.asarray(out.taps["resid"])[:, :, :11] for out in (first, second)]
    np.testing.assert_array_equal(*streams)
    assert np.isfinite(one).all()


@pytest.mark.bits
def test_later_tokens_change_nothing(tiny: Decoder):
    tokens = np.random.default_rng(3).integers(0, 61, (1, 12))
    other = np.where(np.arange(12) < 8, tokens, (tokens + 5) % 61)
    first, second = (np.asarray(run(tiny, x).logits) for x in (tokens, other))
    np.testing.assert_array_equal(first[:, :8], second[:, :8])


def test_taps_have_their_shapes_and_add_up(tiny: Decoder):
    tokens = np.zeros((2, 5), np.int32)
    out = run(tiny, tokens, taps=("attn_out", "resid", "mlp_out"), logits=False)
    assert out.logits is None
    assert {name: tap.shape for name, tap in out.taps.items()} == {
        "attn_out": (3, 2, 5, 36),
        "resid": (4, 2, 5, 36),
        "mlp_out": (3, 2, 5, 36),
    }
    taps = {name: np.asarray(tap) for name, tap in out.taps.items()}
    resid = taps["resid"]
    np.testing.assert_allclose(resid[1:], resid[:-1] + taps["attn_out"] + taps["mlp_out"], rtol=1e-6, atol=1e-6)
    assert run(tiny, tokens).taps == {}


@pytest.mark.bits
@pytest.mark.parametrize("layers", [(LayerGroup((BlockKind(),), 3),), MIXED], ids=["plain", "mixed"])
def test_skip_last_mlp_leaves_out_that_one_only(tiny_config: ModelConfig, layers: tuple[LayerGroup, ...]):
    decoder = randomized(Decoder(replace(tiny_config, layers=layers)))
    tokens = np.arange(10)[None]

    def emit(carry: jax.Array, out: BlockOutput, index: jax.Array) -> tuple[jax.Array, tuple[jax.Array, BlockOutput]]:
        return carry + 1, (index, out)

    @functools.partial(jax.jit, static_argnums=1)
    def scanned(start: jax.Array, skip: bool) -> Any:
        x = decoder.embed_tokens(tokens)
        context = decoder.context(tokens, jnp.ones_like(tokens))
        return decoder.scan_layers(x, context, emit, start, skip_last_mlp=skip)

    _, _, (_, whole) = jax.tree.map(np.asarray, scanned(np.int32(0), False))
    last, count, (index, short) = jax.tree.map(np.asarray, scanned(np.int32(0), True))
    depth = decoder.config.num_blocks
    assert count == depth
    np.testing.assert_array_equal(index, np.arange(depth))
    assert_rounded(short.attn_out, whole.attn_out)
    assert_rounded(short.mlp_out[:-1], whole.mlp_out[:-1])
    assert not short.mlp_out[-1].any()
    assert_rounded(last, short.resid[-1] + short.attn_out[-1])


def test_bfloat16_stays_bfloat16(tiny_config: ModelConfig):
    decoder = Decoder(tiny_config, dtype="bfloat16")
    out = run(decoder, np.arange(8)[None], taps=("attn_out", "resid", "mlp_out"))
    assert {tap.dtype for tap in out.taps.values()} == {jnp.dtype("bfloat16")}


def count_equations(jaxpr: Any) -> int:
    """Those of the functions inside included: what the compiler is given."""
    inside = [leaf for eqn in jaxpr.eqns for leaf in jax.tree.leaves(eqn.params) if hasattr(leaf, "eqns")]
    return len(jaxpr.eqns) + sum(map(count_equations, inside))


@pytest.mark.parametrize("way", ["dense", "ragged"])
def test_the_program_does_not_grow_with_depth(tiny_config: ModelConfig, way: Literal["dense", "ragged"]):
    """Windows in every other block, experts in every fourth: traced once, whether there are 4 blocks or 64."""
    kinds = [BlockKind(3), BlockKind(), BlockKind(3), BlockKind(moe=True)]
    moe = MoeConfig(num_experts=5, top_k=2, expert_size=7, shared_size=6)

    def equations(depth: int) -> int:
        config = replace(tiny_config, layers=plan_layers(kinds * (depth // 4)), moe=moe, experts=way)
        graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config)))

        def forward(state: nnx.State, tokens: jax.Array) -> DecoderOutput:
            return nnx.merge(graph, state)(tokens, taps=("attn_out", "resid", "mlp_out"), router=True)

        shape = jax.ShapeDtypeStruct((2, 9), jnp.int32)
        out = jax.eval_shape(forward, state, shape)
        assert out.router is not None
        assert (out.taps["mlp_out"].shape[0], out.router.ids.shape) == (depth, (depth // 4, 2, 9, 2))
        return count_equations(jax.make_jaxpr(forward)(state, shape).jaxpr)

    found = equations(4)
    assert found == equations(64)
    assert found > 400  # the blocks' own are counted, not only the scan that holds them
