"""MiniMax M2: plain attention that norms queries and keys over all their heads together, experts ranked by sigmoid and
bias.

Which part of a head is rotated stands in the released files as `rotary_dim`. Their weights are in FP8
(models/files/packed.py); an export has floats.

Source: HF transformers `configuration_minimax_m2`, `modeling_minimax_m2`; keys of the released code.
"""

from typing import Any

from distillcache.models.config import BlockKind, ModelConfig, MoeConfig, RopeConfig
from distillcache.models.families.llama import DENSE_DEFAULTS
from distillcache.models.families.reading.family import (
    Family,
    attention_tensors,
    bias_tensors,
    common_fields,
    expert_tensors,
    norm_tensors,
    not_exportable,
    only_kind,
)
from distillcache.models.families.reading.grouped import mtp_prefixes
from distillcache.models.families.reading.values import PARTIAL, Values
from distillcache.models.files.tensors import BlockTensor, Layout
from distillcache.models.layers.rope import rotated_width


def _read(values: Values) -> ModelConfig:
    depth = values.size("num_hidden_layers")
    if values["attn_type_list"] not in (None, [1] * depth):  # 0 is lightning attention, of MiniMax-01
        raise values.bad("attn_type_list", f"{depth} of 1, which is softmax attention")
    return ModelConfig(
        **common_fields(values, [BlockKind(moe=True)] * depth),
        rope=_rope(values),
        qk_norm="full",
        moe=MoeConfig(
            num_experts=values.size("num_local_experts"),
            top_k=values.size("num_experts_per_tok"),
            expert_size=values.size("intermediate_size"),
            scores="sigmoid",
            bias=True,
            native_bias=True,
            jitter=values.number_or_zero("router_jitter_noise"),
        ),
        mtp_layers=values.count("num_mtp_modules"),
        family="minimax_m2",
    )


def _rope(values: Values) -> RopeConfig:
    width, turned = values.size("head_dim"), values.size_or_none("rotary_dim")
    rope = values.rope(theta=5e6, fraction=1.0 if turned is None else turned / width, partial=True)
    if turned not in (None, rotated_width(rope, width)):
        raise values.bad("rotary_dim", f"{rotated_width(rope, width)}, as {PARTIAL} says")
    return rope


def _write(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe_config
    said = MoeConfig(
        moe.num_experts,
        moe.top_k,
        moe.expert_size,
        scores="sigmoid",
        bias=True,
        native_bias=True,
        jitter=moe.jitter,
    )
    if only_kind(config) != BlockKind(moe=True) or moe != said or config.qkv_bias or config.output_bias:
        raise not_exportable(
            f"{only_kind(config)}, {moe}, or biases of attention",
            "experts by sigmoid and bias in all blocks, no windows, no other biases",
            "use another family",
        )
    return {
        "intermediate_size": moe.expert_size,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "router_jitter_noise": moe.jitter,
        "rotary_dim": rotated_width(config.rope, config.head_dim),
        "num_mtp_modules": 0,
    }


def _layout(config: ModelConfig) -> Layout:
    tensors = [
        *norm_tensors(),
        *attention_tensors(config),
        BlockTensor("block_sparse_moe.gate.weight", "mlp/router", 1),
        *bias_tensors(config, "block_sparse_moe.e_score_correction_bias"),
        *expert_tensors("block_sparse_moe.experts", ("w1", "w3", "w2")),
    ]
    return Layout(lambda kind: tensors, foreign=mtp_prefixes(config))


MINIMAX_M2 = Family(
    name="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    defaults=DENSE_DEFAULTS
    | {
        "head_dim": 128,
        "num_key_value_heads": 8,
        "max_position_embeddings": 196_608,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "router_jitter_noise": 0.0,
        "rotary_dim": None,
        "attn_type_list": None,
        "num_mtp_modules": 0,
    },
    read=_read,
    write=_write,
    layout=_layout,
    # Of dense MLPs and of a shared expert, which there are none of; blocks of an MTP layer; read with the rotation.
    harmless=frozenset({"mlp_intermediate_size", "mtp_transformer_layers", "shared_moe_mode", PARTIAL}),
    neutral={
        "qk_norm_type": ("per_layer",),
        "scoring_func": ("sigmoid",),
        "shared_intermediate_size": (0,),
        "use_routing_bias": (True,),
        **{f"layernorm_{part}_beta": (1.0,) for part in ("full_attention", "linear_attention", "mlp")},
    },
    aliases={"num_experts": "num_local_experts"},
)
