"""Golden values of Gemma 4's text model (see goldens.py), alone and inside the model with eyes.

python tests/golden/make_gemma4.py
"""

from typing import Any

import torch
from goldens import EAGER, HERE, SIZES, TOKENS, forward, hook_norm, make_model, packed_forward, randomize
from safetensors.torch import save_file
from transformers import Gemma4Config, Gemma4ForCausalLM, Gemma4ForConditionalGeneration, Gemma4TextConfig

SLIDING, FULL = "sliding_attention", "full_attention"
ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 20.0},
    FULL: {"rope_type": "proportional", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
}
# The root of 42, by which embeddings are multiplied, is no number of bfloat16. Rotated are 3 of 7 pairs of a wide head.
TEXT = SIZES | {
    "hidden_size": 42,
    "sliding_window": 5,
    "global_head_dim": 14,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 3.0,
    "rope_parameters": ROPE,
}
MODELS = {
    "gemma4_text": Gemma4TextConfig(
        **TEXT | {"num_hidden_layers": 4}, layer_types=[SLIDING, FULL] * 2, attention_bias=True
    ),
    # Values that are keys, three heads of them, and experts beside the dense MLP.
    "gemma4_text_moe": Gemma4TextConfig(
        **TEXT,
        layer_types=[SLIDING, SLIDING, FULL],
        attention_k_eq_v=True,
        num_global_key_value_heads=3,
        enable_moe_block=True,
        num_experts=7,
        top_k_experts=3,
        moe_intermediate_size=14,
        tie_word_embeddings=False,
    ),
    # As E2B: inputs for each block, and blocks with wider MLPs that take keys and values over, of both kinds.
    "gemma4_text_shared": Gemma4TextConfig(
        **TEXT
        | {
            "num_hidden_layers": 5,
            # Wide enough that no token's gates are all closed: the norm behind them would bring up their last digits.
            "hidden_size_per_layer_input": 13,
            "vocab_size_per_layer_input": 63,
            "num_kv_shared_layers": 3,
        },
        layer_types=[SLIDING, FULL, SLIDING, SLIDING, FULL],
        use_double_wide_mlp=True,
    ),
}
SEEING = Gemma4Config(
    text_config=Gemma4TextConfig(
        **TEXT | {"num_hidden_layers": 2},
        layer_types=[SLIDING, FULL],
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        num_kv_shared_layers=0,
    ),
    vision_config=None,
    audio_config=None,
)
ADDED = hook_norm("post_attention_layernorm")


def hook_experts(layer: torch.nn.Module, record: Any) -> Any:
    """Experts lie beside the MLP."""
    experts = getattr(layer, "experts", None)
    return experts and experts.register_forward_pre_hook(lambda _, args: record(args[1]))


def fill_scales(model: torch.nn.Module) -> None:
    """The number that scales a block's stream is a buffer."""
    for layer in getattr(model, "model", model).layers:
        layer.layer_scalar.copy_(0.5 + torch.rand(1))


def main() -> None:
    for seed, (name, config) in enumerate(MODELS.items(), 750):
        make_model(name, config, seed, hook_experts=hook_experts, hook_added=ADDED, finish=fill_scales)
    make_seeing("gemma4", SEEING, 760)


def make_seeing(name: str, config: Gemma4Config, seed: int) -> None:
    """One directory: the checkpoint of the whole model, and the expected values of its language model."""
    torch.manual_seed(seed)
    target = HERE / name
    model = Gemma4ForConditionalGeneration(config)
    randomize(model)
    model.to(torch.bfloat16)
    fill_scales(model.model.language_model)
    model.save_pretrained(target)
    (target / "generation_config.json").unlink(missing_ok=True)
    whole = Gemma4ForConditionalGeneration.from_pretrained(target, dtype=torch.float32, **EAGER).eval()
    text = Gemma4ForCausalLM._from_config(whole.config.text_config, **EAGER).eval()
    text.model.load_state_dict(whole.model.language_model.state_dict())
    vocab_size = config.text_config.vocab_size
    expected = forward(text, torch.randint(0, vocab_size, (1, TOKENS)), hook_added=ADDED)
    expected |= packed_forward(text, vocab_size, hook_added=ADDED)
    save_file({key: value.contiguous() for key, value in expected.items()}, target / "expected.safetensors")


if __name__ == "__main__":
    main()
