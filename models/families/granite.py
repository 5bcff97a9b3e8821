"""Granite: factors on embeddings, on the products of queries and keys, on what a sublayer adds, and under the logits.

The factor of attention takes the place of the usual one over the root of the head's width; where the file is silent it
is 1, as the others are.

Source: HF transformers `configuration_granite`, `modeling_granite`.
"""

from typing import Any

from distillcache.models.config import BlockKind, ModelConfig
from distillcache.models.families.llama import DENSE_DEFAULTS
from distillcache.models.families.reading.family import Family, common_fields, dense_layout, not_exportable, only_kind
from distillcache.models.families.reading.values import Values


def _read(values: Values) -> ModelConfig:
    bias = values.flag("attention_bias")
    return ModelConfig(
        **common_fields(values, [BlockKind()] * values.size("num_hidden_layers")),
        rope=values.rope(),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=values.flag("mlp_bias"),
        embed_scale=values.number("embedding_multiplier"),
        residual_scale=values.number("residual_multiplier"),
        attention_scale=values.number("attention_multiplier"),
        logits_divisor=values.number("logits_scaling"),
        family="granite",
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    if only_kind(config) != BlockKind():
        raise not_exportable(str(only_kind(config)), "dense rotary blocks without windows", "use another family")
    if config.qkv_bias != config.output_bias:
        raise not_exportable("some biases of attention", "all or none", "use another family")
    usual = config.head_dim**-0.5
    return {
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "embedding_multiplier": config.embed_scale,
        "residual_multiplier": config.residual_scale,
        "attention_multiplier": usual if config.attention_scale is None else config.attention_scale,
        "logits_scaling": config.logits_divisor,
    }


GRANITE = Family(
    name="granite",
    architecture="GraniteForCausalLM",
    defaults=DENSE_DEFAULTS
    | {
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    read=_read,
    write=_write,
    layout=dense_layout,
)
