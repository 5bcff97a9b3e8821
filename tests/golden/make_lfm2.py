"""Golden values of LFM2 and LFM2-MoE (see goldens.py).

python tests/golden/make_lfm2.py
"""

import torch
from goldens import SIZES, hook_mixer, make_model
from transformers import Lfm2Config, Lfm2MoeConfig, PreTrainedConfig

CONV, FULL = "conv", "full_attention"
# A theta of 100 spreads the wavelengths over the 24 tokens; at 10,000 half of the angles would hardly move.
SHARED = {key: size for key, size in SIZES.items() if key != "rms_norm_eps"} | {
    "norm_eps": 1e-5,
    "conv_bias": True,
    "pad_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}
MODELS: dict[str, PreTrainedConfig] = {
    # Two thirds of 58, times 0.9, up to a multiple of 8: an MLP of 40 neurons.
    "lfm2": Lfm2Config(
        **SHARED | {"intermediate_size": 58},
        block_ffn_dim_multiplier=0.9,
        block_multiple_of=8,
        conv_L_cache=4,
        layer_types=[CONV, FULL, CONV],
    ),
    # Experts in blocks 1 and 2.
    "lfm2_moe": Lfm2MoeConfig(
        **SHARED,
        conv_L_cache=3,
        layer_types=[CONV, CONV, FULL],
        num_dense_layers=1,
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=10,
        routed_scaling_factor=1.7,
        tie_word_embeddings=False,
    ),
}


def settle(model: torch.nn.Module) -> None:
    """Biases of the choice are buffers, float32 in every file; 0.2 changes it for more than half of the tokens."""
    for layer in model.model.layers:
        if hasattr(layer.feed_forward, "expert_bias"):
            layer.feed_forward.expert_bias = 0.2 * torch.randn(layer.feed_forward.expert_bias.shape)


def main() -> None:
    for seed, (name, config) in enumerate(MODELS.items(), 1300):
        make_model(name, config, seed, hook_added=hook_mixer, finish=settle)


if __name__ == "__main__":
    main()
