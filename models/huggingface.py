"""`config.json` of an HF directory to `ModelConfig`, and back.

The rule for `config.json` is a closed list. A key is understood, or known not to change what the model computes, or
refused by name: a key that we do not know may be one that changes the numbers.

Source: HF transformers `configuration_llama`, `configuration_mistral` and `modeling_rope_utils`, versions 4.5x
(`rope_theta`, `rope_scaling`) and 5.x (`rope_parameters`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.config import BlockKind, LayerGroup, ModelConfig, RopeConfig
from schemas.errors import CheckpointError

# What transformers assumes where config.json is silent. Sizes have no default here: a checkpoint states them.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None, "max_position_embeddings": 2048, "sliding_window": None},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32, "sliding_window": 4096},
}
COMMON_DEFAULTS: dict[str, Any] = {
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")

# HF's name -> ours. `gelu_new` writes out the tanh approximation that `gelu_pytorch_tanh` calls by name.
ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
EXPORTED_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}

# Keys that do not change the forward pass: bookkeeping, initialisation, generation, dropout (training only),
# `pretraining_tp` (slices the same matrix products), labels of heads that a language model does not have.
HARMLESS_KEYS = frozenset(
    """_attn_implementation_autoset _name_or_path architectures attention_dropout attn_implementation bos_token_id
    chunk_size_feed_forward dtype eos_token_id finetuning_task id2label initializer_range is_llama_config label2id
    model_type name_or_path num_labels output_attentions output_hidden_states pad_token_id prefix pretraining_tp
    problem_type producer return_dict sep_token_id task_specific_params tokenizer_class torch_dtype torchscript
    transformers.js_config transformers_version unk_token_id use_cache""".split()  # noqa: SIM905 - one a line would be two screens
)
# Keys that would change the forward pass, with the values under which they do not.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False, True, None),
    "is_encoder_decoder": (False, None),
    "layer_types": (None,),
    "partial_rotary_factor": (1, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "rope_interleaved": (False, None),
    "tie_encoder_decoder": (False, None),
}
# Keys of one family that transformers ignores in the other: they must be absent or say nothing.
FOREIGN_VALUES: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {"sliding_window": (None,)},
    "mistral": {"attention_bias": (False, None), "mlp_bias": (False, None)},
}

# rope kind -> (required, optional) parameters, and their field in RopeConfig.
ROPE_PARAMETERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
}
ROPE_FIELDS = {"original_max_position_embeddings": "original_max_positions"}


def config_from_hf(raw: Mapping[str, Any], file: Path) -> ModelConfig:
    """The decoder that a `config.json` describes.

    Args:
        raw: its content.
        file: where it came from, for messages.
    """
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise CheckpointError(
            "this model_type is not supported",
            {"file": file, "found": family, "supported": ", ".join(FAMILIES)},
            "use a checkpoint of a supported family",
        )
    values = COMMON_DEFAULTS | FAMILIES[family] | dict(raw)
    _check_keys(values, family, file)
    sizes = {key: _positive(values, key, file) for key in SIZES}
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    kv_heads = heads if values["num_key_value_heads"] is None else _positive(values, "num_key_value_heads", file)
    max_positions = _positive(values, "max_position_embeddings", file)
    window = None if values["sliding_window"] is None else _positive(values, "sliding_window", file)
    config = ModelConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=hidden,
        intermediate_size=sizes["intermediate_size"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads if values["head_dim"] is None else _positive(values, "head_dim", file),
        layers=(LayerGroup((BlockKind(window),), sizes["num_hidden_layers"]),),
        rope=rope_from_hf(raw, max_positions, file),
        norm_eps=_number(values, "rms_norm_eps", file),
        activation=_activation(values["hidden_act"], file),
        tie_embeddings=_flag(values, "tie_word_embeddings", file),
        attention_bias=_flag(values, "attention_bias", file),
        mlp_bias=_flag(values, "mlp_bias", file),
        max_positions=max_positions,
        family=family,
    )
    check_heads(config, file)
    return config


def check_heads(config: ModelConfig, file: Path) -> None:
    """Query heads form equal groups; halves of a head are rotated against each other, so its width is even."""
    if config.num_heads % config.num_kv_heads:
        raise CheckpointError(
            "the query heads do not divide into the key/value heads",
            {"file": file, "query heads": config.num_heads, "key/value heads": config.num_kv_heads},
            "check num_attention_heads and num_key_value_heads",
        )
    if config.head_dim % 2:
        raise CheckpointError(
            "rotary embedding needs an even head width",
            {"file": file, "found": config.head_dim},
            "check head_dim, or hidden_size and num_attention_heads",
        )


def rope_from_hf(raw: Mapping[str, Any], max_positions: int, file: Path) -> RopeConfig:
    """Rotary embedding from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    given = {key: _rope_dict(raw, key, file) for key in ("rope_scaling", "rope_parameters")}
    old, new = ({k: v for k, v in given[key].items() if k != "rope_theta"} for key in given)
    if old and new and old != new:
        raise CheckpointError(
            "rope_scaling and rope_parameters disagree",
            {"file": file, "rope_scaling": old, "rope_parameters": new},
            "remove the wrong one",
        )
    parameters = given["rope_parameters"] | given["rope_scaling"]
    kind = parameters.pop("rope_type", "default")
    theta = parameters.pop("rope_theta", None) or raw.get("rope_theta") or 10_000.0
    if not isinstance(kind, str) or kind not in ROPE_PARAMETERS:
        raise CheckpointError(
            "this rope_type is not supported",
            {"file": file, "found": kind, "supported": ", ".join(ROPE_PARAMETERS)},
            "use a checkpoint with a supported rope_type",
        )
    _check_rope_keys(parameters, kind, file)
    if kind in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = (
            parameters.get("original_max_position_embeddings") or max_positions
        )
    # None means transformers' default, which is RopeConfig's own.
    fields = {ROPE_FIELDS.get(key, key): value for key, value in parameters.items() if value is not None}
    return RopeConfig(theta=_number({"rope_theta": theta}, "rope_theta", file), kind=kind, **fields)


