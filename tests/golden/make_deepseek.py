"""Golden values of DeepSeek-V3 (see goldens.py).

python tests/golden/make_deepseek.py
"""

from goldens import SIZES as ALL_SIZES
from goldens import fill_biases, make_model
from transformers import DeepseekV3Config

SIZES = {key: size for key, size in ALL_SIZES.items() if key not in ("head_dim", "num_key_value_heads")}
HEADS = {"num_key_value_heads": 6}
MOE = {"moe_intermediate_size": 14, "num_mtp_layers": 0}
ROPE = {"rope_type": "default", "rope_theta": 100.0}
YARN = ROPE | {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 1.9,
}
MODELS: dict[str, DeepseekV3Config] = {
    # As V3: queries from narrow vectors, neighbours rotated, two of four groups kept, one dense block.
    "deepseek_v3": DeepseekV3Config(
        **SIZES | HEADS | MOE,
        q_lora_rank=11,
        kv_lora_rank=10,
        qk_nope_head_dim=5,
        qk_rope_head_dim=8,
        v_head_dim=7,
        n_routed_experts=12,
        num_experts_per_tok=3,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        attention_bias=True,
        rope_parameters=YARN,
    ),
    # As Moonlight: queries from the stream, one group. Values as wide as keys, halves rotated.
    "deepseek_v3_plain": DeepseekV3Config(
        **SIZES | HEADS | MOE | {"num_hidden_layers": 2},
        q_lora_rank=None,
        kv_lora_rank=10,
        qk_nope_head_dim=3,
        qk_rope_head_dim=4,
        v_head_dim=7,
        n_routed_experts=7,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        norm_topk_prob=False,
        rope_interleave=False,
        tie_word_embeddings=True,
        rope_parameters=ROPE,
    ),
}


def main() -> None:
    for seed, (name, config) in enumerate(MODELS.items(), 800):
        make_model(name, config, seed, finish=fill_biases)


if __name__ == "__main__":
    main()
