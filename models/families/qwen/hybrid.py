"""Qwen3-Next and Qwen3.5 (also 3.6): of four blocks three have the gated delta rule, one has gated attention.

Attention rotates a quarter of its heads, norms queries and keys, and multiplies the heads' output by a sigmoid gate.
All norms but the one behind the delta rule multiply by one more than their weight. Qwen3-Next has experts with a shared
one behind a gate; Qwen3.5 comes dense (`qwen3_5_text`) and with experts (`qwen3_5_moe_text`), whose weights always sum
to 1. Its projections of the delta rule are tensors of their own.

`qwen3_5` and `qwen3_5_moe` are the vision-language models: of their config and tensors the text model's alone are
read, and exported as such. Rotary positions of three axes (`mrope_section`) are one for text. Layers of multi-token
prediction are left out.

Source: HF transformers `configuration_qwen3_next`, `configuration_qwen3_5`, `configuration_qwen3_5_moe` and their
modelling code.
"""

from collections.abc import Mapping
from typing import Any

from distillcache.models.config import BlockKind, ModelConfig, MoeConfig
from distillcache.models.families.llama import DENSE_DEFAULTS
from distillcache.models.families.reading.family import (
    Family,
    attention_tensors,
    common_fields,
    dense_tensors,
    expert_tensors,
    norm_tensors,
    not_exportable,
    shared_tensors,
)
from distillcache.models.families.reading.multimodal import MROPE, vision_language_family
from distillcache.models.families.reading.recurrent import (
    DELTA_DEFAULTS,
    delta_keys,
    delta_sizes,
    delta_tensors,
    mixers,
)
from distillcache.models.families.reading.values import PARTIAL, Values, rope_to_hf
from distillcache.models.files.tensors import BlockTensor, FusedExperts, Layout

QUARTER = 0.25  # of a head is rotated where nothing says otherwise
NEXT, DENSE, SPARSE = "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"


def _read(values: Values, family: str, experts: list[bool], moe: MoeConfig | None) -> ModelConfig:
    bias = values.flag("attention_bias")
    values.size("head_dim")  # null is no width here
    kinds = [BlockKind(mixer=mixer, moe=has) for mixer, has in zip(mixers(values), experts, strict=True)]
    return ModelConfig(
        **common_fields(values, kinds),
        rope=values.rope(fraction=QUARTER, partial=True, ignored=MROPE),
        qkv_bias=bias,
        output_bias=bias,
        output_gate=True,
        qk_norm="head",
        norm_product="offset",
        delta=delta_sizes(values),
        moe=moe,
        family=family,
    )


def _read_next(values: Values) -> ModelConfig:
    depth, step = values.size("num_hidden_layers"), values.size("decoder_sparse_step")
    dense = range(depth) if values.count("num_experts") == 0 else values.blocks("mlp_only_layers", depth)
    experts = [block not in dense and (block + 1) % step == 0 for block in range(depth)]
    return _read(values, NEXT, experts, _moe(values, values.flag("norm_topk_prob")) if any(experts) else None)


def _read_dense(values: Values) -> ModelConfig:
    return _read(values, DENSE, [False] * values.size("num_hidden_layers"), None)


def _read_sparse(values: Values) -> ModelConfig:
    return _read(values, SPARSE, [True] * values.size("num_hidden_layers"), _moe(values, True))


