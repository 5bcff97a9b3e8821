"""Command R7B, Command A and Tiny Aya (`cohere2`): attention and MLP lie beside each other under one LayerNorm; blocks
with a window rotate neighbours, those that see all have no positions; a factor on the logits.

Source: HF transformers `configuration_cohere2`, `modeling_cohere2`.
"""

from dataclasses import replace
from typing import Any

from distillcache.models.config import BlockKind, ModelConfig
from distillcache.models.families.llama import DENSE_DEFAULTS
from distillcache.models.families.reading.family import (
    Family,
    attention_tensors,
    common_fields,
    dense_tensors,
    not_exportable,
)
from distillcache.models.families.reading.kinds import check_dense, typed_window_keys, typed_windows
from distillcache.models.families.reading.values import Values
from distillcache.models.files.tensors import BlockTensor, Layout

PATTERN = "sliding_window_pattern"


def _read(values: Values) -> ModelConfig:
    step = values.size(PATTERN)
    windows = typed_windows(values, values.size("sliding_window"), lambda block: (block + 1) % step != 0)
    bias = values.flag("attention_bias")
    return ModelConfig(
        **common_fields(values, [BlockKind(window, rotary=window is not None) for window in windows]),
        rope=replace(values.rope(), interleaved=True),
        qkv_bias=bias,
        output_bias=bias,
        norms="shared",
        norm_product="centred",
        logits_divisor=1 / values.number("logit_scale"),
        family="cohere2",
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    check_dense(config, rotary=False)
    if any(kind.rotary != (kind.window is not None) for kind in config.kinds):
        raise not_exportable(
            "blocks that rotate and see all, or slide and do not rotate",
            "a window in all blocks that rotate and in no others",
            "use another family",
        )
    if config.qkv_bias != config.output_bias or config.mlp_bias:
        raise not_exportable("some biases", "all of attention or none, none of the MLP", "use another family")
    return {
        "attention_bias": config.qkv_bias,
        "layer_norm_eps": config.norm_eps,
        "logit_scale": 1 / config.logits_divisor,
        **typed_window_keys(config),
    }


def _layout(config: ModelConfig) -> Layout:
    norm = BlockTensor("input_layernorm.weight", "attention/norm")
    return Layout(lambda kind: [norm, *attention_tensors(config), *dense_tensors(config)])


COHERE2 = Family(
    name="cohere2",
    architecture="Cohere2ForCausalLM",
    defaults=DENSE_DEFAULTS
    | {
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": None,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "sliding_window": 4096,
        PATTERN: 4,
        "layer_types": None,
        "logit_scale": 0.0625,
    },
    read=_read,
    write=_write,
    layout=_layout,
    # Of the makers' own code, whose other forms transformers does not have.
    neutral={
        "layer_switch": (4,),
        "order_of_interleaved_layers": ("local_attn_first",),
        "position_embedding_type": ("rope_gptj",),
        "rotary_pct": (1,),
        "use_embedding_sharing": (True,),
        "use_gated_activation": (True,),
        "use_parallel_block": (True,),
        "use_parallel_embedding": (False,),
    },
    aliases={"layer_norm_eps": "rms_norm_eps"},
    unwritten=frozenset({"rms_norm_eps"}),
)
