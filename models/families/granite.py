"""Granite: factors on embeddings, on the products of queries and keys, on what a sublayer adds, and under the logits.

The factor of attention takes the place of the usual one over the root of the head's width; where the file is silent it
is 1, as the others are. GraniteMoE has experts in every block: softmax over those that a token takes. Its files have
them together.

Source: HF transformers `configuration_granite`, `configuration_granitemoe` and their modelling code; names in files by
its `conversion_mapping`.
"""

from collections.abc import Sequence
from typing import Any

from distillcache.models.config import BlockKind, ModelConfig, MoeConfig
from distillcache.models.families.llama import DENSE_DEFAULTS
from distillcache.models.families.reading.family import (
    Family,
    attention_tensors,
    common_fields,
    dense_layout,
    fused_tensors,
    norm_tensors,
    not_exportable,
    only_kind,
)
from distillcache.models.families.reading.values import Values
from distillcache.models.files.tensors import BlockTensor, Layout

EXPERTS = "block_sparse_moe."


def granite_fields(values: Values, kinds: Sequence[BlockKind]) -> dict[str, Any]:
    """The fields of `ModelConfig` that all families of Granite share, for a decoder of these blocks."""
    bias = values.flag("attention_bias")
    return {
        **common_fields(values, kinds),
        "rope": values.rope(),
        "qkv_bias": bias,
        "output_bias": bias,
        "embed_scale": values.number("embedding_multiplier"),
        "residual_scale": values.number("residual_multiplier"),
        "attention_scale": values.number("attention_multiplier"),
        "logits_divisor": values.number("logits_scaling"),
    }


def granite_keys(config: ModelConfig) -> dict[str, Any]:
    """The keys of an export that `granite_fields` reads.

    Raises:
        CheckpointError: they cannot say it.
    """
    if config.qkv_bias != config.output_bias:
        raise not_exportable("some biases of attention", "all or none", "use another family")
    usual = config.head_dim**-0.5
    return {
        "attention_bias": config.qkv_bias,
        "embedding_multiplier": config.embed_scale,
        "residual_multiplier": config.residual_scale,
        "attention_multiplier": usual if config.attention_scale is None else config.attention_scale,
        "logits_scaling": config.logits_divisor,
    }


def granite_moe(values: Values) -> MoeConfig:
    """Its experts, `intermediate_size` wide each."""
    return MoeConfig(
        num_experts=values.size("num_local_experts"),
        top_k=values.size("num_experts_per_tok"),
        expert_size=values.size("intermediate_size"),
    )


def granite_moe_keys(moe: MoeConfig) -> dict[str, Any]:
    """The keys of an export that `granite_moe` reads."""
    return {
        "intermediate_size": moe.expert_size,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
    }


def granite_moe_tensors(config: ModelConfig) -> list[BlockTensor]:
    """The tensors of a block's router and experts."""
    names = (f"{EXPERTS}input_linear.weight", f"{EXPERTS}output_linear.weight")
    return [
        BlockTensor(f"{EXPERTS}router.layer.weight", "mlp/router", 1),
        *fused_tensors(*names, config.moe_config.expert_size),
    ]


def _read(values: Values) -> ModelConfig:
    kinds = [BlockKind()] * values.size("num_hidden_layers")
    return ModelConfig(**granite_fields(values, kinds), mlp_bias=values.flag("mlp_bias"), family="granite")


def _read_moe(values: Values) -> ModelConfig:
    kinds = [BlockKind(moe=True)] * values.size("num_hidden_layers")
    return ModelConfig(**granite_fields(values, kinds), moe=granite_moe(values), family="granitemoe")


def _write(config: ModelConfig) -> dict[str, Any]:
    if only_kind(config) != BlockKind():
        raise not_exportable(str(only_kind(config)), "dense rotary blocks without windows", "use another family")
    return granite_keys(config) | {"mlp_bias": config.mlp_bias}


def _write_moe(config: ModelConfig) -> dict[str, Any]:
    if only_kind(config) != BlockKind(moe=True):
        raise not_exportable(str(only_kind(config)), "rotary blocks with experts, no windows", "use another family")
    return granite_keys(config) | granite_moe_keys(config.moe_config)


def _moe_layout(config: ModelConfig) -> Layout:
    tensors = [*norm_tensors(), *attention_tensors(config), *granite_moe_tensors(config)]
    return Layout(lambda kind: tensors)


GRANITE_DEFAULTS = DENSE_DEFAULTS | {
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "logits_scaling": 1.0,
}
GRANITE = Family(
    name="granite",
    architecture="GraniteForCausalLM",
    defaults=GRANITE_DEFAULTS | {"mlp_bias": False},
    read=_read,
    write=_write,
    layout=dense_layout,
)
GRANITEMOE = Family(
    name="granitemoe",
    architecture="GraniteMoeForCausalLM",
    defaults=GRANITE_DEFAULTS | {"num_local_experts": 8, "num_experts_per_tok": 2},
    read=_read_moe,
    write=_write_moe,
    layout=_moe_layout,
)