def _rope_dict(raw: Mapping[str, Any], key: str, file: Path) -> dict[str, Any]:
    """`rope_scaling` or `rope_parameters` with `rope_type` spelled out; empty where absent or null."""
    value = raw.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _bad_value(file, key, value, "an object or null")
    value = dict(value)
    legacy = value.pop("type", "default")  # transformers before 4.43
    return {"rope_type": legacy} | value


def _check_rope_keys(parameters: dict[str, Any], kind: str, file: Path) -> None:
    if parameters.pop("partial_rotary_factor", 1) not in (1, None):
        raise _bad_value(file, "partial_rotary_factor", "other than 1", "1: the whole head is rotated")
    required, optional = ROPE_PARAMETERS[kind]
    for key in parameters:
        if key not in (*required, *optional):
            raise _unknown_key(file, f"rope parameter {key} of rope_type {kind}", parameters[key])
    for key in required:
        if parameters.get(key) is None:
            raise _bad_value(file, f"rope parameter {key}", "nothing", f"a number, for rope_type {kind}")
    for key, value in parameters.items():
        if value is not None and not (isinstance(value, bool) if key == "truncate" else _is_number(value)):
            raise _bad_value(file, f"rope parameter {key}", value, "true or false" if key == "truncate" else "a number")
    if kind != "default" and parameters["factor"] <= 0:
        raise _bad_value(file, "rope parameter factor", parameters["factor"], "a number above 0")
    if kind == "llama3" and parameters["low_freq_factor"] == parameters["high_freq_factor"]:
        found = parameters["low_freq_factor"]
        raise _bad_value(file, "rope parameter high_freq_factor", found, "other than low_freq_factor")


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of an export, for readers of transformers 4.5x and 5.x alike.

    Both spellings of the rotary parameters and of the dtype are written; each version ignores the other's.

    A llama without biases whose heads do not divide its hidden size, or with a sliding window, is written as a
    mistral. It computes the same thing, and transformers' LlamaConfig refuses the first and does not know the second.

    Raises:
        CheckpointError: transformers has no config that means this decoder.
    """
    family, window = exported_family(config)
    rope = _rope_to_hf(config.rope)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "architectures": ["MistralForCausalLM" if family == "mistral" else "LlamaForCausalLM"],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_blocks,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": EXPORTED_ACTIVATIONS[config.activation],
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": None if config.rope.kind == "default" else scaling,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_embeddings,
        **({"sliding_window": window} if family == "mistral" else {}),
        **({"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias} if family == "llama" else {}),
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def exported_family(config: ModelConfig) -> tuple[str, int | None]:
    """The HF model_type that computes what this decoder computes, and its sliding window."""
    kinds = {kind for group in config.layers for kind in group.pattern}
    if len(kinds) > 1:
        raise CheckpointError(
            "transformers has no config for this plan of layers",
            {"found": f"{len(kinds)} kinds of blocks", "expected": "one kind", "plan": config.layers},
            "export a decoder whose blocks are all of one kind",
        )
    window = kinds.pop().window
    as_llama = window is None and config.hidden_size % config.num_heads == 0
    if config.family == "llama" and as_llama:
        return "llama", None
    if not (config.attention_bias or config.mlp_bias):
        return "mistral", window
    raise CheckpointError(
        "transformers has no config for this decoder",
        {
            "found": f"biases, {config.num_heads} query heads, hidden size {config.hidden_size}, window {window}",
            "expected": "no biases, or a llama without a window whose query heads divide the hidden size",
        },
        "keep a number of query heads that divides the hidden size",
    )


def _rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    required, optional = ROPE_PARAMETERS[rope.kind]
    found = {key: getattr(rope, ROPE_FIELDS.get(key, key)) for key in (*required, *optional)}
    written = {key: value for key, value in found.items() if value is not None}
    return {"rope_type": rope.kind, "rope_theta": rope.theta, **written}


def _check_keys(values: Mapping[str, Any], family: str, file: Path) -> None:
    understood = HARMLESS_KEYS.union(SIZES, ROPE_KEYS, COMMON_DEFAULTS, FAMILIES[family])
    neutral = NEUTRAL_VALUES | FOREIGN_VALUES[family]
    for key, value in values.items():
        if key in neutral:
            if value not in neutral[key]:
                raise _unknown_key(file, key, value)
        elif key not in understood:
            raise _unknown_key(file, key, value)


def _unknown_key(file: Path, key: str, value: object) -> CheckpointError:
    return CheckpointError(
        "the config has a setting that is not supported, and that may change what the model computes",
        {"file": file, "key": key, "value": _short(value)},
        "use another checkpoint, or remove the key if you know that this model computes the same without it",
    )


def _bad_value(file: Path, key: str, value: object, expected: str) -> CheckpointError:
    return CheckpointError(
        "the config has a value that cannot be used",
        {"file": file, "key": key, "found": _short(value), "expected": expected},
        "correct the value",
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _positive(values: Mapping[str, Any], key: str, file: Path) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _bad_value(file, key, value, "a positive whole number")
    return value


def _number(values: Mapping[str, Any], key: str, file: Path) -> float:
    if not _is_number(values[key]) or not values[key] > 0:
        raise _bad_value(file, key, values[key], "a positive number")
    return float(values[key])


def _flag(values: Mapping[str, Any], key: str, file: Path) -> bool:
    if not isinstance(values[key], bool):
        raise _bad_value(file, key, values[key], "true or false")
    return values[key]


def _activation(name: object, file: Path) -> str:
    if not isinstance(name, str) or name not in ACTIVATION_NAMES:
        raise _bad_value(file, "hidden_act", name, ", ".join(ACTIVATION_NAMES))
    return ACTIVATION_NAMES[name]


def _short(value: object, width: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 3]}..."
