"""Granite 4: blocks with Mamba-2 or attention, Granite's factors, experts beside a shared one or a dense MLP.

Attention rotates where `position_embedding_type` is `rope`, and knows no positions elsewhere. Experts are as in
GraniteMoE, stored together; the shared expert, and the dense MLP where there are no others, has one tensor for gate and
up, and the width `shared_intermediate_size`.

Source: HF transformers `configuration_granitemoehybrid`, `modeling_granitemoehybrid`.
"""

from dataclasses import replace
from typing import Any

from distillcache.models.config import BlockKind, Mixer, ModelConfig
from distillcache.models.families.granite import (
    GRANITE_DEFAULTS,
    granite_fields,
    granite_keys,
    granite_moe,
    granite_moe_keys,
    granite_moe_tensors,
)
from distillcache.models.families.mamba.sizes import (
    HARMLESS,
    MAMBA_DEFAULTS,
    MIXERS,
    TYPES,
    check_hybrid,
    expand_keys,
    mamba_sizes,
    mamba_tensors,
)
from distillcache.models.families.reading.family import Family, attention_tensors, norm_tensors, not_exportable
from distillcache.models.families.reading.values import Values
from distillcache.models.files.tensors import BlockTensor, Layout, TensorSlice

ROTARY, PLAIN = "rope", "nope"


def _read(values: Values) -> ModelConfig:
    depth, experts = values.size("num_hidden_layers"), values.count("num_local_experts")
    if values["position_embedding_type"] not in (None, PLAIN, ROTARY):
        raise values.bad("position_embedding_type", f"{ROTARY}, {PLAIN} or null")
    rotary = values["position_embedding_type"] == ROTARY
    types = values.per_block("layer_types", tuple(MIXERS), depth) or ["mamba"] * depth
    kinds = [_kind(MIXERS[name], experts > 0, rotary) for name in types]
    shared = values.size("shared_intermediate_size")
    fields = granite_fields(values, kinds)
    if experts:
        fields["moe"] = replace(granite_moe(values), shared_size=shared)
    else:
        fields["intermediate_size"] = shared
    mamba = mamba_sizes(values) if any(kind.is_mamba for kind in kinds) else None
    return ModelConfig(**fields, mamba=mamba, family="granitemoehybrid")


def _kind(mixer: Mixer, moe: bool, rotary: bool) -> BlockKind:
    return BlockKind(mixer=mixer, moe=moe, rotary=rotary or mixer != "attention")


def _write(config: ModelConfig) -> dict[str, Any]:
    rotary = all(kind.rotary for kind in config.kinds)
    check_hybrid(config, rotary=rotary)
    moe = config.moe
    if len({kind.moe for kind in config.kinds}) > 1 or (moe is not None and not moe.shared_size):
        raise not_exportable(
            "experts in some blocks, or no shared one", "all blocks alike", "export a decoder with such blocks"
        )
    experts = {"num_local_experts": 0} if moe is None else granite_moe_keys(moe)
    return {
        **granite_keys(config),
        **expand_keys(config),
        **experts,
        "shared_intermediate_size": config.intermediate_size if moe is None else moe.shared_size,
        "position_embedding_type": ROTARY if rotary else PLAIN,
        "layer_types": [TYPES[kind.mixer] for kind in config.kinds],
    }


def _layout(config: ModelConfig) -> Layout:
    by_mixer = {"attention": attention_tensors(config)}
    if config.mamba is not None:
        by_mixer["mamba2"] = mamba_tensors(config)
    if config.moe is None:
        mlp = _mlp("mlp/", config.intermediate_size)
    else:
        mlp = [*granite_moe_tensors(config), *_mlp("mlp/shared_", config.moe.shared_size)]
    return Layout(lambda kind: [*norm_tensors(), *by_mixer[kind.mixer], *mlp])


def _mlp(target: str, width: int) -> list[BlockTensor]:
    both, total = "shared_mlp.input_linear.weight", 2 * width
    return [
        BlockTensor(both, f"{target}gate", 1, TensorSlice(0, 0, width, total)),
        BlockTensor(both, f"{target}up", 1, TensorSlice(0, width, total, total)),
        BlockTensor("shared_mlp.output_linear.weight", f"{target}down", 1),
    ]


GRANITE_HYBRID = Family(
    name="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    defaults=GRANITE_DEFAULTS
    | MAMBA_DEFAULTS
    | {
        "layer_types": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 1024,
        "position_embedding_type": None,
    },
    read=_read,
    write=_write,
    layout=_layout,
    harmless=HARMLESS,
    neutral={"normalization_function": ("rmsnorm",), "init_method": ("mup",)},
    aliases={"layers_block_type": "layer_types"},
)
