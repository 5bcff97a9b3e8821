"""Llama 4: rotary blocks that attend within chunks, blocks without positions, and experts whose input is weighted.

`llama4_text` is the language model. `llama4` is the model with eyes: its config has the language model's inside, its
tensors have that one's behind a prefix, and of both only the language model is read; it is exported as `llama4_text`.

By default three blocks of four are rotary, normed after the rotation, and attend within a chunk of the document; the
fourth knows no positions, sees the whole document and scales its queries with the token's position. Transformers takes
the token's place in the row for its position there; for a document that is alone in its row that is the same.

Source: HF transformers `configuration_llama4`, `modeling_llama4`.
"""

from dataclasses import replace
from typing import Any

from distillcache.models.config import BlockKind, ModelConfig, MoeConfig, TemperatureConfig
from distillcache.models.families.reading.family import (
    Family,
    attention_tensors,
    common_fields,
    dense_tensors,
    norm_tensors,
    not_exportable,
    shared_tensors,
)
from distillcache.models.families.reading.kinds import rotary_blocks
from distillcache.models.families.reading.multimodal import read_language_model
from distillcache.models.families.reading.values import Values, is_number
from distillcache.models.files.tensors import BlockTensor, Layout, TensorSlice

CHUNKED, FULL = "chunked_attention", "full_attention"
THETA = 500_000.0
LANGUAGE_PREFIX = "language_model."
FOREIGN = ("vision_model.", "multi_modal_projector.")
# What transformers assumes, and what is written where a decoder has no blocks to which it applies.
TEMPERATURE = TemperatureConfig(scale=0.1, floor=8192)


def _read(values: Values) -> ModelConfig:
    kinds = _kinds(values)
    bias = values.flag("attention_bias")
    dense: dict[str, Any] = {"intermediate_size": values.size("intermediate_size_mlp")}
    return ModelConfig(
        **common_fields(values, kinds) | dense,
        rope=replace(values.rope(theta=THETA), interleaved=True),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="l2" if values.flag("use_qk_norm") else "none",
        temperature=_temperature(values),
        moe=_moe(values) if any(kind.moe for kind in kinds) else None,
        family="llama4_text",
    )


def _kinds(values: Values) -> list[BlockKind]:
    depth = values.size("num_hidden_layers")
    rotary = rotary_blocks(values)
    types = values.per_block("layer_types", (CHUNKED, FULL), depth) or [CHUNKED if at else FULL for at in rotary]
    if values["moe_layers"] is None:
        step = values.size("interleave_moe_layer_step")
        experts = range(step - 1, depth, step)
    else:  # it wins, as in transformers
        experts = values.blocks("moe_layers", depth)
    chunk = values.size("attention_chunk_size") if CHUNKED in types else None
    return [BlockKind(None, chunk if types[at] == CHUNKED else None, rotary[at], at in experts) for at in range(depth)]


def _temperature(values: Values) -> TemperatureConfig | None:
    """`attn_temperature_tuning` of older configs is a number; any but 0 is true."""
    tuned = values["attn_temperature_tuning"]
    if not (isinstance(tuned, bool) or is_number(tuned)):
        raise values.bad("attn_temperature_tuning", "true or false")
    return TemperatureConfig(values.number_or_zero("attn_scale"), values.size("floor_scale")) if tuned else None


def _moe(values: Values) -> MoeConfig:
    width = values.size("intermediate_size")
    return MoeConfig(
        num_experts=values.size("num_local_experts"),
        top_k=values.size("num_experts_per_tok"),
        expert_size=width,
        shared_size=width,
        scores="sigmoid_input",
        renormalise=False,
    )


def _read_multimodal(values: Values) -> ModelConfig:
    config = read_language_model(values, LLAMA4_TEXT)
    if values["tie_word_embeddings"] not in (None, config.tie_embeddings):
        raise values.bad("tie_word_embeddings", f"{config.tie_embeddings}, as in text_config")
    return replace(config, family="llama4")


