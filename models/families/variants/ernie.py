"""ERNIE 4.5: Llama's blocks whose heads rotate neighbours, with one switch for all biases; and its mixture of experts.

Experts are ranked by their probabilities plus a bias. Files name that bias and the weights of multi-token prediction as
the makers' code does, and transformers reads them so.

Source: HF transformers `configuration_ernie4_5`, `configuration_ernie4_5_moe` and their modelling code.
"""

from dataclasses import replace
from typing import Any

from distillcache.models.config import BlockKind, ModelConfig, MoeConfig
from distillcache.models.families.llama import DENSE_DEFAULTS
from distillcache.models.families.reading.family import (
    Family,
    attention_tensors,
    check_plain,
    common_fields,
    dense_layout,
    dense_tensors,
    expert_tensors,
    norm_tensors,
    not_exportable,
    shared_tensors,
)
from distillcache.models.families.reading.grouped import shared_experts
from distillcache.models.families.reading.values import Values
from distillcache.models.files.tensors import BlockTensor, Layout

BIAS = "mlp.moe_statics.e_score_correction_bias"
LAST = "moe_layer_end_index"


def _fields(values: Values, kinds: list[BlockKind]) -> dict[str, Any]:
    bias = values.flag("use_bias")
    return common_fields(values, kinds) | {
        "rope": replace(values.rope(theta=500_000.0), interleaved=True),
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": bias,
    }


def _read(values: Values) -> ModelConfig:
    return ModelConfig(**_fields(values, [BlockKind()] * values.size("num_hidden_layers")), family="ernie4_5")


def _write(config: ModelConfig) -> dict[str, Any]:
    check_plain(config)
    if len({config.qkv_bias, config.output_bias, config.mlp_bias}) > 1:
        raise not_exportable("some biases", "all or none", "use another family")
    return {"use_bias": config.qkv_bias}


def _read_moe(values: Values) -> ModelConfig:
    if values.flag("use_bias"):
        raise values.bad("use_bias", "false: experts and the head would have none, or one that files do not hold")
    width = values.size("moe_intermediate_size")
    return ModelConfig(
        **_fields(values, _kinds(values)),
        moe=MoeConfig(
            num_experts=values.size("moe_num_experts"),
            top_k=values.size("moe_k"),
            expert_size=width,
            shared_size=width * values.count("moe_num_shared_experts"),
            bias=True,
            native_bias=True,
            bias_on_scores=True,
            float32_router=True,
        ),
        family="ernie4_5_moe",
    )


def _kinds(values: Values) -> list[BlockKind]:
    """Experts in every `moe_layer_interval`-th block from the first index to the last one; -1 is the last block."""
    depth, step, first = (
        values.size("num_hidden_layers"),
        values.size("moe_layer_interval"),
        values.count("moe_layer_start_index"),
    )
    last = depth - 1 if values[LAST] in (None, -1) else values.count(LAST)
    return [BlockKind(moe=first <= block <= last and (block + 1) % step == 0) for block in range(depth)]


def _write_moe(config: ModelConfig) -> dict[str, Any]:
    moe, blocks = config.moe_config, config.moe_blocks
    first, last = (blocks[0], blocks[-1]) if blocks else (1, 0)
    step = next((n for n in range(1, config.num_blocks + 1) if _placed(first, last, n) == list(blocks)), None)
    if step is None or any(replace(kind, moe=False) != BlockKind() for kind in config.kinds):
        raise not_exportable(
            f"experts in blocks {', '.join(map(str, blocks))}",
            "experts in every n-th block of a run, all blocks rotary and without windows",
            "export a decoder with such blocks",
        )
    return {
        "use_bias": False,
        "moe_num_experts": moe.num_experts,
        "moe_k": moe.top_k,
        "moe_intermediate_size": moe.expert_size,
        "moe_num_shared_experts": shared_experts(moe),
        "moe_layer_start_index": first,
        LAST: last,
        "moe_layer_interval": step,
    }


def _placed(first: int, last: int, step: int) -> list[int]:
    return [block for block in range(first, last + 1) if (block + 1) % step == 0]


def _moe_layout(config: ModelConfig) -> Layout:
    moe = [
        BlockTensor("mlp.gate.weight", "mlp/router", 1),
        BlockTensor(BIAS, "mlp/router_bias", 1),  # one row
        *expert_tensors(),
        *(shared_tensors("mlp.shared_experts") if config.moe_config.shared_size else []),
    ]
    common = [*norm_tensors(), *attention_tensors(config)]
    return Layout(
        lambda kind: [*common, *(moe if kind.moe else dense_tensors(config))],
        foreign=("model.mtp_",),
    )


DEFAULTS = DENSE_DEFAULTS | {
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
    "use_bias": False,
}
ERNIE4_5 = Family(
    name="ernie4_5",
    architecture="Ernie4_5ForCausalLM",
    defaults=DEFAULTS | {"num_key_value_heads": 2, "head_dim": 128},
    read=_read,
    write=_write,
    layout=dense_layout,
)
ERNIE4_5_MOE = Family(
    name="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    defaults=DEFAULTS
    | {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 1536,
        "moe_k": 6,
        "moe_num_experts": 64,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        LAST: -1,
        "moe_layer_interval": 1,
    },
    read=_read_moe,
    write=_write_moe,
    layout=_moe_layout,
    # Training, and what follows from the rest; a checkpoint without biases of the choice is refused for its tensors.
    harmless=frozenset({"moe_capacity", "moe_use_aux_free", "num_nextn_predict_layers"}),
    neutral={"moe_gate": ("topk", "top2_fused"), "moe_gate_act": ("softmax",), "moe_norm_min": (1e-12,)},
    aliases={"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"},
)
