"""Architectures whose keys become those of the config.json that they were converted from, which is then read as one.

A `Translation` is data: what HF calls a key, what llama.cpp assumes where a file is silent, and which flags tensors say
by being there. joined.py finds the tensors.

Some of a config is not in these files. Of DeepSeek-V2's choice within groups they have the groups' numbers, not how
groups are ranked: it is the model's own way here. `mscale` of YaRN is taken to be `mscale_all_dim`, as in all released
files of DeepSeek. Falcon-H1's factors are within its weights. Limits of Mamba-2's steps, and the length of rows of
Granite 4 without positions, are left out.

Source: llama.cpp `conversion/base.py` (TextModel), `glm.py`, `minimax.py`, `deepseek.py`, `qwen.py` (Qwen3NextModel),
`granite.py` (GraniteHybridModel), `nemotron.py` (NemotronHModel), `falcon_h1.py`, `exaone.py`, `dots1.py`,
`mistral3.py`, `apertus.py`; `src/models/*.cpp` for what is assumed without a key.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf

from distillcache.models.config import ModelConfig
from distillcache.models.families import config_from_hf
from distillcache.models.families.reading.keys import LINEAR
from distillcache.models.families.reading.kinds import FULL, SLIDING
from distillcache.models.families.reading.values import PARTIAL, rope_to_hf
from distillcache.models.files.gguf.rotation import Tensors, rotation
from distillcache.models.files.gguf.values import NEUTRAL_VALUES, GgufValues
from distillcache.schemas.errors import CheckpointError
from distillcache.schemas.store.path import Location

SOFTMAX, SIGMOID = 1, 2  # of `expert_gating_func`
AHEAD = "nextn_predict_layers"


@dataclass(frozen=True)
class GgufModel:
    """A file's keys and tensors."""

    values: GgufValues
    tensors: Tensors

    @property
    def ahead(self) -> int:
        """Layers of multi-token prediction, which are counted among the blocks, behind the last one."""
        return self.values.size(AHEAD) if self.values.get(AHEAD) else 0

    @property
    def depth(self) -> int:
        """The number of blocks."""
        depth = self.values.size("block_count") - self.ahead
        if depth < 1:
            raise self.values.bad("block_count", depth + self.ahead, f"more than {self.ahead}, of {AHEAD}")
        return depth

    def has(self, ending: str, block: int | None = None) -> bool:
        """Tell whether this block, or any, has a tensor of this name behind the block's."""
        if block is not None:
            return f"blk.{block}.{ending}" in self.tensors
        return any(self.has(ending, each) for each in range(self.depth))

    def size(self, key: str, default: int | None = None) -> int:
        """A size that all blocks have in common that have one; the others have 0."""
        found = self.values.get(key)
        own = set(found) - {0} if isinstance(found, list) else set()
        return own.pop() if len(own) == 1 else self.values.size(key, default)

    def plain(self, key: str) -> Any:
        """A number as HF's config has it, or a flag."""
        found = self.values.get(key)
        return self.values.number(key, 1.0) if isinstance(found, float) else found


def _nothing(model: GgufModel) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Translation:
    """The mapping of one `general.architecture`.

    families: HF's `model_type`, by `expert_gating_func`; None: where the file has no such key.
    keys: HF's by the file's. Those that are neither in the file nor in `assumed` are missing.
    assumed: HF's keys with what llama.cpp computes where nothing else says it.
    said: HF's flags, each with the tensor that says it by being there.
    more: other keys of HF's. reads: keys of the file that `more` reads, or that say nothing.
    latent: attention is latent; else heads have one width, of which a part may rotate.
    """

    families: Mapping[int | None, str]
    keys: Mapping[str, str] = field(default_factory=dict)
    assumed: Mapping[str, Any] = field(default_factory=dict)
    said: Mapping[str, str] = field(default_factory=dict)
    more: Callable[[GgufModel], dict[str, Any]] = _nothing
    reads: frozenset[str] = frozenset()
    latent: bool = False


