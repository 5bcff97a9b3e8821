"""The choice of a block's mixer."""

import jax.numpy as jnp
from flax import nnx

from distillcache.models.config import BlockKind, ModelConfig
from distillcache.models.layers.attention import Attention
from distillcache.models.layers.latent_attention import IndexedAttention, LatentAttention
from distillcache.models.layers.recurrent.gated_delta import GatedDelta, KimiDelta
from distillcache.models.layers.recurrent.mamba import AttentionBesideMamba, Mamba2
from distillcache.models.layers.recurrent.short_conv import ShortConv
from distillcache.models.layers.sublayer import NoMixer, TokenMixer


def mixer_of(config: ModelConfig, kind: BlockKind, repeats: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> TokenMixer:
    """The sublayer that mixes the tokens of a block of this kind."""
    if kind.mixer == "gated_delta":
        mixer = KimiDelta if config.delta_config.by_channel else GatedDelta
        return mixer(config, config.delta_config, kind, repeats, dtype, rngs)
    if kind.mixer == "short_conv":
        return ShortConv(config, config.short_conv_config, kind, repeats, dtype, rngs)
    if kind.mixer == "none":
        return NoMixer(config, kind)
    if kind.is_mamba:
        mamba = Mamba2 if kind.mixer == "mamba2" else AttentionBesideMamba
        return mamba(config, config.mamba_config, kind, repeats, dtype, rngs)
    if config.latent is not None and config.latent.index is not None:
        return IndexedAttention(config, config.latent, config.latent.index, kind, repeats, dtype, rngs)
    if config.latent is not None:
        return LatentAttention(config, config.latent, kind, repeats, dtype, rngs)
    return Attention(config, kind, repeats, dtype, rngs)
