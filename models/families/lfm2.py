"""LFM2: of its blocks some have a gated short convolution, the others attention that norms queries and keys per head.

LFM2-MoE has experts in all blocks but the first: chosen by sigmoids and a bias, weighed by the sigmoids over their sum
and a millionth. Released configs have keys of other code than transformers' beside its own; `block_ff_dim` and
`tie_embedding` go before the usual names there. An MLP is two thirds as wide as the config says, rounded up, where
`block_auto_adjust_ff_dim` is on; an export says the width itself.

Source: HF transformers `configuration_lfm2`, `configuration_lfm2_moe` and their modelling code; names in files by its
`conversion_mapping`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from distillcache.models.config import BlockKind, Mixer, ModelConfig, MoeConfig, ShortConvConfig
from distillcache.models.families.reading.family import (
    Family,
    attention_tensors,
    bias_tensors,
    common_fields,
    expert_tensors,
    not_exportable,
)
from distillcache.models.families.reading.kinds import FULL
from distillcache.models.families.reading.values import Values
from distillcache.models.files.tensors import BlockTensor, Layout, TensorSlice

DENSE, SPARSE = "lfm2", "lfm2_moe"
MIXERS: dict[str, Mixer] = {"conv": "short_conv", FULL: "attention"}
TYPES = {mixer: name for name, mixer in MIXERS.items()}
MLP = ("w1", "w3", "w2")  # gate, up and down
SUM_EPS = 1e-6
# Keys of other code, which say again how wide a block is, or how many heads it has.
SAME_WIDTH = ("block_dim", "conv_dim", "conv_dim_out")


def _mixers(values: Values, default: Sequence[Mixer]) -> list[Mixer]:
    depth = values.size("num_hidden_layers")
    types = values.per_block("layer_types", tuple(MIXERS), depth)
    if types is None:
        return list(default)
    return [MIXERS[name] for name in types]


def _fields(values: Values, mixers: Sequence[Mixer], dense: int) -> dict[str, Any]:
    """The fields that both families share. dense: the first blocks, which have no experts."""
    for key, size in (*((key, "hidden_size") for key in SAME_WIDTH), ("num_heads", "num_attention_heads")):
        if values[key] not in (None, values[size]):
            raise values.bad(key, f"the same as {size}, which is {values[size]}")
    if values.activation() != "silu":
        raise values.bad("hidden_act", "silu, which transformers computes whatever it says")
    kinds = [BlockKind(mixer=mixer, moe=block >= dense) for block, mixer in enumerate(mixers)]
    fields = common_fields(values, kinds) | {"qk_norm": "head", "rope": values.rope(theta=1e6)}
    if values["tie_embedding"] is not None:
        fields["tie_embeddings"] = values.flag("tie_embedding")
    taps, bias = values.size("conv_L_cache"), values.flag("conv_bias")
    return fields | {"short_conv": ShortConvConfig(fields["hidden_size"], taps, bias)}


def _read_dense(values: Values) -> ModelConfig:
    depth = values.size("num_hidden_layers")
    attending = range(depth) if values["full_attn_idxs"] is None else values.blocks("full_attn_idxs", depth)
    mixers = _mixers(values, ["attention" if block in attending else "short_conv" for block in range(depth)])
    found = ModelConfig(**_fields(values, mixers, depth), family=DENSE)
    return replace(found, intermediate_size=_mlp_width(values))


def _mlp_width(values: Values) -> int:
    """Neurons of an MLP, as transformers rounds them."""
    width = values.size("intermediate_size" if values["block_ff_dim"] is None else "block_ff_dim")
    if not values.flag("block_auto_adjust_ff_dim"):
        return width
    width = int(2 * width / 3)
    if (factor := values.number_or_none("block_ffn_dim_multiplier")) is not None:
        multiple = values.size("block_multiple_of")
        width = -(-int(factor * width) // multiple) * multiple
    if width < 1:
        raise values.bad("intermediate_size", "wide enough for two thirds of it")
    return width


def _read_sparse(values: Values) -> ModelConfig:
    if values["layer_types"] is None:
        raise values.bad("layer_types", f"one of {', '.join(MIXERS)} for each block")
    moe = MoeConfig(
        num_experts=values.size("num_experts"),
        top_k=values.size("num_experts_per_tok"),
        expert_size=values.size("moe_intermediate_size"),
        scores="sigmoid",
        renormalise=values.flag("norm_topk_prob"),
        scaling=values.number("routed_scaling_factor"),
        bias=values.flag("use_expert_bias"),
        native_bias=True,
        sum_eps=SUM_EPS,
    )
    fields = _fields(values, _mixers(values, ()), values.count("num_dense_layers"))
    found = ModelConfig(**fields, moe=moe, family=SPARSE)
    return found if found.moe_blocks else replace(found, moe=None)


def _write(config: ModelConfig) -> dict[str, Any]:
    conv = config.short_conv_config
    if odd := [kind for kind in config.kinds if kind != BlockKind(mixer=kind.mixer, moe=kind.moe)]:
        raise not_exportable(str(odd[0]), "blocks without windows or chunks", "export it in another family")
    if conv.channels != config.hidden_size:
        found = f"{conv.channels} channels, {config.hidden_size} numbers in the stream"
        raise not_exportable(found, "as many of either", "export it in another family")
    return {
        "layer_types": [TYPES[kind.mixer] for kind in config.kinds],
        "conv_L_cache": conv.taps,
        "conv_bias": conv.bias,
        "norm_eps": config.norm_eps,
    }


def _write_dense(config: ModelConfig) -> dict[str, Any]:
    if config.moe_blocks:
        raise not_exportable("blocks with experts", "dense blocks", "export it in another family")
    return _write(config) | {"block_auto_adjust_ff_dim": False}


def _write_sparse(config: ModelConfig) -> dict[str, Any]:
    moe, dense = config.moe, next(iter(config.moe_blocks), config.num_blocks)
    if config.moe_blocks != tuple(range(dense, config.num_blocks)):
        raise not_exportable(
            "dense blocks behind one with experts", "dense blocks first", "export it in another family"
        )
    if moe is None:
        return _write(config) | {"num_dense_layers": dense}
    return _write(config) | {
        "num_dense_layers": dense,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_size,
        "norm_topk_prob": moe.renormalise,
        "routed_scaling_factor": moe.scaling,
        "use_expert_bias": moe.bias,
    }


def _layout(config: ModelConfig) -> Layout:
    by_mixer = {"attention": _attention(config), "short_conv": _short_conv(config)}
    norms = [BlockTensor("operator_norm.weight", "attention/norm"), BlockTensor("ffn_norm.weight", "mlp/norm")]
    ours = ("mlp/gate", "mlp/up", "mlp/down")
    dense = [BlockTensor(f"feed_forward.{name}.weight", path, 1) for name, path in zip(MLP, ours, strict=True)]
    sparse = [
        BlockTensor("feed_forward.gate.weight", "mlp/router", 1),
        *bias_tensors(config, "feed_forward.expert_bias"),
        *expert_tensors("feed_forward.experts", MLP),
    ]
    return Layout(
        lambda kind: [*norms, *by_mixer[kind.mixer], *(sparse if kind.moe else dense)],
        final_norm="model.embedding_norm.weight",
    )


def _attention(config: ModelConfig) -> list[BlockTensor]:
    names = {"o_proj": "out_proj", "q_norm": "q_layernorm", "k_norm": "k_layernorm"}
    found = []
    for tensor in attention_tensors(config):
        sublayer, name, kind = tensor.suffix.split(".")
        found.append(replace(tensor, suffix=f"{sublayer}.{names.get(name, name)}.{kind}"))
    return found


def _short_conv(config: ModelConfig) -> list[BlockTensor]:
    conv = config.short_conv_config
    whole = 3 * conv.channels
    parts = {
        name: TensorSlice(0, place * conv.channels, (place + 1) * conv.channels, whole)
        for place, name in enumerate(("in_gate", "out_gate", "value"))
    }
    found = [BlockTensor("conv.in_proj.weight", f"attention/{name}", 1, part) for name, part in parts.items()]
    found.append(BlockTensor("conv.conv.weight", "attention/conv", depthwise=True))
    found.append(BlockTensor("conv.out_proj.weight", "attention/o", 2))
    if conv.bias:
        found += [BlockTensor("conv.in_proj.bias", f"attention/{n}_bias", None, part) for n, part in parts.items()]
        found.append(BlockTensor("conv.conv.bias", "attention/conv_bias"))
        found.append(BlockTensor("conv.out_proj.bias", "attention/o_bias"))
    return found


DEFAULTS: dict[str, Any] = {
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128_000,
    "conv_L_cache": 3,
    "conv_bias": False,
    "layer_types": None,
    "tie_embedding": None,
    **dict.fromkeys((*SAME_WIDTH, "num_heads")),
}
# Of other code: how training began, and what is always so.
HARMLESS = frozenset(
    {"block_mlp_init_scale", "block_norm_eps", "block_out_init_scale", "block_use_xavier_init", "conv_use_xavier_init"}
)
NEUTRAL = {"block_use_swiglu": (True,), "use_pos_enc": (True,)}
ALIASES = {"norm_eps": "rms_norm_eps", "theta": "rope_theta"}
UNWRITTEN = frozenset({"hidden_act", "rms_norm_eps"})
LFM2 = Family(
    name=DENSE,
    architecture="Lfm2ForCausalLM",
    defaults=DEFAULTS
    | {
        "intermediate_size": 12288,
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
        "block_ff_dim": None,
        "full_attn_idxs": None,
    },
    read=_read_dense,
    write=_write_dense,
    layout=_layout,
    harmless=HARMLESS,
    neutral=NEUTRAL,
    aliases=ALIASES,
    unwritten=UNWRITTEN,
)
LFM2_MOE = Family(
    name=SPARSE,
    architecture="Lfm2MoeForCausalLM",
    defaults=DEFAULTS
    | {
        "intermediate_size": 7168,
        "moe_intermediate_size": 1792,
        "num_dense_layers": 2,
        "num_experts_per_tok": 4,
        "num_experts": 32,
        "use_expert_bias": True,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
    },
    read=_read_sparse,
    write=_write_sparse,
    layout=_layout,
    harmless=HARMLESS | {"full_attn_idxs"},  # `layer_types` says it
    neutral=NEUTRAL,
    aliases=ALIASES,
    unwritten=UNWRITTEN,
)
