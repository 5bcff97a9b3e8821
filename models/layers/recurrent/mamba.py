"""Mamba-2 as a block's mixer: projections, a short convolution, a state space, a gate and a norm; alone or beside
attention.

Queries, keys and values go through a causal convolution of a few tokens and an activation. A token's step is
`softplus(alpha x + dt_bias)`, one number a head: its value is multiplied by the step, and its decay is
`exp(-exp(a_log) step)`. A head's output has its value added, times a learned number; then comes the gate, silu of a
linear map of the stream, and a norm of the heads of each group together.

There is no softmax, no mask and no rotation: a document's order is in its state. What lies between the projections is
float32, rounded once in front of the output projection.

Source: Mamba-2 (arXiv 2405.21060), as HF transformers computes it (`modeling_bamba`, `modeling_falcon_h1`); its x, B, C
and D are the values, keys, queries and `skip` here.
"""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from distillcache.models.config import BlockKind, MambaConfig, ModelConfig, Multipliers
from distillcache.models.layers.attention import Attention
from distillcache.models.layers.context import BlockContext
from distillcache.models.layers.mlp import ACTIVATIONS
from distillcache.models.layers.norm import parameter, rms_norm
from distillcache.models.layers.recurrent.convolution import causal_convolution, document_runs
from distillcache.models.layers.recurrent.ssd import state_space
from distillcache.models.layers.sublayer import TokenMixer, add_norms, post_norm

BESIDE = "mamba_"  # of the parameters' names where attention has the plain ones
OF_RATES = ("a_log", "dt_bias", "skip", "out_norm")
FASTEST, SLOWEST = 16.0, 1.0  # rates of decay that training starts from, uniform between
Own = Callable[[str], Array]  # a parameter of Mamba-2 by its plain name


