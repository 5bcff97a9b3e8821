"""Softmax attention."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from distillcache.models.config import BlockKind, ModelConfig, NormProduct, TemperatureConfig
from distillcache.models.layers.context import BlockContext, angles_of
from distillcache.models.layers.kernels import attend
from distillcache.models.layers.norm import norm_weight, parameter, rms_norm
from distillcache.models.layers.rope import rotate
from distillcache.models.layers.sublayer import TokenMixer


class Attention(TokenMixer):
    """The attention sublayer: grouped-query attention and its output projection, with the norms before and behind.

    Parameters carry a leading axis `[repeats]` while they are stacked, none inside the scan:
    norm and post_norm [D], q [D, H, hd], k and v [D, K, hd], o [H, hd, D], and biases and q/k norms where the family
    has them: q_norm and k_norm [hd] (`head`), or [H, hd] and [K, hd] (`full`); sinks [H]; gate
    [D, H, hd] with gate_bias, of the heads' output.
    """

    def __init__(self, config: ModelConfig, kind: BlockKind, repeats: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        depth, dim = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_heads, config.num_kv_heads
        self.config, self.kind = config, kind
        self._add_norms(repeats, dtype)
        self.q = parameter(rngs, (repeats, depth, heads, dim), depth, dtype)
        self.k = parameter(rngs, (repeats, depth, kv_heads, dim), depth, dtype)
        self.v = parameter(rngs, (repeats, depth, kv_heads, dim), depth, dtype)
        self.o = parameter(rngs, (repeats, heads, dim, depth), heads * dim, dtype)
        if config.qkv_bias:
            self.q_bias = nnx.Param(jnp.zeros((repeats, heads, dim), dtype))
            self.k_bias = nnx.Param(jnp.zeros((repeats, kv_heads, dim), dtype))
            self.v_bias = nnx.Param(jnp.zeros((repeats, kv_heads, dim), dtype))
        if config.output_bias:
            self.o_bias = nnx.Param(jnp.zeros((repeats, depth), dtype))
        if config.output_gate:
            self.gate = parameter(rngs, (repeats, depth, heads, dim), depth, dtype)
            if config.qkv_bias:
                self.gate_bias = nnx.Param(jnp.zeros((repeats, heads, dim), dtype))
        if config.qk_norm in ("head", "full"):
            full = config.qk_norm == "full"
            self.q_norm = norm_weight((repeats, heads, dim) if full else (repeats, dim), config, dtype)
            self.k_norm = norm_weight((repeats, kv_heads, dim) if full else (repeats, dim), config, dtype)
        if config.sinks:
            self.sinks = nnx.Param(jnp.zeros((repeats, heads), dtype))

    def output_bias(self) -> Float[Array, " D"] | None:
        """See `TokenMixer`."""
        return self.o_bias[...] if self.config.output_bias else None

    def mix(self, x: Float[Array, "B T D"], context: BlockContext) -> Float[Array, "B T H hd"]:
        """Return the heads' output, the input of the output projection."""
        q, k, v = self._heads(x)
        if self.kind.rotary:
            cos, sin = angles_of(context, self.kind)
            q, k = (rotate(part, cos, sin, self.config.rope) for part in (q, k))
            if self.config.qk_norm == "l2":
                one = jnp.ones((), q.dtype)
                q, k = rms_norm(q, one, self.config.norm_eps), rms_norm(k, one, self.config.norm_eps)
        elif self.config.temperature is not None:
            q = q * _temperature(self.config.temperature, context.positions)
        q, k = q.astype(x.dtype), k.astype(x.dtype)
        sinks = self.sinks[...] if self.config.sinks else None
        return self._gated(attend(q, k, v, context, self.kind, self.config, sinks), x)

    def _gated(self, out: Float[Array, "B T H hd"], x: Float[Array, "B T D"]) -> Float[Array, "B T H hd"]:
        """The heads' output behind its gate, where there is one; float32 inside, rounded once."""
        if not self.config.output_gate:
            return out
        gate = jnp.einsum("btd,dhk->bthk", x, self.gate[...]).astype(jnp.float32)
        if self.config.qkv_bias:
            gate = gate + self.gate_bias[...]
        return (out.astype(jnp.float32) * jax.nn.sigmoid(gate)).astype(out.dtype)

    def _heads(self, x: Float[Array, "B T D"]) -> tuple[Array, Array, Array]:
        """Queries [B, T, H, hd], keys and values [B, T, K, hd], before the rotation.

        Queries and keys are float32, to be rounded when they have been turned: bfloat16 would round at every step.
        """
        config = self.config
        q = jnp.einsum("btd,dhk->bthk", x, self.q[...]).astype(jnp.float32)
        k = jnp.einsum("btd,dhk->bthk", x, self.k[...]).astype(jnp.float32)
        v = jnp.einsum("btd,dhk->bthk", x, self.v[...])
        if config.qkv_bias:
            q, k, v = q + self.q_bias[...], k + self.k_bias[...], v + self.v_bias[...]
        if config.qk_norm in ("head", "full"):
            norm = partial(
                rms_norm if config.qk_norm == "head" else _norm_of_heads,
                eps=config.norm_eps,
                product=config.norm_product,
            )
            q, k = norm(q, self.q_norm[...]), norm(k, self.k_norm[...])
        if config.clip_qkv is not None:
            q, k, v = (jnp.clip(part, -config.clip_qkv, config.clip_qkv) for part in (q, k, v))
        return q, k, v


def _norm_of_heads(
    x: Float[Array, "B T H hd"], weight: Float[Array, "H hd"], eps: float, *, product: NormProduct
) -> Float[Array, "B T H hd"]:
    """`rms_norm` of all heads of a token together."""
    return rms_norm(x.reshape(*x.shape[:2], -1), weight.reshape(-1), eps, product=product).reshape(x.shape)


def _temperature(config: TemperatureConfig, positions: Int[Array, "B T"]) -> Float[Array, "B T 1 1"]:
    steps = jnp.floor((positions.astype(jnp.float32) + 1.0) / config.floor)
    return (1.0 + config.scale * jnp.log1p(steps))[..., None, None]
