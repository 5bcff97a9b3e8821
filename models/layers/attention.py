"""Softmax attention."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from distillcache.models.config import BlockKind, ModelConfig, NormProduct
from distillcache.models.layers.context import BlockContext, angles_of, taken_of
from distillcache.models.layers.kernels import attend
from distillcache.models.layers.norm import norm_weight, parameter, rms_norm
from distillcache.models.layers.rope import rotate
from distillcache.models.layers.sublayer import TokenMixer, add_norms


class Attention(TokenMixer):
    """The attention sublayer: grouped-query attention and its output projection, with the norms before and behind.

    Parameters carry a leading axis `[repeats]` while they are stacked, none inside the scan:
    norm and post_norm [D], q [D, H, hd], k and v [D, K, hd], o [H, hd, D], and biases and q/k norms where the family
    has them: q_norm and k_norm [hd] (`head`, `turned`), or [H, hd] and [K, hd] (`full`); sinks [H]; gate
    [D, H, hd] with gate_bias, of the heads' output. K and hd are those of the kind; there may be no v, and no k either.
    """

    def __init__(self, config: ModelConfig, kind: BlockKind, repeats: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        depth, heads = config.hidden_size, config.num_heads
        kv_heads, dim = config.heads_of(kind)
        self.config, self.kind = config, kind
        add_norms(self, repeats, dtype)
        self.q = parameter(rngs, (repeats, depth, heads, dim), depth, dtype)
        own_values = not (kind.taken or config.values_are_keys(kind))
        if not kind.taken:
            self.k = parameter(rngs, (repeats, depth, kv_heads, dim), depth, dtype)
        if own_values:
            self.v = parameter(rngs, (repeats, depth, kv_heads, dim), depth, dtype)
        self.o = parameter(rngs, (repeats, heads, dim, depth), heads * dim, dtype)
        if config.qkv_bias:
            self.q_bias = nnx.Param(jnp.zeros((repeats, heads, dim), dtype))
            if not kind.taken:
                self.k_bias = nnx.Param(jnp.zeros((repeats, kv_heads, dim), dtype))
            if own_values:
                self.v_bias = nnx.Param(jnp.zeros((repeats, kv_heads, dim), dtype))
        if config.output_bias:
            self.o_bias = nnx.Param(jnp.zeros((repeats, depth), dtype))
        if config.output_gate:
            self.gate = parameter(rngs, (repeats, depth, heads, dim), depth, dtype)
            if config.qkv_bias:
                self.gate_bias = nnx.Param(jnp.zeros((repeats, heads, dim), dtype))
        if config.has_qk_norms:
            full = config.qk_norm == "full"
            self.q_norm = norm_weight((repeats, heads, dim) if full else (repeats, dim), config, dtype)
            if not kind.taken:
                self.k_norm = norm_weight((repeats, kv_heads, dim) if full else (repeats, dim), config, dtype)
        if config.sinks:
            self.sinks = nnx.Param(jnp.zeros((repeats, heads), dtype))

    def output_bias(self) -> Float[Array, " D"] | None:
        """See `TokenMixer`."""
        return self.o_bias[...] if self.config.output_bias else None

    def mix(self, x: Float[Array, "B T D"], context: BlockContext) -> Float[Array, "B T H hd"]:
        """Return the heads' output, the input of the output projection."""
        q = self._turned(self._queries(x), context)
        if self.config.qk_norm == "turned":
            q = self._normed(q, self.q_norm[...])
        q = warmed(q, self.config, self.kind, context.positions).astype(x.dtype)
        k, v = taken_of(context, self.kind) if self.kind.taken else self.keys_values(x, context)
        sinks = self.sinks[...] if self.config.sinks else None
        return self._gated(attend(q, k, v, context, self.kind, self.config, sinks), x)

    def keys_values(self, x: Float[Array, "B T D"], context: BlockContext) -> tuple[Array, Array]:
        """Keys and values [B, T, K, hd], as tokens are attended to."""
        config = self.config
        k = jnp.einsum("btd,dhk->bthk", x, self.k[...]).astype(jnp.float32)
        own_values = not config.values_are_keys(self.kind)
        v = jnp.einsum("btd,dhk->bthk", x, self.v[...]) if own_values else k
        if config.qkv_bias:
            k = k + self.k_bias[...]
            v = v + self.v_bias[...] if own_values else k
        if config.value_norm:
            v = rms_norm(v, jnp.ones((), v.dtype), config.norm_eps)
        if config.qk_norm in ("head", "full"):
            k = self._normed(k, self.k_norm[...])
        if config.clip_qkv is not None:
            k, v = (jnp.clip(part, -config.clip_qkv, config.clip_qkv) for part in (k, v))
        k = self._turned(k, context)
        if config.qk_norm == "turned":
            k = self._normed(k, self.k_norm[...])
        return k.astype(x.dtype), v.astype(x.dtype)

    def _queries(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H hd"]:
        """Queries before the rotation: float32, as keys are until they have been turned: bfloat16 would round at every
        step."""
        config = self.config
        q = jnp.einsum("btd,dhk->bthk", x, self.q[...]).astype(jnp.float32)
        if config.qkv_bias:
            q = q + self.q_bias[...]
        if config.qk_norm in ("head", "full"):
            q = self._normed(q, self.q_norm[...])
        return q if config.clip_qkv is None else jnp.clip(q, -config.clip_qkv, config.clip_qkv)

    def _normed(self, heads: Float[Array, "B T H hd"], weight: Array) -> Float[Array, "B T H hd"]:
        norm = _norm_of_heads if self.config.qk_norm == "full" else rms_norm
        return norm(heads, weight, self.config.norm_eps, product=self.config.norm_product)

    def _turned(self, heads: Float[Array, "B T H hd"], context: BlockContext) -> Float[Array, "B T H hd"]:
        """Queries or keys by their tokens' angles, in blocks that rotate."""
        if not self.kind.rotary:
            return heads
        cos, sin = angles_of(context, self.kind)
        heads = rotate(heads, cos, sin, self.config.rope)
        if self.config.qk_norm != "l2":
            return heads
        return rms_norm(heads, jnp.ones((), heads.dtype), self.config.norm_eps)

    def _gated(self, out: Float[Array, "B T H hd"], x: Float[Array, "B T D"]) -> Float[Array, "B T H hd"]:
        """The heads' output behind its gate, where there is one; float32 inside, rounded once."""
        if not self.config.output_gate:
            return out
        gate = jnp.einsum("btd,dhk->bthk", x, self.gate[...]).astype(jnp.float32)
        if self.config.qkv_bias:
            gate = gate + self.gate_bias[...]
        return (out.astype(jnp.float32) * jax.nn.sigmoid(gate)).astype(out.dtype)


def _norm_of_heads(
    x: Float[Array, "B T H hd"], weight: Float[Array, "H hd"], eps: float, *, product: NormProduct
) -> Float[Array, "B T H hd"]:
    """`rms_norm` of all heads of a token together."""
    return rms_norm(x.reshape(*x.shape[:2], -1), weight.reshape(-1), eps, product=product).reshape(x.shape)


def warmed(
    q: Float[Array, "B T H hd"], config: ModelConfig, kind: BlockKind, positions: Int[Array, "B T"]
) -> Float[Array, "B T H hd"]:
    """Queries as they grow with their token's position (`TemperatureConfig`), where blocks of this kind have that;
    float32 inside, rounded once to the dtype of `q`.
    """
    found = config.temperature
    if found is None or (kind.rotary and not found.everywhere):
        return q
    steps = jnp.floor((positions.astype(jnp.float32) + found.first) / found.floor)
    return (q.astype(jnp.float32) * (1.0 + found.scale * jnp.log1p(steps))[..., None, None]).astype(q.dtype)
