"""GLM-4.7-Flash (`glm4_moe_lite`) and GLM-5 (`glm_moe_dsa`): DeepSeek's latent attention, the latter's with an indexer.

In GLM-5.2 some blocks have no indexer, and attend to the keys that the last block before them with one chose.

Source: HF transformers `configuration_glm4_moe_lite`, `configuration_glm_moe_dsa` and their modelling code.
"""

from dataclasses import replace
from typing import Any

from distillcache.models.config import ModelConfig
from distillcache.models.families.deepseek.v3 import DEEPSEEK_V3
from distillcache.models.families.deepseek.v32 import DEEPSEEK_V32
from distillcache.models.families.reading.grouped import (
    check_sigmoid,
    typed_expert_keys,
    typed_experts,
)
from distillcache.models.families.reading.latent import (
    indexed_fields,
    indexed_keys,
    latent_decoder,
    latent_keys,
    read_latent,
)
from distillcache.models.families.reading.values import Values

FULL, SHARED = "full", "shared"  # blocks in `indexer_types`
LETTERS = {"F": FULL, "S": SHARED}  # in `index_topk_pattern`


def _read_lite(values: Values) -> ModelConfig:
    if values["mlp_layer_types"] is None and values["first_k_dense_replace"] not in (None, 1):
        raise values.bad("first_k_dense_replace", "1, or mlp_layer_types, which alone transformers reads")
    return read_latent(values, typed_experts(values), "glm4_moe_lite")


def _write_lite(config: ModelConfig) -> dict[str, Any]:
    check_sigmoid(config)
    return latent_keys(config) | typed_expert_keys(config)


def _read_sparse(values: Values) -> ModelConfig:
    takes = [each == SHARED for each in _indexer_types(values)]
    kinds = [replace(kind, taken_choice=taken) for kind, taken in zip(typed_experts(values), takes, strict=True)]
    return latent_decoder(values, kinds, indexed_fields(values, interleaved=True), "glm_moe_dsa")


def _indexer_types(values: Values) -> list[str]:
    """Every block's, by a list, a pattern of letters, or else in every `index_topk_freq`-th block."""
    depth, key = values.size("num_hidden_layers"), "indexer_types"
    found = values.per_block(key, (FULL, SHARED), depth)
    if found is None and values["index_topk_pattern"] is not None:
        key = "index_topk_pattern"
        pattern = values[key]
        found = [LETTERS.get(each, each) for each in pattern] if isinstance(pattern, str | list) else []
    elif found is None:
        key, offset = "index_skip_topk_offset", values.count("index_skip_topk_offset")
        every = max(values.count("index_topk_freq"), 1)
        found = [SHARED if max(block - offset + 1, 0) % every else FULL for block in range(depth)]
    if len(found) != depth or set(found) - {FULL, SHARED} or found[0] != FULL:
        raise values.bad(key, f"{depth} of {FULL} and {SHARED}, one for each block, the first of which chooses")
    return found


def _write_sparse(config: ModelConfig) -> dict[str, Any]:
    types = [SHARED if kind.taken_choice else FULL for kind in config.kinds]
    return indexed_keys(config, interleaved=True) | {"indexer_types": types}


SIZES = {"max_position_embeddings": 202_752, "rms_norm_eps": 1e-5, "n_group": 1, "topk_group": 1, "v_head_dim": 256}
GLM4_MOE_LITE = replace(
    DEEPSEEK_V3,
    name="glm4_moe_lite",
    architecture="Glm4MoeLiteForCausalLM",
    defaults=dict(DEEPSEEK_V3.defaults)
    | SIZES
    | {
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "first_k_dense_replace": 1,
        "mlp_layer_types": None,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1536,
        "routed_scaling_factor": 1.8,
    },
    read=_read_lite,
    write=_write_lite,
    also=(),
)
GLM_MOE_DSA = replace(
    DEEPSEEK_V32,
    name="glm_moe_dsa",
    architecture="GlmMoeDsaForCausalLM",
    defaults=dict(DEEPSEEK_V32.defaults)
    | SIZES
    | {
        "q_lora_rank": 2048,
        "qk_nope_head_dim": 192,
        "index_n_heads": 32,
        "indexer_types": None,
        "index_topk_pattern": None,
        "index_topk_freq": 1,
        "index_skip_topk_offset": 2,
    },
    read=_read_sparse,
    write=_write_sparse,
    harmless=DEEPSEEK_V32.harmless | {"index_share_for_mtp_iteration"},
    neutral=dict(DEEPSEEK_V32.neutral) | {"indexer_rope_interleave": (True,), "moe_router_dtype": ("float32",)},
)
