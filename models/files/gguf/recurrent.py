"""Blocks with the gated delta rule in GGUF files: names of their tensors, and what llama.cpp's converter does to them.

- Value heads are dealt out: the first of every key head, then the second of every key head, and so on. In HF those of a
  key head are neighbours.
- The convolution's axis of one entry is left out.

Source: llama.cpp `convert_hf_to_gguf.py` (Qwen3NextModel, _LinearAttentionVReorderBase, Qwen3_5TextModel,
Qwen3_5MoeTextModel).
"""

import numpy as np

from distillcache.models.config import DeltaConfig

NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
# Whole names behind a block's number, where HF's have no such ending.
WHOLE_NAMES = {"ssm_a": "linear_attn.A_log", "ssm_dt.bias": "linear_attn.dt_bias"}
RULE_NORM, CONVOLUTION = "linear_attn.norm.weight", "linear_attn.conv1d.weight"
A_LOG = "linear_attn.A_log"
BY_HEAD = ("linear_attn.in_proj_a.weight", "linear_attn.in_proj_b.weight", "linear_attn.dt_bias", A_LOG)


def as_in_hf(name: str, values: np.ndarray, delta: DeltaConfig) -> np.ndarray:
    """A tensor's numbers as HF has them, but for what norms add.

    Args:
        name: HF's. values: in HF's shape.
    """
    if name.endswith(BY_HEAD):
        return _grouped(values, 0, 1, delta)
    if name.endswith("linear_attn.in_proj_z.weight"):
        return _grouped(values, 0, delta.value_dim, delta)
    if name.endswith("linear_attn.out_proj.weight"):
        return _grouped(values, 1, delta.value_dim, delta)
    if name.endswith(("linear_attn.in_proj_qkv.weight", CONVOLUTION)):
        keys = 2 * delta.key_heads * delta.key_dim
        return np.concatenate([values[:keys], _grouped(values[keys:], 0, delta.value_dim, delta)])
    return values


def _grouped(values: np.ndarray, axis: int, width: int, delta: DeltaConfig) -> np.ndarray:
    """Value heads of this width along an axis, from dealt out to neighbours."""
    before, after = values.shape[:axis], values.shape[axis + 1 :]
    served = delta.value_heads // delta.key_heads
    dealt = values.reshape(*before, served, delta.key_heads, width, *after)
    return dealt.swapaxes(axis, axis + 1).reshape(values.shape)
