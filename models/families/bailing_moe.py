"""Bailing (Ling and Ring): queries, keys and values in one tensor; experts, of which some take all tokens.

Two versions under one `model_type`, told apart by `architectures`. The first weighs experts by their softmax, and can
norm its head. The second ranks them by sigmoid and bias within the best groups, norms queries and keys, and rotates a
part of each head. Transformers has neither; the published checkpoints bring the code with them.

The second has two published config classes, Ling's and Ming's, that assume different values for many keys: where they
do, nothing is assumed. Its reference code always renormalises the weights of several experts and always takes the
sigmoid in float32, whatever `norm_topk_prob`, `score_function` and `router_dtype` say; other readers obey the keys, so
values that would make a difference are refused.

Sources: inclusionAI/Ling and inclusionAI/Ling-V2, `models/configuration_*.py`, `models/modeling_*.py`, and Ling-V2's
converter from Megatron, which writes config.json; inclusionAI/Ming, `configuration_bailing_moe_v2.py`.
"""

from typing import Any

from distillcache.models.config import ModelConfig, MoeConfig, RopeConfig
from distillcache.models.families.reading.family import (
    Family,
    common_fields,
    dense_tensors,
    norm_tensors,
    not_exportable,
)
from distillcache.models.families.reading.grouped import (
    dense_then_experts,
    expert_groups,
    first_dense,
    moe_tensors,
    mtp_prefixes,
    shared_experts,
)
from distillcache.models.families.reading.values import PARTIAL, Values
from distillcache.models.files.tensors import BlockTensor, Layout, TensorSlice
from distillcache.models.layers.rope import rotated_width
from distillcache.schemas.counted import counted

# The first version's own YaRN differs from transformers' in what it assumes, and it has no other scalings.
FIRST_ROPES = ("default", "linear", "dynamic")


def _read_first(values: Values) -> ModelConfig:
    rope = values.rope()
    if rope.kind not in FIRST_ROPES:
        raise values.bad("rope_scaling", f"one of the kinds {', '.join(FIRST_ROPES)}")
    norm_head = values.flag("norm_head")
    if norm_head and values.flag("tie_word_embeddings"):
        raise values.bad("norm_head", "false where the head is the embedding")
    top_k, width = values.size("num_experts_per_tok"), values.size("moe_intermediate_size")
    return ModelConfig(
        **common_fields(values, dense_then_experts(values)),
        rope=rope,
        qkv_bias=values.flag("use_qkv_bias"),
        output_bias=values.flag("use_bias"),
        norm_head=norm_head,
        moe=MoeConfig(
            num_experts=values.size("num_experts"),
            top_k=top_k,
            expert_size=width,
            shared_size=values.count("num_shared_experts") * width,
            renormalise=values.flag("norm_topk_prob") and top_k > 1,
        ),
        family="bailing_moe",
    )


def _read_second(values: Values) -> ModelConfig:
    for key in STATED:
        if values[key] is None:
            raise values.bad(key, "a value: what is assumed without one differs between the published checkpoints")
    fields = common_fields(values, dense_then_experts(values))
    return ModelConfig(
        **fields,
        rope=_second_rope(values, fields["head_dim"]),
        qkv_bias=values.flag("use_qkv_bias"),
        output_bias=values.flag("use_bias"),
        qk_norm="head" if values.flag("use_qk_norm") else "none",
        moe=_second_moe(values),
        mtp_layers=values.count("num_nextn_predict_layers"),
        family="bailing_moe_v2",
    )


def _second_rope(values: Values, head_dim: int) -> RopeConfig:
    """The rotated part of a head is stated as a share, or as a width, or is all of it."""
    parameters = values["rope_parameters"]
    if values["rope_theta"] is None and not (isinstance(parameters, dict) and "rope_theta" in parameters):
        raise values.bad("rope_theta", "a value: what is assumed without one differs between the published checkpoints")
    width = values.size_or_none("rotary_dim")
    rope = values.rope(fraction=1.0 if width is None else width / head_dim, partial=True)
    if width is not None and rotated_width(rope, head_dim) != width:
        raise values.bad("rotary_dim", f"{rotated_width(rope, head_dim)}: {rope.fraction} of a head of {head_dim}")
    return rope