def _moe(values: Values, renormalise: bool) -> MoeConfig:
    return MoeConfig(
        num_experts=values.size("num_experts"),
        top_k=values.size("num_experts_per_tok"),
        expert_size=values.size("moe_intermediate_size"),
        shared_size=values.size("shared_expert_intermediate_size"),
        renormalise=renormalise,
        shared_gate=True,
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    asked = {"output gate": config.output_gate, "norms of heads": config.qk_norm == "head"}
    asked |= {"norms that add one": config.norm_product == "offset"}
    if lacking := [name for name, has in asked.items() if not has]:
        raise not_exportable(f"no {', no '.join(lacking)}", "all of them", "export it in another family")
    if config.qkv_bias != config.output_bias:
        raise not_exportable("some biases of attention", "all or none", "export it in another family")
    return {
        **delta_keys(config),
        "attention_bias": config.qkv_bias,
        # Both spellings state it also where it is all of a head: silence would mean a quarter.
        PARTIAL: config.rope.fraction,
        "rope_parameters": rope_to_hf(config.rope) | {PARTIAL: config.rope.fraction},
    }


def _write_next(config: ModelConfig) -> dict[str, Any]:
    experts = _expert_keys(config.moe, True) if config.moe is not None else {"num_experts": 0}
    dense = [block for block, kind in enumerate(config.kinds) if not kind.moe]
    return _write(config) | experts | {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def _write_dense(config: ModelConfig) -> dict[str, Any]:
    if config.moe_blocks:
        raise not_exportable("blocks with experts", "dense blocks", "export it in another family")
    return _write(config)


def _write_sparse(config: ModelConfig) -> dict[str, Any]:
    if len(config.moe_blocks) < config.num_blocks:
        raise not_exportable("dense blocks", "experts in every block", "export it in another family")
    return _write(config) | _expert_keys(config.moe_config, False)


def _expert_keys(moe: MoeConfig, chooses: bool) -> dict[str, Any]:
    """chooses: the config says whether the chosen experts' weights are divided by their sum."""
    if not moe.shared_gate or not moe.shared_size or (not moe.renormalise and not chooses):
        raise not_exportable(
            f"a shared expert of {moe.shared_size}, its gate: {moe.shared_gate}, "
            f"weights over their sum: {moe.renormalise}",
            "a shared expert behind a gate, and weights over their sum",
            "export it in another family",
        )
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_size,
        "shared_expert_intermediate_size": moe.shared_size,
        **({"norm_topk_prob": moe.renormalise} if chooses else {}),
    }


def _layout(config: ModelConfig) -> Layout:
    """Names as the text model has them; files of the vision-language model may have them behind its prefix."""
    by_mixer = {
        "attention": attention_tensors(config),
        "gated_delta": delta_tensors(config, by_key_head=config.family == NEXT),
    }
    dense, moe = dense_tensors(config), _moe_tensors() if config.moe is not None else []
    fused = None if config.moe is None else FusedExperts(config.hidden_size, config.moe.expert_size, False)
    return Layout(
        lambda kind: [*norm_tensors(), *by_mixer[kind.mixer], *(moe if kind.moe else dense)],
        foreign=("mtp.", "model.visual."),
        spellings=(("model.language_model.", "model."),),
        fused=fused,
    )


def _moe_tensors() -> list[BlockTensor]:
    return [
        BlockTensor("mlp.gate.weight", "mlp/router", 1),
        *expert_tensors(),
        *shared_tensors("mlp.shared_expert"),
        BlockTensor("mlp.shared_expert_gate.weight", "mlp/shared_router", 1),
    ]


def _defaults(**own: Any) -> dict[str, Any]:
    shared = {"head_dim": 256, "max_position_embeddings": 32768, "attention_bias": False, PARTIAL: None}
    return DENSE_DEFAULTS | DELTA_DEFAULTS | shared | own


EXPERTS: Mapping[str, Any] = {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512}
# Of multi-token prediction, and a dtype of states, which are float32 here. The gates are always there: of attention a
# sigmoid, of the delta rule a silu, which is `swish`.
LEFT_OUT = frozenset({"mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype"})
GATES: Mapping[str, tuple[Any, ...]] = {"attn_output_gate": (True,), "output_gate_type": ("swish", "silu")}
QWEN3_NEXT = Family(
    name=NEXT,
    architecture="Qwen3NextForCausalLM",
    defaults=_defaults(
        **EXPERTS,
        num_key_value_heads=2,
        decoder_sparse_step=1,
        num_experts_per_tok=10,
        num_experts=512,
        norm_topk_prob=True,
        mlp_only_layers=None,
    ),
    read=_read_next,
    write=_write_next,
    layout=_layout,
    harmless=LEFT_OUT,
    neutral=GATES,
)
QWEN3_5_TEXT = Family(
    name=DENSE,
    architecture="Qwen3_5ForCausalLM",
    defaults=_defaults(num_key_value_heads=4),
    read=_read_dense,
    write=_write_dense,
    layout=_layout,
    harmless=LEFT_OUT,
    neutral={**GATES, "mlp_only_layers": ([],)},
)
QWEN3_5_MOE_TEXT = Family(
    name=SPARSE,
    architecture="Qwen3_5MoeForCausalLM",
    defaults=_defaults(
        **EXPERTS,
        intermediate_size=512,  # of dense MLPs, of which there are none: its configs leave it out
        num_key_value_heads=2,
        num_experts_per_tok=8,
        num_experts=256,
    ),
    read=_read_sparse,
    write=_write_sparse,
    layout=_layout,
    harmless=LEFT_OUT,
    neutral={**GATES, "mlp_only_layers": ([],), "decoder_sparse_step": (1,), "norm_topk_prob": (True,)},
)
QWEN3_5 = vision_language_family("qwen3_5", "Qwen3_5ForConditionalGeneration", QWEN3_5_TEXT)
QWEN3_5_MOE = vision_language_family("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", QWEN3_5_MOE_TEXT)
