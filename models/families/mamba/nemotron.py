"""Nemotron-H and Nemotron 3: every layer has one sublayer, which is Mamba-2, attention, an MLP or experts.

A layer is a block here too: one whose MLP or whose mixer is missing, and adds zeros. Attention knows no positions; MLPs
and experts have no gate, and the square of relu as activation. Experts are ranked by sigmoid and a bias, beside a
shared one; in some models linear maps lead from the stream to narrower experts, and back. Layers of multi-token
prediction are left out.

transformers cuts a token's step below at `time_step_min`, and so do we; NVIDIA's own code has `time_step_limit` there.

Source: HF transformers `configuration_nemotron_h`, `modeling_nemotron_h`; Nemotron-H (arXiv 2504.03624).
"""

from dataclasses import replace
from typing import Any

from distillcache.models.config import BlockKind, MambaConfig, ModelConfig, MoeConfig
from distillcache.models.families.llama import DENSE_DEFAULTS
from distillcache.models.families.mamba.sizes import HARMLESS, heads_groups, mamba_tensors
from distillcache.models.families.reading.family import (
    Family,
    attention_tensors,
    common_fields,
    not_exportable,
)
from distillcache.models.families.reading.grouped import expert_groups
from distillcache.models.families.reading.keys import LINEAR
from distillcache.models.families.reading.kinds import FULL
from distillcache.models.families.reading.values import EXPORTED_ACTIVATIONS, PARTIAL, ROPE_KEYS, Values
from distillcache.models.files.tensors import BlockTensor, Layout

MAMBA, ATTENTION = BlockKind(mixer="mamba2", mlp=False), BlockKind(rotary=False, mlp=False)
DENSE, SPARSE = BlockKind(mixer="none"), BlockKind(mixer="none", moe=True)
# Names in lists of transformers 5, those of its first versions, and letters of a pattern.
KINDS = {LINEAR: MAMBA, FULL: ATTENTION, "mlp": DENSE, "moe": SPARSE, "mamba": MAMBA, "attention": ATTENTION}
LETTERS = {"M": MAMBA, "*": ATTENTION, "-": DENSE, "E": SPARSE}
LAYERS, PATTERN = "layers_block_type", "hybrid_override_pattern"


def _kinds(values: Values) -> list[BlockKind]:
    """Every block's kind: by the list, or else by the pattern, as transformers has it."""
    given, pattern = values[LAYERS], values[PATTERN]
    if given is not None:
        if not isinstance(given, list) or not given or any(name not in tuple(KINDS) for name in given):
            raise values.bad(LAYERS, f"a list of {', '.join(KINDS)}")
        return [KINDS[name] for name in given]
    if not isinstance(pattern, str) or not pattern or any(letter not in LETTERS for letter in pattern):
        raise values.bad(PATTERN, f"a letter of {' '.join(LETTERS)} for each block, or {LAYERS}")
    return [LETTERS[letter] for letter in pattern]


def _read(values: Values) -> ModelConfig:
    kinds = _kinds(values)
    if values.flag("tie_word_embeddings"):
        raise values.bad("tie_word_embeddings", "false: transformers ties no head of this family")
    experts, bias = SPARSE in kinds, values.flag("mlp_bias")
    if experts and bias:
        raise values.bad("mlp_bias", "false where blocks have experts")
    return ModelConfig(
        **common_fields(values, kinds, activation="mlp_hidden_act"),
        mlp_bias=bias,
        mlp_gated=False,
        mamba=_mamba(values) if MAMBA in kinds else None,
        moe=_moe(values) if experts else None,
        family="nemotron_h",
    )


def _mamba(values: Values) -> MambaConfig:
    heads, bias = values.size("mamba_num_heads"), values.flag("use_bias")
    return MambaConfig(
        heads=heads,
        head_dim=values.size("mamba_head_dim"),
        groups=heads_groups(values, "n_groups", heads),
        state=values.size("ssm_state_size"),
        taps=values.size("conv_kernel"),
        activation=values.activation("mamba_hidden_act"),
        conv_bias=values.flag("use_conv_bias"),
        bias=bias,
        output_bias=bias,
        least_step=values.number_or_zero("time_step_min"),
    )


