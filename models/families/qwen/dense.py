"""Qwen2 (also 1.5 and 2.5, and QwQ) and Qwen3: dense blocks, of which the last ones may have a window.

Qwen2 has biases of queries, keys and values, always. Qwen3 norms every head of its queries and keys; its head has a
width of its own.

Source: HF transformers `configuration_qwen2`, `configuration_qwen3` and their modelling code.
"""

from typing import Any

from distillcache.models.config import BlockKind, ModelConfig
from distillcache.models.families.llama import DENSE_DEFAULTS
from distillcache.models.families.reading.family import Family, common_fields, dense_layout, not_exportable
from distillcache.models.families.reading.kinds import check_dense, typed_windows, window_in_use, window_keys
from distillcache.models.families.reading.values import Values


def _kinds(values: Values) -> list[BlockKind]:
    first = values.count("max_window_layers")
    return [BlockKind(each) for each in typed_windows(values, window_in_use(values), lambda block: block >= first)]


def _read_qwen2(values: Values) -> ModelConfig:
    return ModelConfig(
        **common_fields(values, _kinds(values)),
        rope=values.rope(),
        qkv_bias=True,
        family="qwen2",
    )


def _read_qwen3(values: Values) -> ModelConfig:
    bias = values.flag("attention_bias")
    values.size("head_dim")  # null is no width here
    return ModelConfig(
        **common_fields(values, _kinds(values)),
        rope=values.rope(),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="head",
        family="qwen3",
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    check_dense(config)
    if config.mlp_bias:
        raise not_exportable("biases of the MLP", "none", "use another family")
    return window_keys(config) | {"max_window_layers": config.num_blocks}


def _write_qwen2(config: ModelConfig) -> dict[str, Any]:
    if not config.qkv_bias or config.output_bias:
        raise not_exportable(
            f"biases of queries, keys and values: {config.qkv_bias}, of the output: {config.output_bias}",
            "the former without the latter",
            "use another family",
        )
    return _write(config)


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
    return _write(config) | {"attention_bias": config.qkv_bias}


QWEN_DEFAULTS = DENSE_DEFAULTS | {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    defaults=QWEN_DEFAULTS,
    read=_read_qwen2,
    write=_write_qwen2,
    layout=dense_layout,
    # use_mrope: of vision-language models. attention_bias: not read, the biases are always there.
    neutral={"use_mrope": (False, None), "attention_bias": (False, True)},
)
QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    defaults=QWEN_DEFAULTS | {"head_dim": 128, "attention_bias": False},
    read=_read_qwen3,
    write=_write_qwen3,
    layout=dense_layout,
)
