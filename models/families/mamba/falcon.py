"""Falcon-H1: attention and Mamba-2 beside each other in every block, factors on what enters and leaves them.

Both have the block's normed stream as input, and their outputs are added. The norm behind the recurrence may be
missing, or stand before the gate. Factors of the embedding and of the logits are `embed_scale` and one over
`logits_divisor`.

Source: HF transformers `configuration_falcon_h1`, `modeling_falcon_h1`.
"""

from typing import Any, Literal

from distillcache.models.config import BlockKind, ModelConfig, Multipliers
from distillcache.models.families.llama import DENSE_DEFAULTS
from distillcache.models.families.mamba.sizes import (
    HARMLESS,
    MAMBA_DEFAULTS,
    mamba_keys,
    mamba_sizes,
    mamba_tensors,
)
from distillcache.models.families.reading.family import (
    Family,
    attention_tensors,
    common_fields,
    dense_tensors,
    not_exportable,
    only_kind,
)
from distillcache.models.families.reading.values import Values, is_number
from distillcache.models.files.tensors import BlockTensor, Layout
from distillcache.models.layers.recurrent.mamba import BESIDE

KIND, NAME = BlockKind(mixer="attention_mamba2"), "hybrid"
# Fields of `Multipliers` under the family's names.
FACTORS = {
    "attention_input": "attention_in_multiplier",
    "attention_output": "attention_out_multiplier",
    "key": "key_multiplier",
    "mamba_input": "ssm_in_multiplier",
    "mamba_output": "ssm_out_multiplier",
}
IN_BLOCK, IN_MLP = "ssm_multipliers", "mlp_multipliers"


def _read(values: Values) -> ModelConfig:
    depth = values.size("num_hidden_layers")
    values.per_block("layer_types", (NAME,), depth)
    gate, down = _numbers(values, IN_MLP, 2)
    single = {field: values.number(key) for field, key in FACTORS.items()}
    z, v, k, q, alpha = _numbers(values, IN_BLOCK, 5)
    bias = values.flag("attention_bias")
    return ModelConfig(
        **common_fields(values, [KIND] * depth),
        rope=values.rope(),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=values.flag("mlp_bias"),
        embed_scale=values.number("embedding_multiplier"),
        logits_divisor=1 / values.number("lm_head_multiplier"),
        mamba=mamba_sizes(
            values,
            values.size_or_none("mamba_d_ssm"),
            output_bias=values.flag("projectors_bias"),
            norm=_norm(values),
        ),
        multipliers=Multipliers(**single, mamba=(z, v, k, q, alpha), gate=gate, down=down),
        family="falcon_h1",
    )


def _norm(values: Values) -> Literal["gated", "first", "none"]:
    first = values.flag("mamba_norm_before_gate")
    return "none" if not values.flag("mamba_rms_norm") else "first" if first else "gated"


def _numbers(values: Values, key: str, count: int) -> list[float]:
    """This many positive factors; ones where it is null."""
    given = [1.0] * count if values[key] is None else values[key]
    if not isinstance(given, list | tuple) or len(given) != count or not all(is_number(n) and n > 0 for n in given):
        raise values.bad(key, f"a list of {count} positive numbers")
    return [float(number) for number in given]


def _write(config: ModelConfig) -> dict[str, Any]:
    if only_kind(config) != KIND:
        raise not_exportable(str(only_kind(config)), "attention beside Mamba-2, without windows", "use another family")
    if config.qkv_bias != config.output_bias:
        raise not_exportable("some biases of attention", "all or none", "use another family")
    mamba, factors = config.mamba_config, config.multipliers or Multipliers()
    return {
        **mamba_keys(config),
        **{key: getattr(factors, field) for field, key in FACTORS.items()},
        IN_BLOCK: list(factors.mamba),
        IN_MLP: [factors.gate, factors.down],
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "embedding_multiplier": config.embed_scale,
        "lm_head_multiplier": 1 / config.logits_divisor,
        "mamba_d_ssm": mamba.heads * mamba.head_dim,
        "mamba_rms_norm": mamba.norm != "none",
        "mamba_norm_before_gate": mamba.norm == "first",
        "projectors_bias": mamba.output_bias,
    }


def _layout(config: ModelConfig) -> Layout:
    tensors = [
        BlockTensor("input_layernorm.weight", "attention/norm"),
        *attention_tensors(config),
        *mamba_tensors(config, target=f"attention/{BESIDE}"),
        BlockTensor("pre_ff_layernorm.weight", "mlp/norm"),
        *dense_tensors(config, "feed_forward"),
    ]
    return Layout(lambda kind: tensors, final_norm="model.final_layernorm.weight")


FALCON_H1 = Family(
    name="falcon_h1",
    architecture="FalconH1ForCausalLM",
    defaults=DENSE_DEFAULTS
    | MAMBA_DEFAULTS
    | dict.fromkeys(FACTORS.values(), 1.0)
    | {
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "layer_types": None,
        "attention_bias": False,
        "mlp_bias": False,
        "mamba_d_ssm": 1024,
        "mamba_rms_norm": False,
        "mamba_norm_before_gate": True,
        "projectors_bias": False,
        "embedding_multiplier": 1.0,
        "lm_head_multiplier": 1.0,
        IN_BLOCK: None,
        IN_MLP: None,
    },
    read=_read,
    write=_write,
    layout=_layout,
    harmless=HARMLESS,
    neutral={"attn_layer_indices": (), "mamba_use_mlp": (True,)},
    aliases={"layers_block_type": "layer_types"},
)