def _moe(values: Values) -> MoeConfig:
    groups, kept = expert_groups(values)
    return MoeConfig(
        num_experts=values.size("n_routed_experts"),
        top_k=values.size("num_experts_per_tok"),
        expert_size=values.size("moe_intermediate_size"),
        shared_size=values.size("moe_shared_expert_intermediate_size"),
        scores="sigmoid",
        renormalise=values.flag("norm_topk_prob"),
        scaling=values.number("routed_scaling_factor"),
        groups=groups,
        groups_kept=kept,
        bias=True,
        native_bias=True,
        float32_router=True,
        latent=values.size_or_none("moe_latent_size"),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    names = {kind: name for name, kind in reversed(KINDS.items())}
    letters = {kind: letter for letter, kind in LETTERS.items()}
    if odd := [kind for kind in config.kinds if kind not in names]:
        raise not_exportable(str(odd[0]), "blocks of one sublayer", "export it in another family")
    if config.mlp_gated:
        raise not_exportable("MLPs with gates", "none", "export it in another family")
    return {
        LAYERS: [names[kind] for kind in config.kinds],
        PATTERN: "".join(letters[kind] for kind in config.kinds),
        "layer_norm_epsilon": config.norm_eps,
        "mlp_hidden_act": EXPORTED_ACTIVATIONS[config.activation],
        "mlp_bias": config.mlp_bias,
        **({} if config.mamba is None else _mamba_keys(config.mamba)),
        **({} if config.moe is None else _moe_keys(config.moe)),
    }


def _mamba_keys(mamba: MambaConfig) -> dict[str, Any]:
    if mamba.norm != "gated" or mamba.most_step is not None or mamba.bias != mamba.output_bias:
        raise not_exportable(str(mamba), "Mamba-2 as Nemotron-H has it", "export it in another family")
    return {
        "mamba_num_heads": mamba.heads,
        "mamba_head_dim": mamba.head_dim,
        "n_groups": mamba.groups,
        "ssm_state_size": mamba.state,
        "conv_kernel": mamba.taps,
        "mamba_hidden_act": EXPORTED_ACTIVATIONS[mamba.activation],
        "use_conv_bias": mamba.conv_bias,
        "use_bias": mamba.bias,
        "time_step_min": mamba.least_step,
    }


def _moe_keys(moe: MoeConfig) -> dict[str, Any]:
    if moe.scores != "sigmoid" or not moe.shared_size:
        raise not_exportable(f"scores by {moe.scores}, shared expert of {moe.shared_size}", "both", "export elsewhere")
    return {
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_size,
        "moe_shared_expert_intermediate_size": moe.shared_size,
        "n_shared_experts": 1,
        "norm_topk_prob": moe.renormalise,
        "routed_scaling_factor": moe.scaling,
        "n_group": moe.groups,
        "topk_group": moe.groups_kept,
        "moe_latent_size": moe.latent,
    }


def _layout(config: ModelConfig) -> Layout:
    attention = [replace(t, suffix=t.suffix.replace("self_attn.", "mixer.")) for t in attention_tensors(config)]
    mixers = {ATTENTION: attention}
    if config.mamba is not None:
        mixers[MAMBA] = mamba_tensors(config, "mixer.")

    def tensors(kind: BlockKind) -> list[BlockTensor]:
        if kind.mixer != "none":
            return [BlockTensor("norm.weight", "attention/norm"), *mixers[kind]]
        return [BlockTensor("norm.weight", "mlp/norm"), *(_experts(config) if kind.moe else _dense(config))]

    return Layout(
        tensors,
        embed="backbone.embeddings.weight",
        block="backbone.layers.{block}.",
        final_norm="backbone.norm_f.weight",
        foreign=("mtp.",),
        spellings=(("model.", "backbone."),),
    )


def _dense(config: ModelConfig) -> list[BlockTensor]:
    found = [BlockTensor(f"mixer.{name}_proj.weight", f"mlp/{name}", 1) for name in ("up", "down")]
    if config.mlp_bias:
        found += [BlockTensor(f"mixer.{name}_proj.bias", f"mlp/{name}_bias") for name in ("up", "down")]
    return found


def _experts(config: ModelConfig) -> list[BlockTensor]:
    found = [
        BlockTensor("mixer.gate.weight", "mlp/router", 1),
        BlockTensor("mixer.gate.e_score_correction_bias", "mlp/router_bias"),
    ]
    for name in ("up", "down"):
        found.append(BlockTensor(f"mixer.experts.{{e}}.{name}_proj.weight", f"mlp/{name}", 1))
        found.append(BlockTensor(f"mixer.shared_experts.{name}_proj.weight", f"mlp/shared_{name}", 1))
    if config.moe_config.latent is not None:
        found.append(BlockTensor("mixer.fc1_latent_proj.weight", "mlp/latent_in", 1))
        found.append(BlockTensor("mixer.fc2_latent_proj.weight", "mlp/latent_out", 1))
    return found


NEMOTRON_H = Family(
    name="nemotron_h",
    architecture="NemotronHForCausalLM",
    defaults=DENSE_DEFAULTS
    | {
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        LAYERS: None,
        PATTERN: "ME*-",
        "intermediate_size": 21504,
        "mlp_hidden_act": "relu2",
        "mlp_bias": False,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "n_groups": 8,
        "ssm_state_size": 128,
        "conv_kernel": 4,
        "mamba_hidden_act": "silu",
        "use_conv_bias": True,
        "use_bias": False,
        "time_step_min": 0.001,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 7688,
        "moe_shared_expert_intermediate_size": 7688,
        "moe_latent_size": None,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
    },
    read=_read,
    write=_write,
    layout=_layout,
    # The depth is that of the list or the pattern. Of steps what training starts from, and of Mamba-1 their rank; of
    # Mamba-2 its kernels; of a rotation that no block has.
    harmless=HARMLESS
    | {"chunk_size", "expand", "mamba_ssm_cache_dtype", "use_mamba_kernels", "rescale_prenorm_residual"}
    | {"time_step_max", "time_step_floor", "time_step_limit", "mamba_dt_max", "mamba_dt_limit", "mamba_dt_init_floor"}
    | {"moe_shared_expert_overlap", "n_shared_experts", "num_nextn_predict_layers", "mtp_layers_block_type"}
    | {"time_step_rank", "mtp_hybrid_override_pattern", PARTIAL},
    # `use_bias` is that of Mamba-2's projections.
    neutral={"mamba_proj_bias": (False,), "residual_in_fp32": (False,), "attention_bias": (False,)},
    aliases={
        "layer_types": LAYERS,
        "layer_norm_epsilon": "rms_norm_eps",
        "norm_eps": "rms_norm_eps",
        "attention_head_dim": "head_dim",
        "num_local_experts": "n_routed_experts",
        "mamba_n_groups": "n_groups",
        "mamba_d_conv": "conv_kernel",
        "mamba_expand": "expand",
        "mamba_dt_min": "time_step_min",
        "mamba_conv_bias": "use_conv_bias",
    },
    unwritten=frozenset({"hidden_act", "rms_norm_eps", *ROPE_KEYS}),
)
