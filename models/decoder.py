"""The decoder: stacked parameters, blocks scanned over their repeats, taps as return values.

One code path serves as teacher (recorder.py), as student (trainer/step.py) and for evaluation. The parameters of
equal blocks are stacked on a leading axis and scanned, so compile time does not grow with depth.

Source: LLaMA (arXiv 2302.13971), as HF transformers computes it: RMSNorm in float32, rotary embedding on halves,
grouped-query attention, gated MLP.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from models.config import BlockKind, LayerGroup, ModelConfig
from models.rope import rope_tables, rotate

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class BlockContext(NamedTuple):
    """What every block needs to know of the rows: who sees whom, and the rotary angles."""

    cos: Float[Array, "B T 1 hd"]
    sin: Float[Array, "B T 1 hd"]
    segment_ids: Int[Array, "B T"]


class BlockOutput(NamedTuple):
    """One block's tensors, `[B, T, D]` each. `resid` enters the block; the next one gets the sum of the three."""

    resid: Array
    attn_out: Array
    mlp_out: Array


class DecoderOutput(NamedTuple):
    """logits `[B, T, V]` or None; taps by name: `attn_out`, `mlp_out` `[L, B, T, D]`, `resid` `[L + 1, B, T, D]`."""

    logits: Array | None
    taps: dict[str, Array]
    router: Any | None = None


def rms_norm(x: Float[Array, "*B D"], weight: Float[Array, "D"], eps: float) -> Float[Array, "*B D"]:
    """`x` over its root mean square, times `weight`; float32 inside, the dtype of `x` outside."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return weight * wide.astype(x.dtype)


def attention_mask(segment_ids: Int[Array, "B T"], window: int | None) -> Bool[Array, "B 1 T T"]:
    """Causal, within a document, within the window. Padding (segment 0) sees padding: finite, and seen by no one."""
    index = jnp.arange(segment_ids.shape[1])
    distance = index[:, None] - index[None, :]
    seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return (same & seen)[:, None]


def _parameter(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype: jnp.dtype) -> nnx.Param:
    return nnx.Param((jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5).astype(dtype))


class Attention(nnx.Module):
    """The attention sublayer: pre-norm, grouped-query attention, output projection.

    Parameters carry a leading axis `[repeats]` while they are stacked, none inside the scan:
    norm [D], q [D, H, hd], k and v [D, K, hd], o [H, hd, D], and biases where the family has them.
    """

    def __init__(self, config: ModelConfig, kind: BlockKind, repeats: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        depth, dim = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_heads, config.num_kv_heads
        self.config, self.kind = config, kind
        self.norm = nnx.Param(jnp.ones((repeats, depth), dtype))
        self.q = _parameter(rngs, (repeats, depth, heads, dim), depth, dtype)
        self.k = _parameter(rngs, (repeats, depth, kv_heads, dim), depth, dtype)
        self.v = _parameter(rngs, (repeats, depth, kv_heads, dim), depth, dtype)
        self.o = _parameter(rngs, (repeats, heads, dim, depth), heads * dim, dtype)
        if config.attention_bias:
            self.q_bias = nnx.Param(jnp.zeros((repeats, heads, dim), dtype))
            self.k_bias = nnx.Param(jnp.zeros((repeats, kv_heads, dim), dtype))
            self.v_bias = nnx.Param(jnp.zeros((repeats, kv_heads, dim), dtype))
            self.o_bias = nnx.Param(jnp.zeros((repeats, depth), dtype))

    def __call__(self, resid: Float[Array, "B T D"], context: BlockContext) -> Float[Array, "B T D"]:
        """What the sublayer adds to the residual stream."""
        return self.attend(rms_norm(resid, self.norm[...], self.config.norm_eps), context)

    def attend(self, x: Float[Array, "B T D"], context: BlockContext) -> Float[Array, "B T D"]:
        """The same, of the normed stream."""
        q = jnp.einsum("btd,dhk->bthk", x, self.q[...])
        k = jnp.einsum("btd,dhk->bthk", x, self.k[...])
        v = jnp.einsum("btd,dhk->bthk", x, self.v[...])
        if self.config.attention_bias:
            q, k, v = q + self.q_bias[...], k + self.k_bias[...], v + self.v_bias[...]
        q, k = rotate(q, context.cos, context.sin), rotate(k, context.cos, context.sin)
        mask = attention_mask(context.segment_ids, self.kind.window)
        mixed = jax.nn.dot_product_attention(q, k, v, mask=mask)
        out = jnp.einsum("bthk,hkd->btd", mixed, self.o[...])
        return out + self.o_bias[...] if self.config.attention_bias else out


class Mlp(nnx.Module):
    """The gated MLP sublayer: pre-norm, `down(act(gate(x)) * up(x))`. norm [D], gate and up [D, F], down [F, D]."""

    def __init__(self, config: ModelConfig, repeats: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        depth, inner = config.hidden_size, config.intermediate_size
        self.config = config
        self.norm = nnx.Param(jnp.ones((repeats, depth), dtype))
        self.gate = _parameter(rngs, (repeats, depth, inner), depth, dtype)
        self.up = _parameter(rngs, (repeats, depth, inner), depth, dtype)
        self.down = _parameter(rngs, (repeats, inner, depth), inner, dtype)
        if config.mlp_bias:
            self.gate_bias = nnx.Param(jnp.zeros((repeats, inner), dtype))
            self.up_bias = nnx.Param(jnp.zeros((repeats, inner), dtype))
            self.down_bias = nnx.Param(jnp.zeros((repeats, depth), dtype))

    def __call__(self, resid: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What the sublayer adds to the residual stream."""
        x = rms_norm(resid, self.norm[...], self.config.norm_eps)
        gate, up = x @ self.gate[...], x @ self.up[...]
        if self.config.mlp_bias:
            gate, up = gate + self.gate_bias[...], up + self.up_bias[...]
        out = (ACTIVATIONS[self.config.activation](gate) * up) @ self.down[...]
        return out + self.down_bias[...] if self.config.mlp_bias else out


