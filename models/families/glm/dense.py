"""GLM-4 of 0414 and later (`glm4`): norms before and behind each sublayer, half of a head rotated, neighbour with
neighbour.

Source: HF transformers `configuration_glm4`, `modeling_glm4`.
"""

from dataclasses import replace
from typing import Any

from distillcache.models.config import BlockKind, ModelConfig
from distillcache.models.families.llama import DENSE_DEFAULTS
from distillcache.models.families.reading.family import (
    Family,
    attention_tensors,
    common_fields,
    fused_dense_tensors,
    norm_tensors,
    not_exportable,
    only_kind,
)
from distillcache.models.families.reading.values import PARTIAL, Values
from distillcache.models.files.tensors import BlockTensor, Layout


def _read(values: Values) -> ModelConfig:
    return ModelConfig(
        **common_fields(values, [BlockKind()] * values.size("num_hidden_layers")),
        rope=replace(values.rope(fraction=0.5, partial=True), interleaved=True),
        qkv_bias=values.flag("attention_bias"),
        norms="both",
        family="glm4",
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    if only_kind(config) != BlockKind() or config.output_bias or config.mlp_bias:
        raise not_exportable(
            f"{only_kind(config)}, biases of other projections",
            "dense rotary blocks without windows, biases of queries, keys and values alone",
            "use another family",
        )
    return {
        PARTIAL: config.rope.fraction,  # for transformers 4, and stated where it is 1: half is assumed
        "attention_bias": config.qkv_bias,
        "pad_token_id": None,  # what is assumed otherwise may lie beyond a small vocabulary
    }


def _layout(config: ModelConfig) -> Layout:
    tensors = [
        *norm_tensors(),
        BlockTensor("post_self_attn_layernorm.weight", "attention/post_norm"),
        BlockTensor("post_mlp_layernorm.weight", "mlp/post_norm"),
        *attention_tensors(config),
        *fused_dense_tensors(config),
    ]
    return Layout(lambda kind: tensors)


GLM4 = Family(
    name="glm4",
    architecture="Glm4ForCausalLM",
    defaults=DENSE_DEFAULTS
    | {
        "head_dim": 128,
        "rms_norm_eps": 1.5625e-7,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131_072,
        PARTIAL: None,
        "attention_bias": True,
    },
    read=_read,
    write=_write,
    layout=_layout,
)
