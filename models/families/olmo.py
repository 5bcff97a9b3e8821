"""OLMo 2 and 3: each sublayer's output is normed before it is added to the stream; its input is the stream as it is.

Queries and keys are normed over all their heads together, before the rotation. In OLMo 3 three blocks of four look
through a window, and what stretches the rotation of the others does not stretch theirs. OLMo Hybrid has the gated delta
rule in three blocks of four, whose sublayers' inputs are normed, not their outputs; the others do not rotate where the
base of the rotation is null, as in the released files.

Source: HF transformers `configuration_olmo2`, `configuration_olmo3`, `configuration_olmo_hybrid` and their modelling
code; names in files by its `conversion_mapping`.
"""

from typing import Any

from distillcache.models.config import BlockKind, DeltaConfig, ModelConfig, RopeConfig
from distillcache.models.families.llama import DENSE_DEFAULTS
from distillcache.models.families.reading.family import (
    Family,
    attention_tensors,
    check_plain,
    common_fields,
    dense_tensors,
    norm_tensors,
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
from distillcache.models.families.reading.recurrent import delta_keys, mixers
from distillcache.models.families.reading.values import ROPE_KEYS, Values, rope_to_hf
from distillcache.models.files.tensors import BlockTensor, Layout

THETA = 500_000.0  # of OLMo 3
HYBRID = "olmo_hybrid"
RULE_EPS = 1e-5  # of the norm behind the delta rule, whatever the others have


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


def _read_hybrid(values: Values) -> ModelConfig:
    found = mixers(values, 4)
    if values["layer_types"] is None and "attention" not in found:
        found[-1] = "attention"
    if len(set(found)) == 1:
        raise values.bad("layer_types", "blocks of both kinds")
    given = values["rope_parameters"]
    inside = isinstance(given, dict) and "rope_theta" in given
    rotary = given["rope_theta"] is not None if inside else not values.is_null("rope_theta")
    kinds = [BlockKind(mixer=mixer, rotary=rotary or mixer != "attention") for mixer in found]
    fields = _fields(values, kinds)
    fields["norms"] = "by_mixer"
    return ModelConfig(
        **fields,
        rope=values.rope() if rotary else RopeConfig(),
        delta=_delta_sizes(values),
        family=HYBRID,
    )


def _delta_sizes(values: Values) -> DeltaConfig:
    heads = values.size("num_attention_heads")
    keys = values.size_or_none("linear_num_key_heads") or heads
    served = values.size_or_none("linear_num_value_heads") or heads
    if served % keys:
        raise values.bad("linear_num_value_heads", f"a multiple of linear_num_key_heads, which is {keys}")
    width = values.size_or_none("linear_key_head_dim") or int(0.75 * values.size("hidden_size") / keys)
    return DeltaConfig(
        key_heads=keys,
        value_heads=served,
        key_dim=width,
        value_dim=values.size_or_none("linear_value_head_dim") or 2 * width,
        taps=values.size("linear_conv_kernel_dim"),
        doubled=values.flag("linear_allow_neg_eigval"),
        norm_eps=RULE_EPS,
    )


def _write_hybrid(config: ModelConfig) -> dict[str, Any]:
    rotary = all(kind.rotary for kind in config.kinds)
    keys = delta_keys(config, rotary=rotary)
    if len(set(keys["layer_types"])) == 1 or config.norms != "by_mixer" or config.delta_config.norm_eps != RULE_EPS:
        found = f"blocks of {set(keys['layer_types'])}, norms of {config.norms}, {config.delta_config}"
        raise not_exportable(found, "blocks of both kinds, normed as in the family", "export it in another family")
    unrotated = {} if rotary else dict.fromkeys(ROPE_KEYS) | {"rope_parameters": {"rope_theta": None}}
    return _write(config) | keys | unrotated | {"linear_allow_neg_eigval": config.delta_config.doubled}


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


def _hybrid_layout(config: ModelConfig) -> Layout:
    """Released files, and those that transformers saves, have other names of norms than its code. The latter have the
    convolutions of queries, keys and values cut into three equal tensors, whatever their widths."""
    dense, attention, delta = dense_tensors(config), attention_tensors(config), _delta_tensors()
    sizes = config.delta_config
    keys, values = sizes.key_heads * sizes.key_dim, sizes.value_heads * sizes.value_dim
    return Layout(
        lambda kind: [*post_norm_tensors(), *attention, *dense] if kind.attends else [*norm_tensors(), *delta, *dense],
        endings=(
            (".attention_layer_norm.weight", ".input_layernorm.weight"),
            (".feedforward_layer_norm.weight", ".post_attention_layernorm.weight"),
        ),
        recut=tuple(
            (f"linear_attn.{n}_conv1d.weight", rows) for n, rows in zip("qkv", (keys, keys, values), strict=True)
        ),
    )


def _delta_tensors() -> list[BlockTensor]:
    prefix, projections = "linear_attn.", {"a": "alpha", "b": "beta", "g": "z"} | {name: name for name in "qkv"}
    return [
        *(BlockTensor(f"{prefix}{name}_proj.weight", f"attention/{own}", 1) for name, own in projections.items()),
        *(BlockTensor(f"{prefix}{n}_conv1d.weight", f"attention/conv_{n}", depthwise=True) for n in "qkv"),
        BlockTensor(f"{prefix}dt_bias", "attention/dt_bias"),
        BlockTensor(f"{prefix}A_log", "attention/a_log"),
        BlockTensor(f"{prefix}o_norm.weight", "attention/out_norm"),
        BlockTensor(f"{prefix}o_proj.weight", "attention/o", 2),
    ]


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
LINEAR_SIZES = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
OLMO_HYBRID = Family(
    name=HYBRID,
    architecture="OlmoHybridForCausalLM",
    defaults=DEFAULTS
    | dict.fromkeys(LINEAR_SIZES)
    | {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 65536,
        "layer_types": None,
        "linear_conv_kernel_dim": 4,
        "linear_allow_neg_eigval": True,
    },
    read=_read_hybrid,
    write=_write_hybrid,
    layout=_hybrid_layout,
    # Of what training begins with.
    harmless=frozenset(f"linear_{name}" for name in ("a_log_min", "a_log_max", "dt_min", "dt_max", "dt_init_floor")),
    neutral={"linear_use_gate": (True,)},
)
