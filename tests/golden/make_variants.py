"""Golden values of families that are Llama's parts in another order (see goldens.py): Seed-OSS, ERNIE 4.5, Hunyuan, ...

python tests/golden/make_variants.py
"""

import torch
from goldens import SIZES, HookAdded, fill_biases, hook_attention, hook_norm, make_model
from transformers import (
    ApertusConfig,
    Cohere2Config,
    Dots1Config,
    Ernie4_5_MoeConfig,
    Ernie4_5Config,
    Exaone4Config,
    FlexOlmoConfig,
    HunYuanDenseV1Config,
    HunYuanMoEV1Config,
    PreTrainedConfig,
    SeedOssConfig,
    SolarOpenConfig,
)

SLIDING, FULL = "sliding_attention", "full_attention"
# A theta of 100 spreads the wavelengths over the 24 tokens; at 10,000 half of the angles would hardly move.
ROPE = {"rope_type": "default", "rope_theta": 100.0}
STRETCHED = {"rope_type": "dynamic", "rope_theta": 50.0, "factor": 1.0, "alpha": 2.0}
SHORT = SIZES | {"num_hidden_layers": 2}
GROUPS = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 10,
    "n_shared_experts": 2,
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "attention_bias": True,
    "rope_parameters": ROPE,
}

MODELS: dict[str, PreTrainedConfig] = {
    "seed_oss": SeedOssConfig(
        **SHORT, attention_bias=True, attention_out_bias=True, mlp_bias=True, rope_parameters=ROPE
    ),
    "ernie4_5": Ernie4_5Config(**SHORT, use_bias=True, rope_parameters=ROPE),
    # Experts in block 1 alone.
    "ernie4_5_moe": Ernie4_5_MoeConfig(
        **SIZES,
        moe_num_experts=7,
        moe_k=3,
        moe_intermediate_size=14,
        moe_layer_start_index=1,
        moe_layer_end_index=1,
        tie_word_embeddings=False,
        rope_parameters=ROPE,
    ),
    "hunyuan_v1_dense": HunYuanDenseV1Config(**SHORT, attention_bias=True, rope_parameters=STRETCHED),
    "hunyuan_v1_moe": HunYuanMoEV1Config(
        **SHORT | {"intermediate_size": 14}, num_experts=7, moe_topk=3, tie_word_embeddings=True, rope_parameters=ROPE
    ),
    # Blocks 0 and 2 have a window and positions, block 1 has neither.
    "exaone4": Exaone4Config(**SIZES, sliding_window=5, layer_types=[SLIDING, FULL, SLIDING], rope_parameters=ROPE),
    # One dense block, and a window in the last.
    "dots1": Dots1Config(
        **SIZES | GROUPS, first_k_dense_replace=1, norm_topk_prob=True, sliding_window=5, max_window_layers=2
    ),
    "solar_open": SolarOpenConfig(
        **{key: size for key, size in SHORT.items() if key != "intermediate_size"} | GROUPS, norm_topk_prob=False
    ),
    "flex_olmo": FlexOlmoConfig(
        **{key: size for key, size in SHORT.items() if key != "head_dim"}
        | {"hidden_size": 48, "intermediate_size": 14},
        num_experts=7,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        attention_bias=True,
        pad_token_id=None,
        eos_token_id=None,
        rope_parameters=ROPE,
    ),
    "apertus": ApertusConfig(**SHORT, attention_bias=True, rope_parameters=ROPE),
    # Blocks 0 and 2 have a window and positions, block 1 has neither.
    "cohere2": Cohere2Config(
        **{key: size for key, size in SIZES.items() if key not in ("head_dim", "rms_norm_eps")} | {"hidden_size": 48},
        layer_norm_eps=1e-5,
        logit_scale=0.3,
        attention_bias=True,
        sliding_window=5,
        layer_types=[SLIDING, FULL, SLIDING],
        bos_token_id=None,
        eos_token_id=None,
        rope_parameters=ROPE,
    ),
}
HOOKS: dict[str, HookAdded] = {
    "exaone4": hook_norm("post_attention_layernorm"),
    "flex_olmo": hook_norm("post_attention_layernorm"),
}


def fill_statics(model: torch.nn.Module) -> None:
    """Biases of ERNIE's choice, float32 in every file; of probabilities around 1/7."""
    for layer in model.model.layers:
        gate = getattr(layer.mlp, "gate", None)
        if gate is not None:
            gate.moe_statics.e_score_correction_bias.data = 0.1 * torch.randn(1, gate.num_experts)


FINISH = {"ernie4_5_moe": fill_statics, "dots1": fill_biases, "solar_open": fill_biases}


def main() -> None:
    for seed, (name, config) in enumerate(MODELS.items(), 913):
        make_model(
            name, config, seed, hook_added=HOOKS.get(name, hook_attention), finish=FINISH.get(name, lambda _: None)
        )


if __name__ == "__main__":
    main()
