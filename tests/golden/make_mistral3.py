"""Golden values of Mistral 3, a model with eyes, of the text models inside it, and of these alone (see goldens.py).

python tests/golden/make_mistral3.py
"""

import torch
from goldens import EAGER, HERE, SIZES, TOKENS, forward, make_model, packed_forward, randomize
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Mistral4Config,
    Mistral4ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

ROPE = {"rope_type": "default", "rope_theta": 100.0}
# Queries grow at every seventh or eighth token.
YARN = ROPE | {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 7,
    "max_position_embeddings": 64,
    "llama_4_scaling_beta": 0.7,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
GROWING = ROPE | {"original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.4}
LATENT = {key: size for key, size in SIZES.items() if key not in ("head_dim", "num_key_value_heads")} | {
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 8,
    "v_head_dim": 7,
    "moe_intermediate_size": 14,
    "num_key_value_heads": 6,
}
SHORT = {"num_hidden_layers": 2}
VISION = {
    "model_type": "pixtral",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 4,
    "intermediate_size": 16,
    "image_size": 4,
    "patch_size": 2,
}
TEXTS = {
    # A window, tied embeddings, a scaling that changes amplitudes.
    "ministral3": Ministral3Config(
        **SIZES,
        sliding_window=5,
        tie_word_embeddings=True,
        rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 1.9},
    ),
    # As Mistral Small 4, with a dense block, groups of experts and biases.
    "mistral4": Mistral4Config(
        **LATENT,
        q_lora_rank=11,
        n_routed_experts=12,
        num_experts_per_tok=3,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        routed_scaling_factor=1.7,
        attention_bias=True,
        rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 1.9},
    ),
    # Queries from the stream, halves rotated, one group, weights of experts as they are.
    "mistral4_plain": Mistral4Config(
        **LATENT | SHORT,
        q_lora_rank=None,
        n_routed_experts=7,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        rope_interleave=False,
        tie_word_embeddings=True,
        rope_parameters=YARN | {"llama_4_scaling_beta": 0.0},
    ),
}
# Of the vision part nothing is read.
SEEING = {
    "mistral3": (
        MistralForCausalLM,
        MistralConfig(**SIZES | SHORT, sliding_window=None, rope_parameters=ROPE, tie_word_embeddings=False),
    ),
    "mistral3_ministral3": (Ministral3ForCausalLM, Ministral3Config(**SIZES | SHORT, rope_parameters=GROWING)),
    "mistral3_mistral4": (
        Mistral4ForCausalLM,
        Mistral4Config(**LATENT | SHORT, q_lora_rank=11, n_routed_experts=7, rope_parameters=YARN),
    ),
}


def main() -> None:
    for seed, (name, (kind, config)) in enumerate(SEEING.items(), 650):
        make_seeing(name, kind, config, seed)
    for seed, (name, config) in enumerate(TEXTS.items(), 660):
        make_model(name, config, seed, kind=Mistral4ForCausalLM if "4" in name else AutoModelForCausalLM)


def make_seeing(name: str, kind: type, config: MistralConfig, seed: int) -> None:
    """One directory: the checkpoint of the whole model, and the expected values of its language model."""
    torch.manual_seed(seed)
    target = HERE / name
    whole_config = Mistral3Config(text_config=config, vision_config=VISION, tie_word_embeddings=False)
    model = Mistral3ForConditionalGeneration(whole_config)
    randomize(model)
    model.to(torch.bfloat16).save_pretrained(target)
    (target / "generation_config.json").unlink(missing_ok=True)
    whole = Mistral3ForConditionalGeneration.from_pretrained(target, dtype=torch.float32, **EAGER).eval()
    text = kind._from_config(whole.config.text_config, **EAGER).eval()
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    expected = forward(text, torch.randint(0, SIZES["vocab_size"], (1, TOKENS)))
    expected |= packed_forward(text, SIZES["vocab_size"])
    save_file({key: value.contiguous() for key, value in expected.items()}, target / "expected.safetensors")


if __name__ == "__main__":
    main()
