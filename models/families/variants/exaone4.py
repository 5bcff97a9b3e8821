"""EXAONE 4: norms after the sublayers, norms of queries and keys per head; beside blocks with a window, those that see
all have no positions.

Source: HF transformers `configuration_exaone4`, `modeling_exaone4`.
"""

from typing import Any

from distillcache.models.config import BlockKind, ModelConfig
from distillcache.models.families.llama import DENSE_DEFAULTS
from distillcache.models.families.olmo import post_norm_layout
from distillcache.models.families.reading.family import Family, common_fields, not_exportable
from distillcache.models.families.reading.kinds import check_dense, typed_window_keys, typed_windows
from distillcache.models.families.reading.values import Values

PATTERN = "sliding_window_pattern"


def _read(values: Values) -> ModelConfig:
    window = values.size_or_none("sliding_window")
    kinds = [
        BlockKind(own, rotary=window is None or own is not None)
        for own in typed_windows(values, window, lambda block: _slides(values, block))
    ]
    return ModelConfig(
        **common_fields(values, kinds), rope=values.rope(), qk_norm="head", norms="post", family="exaone4"
    )


def _slides(values: Values, block: int) -> bool:
    """By the pattern, where the config has no `layer_types`: a number, or letters that say L of blocks that slide; with
    those the last block does not."""
    pattern = values[PATTERN]
    if not isinstance(pattern, str):
        return (block + 1) % values.size(PATTERN) != 0
    if not pattern or set(pattern) - set("LG"):
        raise values.bad(PATTERN, "a number, or letters L and G")
    return pattern[block % len(pattern)] == "L" and block + 1 < values.size("num_hidden_layers")


def _write(config: ModelConfig) -> dict[str, Any]:
    check_dense(config, rotary=False)
    typed = all(kind.rotary == (kind.window is not None) for kind in config.kinds)
    plain = all(kind == BlockKind() for kind in config.kinds)
    if config.qkv_bias or config.output_bias or config.mlp_bias or not (typed or plain):
        raise not_exportable(
            "biases, or some blocks that rotate and see all",
            "no biases, and a window in all blocks that rotate or in none",
            "use another family",
        )
    keys = typed_window_keys(config)
    return keys if typed else {**keys, "sliding_window": None}


EXAONE4 = Family(
    name="exaone4",
    architecture="Exaone4ForCausalLM",
    defaults=DENSE_DEFAULTS
    | {
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 32,
        "max_position_embeddings": 2048,
        "sliding_window": 4096,
        PATTERN: 4,
        "layer_types": None,
    },
    read=_read,
    write=_write,
    layout=post_norm_layout,
    neutral={"layer_norm_epsilon": (1e-5,)},
)
