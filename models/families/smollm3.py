"""SmolLM3: every fourth block has no positions; those blocks may have a window.

Source: HF transformers `configuration_smollm3`, `modeling_smollm3`.
"""

from typing import Any

from distillcache.models.config import BlockKind, ModelConfig
from distillcache.models.families.llama import DENSE_DEFAULTS
from distillcache.models.families.reading.family import Family, common_fields, dense_layout, not_exportable
from distillcache.models.families.reading.kinds import (
    check_dense,
    rotary_blocks,
    typed_windows,
    window_in_use,
    window_keys,
)
from distillcache.models.families.reading.values import Values

THETA = 2_000_000.0
INTERVAL = 4


def _read(values: Values) -> ModelConfig:
    rotary, bias = rotary_blocks(values), values.flag("attention_bias")
    windows = typed_windows(values, window_in_use(values), lambda block: not rotary[block])
    kinds = [BlockKind(window, rotary=turns) for window, turns in zip(windows, rotary, strict=True)]
    return ModelConfig(
        **common_fields(values, kinds),
        rope=values.rope(theta=THETA),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=values.flag("mlp_bias"),
        family="smollm3",
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    check_dense(config, rotary=False)
    if config.qkv_bias != config.output_bias:
        raise not_exportable("some biases of attention", "all or none", "use another family")
    return window_keys(config) | {
        "no_rope_layers": [int(kind.rotary) for kind in config.kinds],
        "no_rope_layer_interval": INTERVAL,  # the list goes before it
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "pad_token_id": None,  # what is assumed otherwise may lie beyond a small vocabulary
    }


SMOLLM3 = Family(
    name="smollm3",
    architecture="SmolLM3ForCausalLM",
    defaults=DENSE_DEFAULTS
    | {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": INTERVAL,
        "layer_types": None,
        "attention_bias": False,
        "mlp_bias": False,
    },
    read=_read,
    write=_write,
    layout=dense_layout,
    harmless=frozenset({"max_window_layers"}),  # in the published files; no code reads it
)