def _second_moe(values: Values) -> MoeConfig:
    top_k, width = values.size("num_experts_per_tok"), values.size("moe_intermediate_size")
    groups, kept = expert_groups(values)
    if values["moe_shared_expert_intermediate_size"] not in (None, width):
        raise values.bad("moe_shared_expert_intermediate_size", f"{width}, which is moe_intermediate_size")
    return MoeConfig(
        num_experts=values.size("num_experts"),
        top_k=top_k,
        expert_size=width,
        shared_size=values.count("num_shared_experts") * width,
        scores="sigmoid",
        renormalise=top_k > 1,
        scaling=values.number("routed_scaling_factor"),
        groups=groups,
        groups_kept=kept,
        bias=values.flag("moe_router_enable_expert_bias"),
        native_bias=True,
        float32_router=True,
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe_config
    return {
        "first_k_dense_replace": first_dense(config),
        "use_qkv_bias": config.qkv_bias,
        "use_bias": config.output_bias,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_size,
        "num_shared_experts": shared_experts(moe),
        "norm_topk_prob": moe.renormalise,
    }


def _write_first(config: ModelConfig) -> dict[str, Any]:
    if config.rope.kind not in FIRST_ROPES:
        raise not_exportable(f"rotary scaling {config.rope.kind}", ", ".join(FIRST_ROPES), "use another family")
    written = _write(config) | {"norm_head": config.norm_head}
    # To its code any number means a shared expert, 0 too; and it calls the scaling's kind `type`.
    written |= {"num_shared_experts": written["num_shared_experts"] or None}
    if config.rope.kind != "default":
        written |= {"rope_scaling": {"type": config.rope.kind, "factor": config.rope.factor}}
    return written


def _write_second(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe_config
    if moe.renormalise != (moe.top_k > 1):
        raise not_exportable(
            f"weights of {counted(moe.top_k, 'expert')}, {'' if moe.renormalise else 'not '}renormalised",
            "renormalised where a token has several experts",
            "change renormalise",
        )
    return _write(config) | {
        "model_type": "bailing_moe",  # as in the published checkpoints
        PARTIAL: config.rope.fraction,
        "use_qk_norm": config.qk_norm == "head",
        "norm_topk_prob": True,
        "score_function": "sigmoid",
        "router_dtype": "fp32",
        "moe_router_enable_expert_bias": moe.bias,
        "routed_scaling_factor": moe.scaling,
        "n_group": moe.groups,
        "topk_group": moe.groups_kept,
        "num_nextn_predict_layers": 0,
    }


def _layout(config: ModelConfig) -> Layout:
    moe = moe_tensors(config, "mlp.gate.expert_bias")
    common = [*norm_tensors(), *_attention_tensors(config)]
    return Layout(
        lambda kind: [*common, *(moe if kind.moe else dense_tensors(config))],
        embed="model.word_embeddings.weight",
        foreign=mtp_prefixes(config),
    )


def _attention_tensors(config: ModelConfig) -> list[BlockTensor]:
    """The rows of `query_key_value` are all queries, then all keys, then all values."""
    queries, keys = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))
    ends = {"q": (0, queries), "k": (queries, queries + keys), "v": (queries + keys, queries + 2 * keys)}
    parts = {name: TensorSlice(0, *span, queries + 2 * keys) for name, span in ends.items()}
    fused = "attention.query_key_value"
    found = [BlockTensor(f"{fused}.weight", f"attention/{name}", 1, part) for name, part in parts.items()]
    if config.qkv_bias:
        found += [BlockTensor(f"{fused}.bias", f"attention/{name}_bias", part=part) for name, part in parts.items()]
    found.append(BlockTensor("attention.dense.weight", "attention/o", 2))
    if config.output_bias:
        found.append(BlockTensor("attention.dense.bias", "attention/o_bias"))
    if config.qk_norm == "head":
        found.append(BlockTensor("attention.query_layernorm.weight", "attention/q_norm"))
        found.append(BlockTensor("attention.key_layernorm.weight", "attention/k_norm"))
    return found


# Keys that both versions' code does not read, or only in training.
HARMLESS = frozenset({"max_window_layers", "sliding_window", "mtp_loss_scaling_factor"})
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "use_sliding_window": (False, None),
    "use_rmsnorm": (True, None),
    "norm_softmax": (False, None),
}
# Keys of the second version for which Ling and Ming assume different values.
STATED = (
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
    "use_bias",
    "use_qk_norm",
    "first_k_dense_replace",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "num_shared_experts",
    "routed_scaling_factor",
)
COMMON_DEFAULTS: dict[str, Any] = {"hidden_act": "silu", "tie_word_embeddings": False, "use_qkv_bias": False}
BAILING_MOE = Family(
    name="bailing_moe",
    architecture="BailingMoeForCausalLM",
    defaults=COMMON_DEFAULTS
    | {
        "num_key_value_heads": 0,  # its own class assumes 0, with which nothing can be computed
        "head_dim": None,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 16384,
        "use_bias": True,
        "norm_head": False,
        "first_k_dense_replace": 0,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": None,
        "num_shared_experts": 0,
        "norm_topk_prob": True,
    },
    read=_read_first,
    write=_write_first,
    layout=_layout,
    harmless=HARMLESS,
    neutral=NEUTRAL
    | {
        "use_qk_norm": (False, None),
        "score_function": ("softmax", None),
        "moe_router_enable_expert_bias": (False, None),
        "routed_scaling_factor": (1, None),
        "n_group": (0, 1, None),
        "topk_group": (0, 1, None),
        "num_nextn_predict_layers": (0, None),
    },
)
BAILING_MOE_V2 = Family(
    name="bailing_moe_v2",
    architecture="BailingMoeV2ForCausalLM",
    also=("bailing_moe",),
    defaults=COMMON_DEFAULTS
    | dict.fromkeys((*STATED, PARTIAL, "rotary_dim", "moe_shared_expert_intermediate_size"))
    | {"n_group": 8, "topk_group": 4, "moe_router_enable_expert_bias": True, "num_nextn_predict_layers": 0},
    read=_read_second,
    write=_write_second,
    layout=_layout,
    harmless=HARMLESS,
    neutral=NEUTRAL
    | {
        "norm_head": (False, None),
        "norm_topk_prob": (True, None),
        "score_function": ("sigmoid", None),
        "router_dtype": ("fp32", None),
        "router_type": ("topN", None),
        "moe_router_enable_routed_scaling": (True, None),
        "moe_router_enable_shared_expert": (True, None),
    },
)
