"""Golden values of GLM's mixture of experts (see goldens.py).

python tests/golden/make_glm.py
"""

from goldens import SIZES, fill_biases, make_model
from transformers import Glm4MoeConfig

# A theta of 100 spreads the wavelengths over the 24 tokens; at 10,000 half of the angles would hardly move.
ROPE = {"rope_type": "default", "rope_theta": 100.0}

MODELS: dict[str, Glm4MoeConfig] = {
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
}


def main() -> None:
    for seed, (name, config) in enumerate(MODELS.items(), 300):
        make_model(name, config, seed, finish=fill_biases)


if __name__ == "__main__":
    main()
