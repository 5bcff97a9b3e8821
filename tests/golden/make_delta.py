"""Golden values of OLMo Hybrid and Kimi Linear (see goldens.py).

python tests/golden/make_delta.py
"""

from typing import Any

import torch
from goldens import SIZES, fill_biases, hook_mixer, hook_norm, make_model
from transformers import KimiLinearConfig, OlmoHybridConfig, PreTrainedConfig

LINEAR, FULL = "linear_attention", "full_attention"
OLMO = {key: size for key, size in SIZES.items() if key != "head_dim"} | {
    "rms_norm_eps": 1e-3,
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 7,
    "pad_token_id": None,
    "eos_token_id": None,
}
KIMI = {key: size for key, size in SIZES.items() if key != "head_dim"} | {
    "hidden_size": 30,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
# A document's first tokens have ill-conditioned outputs: a value times a key's product with a query, which may be near
# zero, and then a norm with an epsilon that is fixed. With these seeds transformers' float32 differs from its own
# float64 by at most 2.3e-6 of the largest value, gradients by 7.6e-6; with others by up to 1e-5 and 1e-4.
SEEDS = {"olmo_hybrid": 1516, "olmo_hybrid_plain": 1501, "kimi_linear": 1520}
MODELS: dict[str, PreTrainedConfig] = {
    "olmo_hybrid": OlmoHybridConfig(
        **OLMO,
        layer_types=[LINEAR, FULL, LINEAR],
        linear_num_key_heads=2,
        linear_num_value_heads=6,
        attention_bias=True,
        hidden_act="gelu",
        # A theta of 100 spreads the wavelengths over the tokens; at 10,000 half of the angles would hardly move.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    ),
    # As the released files: without positions; the last block has attention, as no key says.
    "olmo_hybrid_plain": OlmoHybridConfig(
        **OLMO
        | {"hidden_size": 24, "num_hidden_layers": 2, "linear_key_head_dim": None, "linear_value_head_dim": None},
        linear_allow_neg_eigval=False,
        rope_parameters={"rope_theta": None},
    ),
    # A dense MLP in block 0.
    "kimi_linear": KimiLinearConfig(
        **KIMI,
        layer_types=[LINEAR, FULL, LINEAR],
        linear_head_dim=5,
        linear_num_heads=4,
        linear_conv_kernel_dim=3,
        q_lora_rank=10,
        kv_lora_rank=12,
        qk_nope_head_dim=8,
        qk_rope_head_dim=6,
        v_head_dim=7,
        attention_bias=True,
        num_local_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=9,
        n_shared_experts=2,
        n_group=2,
        topk_group=1,
    ),
}


def hook_added(layer: torch.nn.Module, record: Any) -> Any:
    """OLMo's blocks with attention have a norm between it and the stream."""
    olmo = hasattr(layer, "post_feedforward_layernorm")
    return (hook_norm("post_attention_layernorm") if olmo else hook_mixer)(layer, record)


def settle(model: torch.nn.Module) -> None:
    """Rates of decay of about 0.1, so that a state remembers tens of tokens."""
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.data.sub_(2.0)
    fill_biases(model)


def main() -> None:
    for name, config in MODELS.items():
        make_model(name, config, SEEDS[name], hook_added=hook_added, finish=settle)


if __name__ == "__main__":
    main()
