"""DeepSeek-V2 (also V2-Lite, Coder-V2): latent attention, experts by softmax within the groups of the best expert.

Weights of experts are their probabilities as they are. `norm_topk_prob` is false in all released files; transformers
does not read it, the released code divides by the sum: true is refused.

Source: HF transformers `configuration_deepseek_v2`, `modeling_deepseek_v2`.
"""

from dataclasses import replace
from typing import Any

from distillcache.models.config import ModelConfig
from distillcache.models.families.llama import DENSE_DEFAULTS
from distillcache.models.families.reading.family import Family, common_fields, not_exportable
from distillcache.models.families.reading.grouped import dense_then_experts, sigmoid_moe, sigmoid_moe_keys
from distillcache.models.families.reading.latent import latent_fields, latent_keys, latent_layout
from distillcache.models.families.reading.values import Values

GREEDY, BY_GROUP = "greedy", "group_limited_greedy"


def _read(values: Values) -> ModelConfig:
    method = values["topk_method"] or GREEDY
    if method not in (GREEDY, BY_GROUP):
        raise values.bad("topk_method", f"{GREEDY} or {BY_GROUP}")
    if values.flag("norm_topk_prob"):
        raise values.bad("norm_topk_prob", "false: transformers does not divide, the released code does")
    moe = sigmoid_moe(values, values.size("n_shared_experts"))
    if method == GREEDY:
        moe = replace(moe, groups=1, groups_kept=1)
    moe = replace(moe, scores="softmax", renormalise=False, group_best=1, bias=False, native_bias=False)
    return ModelConfig(
        **common_fields(values, dense_then_experts(values)) | latent_fields(values, interleaved=True),
        moe=moe,
        family="deepseek_v2",
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe_config
    if moe.scores != "softmax" or moe.renormalise or not moe.shared_size or config.hidden_size % config.num_heads:
        raise not_exportable(
            f"scores {moe.scores}, renormalised {moe.renormalise}, a shared expert of {moe.shared_size}, "
            f"{config.num_heads} heads, hidden size {config.hidden_size}",
            "scores of softmax as they are, a shared expert, a number of heads that divides the hidden size",
            "use another family",
        )
    return {
        **latent_keys(config),
        **sigmoid_moe_keys(config),
        "topk_method": BY_GROUP if moe.groups > 1 else GREEDY,
    }


DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    defaults=DENSE_DEFAULTS
    | {
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "attention_bias": False,
        "first_k_dense_replace": 0,
        "n_routed_experts": 64,
        "num_experts_per_tok": None,
        "moe_intermediate_size": 1407,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "n_group": None,
        "topk_group": None,
        "topk_method": GREEDY,
    },
    read=_read,
    write=_write,
    layout=latent_layout,
    # Sums of other keys, losses of training, and how experts were dealt out then.
    harmless=frozenset({"qk_head_dim", "seq_aux", "ep_size"}),
    neutral={
        "scoring_func": ("softmax",),
        "moe_layer_freq": (1,),
        "num_nextn_predict_layers": (0,),
        "rope_interleave": (True,),
    },
    aliases={"num_experts": "n_routed_experts"},
)
