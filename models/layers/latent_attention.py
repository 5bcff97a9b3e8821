"""Multi-head latent attention: queries, keys and values of all heads made from narrow vectors.

Of every token one vector of `rank` numbers, and of `rope_dim` rotated ones that all heads share as part of their keys,
are all that its keys and values are made of. Here they are made in full, as training does: nothing is cached.

Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1; HF transformers `modeling_deepseek_v3`.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from distillcache.models.config import BlockKind, LatentConfig, ModelConfig
from distillcache.models.layers.attention import Attention, warmed
from distillcache.models.layers.context import BlockContext, angles_of
from distillcache.models.layers.kernels import attend
from distillcache.models.layers.norm import norm_weight, parameter, rms_norm
from distillcache.models.layers.rope import rotate

LATENT_EPS = 1e-6  # of the norms of the narrow vectors, whatever the other norms have


class LatentAttention(Attention):
    """The attention sublayer with latent keys and values; the norms around it are those of `Attention`.

    Parameters carry a leading axis `[repeats]` while they are stacked. With pd, rd, vd = plain, rotated, value
    width, R the rank: norm and post_norm [D]; q [D, H, pd + rd], or q_a [D, Rq], q_a_norm [Rq], q_b [Rq, H, pd + rd];
    kv_a [D, R + rd], kv_a_norm [R], kv_b [R, H, pd + vd]; o [H, vd, D]; biases q_a_bias, kv_a_bias and o_bias.
    """

    def __init__(
        self,
        config: ModelConfig,
        latent: LatentConfig,
        kind: BlockKind,
        repeats: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        depth, heads, width = config.hidden_size, config.num_heads, config.head_dim
        self.config, self.kind, self.latent = config, kind, latent
        self._add_norms(repeats, dtype)
        if latent.query_rank is None:
            self.q = parameter(rngs, (repeats, depth, heads, width), depth, dtype)
        else:
            self.q_a = parameter(rngs, (repeats, depth, latent.query_rank), depth, dtype)
            self.q_a_norm = norm_weight((repeats, latent.query_rank), config, dtype)
            self.q_b = parameter(rngs, (repeats, latent.query_rank, heads, width), latent.query_rank, dtype)
        self.kv_a = parameter(rngs, (repeats, depth, latent.rank + latent.rope_dim), depth, dtype)
        self.kv_a_norm = norm_weight((repeats, latent.rank), config, dtype)
        made = latent.plain_dim + latent.value_dim
        self.kv_b = parameter(rngs, (repeats, latent.rank, heads, made), latent.rank, dtype)
        self.o = parameter(rngs, (repeats, heads, latent.value_dim, depth), heads * latent.value_dim, dtype)
        if config.qkv_bias:
            self.kv_a_bias = nnx.Param(jnp.zeros((repeats, latent.rank + latent.rope_dim), dtype))
            if latent.query_rank is not None:
                self.q_a_bias = nnx.Param(jnp.zeros((repeats, latent.query_rank), dtype))
        if config.output_bias:
            self.o_bias = nnx.Param(jnp.zeros((repeats, depth), dtype))

    def mix(self, x: Float[Array, "B T D"], context: BlockContext) -> Float[Array, "B T H vd"]:
        """Return the heads' output, the input of the output projection."""
        latent, rope = self.latent, self.config.rope
        q = self._queries(x)
        plain, turned = q[..., : latent.plain_dim], q[..., latent.plain_dim :]
        made = x @ self.kv_a[...]
        if self.config.qkv_bias:
            made = made + self.kv_a_bias[...]
        narrow, shared = made[..., : latent.rank], made[..., None, latent.rank :]  # [B, T, R], [B, T, 1, rd]
        if self.kind.rotary:
            cos, sin = angles_of(context, self.kind)
            turned, shared = rotate(turned, cos, sin, rope), rotate(shared, cos, sin, rope)
        of_heads = jnp.einsum("btr,rhk->bthk", self._norm(narrow, self.kv_a_norm[...]), self.kv_b[...])
        own, v = of_heads[..., : latent.plain_dim], of_heads[..., latent.plain_dim :]
        shared = jnp.broadcast_to(shared, (*own.shape[:-1], latent.rope_dim))
        q, k = jnp.concatenate([plain, turned], axis=-1), jnp.concatenate([own, shared], axis=-1)
        q = warmed(q, self.config, self.kind, context.positions)
        return attend(q, k, v, context, self.kind, self.config)

    def _queries(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H hd"]:
        if self.latent.query_rank is None:
            return jnp.einsum("btd,dhk->bthk", x, self.q[...])
        narrow = x @ self.q_a[...]
        if self.config.qkv_bias:
            narrow = narrow + self.q_a_bias[...]
        return jnp.einsum("btr,rhk->bthk", self._norm(narrow, self.q_a_norm[...]), self.q_b[...])

    def _norm(self, x: Float[Array, "B T R"], weight: Float[Array, " R"]) -> Float[Array, "B T R"]:
        return rms_norm(x, weight, LATENT_EPS, product=self.config.norm_product)
