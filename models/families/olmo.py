"""OLMo 2 and 3: each sublayer's output is normed before it is added to the stream; its input is the stream as it is.

Queries and keys are normed over all their heads together, before the rotation. In OLMo 3 three blocks of four look
through a window, and what stretches the rotation of the others does not stretch theirs.

Source: HF transformers `configuration_olmo2`, `configuration_olmo3` and their modelling code.
"""

from typing import Any

from distillcache.models.config import BlockKind, ModelConfig
from distillcache.models.families.llama import DENSE_DEFAULTS
from distillcache.models.families.reading.family import (
    Family,
    attention_tensors,
    check_plain,
    common_fields,
    dense_tensors,
    not_exportable,
    post_norm_tensors,
)
from distillcache.models.families.reading.kinds import (
    FULL,
    SLIDING,
    check_dense,
    typed_ropes,
    typed_window_keys,
    typed_windows,
)
from distillcache.models.families.reading.values import Values, rope_to_hf
from distillcache.models.files.tensors import Layout

THETA = 500_000.0  # of OLMo 3


def _read_olmo2(values: Values) -> ModelConfig:
    kinds = [BlockKind()] * values.size("num_hidden_layers")
    return ModelConfig(**_fields(values, kinds), rope=values.rope(), family="olmo2")


def _read_olmo3(values: Values) -> ModelConfig:
    windows = typed_windows(values, values.size("sliding_window"), lambda block: (block + 1) % 4 != 0)
    everywhere, local = typed_ropes(values, THETA, THETA, "rope_theta", flat=True)
    kinds = [BlockKind(window, local_rope=window is not None) for window in windows]
    return ModelConfig(**_fields(values, kinds), rope=everywhere, local_rope=local, family="olmo3")


def _fields(values: Values, kinds: list[BlockKind]) -> dict[str, Any]:
    bias = values.flag("attention_bias")
    return common_fields(values, kinds) | {
        "qkv_bias": bias,
        "output_bias": bias,
        "qk_norm": "full",
        "norms": "post",
    }


def _write_olmo2(config: ModelConfig) -> dict[str, Any]:
    check_plain(config)
    return _write(config)


def _write_olmo3(config: ModelConfig) -> dict[str, Any]:
    check_dense(config)
    if any(kind.local_rope != (kind.window is not None) for kind in config.kinds) or config.local_rope is None:
        raise not_exportable(
            "windows and local rotation in different blocks", "both or none", "give local rotation to windowed blocks"
        )
    ropes = {FULL: rope_to_hf(config.rope), SLIDING: rope_to_hf(config.local_rope)}
    return _write(config) | typed_window_keys(config) | {"rope_parameters": ropes}


def _write(config: ModelConfig) -> dict[str, Any]:
    if config.qkv_bias != config.output_bias or config.mlp_bias:
        raise not_exportable("some biases", "all of attention or none, none of the MLP", "use another family")
    return {
        "attention_bias": config.qkv_bias,
        "pad_token_id": None,  # what is assumed otherwise may lie beyond a small vocabulary
    }


def post_norm_layout(config: ModelConfig) -> Layout:
    """The names in files of dense blocks with both post-norms."""
    return Layout(lambda kind: [*post_norm_tensors(), *attention_tensors(config), *dense_tensors(config)])


DEFAULTS = DENSE_DEFAULTS | {
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "attention_bias": False,
}
OLMO2 = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    defaults=DEFAULTS,
    read=_read_olmo2,
    write=_write_olmo2,
    layout=post_norm_layout,
)
OLMO3 = Family(
    name="olmo3",
    architecture="Olmo3ForCausalLM",
    defaults=DEFAULTS | {"sliding_window": 4096, "layer_types": None},
    read=_read_olmo3,
    write=_write_olmo3,
    layout=post_norm_layout,
)
