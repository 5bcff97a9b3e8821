"""Llama, Mistral and Ministral: dense blocks, of which those of Ministral may differ in their window.

Source: HF transformers `configuration_llama`, `configuration_mistral`, `configuration_ministral`, versions
4.5x and 5.x.
"""

from typing import Any

from distillcache.models.config import BlockKind, ModelConfig
from distillcache.models.families.reading.family import Family, common_fields, dense_layout, not_exportable, only_kind
from distillcache.models.families.reading.kinds import check_dense, typed_window_keys, typed_windows
from distillcache.models.families.reading.values import Values

DENSE_DEFAULTS: dict[str, Any] = {
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def _read(values: Values, family: str) -> ModelConfig:
    kind = BlockKind(values.size_or_none("sliding_window") if family == "mistral" else None)
    attention_bias, mlp_bias = (
        (values.flag("attention_bias"), values.flag("mlp_bias")) if family == "llama" else (False, False)
    )
    return ModelConfig(
        **common_fields(values, [kind] * values.size("num_hidden_layers")),
        rope=values.rope(),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=mlp_bias,
        family=family,
    )


def _read_ministral(values: Values) -> ModelConfig:
    windows = typed_windows(values, values.size_or_none("sliding_window"), lambda block: True)
    kinds = [BlockKind(window) for window in windows]
    return ModelConfig(**common_fields(values, kinds), rope=values.rope(), family="ministral")


def exported_family(config: ModelConfig) -> str:
    """`llama` or `mistral`.

    A llama without biases whose heads do not divide its hidden size, or with a sliding window, is written as a
    mistral. It computes the same thing, and transformers' LlamaConfig refuses the first and does not know the second.
    """
    window = only_kind(config).window
    divides = config.hidden_size % config.num_heads == 0
    if config.family == "llama" and window is None and divides and config.qkv_bias == config.output_bias:
        return "llama"
    if not (config.qkv_bias or config.output_bias or config.mlp_bias):
        return "mistral"
    raise not_exportable(
        f"biases, {config.num_heads} query heads, hidden size {config.hidden_size}, window {window}",
        "no biases, or all of them in a llama without a window whose query heads divide the hidden size",
        "keep a number of query heads that divides the hidden size",
    )


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


def _write_ministral(config: ModelConfig) -> dict[str, Any]:
    check_dense(config)
    if config.qkv_bias or config.output_bias or config.mlp_bias:
        raise not_exportable("biases", "none", "use another family")
    return typed_window_keys(config)


def _write_mistral(config: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": only_kind(config).window}


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    defaults=DENSE_DEFAULTS
    | {
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
    },
    read=lambda values: _read(values, "llama"),
    write=_write_llama,
    layout=dense_layout,
    neutral={"sliding_window": (None,)},  # transformers ignores it here
)
MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    defaults=DENSE_DEFAULTS | {"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32, "sliding_window": 4096},
    read=lambda values: _read(values, "mistral"),
    write=_write_mistral,
    layout=dense_layout,
    neutral={"attention_bias": (False, None), "mlp_bias": (False, None)},  # transformers ignores them here
)
MINISTRAL = Family(
    name="ministral",
    architecture="MinistralForCausalLM",
    defaults={**MISTRAL.defaults, "layer_types": None},
    read=_read_ministral,
    write=_write_ministral,
    layout=dense_layout,
)
