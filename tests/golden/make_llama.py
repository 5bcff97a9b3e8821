"""Golden values of dense decoders (see goldens.py), and of rotary embeddings.

    python tests/golden/make_llama.py

`rope.json` has the rotary frequencies and amplitudes of many settings. No packed rows are stored here: the rows of
`tokens` are documents already, and a test packs them.
"""

import json

import torch
from goldens import HERE, SIZES, make_model
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2.0, "beta_slow": 0.05}

# A theta of 100 spreads the wavelengths over the 24 tokens; at 10,000 half of the angles would hardly move.
MODELS: dict[str, PreTrainedConfig] = {
    "llama_bias": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, hidden_act="gelu"),
    "llama_llama3": LlamaConfig(**SIZES, rope_parameters={"rope_type": "llama3", "rope_theta": 100.0, **LLAMA3}),
    "llama_linear": LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}),
    # 24 tokens are more than 16 positions: the frequencies do stretch.
    "llama_dynamic": LlamaConfig(
        **SIZES | {"max_position_embeddings": 16},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
    ),
    "llama_yarn": LlamaConfig(**SIZES, rope_parameters={"rope_type": "yarn", "rope_theta": 100.0, **YARN}),
    "llama_tied": LlamaConfig(
        **SIZES | {"head_dim": None, "num_key_value_heads": 3}, tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh"
    ),
    "mistral_window": MistralConfig(**SIZES | {"hidden_size": 40, "num_hidden_layers": 2}, sliding_window=7),
}
DTYPES = {"llama_bias": torch.float32}

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "default_1e6": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "llama3.1": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama3.2": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 4096},
    "yarn_exact": {"rope_type": "yarn", "rope_theta": 10000.0, **YARN, "truncate": False, "attention_factor": 1.25},
    "yarn_mscale": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 8192,
        "mscale": 0.707,
        "mscale_all_dim": 0.5,
    },
}


def rope_values(parameters: dict[str, object]) -> dict[str, object]:
    """Frequencies and amplitude of one setting, for heads of 64 and a longest position of 4,096."""
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=1, max_position_embeddings=4096, rope_parameters=dict(parameters)
    )
    rotary = LlamaRotaryEmbedding(config)
    return {
        "rope_parameters": parameters,
        "frequencies": rotary.inv_freq.double().tolist(),
        "amplitude": float(rotary.attention_scaling),
    }


def main() -> None:
    for seed, (name, config) in enumerate(MODELS.items()):
        make_model(name, config, seed, dtype=DTYPES.get(name, torch.bfloat16), packed=False)
    ropes = {name: rope_values(parameters) for name, parameters in ROPES.items()}
    (HERE / "rope.json").write_text(json.dumps(ropes, indent=1) + "\n")


if __name__ == "__main__":
    main()
