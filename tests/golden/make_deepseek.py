"""Golden values of DeepSeek-V2, V3.2 and V3, the last alone and inside Kimi K2.5 (see goldens.py).

python tests/golden/make_deepseek.py
"""

import torch
from goldens import EAGER, HERE, TOKENS, fill_biases, forward, make_model, packed_forward, randomize
from goldens import SIZES as ALL_SIZES
from safetensors.torch import save_file
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    Kimi_K25Config,
    Kimi_K25ForConditionalGeneration,
    PreTrainedConfig,
)

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
NARROW = {
    "q_lora_rank": 11,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 8,
    "v_head_dim": 7,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 14,
    "num_hidden_layers": 2,
}
GROUPS = {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}
MODELS: dict[str, PreTrainedConfig] = {
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
    # As V2: groups rank by their best expert.
    "deepseek_v2": DeepseekV2Config(
        **SIZES | HEADS | NARROW | GROUPS | {"qk_nope_head_dim": 6},  # torch's complex numbers need an even one
        topk_method="group_limited_greedy",
        routed_scaling_factor=4.0,
        attention_bias=True,
        rope_parameters=YARN,
    ),
    # A query attends to six keys.
    "deepseek_v32": DeepseekV32Config(
        **SIZES | HEADS | NARROW | GROUPS,
        index_topk=6,
        index_n_heads=9,
        index_head_dim=12,
        attention_bias=True,
        rope_parameters=YARN,
    ),
}
# Of the vision part nothing is read.
SEEING = Kimi_K25Config(
    text_config=DeepseekV3Config(
        **SIZES | HEADS | MOE | {"num_hidden_layers": 2},
        q_lora_rank=11,
        kv_lora_rank=10,
        qk_nope_head_dim=5,
        qk_rope_head_dim=8,
        v_head_dim=7,
        n_routed_experts=7,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        rope_parameters=YARN,
        tie_word_embeddings=False,
    ),
    vision_config={
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "patch_size": 2,
        "pos_emb_height": 4,
        "pos_emb_width": 4,
    },
    projection_hidden_size=16,
    tie_word_embeddings=False,
)


def main() -> None:
    for seed, (name, config) in enumerate(MODELS.items(), 800):
        make_model(name, config, seed, finish=fill_biases if "v2" not in name else lambda _: None)
    make_seeing("kimi_k25", SEEING, 810)


def make_seeing(name: str, config: Kimi_K25Config, seed: int) -> None:
    """One directory: the checkpoint of the whole model, and the expected values of its language model."""
    torch.manual_seed(seed)
    target = HERE / name
    model = Kimi_K25ForConditionalGeneration._from_config(config, **EAGER)
    randomize(model)
    model.to(torch.bfloat16)
    fill_biases(model.model.language_model)
    model.save_pretrained(target)
    (target / "generation_config.json").unlink(missing_ok=True)
    whole = Kimi_K25ForConditionalGeneration.from_pretrained(target, dtype=torch.float32, **EAGER).eval()
    text = DeepseekV3ForCausalLM._from_config(whole.config.text_config, **EAGER).eval()
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    vocab_size = config.text_config.vocab_size
    expected = forward(text, torch.randint(0, vocab_size, (1, TOKENS)))
    expected |= packed_forward(text, vocab_size)
    save_file({key: value.contiguous() for key, value in expected.items()}, target / "expected.safetensors")


if __name__ == "__main__":
    main()
