"""Golden values of gpt-oss (see goldens.py), and of how transformers unpacks its released weights.

python tests/golden/make_gpt_oss.py
"""

import torch
from goldens import HERE, SIZES, make_model
from safetensors.torch import save_file
from transformers import GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

# Limits at which gates and ups are cut.
MOE = {"intermediate_size": 14, "num_local_experts": 5, "swiglu_limit": 1.5, "swiglu_alpha": 1.3, "sliding_window": 5}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "truncate": False,
}
MODELS: dict[str, GptOssConfig] = {
    "gpt_oss": GptOssConfig(**SIZES | MOE, num_experts_per_tok=2, rope_parameters=YARN),
    # What the released models leave alone.
    "gpt_oss_plain": GptOssConfig(
        **SIZES | MOE | {"num_hidden_layers": 2},
        num_experts_per_tok=3,
        layer_types=["full_attention"] * 2,
        attention_bias=False,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    ),
}


def make_packed() -> None:
    """Every byte is among the blocks; the powers of two reach from 2^-40 to 2^23."""
    torch.manual_seed(599)
    blocks = torch.randperm(2 * 3 * 5 * 16).reshape(2, 3, 5, 16).remainder(256).to(torch.uint8)
    scales = torch.randint(127 - 40, 127 + 24, blocks.shape[:-1], dtype=torch.uint8)
    values = convert_moe_packed_tensors(blocks, scales)
    save_file({"blocks": blocks, "scales": scales, "values": values}, HERE / "mxfp4.safetensors")


def main() -> None:
    for seed, (name, config) in enumerate(MODELS.items(), 500):
        make_model(name, config, seed)
    make_packed()


if __name__ == "__main__":
    main()
