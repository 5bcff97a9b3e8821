"""Mistral with eyes, and two of the text models inside it: Ministral 3 and Mistral 4.

Ministral 3 is a Mistral whose queries grow with the position of their token, behind the rotation; how fast stands among
the parameters of that. Mistral 4 has the latent attention of DeepSeek-V3 with such queries, and experts by softmax
within groups, which files hold together.

`mistral3` is the model with eyes: a `mistral`, `ministral3` or `mistral4` inside its config and behind a prefix of its
tensors, and of it that alone is read and exported.

Source: HF transformers `configuration_mistral3`, `configuration_ministral3`, `configuration_mistral4` and their
modelling code.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from distillcache.models.config import BlockKind, ModelConfig, RopeConfig, TemperatureConfig
from distillcache.models.families.llama import DENSE_DEFAULTS, MISTRAL
from distillcache.models.families.reading.family import (
    Family,
    common_fields,
    dense_layout,
    dense_tensors,
    fused_tensors,
    norm_tensors,
    not_exportable,
    only_kind,
    shared_tensors,
)
from distillcache.models.families.reading.grouped import dense_then_experts, sigmoid_moe, sigmoid_moe_keys
from distillcache.models.families.reading.kinds import check_dense
from distillcache.models.families.reading.latent import fields_of_rope, latent_config, latent_keys, latent_tensors
from distillcache.models.families.reading.multimodal import multimodal_layout, read_language_model, text_family
from distillcache.models.families.reading.values import (
    ORIGINAL,
    PARTIAL,
    ROPE_KEYS,
    Values,
    bad_value,
    is_number,
    rope_from_hf,
    rope_to_hf,
)
from distillcache.models.files.tensors import BlockTensor, Layout

BETA = "llama_4_scaling_beta"
IGNORED = (BETA, "max_position_embeddings")  # among the parameters of the rotation, which does not read them
# What transformers assumes where a config has no such parameters at all.
ASSUMED = {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, BETA: 0.1}
MINISTRAL3_ROPE = ASSUMED | {"rope_theta": 1_000_000.0, "factor": 16.0, ORIGINAL: 16384}
MISTRAL4_ROPE = ASSUMED | {"rope_theta": 10_000.0, "factor": 128.0, ORIGINAL: 8192}


def _rope(
    values: Values, assumed: Mapping[str, Any], share: float | None = None
) -> tuple[RopeConfig, TemperatureConfig | None]:
    """Rotation, and the growth of queries that stands among its parameters.

    Args:
        share: of a head that is rotated where the file is silent; None: the family rotates whole heads.
    """
    raw = {key: values[key] for key in (*ROPE_KEYS, PARTIAL)}
    given = next((raw[key] for key in ("rope_parameters", "rope_scaling") if raw[key] is not None), None)
    if given is None:
        raw["rope_parameters"] = given = assumed
    # Of kinds that do not scale frequencies by it, the length is of the queries alone.
    scaled = isinstance(given, Mapping) and given.get("rope_type", given.get("type")) in ("yarn", "llama3", "longrope")
    ignored = IGNORED if scaled else (*IGNORED, ORIGINAL)
    longest = values.size("max_position_embeddings")
    rope = rope_from_hf(raw, longest, values.file, fraction=share or 1.0, partial=share is not None, ignored=ignored)
    beta = given.get(BETA)
    if beta is None or (is_number(beta) and beta == 0):
        return rope, None
    floor = rope.original_max_positions if scaled else given.get(ORIGINAL)
    for key, value in ((BETA, beta), (ORIGINAL, floor)):
        if value is None or not is_number(value) or not value > 0:
            raise bad_value(values.file, f"rope parameter {key}", value, "a positive number")
    return rope, TemperatureConfig(float(beta), float(floor or 0), first=0, everywhere=True)


def _rope_keys(config: ModelConfig, **more: Any) -> dict[str, Any]:
    """`rope_parameters` of an export. Transformers needs a number for the growth of queries: 0 where there is none."""
    found, rope = config.temperature, config.rope
    floor = rope.original_max_positions or (config.max_positions if found is None else found.floor)
    temperature = found or TemperatureConfig(0.0, floor, first=0, everywhere=True)
    if temperature != replace(temperature, floor=floor, first=0, everywhere=True):
        raise not_exportable(
            str(temperature),
            f"queries of all blocks that grow with positions from 0 by {floor}, as the rotation has it",
            "use another family",
        )
    return {
        "rope_parameters": {**rope_to_hf(rope), ORIGINAL: floor, BETA: temperature.scale, **more},
        "rope_scaling": None,
    }


def _read_ministral3(values: Values) -> ModelConfig:
    kind = BlockKind(values.size_or_none("sliding_window"))
    rope, temperature = _rope(values, MINISTRAL3_ROPE)
    kinds = [kind] * values.size("num_hidden_layers")
    return ModelConfig(**common_fields(values, kinds), rope=rope, temperature=temperature, family="ministral3")


def _write_ministral3(config: ModelConfig) -> dict[str, Any]:
    check_dense(config)
    if config.qkv_bias or config.output_bias or config.mlp_bias:
        raise not_exportable("biases", "none", "use another family")
    return {"sliding_window": only_kind(config).window, **_rope_keys(config)}


def _read_mistral4(values: Values) -> ModelConfig:
    latent = latent_config(values)
    width = latent.plain_dim + latent.rope_dim
    rope, temperature = _rope(values, MISTRAL4_ROPE, share_of(latent.rope_dim, width))
    if int(width * rope.fraction) != latent.rope_dim:
        raise bad_value(values.file, PARTIAL, rope.fraction, f"{latent.rope_dim} of {width} numbers, qk_rope_head_dim")
    rope = replace(rope, fraction=1.0, interleaved=values.flag("rope_interleave"))
    moe = sigmoid_moe(values, values.size("n_shared_experts"))
    return ModelConfig(
        **common_fields(values, dense_then_experts(values)) | fields_of_rope(values, rope),
        temperature=temperature,
        moe=replace(moe, scores="softmax", bias=False, native_bias=False, float32_router=False),
        family="mistral4",
    )


def share_of(part: int, whole: int) -> float:
    """A number of which this many parts of a whole come out, rounded down, as transformers does it."""
    share = part / whole
    return share if int(whole * share) == part else math.nextafter(share, 1.0)


def _write_mistral4(config: ModelConfig) -> dict[str, Any]:
    moe, rope_dim = config.moe_config, config.rope_dim
    if moe.scores != "softmax" or not moe.shared_size:
        raise not_exportable(
            f"scores {moe.scores}, a shared expert of {moe.shared_size}",
            "scores of softmax, a shared expert",
            "use another family",
        )
    return {
        **latent_keys(config),
        "head_dim": config.head_dim,
        **sigmoid_moe_keys(config),
        **_rope_keys(config, **{PARTIAL: share_of(rope_dim, config.head_dim)}),
    }


def _mistral4_layout(config: ModelConfig) -> Layout:
    common = [*norm_tensors(), *latent_tensors(config)]
    moe = [
        BlockTensor("mlp.gate.weight", "mlp/router", 1),
        *fused_tensors("mlp.experts.gate_up_proj", "mlp.experts.down_proj", config.moe_config.expert_size),
        *shared_tensors("mlp.shared_experts"),
    ]
    return Layout(lambda kind: [*common, *(moe if kind.moe else dense_tensors(config))])


MINISTRAL3 = Family(
    name="ministral3",
    architecture="Ministral3ForCausalLM",
    defaults=DENSE_DEFAULTS
    | {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 262_144,
        "sliding_window": None,
    },
    read=_read_ministral3,
    write=_write_ministral3,
    layout=dense_layout,
    neutral={"attention_bias": (False,), "mlp_bias": (False,)},
)
MISTRAL4 = Family(
    name="mistral4",
    architecture="Mistral4ForCausalLM",
    defaults=DENSE_DEFAULTS
    | {
        "num_key_value_heads": None,
        "max_position_embeddings": 1_048_576,
        "q_lora_rank": 1024,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_interleave": True,
        "attention_bias": False,
        "first_k_dense_replace": 0,
        "n_routed_experts": 128,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 2048,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
    },
    read=_read_mistral4,
    write=_write_mistral4,
    layout=_mistral4_layout,
    harmless=frozenset({"qk_head_dim", PARTIAL}),  # a sum of other keys; read with the rotation
    neutral={"num_nextn_predict_layers": (0,), "sliding_window": (None,)},
    aliases={"num_local_experts": "n_routed_experts"},
)
TEXTS = (MISTRAL, MINISTRAL3, MISTRAL4)


def _read_mistral3(values: Values) -> ModelConfig:
    """The head is a matrix of its own unless `text_config` ties it: beside that, transformers 5 writes true of models
    whose files have both."""
    text = text_family(values, *TEXTS)
    inside = values["text_config"].get("tie_word_embeddings")
    tied = values.flag("tie_word_embeddings") if inside is None else bool(inside)
    return replace(read_language_model(values, text), family="mistral3", tie_embeddings=tied)


def text_of(config: ModelConfig) -> Family:
    """The text model that a decoder of `mistral3` is. A Ministral 3 whose queries do not grow is a Mistral."""
    if config.latent is not None:
        return MISTRAL4
    return MISTRAL if config.temperature is None else MINISTRAL3


MISTRAL3 = Family(
    name="mistral3",
    architecture="Mistral3ForConditionalGeneration",
    defaults={"text_config": None, "tie_word_embeddings": False},
    read=_read_mistral3,
    write=lambda config: text_of(config).write(config),
    layout=lambda config: multimodal_layout(text_of(config).layout(config)),
    harmless=frozenset(
        """image_token_id image_token_index multimodal_projector_bias projector_hidden_act spatial_merge_size
        vision_config vision_feature_layer""".split()  # noqa: SIM905 - as in families/reading/keys.py
    ),
)
