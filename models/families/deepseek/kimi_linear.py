"""Kimi Linear: of four blocks three have Kimi delta attention, one latent attention that knows no positions.

Experts are those of DeepSeek-V3. Released configs have the sizes of the delta rule in `linear_attn_config`, with two
lists of blocks, numbered from 1; transformers saves `layer_types` and `linear_*`, and `mlp_layer_types` in the place of
`first_k_dense_replace`. An export has both. Of the rotation nothing is read: there is none.

Source: HF transformers `configuration_kimi_linear`, `modeling_kimi_linear`; names in files by its `conversion_mapping`.
"""

from typing import Any

from distillcache.models.config import BlockKind, DeltaConfig, Mixer, ModelConfig, RopeConfig
from distillcache.models.families.llama import DENSE_DEFAULTS
from distillcache.models.families.reading.family import (
    Family,
    bias_tensors,
    common_fields,
    dense_tensors,
    expert_tensors,
    norm_tensors,
    not_exportable,
    shared_tensors,
)
from distillcache.models.families.reading.grouped import (
    DENSE,
    SPARSE,
    check_sigmoid,
    expert_keys,
    mtp_prefixes,
    sigmoid_moe,
    typed_experts,
)
from distillcache.models.families.reading.keys import LINEAR
from distillcache.models.families.reading.kinds import FULL
from distillcache.models.families.reading.latent import fields_of_rope, latent_keys, latent_tensors
from distillcache.models.families.reading.recurrent import MIXERS, check_mixers, layer_types
from distillcache.models.families.reading.values import ROPE_KEYS, Values, unknown_key
from distillcache.models.files.tensors import BlockTensor, Layout

NAME, SIZES = "kimi_linear", "linear_attn_config"
KDA_BLOCKS, FULL_BLOCKS = "kda_layers", "full_attn_layers"
# The family's names of keys that other families have, too.
NAMES = {
    "max_position_embeddings": "model_max_length",
    "n_group": "num_expert_group",
    "n_routed_experts": "num_experts",
    "n_shared_experts": "num_shared_experts",
    "norm_topk_prob": "moe_renormalize",
    "num_experts_per_tok": "num_experts_per_token",
}
MOE = "block_sparse_moe"


def _read(values: Values) -> ModelConfig:
    if values.flag("tie_word_embeddings"):
        raise values.bad("tie_word_embeddings", "false: transformers does not tie them")
    sizes = _sizes(values)
    heads, width = sizes.size("num_heads"), sizes.size("head_dim")
    kinds = [
        BlockKind(mixer=mixer, moe=kind.moe, rotary=mixer != "attention")
        for mixer, kind in zip(_mixers(values, sizes), typed_experts(values), strict=True)
    ]
    return ModelConfig(
        **common_fields(values, kinds) | fields_of_rope(values, RopeConfig()),
        delta=DeltaConfig(heads, heads, width, width, sizes.size("short_conv_kernel_size"), by_channel=True),
        moe=sigmoid_moe(values, values.size("n_shared_experts")),
        mtp_layers=values.count("num_nextn_predict_layers"),
        family=NAME,
    )


def _sizes(values: Values) -> Values:
    """The content of `linear_attn_config`, with what stands beside it where it is silent."""
    given = {} if values[SIZES] is None else values[SIZES]
    if not isinstance(given, dict):
        raise values.bad(SIZES, "an object, or null")
    beside = {
        "num_heads": values.size("linear_num_heads"),
        "head_dim": values.size("linear_head_dim"),
        "short_conv_kernel_size": values.size("linear_conv_kernel_dim"),
    }
    for key, value in given.items():
        if key not in (*beside, KDA_BLOCKS, FULL_BLOCKS) and value is not None:
            raise unknown_key(values.file, f"{SIZES}.{key}", value)
    return Values(given, beside, values.file)


def _mixers(values: Values, sizes: Values) -> list[Mixer]:
    """Every block's mixer by `layer_types`, by the lists of the others, or attention in every fourth but the first."""
    depth = values.size("num_hidden_layers")
    types = values.per_block("layer_types", tuple(MIXERS), depth)
    if types is None and sizes[KDA_BLOCKS] is not None and sizes[FULL_BLOCKS] is not None:
        found = [sizes[KDA_BLOCKS], sizes[FULL_BLOCKS]]
        listed = [block for each in found if isinstance(each, list) for block in each]
        blocks = range(1, depth + 1)
        if len(listed) != depth or any(block not in listed for block in blocks):
            raise values.bad(SIZES, f"each of the blocks from 1 to {depth} in one of {KDA_BLOCKS} and {FULL_BLOCKS}")
        types = [FULL if block in sizes[FULL_BLOCKS] else LINEAR for block in blocks]
    return [MIXERS[each] for each in types or [FULL if at and at % 4 == 0 else LINEAR for at in range(depth)]]


