"""Golden values of the decoder, from HF transformers: run by hand, in an environment with the `parity` extra.

    python tests/golden/make_llama.py

Writes beside itself, for each model below, a directory with `config.json` and `model.safetensors` as transformers
saves them, and `expected.safetensors`: `tokens` [B, T], `attn_out` [L, B, T, D], `resid` [L + 1, B, T, D] and `logits`
[B, T, V] of its own forward pass in float32. `rope.json` has the rotary frequencies and amplitudes of many settings.

The sizes are odd on purpose: no two axes are equal, so a swapped axis cannot pass. Weights are much larger than at a
usual initialisation, so that attention is far from uniform and a wrong rotation shows. They are stored in bfloat16
where that keeps the repository small; the forward pass is float32 all the same.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

HERE = Path(__file__).parent
BATCH, TOKENS = 2, 24
SIZES = {
    "vocab_size": 61,
    "hidden_size": 36,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
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
BFLOAT16 = [name for name in MODELS if name != "llama_bias"]

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


def randomize(model: torch.nn.Module) -> None:
    """Norm weights around 1, biases of 0.3, matrices that keep the scale of what goes through them."""
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if "norm" in name:
            value = 1 + 0.2 * noise
        elif parameter.ndim == 1:
            value = 0.3 * noise
        else:
            value = noise * (1.0 if "embed" in name else 1.3 * parameter.shape[1] ** -0.5)
        parameter.data.copy_(value)


def forward(model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The logits, and what goes through the blocks, by hooks on the layers."""
    attn_out, resid = [], []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda _, __, out: attn_out.append(out[0]))
        layer.register_forward_pre_hook(lambda _, args: resid.append(args[0]))
    last = model.model.layers[-1]
    last.register_forward_hook(lambda _, __, out: resid.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    return {"tokens": tokens, "attn_out": torch.stack(attn_out), "resid": torch.stack(resid), "logits": logits}


def make_model(name: str, config: PreTrainedConfig, seed: int) -> None:
    """One directory: checkpoint and expected values."""
    torch.manual_seed(seed)
    target = HERE / name
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomize(model)
    model.to(torch.bfloat16 if name in BFLOAT16 else torch.float32).save_pretrained(target)
    (target / "generation_config.json").unlink(missing_ok=True)
    # From the files, so that the frequencies, which `to` would round as well, are computed anew in float32.
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = torch.randint(0, config.vocab_size, (BATCH, TOKENS))
    expected = {key: value.contiguous() for key, value in forward(loaded, tokens).items()}
    save_file(expected, target / "expected.safetensors")


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
        make_model(name, config, seed)
    ropes = {name: rope_values(parameters) for name, parameters in ROPES.items()}
    (HERE / "rope.json").write_text(json.dumps(ropes, indent=1) + "\n")


if __name__ == "__main__":
    main()