def _write(config: ModelConfig) -> dict[str, Any]:
    kinds, moe = config.kinds, config.moe
    chunks = {kind.chunk for kind in kinds if kind.chunk is not None}
    if len(chunks) > 1 or any(kind.window is not None for kind in kinds):
        raise not_exportable(
            f"chunks of {sorted(chunks)}, windows of {sorted({kind.window for kind in kinds if kind.window})}",
            "one size of chunks and no windows",
            "give all blocks with chunks the same",
        )
    temperature = config.temperature or TEMPERATURE
    return {
        "intermediate_size": moe.expert_size if moe else config.intermediate_size,
        "intermediate_size_mlp": config.intermediate_size,
        "num_local_experts": moe.num_experts if moe else 0,
        "num_experts_per_tok": moe.top_k if moe else 0,
        "moe_layers": list(config.moe_blocks),
        "interleave_moe_layer_step": _step(config),
        "no_rope_layers": [int(kind.rotary) for kind in kinds],
        "layer_types": [FULL if kind.chunk is None else CHUNKED for kind in kinds],
        # Transformers builds a mask of chunks also where no block uses it.
        "attention_chunk_size": chunks.pop() if chunks else config.max_positions,
        "use_qk_norm": config.qk_norm == "l2",
        "attn_temperature_tuning": config.temperature is not None,
        "attn_scale": temperature.scale,
        "floor_scale": int(temperature.floor),
        "attention_bias": config.qkv_bias,
    }


def _step(config: ModelConfig) -> int:
    """`interleave_moe_layer_step` for readers that do not know `moe_layers`; 0 without experts."""
    return config.moe_blocks[0] + 1 if config.moe_blocks else 0


def _layout(config: ModelConfig, prefix: str = "") -> Layout:
    common = [*norm_tensors(), *attention_tensors(config)]
    dense, moe = dense_tensors(config, "feed_forward"), _moe_tensors(config.moe) if config.moe else []
    return Layout(
        lambda kind: [*common, *(moe if kind.moe else dense)],
        embed=f"{prefix}model.embed_tokens.weight",
        block=f"{prefix}model.layers.{{block}}.",
        final_norm=f"{prefix}model.norm.weight",
        head=f"{prefix}lm_head.weight",
        foreign=FOREIGN if prefix else (),
    )


def _moe_tensors(moe: MoeConfig) -> list[BlockTensor]:
    """Experts are stored together and as they multiply: gate and up side by side `[E, D, 2 F]`, down `[E, F, D]`."""
    width, fused = moe.expert_size, "feed_forward.experts.gate_up_proj"
    return [
        BlockTensor("feed_forward.router.weight", "mlp/router", 1),
        BlockTensor(fused, "mlp/gate", None, TensorSlice(2, 0, width, 2 * width)),
        BlockTensor(fused, "mlp/up", None, TensorSlice(2, width, 2 * width, 2 * width)),
        BlockTensor("feed_forward.experts.down_proj", "mlp/down"),
        *shared_tensors("feed_forward.shared_expert"),
    ]


LLAMA4_TEXT = Family(
    name="llama4_text",
    architecture="Llama4ForCausalLM",
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096 * 32,
        "intermediate_size_mlp": 16384,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "moe_layers": None,
        "interleave_moe_layer_step": 1,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "layer_types": None,
        "attention_chunk_size": 8192,
        "use_qk_norm": True,
        "attn_temperature_tuning": True,
        "attn_scale": TEMPERATURE.scale,
        "floor_scale": TEMPERATURE.floor,
        "attention_bias": False,
    },
    read=_read,
    write=_write,
    layout=_layout,
    # Written by transformers or Meta and read by no code of the model, the noise included.
    harmless=frozenset({"router_jitter_noise", "for_llm_compressor", "cache_implementation"}),
)
LLAMA4 = Family(
    name="llama4",
    architecture="Llama4ForConditionalGeneration",
    defaults={"text_config": None},
    read=_read_multimodal,
    write=_write,
    layout=lambda config: _layout(config, LANGUAGE_PREFIX),
    harmless=frozenset({"vision_config", "tie_word_embeddings"}).union(
        f"{token}_token_{end}" for token in ("boi", "eoi", "image") for end in ("index", "id")
    ),
)
