"""Golden values of Qwen3-Next and Qwen3.5, and of the text models inside the vision-language ones (see goldens.py).

python tests/golden/make_qwen_hybrid.py
"""

from types import SimpleNamespace

import torch
from goldens import EAGER, HERE, SIZES, TOKENS, forward, hook_mixer, make_model, packed_forward, randomize
from safetensors.torch import save_file
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

LINEAR, FULL = "linear_attention", "full_attention"
# Tokens of a row: more than a chunk of the delta rule.
LONG = {"qwen3_next": 72, "qwen3_5_text": 72}
# A theta of 100 spreads the wavelengths over the tokens; at 10,000 half of the angles would hardly move.
ROPE = {"rope_type": "default", "rope_theta": 100.0}
QUARTER = ROPE | {"partial_rotary_factor": 0.25}
HEADS = {"head_dim": 16}  # of which 4 are rotated
DELTA = {
    # A document's first tokens have ill-conditioned outputs: a value times a key's product with a query, which may be
    # near zero, and then a norm. With an epsilon of 1e-5 transformers' float32 would differ from its float64 by 1e-4.
    "rms_norm_eps": 1e-3,
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 7,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
}
EXPERTS = {
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 14,
    "shared_expert_intermediate_size": 22,
}
# Seeds with which transformers' gradients in float32 are within 2.5e-5 of those in float64, and values do not depend on
# the processor by more than 4e-6 of the largest.
SEEDS = {"qwen3_next": 1010, "qwen3_next_plain": 1054, "qwen3_5_text": 1012, "qwen3_5_moe_text": 1013}
SPARSE = {key: size for key, size in SIZES.items() if key != "intermediate_size"}
TEXT: dict[str, PreTrainedConfig] = {
    # Attention in block 1, a dense MLP in block 2, biases.
    "qwen3_next": Qwen3NextConfig(
        **SIZES | HEADS | DELTA | EXPERTS,
        layer_types=[LINEAR, FULL, LINEAR],
        mlp_only_layers=[2],
        norm_topk_prob=False,
        attention_bias=True,
        rope_parameters=QUARTER,
    ),
    # Four blocks, of which the last has attention, as no key says; a head is rotated as a whole.
    "qwen3_next_plain": Qwen3NextConfig(
        **SIZES | DELTA | EXPERTS | {"num_hidden_layers": 4, "linear_num_value_heads": 2},
        tie_word_embeddings=True,
        hidden_act="gelu",
        rope_parameters=ROPE | {"partial_rotary_factor": 1.0},
    ),
    "qwen3_5_text": Qwen3_5TextConfig(
        **SIZES | HEADS | DELTA, layer_types=[LINEAR, FULL, LINEAR], rope_parameters=QUARTER
    ),
    "qwen3_5_moe_text": Qwen3_5MoeTextConfig(
        **SPARSE | HEADS | DELTA | EXPERTS, layer_types=[LINEAR, FULL, LINEAR], rope_parameters=QUARTER
    ),
}
# Of the vision tower nothing is read.
VISION = {
    "depth": 1,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": SIZES["hidden_size"],
    "num_position_embeddings": 16,
    "patch_size": 2,
}
MROPE = {"mrope_section": [1, 1, 0], "mrope_interleaved": True}
SEEING: dict[str, tuple[type[PreTrainedModel], PreTrainedConfig]] = {
    "qwen3_5": (
        Qwen3_5ForConditionalGeneration,
        Qwen3_5Config(
            text_config=SIZES
            | HEADS
            | DELTA
            | {"layer_types": [LINEAR, FULL, LINEAR], "rope_parameters": QUARTER | MROPE},
            vision_config=VISION,
        ),
    ),
    "qwen3_5_moe": (
        Qwen3_5MoeForConditionalGeneration,
        Qwen3_5MoeConfig(
            text_config=SPARSE
            | HEADS
            | DELTA
            | EXPERTS
            | {"num_hidden_layers": 2, "layer_types": [LINEAR, FULL], "rope_parameters": QUARTER | MROPE},
            vision_config=VISION,
        ),
    ),
    "qwen3_vl": (
        Qwen3VLForConditionalGeneration,
        Qwen3VLConfig(
            text_config=SIZES | {"num_hidden_layers": 2, "attention_bias": True, "rope_parameters": ROPE | MROPE},
            vision_config=VISION | {"deepstack_visual_indexes": [0]},
            tie_word_embeddings=True,
        ),
    ),
    "qwen3_vl_moe": (
        Qwen3VLMoeForConditionalGeneration,
        Qwen3VLMoeConfig(
            text_config=SIZES
            | {key: EXPERTS[key] for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size")}
            | {"mlp_only_layers": [1], "rope_parameters": ROPE | MROPE},
            vision_config=VISION | {"deepstack_visual_indexes": [0]},
        ),
    ),
}


def settle(model: torch.nn.Module) -> None:
    """Rates of decay of about 0.1, so that a state remembers tens of tokens; norms that add 1 to their weights have
    weights around 0."""
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.data.sub_(2.0)
        elif "norm" in name and "linear_attn" not in name and "visual" not in name:
            parameter.data.sub_(1.0)


class TextModel(torch.nn.Module):
    """The text model of a vision-language model, and its head."""

    def __init__(self, whole: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.lm_head = whole.model.language_model, whole.lm_head

    def forward(self, tokens: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=self.lm_head(self.model(tokens, use_cache=use_cache).last_hidden_state))


def make_seeing(name: str, kind: type[PreTrainedModel], config: PreTrainedConfig, seed: int) -> None:
    """One directory: the checkpoint of the whole model, and the expected values of its text model."""
    torch.manual_seed(seed)
    target = HERE / name
    model = kind(config)
    randomize(model)
    if name.startswith("qwen3_5"):
        settle(model)
    model.to(torch.bfloat16)
    model.save_pretrained(target)
    (target / "generation_config.json").unlink(missing_ok=True)
    text = TextModel(kind.from_pretrained(target, dtype=torch.float32, **EAGER).eval())
    expected = forward(text, torch.randint(0, SIZES["vocab_size"], (1, TOKENS)), hook_added=hook_mixer)
    expected |= packed_forward(text, SIZES["vocab_size"], hook_added=hook_mixer)
    save_file({key: value.contiguous() for key, value in expected.items()}, target / "expected.safetensors")


def main() -> None:
    for name, config in TEXT.items():
        make_model(name, config, SEEDS[name], hook_added=hook_mixer, finish=settle, tokens=LONG.get(name, TOKENS))
    for seed, (name, (kind, config)) in enumerate(SEEING.items(), 1100):
        make_seeing(name, kind, config, seed)


if __name__ == "__main__":
    main()
