"""Apertus: norms of queries and keys per head, and MLPs without a gate, whose activation xIELU has numbers of its own
in every block.

Source: HF transformers `configuration_apertus`, `modeling_apertus`, and `XIELUActivation` in `activations`.
"""

from typing import Any

from distillcache.models.config import BlockKind, ModelConfig, RopeConfig
from distillcache.models.families.llama import DENSE_DEFAULTS
from distillcache.models.families.reading.family import (
    Family,
    attention_tensors,
    check_plain,
    common_fields,
    not_exportable,
)
from distillcache.models.families.reading.values import Values
from distillcache.models.files.tensors import BlockTensor, Layout

THETA = 12_000_000.0
# Of xIELU; the last two are no parameters in transformers, and files have them all the same.
NUMBERS = {"alpha_p": "positive", "alpha_n": "negative", "beta": "linear", "eps": "edge"}


def _read(values: Values) -> ModelConfig:
    bias = values.flag("attention_bias")
    return ModelConfig(
        **common_fields(values, [BlockKind()] * values.size("num_hidden_layers"), activation=None),
        activation="xielu",
        mlp_gated=False,
        rope=_rope(values),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="head",
        family="apertus",
    )


def _rope(values: Values) -> RopeConfig:
    if values["rope_parameters"] is not None or values["rope_scaling"] is not None:
        return values.rope(theta=THETA)
    if values["rope_theta"] not in (None, THETA):
        # Before version 5 that was a rotation without a scaling; version 5 takes its own default, this base included.
        raise values.bad("rope_theta", "rope_parameters: without them versions of transformers differ in what it means")
    return RopeConfig(THETA, "llama3", 8.0, 8192)


def _write(config: ModelConfig) -> dict[str, Any]:
    check_plain(config)
    if config.qkv_bias != config.output_bias or config.mlp_bias:
        raise not_exportable("some biases", "all of attention or none, none of the MLP", "use another family")
    return {"attention_bias": config.qkv_bias}


def _layout(config: ModelConfig) -> Layout:
    tensors = [
        BlockTensor("attention_layernorm.weight", "attention/norm"),
        BlockTensor("feedforward_layernorm.weight", "mlp/norm"),
        *attention_tensors(config),
        *(BlockTensor(f"mlp.{name}_proj.weight", f"mlp/{name}", 1) for name in ("up", "down")),
        *(BlockTensor(f"mlp.act_fn.{theirs}", f"mlp/{ours}_scale") for theirs, ours in NUMBERS.items()),
    ]
    return Layout(lambda kind: tensors)


APERTUS = Family(
    name="apertus",
    architecture="ApertusForCausalLM",
    defaults={key: value for key, value in DENSE_DEFAULTS.items() if key != "hidden_act"}
    | {
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": None,
        "max_position_embeddings": 65_536,
        "attention_bias": False,
    },
    read=_read,
    write=_write,
    layout=_layout,
    neutral={"hidden_act": ("xielu",), "post_norm": (False,)},
)