def _write(config: ModelConfig) -> dict[str, Any]:
    check_sigmoid(config)
    check_mixers(config, rotary=False)
    delta = config.delta_config
    if delta != DeltaConfig(
        delta.key_heads, delta.key_heads, delta.key_dim, delta.key_dim, delta.taps, by_channel=True
    ):
        raise not_exportable(f"{delta}", "Kimi delta attention, with heads of one width", "use another family")
    if config.tie_embeddings:
        raise not_exportable("a head that is tied to the embeddings", "one of its own", "use another family")
    latent = {key: value for key, value in latent_keys(config).items() if key != "rope_interleave"}
    blocks = {KDA_BLOCKS: "gated_delta", FULL_BLOCKS: "attention"}
    kinds, dense = config.kinds, next(iter(config.moe_blocks), config.num_blocks)
    return {
        **latent,
        **{NAMES.get(key, key): value for key, value in expert_keys(config).items()},
        "model_max_length": config.max_positions,
        "mla_use_nope": True,
        "pad_token_id": None,  # what is assumed otherwise may lie beyond a small vocabulary
        SIZES: {
            "num_heads": delta.key_heads,
            "head_dim": delta.key_dim,
            "short_conv_kernel_size": delta.taps,
            **{key: [at for at, kind in enumerate(kinds, 1) if kind.mixer == mixer] for key, mixer in blocks.items()},
        },
        "layer_types": layer_types(kinds),
        "first_k_dense_replace": dense,
        "mlp_layer_types": [SPARSE if kind.moe else DENSE for kind in kinds],
    }


def _layout(config: ModelConfig) -> Layout:
    """Names as the released files have them. Transformers saves dense MLPs under the name of experts."""
    by_mixer = {"attention": latent_tensors(config), "gated_delta": _delta_tensors()}
    moe = [
        BlockTensor(f"{MOE}.gate.weight", "mlp/router", 1),
        *bias_tensors(config, f"{MOE}.gate.e_score_correction_bias"),
        *expert_tensors(f"{MOE}.experts", ("w1", "w3", "w2")),
        *shared_tensors(f"{MOE}.shared_experts"),
    ]
    dense = dense_tensors(config)
    inside = ("A_log", "dt_bias", "f_a_proj.weight", "f_b_proj.weight")  # of another module in transformers' code
    return Layout(
        lambda kind: [*norm_tensors(), *by_mixer[kind.mixer], *(moe if kind.moe else dense)],
        foreign=mtp_prefixes(config),
        endings=(
            *((f".{MOE}.{name}_proj.weight", f".mlp.{name}_proj.weight") for name in ("gate", "up", "down")),
            *((f".self_attn.forget_gate.{name}", f".self_attn.{name}") for name in inside),
        ),
    )


def _delta_tensors() -> list[BlockTensor]:
    prefix = "self_attn."
    ours = {"b": "beta", "f_a": "decay_a", "f_b": "decay_b", "g_a": "gate_a", "g_b": "gate_b"} | {n: n for n in "qkv"}
    return [
        *(BlockTensor(f"{prefix}{name}_proj.weight", f"attention/{own}", 1) for name, own in ours.items()),
        *(BlockTensor(f"{prefix}{n}_conv1d.weight", f"attention/conv_{n}", depthwise=True) for n in "qkv"),
        BlockTensor(f"{prefix}dt_bias", "attention/dt_bias"),
        BlockTensor(f"{prefix}A_log", "attention/a_log", ones=(2, 1)),
        BlockTensor(f"{prefix}o_norm.weight", "attention/out_norm"),
        BlockTensor(f"{prefix}o_proj.weight", "attention/o", 2),
    ]


KIMI_LINEAR = Family(
    name=NAME,
    architecture="KimiLinearForCausalLM",
    defaults=DENSE_DEFAULTS
    | {
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": None,
        "max_position_embeddings": 1_048_576,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "attention_bias": False,
        "linear_head_dim": 128,
        "linear_num_heads": 32,
        "linear_conv_kernel_dim": 4,
        SIZES: None,
        "layer_types": None,
        "mlp_layer_types": None,
        "first_k_dense_replace": 1,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1024,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.446,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
    },
    read=_read,
    write=_write,
    layout=_layout,
    # A sum of other keys, and a width that no block has.
    harmless=frozenset({"qk_head_dim", "head_dim"}),
    neutral={
        "mla_use_nope": (True,),
        "moe_layer_freq": (1,),
        "moe_router_activation_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "use_grouped_topk": (True,),
    },
    unwritten=frozenset(ROPE_KEYS),
    aliases={theirs: ours for ours, theirs in NAMES.items()} | {"num_local_experts": "n_routed_experts"},
)
