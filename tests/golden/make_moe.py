"""Golden values of mixtures of experts (see goldens.py): Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, GraniteMoE.

python tests/golden/make_moe.py
"""

from goldens import SIZES, hook_attention, hook_scaled, make_model
from transformers import GraniteMoeConfig, MixtralConfig, OlmoeConfig, PreTrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

SLIDING, FULL = "sliding_attention", "full_attention"
# A theta of 100 spreads the wavelengths over the 24 tokens; at 10,000 half of the angles would hardly move.
ROPE = {"rope_type": "default", "rope_theta": 100.0}
EXPERTS = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 14, "rope_parameters": ROPE}

MODELS: dict[str, PreTrainedConfig] = {
    "mixtral": MixtralConfig(
        **SIZES | {"intermediate_size": 22},
        num_local_experts=5,
        num_experts_per_tok=2,
        sliding_window=7,
        router_jitter_noise=0.1,  # in training only
        rope_parameters=ROPE,
    ),
    # Experts in blocks 1 and 5.
    "qwen2_moe": Qwen2MoeConfig(
        **SIZES | EXPERTS | {"num_hidden_layers": 6},
        shared_expert_intermediate_size=22,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        use_sliding_window=True,
        sliding_window=5,
        layer_types=[SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING],
        norm_topk_prob=True,
        hidden_act="gelu",
    ),
    # Experts in blocks 1 and 5.
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES | EXPERTS | {"num_hidden_layers": 6},
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        use_sliding_window=True,
        sliding_window=5,
        norm_topk_prob=True,
        attention_bias=True,
    ),
    "qwen3_moe_plain": Qwen3MoeConfig(**SIZES | EXPERTS | {"num_hidden_layers": 2}, tie_word_embeddings=True),
    # The head's width is the hidden size over the query heads. About a third of what is clipped exceeds 1.
    "olmoe": OlmoeConfig(
        **{key: size for key, size in SIZES.items() if key != "head_dim"}
        | {"hidden_size": 48, "intermediate_size": 14},
        num_experts=7,
        num_experts_per_tok=3,
        clip_qkv=1.0,
        attention_bias=True,
        rope_parameters=ROPE,
    ),
    "granitemoe": GraniteMoeConfig(
        **SIZES | {"num_hidden_layers": 2, "intermediate_size": 14},
        num_local_experts=7,
        num_experts_per_tok=3,
        attention_bias=True,
        embedding_multiplier=1.7,
        residual_multiplier=0.6,
        attention_multiplier=0.2,
        logits_scaling=3.0,
        tie_word_embeddings=True,
        rope_parameters=ROPE,
    ),
}


def main() -> None:
    for seed, (name, config) in enumerate(MODELS.items(), 100):
        make_model(name, config, seed, hook_added=hook_scaled if name == "granitemoe" else hook_attention)


if __name__ == "__main__":
    main()
