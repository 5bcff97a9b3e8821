"""Golden values of Mistral 3, the Mistral inside a model with eyes (see goldens.py).

python tests/golden/make_mistral3.py
"""

import torch
from goldens import EAGER, HERE, SIZES, TOKENS, forward, packed_forward, randomize
from safetensors.torch import save_file
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, MistralForCausalLM

# Of the vision part nothing is read.
CONFIG = Mistral3Config(
    text_config=MistralConfig(
        **SIZES | {"num_hidden_layers": 2},
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=False,
    ),
    vision_config={
        "model_type": "pixtral",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 4,
        "intermediate_size": 16,
        "image_size": 4,
        "patch_size": 2,
    },
    tie_word_embeddings=False,
)


def main() -> None:
    """One directory: the checkpoint of the whole model, and the expected values of its language model."""
    torch.manual_seed(650)
    target = HERE / "mistral3"
    model = Mistral3ForConditionalGeneration(CONFIG)
    randomize(model)
    model.to(torch.bfloat16).save_pretrained(target)
    (target / "generation_config.json").unlink(missing_ok=True)
    whole = Mistral3ForConditionalGeneration.from_pretrained(target, dtype=torch.float32, **EAGER).eval()
    text = MistralForCausalLM._from_config(whole.config.text_config, **EAGER).eval()
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    expected = forward(text, torch.randint(0, SIZES["vocab_size"], (1, TOKENS)))
    expected |= packed_forward(text, SIZES["vocab_size"])
    save_file({key: value.contiguous() for key, value in expected.items()}, target / "expected.safetensors")


if __name__ == "__main__":
    main()
