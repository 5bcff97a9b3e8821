"""Bamba: blocks with Mamba-2, and with attention where `attn_layer_indices` names them; attention rotates half a head.

Source: HF transformers `configuration_bamba`, `modeling_bamba`.
"""

from typing import Any

from distillcache.models.config import BlockKind, ModelConfig
from distillcache.models.families.llama import DENSE_DEFAULTS
from distillcache.models.families.mamba.sizes import (
    HARMLESS,
    MAMBA_DEFAULTS,
    check_hybrid,
    expand_keys,
    mamba_sizes,
    mamba_tensors,
)
from distillcache.models.families.reading.family import (
    Family,
    attention_tensors,
    common_fields,
    dense_tensors,
    not_exportable,
)
from distillcache.models.families.reading.keys import LINEAR
from distillcache.models.families.reading.kinds import FULL
from distillcache.models.families.reading.values import PARTIAL, Values
from distillcache.models.files.tensors import BlockTensor, Layout

HALF = 0.5  # of a head, whatever the config says
ATTENDING = "attn_layer_indices"


def _read(values: Values) -> ModelConfig:
    depth = values.size("num_hidden_layers")
    attending = values.blocks(ATTENDING, depth)
    kinds = [BlockKind(mixer="attention" if block in attending else "mamba2") for block in range(depth)]
    types = [FULL if block in attending else LINEAR for block in range(depth)]
    if values["layer_types"] not in (None, types):
        raise values.bad("layer_types", f"what {ATTENDING} says")
    rope, bias = values.rope(fraction=HALF, partial=True), values.flag("attention_bias")
    if rope.fraction != HALF:
        raise values.bad(PARTIAL, f"{HALF}: transformers rotates half a head in this family")
    return ModelConfig(
        **common_fields(values, kinds),
        rope=rope,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=values.flag("mlp_bias"),
        mamba=mamba_sizes(values) if any(kind.is_mamba for kind in kinds) else None,
        family="bamba",
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    check_hybrid(config, rotary=True)
    if config.moe_blocks or config.qkv_bias != config.output_bias or config.rope.fraction != HALF:
        raise not_exportable(
            f"{len(config.moe_blocks)} blocks with experts, biases {config.qkv_bias}, {config.output_bias}, "
            f"{config.rope.fraction} of a head rotated",
            f"dense blocks, all biases of attention or none, {HALF}",
            "export it in another family",
        )
    return {
        **expand_keys(config),
        ATTENDING: [block for block, kind in enumerate(config.kinds) if kind.attends],
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }


def _layout(config: ModelConfig) -> Layout:
    by_mixer = {"attention": attention_tensors(config)}
    if config.mamba is not None:
        by_mixer["mamba2"] = mamba_tensors(config)
    norms = [
        BlockTensor("input_layernorm.weight", "attention/norm"),
        BlockTensor("pre_ff_layernorm.weight", "mlp/norm"),
    ]
    return Layout(
        lambda kind: [*norms, *by_mixer[kind.mixer], *dense_tensors(config, "feed_forward")],
        final_norm="model.final_layernorm.weight",
    )


BAMBA = Family(
    name="bamba",
    architecture="BambaForCausalLM",
    defaults=DENSE_DEFAULTS
    | MAMBA_DEFAULTS
    | {
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "max_position_embeddings": 262144,
        ATTENDING: None,
        "layer_types": None,
        "attention_bias": False,
        "mlp_bias": False,
        PARTIAL: None,
    },
    read=_read,
    write=_write,
    layout=_layout,
    harmless=HARMLESS | {"z_loss_coefficient", "attn_rotary_emb"},  # the second repeats how much of a head is rotated
    aliases={"layers_block_type": "layer_types"},
)
