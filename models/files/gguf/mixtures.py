"""Translations of architectures whose blocks have experts, behind attention that may be latent.

Some of a config is not in these files. Of DeepSeek-V2's choice within groups they have the groups' numbers, not how
groups are ranked: it is the model's own way here. `mscale` of YaRN is taken to be `mscale_all_dim`, as in all released
files of DeepSeek. Queries of Mistral 4 grow where a file says so; that of transformers' weights does not.

Source: llama.cpp `conversion/deepseek.py`, `mistral3.py` (Mistral4Model), `kimi_linear.py`, `glm.py`, `minimax.py`,
`dots1.py`, `ernie.py`, `hunyuan.py`, `gpt_oss.py`, `olmo.py` (OlmoeModel); `src/models/*.cpp` for what is assumed
without a key.
"""

from typing import Any

from distillcache.models.families.mistral import BETA, share_of
from distillcache.models.families.reading.keys import LINEAR
from distillcache.models.families.reading.kinds import FULL, SLIDING
from distillcache.models.families.reading.values import ORIGINAL, PARTIAL
from distillcache.models.files.gguf.translated import (
    BIAS,
    INNER,
    ROUTED,
    ROUTING,
    GgufModel,
    Translation,
    rope_keys,
)
from distillcache.models.files.gguf.values import SIGMOID, SOFTMAX

YARN = frozenset(f"rope.scaling.yarn_{key}" for key in ("beta_fast", "beta_slow", "log_multiplier"))
LATENT = frozenset(f"attention.{key}_length_mla" for key in ("key", "value"))
AHEAD_IN_HF = "num_nextn_predict_layers"


def _latent(model: GgufModel) -> dict[str, Any]:
    """Sizes of latent attention. Files of 2025 and later have those of a head under keys of their own, beside sizes of
    what is cached."""
    values, turned = model.values, model.values.size("rope.dimension_count")
    key, value = (
        values.size(f"attention.{part}_length_mla", values.get(f"attention.{part}_length")) for part in ("key", "value")
    )
    if key <= turned:
        raise values.bad("attention.key_length_mla", key, f"more than {turned}, which is rotated")
    return {
        "qk_nope_head_dim": key - turned,
        "qk_rope_head_dim": turned,
        "v_head_dim": value,
        "head_dim": turned,
        "num_key_value_heads": model.size("attention.head_count"),
        "rope_parameters": _yarn(model),
        PARTIAL: 1.0,
    }


def _yarn(model: GgufModel) -> dict[str, Any]:
    """Its amplitude is a tenth of `mscale_all_dim` here, times the factor's logarithm."""
    values = model.values
    found = rope_keys(model, values.size("rope.dimension_count"))
    if found["rope_type"] != "yarn":
        return found
    given = [key for key in ("beta_fast", "beta_slow") if values.get(f"rope.scaling.yarn_{key}") is not None]
    betas = {key: values.number(f"rope.scaling.yarn_{key}", 1.0) for key in given}
    if not values.get("rope.scaling.yarn_log_multiplier"):
        return found | betas
    amplitude = round(10 * values.number("rope.scaling.yarn_log_multiplier", 1.0), 6)
    return found | betas | {"mscale": amplitude, "mscale_all_dim": amplitude}


def _deepseek(model: GgufModel) -> dict[str, Any]:
    grouped = model.values.size("expert_group_count", 1) > 1
    if model.values.get("expert_gating_func") == SIGMOID:
        return {**_latent(model), **_ahead(model)}
    return {**_latent(model), "topk_method": "group_limited_greedy" if grouped else "greedy"}


def _ahead(model: GgufModel) -> dict[str, Any]:
    return {AHEAD_IN_HF: model.ahead}


def _mistral4(model: GgufModel) -> dict[str, Any]:
    """Queries grow from the length on that YaRN scales from."""
    values, found = model.values, _latent(model)
    turned, rope = found["qk_rope_head_dim"], found["rope_parameters"]
    width = found["qk_nope_head_dim"] + turned
    if values.get("attention.temperature_scale"):
        floor = values.size("rope.scaling.original_context_length", values.size("context_length"))
        rope |= {BETA: values.number("attention.temperature_scale", 1.0), ORIGINAL: floor}
    return found | {"head_dim": width, PARTIAL: None, "rope_parameters": rope | {PARTIAL: share_of(turned, width)}}


def _indexed(model: GgufModel) -> dict[str, Any]:
    """Blocks without an indexer, by their tensors, attend to the keys that an earlier block chose."""
    types = ["full" if model.has("indexer.proj.weight", block) else "shared" for block in range(model.depth)]
    return {**_latent(model), **_ahead(model), "indexer_types": types}


def _kimi(model: GgufModel) -> dict[str, Any]:
    """Blocks are recurrent by their tensors, of as many heads as one has rates."""
    kinds = [model.has("ssm_beta.weight", block) for block in range(model.depth)]
    if not any(kinds):
        raise model.values.bad("kda.head_dim", model.values.get("kda.head_dim"), "blocks with ssm_beta")
    types = [LINEAR if recurrent else FULL for recurrent in kinds]
    heads = model.rows(f"blk.{kinds.index(True)}.ssm_beta.weight")
    return {**_latent(model), **_ahead(model), "layer_types": types, "linear_num_heads": heads}


