"""OLMoE: every block has experts, weighed by their softmax as it is; queries and keys are normed over all their heads.

Its config has no `head_dim`: a head is as wide as the hidden size over the query heads.

Source: HF transformers `configuration_olmoe`, `modeling_olmoe`.
"""

from typing import Any

from distillcache.models.config import BlockKind, ModelConfig, MoeConfig
from distillcache.models.families.llama import DENSE_DEFAULTS
from distillcache.models.families.reading.family import (
    Family,
    attention_tensors,
    common_fields,
    expert_tensors,
    norm_tensors,
    not_exportable,
    only_kind,
)
from distillcache.models.families.reading.values import Values
from distillcache.models.files.tensors import BlockTensor, Layout


def _read(values: Values) -> ModelConfig:
    hidden, heads = values.size("hidden_size"), values.size("num_attention_heads")
    if hidden % heads:
        raise values.bad("num_attention_heads", f"a divisor of hidden_size, which is {hidden}")
    if values["head_dim"] not in (None, hidden // heads):
        raise values.bad("head_dim", f"{hidden // heads}: hidden_size over num_attention_heads")
    bias = values.flag("attention_bias")
    return ModelConfig(
        **common_fields(values, [BlockKind(moe=True)] * values.size("num_hidden_layers")),
        rope=values.rope(),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="full",
        clip_qkv=values.number_or_none("clip_qkv"),
        moe=MoeConfig(
            num_experts=values.size("num_experts"),
            top_k=values.size("num_experts_per_tok"),
            expert_size=values.size("intermediate_size"),
            renormalise=values.flag("norm_topk_prob"),
        ),
        family="olmoe",
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    if config.num_heads * config.head_dim != config.hidden_size:
        raise not_exportable(
            f"{config.num_heads} query heads of {config.head_dim}, hidden size {config.hidden_size}",
            "heads that are together as wide as the hidden size",
            "keep all query heads",
        )
    if only_kind(config) != BlockKind(moe=True):
        raise not_exportable(str(only_kind(config)), "experts in all blocks, no window", "use another family")
    moe = config.moe_config
    return {
        "intermediate_size": moe.expert_size,
        "attention_bias": config.qkv_bias,
        "clip_qkv": config.clip_qkv,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.renormalise,
    }


def _layout(config: ModelConfig) -> Layout:
    router = BlockTensor("mlp.gate.weight", "mlp/router", 1)
    return Layout(lambda kind: [*norm_tensors(), *attention_tensors(config), router, *expert_tensors()])


OLMOE = Family(
    name="olmoe",
    architecture="OlmoeForCausalLM",
    defaults=DENSE_DEFAULTS
    | {
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "attention_bias": False,
        "clip_qkv": None,
        "num_experts_per_tok": 8,
        "num_experts": 64,
        "norm_topk_prob": False,
    },
    read=_read,
    write=_write,
    layout=_layout,
    aliases={"num_local_experts": "num_experts"},
)
