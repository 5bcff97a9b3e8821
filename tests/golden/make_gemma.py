"""Golden values of Gemma 1, 2 and 3 (see goldens.py), the last alone and inside the model with eyes.

python tests/golden/make_gemma.py
"""

import torch
from goldens import EAGER, HERE, SIZES, TOKENS, forward, hook_norm, make_model, packed_forward, randomize
from safetensors.torch import save_file
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    PreTrainedConfig,
)

SLIDING, FULL = "sliding_attention", "full_attention"
# The root of 42, by which embeddings are multiplied, is no number of bfloat16.
WIDTH = {"hidden_size": 42, "sliding_window": 5}
# Thetas that spread the wavelengths over the 24 tokens.
LOCAL, GLOBAL = {"rope_type": "default", "rope_theta": 20.0}, {"rope_type": "default", "rope_theta": 100.0}
LINEAR = GLOBAL | {"rope_type": "linear", "factor": 4.0}

MODELS: dict[str, PreTrainedConfig] = {
    # Scores reach beyond their cap of 2, logits beyond theirs.
    "gemma2": Gemma2Config(
        **SIZES | WIDTH,
        query_pre_attn_scalar=5,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        attention_bias=True,
        rope_parameters=GLOBAL,
    ),
    "gemma2_uncapped": Gemma2Config(
        **SIZES | WIDTH | {"num_hidden_layers": 2},
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        tie_word_embeddings=False,
        layer_types=[FULL, SLIDING],
        rope_parameters=GLOBAL,
    ),
    "gemma3_text": Gemma3TextConfig(
        **SIZES | WIDTH,
        query_pre_attn_scalar=7,
        final_logit_softcapping=3.0,
        attention_bias=True,
        sliding_window_pattern=2,
        rope_parameters={SLIDING: LOCAL, FULL: LINEAR},
    ),
}
# In which the output of attention is added as it is.
PLAIN = GemmaConfig(**SIZES | {"hidden_size": 42}, attention_bias=True, rope_parameters=LINEAR)
# Of the vision part nothing is read.
MULTIMODAL = Gemma3Config(
    text_config=Gemma3TextConfig(
        **SIZES | WIDTH | {"num_hidden_layers": 2},
        query_pre_attn_scalar=6,
        layer_types=[SLIDING, FULL],
        rope_parameters={SLIDING: LOCAL, FULL: GLOBAL},
    ),
    vision_config={
        "model_type": "siglip_vision_model",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 4,
        "patch_size": 2,
    },
    mm_tokens_per_image=4,
)
HOOK = hook_norm("post_attention_layernorm")


def less_one(model: torch.nn.Module) -> None:
    """Norms multiply by one more than what is stored."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data -= 1


def make_multimodal(name: str, config: Gemma3Config, seed: int) -> None:
    """One directory: the checkpoint of the whole model, and the expected values of its language model."""
    torch.manual_seed(seed)
    target = HERE / name
    model = Gemma3ForConditionalGeneration(config)
    randomize(model)
    less_one(model.model.language_model)
    model.to(torch.bfloat16).save_pretrained(target)
    (target / "generation_config.json").unlink(missing_ok=True)
    whole = Gemma3ForConditionalGeneration.from_pretrained(target, dtype=torch.float32, **EAGER).eval()
    text = Gemma3ForCausalLM._from_config(whole.config.text_config, **EAGER).eval()
    text.model.load_state_dict(whole.model.language_model.state_dict())
    vocab_size = config.text_config.vocab_size
    expected = forward(text, torch.randint(0, vocab_size, (1, TOKENS)), hook_added=HOOK)
    expected |= packed_forward(text, vocab_size, hook_added=HOOK)
    save_file({key: value.contiguous() for key, value in expected.items()}, target / "expected.safetensors")


def main() -> None:
    for seed, (name, config) in enumerate(MODELS.items(), 700):
        make_model(name, config, seed, hook_added=HOOK, finish=less_one)
    make_model("gemma", PLAIN, 798, finish=less_one)
    make_multimodal("gemma3", MULTIMODAL, 799)


if __name__ == "__main__":
    main()
