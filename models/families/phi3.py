"""Phi-3, 3.5 and 4: queries, keys and values in one tensor, gate and up of the MLP in another; LongRoPE.

A part of each head may be rotated. LongRoPE (arXiv 2402.13753) divides the rotary frequencies by one list of factors
in documents within `original_max_position_embeddings` and by another in longer ones. Older files call it `su`, and
some `yarn`, which transformers takes for it as well.

Source: HF transformers `configuration_phi3`, `modeling_phi3`.
"""

from typing import Any

from distillcache.models.config import BlockKind, ModelConfig, RopeConfig
from distillcache.models.families.llama import DENSE_DEFAULTS
from distillcache.models.families.reading.family import (
    Family,
    common_fields,
    fused_dense_tensors,
    norm_tensors,
    not_exportable,
    only_kind,
)
from distillcache.models.families.reading.values import ORIGINAL, PARTIAL, Values
from distillcache.models.files.tensors import BlockTensor, Layout, TensorSlice

LEGACY_KINDS = {"su": "longrope", "yarn": "longrope"}


def _read(values: Values) -> ModelConfig:
    rope = values.rope(partial=True, kinds=LEGACY_KINDS)
    if rope.kind not in ("default", "longrope"):
        raise values.bad("rope_scaling" if values["rope_scaling"] else "rope_parameters", "default or longrope")
    kind = BlockKind(values.size_or_none("sliding_window"))
    values.size(ORIGINAL)
    return ModelConfig(
        **common_fields(values, [kind] * values.size("num_hidden_layers")),
        rope=rope,
        family="phi3",
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    kind, rope = only_kind(config), config.rope
    if kind != BlockKind(kind.window):
        raise not_exportable(str(kind), "dense rotary blocks without chunks", "use another family")
    if config.qkv_bias or config.output_bias or config.mlp_bias:
        raise not_exportable("biases", "none", "use another family")
    written = {
        "sliding_window": kind.window,
        PARTIAL: rope.fraction,
        ORIGINAL: config.max_positions,
        "pad_token_id": None,  # what is assumed otherwise may lie beyond a small vocabulary
    }
    return written if rope.kind == "default" else written | _long_rope(config, rope)


def _long_rope(config: ModelConfig, rope: RopeConfig) -> dict[str, Any]:
    """With the three keys alone that transformers 4 allows, as far as these say it."""
    if rope.kind != "longrope":
        raise not_exportable(f"rotary scaling {rope.kind}", "default or longrope", "use another family")
    if not says_heads(config):
        raise not_exportable(
            f"{config.num_heads} query heads of {config.head_dim}, hidden size {config.hidden_size}, longrope",
            "heads that are together as wide as the hidden size",
            "keep all query heads",
        )
    scaling = {"short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor)}
    if rope.factor != config.max_positions / rope.original_max_positions:
        scaling |= {"factor": rope.factor}
    if rope.attention_factor is not None:
        scaling |= {"attention_factor": rope.attention_factor}
    return {
        ORIGINAL: rope.original_max_positions,
        "rope_scaling": {"type": "longrope", **scaling},
        "rope_parameters": {"rope_type": "longrope", "rope_theta": rope.theta, PARTIAL: rope.fraction, **scaling},
    }


def says_heads(config: ModelConfig) -> bool:
    """Return whether transformers' Phi3Config accepts these heads: it counts LongRoPE's factors by the hidden size
    over the query heads, regardless of `head_dim`.
    """
    width = int(config.hidden_size // config.num_heads * config.rope.fraction)
    return config.rope.kind != "longrope" or width // 2 == len(config.rope.short_factor)


def _layout(config: ModelConfig) -> Layout:
    """The rows of `qkv_proj` are all queries, then all keys, then all values."""
    queries, keys = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))
    total, fused = queries + 2 * keys, "self_attn.qkv_proj.weight"
    spans = {"q": (0, queries), "k": (queries, queries + keys), "v": (queries + keys, total)}
    found = [
        *norm_tensors(),
        *(BlockTensor(fused, f"attention/{name}", 1, TensorSlice(0, *span, total)) for name, span in spans.items()),
        BlockTensor("self_attn.o_proj.weight", "attention/o", 2),
        *fused_dense_tensors(config),
    ]
    return Layout(lambda kind: found)


PHI3 = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    defaults=DENSE_DEFAULTS
    | {
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        ORIGINAL: 4096,
        PARTIAL: None,
        "sliding_window": None,
    },
    read=_read,
    write=_write,
    layout=_layout,
    harmless=frozenset({"resid_pdrop", "embd_pdrop"}),  # dropout
    # Written by Microsoft: all of them say that the model has nothing more.
    neutral={
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "lm_head_bias": (False, None),
        "full_attn_mod": (1, None),
        "interpolate_factor": (1, None),
    },
)
