"""Seed-OSS: Llama's blocks with a switch of its own for the bias of the output projection.

Source: HF transformers `configuration_seed_oss`, `modeling_seed_oss`.
"""

from typing import Any

from distillcache.models.config import BlockKind, ModelConfig
from distillcache.models.families.llama import DENSE_DEFAULTS
from distillcache.models.families.reading.family import Family, check_plain, common_fields, dense_layout
from distillcache.models.families.reading.values import Values


def _read(values: Values) -> ModelConfig:
    return ModelConfig(
        **common_fields(values, [BlockKind()] * values.size("num_hidden_layers")),
        rope=values.rope(),
        qkv_bias=values.flag("attention_bias"),
        output_bias=values.flag("attention_out_bias"),
        mlp_bias=values.flag("mlp_bias"),
        family="seed_oss",
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    check_plain(config)
    return {
        "attention_bias": config.qkv_bias,
        "attention_out_bias": config.output_bias,
        "mlp_bias": config.mlp_bias,
        "residual_dropout": 0.0,
    }


SEED_OSS = Family(
    name="seed_oss",
    architecture="SeedOssForCausalLM",
    defaults=DENSE_DEFAULTS
    | {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 524_288,
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
    },
    read=_read,
    write=_write,
    layout=dense_layout,
    harmless=frozenset({"residual_dropout"}),
)
