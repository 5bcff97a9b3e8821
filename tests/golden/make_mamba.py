"""Golden values of models with Mamba-2 (see goldens.py): Granite 4, Nemotron-H, Falcon-H1, Bamba.

python tests/golden/make_mamba.py
"""

from collections.abc import Callable
from typing import Any

import torch
from goldens import SIZES, hook_experts, make_model
from transformers import BambaConfig, FalconH1Config, GraniteMoeHybridConfig, NemotronHConfig, PreTrainedConfig

MAMBA, FULL = "mamba", "attention"
# A theta of 100 spreads the wavelengths over the tokens; at 10,000 half of the angles would hardly move.
ROPE = {"rope_type": "default", "rope_theta": 100.0}
SSM = {
    # The norm behind the gate makes what is near zero as large as the rest, with its last digits.
    "rms_norm_eps": 1e-3,
    "mamba_n_heads": 6,
    "mamba_d_head": 12,
    "mamba_n_groups": 2,
    "mamba_d_state": 7,
    "mamba_d_conv": 3,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.5,
    "shared_intermediate_size": 22,
}
FALCON = {
    "attention_in_multiplier": 0.9,
    "attention_out_multiplier": 0.7,
    "embedding_multiplier": 1.5,
    "key_multiplier": 0.6,
    "lm_head_multiplier": 0.3,
    "mlp_multipliers": [0.8, 0.5],
    "ssm_in_multiplier": 1.25,
    "ssm_multipliers": [0.7, 0.5, 0.8, 1.1, 0.6],
    "ssm_out_multiplier": 0.4,
}
PLAIN = {key: size for key, size in SIZES.items() if key not in ("rms_norm_eps", "num_hidden_layers")}
NEMOTRON = {
    "layer_norm_epsilon": 1e-3,
    "mamba_num_heads": 6,
    "mamba_head_dim": 7,
    "n_groups": 2,
    "ssm_state_size": 5,
    "conv_kernel": 3,
    "chunk_size": 16,
    "intermediate_size": 20,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 9,
    "moe_shared_expert_intermediate_size": 22,
}
MODELS: dict[str, PreTrainedConfig] = {
    "granitemoehybrid": GraniteMoeHybridConfig(
        **SIZES | SSM | GRANITE | {"num_hidden_layers": 2, "intermediate_size": 14},
        layer_types=[MAMBA, FULL],
        num_local_experts=5,
        num_experts_per_tok=3,
        mamba_proj_bias=True,
        tie_word_embeddings=True,
        time_step_limit=[0.05, 1.5],
    ),
    # Without experts; attention rotates, and has biases.
    "granitemoehybrid_dense": GraniteMoeHybridConfig(
        **SIZES | SSM | GRANITE | {"num_hidden_layers": 2},
        layer_types=[MAMBA, FULL],
        num_local_experts=0,
        mamba_conv_bias=False,
        attention_bias=True,
        position_embedding_type="rope",
        rope_parameters=ROPE,
    ),
    "nemotron_h": NemotronHConfig(
        **PLAIN | NEMOTRON,
        layers_block_type=["mlp", "mamba", "attention", "mamba"],
        mlp_bias=True,
        use_bias=True,
        use_conv_bias=False,
        time_step_min=0.3,
    ),
    # As Nemotron 3: experts in groups, on a narrower map of the stream.
    "nemotron_h_moe": NemotronHConfig(
        **PLAIN | NEMOTRON,
        layers_block_type=["mamba", "moe", "attention", "moe"],
        n_group=3,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=1.7,
        moe_latent_size=13,
    ),
    "falcon_h1": FalconH1Config(
        **SIZES | SSM | FALCON | {"num_hidden_layers": 2, "mamba_d_ssm": 42, "mamba_d_head": 7},
        mamba_rms_norm=True,
        mamba_norm_before_gate=True,
        mamba_proj_bias=True,
        projectors_bias=True,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=ROPE,
        time_step_limit=[0.05, 1.5],
    ),
    # As the released ones, without a norm behind the recurrence.
    "falcon_h1_plain": FalconH1Config(
        **SIZES | SSM | FALCON | {"num_hidden_layers": 1, "mamba_d_ssm": 42, "mamba_d_head": 7},
        tie_word_embeddings=True,
        rope_parameters=ROPE,
    ),
    "bamba": BambaConfig(
        **SIZES | SSM | {"num_hidden_layers": 2}, attn_layer_indices=[1], mlp_bias=True, rope_parameters=ROPE
    ),
}
# Seeds with which transformers' gradients in float32 are within 1e-5 of those in float64.
SEEDS = {
    "granitemoehybrid": 1200,
    "granitemoehybrid_dense": 1201,
    "nemotron_h": 1206,
    "nemotron_h_moe": 1203,
    "falcon_h1": 1205,
    "falcon_h1_plain": 1205,
    "bamba": 1206,
}


def hook_added(layer: torch.nn.Module, record: Callable[[torch.Tensor], None]) -> Any:
    """Attention returns more than its output; Granite multiplies what it adds; a layer of Nemotron-H may have none."""
    if hasattr(layer, "mixer"):
        factor = float(layer.block_type not in ("mlp", "moe"))
        return layer.mixer.register_forward_hook(
            lambda _, __, out: record((out[0] if isinstance(out, tuple) else out) * factor)
        )
    if hasattr(layer, "attn_out_multiplier"):
        return layer.register_forward_hook(
            lambda layer, args, given, _: record(both_mixers(layer, args[0], given)), with_kwargs=True
        )
    mixer = layer.self_attn if getattr(layer, "mamba", None) is None else layer.mamba
    factor = getattr(layer, "residual_multiplier", 1.0)
    return mixer.register_forward_hook(lambda _, __, out: record((out[0] if isinstance(out, tuple) else out) * factor))


def both_mixers(layer: torch.nn.Module, resid: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    """What attention and Mamba-2 of a block of Falcon-H1 add together."""
    x = layer.input_layernorm(resid)
    context = {name: given[name] for name in ("attention_mask", "position_embeddings")}
    attention, _ = layer.self_attn(hidden_states=x * layer.attention_in_multiplier, **context)
    return layer.mamba(hidden_states=x) * layer.ssm_out_multiplier + attention * layer.attn_out_multiplier


def hook_chosen(layer: torch.nn.Module, record: Callable[[torch.Tensor], None]) -> Any:
    """Experts of a layer of Nemotron-H are its mixer's."""
    experts = getattr(getattr(layer, "mixer", None), "experts", None)
    return (
        experts.register_forward_pre_hook(lambda _, args: record(args[1])) if experts else hook_experts(layer, record)
    )


def settle(model: torch.nn.Module) -> None:
    """Rates of decay of about 0.1, so that a state remembers tens of tokens; biases of the choice are buffers."""
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias = 0.2 * torch.randn(module.num_experts)
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.data.sub_(2.0)


def main() -> None:
    for name, config in MODELS.items():
        make_model(name, config, SEEDS[name], hook_experts=hook_chosen, hook_added=hook_added, finish=settle)


if __name__ == "__main__":
    main()
