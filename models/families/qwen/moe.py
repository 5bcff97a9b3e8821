"""Qwen2-MoE and Qwen3-MoE: experts in every `decoder_sparse_step`-th block, dense MLPs in the others.

Qwen2 has a shared expert behind a sigmoid gate and biases of queries, keys and values; Qwen3 norms every head of its
queries and keys.

Source: HF transformers `configuration_qwen2_moe`, `configuration_qwen3_moe` and their modelling code.
"""

from typing import Any

from distillcache.models.config import BlockKind, ModelConfig, MoeConfig
from distillcache.models.families.llama import DENSE_DEFAULTS
from distillcache.models.families.reading.family import (
    Family,
    attention_tensors,
    common_fields,
    dense_tensors,
    expert_tensors,
    norm_tensors,
    not_exportable,
    shared_tensors,
)
from distillcache.models.families.reading.kinds import only_window, typed_windows, window_in_use, window_keys
from distillcache.models.families.reading.values import Values
from distillcache.models.files.tensors import BlockTensor, Layout


def moe_kinds(values: Values, windows: list[int | None]) -> list[BlockKind]:
    """Every block's kind: experts in every `decoder_sparse_step`-th block that `mlp_only_layers` does not name."""
    depth, step = values.size("num_hidden_layers"), values.size("decoder_sparse_step")
    dense = values.blocks("mlp_only_layers", depth)
    return [BlockKind(windows[block], moe=block not in dense and (block + 1) % step == 0) for block in range(depth)]


def _read_qwen2(values: Values) -> ModelConfig:
    first = values.count("max_window_layers")  # as transformers fills it in: every other of these
    windows = typed_windows(values, window_in_use(values), lambda block: (block + 1) % 2 == 1 and block < first)
    bias = values.flag("qkv_bias")
    return ModelConfig(
        **common_fields(values, moe_kinds(values, windows)),
        rope=values.rope(),
        qkv_bias=bias,
        moe=_moe(values, values.size("shared_expert_intermediate_size")),
        family="qwen2_moe",
    )


def _read_qwen3(values: Values) -> ModelConfig:
    depth = values.size("num_hidden_layers")
    bias = values.flag("attention_bias")
    return ModelConfig(
        **common_fields(values, moe_kinds(values, [window_in_use(values)] * depth)),
        rope=values.rope(),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="head",
        moe=_moe(values, 0),
        family="qwen3_moe",
    )


def _moe(values: Values, shared: int) -> MoeConfig:
    return MoeConfig(
        num_experts=values.size("num_experts"),
        top_k=values.size("num_experts_per_tok"),
        expert_size=values.size("moe_intermediate_size"),
        shared_size=shared,
        renormalise=values.flag("norm_topk_prob"),
        shared_gate=shared > 0,
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe_config
    window = only_window(config.kinds)
    return {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [block for block, kind in enumerate(config.kinds) if not kind.moe],
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_size,
        "norm_topk_prob": moe.renormalise,
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }


def _write_qwen2(config: ModelConfig) -> dict[str, Any]:
    shared = {"shared_expert_intermediate_size": config.moe_config.shared_size, "qkv_bias": config.qkv_bias}
    return _write(config) | shared | window_keys(config) | {"max_window_layers": config.num_blocks}


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
    if len({kind.window for kind in config.kinds}) > 1:
        raise not_exportable("a window in some blocks", "a window in all blocks or none", "give all blocks the same")
    return _write(config) | {"attention_bias": config.qkv_bias}


def moe_layout(config: ModelConfig) -> Layout:
    """The names in files: experts one by one, a shared one behind its gate where there is one."""
    moe = [BlockTensor("mlp.gate.weight", "mlp/router", 1), *expert_tensors()]
    if config.moe_config.shared_size:
        moe += shared_tensors("mlp.shared_expert")
        moe.append(BlockTensor("mlp.shared_expert_gate.weight", "mlp/shared_router", 1))
    common = [*norm_tensors(), *attention_tensors(config)]
    return Layout(lambda kind: [*common, *(moe if kind.moe else dense_tensors(config))])


MOE_DEFAULTS = DENSE_DEFAULTS | {
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "norm_topk_prob": False,
    "mlp_only_layers": None,
}
QWEN2_MOE = Family(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    defaults=MOE_DEFAULTS
    | {
        "num_key_value_heads": 16,
        "max_window_layers": 28,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
        "qkv_bias": True,
        "layer_types": None,
    },
    read=_read_qwen2,
    write=_write_qwen2,
    layout=moe_layout,
    neutral={"attention_bias": (False, True)},  # not read: qkv_bias decides
)
QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    defaults=MOE_DEFAULTS | {"num_key_value_heads": 4, "moe_intermediate_size": 768, "attention_bias": False},
    read=_read_qwen3,
    write=_write_qwen3,
    layout=moe_layout,
    harmless=frozenset({"max_window_layers"}),  # written by old exports; no code reads it
    aliases={"num_local_experts": "num_experts"},  # as transformers 5 writes it
)
