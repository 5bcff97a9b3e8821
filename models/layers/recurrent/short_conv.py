"""The gated short convolution as a block's mixer: three projections, two products and a convolution of a few tokens.

`o (out_gate x * conv(in_gate x * value x))`: what enters the convolution is gated, and what leaves it. It sees a token
and the few before it in its document; there is no state, no softmax and no rotation. What lies between the projections
is float32, rounded once in front of the output projection.

Source: LFM2, as HF transformers computes it (`modeling_lfm2`), which calls the gates B and C.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from distillcache.models.config import BlockKind, ModelConfig, ShortConvConfig
from distillcache.models.layers.context import BlockContext
from distillcache.models.layers.norm import parameter
from distillcache.models.layers.recurrent.convolution import causal_convolution, document_runs
from distillcache.models.layers.sublayer import TokenMixer, add_norms


class ShortConv(TokenMixer):
    """The mixer with the norms before and behind. Every channel is a head of width 1.

    Parameters carry a leading axis `[repeats]` while they are stacked. With C channels and K taps: norm and post_norm
    [D]; in_gate, out_gate and value [D, C]; conv [C, K]; o [C, 1, D]; where there are biases, in_gate_bias,
    out_gate_bias, value_bias and conv_bias [C], o_bias [D].
    """

    def __init__(
        self,
        config: ModelConfig,
        conv: ShortConvConfig,
        kind: BlockKind,
        repeats: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        depth, channels = config.hidden_size, conv.channels
        self.config, self.sizes, self.kind = config, conv, kind
        add_norms(self, repeats, dtype)
        self.in_gate = parameter(rngs, (repeats, depth, channels), depth, dtype)
        self.out_gate = parameter(rngs, (repeats, depth, channels), depth, dtype)
        self.value = parameter(rngs, (repeats, depth, channels), depth, dtype)
        self.conv = parameter(rngs, (repeats, channels, conv.taps), conv.taps, dtype)
        self.o = parameter(rngs, (repeats, channels, 1, depth), channels, dtype)
        if conv.bias:
            for name in ("in_gate", "out_gate", "value", "conv"):
                setattr(self, f"{name}_bias", nnx.Param(jnp.zeros((repeats, channels), dtype)))
            self.o_bias = nnx.Param(jnp.zeros((repeats, depth), dtype))

    def mix(self, x: Float[Array, "B T D"], context: BlockContext) -> Float[Array, "B T C 1"]:
        """See `TokenMixer`."""
        gated = self._plus_bias(x @ self.in_gate[...], "in_gate") * self._plus_bias(x @ self.value[...], "value")
        taps, runs = self.conv[...].astype(jnp.float32), document_runs(context.segment_ids)
        found = causal_convolution(gated[:, :, None], taps[None], runs)[:, :, 0]
        found = self._plus_bias(x @ self.out_gate[...], "out_gate") * self._plus_bias(found, "conv")
        return found.astype(x.dtype)[..., None]

    def output_bias(self) -> Float[Array, " D"] | None:
        """See `TokenMixer`."""
        return self.o_bias[...] if self.sizes.bias else None

    def _plus_bias(self, value: Float[Array, "B T C"], name: str) -> Float[Array, "B T C"]:
        """The value in float32, with the bias of that name where there are biases."""
        wide = value.astype(jnp.float32)
        return wide + getattr(self, f"{name}_bias")[...] if self.sizes.bias else wide
