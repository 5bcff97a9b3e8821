"""FLOPs of a step and of the devices, for the model FLOPs utilisation.

Only matrix products count, as usual: 2 FLOPs a multiply-add, the backward pass twice the forward one; what is computed
again to save memory does not count. Source: PaLM (arXiv 2204.02311), appendix B.
"""

from collections.abc import Mapping
from typing import Any

import jax

from distillcache.models.adapters import is_adapter
from distillcache.models.config import BlockKind, ModelConfig

# bfloat16 peak of one device, FLOP/s, from the vendors' data sheets, without sparsity. Others: no utilisation is told.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


OF_EXPERTS = ("mlp/gate", "mlp/up", "mlp/down")  # with experts, every token goes through `top_k` of them


def step_flops(config: ModelConfig, parameters: Mapping[str, Any], tokens: int, row_tokens: int) -> float:
    """FLOPs of a forward and backward pass of these parameters' products over `tokens` tokens.

    Args:
        parameters: by name, those that a step uses; vectors and the embedding's look-up are no products.
    """
    products, mixing = 0.0, 0.0
    for name, value in parameters.items():
        stacked = name.startswith("groups/")
        if is_adapter(name):  # added to their matrices once a step, whatever the number of tokens
            continue
        if name == "embed" and not (config.tie_embeddings and "final_norm" in parameters):
            continue
        if value.ndim - stacked >= 2 and not name.endswith(("_bias", "_norm")):
            of_experts = name.endswith(OF_EXPERTS) and value.ndim - stacked == 3
            used = value.size * config.moe_config.top_k // config.moe_config.num_experts if of_experts else value.size
            products += used / 3 if "attention/index_" in name else used  # an indexer has no backward pass
        if name.endswith("attention/o"):
            _, group, _, place, *_ = name.split("/")
            mixing += value.shape[0] * _mixing(config, config.layers[int(group)].pattern[int(place)], row_tokens)
    return 6.0 * tokens * (products + mixing)


def _mixing(config: ModelConfig, kind: BlockKind, row_tokens: int) -> float:
    """Multiply-adds of a token where tokens mix, without the projections.

    Attention: scores of keys and mixing of values, half of it masked, whichever keys an indexer chooses; its own scores
    in the forward pass alone. Delta rule: what a state reads, what is added to it, and what a query reads, in whatever
    form they are computed. Mamba-2: the last two. A short convolution is among the products.
    """
    if kind.mixer == "short_conv":
        return 0.0
    if kind.mixer == "gated_delta":
        delta = config.delta_config
        return 3.0 * delta.value_heads * delta.key_dim * delta.value_dim
    mamba = 2.0 * config.mamba_config.state_size if kind.is_mamba else 0.0
    if kind.mixer == "mamba2":
        return mamba
    if config.wide is not None and kind.wide:
        return float(config.num_heads * config.wide.head_dim * row_tokens)
    found = config.num_heads * (config.head_dim + config.value_dim) / 2 * row_tokens
    index = None if config.latent is None or kind.taken_choice else config.latent.index
    if index is not None and row_tokens > index.top_k:
        found += index.heads * index.head_dim / 6 * row_tokens
    return found + mamba


def peak_flops(devices: int) -> float:
    """Return the peak FLOP/s of this number of devices together; 0 if unknown."""
    kind = jax.devices()[0].device_kind
    return next((peak * devices for name, peak in PEAK_FLOPS.items() if kind.startswith(name)), 0.0)
