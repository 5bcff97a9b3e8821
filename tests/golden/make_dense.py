"""Golden values of dense families beside Llama (see goldens.py): Qwen, SmolLM3, OLMo 2 and 3, Granite, Phi-3, ...

python tests/golden/make_dense.py
"""

from goldens import SIZES, HookAdded, hook_attention, hook_norm, hook_scaled, make_model
from transformers import (
    GraniteConfig,
    MinistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

SLIDING, FULL = "sliding_attention", "full_attention"
# A theta of 100 spreads the wavelengths over the 24 tokens; at 10,000 half of the angles would hardly move.
ROPE = {"rope_type": "default", "rope_theta": 100.0}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
WINDOW = {"use_sliding_window": True, "sliding_window": 5}
NO_PADDING = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}  # beyond the vocabulary by default
WITHOUT_WIDTH = {key: size for key, size in SIZES.items() if key != "head_dim"} | {"hidden_size": 48}

MODELS: dict[str, PreTrainedConfig] = {
    # A window from block 1 on.
    "qwen2": Qwen2Config(**WITHOUT_WIDTH, **WINDOW, max_window_layers=1, rope_parameters=YARN),
    "qwen3": Qwen3Config(
        **SIZES,
        **WINDOW,
        layer_types=[FULL, SLIDING, FULL],
        attention_bias=True,
        tie_word_embeddings=True,
        rope_parameters=ROPE,
    ),
    # Block 1 knows no positions and has a window.
    "smollm3": SmolLM3Config(
        **SIZES,
        **WINDOW,
        **NO_PADDING,
        no_rope_layer_interval=2,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=ROPE,
    ),
    "olmo2": Olmo2Config(**WITHOUT_WIDTH, **NO_PADDING, attention_bias=True, hidden_act="gelu", rope_parameters=ROPE),
    "olmo3": Olmo3Config(
        **WITHOUT_WIDTH,
        **NO_PADDING,
        sliding_window=5,
        layer_types=[SLIDING, FULL, SLIDING],
        rope_parameters={FULL: YARN, SLIDING: ROPE},
    ),
    "granite": GraniteConfig(
        **SIZES,
        attention_bias=True,
        mlp_bias=True,
        embedding_multiplier=1.7,
        residual_multiplier=0.6,
        attention_multiplier=0.2,
        logits_scaling=3.0,
        rope_parameters=ROPE,
    ),
    # Of heads of 8, 6 numbers are rotated. The packed row's documents lie on both sides of 10 positions.
    "phi3": Phi3Config(
        **WITHOUT_WIDTH,
        **NO_PADDING,
        original_max_position_embeddings=10,
        sliding_window=6,
        partial_rotary_factor=0.75,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "short_factor": [1.0, 1.25, 1.5],
            "long_factor": [1.5, 2.5, 6.0],
        },
    ),
    # Heads that are together wider than the stream, as those of cut students may be.
    "phi3_plain": Phi3Config(
        **SIZES | {"num_hidden_layers": 2}, **NO_PADDING, tie_word_embeddings=True, rope_parameters=ROPE
    ),
    "ministral": MinistralConfig(
        **SIZES, sliding_window=5, layer_types=[SLIDING, FULL, SLIDING], rope_parameters=ROPE, tie_word_embeddings=True
    ),
}


HOOKS: dict[str, HookAdded] = {
    "olmo2": hook_norm("post_attention_layernorm"),
    "olmo3": hook_norm("post_attention_layernorm"),
    "granite": hook_scaled,
}


def main() -> None:
    for seed, (name, config) in enumerate(MODELS.items(), 600):
        make_model(name, config, seed, hook_added=HOOKS.get(name, hook_attention))


if __name__ == "__main__":
    main()