class Block(nnx.Module):
    """One decoder layer: attention sublayer, then MLP sublayer."""

    def __init__(self, config: ModelConfig, kind: BlockKind, repeats: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.attention = Attention(config, kind, repeats, dtype, rngs)
        self.mlp = Mlp(config, repeats, dtype, rngs)


class Group(nnx.Module):
    """The blocks of one layer group: a stacked `Block` for each kind of the pattern."""

    def __init__(self, config: ModelConfig, group: LayerGroup, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.repeats = group.repeats
        self.blocks = nnx.List([Block(config, kind, group.repeats, dtype, rngs) for kind in group.pattern])


type_of_emit = Callable[[Any, BlockOutput, Array], tuple[Any, Any]]
Remat = Callable[[Callable[..., Any]], Callable[..., Any]]


class Decoder(nnx.Module):
    """A decoder-only language model. embed [V, D], final_norm [D], head [D, V] unless tied to the embeddings."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype | str = jnp.float32, rngs: nnx.Rngs | None = None):
        dtype, rngs = jnp.dtype(dtype), rngs or nnx.Rngs(0)
        self.config = config
        self.embed = _parameter(rngs, (config.vocab_size, config.hidden_size), config.hidden_size, dtype)
        self.groups = nnx.List([Group(config, group, dtype, rngs) for group in config.layers])
        self.final_norm = nnx.Param(jnp.ones((config.hidden_size,), dtype))
        if not config.tie_embeddings:
            self.head = _parameter(rngs, (config.hidden_size, config.vocab_size), config.hidden_size, dtype)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        taps: tuple[str, ...] = (),
        logits: bool = True,
    ) -> DecoderOutput:
        """The forward pass. Without positions and segments, each row is one document from its first token."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)

        def emit(carry: None, out: BlockOutput, _: Array) -> tuple[None, dict[str, Array]]:
            return carry, {name: getattr(out, name) for name in taps}

        context = self.context(positions, segment_ids)
        last, _, stacks = self.scan_blocks(self.embed_tokens(tokens), context, emit, None)
        if "resid" in taps:
            stacks["resid"] = jnp.concatenate([stacks["resid"], last[None]])
        return DecoderOutput(self.logits(last) if logits else None, stacks)

    def embed_tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The residual stream that enters block 0."""
        return self.embed[...][tokens]

    def context(self, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> BlockContext:
        """What the blocks share; computed once, outside the scan."""
        cos, sin = rope_tables(self.config.rope, self.config.head_dim, positions, self.config.max_positions)
        return BlockContext(cos, sin, segment_ids)

    def logits(self, resid: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Next-token logits from the stream that leaves the last block."""
        x = rms_norm(resid, self.final_norm[...], self.config.norm_eps)
        return x @ (self.embed[...].T if self.config.tie_embeddings else self.head[...])

    def scan_blocks(
        self,
        x: Float[Array, "B T D"],
        context: BlockContext,
        emit: type_of_emit,
        carry: Any,
        *,
        skip_last_mlp: bool = False,
        remat: Remat | None = None,
    ) -> tuple[Float[Array, "B T D"], Any, Any]:
        """Run every block on the stream of the one before it.

        Args:
            x: the stream that enters block 0.
            emit: `(carry, BlockOutput, l) -> (carry, y)`, called in every block; what a caller wants kept, already
                in the form in which it is kept, so that no wider stack ever exists.
            carry: what `emit` hands on from block to block.
            skip_last_mlp: leave out the last block's MLP; its `mlp_out` is zeros.
            remat: wraps the scan's body, to have the backward pass compute some of it again.

        Returns:
            the stream that leaves the last block, the last carry, and the `y` of all blocks stacked on axis 0.
        """
        last = self.config.num_blocks - 1

        def run_block(block: Block, x: Array, carry: Any, index: Array) -> tuple[Array, Any, Any]:
            attn_out = block.attention(x, context)
            middle = x + attn_out
            if skip_last_mlp:
                mlp_out = jax.lax.cond(index == last, jnp.zeros_like, block.mlp, middle)
            else:
                mlp_out = block.mlp(middle)
            carry, y = emit(carry, BlockOutput(x, attn_out, mlp_out), index)
            return middle + mlp_out, carry, y

        stacks: list[Any] = []
        start = 0
        for group in self.groups:
            size = len(group.blocks)
            graph, parameters = nnx.split(group)

            def body(state: tuple[Array, Any], step: tuple[Any, Array], graph: Any = graph, size: int = size) -> Any:
                x, carry = state
                sliced, first = step
                outputs = []
                for place, block in enumerate(nnx.merge(graph, sliced).blocks):
                    x, carry, y = run_block(block, x, carry, first + place)
                    outputs.append(y)
                return (x, carry), jax.tree.map(_stack, *outputs)

            firsts = start + size * jnp.arange(group.repeats)
            (x, carry), ys = jax.lax.scan(remat(body) if remat else body, (x, carry), (parameters, firsts))
            stacks.append(jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), ys))
            start += size * group.repeats
        return x, carry, jax.tree.map(_join, *stacks)


def _stack(*ys: Array) -> Array:
    return jnp.stack(ys)


def _join(first: Array, *rest: Array) -> Array:
    return jnp.concatenate([first, *rest]) if rest else first
