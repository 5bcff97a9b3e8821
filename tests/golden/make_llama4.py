"""Golden values of Llama 4's language model (see goldens.py), alone and inside the model with eyes.

python tests/golden/make_llama4.py
"""

from collections.abc import Callable
from typing import Any

import torch
from goldens import EAGER, HERE, SIZES, TOKENS, forward, make_model, packed_forward, randomize
from safetensors.torch import save_file
from transformers import Llama4Config, Llama4ForConditionalGeneration, Llama4TextConfig, Llama4VisionConfig

CHUNKED, FULL = "chunked_attention", "full_attention"
# A theta of 100 spreads the wavelengths over the 24 tokens: 6, 20, 63 and 199 of them.
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0}
MOE = {"intermediate_size": 14, "intermediate_size_mlp": 22, "num_local_experts": 5}

MODELS: dict[str, Llama4TextConfig] = {
    # As Scout and Maverick: rotary, rotary with experts, without positions, rotary with experts. The scaling is a step
    # that slows the last two wavelengths; the temperature has five values up to the 24th token.
    "llama4": Llama4TextConfig(
        **SIZES | MOE | {"num_hidden_layers": 4},
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        no_rope_layer_interval=3,
        attention_chunk_size=5,
        floor_scale=5,
        attn_scale=0.7,
        rope_parameters=LLAMA3 | {"high_freq_factor": 1.0, "original_max_position_embeddings": 32},
    ),
    # What the released models leave alone: biases, more than one expert, lists instead of steps, and chunks and
    # rotation that do not go together. No norms of queries and keys. The scaling blends the middle two wavelengths.
    "llama4_lists": Llama4TextConfig(
        **SIZES | MOE,
        num_experts_per_tok=3,
        moe_layers=[0, 2],
        no_rope_layers=[1, 0, 0],
        layer_types=[FULL, CHUNKED, FULL],
        attention_chunk_size=6,
        floor_scale=4,
        use_qk_norm=False,
        attention_bias=True,
        tie_word_embeddings=True,
        hidden_act="gelu",
        rope_parameters=LLAMA3 | {"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    ),
}

# No temperature. Of the vision part nothing is read.
MULTIMODAL = Llama4Config(
    text_config=Llama4TextConfig(
        **SIZES | MOE | {"num_hidden_layers": 2},
        num_experts_per_tok=2,
        interleave_moe_layer_step=2,
        no_rope_layer_interval=2,
        attention_chunk_size=5,
        attn_temperature_tuning=False,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    ),
    vision_config=Llama4VisionConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=4,
        patch_size=2,
        vision_output_dim=6,
        projector_input_dim=6,
        projector_output_dim=6,
    ),
)


def hook_experts(layer: torch.nn.Module, record: Callable[[torch.Tensor], None]) -> Any:
    """The router returns what multiplies every expert's input, and its logits."""
    router = getattr(layer.feed_forward, "router", None)
    return router and router.register_forward_hook(
        lambda module, _, out: record(torch.topk(out[1], module.top_k, dim=1).indices)
    )


def make_multimodal(name: str, config: Llama4Config, seed: int) -> None:
    """One directory: the checkpoint of the whole model, and the expected values of its language model."""
    torch.manual_seed(seed)
    target = HERE / name
    model = Llama4ForConditionalGeneration(config)
    randomize(model)
    model.to(torch.bfloat16).save_pretrained(target)
    (target / "generation_config.json").unlink(missing_ok=True)
    loaded = Llama4ForConditionalGeneration.from_pretrained(target, dtype=torch.float32, **EAGER).eval().language_model
    vocab_size = config.text_config.vocab_size
    expected = forward(loaded, torch.randint(0, vocab_size, (1, TOKENS)), hook_experts)
    expected |= packed_forward(loaded, vocab_size, hook_experts)
    save_file({key: value.contiguous() for key, value in expected.items()}, target / "expected.safetensors")


def main() -> None:
    for seed, (name, config) in enumerate(MODELS.items(), 400):
        make_model(name, config, seed, hook_experts=hook_experts)
    make_multimodal("llama4_multimodal", MULTIMODAL, 499)


if __name__ == "__main__":
    main()
