"""Multi-head latent attention: queries, keys and values of all heads made from narrow vectors.

Of every token one vector of `rank` numbers, and of `rope_dim` rotated ones that all heads share as part of their keys,
are all that its keys and values are made of. Here they are made in full, as training does: nothing is cached.

Where an indexer is, a query attends to some of the keys alone: to the `top_k` of the highest scores, which are

    score(t, s) = sum_h w(t, h) relu(q(t, h) . k(s)) / sqrt(H d)

of queries made of the narrow vector of the others, one key a token, and weights made of the stream. The choice has no
gradient, so no loss reaches the indexer.

Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1; DeepSeek-V3.2 (arXiv 2512.02556), section 2; HF transformers
`modeling_deepseek_v3`, `modeling_deepseek_v32`, `modeling_glm_moe_dsa`.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from distillcache.models.config import BlockKind, IndexConfig, LatentConfig, ModelConfig, RopeConfig
from distillcache.models.layers.attention import Attention, warmed
from distillcache.models.layers.context import BlockContext, angles_of
from distillcache.models.layers.kernels import attend, attention_mask
from distillcache.models.layers.norm import norm_weight, parameter, rms_norm
from distillcache.models.layers.rope import rotate
from distillcache.models.layers.sublayer import add_norms

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
        add_norms(self, repeats, dtype)
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
        return attend(q, k, v, context, self.kind, self.config, choice=self.choice(x, context))

    def choice(self, x: Float[Array, "B T D"], context: BlockContext) -> Bool[Array, "B T T"] | None:
        """Return the keys of every query, of those that its mask lets it see; None: all of them."""
        return None

    def _queries(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H hd"]:
        if self.latent.query_rank is None:
            return jnp.einsum("btd,dhk->bthk", x, self.q[...])
        return jnp.einsum("btr,rhk->bthk", self._narrow_queries(x), self.q_b[...])

    def _narrow_queries(self, x: Float[Array, "B T D"]) -> Float[Array, "B T Rq"]:
        narrow = x @ self.q_a[...]
        if self.config.qkv_bias:
            narrow = narrow + self.q_a_bias[...]
        return self._norm(narrow, self.q_a_norm[...])

    def _norm(self, x: Float[Array, "B T R"], weight: Float[Array, " R"]) -> Float[Array, "B T R"]:
        return rms_norm(x, weight, LATENT_EPS, product=self.config.norm_product)


class IndexedAttention(LatentAttention):
    """Latent attention to the keys that an indexer chooses; queries have narrow vectors.

    Beside the parameters of `LatentAttention`, unless the choice is taken over, with I heads of width i: index_q
    [Rq, I, i], index_k [D, i], index_norm and index_norm_bias [i], index_weight [D, I].
    """

    def __init__(
        self,
        config: ModelConfig,
        latent: LatentConfig,
        index: IndexConfig,
        kind: BlockKind,
        repeats: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config, latent, kind, repeats, dtype, rngs)
        self.index = index
        if kind.taken_choice:
            return
        depth, rank = config.hidden_size, latent.query_rank or 0
        self.index_q = parameter(rngs, (repeats, rank, index.heads, index.head_dim), rank, dtype)
        self.index_k = parameter(rngs, (repeats, depth, index.head_dim), depth, dtype)
        self.index_norm = nnx.Param(jnp.ones((repeats, index.head_dim), dtype))
        self.index_norm_bias = nnx.Param(jnp.zeros((repeats, index.head_dim), dtype))
        self.index_weight = parameter(rngs, (repeats, depth, index.heads), depth, dtype)

    def choice(self, x: Float[Array, "B T D"], context: BlockContext) -> Bool[Array, "B T T"] | None:
        """See `LatentAttention`. In rows of at most `top_k` tokens it is all keys."""
        if context.choice is not None or x.shape[1] <= self.index.top_k:
            return context.choice
        seen = attention_mask(context, self.kind)[:, 0]
        scores = jnp.where(seen, self._scores(jax.lax.stop_gradient(x), context), -jnp.inf)
        _, chosen = jax.lax.top_k(jax.lax.stop_gradient(scores), self.index.top_k)
        return jnp.put_along_axis(jnp.zeros(seen.shape, bool), chosen, True, axis=-1, inplace=False)

    def _scores(self, x: Float[Array, "B T D"], context: BlockContext) -> Float[Array, "B T T"]:
        """Scores of every query (second axis) and key, float32; one head at a time, so that those of all heads are
        never held."""
        index = self.index
        q = jnp.einsum("btr,rhk->bthk", self._narrow_queries(x), self.index_q[...])
        k = _layer_norm(x @ self.index_k[...], self.index_norm[...], self.index_norm_bias[...])
        if self.kind.rotary:
            rope = replace(self.config.rope, interleaved=index.interleaved)
            cos, sin = (_tables(each, self.config.rope, rope) for each in angles_of(context, self.kind))
            q, k = rotate(q, cos, sin, rope), rotate(k[:, :, None], cos, sin, rope)[:, :, 0]
        q, k = q.astype(jnp.float32), k.astype(jnp.float32)
        weights = x.astype(jnp.float32) @ self.index_weight[...].astype(jnp.float32)
        weights = weights * (index.heads * index.head_dim) ** -0.5

        def add(total: Array, head: tuple[Array, Array]) -> tuple[Array, None]:
            queries, weight = head
            found = jax.nn.relu(jnp.einsum("btk,bsk->bts", queries, k))
            return total + weight[..., None] * found, None

        heads = (jnp.moveaxis(q, 2, 0), jnp.moveaxis(weights, 2, 0))
        return jax.lax.scan(add, jnp.zeros((*x.shape[:2], x.shape[1]), jnp.float32), heads)[0]


def _layer_norm(
    x: Float[Array, "B T D"], weight: Float[Array, " D"], bias: Float[Array, " D"]
) -> Float[Array, "B T D"]:
    """`x` without its mean, over its standard deviation, times `weight`, plus `bias`; float32 inside, rounded once."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + LATENT_EPS)
    return (wide * weight.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def _tables(table: Float[Array, "B T 1 rd"], made: RopeConfig, wanted: RopeConfig) -> Float[Array, "B T 1 rd"]:
    """cos or sin that were made for a rotation of neighbours, for one of halves, where that is wanted."""
    if made.interleaved == wanted.interleaved:
        return table
    return jnp.concatenate([table[..., ::2]] * 2, axis=-1)
