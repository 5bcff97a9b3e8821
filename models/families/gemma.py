"""Gemma 1, 2 and 3: norms multiply by one more than their weight, embeddings are multiplied by the root of their width.

Gemma is otherwise a Llama. Its `gelu` has always meant the tanh approximation, which transformers says as well. Gemma 2
and 3 have norms before and after each sublayer, blocks with a window between those without, and scores of attention
that are scaled by a number of the config's. Gemma 2 caps scores and logits softly, and every other block has a window.
Gemma 3 norms the heads of queries and keys instead; of six blocks five have a window, and these rotate by a base of
their own and without the scaling that stretches the others.

`gemma3` is the model with eyes: its config has the config of a `gemma3_text` inside, its tensors have that one's behind
a prefix, and of both only the language model is read; it is exported as `gemma3_text`.

Source: HF transformers `configuration_gemma`, `configuration_gemma2`, `configuration_gemma3` and their modelling code.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from distillcache.models.config import BlockKind, ModelConfig
from distillcache.models.families.reading.family import (
    Family,
    attention_tensors,
    common_fields,
    dense_layout,
    dense_tensors,
    not_exportable,
    only_kind,
)
from distillcache.models.families.reading.kinds import (
    FULL,
    SLIDING,
    check_dense,
    typed_ropes,
    typed_window_keys,
    typed_windows,
)
from distillcache.models.families.reading.multimodal import multimodal_layout, read_language_model, text_config
from distillcache.models.families.reading.values import EXPORTED_ACTIVATIONS, Values, bad_value, rope_to_hf
from distillcache.models.files.tensors import BlockTensor, Layout

LOCAL_THETA, GLOBAL_THETA = 10_000.0, 1_000_000.0
TANH = {"gelu": "gelu_tanh"}  # of Gemma 1


def _windows(values: Values, slides: Callable[[int], bool]) -> list[int | None]:
    return typed_windows(values, values.size_or_none("sliding_window"), slides)


def _of_all(values: Values, kinds: list[BlockKind], family: str, activation: str) -> dict[str, Any]:
    bias, hidden = values.flag("attention_bias"), values.size("hidden_size")
    return common_fields(values, kinds, activation=activation) | {
        "qkv_bias": bias,
        "output_bias": bias,
        "norm_product": "offset",
        "embed_scale": hidden**0.5,
        "embed_scale_rounded": True,
        "family": family,
    }


def _common(values: Values, kinds: list[BlockKind], family: str) -> dict[str, Any]:
    return _of_all(values, kinds, family, "hidden_activation") | {
        "norms": "both",
        "attention_scale": values.size("query_pre_attn_scalar") ** -0.5,
        "logits_softcap": values.number_or_none("final_logit_softcapping"),
    }


def _read_gemma(values: Values) -> ModelConfig:
    kinds = [BlockKind()] * values.size("num_hidden_layers")
    found = _of_all(values, kinds, "gemma", "hidden_act")
    found["activation"] = TANH.get(found["activation"], found["activation"])
    return ModelConfig(**found, rope=values.rope())


def _read_gemma2(values: Values) -> ModelConfig:
    windows = _windows(values, lambda block: block % 2 == 0)
    return ModelConfig(
        **_common(values, [BlockKind(window) for window in windows], "gemma2"),
        rope=values.rope(),
        attention_softcap=values.number_or_none("attn_logit_softcapping"),
    )


def _read_gemma3_text(values: Values) -> ModelConfig:
    pattern = values.size("sliding_window_pattern")
    windows = _windows(values, lambda block: (block + 1) % pattern != 0)
    everywhere, local = typed_ropes(values, GLOBAL_THETA, LOCAL_THETA, "rope_local_base_freq")
    return ModelConfig(
        **_common(values, [BlockKind(window, local_rope=window is not None) for window in windows], "gemma3_text"),
        rope=everywhere,
        local_rope=local,
        qk_norm="head",
    )


def _read_gemma3(values: Values) -> ModelConfig:
    """Read a Gemma 3 config. `tie_word_embeddings` stands beside `text_config`; inside it, it may be repeated."""
    tied = values.flag("tie_word_embeddings")
    inside = text_config(values, GEMMA3_TEXT).get("tie_word_embeddings", tied)
    if inside != tied:
        raise bad_value(values.file, "text_config.tie_word_embeddings", inside, f"{tied}, as beside text_config")
    return replace(read_language_model(values, GEMMA3_TEXT), family="gemma3", tie_embeddings=tied)


def _check(config: ModelConfig, **own: tuple[Any, Any]) -> None:
    """Raise `CheckpointError` unless a Gemma's config can say this decoder. own: what of it a family checks beside what
    all do, and what is expected of that."""
    check_dense(config)
    found = {
        "embed_scale": (config.embed_scale, config.hidden_size**0.5),
        "embed_scale_rounded": (config.embed_scale_rounded, True),
        "biases": ((config.qkv_bias, config.mlp_bias), (config.output_bias, False)),
        **own,
    }
    for name, (value, expected) in found.items():
        if value != expected:
            raise not_exportable(f"{name} {value}", str(expected), "export a decoder that a Gemma's config can say")


def _write_gemma(config: ModelConfig) -> dict[str, Any]:
    # The tanh approximation is what `gelu` means here.
    said = TANH.get(config.activation, config.activation)
    _check(config, kinds=(only_kind(config), BlockKind()), activation=(config.activation, said))
    return {"attention_bias": config.qkv_bias}


def _write(config: ModelConfig) -> dict[str, Any]:
    scale = 1.0 if config.attention_scale is None else config.attention_scale
    scalar = round(scale**-2)
    _check(
        config,
        attention_scale=(config.attention_scale, scalar**-0.5),
        rest_of_hidden_size_over_heads=(config.hidden_size % config.num_heads, 0),
    )
    return {
        **typed_window_keys(config),
        "hidden_activation": EXPORTED_ACTIVATIONS[config.activation],
        "attention_bias": config.qkv_bias,
        "query_pre_attn_scalar": scalar,
        "final_logit_softcapping": config.logits_softcap,
        "attn_logit_softcapping": config.attention_softcap,
    }


def _write_gemma3_text(config: ModelConfig) -> dict[str, Any]:
    if any(kind.local_rope != (kind.window is not None) for kind in config.kinds) or config.local_rope is None:
        raise not_exportable(
            "windows and local rotation in different blocks", "both or none", "give local rotation to windowed blocks"
        )
    ropes = {FULL: rope_to_hf(config.rope), SLIDING: rope_to_hf(config.local_rope)}
    return _write(config) | {"rope_parameters": ropes, "rope_local_base_freq": config.local_rope.theta}


def _layout(config: ModelConfig) -> Layout:
    norms = [
        BlockTensor("input_layernorm.weight", "attention/norm"),
        BlockTensor("post_attention_layernorm.weight", "attention/post_norm"),
        BlockTensor("pre_feedforward_layernorm.weight", "mlp/norm"),
        BlockTensor("post_feedforward_layernorm.weight", "mlp/post_norm"),
    ]
    return Layout(lambda kind: [*norms, *attention_tensors(config), *dense_tensors(config)])


DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
}
# Transformers reads `hidden_activation`, and of the other names none.
HARMLESS = frozenset({"hidden_act", "cache_implementation"})
ONE_WAY: dict[str, tuple[Any, ...]] = {"use_bidirectional_attention": (False, None)}
GEMMA = Family(
    name="gemma",
    architecture="GemmaForCausalLM",
    defaults={
        "num_key_value_heads": 16,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "attention_bias": False,
    },
    read=_read_gemma,
    write=_write_gemma,
    layout=dense_layout,
    # Of files of transformers 4, which read this one; it says what is so.
    neutral=ONE_WAY | {"hidden_activation": ("gelu_pytorch_tanh", None)},
)
GEMMA2 = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    defaults=DEFAULTS
    | {"max_position_embeddings": 8192, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    read=_read_gemma2,
    write=_write,
    layout=_layout,
    harmless=HARMLESS | {"sliding_window_size"},
    neutral=ONE_WAY | {"sliding_window_pattern": (2, None)},
)
GEMMA3_TEXT = Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    # With sizes: the released vision-language models leave out those of the smallest of them.
    defaults=DEFAULTS
    | {
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "max_position_embeddings": 131_072,
        "final_logit_softcapping": None,
        "sliding_window_pattern": 6,
        "rope_local_base_freq": None,
    },
    read=_read_gemma3_text,
    write=_write_gemma3_text,
    layout=_layout,
    harmless=HARMLESS | {"_sliding_window_pattern"},
    neutral=ONE_WAY | {"attn_logit_softcapping": (None,)},  # in the config, and applied by no code of transformers
)
GEMMA3 = Family(
    name="gemma3",
    architecture="Gemma3ForConditionalGeneration",
    defaults={"text_config": None, "tie_word_embeddings": True},
    read=_read_gemma3,
    write=_write_gemma3_text,
    layout=lambda config: multimodal_layout(_layout(config)),
    harmless=frozenset({"vision_config", "mm_tokens_per_image"}).union(
        f"{token}_token_{end}" for token in ("boi", "eoi", "image") for end in ("index", "id")
    ),
)
