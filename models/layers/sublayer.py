"""Norms around a sublayer, the factor of its output, and what all mixers of tokens share."""

from typing import Protocol

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from distillcache.models.config import BlockKind, ModelConfig
from distillcache.models.layers.context import BlockContext
from distillcache.models.layers.norm import norm_weight, rms_norm


class Sublayer(Protocol):
    """norm and post_norm `[D]`: each exists if `config.norms_of(kind)` says so."""

    config: ModelConfig
    kind: BlockKind
    norm: nnx.Param
    post_norm: nnx.Param


def pre_norm(sublayer: Sublayer, resid: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Compute the sublayer's input: the stream, normed unless the family norms outputs alone."""
    config = sublayer.config
    if config.norms_of(sublayer.kind) == "post":
        return resid
    return rms_norm(resid, sublayer.norm[...], config.norm_eps, product=config.norm_product)


def second_input(
    mixer: "TokenMixer", stream: Float[Array, "B T D"], middle: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    """Return what a block's MLP is given: the stream behind the mixer, or where both lie beside each other what the
    mixer is given, normed.

    Args:
        stream: that enters the block. middle: that leaves the mixer.
    """
    return pre_norm(mixer, stream) if mixer.config.norms == "shared" else middle


def post_norm(
    sublayer: Sublayer, out: Float[Array, "B T D"], bias: Float[Array, " D"] | None = None
) -> Float[Array, "B T D"]:
    """Compute the addition to the stream: the sublayer's output, normed and scaled if the family does so.

    Float32 inside, rounded once: bfloat16 would know a factor of 0.22 as 0.2197.

    Args:
        bias: added to the output first.
    """
    config, wide = sublayer.config, out.astype(jnp.float32)
    if bias is not None:
        wide = wide + bias
    if config.norms_of(sublayer.kind) != "pre":
        wide = rms_norm(wide, sublayer.post_norm[...], config.norm_eps, product=config.norm_product)
    if config.residual_scale != 1:
        wide = wide * config.residual_scale
    return wide.astype(out.dtype)


def add_norms(sublayer: Sublayer, repeats: int, dtype: jnp.dtype) -> None:
    """Give a sublayer the norms that it has."""
    config, norms = sublayer.config, sublayer.config.norms_of(sublayer.kind)
    if norms != "post":
        sublayer.norm = norm_weight((repeats, config.hidden_size), config, dtype)
    if norms != "pre":
        sublayer.post_norm = norm_weight((repeats, config.hidden_size), config, dtype)


class TokenMixer(nnx.Module):
    """A block's first sublayer: heads that mix the tokens of a document, and their output projection.

    Its parameters lie under `attention/` whatever mixes, and the tap `attn_out` is what it adds to the stream. A mixer
    has `mix`, calls `add_norms`, and makes `o` [heads, width, D].
    """

    config: ModelConfig
    kind: BlockKind
    norm: nnx.Param
    post_norm: nnx.Param
    o: nnx.Param

    def __call__(self, resid: Float[Array, "B T D"], context: BlockContext) -> Float[Array, "B T D"]:
        """Return the sublayer's contribution to the residual stream."""
        return self.attend(pre_norm(self, resid), context)

    def attend(self, x: Float[Array, "B T D"], context: BlockContext) -> Float[Array, "B T D"]:
        """The same, of what the norm before the sublayer made of the stream."""
        out = jnp.einsum("bthk,hkd->btd", self.mix(x, context), self.o[...])
        return post_norm(self, out, self.output_bias())

    def mix(self, x: Float[Array, "B T D"], context: BlockContext) -> Float[Array, "B T H hd"]:
        """Return the heads' output, the input of the output projection."""
        raise NotImplementedError

    def output_bias(self) -> Float[Array, " D"] | None:
        """The bias of the output projection; None: it has none."""
        return None


class NoMixer(TokenMixer):
    """The place of a mixer in a block that has none: it adds zeros."""

    def __init__(self, config: ModelConfig, kind: BlockKind) -> None:
        self.config, self.kind = config, kind

    def __call__(self, resid: Float[Array, "B T D"], context: BlockContext) -> Float[Array, "B T D"]:
        """See `TokenMixer`."""
        return jnp.zeros_like(resid)

    def attend(self, x: Float[Array, "B T D"], context: BlockContext) -> Float[Array, "B T D"]:
        """See `TokenMixer`."""
        return jnp.zeros_like(x)
