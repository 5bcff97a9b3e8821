"""Translations of architectures with recurrent blocks.

Falcon-H1's factors are within its weights. Limits of Mamba-2's steps, and the length of rows of Granite 4 without
positions, are not in the files.

Source: llama.cpp `conversion/qwen.py` (Qwen3NextModel), `granite.py` (GraniteHybridModel), `nemotron.py`
(NemotronHModel), `falcon_h1.py`; `src/models/*.cpp` for what is assumed without a key.
"""

from typing import Any

from distillcache.models.families.reading.keys import LINEAR
from distillcache.models.families.reading.kinds import FULL
from distillcache.models.files.gguf.translated import BIAS, INNER, ROUTED, ROUTING, SSM, GgufModel, Translation
from distillcache.models.files.gguf.values import SIGMOID, SOFTMAX
from distillcache.schemas.errors import CheckpointError


def _mixers(model: GgufModel) -> list[str]:
    """Every block's mixer by its tensors, in HF's words."""
    return [LINEAR if model.has("ssm_out.weight", block) else FULL for block in range(model.depth)]


def _head_width(model: GgufModel) -> int:
    """Width of a recurrent block's value heads."""
    values, heads = model.values, model.values.size("ssm.time_step_rank")
    inner = values.size("ssm.inner_size")
    if inner % heads:
        raise values.bad("ssm.inner_size", inner, f"a multiple of {heads}, of ssm.time_step_rank")
    return inner // heads


def _qwen3_next(model: GgufModel) -> dict[str, Any]:
    dense = [block for block in range(model.depth) if not model.has("ffn_gate_inp.weight", block)]
    return {"layer_types": _mixers(model), "linear_value_head_dim": _head_width(model), "mlp_only_layers": dense}


def _granite(model: GgufModel) -> dict[str, Any]:
    """Without a key attention has the usual factor."""
    values, hidden = model.values, model.values.size("embedding_length")
    width = values.size("attention.key_length", hidden // values.size("attention.head_count"))
    if (inner := values.size("ssm.inner_size")) % hidden:
        raise values.bad("ssm.inner_size", inner, f"a multiple of {hidden}, of embedding_length")
    scale = values.number("attention.scale", 1.0) if values.get("attention.scale") else width**-0.5
    shared = values.size("expert_shared_feed_forward_length", model.size("feed_forward_length"))
    return {
        "layer_types": _mixers(model),
        "mamba_d_head": _head_width(model),
        "mamba_expand": inner // hidden,
        "attention_multiplier": scale,
        "position_embedding_type": "rope" if values.get("rope.scaling.finetuned") else "nope",
        "shared_intermediate_size": shared,
    }


def _nemotron(model: GgufModel) -> dict[str, Any]:
    """A layer that has none of the tensors of others is attention's, or lacks some."""
    endings = {"ssm_out.weight": LINEAR, "ffn_gate_inp.weight": "moe", "ffn_up.weight": "mlp"}
    layers = [
        next((name for ending, name in endings.items() if model.has(ending, block)), FULL)
        for block in range(model.depth)
    ]
    return {"layers_block_type": layers, "mamba_head_dim": _head_width(model), "time_step_min": 0.0}


def _falcon(model: GgufModel) -> dict[str, Any]:
    if "output.weight" not in model.tensors:
        raise CheckpointError(
            "the GGUF file has tied embeddings, into which llama.cpp multiplies the factor of the input alone",
            {"file": model.values.file, "missing": "output.weight"},
            "use the model's HF directory",
        )
    return {"mamba_d_head": _head_width(model), "mamba_norm_before_gate": False}


MAMBA_KEYS = {
    "ssm.conv_kernel": "mamba_d_conv",
    "ssm.group_count": "mamba_n_groups",
    "ssm.state_size": "mamba_d_state",
    "ssm.time_step_rank": "mamba_n_heads",
}
MAMBA_SAYS = {"mamba_conv_bias": "ssm_conv1d.bias", "mamba_proj_bias": "ssm_in.bias"}
NEMOTRON = Translation(
    {None: "nemotron_h", SIGMOID: "nemotron_h"},
    {
        "ssm.conv_kernel": "conv_kernel",
        "ssm.group_count": "n_groups",
        "ssm.state_size": "ssm_state_size",
        "ssm.time_step_rank": "mamba_num_heads",
    },
    said={"use_conv_bias": "ssm_conv1d.bias", "use_bias": "ssm_in.bias", "mlp_bias": "ffn_up.bias"},
    more=_nemotron,
    # The epsilon that is used stands under the other name as well; nothing rotates.
    reads=frozenset({"ssm.inner_size", "attention.layer_norm_epsilon", "rope.scaling.finetuned"}),
)
HYBRIDS = {
    "qwen3next": Translation(
        {None: "qwen3_next", SOFTMAX: "qwen3_next"},
        {
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            **INNER,
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
            "ssm.conv_kernel": "linear_conv_kernel_dim",
            "ssm.group_count": "linear_num_key_heads",
            "ssm.state_size": "linear_key_head_dim",
            "ssm.time_step_rank": "linear_num_value_heads",
        },
        {"norm_topk_prob": True},
        BIAS,
        _qwen3_next,
        SSM | {"full_attention_interval"},
    ),
    "granitehybrid": Translation(
        {None: "granitemoehybrid", SOFTMAX: "granitemoehybrid"},
        {
            **MAMBA_KEYS,
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        {
            **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling"), 1.0),
            "num_local_experts": 0,
            "num_experts_per_tok": 1,
        },
        {**BIAS, **MAMBA_SAYS},
        _granite,
        SSM | {"attention.scale", "expert_shared_feed_forward_length"},
    ),
    "nemotron_h": NEMOTRON,
    "nemotron_h_moe": Translation(
        NEMOTRON.families,
        {
            **NEMOTRON.keys,
            **ROUTED,
            "expert_shared_feed_forward_length": "moe_shared_expert_intermediate_size",
            "moe_latent_size": "moe_latent_size",
        },
        {**ROUTING, "moe_latent_size": None, "n_shared_experts": 1},
        NEMOTRON.said,
        _nemotron,
        NEMOTRON.reads,
    ),
    "falcon-h1": Translation(
        {None: "falcon_h1"},
        {**MAMBA_KEYS, "ssm.inner_size": "mamba_d_ssm"},
        {},
        {
            **BIAS,
            **MAMBA_SAYS,
            "mamba_rms_norm": "ssm_norm.weight",
            "projectors_bias": "ssm_out.bias",
            "mlp_bias": "ffn_gate.bias",
        },
        _falcon,
    ),
}
