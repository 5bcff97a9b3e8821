"""Qwen3-VL, dense and with experts: the text model inside, which is a Qwen3 or a Qwen3-MoE, and exported as such.

Rotary positions of three axes are one for text. Files have the experts of a block together, in two tensors; weights of
a token's experts always sum to 1. What the vision tower adds to the stream of the first blocks is added at pictures
alone.

Source: HF transformers `configuration_qwen3_vl`, `configuration_qwen3_vl_moe` and their modelling code.
"""

from dataclasses import replace
from typing import Any

from distillcache.models.config import BlockKind, ModelConfig, MoeConfig
from distillcache.models.families.llama import DENSE_DEFAULTS
from distillcache.models.families.qwen.dense import QWEN3
from distillcache.models.families.qwen.moe import MOE_DEFAULTS, QWEN3_MOE, moe_kinds, moe_layout
from distillcache.models.families.reading.family import Family, common_fields, dense_layout
from distillcache.models.families.reading.multimodal import MROPE, multimodal_layout, vision_language_family
from distillcache.models.families.reading.values import Values
from distillcache.models.files.tensors import FusedExperts, Layout

THETA = 500_000.0  # what transformers assumes


def _read(values: Values, kinds: list[BlockKind], **own: Any) -> ModelConfig:
    bias = values.flag("attention_bias")
    return ModelConfig(
        **common_fields(values, kinds),
        rope=values.rope(theta=THETA, ignored=MROPE),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="head",
        **own,
    )


def _read_dense(values: Values) -> ModelConfig:
    values.size("head_dim")  # null is no width here
    return _read(values, [BlockKind()] * values.size("num_hidden_layers"), family="qwen3")


def _read_sparse(values: Values) -> ModelConfig:
    kinds = moe_kinds(values, [None] * values.size("num_hidden_layers"))
    moe = MoeConfig(
        num_experts=values.size("num_experts"),
        top_k=values.size("num_experts_per_tok"),
        expert_size=values.size("moe_intermediate_size"),
    )
    return _read(values, kinds, moe=moe, family="qwen3_moe")


def _sparse_layout(config: ModelConfig) -> Layout:
    fused = FusedExperts(config.hidden_size, config.moe_config.expert_size, inputs_first=True)
    return multimodal_layout(replace(moe_layout(config), fused=fused))


TEXT: dict[str, Any] = {"max_position_embeddings": 128_000, "attention_bias": False}
# Of the models below, which have no files of their own.
QWEN3_VL_TEXT = Family(
    name="qwen3_vl_text",
    architecture=QWEN3.architecture,
    defaults=DENSE_DEFAULTS | TEXT | {"num_key_value_heads": 32, "head_dim": 128},
    read=_read_dense,
    write=QWEN3.write,
    layout=dense_layout,
)
QWEN3_VL_MOE_TEXT = Family(
    name="qwen3_vl_moe_text",
    architecture=QWEN3_MOE.architecture,
    defaults={key: value for key, value in MOE_DEFAULTS.items() if "window" not in key and key != "norm_topk_prob"}
    | TEXT
    | {"num_key_value_heads": 16, "moe_intermediate_size": 1408, "num_experts_per_tok": 4, "num_experts": 60},
    read=_read_sparse,
    write=QWEN3_MOE.write,
    layout=moe_layout,
    neutral={"norm_topk_prob": (True, False)},  # not read: their sum always is 1
    aliases={"num_local_experts": "num_experts"},  # as transformers 5 writes it
)
QWEN3_VL = vision_language_family("qwen3_vl", "Qwen3VLForConditionalGeneration", QWEN3_VL_TEXT)
QWEN3_VL_MOE = vision_language_family(
    "qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", QWEN3_VL_MOE_TEXT, layout=_sparse_layout
)