class Mamba2(TokenMixer):
    """The mixer with the norms before and behind.

    Parameters carry a leading axis `[repeats]` while they are stacked. With G groups of keys and queries of width dk, N
    heads of values of width dv, K taps: norm and post_norm [D]; q and k [D, G, dk], v and z [D, N, dv]; alpha [D, N];
    conv_q and conv_k [G, dk, K], conv_v [N, dv, K]; a_log, dt_bias and skip [N], out_norm [N, dv]; o [N, dv, D]; where
    the family has them biases: q_bias and conv_q_bias [G, dk] and so on, alpha_bias [N], o_bias [D].

    float32: parameters of that dtype whatever the decoder's: a rate acts over a document.
    """

    float32: ClassVar[tuple[str, ...]] = OF_RATES
    o_bias: nnx.Param

    def __init__(
        self, config: ModelConfig, mamba: MambaConfig, kind: BlockKind, repeats: int, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        self.config, self.mamba, self.kind = config, mamba, kind
        add_norms(self, repeats, dtype)
        for name, value in _parameters(config, mamba, repeats, dtype, rngs).items():
            setattr(self, name, value)

    def mix(self, x: Float[Array, "B T D"], context: BlockContext) -> Float[Array, "B T N dv"]:
        """See `TokenMixer`."""
        return mamba_heads(x, context, self.config, self.mamba, lambda name: getattr(self, name)[...])

    def output_bias(self) -> Float[Array, " D"] | None:
        """See `TokenMixer`."""
        return self.o_bias[...] if self.mamba.output_bias else None


class AttentionBesideMamba(Attention):
    """Attention and Mamba-2 of one input, whose outputs are added. Source: Falcon-H1 (arXiv 2507.22448).

    Its parameters are those of `Attention`, and those of `Mamba2` with `mamba_` in front; `mix` is attention alone.
    """

    float32: ClassVar[tuple[str, ...]] = tuple(BESIDE + name for name in OF_RATES)

    def __init__(
        self, config: ModelConfig, mamba: MambaConfig, kind: BlockKind, repeats: int, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        super().__init__(config, kind, repeats, dtype, rngs)
        self.mamba = mamba
        for name, value in _parameters(config, mamba, repeats, dtype, rngs).items():
            setattr(self, BESIDE + name, value)

    @property
    def factors(self) -> Multipliers:
        """The config's multipliers, or ones."""
        return self.config.multipliers or Multipliers()

    def mix(self, x: Float[Array, "B T D"], context: BlockContext) -> Float[Array, "B T H hd"]:
        """See `TokenMixer`."""
        return super().mix((x.astype(jnp.float32) * self.factors.attention_input).astype(x.dtype), context)

    def keys_values(self, x: Float[Array, "B T D"], context: BlockContext) -> tuple[Array, Array]:
        """See `Attention`."""
        k, v = super().keys_values(x, context)
        return (k.astype(jnp.float32) * self.factors.key).astype(k.dtype), v

    def attend(self, x: Float[Array, "B T D"], context: BlockContext) -> Float[Array, "B T D"]:
        """See `TokenMixer`."""
        factors = self.factors
        attention = jnp.einsum("bthk,hkd->btd", self.mix(x, context), self.o[...]).astype(jnp.float32)
        if (bias := self.output_bias()) is not None:
            attention = attention + bias
        mamba = jnp.einsum("btnv,nvd->btd", self.mamba_mix(x, context), self.own("o")).astype(jnp.float32)
        if self.mamba.output_bias:
            mamba = mamba + self.own("o_bias")
        out = attention * factors.attention_output + mamba * factors.mamba_output
        return post_norm(self, out).astype(x.dtype)

    def mamba_mix(self, x: Float[Array, "B T D"], context: BlockContext) -> Float[Array, "B T N dv"]:
        """Return the output of Mamba-2's heads, the input of its output projection."""
        return mamba_heads(x, context, self.config, self.mamba, self.own)

    def own(self, name: str) -> Array:
        """A parameter of Mamba-2 by its plain name."""
        return getattr(self, BESIDE + name)[...]


def _parameters(
    config: ModelConfig, mamba: MambaConfig, repeats: int, dtype: jnp.dtype, rngs: nnx.Rngs
) -> dict[str, nnx.Param]:
    """Make the parameters of `Mamba2`, but for those of the norms around it."""
    depth, wide, narrow = config.hidden_size, (mamba.heads, mamba.head_dim), (mamba.groups, mamba.state)
    shapes: dict[str, tuple[int, ...]] = {"q": narrow, "k": narrow, "v": wide, "z": wide, "alpha": (mamba.heads,)}
    found = {name: parameter(rngs, (repeats, depth, *shape), depth, dtype) for name, shape in shapes.items()}
    for name in "qkv":
        taps = (repeats, *shapes[name], mamba.taps)
        found[f"conv_{name}"] = parameter(rngs, taps, mamba.taps, dtype)
        if mamba.conv_bias:
            found[f"conv_{name}_bias"] = nnx.Param(jnp.zeros((repeats, *shapes[name]), dtype))
    if mamba.bias:
        found |= {f"{name}_bias": nnx.Param(jnp.zeros((repeats, *shape), dtype)) for name, shape in shapes.items()}
    rates = jax.random.uniform(rngs.params(), (repeats, mamba.heads), jnp.float32, SLOWEST, FASTEST)
    found |= {"a_log": nnx.Param(jnp.log(rates))}
    found |= {name: nnx.Param(jnp.ones((repeats, mamba.heads), jnp.float32)) for name in ("dt_bias", "skip")}
    if mamba.norm != "none":
        found["out_norm"] = nnx.Param(jnp.ones((repeats, *wide), jnp.float32))
    found["o"] = parameter(rngs, (repeats, *wide, depth), mamba.heads * mamba.head_dim, dtype)
    if mamba.output_bias:
        found["o_bias"] = nnx.Param(jnp.zeros((repeats, depth), dtype))
    return found


def mamba_heads(
    x: Float[Array, "B T D"], context: BlockContext, config: ModelConfig, mamba: MambaConfig, own: Own
) -> Float[Array, "B T N dv"]:
    """The heads' output, of the sublayer's input and these parameters."""
    factors, runs = config.multipliers or Multipliers(), document_runs(context.segment_ids)
    of_projection: dict[str, float] = dict(zip(("z", "v", "k", "q", "alpha"), factors.mamba, strict=True))

    def projected(name: str) -> Array:
        found = jnp.tensordot(x, own(name), 1).astype(jnp.float32) * factors.mamba_input
        return (found + own(f"{name}_bias") if mamba.bias else found) * of_projection[name]

    def convolved(name: str) -> Array:
        found = causal_convolution(projected(name), own(f"conv_{name}").astype(jnp.float32), runs)
        return ACTIVATIONS[mamba.activation](found + own(f"conv_{name}_bias") if mamba.conv_bias else found)

    steps = jax.nn.softplus(projected("alpha") + own("dt_bias"))
    steps = jnp.clip(steps, mamba.least_step, mamba.most_step)
    v, decays = convolved("v"), -jnp.exp(own("a_log")) * steps
    out = state_space(convolved("q"), convolved("k"), v * steps[..., None], decays, runs) + own("skip")[:, None] * v
    gate = jax.nn.silu(projected("z"))
    if mamba.norm == "none":
        return (out * gate).astype(x.dtype)
    if mamba.norm == "first":
        return (_normed(out, own("out_norm"), mamba, config.norm_eps) * gate).astype(x.dtype)
    return _normed(out * gate, own("out_norm"), mamba, config.norm_eps).astype(x.dtype)


def _normed(
    x: Float[Array, "B T N dv"], weight: Float[Array, "N dv"], mamba: MambaConfig, eps: float
) -> Float[Array, "B T N dv"]:
    """The heads of each group normed together."""
    split = (mamba.groups, -1)
    return rms_norm(x.reshape(*x.shape[:2], *split), weight.reshape(split), eps).reshape(x.shape)
