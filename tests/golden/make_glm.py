"""Golden values of GLM's families (see goldens.py).

python tests/golden/make_glm.py
"""

from goldens import SIZES, fill_biases, hook_attention, hook_norm, make_model
from transformers import Glm4Config, Glm4MoeConfig, Glm4MoeLiteConfig, GlmMoeDsaConfig, PreTrainedConfig

# A theta of 100 spreads the wavelengths over the 24 tokens; at 10,000 half of the angles would hardly move.
ROPE = {"rope_type": "default", "rope_theta": 100.0}

LATENT = {key: size for key, size in SIZES.items() if key not in ("head_dim", "num_key_value_heads")} | {
    "num_key_value_heads": 6,
    "q_lora_rank": 11,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 8,
    "v_head_dim": 7,
    "rope_parameters": dict(ROPE),  # a config of another family writes into what it is given
}
MODELS: dict[str, PreTrainedConfig] = {
    # One dense block. Heads of 12, of which 6 are rotated; two of four groups are kept.
    "glm4_moe": Glm4MoeConfig(
        **SIZES | {"head_dim": 12},
        n_routed_experts=12,
        num_experts_per_tok=3,
        moe_intermediate_size=14,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        first_k_dense_replace=1,
        use_qk_norm=True,
        attention_bias=True,
        rope_parameters=ROPE,
    ),
    # As GLM-4.5-Air: no norms of queries and keys, one group. Weights are sigmoids as they are.
    "glm4_moe_plain": Glm4MoeConfig(
        **SIZES | {"num_hidden_layers": 2},
        n_routed_experts=7,
        num_experts_per_tok=2,
        moe_intermediate_size=14,
        first_k_dense_replace=0,
        norm_topk_prob=False,
        num_mtp_layers=0,
        tie_word_embeddings=True,
        rope_parameters=ROPE | {"rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 1.0},
    ),
    # Heads of 12, of which 6 are rotated, neighbour with neighbour.
    "glm4": Glm4Config(
        **SIZES | {"head_dim": 12, "num_hidden_layers": 2},
        pad_token_id=None,
        rope_parameters=ROPE | {"partial_rotary_factor": 0.5},
    ),
    # As GLM-4.7-Flash, with experts in the first block.
    "glm4_moe_lite": Glm4MoeLiteConfig(
        **LATENT | {"num_hidden_layers": 2},
        mlp_layer_types=["sparse", "dense"],
        n_routed_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=14,
        n_shared_experts=2,
    ),
    # As GLM-5.2: the last block attends to the six keys that the block before it chose.
    "glm_moe_dsa": GlmMoeDsaConfig(
        **LATENT,
        mlp_layer_types=["sparse"] * 3,
        indexer_types=["full", "full", "shared"],
        index_topk=6,
        index_n_heads=9,
        index_head_dim=12,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=6,
    ),
}


def main() -> None:
    for seed, (name, config) in enumerate(MODELS.items(), 300):
        added = hook_norm("post_self_attn_layernorm") if name == "glm4" else hook_attention
        make_model(name, config, seed, finish=fill_biases, hook_added=added)


if __name__ == "__main__":
    main()