def translated_config(reader: gguf.GGUFReader, name: str, tensors: Tensors, file: Location) -> ModelConfig:
    """The decoder of a file of this architecture."""
    known = TRANSLATIONS[name]
    own = frozenset({*known.keys, *known.reads, "expert_gating_func", AHEAD})
    values = GgufValues(reader, name, file, own, NEUTRAL_VALUES)
    model = GgufModel(values, tensors)
    scores = values.get("expert_gating_func")
    if scores not in known.families:
        raise values.bad("expert_gating_func", scores, " or ".join(str(each) for each in known.families))
    raw = {
        "model_type": known.families[scores],
        **_common(model, known),
        **known.assumed,
        **{flag: model.has(ending) for flag, ending in known.said.items()},
        **_named(model, known),
        **known.more(model),
    }
    return config_from_hf(raw, file)


def _common(model: GgufModel, known: Translation) -> dict[str, Any]:
    """The keys of every family."""
    values, heads = model.values, model.size("attention.head_count")
    hidden = values.size("embedding_length")
    width = values.size("attention.key_length", max(hidden // heads, 1))
    rope = rope_to_hf(rotation(model.tensors, values, width))
    rotated = {} if known.latent else {**_heads(model, width), PARTIAL: _rotated_part(values, width)}
    vocabulary = model.tensors.get("token_embd.weight")
    inner = model.size("feed_forward_length", values.get("expert_feed_forward_length"))
    return {
        "vocab_size": 0 if vocabulary is None else int(vocabulary[1].shape[-1]),
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": model.depth,
        "num_attention_heads": heads,
        "max_position_embeddings": values.size("context_length"),
        "rms_norm_eps": values.number("attention.layer_norm_rms_epsilon", 1e-5),
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in model.tensors,
        **rotated,
    }


def _heads(model: GgufModel, width: int) -> dict[str, int]:
    if (found := model.values.get("attention.value_length", width)) != width:
        raise model.values.bad("attention.value_length", found, f"{width}, as of keys")
    heads = model.size("attention.head_count")
    return {"num_key_value_heads": model.size("attention.head_count_kv", heads), "head_dim": width}


def _rotated_part(values: GgufValues, width: int) -> float:
    return values.size("rope.dimension_count", width) / width


def _named(model: GgufModel, known: Translation) -> dict[str, Any]:
    found = {theirs: model.plain(ours) for ours, theirs in known.keys.items() if model.values.get(ours) is not None}
    for ours, theirs in known.keys.items():
        if theirs not in found and theirs not in known.assumed:
            raise model.values.bad(ours, None, "a value")
    return found


EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
INNER = {"expert_feed_forward_length": "moe_intermediate_size"}
# As DeepSeek, GLM and those after them have experts.
ROUTED = {
    **INNER,
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_shared_count": "n_shared_experts",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "leading_dense_block_count": "first_k_dense_replace",
}
ROUTING = {"routed_scaling_factor": 1.0, "norm_topk_prob": False, "n_group": 1, "topk_group": 1}
BIAS = {"attention_bias": "attn_q.bias"}
YARN = frozenset(f"rope.scaling.yarn_{key}" for key in ("beta_fast", "beta_slow", "log_multiplier"))
SSM = frozenset(f"ssm.{key}" for key in ("conv_kernel", "group_count", "inner_size", "state_size", "time_step_rank"))
LATENT = frozenset(f"attention.{key}_length_mla" for key in ("key", "value"))


def _latent(model: GgufModel) -> dict[str, Any]:
    """Sizes of latent attention. Files of 2025 and later have those of a head under keys of their own, beside sizes of
    what is cached."""
    values, turned = model.values, model.values.size("rope.dimension_count")
    key, value = (
        values.size(f"attention.{part}_length_mla", values.get(f"attention.{part}_length")) for part in ("key", "value")
    )
    if key <= turned:
        raise values.bad("attention.key_length_mla", key, f"more than {turned}, which is rotated")
    return {
        "qk_nope_head_dim": key - turned,
        "qk_rope_head_dim": turned,
        "v_head_dim": value,
        "head_dim": turned,
        "num_key_value_heads": model.size("attention.head_count"),
        "rope_parameters": _yarn(model),
    }


def _yarn(model: GgufModel) -> dict[str, Any]:
    """Its amplitude is a tenth of `mscale_all_dim` here, times the factor's logarithm."""
    values = model.values
    found = rope_to_hf(rotation(model.tensors, values, values.size("rope.dimension_count")))
    if found["rope_type"] != "yarn":
        return found
    given = [key for key in ("beta_fast", "beta_slow") if values.get(f"rope.scaling.yarn_{key}") is not None]
    betas = {key: values.number(f"rope.scaling.yarn_{key}", 1.0) for key in given}
    if not values.get("rope.scaling.yarn_log_multiplier"):
        return found | betas
    amplitude = round(10 * values.number("rope.scaling.yarn_log_multiplier", 1.0), 6)
    return found | betas | {"mscale": amplitude, "mscale_all_dim": amplitude}


def _deepseek(model: GgufModel) -> dict[str, Any]:
    grouped = model.values.get("expert_group_count", 1) > 1
    if model.values.get("expert_gating_func") != SIGMOID:
        return {**_latent(model), "topk_method": "group_limited_greedy" if grouped else "greedy"}
    return {**_latent(model), AHEAD_IN_HF: model.ahead}


AHEAD_IN_HF = "num_nextn_predict_layers"


def _mixers(model: GgufModel) -> list[str]:
    """Every block's mixer by its tensors, in HF's words."""
    return [LINEAR if model.has("ssm_out.weight", block) else FULL for block in range(model.depth)]


def _head_width(model: GgufModel) -> int:
    """Width of a recurrent block's value heads."""
    values, heads = model.values, model.values.size("ssm.time_step_rank")
    inner = values.size("ssm.inner_size")
    if inner % heads:
        raise values.bad("ssm.inner_size", inner, f"a multiple of {heads}, of ssm.time_step_rank")
    return inner // heads


def _qwen3_next(model: GgufModel) -> dict[str, Any]:
    dense = [block for block in range(model.depth) if not model.has("ffn_gate_inp.weight", block)]
    return {"layer_types": _mixers(model), "linear_value_head_dim": _head_width(model), "mlp_only_layers": dense}


def _granite(model: GgufModel) -> dict[str, Any]:
    """Without a key attention has the usual factor."""
    values, hidden = model.values, model.values.size("embedding_length")
    width = values.size("attention.key_length", hidden // values.size("attention.head_count"))
    if (inner := values.size("ssm.inner_size")) % hidden:
        raise values.bad("ssm.inner_size", inner, f"a multiple of {hidden}, of embedding_length")
    scale = values.number("attention.scale", 1.0) if values.get("attention.scale") else width**-0.5
    shared = values.size("expert_shared_feed_forward_length", model.size("feed_forward_length"))
    return {
        "layer_types": _mixers(model),
        "mamba_d_head": _head_width(model),
        "mamba_expand": inner // hidden,
        "attention_multiplier": scale,
        "position_embedding_type": "rope" if values.get("rope.scaling.finetuned", True) else "nope",
        "shared_intermediate_size": shared,
    }


def _nemotron(model: GgufModel) -> dict[str, Any]:
    """A layer that has none of the tensors of others is attention's, or lacks some."""
    endings = {"ssm_out.weight": LINEAR, "ffn_gate_inp.weight": "moe", "ffn_up.weight": "mlp"}
    layers = [
        next((name for ending, name in endings.items() if model.has(ending, block)), FULL)
        for block in range(model.depth)
    ]
    return {"layers_block_type": layers, "mamba_head_dim": _head_width(model), "time_step_min": 0.0}


def _falcon(model: GgufModel) -> dict[str, Any]:
    if "output.weight" not in model.tensors:
        raise CheckpointError(
            "the GGUF file has tied embeddings, into which llama.cpp multiplies the factor of the input alone",
            {"file": model.values.file, "missing": "output.weight"},
            "use the model's HF directory",
        )
    return {"mamba_d_head": _head_width(model), "mamba_norm_before_gate": False}


def _windows(model: GgufModel) -> dict[str, Any]:
    """`layer_types` by a flag for each block, where the file has them."""
    slides = model.values.get("attention.sliding_window_pattern")
    if not isinstance(slides, list):
        return {"sliding_window": model.values.get("attention.sliding_window")}
    types = [SLIDING if each else FULL for each in slides]
    return {"sliding_window": model.values.get("attention.sliding_window"), "layer_types": types}


MAMBA_KEYS = {
    "ssm.conv_kernel": "mamba_d_conv",
    "ssm.group_count": "mamba_n_groups",
    "ssm.state_size": "mamba_d_state",
    "ssm.time_step_rank": "mamba_n_heads",
}
MAMBA_SAYS = {"mamba_conv_bias": "ssm_conv1d.bias", "mamba_proj_bias": "ssm_in.bias"}
NEMOTRON = Translation(
    {None: "nemotron_h", SIGMOID: "nemotron_h"},
    {
        "ssm.conv_kernel": "conv_kernel",
        "ssm.group_count": "n_groups",
        "ssm.state_size": "ssm_state_size",
        "ssm.time_step_rank": "mamba_num_heads",
    },
    said={"use_conv_bias": "ssm_conv1d.bias", "use_bias": "ssm_in.bias", "mlp_bias": "ffn_up.bias"},
    more=_nemotron,
    # The epsilon that is used stands under the other name as well; nothing rotates.
    reads=frozenset({"ssm.inner_size", "attention.layer_norm_epsilon", "rope.scaling.finetuned"}),
)
OF_EXPERTS = {key: name for key, name in ROUTED.items() if key != "leading_dense_block_count"}
TRANSLATIONS = {
    "glm4": Translation({None: "glm4"}, said=BIAS),
    "minimax-m2": Translation(
        {None: "minimax_m2", SIGMOID: "minimax_m2"},
        {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
        more=lambda model: {"rotary_dim": model.values.get("rope.dimension_count")},
    ),
    "deepseek2": Translation(
        {None: "deepseek_v2", SOFTMAX: "deepseek_v2", SIGMOID: "deepseek_v3"},
        {**ROUTED, "attention.q_lora_rank": "q_lora_rank", "attention.kv_lora_rank": "kv_lora_rank"},
        {**ROUTING, "q_lora_rank": None},
        {"attention_bias": "attn_kv_a_mqa.bias"},
        _deepseek,
        LATENT | YARN,
        latent=True,
    ),
    "qwen3next": Translation(
        {None: "qwen3_next", SOFTMAX: "qwen3_next"},
        {
            **EXPERTS,
            **INNER,
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
            "ssm.conv_kernel": "linear_conv_kernel_dim",
            "ssm.group_count": "linear_num_key_heads",
            "ssm.state_size": "linear_key_head_dim",
            "ssm.time_step_rank": "linear_num_value_heads",
        },
        {"norm_topk_prob": True},
        BIAS,
        _qwen3_next,
        SSM | {"full_attention_interval"},
    ),
    "granitehybrid": Translation(
        {None: "granitemoehybrid", SOFTMAX: "granitemoehybrid"},
        {
            **MAMBA_KEYS,
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        {
            **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling"), 1.0),
            "num_local_experts": 0,
            "num_experts_per_tok": 1,
        },
        {**BIAS, **MAMBA_SAYS},
        _granite,
        SSM | {"attention.scale", "expert_shared_feed_forward_length"},
    ),
    "nemotron_h": NEMOTRON,
    "nemotron_h_moe": Translation(
        NEMOTRON.families,
        {
            **NEMOTRON.keys,
            **OF_EXPERTS,
            "expert_shared_feed_forward_length": "moe_shared_expert_intermediate_size",
            "moe_latent_size": "moe_latent_size",
        },
        {**ROUTING, "moe_latent_size": None, "n_shared_experts": 1},
        NEMOTRON.said,
        _nemotron,
        NEMOTRON.reads,
    ),
    "falcon-h1": Translation(
        {None: "falcon_h1"},
        {**MAMBA_KEYS, "ssm.inner_size": "mamba_d_ssm"},
        {},
        {
            **BIAS,
            **MAMBA_SAYS,
            "mamba_rms_norm": "ssm_norm.weight",
            "projectors_bias": "ssm_out.bias",
            "mlp_bias": "ffn_gate.bias",
        },
        _falcon,
    ),
    "exaone4": Translation(
        {None: "exaone4"},
        more=_windows,
        reads=frozenset({"attention.sliding_window", "attention.sliding_window_pattern"}),
    ),
    "dots1": Translation({None: "dots1", SIGMOID: "dots1"}, ROUTED, {**ROUTING, "sliding_window": None}, BIAS),
    "apertus": Translation({None: "apertus"}, said=BIAS),
}
