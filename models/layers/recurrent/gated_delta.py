"""The gated delta rule as a block's mixer: projections, a short convolution, the rule, a norm and a gate.

Queries, keys and values go through a causal convolution of a few tokens and an activation; queries and keys become unit
vectors. A token's decay and strength are made of the stream, one number a value head: `exp(-exp(a_log) softplus(alpha x
+ dt_bias))` and `sigmoid(beta x)`, or twice that. Each head's output is normed by weights that all heads share, and
multiplied by the silu of a linear map of the stream.

Kimi delta attention has a decay for each number of a key: `alpha x` is `decay_b decay_a x`, by way of a narrow vector,
and so is the map that makes the gate, of which it takes the sigmoid.

There is no softmax, no mask and no rotation: a document's order is in its state. What lies between the projections is
float32, rounded once in front of the output projection.

Source: Gated Delta Networks (arXiv 2412.06464), as HF transformers computes it (`modeling_qwen3_next`,
`modeling_olmo_hybrid`); Kimi Linear (arXiv 2510.26692), `modeling_kimi_linear`.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from distillcache.models.config import BlockKind, DeltaConfig, ModelConfig
from distillcache.models.layers.context import BlockContext
from distillcache.models.layers.mlp import ACTIVATIONS
from distillcache.models.layers.norm import parameter, rms_norm
from distillcache.models.layers.recurrent.convolution import causal_convolution, document_runs
from distillcache.models.layers.recurrent.delta_rule import channel_delta_rule, gated_delta_rule
from distillcache.models.layers.sublayer import TokenMixer, add_norms

UNIT_EPS = 1e-6  # added to the squared length of queries and keys, whatever the norms have
FASTEST, SLOWEST = 16.0, 0.01  # rates of decay that training starts from, uniform between


class GatedDelta(TokenMixer):
    """The mixer with the norms before and behind.

    Parameters carry a leading axis `[repeats]` while they are stacked. With G key heads of width dk, N value heads of
    width dv, K taps: norm and post_norm [D]; q and k [D, G, dk], v and z [D, N, dv]; alpha and beta [D, N]; conv_q and
    conv_k [G, dk, K], conv_v [N, dv, K]; a_log and dt_bias [N], out_norm [dv]; o [N, dv, D].

    float32: parameters of that dtype whatever the decoder's, as in the released files: a rate acts over a document.
    """

    float32: ClassVar[tuple[str, ...]] = ("a_log", "dt_bias", "out_norm")

    def __init__(
        self,
        config: ModelConfig,
        delta: DeltaConfig,
        kind: BlockKind,
        repeats: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        depth, keys, values = config.hidden_size, delta.key_heads, delta.value_heads
        self.config, self.delta, self.kind = config, delta, kind
        add_norms(self, repeats, dtype)
        self.q = parameter(rngs, (repeats, depth, keys, delta.key_dim), depth, dtype)
        self.k = parameter(rngs, (repeats, depth, keys, delta.key_dim), depth, dtype)
        self.v = parameter(rngs, (repeats, depth, values, delta.value_dim), depth, dtype)
        self._add_gates(repeats, dtype, rngs)
        self.beta = parameter(rngs, (repeats, depth, values), depth, dtype)
        self.conv_q = parameter(rngs, (repeats, keys, delta.key_dim, delta.taps), delta.taps, dtype)
        self.conv_k = parameter(rngs, (repeats, keys, delta.key_dim, delta.taps), delta.taps, dtype)
        self.conv_v = parameter(rngs, (repeats, values, delta.value_dim, delta.taps), delta.taps, dtype)
        rates = jax.random.uniform(rngs.params(), (repeats, values), jnp.float32, SLOWEST, FASTEST)
        self.a_log = nnx.Param(jnp.log(rates))
        self.out_norm = nnx.Param(jnp.ones((repeats, delta.value_dim), jnp.float32))
        self.o = parameter(rngs, (repeats, values, delta.value_dim, depth), values * delta.value_dim, dtype)

    def _add_gates(self, repeats: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        """Make the parameters of `_log_decay` and `_gate`, but for the rates."""
        depth, values = self.config.hidden_size, self.delta.value_heads
        self.z = parameter(rngs, (repeats, depth, values, self.delta.value_dim), depth, dtype)
        self.alpha = parameter(rngs, (repeats, depth, values), depth, dtype)
        self.dt_bias = nnx.Param(jnp.ones((repeats, values), jnp.float32))

    def mix(self, x: Float[Array, "B T D"], context: BlockContext) -> Float[Array, "B T N dv"]:
        """See `TokenMixer`."""
        runs = document_runs(context.segment_ids)
        q = _unit(self._convolved(x, self.q, self.conv_q, runs)) * self.delta.key_dim**-0.5
        k = _unit(self._convolved(x, self.k, self.conv_k, runs))
        v = self._convolved(x, self.v, self.conv_v, runs)
        strength = jax.nn.sigmoid((x @ self.beta[...]).astype(jnp.float32)) * (2 if self.delta.doubled else 1)
        rule = channel_delta_rule if self.delta.by_channel else gated_delta_rule
        out = rule(q, k, v, self._log_decay(x), strength, runs)
        eps = self.delta.norm_eps or self.config.norm_eps
        return (rms_norm(out, self.out_norm[...], eps) * self._gate(x)).astype(x.dtype)

    def _log_decay(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N ..."]:
        """The logarithm of each token's decay, float32."""
        steps = jax.nn.softplus((x @ self.alpha[...]).astype(jnp.float32) + self.dt_bias[...])
        return -jnp.exp(self.a_log[...]) * steps

    def _gate(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N dv"]:
        """The factor of the heads' normed output, float32."""
        return jax.nn.silu(jnp.einsum("btd,dnv->btnv", x, self.z[...]).astype(jnp.float32))

    def _convolved(
        self, x: Float[Array, "B T D"], matrix: nnx.Param, taps: nnx.Param, runs: Int[Array, "B T"]
    ) -> Float[Array, "B T H d"]:
        """Heads of the stream through their convolution and the activation, float32."""
        heads = jnp.einsum("btd,dhk->bthk", x, matrix[...]).astype(jnp.float32)
        found = causal_convolution(heads, taps[...].astype(jnp.float32), runs)
        return ACTIVATIONS[self.config.activation](found)


class KimiDelta(GatedDelta):
    """Kimi delta attention: a value head for each key head.

    In the place of z and alpha decay_a and gate_a [D, dk], decay_b [dk, N, dk] and gate_b [dk, N, dv]; dt_bias [N, dk].
    """

    def _add_gates(self, repeats: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        """See `GatedDelta`."""
        depth, delta = self.config.hidden_size, self.delta
        heads, narrow = delta.value_heads, delta.key_dim
        self.decay_a = parameter(rngs, (repeats, depth, narrow), depth, dtype)
        self.decay_b = parameter(rngs, (repeats, narrow, heads, delta.key_dim), narrow, dtype)
        self.gate_a = parameter(rngs, (repeats, depth, narrow), depth, dtype)
        self.gate_b = parameter(rngs, (repeats, narrow, heads, delta.value_dim), narrow, dtype)
        self.dt_bias = nnx.Param(jnp.ones((repeats, heads, delta.key_dim), jnp.float32))

    def _log_decay(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N dk"]:
        """See `GatedDelta`."""
        made = jnp.einsum("btr,rnk->btnk", x @ self.decay_a[...], self.decay_b[...]).astype(jnp.float32)
        return -jnp.exp(self.a_log[...])[:, None] * jax.nn.softplus(made + self.dt_bias[...])

    def _gate(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N dv"]:
        """See `GatedDelta`."""
        made = jnp.einsum("btr,rnv->btnv", x @ self.gate_a[...], self.gate_b[...])
        return jax.nn.sigmoid(made.astype(jnp.float32))


def _unit(x: Float[Array, "B T H d"]) -> Float[Array, "B T H d"]:
    """Vectors of length 1, a little less where they are short."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + UNIT_EPS)
