"""Hunyuan: Llama's blocks whose queries and keys are normed per head after the rotation; and its mixture of experts, of
which every token takes a shared one besides.

The files call the rotation `dynamic`, with an `alpha` that stretches its base once for all lengths: it is the default
one with another base, and exported as that.

Source: HF transformers `configuration_hunyuan_v1_dense`, `configuration_hunyuan_v1_moe` and their modelling code; what
published files have beside that, from the makers' configuration classes.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from distillcache.models.config import BlockKind, ModelConfig, MoeConfig, RopeConfig
from distillcache.models.families.llama import DENSE_DEFAULTS
from distillcache.models.families.reading.family import (
    Family,
    attention_tensors,
    check_plain,
    common_fields,
    dense_tensors,
    expert_tensors,
    norm_tensors,
    not_exportable,
    only_kind,
    shared_tensors,
)
from distillcache.models.families.reading.values import Values, is_number
from distillcache.models.files.tensors import BlockTensor, Layout

NORMS = ("query_layernorm", "key_layernorm")
YARN_KEYS = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")  # in the published files; `dynamic` reads none


def _fields(values: Values, kind: BlockKind) -> dict[str, Any]:
    bias = values.flag("attention_bias")
    common = common_fields(values, [kind] * values.size("num_hidden_layers"))
    return common | {
        "rope": _rope(values, common["head_dim"]),
        "qkv_bias": bias,
        "output_bias": bias,
        "qk_norm": "turned",
    }


def _rope(values: Values, width: int) -> RopeConfig:
    given = values["rope_parameters"] or values["rope_scaling"]
    dynamic = isinstance(given, Mapping) and "dynamic" in (given.get("rope_type"), given.get("type"))
    rope = values.rope(ignored=("alpha", *YARN_KEYS) if dynamic else ())
    alpha = given.get("alpha") if isinstance(given, Mapping) else None
    if not dynamic or not alpha:
        return rope
    if not is_number(alpha) or alpha <= 0 or width < 4:
        raise values.bad("rope_scaling", "an alpha that is a positive number, and heads of at least 4 numbers")
    return replace(rope, kind="default", factor=1.0, theta=rope.theta * alpha ** (width / (width - 2)))


def _read(values: Values) -> ModelConfig:
    return ModelConfig(**_fields(values, BlockKind()), family="hunyuan_v1_dense")


def _read_moe(values: Values) -> ModelConfig:
    width = values.size("intermediate_size")
    for key, one in {"moe_intermediate_size": width, "num_shared_expert": 1}.items():
        if values[key] is not None and _of_all(values, key) != one:
            raise values.bad(key, f"{one} in every block")
    return ModelConfig(
        **_fields(values, BlockKind(moe=True)),
        moe=MoeConfig(
            num_experts=_of_all(values, "num_experts"),
            top_k=_of_all(values, "moe_topk"),
            expert_size=width,
            shared_size=width,
            float32_router=True,
        ),
        family="hunyuan_v1_moe",
    )


def _of_all(values: Values, key: str) -> int:
    """A size that a file may state once or for every block."""
    found = values[key]
    if not isinstance(found, list):
        return values.size(key)
    if not found or any(each != found[0] for each in found):
        raise values.bad(key, "the same number for every block")
    return Values({key: found[0]}, {}, values.file).size(key)


def _write(config: ModelConfig) -> dict[str, Any]:
    check_plain(config)
    if config.mlp_bias:
        raise not_exportable("biases of the MLP", "none", "use another family")
    return _attention_keys(config)


def _write_moe(config: ModelConfig) -> dict[str, Any]:
    moe, kind = config.moe_config, only_kind(config)
    if kind != BlockKind(moe=True) or moe.shared_size != moe.expert_size:
        raise not_exportable(
            f"{kind}, experts of {moe.expert_size} and a shared one of {moe.shared_size}",
            "experts in all blocks, without windows, and a shared one of their width",
            "give all experts one width",
        )
    return _attention_keys(config) | {
        "intermediate_size": moe.expert_size,
        "num_experts": moe.num_experts,
        "moe_topk": moe.top_k,
    }


def _attention_keys(config: ModelConfig) -> dict[str, Any]:
    if config.qkv_bias != config.output_bias:
        raise not_exportable("some biases of attention", "all or none", "use another family")
    return {"attention_bias": config.qkv_bias, "use_qk_norm": True}


def _layout(config: ModelConfig) -> Layout:
    common = [*norm_tensors(), *attention_tensors(config, NORMS)]
    if config.moe is None:
        return Layout(lambda kind: [*common, *dense_tensors(config)])
    router = BlockTensor("mlp.gate.wg.weight", "mlp/router", 1)
    return Layout(lambda kind: [*common, router, *expert_tensors(), *shared_tensors("mlp.shared_mlp")])


DEFAULTS = DENSE_DEFAULTS | {
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "attention_bias": False,
}
# Tokens of special meaning, training, pictures, and sizes of what `NEUTRAL` says is off.
HARMLESS = frozenset(
    """anyres_pooling_size anyres_vit_max_image_size anyres_vit_two_views cat_extra_token cla_share_factor class_num
    dense_list enable_lm_head_fp32 eod_token_id expert_hidden_dim im_end_id im_newline_id im_start_id image_token_id
    kv_lora_rank mask_init_id max_num_patches moe_drop_tokens moe_random_routing_dropped_token n_group num_media_embeds
    org_vocab_size pool_type q_lora_rank qk_nope_head_dim qk_rope_head_dim skip_cls_token text_end_id text_start_id
    topk_group v_head_dim video_end_id video_start_id vit_add_patchemb_bias vit_input_resolution vit_mapping_type
    vit_norm_type vit_patch vit_path vit_remove_prenorm vit_token vit_type vit_used_rms_norm xdrope_section""".split()  # noqa: SIM905 - as in families/reading/keys.py
)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_classification_head": (False,),
    "group_limited_greedy": (False,),
    "moe_layer_num_skipped": (0,),
    "norm_topk_prob": (True,),
    "norm_type": ("hf_rms", "rms", "fused"),
    "position_embedding_xdrope": (False,),
    "routed_scaling_factor": (1, False),
    "use_cla": (False,),
    "use_mla": (False,),
    "use_rotary_pos_emb": (True,),
}
ALIASES = {"attention_head_dim": "head_dim"}
HUNYUAN_DENSE = Family(
    name="hunyuan_v1_dense",
    architecture="HunYuanDenseV1ForCausalLM",
    defaults=DEFAULTS,
    read=_read,
    write=_write,
    layout=_layout,
    harmless=HARMLESS | {"moe_intermediate_size"},
    neutral=NEUTRAL | {"num_experts": (1,), "moe_topk": (1,), "num_shared_expert": (1,), "use_mixed_mlp_moe": (False,)},
    aliases=ALIASES,
)
HUNYUAN_MOE = Family(
    name="hunyuan_v1_moe",
    architecture="HunYuanMoEV1ForCausalLM",
    defaults=DEFAULTS | {"num_experts": 1, "moe_topk": 1, "moe_intermediate_size": None, "num_shared_expert": None},
    read=_read_moe,
    write=_write_moe,
    layout=_layout,
    harmless=HARMLESS,
    neutral=NEUTRAL | {"use_mixed_mlp_moe": (True,)},
    aliases=ALIASES | {"num_experts_per_tok": "moe_topk", "num_local_experts": "num_experts"},
)