def _ernie(model: GgufModel) -> dict[str, Any]:
    sparse = [block for block in range(model.depth) if model.has("ffn_gate_inp.weight", block)]
    return {"moe_layer_end_index": max(sparse, default=-1)}


def _gpt_oss(model: GgufModel) -> dict[str, Any]:
    """Every second block sees all. The correction range of YaRN has no rounding, as the model has it."""
    rope = rope_keys(model)
    window = model.values.size("attention.sliding_window")
    types = [FULL if block % 2 else SLIDING for block in range(model.depth)]
    exact = {"truncate": False} if rope["rope_type"] == "yarn" else {}
    return {"sliding_window": window, "layer_types": types, "rope_parameters": rope | exact}


DENSE_FIRST = {"leading_dense_block_count": "first_k_dense_replace"}
RANKS = {"attention.q_lora_rank": "q_lora_rank", "attention.kv_lora_rank": "kv_lora_rank"}
LATENT_BIAS = {"attention_bias": "attn_kv_a_mqa.bias"}
INDEXER = {"head_count": "index_n_heads", "key_length": "index_head_dim", "top_k": "index_topk"}
USED = {"expert_used_count": "num_experts_per_tok"}
MIXTURES = {
    "minimax-m2": Translation(
        {None: "minimax_m2", SIGMOID: "minimax_m2"},
        {"expert_count": "num_local_experts", **USED},
        more=lambda model: {"rotary_dim": model.values.get("rope.dimension_count")},
    ),
    "deepseek2": Translation(
        {None: "deepseek_v2", SOFTMAX: "deepseek_v2", SIGMOID: "deepseek_v3"},
        {**ROUTED, **DENSE_FIRST, **RANKS},
        {**ROUTING, "q_lora_rank": None},
        LATENT_BIAS,
        _deepseek,
        LATENT | YARN,
    ),
    "mistral4": Translation(
        {None: "mistral4", SOFTMAX: "mistral4"},
        {**ROUTED, **DENSE_FIRST, **RANKS},
        {**ROUTING, "q_lora_rank": None},
        LATENT_BIAS,
        _mistral4,
        LATENT | YARN | {"attention.temperature_scale"},
    ),
    "glm-dsa": Translation(
        {None: "glm_moe_dsa", SIGMOID: "glm_moe_dsa"},
        {**ROUTED, **DENSE_FIRST, **RANKS} | {f"attention.indexer.{ours}": theirs for ours, theirs in INDEXER.items()},
        ROUTING,
        LATENT_BIAS,
        _indexed,
        LATENT | YARN | {"attention.indexer.types"},
    ),
    "kimi-linear": Translation(
        {None: "kimi_linear", SIGMOID: "kimi_linear"},
        {
            **ROUTED,
            **DENSE_FIRST,
            **RANKS,
            "kda.head_dim": "linear_head_dim",
            "ssm.conv_kernel": "linear_conv_kernel_dim",
        },
        {**ROUTING, "norm_topk_prob": True, "q_lora_rank": None},
        LATENT_BIAS,
        _kimi,
        LATENT,
    ),
    "glm4moe": Translation(
        {None: "glm4_moe", SIGMOID: "glm4_moe"},
        {**ROUTED, **DENSE_FIRST},
        {**ROUTING, "first_k_dense_replace": 0},
        {**BIAS, "use_qk_norm": "attn_q_norm.weight"},
        _ahead,
    ),
    "dots1": Translation(
        {None: "dots1", SIGMOID: "dots1"}, {**ROUTED, **DENSE_FIRST}, {**ROUTING, "sliding_window": None}, BIAS
    ),
    "ernie4_5-moe": Translation(
        {None: "ernie4_5_moe", SOFTMAX: "ernie4_5_moe"},
        {
            **INNER,
            "expert_count": "moe_num_experts",
            "expert_used_count": "moe_k",
            "expert_shared_count": "moe_num_shared_experts",
            "interleave_moe_layer_step": "moe_layer_interval",
            "leading_dense_block_count": "moe_layer_start_index",
        },
        more=_ernie,
        reads=frozenset({"expert_shared_feed_forward_length"}),  # of HF's `intermediate_size`, which it is not
    ),
    "hunyuan-moe": Translation(
        {None: "hunyuan_v1_moe", SOFTMAX: "hunyuan_v1_moe"},
        {
            **INNER,
            "expert_count": "num_experts",
            "expert_used_count": "moe_topk",
            "expert_shared_count": "num_shared_expert",
        },
        said=BIAS,
        reads=frozenset({"expert_shared_feed_forward_length"}),
    ),
    "gpt-oss": Translation(
        {None: "gpt_oss", SOFTMAX: "gpt_oss"},
        {"expert_count": "num_local_experts", **USED},
        said=BIAS,
        more=_gpt_oss,
        reads=frozenset({"attention.sliding_window"}) | YARN,
    ),
    "olmoe": Translation(
        {None: "olmoe", SOFTMAX: "olmoe"}, {"expert_count": "num_experts", **USED}, {"norm_topk_prob": False}, BIAS
    ),
}
