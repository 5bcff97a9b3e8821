"""Golden values of MiniMax M2 (see goldens.py).

python tests/golden/make_minimax.py
"""

import torch
from goldens import SIZES, make_model
from transformers import MiniMaxM2Config

# Heads of 12, of which 6 are rotated. A theta of 100 spreads the wavelengths over the 24 tokens.
CONFIG = MiniMaxM2Config(
    **SIZES | {"head_dim": 12, "intermediate_size": 14, "num_hidden_layers": 2},
    num_local_experts=7,
    num_experts_per_tok=3,
    rotary_dim=6,
    rope_parameters={"rope_type": "default", "rope_theta": 100.0},
)


def fill_biases(model: torch.nn.Module) -> None:
    """As in goldens.py, of a family whose biases are the block's."""
    for layer in model.model.layers:
        layer.mlp.e_score_correction_bias = 0.2 * torch.randn(layer.mlp.e_score_correction_bias.shape)


def main() -> None:
    make_model("minimax_m2", CONFIG, 105, finish=fill_biases)


if __name__ == "__main__":
    main()
