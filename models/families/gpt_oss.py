"""gpt-oss: experts in every block, learned sinks in every softmax, and a window in every other block.

All projections have biases. An expert's neurons are a gated unit of cut inputs; its gate and up projections are stored
with their columns in turns. The released files have the experts in MXFP4 (models/files/packed.py); an export has
floats.

Source: HF transformers `configuration_gpt_oss`, `modeling_gpt_oss`.
"""

from typing import Any

from distillcache.models.config import BlockKind, ClampedGlu, ModelConfig, MoeConfig, RopeConfig
from distillcache.models.families.reading.family import (
    Family,
    attention_tensors,
    common_fields,
    norm_tensors,
    not_exportable,
)
from distillcache.models.families.reading.kinds import typed_window_keys, typed_windows
from distillcache.models.families.reading.values import Values
from distillcache.models.files.tensors import BlockTensor, Layout, TensorSlice

THETA = 150_000.0
# Where the config says nothing of a scaling.
ROPE = RopeConfig(THETA, "yarn", 32.0, 4096, truncate=False)


def _read(values: Values) -> ModelConfig:
    windows = typed_windows(values, values.size_or_none("sliding_window"), lambda block: block % 2 == 0)
    silent = all(values[key] is None for key in ("rope_theta", "rope_scaling", "rope_parameters"))
    bias = values.flag("attention_bias")
    return ModelConfig(
        **common_fields(values, [BlockKind(window, moe=True) for window in windows]),
        rope=ROPE if silent else _rope(values),
        qkv_bias=bias,
        output_bias=bias,
        sinks=True,
        moe=MoeConfig(
            num_experts=values.size("num_local_experts"),
            top_k=values.size("num_experts_per_tok"),
            expert_size=values.size("intermediate_size"),
            logit_bias=True,
            expert_bias=True,
            clamped=ClampedGlu(values.number("swiglu_limit"), values.number("swiglu_alpha")),
        ),
        family="gpt_oss",
    )


def _rope(values: Values) -> RopeConfig:
    found = values.rope(theta=THETA)
    if values["rope_scaling"] is None and values["rope_parameters"] is None:  # a base alone
        return RopeConfig(found.theta, ROPE.kind, ROPE.factor, ROPE.original_max_positions, truncate=False)
    return found


def _write(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe_config
    if odd := [kind for kind in config.kinds if kind != BlockKind(kind.window, moe=True)]:
        raise not_exportable(str(odd[0]), "blocks that have experts and rotate", "export it in another family")
    plain = MoeConfig(moe.num_experts, moe.top_k, moe.expert_size, logit_bias=True, expert_bias=True)
    found = {name: getattr(moe, name) for name in ("shared_size", "scores", "renormalise", "scaling", "groups")}
    if moe.clamped is None or any(getattr(plain, name) != value for name, value in found.items()):
        raise not_exportable(str(found), "experts as gpt-oss has them", "export it in another family")
    if config.qkv_bias != config.output_bias:
        raise not_exportable("some biases of attention", "all or none", "export it in another family")
    return {
        **typed_window_keys(config),
        "intermediate_size": moe.expert_size,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "experts_per_token": moe.top_k,
        "attention_bias": config.qkv_bias,
        "swiglu_limit": moe.clamped.limit,
        "swiglu_alpha": moe.clamped.alpha,
    }


def _layout(config: ModelConfig) -> Layout:
    width = 2 * config.moe_config.expert_size
    fused = "mlp.experts.gate_up_proj"
    tensors = [
        *norm_tensors(),
        *attention_tensors(config),
        BlockTensor("self_attn.sinks", "attention/sinks"),
        BlockTensor("mlp.router.weight", "mlp/router", 1),
        BlockTensor("mlp.router.bias", "mlp/logit_bias"),
        BlockTensor(fused, "mlp/gate", None, TensorSlice(2, 0, width, width, step=2)),
        BlockTensor(fused, "mlp/up", None, TensorSlice(2, 1, width, width, step=2)),
        BlockTensor(f"{fused}_bias", "mlp/gate_bias", None, TensorSlice(1, 0, width, width, step=2)),
        BlockTensor(f"{fused}_bias", "mlp/up_bias", None, TensorSlice(1, 1, width, width, step=2)),
        BlockTensor("mlp.experts.down_proj", "mlp/down"),
        BlockTensor("mlp.experts.down_proj_bias", "mlp/down_bias"),
    ]
    return Layout(lambda kind: tensors)


GPT_OSS = Family(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "max_position_embeddings": 131_072,
        "sliding_window": 128,
        "layer_types": None,
        "attention_bias": True,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_limit": 7.0,
        "swiglu_alpha": 1.702,
    },
    read=_read,
    write=_write,
    layout=_layout,
    harmless=frozenset({"initial_context_length"}),  # what `original_max_position_embeddings` says
    aliases={"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
)
