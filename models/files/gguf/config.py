"""The decoder that a GGUF file's metadata describes, with the numbers that llama.cpp would use.

An architecture's keys are a closed list, see values.py. The architectures of this module are those near to Llama;
translated.py has the others, whose keys become those of a config.json. What the metadata leaves out, tensors say:
biases by being there, a tied head by being absent, Llama 3's scaling of the rotary frequencies by its divisors,
`rope_freqs.weight`.

Source: llama.cpp `convert_hf_to_gguf.py` (LlamaModel, Ministral3Model, GemmaModel, GraniteModel, GraniteMoeModel,
LFM2Model, LFM2MoeModel, Qwen2Model, Qwen2MoeModel, Qwen3Model, Qwen3MoeModel, SeedOssModel, Ernie4_5Model,
HunYuanModel), `llama-model.cpp` (what is assumed without a key, and what is fixed: activations, how experts are
weighed).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import gguf

from distillcache.models.config import (
    BlockKind,
    DeltaConfig,
    LayerGroup,
    ModelConfig,
    MoeConfig,
    ShortConvConfig,
    TemperatureConfig,
    plan_layers,
)
from distillcache.models.families import check_experts, check_heads, layout_of
from distillcache.models.families.lfm2 import SUM_EPS
from distillcache.models.files.gguf.architectures import TRANSLATIONS
from distillcache.models.files.gguf.file import metadata, open_parts
from distillcache.models.files.gguf.rotation import Tensors, rotation
from distillcache.models.files.gguf.translated import translated_config
from distillcache.models.files.gguf.values import NEUTRAL_VALUES, SIGMOID, GgufValues
from distillcache.models.files.tensors import Layout
from distillcache.schemas.errors import CheckpointError
from distillcache.schemas.store.path import Location


@dataclass(frozen=True)
class Architecture:
    """The mapping of one `general.architecture`.

    dense, sparse: the HF family of its files without and with experts; None: it has no such files.
    renormalise: the chosen experts' weights are divided by their sum.
    hybrid: some blocks have the gated delta rule, and others gated attention that rotates a part of its heads.
    growing: queries may grow with positions. gemma: norms, embeddings and activation are Gemma's.
    scaled: Granite's multipliers may be there. short_conv: some blocks have a gated short convolution.
    harmless: more keys that say nothing of text. interleaved: heads rotate neighbours in HF's files as well. fixed:
        fields of the config that no key says.
    """

    dense: str | None
    sparse: str | None = None
    renormalise: bool = True
    qk_norm: bool = False
    hybrid: bool = False
    growing: bool = False
    gemma: bool = False
    scaled: bool = False
    short_conv: bool = False
    harmless: frozenset[str] = frozenset()
    interleaved: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)


# Positions of three axes, which are one for text, and blocks to which pictures are added.
OF_PICTURES = frozenset({"rope.dimension_sections", "n_deepstack_layers"})
ARCHITECTURES = {
    "llama": Architecture("llama", "mixtral"),
    "mistral3": Architecture("ministral3", growing=True),
    "gemma": Architecture("gemma", gemma=True),
    "granite": Architecture("granite", scaled=True),
    "granitemoe": Architecture(None, "granitemoe", scaled=True),
    "lfm2": Architecture("lfm2", qk_norm=True, short_conv=True),
    "lfm2moe": Architecture(None, "lfm2_moe", qk_norm=True, short_conv=True),
    "seed_oss": Architecture("seed_oss"),
    "ernie4_5": Architecture("ernie4_5", interleaved=True),
    "hunyuan-dense": Architecture("hunyuan_v1_dense", fixed={"qk_norm": "turned"}),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", qk_norm=True),
    "qwen2moe": Architecture(None, "qwen2_moe", renormalise=False),
    "qwen3moe": Architecture(None, "qwen3_moe", qk_norm=True),
    "qwen3vl": Architecture("qwen3", qk_norm=True, harmless=OF_PICTURES),
    "qwen3vlmoe": Architecture(None, "qwen3_moe", qk_norm=True, harmless=OF_PICTURES),
    "qwen35": Architecture("qwen3_5_text", qk_norm=True, hybrid=True, harmless=OF_PICTURES),
    "qwen35moe": Architecture(None, "qwen3_5_moe_text", qk_norm=True, hybrid=True, harmless=OF_PICTURES),
}
# Families whose experts have a shared one, behind a gate.
SHARING = ("qwen2_moe", "qwen3_5_moe_text")
# Of hybrids, beside the keys of all. Which blocks have attention, tensors say.
HYBRID_KEYS = frozenset(
    """full_attention_interval nextn_predict_layers ssm.conv_kernel ssm.group_count ssm.inner_size ssm.state_size
    ssm.time_step_rank""".split()  # noqa: SIM905 - as below
)
# Of architectures whose queries may grow.
GROWING_KEYS = frozenset(
    {"attention.temperature_scale"}
    | {f"rope.scaling.yarn_{key}" for key in ("beta_fast", "beta_slow", "log_multiplier")}
)
SCALE_KEYS = frozenset({"attention.scale", "embedding_scale", "residual_scale", "logit_scale"})
SHORT_CONV_KEYS = frozenset({"expert_gating_func", "leading_dense_block_count", "shortconv.l_cache"})


def config_from_gguf(reader: gguf.GGUFReader, file: Location) -> ModelConfig:
    """The decoder that a GGUF file's metadata and tensors describe."""
    parts = open_parts(reader, file)  # first: of a model in parts the first one alone has more metadata
    name = metadata(reader, "general.architecture")
    if name not in (*ARCHITECTURES, *TRANSLATIONS):
        raise CheckpointError(
            "this GGUF architecture is not supported",
            {"file": file, "found": name, "supported": ", ".join((*ARCHITECTURES, *TRANSLATIONS))},
            "use a GGUF file of a supported architecture, or an HF directory",
        )
    tensors = {str(tensor.name): (part, tensor) for part in parts for tensor in part.tensors}
    if name in TRANSLATIONS:
        return translated_config(reader, name, TRANSLATIONS[name], tensors, file)
    known = ARCHITECTURES[name]
    values = GgufValues(reader, name, file, _own_keys(known), NEUTRAL_VALUES)
    if values.get("expert_weights_norm") not in (None, known.renormalise):
        values.refuse("expert_weights_norm", values.get("expert_weights_norm"))
    config = _config(tensors, values, known)
    check_heads(config, file)
    check_experts(config, file)
    return config


def _own_keys(known: Architecture) -> frozenset[str]:
    own = [(known.hybrid, HYBRID_KEYS), (known.growing, GROWING_KEYS)]
    own += [(known.scaled, SCALE_KEYS), (known.short_conv, SHORT_CONV_KEYS)]
    return known.harmless.union(*(keys for has, keys in own if has))


# Families whose experts are one by one here, under another family's names, and stored together in HF's files.
NAMED_AS = {"granitemoe": "mixtral"}


def gguf_layout(config: ModelConfig) -> Layout:
    """HF's names of the tensors that `GgufSource` gives."""
    return layout_of(replace(config, family=NAMED_AS.get(config.family, config.family)))


def _config(tensors: Tensors, values: GgufValues, known: Architecture) -> ModelConfig:
    """The decoder, of any architecture."""
    config = replace(_plain_config(tensors, values, known), **known.fixed)
    if known.interleaved:
        config = replace(config, rope=replace(config.rope, interleaved=True))
    if known.growing:
        config = _growing(config, values)
    if known.gemma:
        config = replace(
            config,
            norm_product="offset",
            activation="gelu_tanh",
            embed_scale=config.hidden_size**0.5,
            embed_scale_rounded=True,
        )
    if known.scaled:
        config = _scaled(config, values)
    if known.short_conv:
        config = _with_convolutions(config, tensors, values)
    return _as_hybrid(config, tensors, values) if known.hybrid else config


def _scaled(config: ModelConfig, values: GgufValues) -> ModelConfig:
    """The same with Granite's multipliers; without the one of attention it has the usual factor."""
    own = None if values.get("attention.scale") is None else values.number("attention.scale", 1.0)
    return replace(
        config,
        attention_scale=own,
        embed_scale=values.number("embedding_scale", 1.0),
        residual_scale=values.number("residual_scale", 1.0),
        logits_divisor=values.number("logit_scale", 1.0),
    )


def _with_convolutions(config: ModelConfig, tensors: Tensors, values: GgufValues) -> ModelConfig:
    """The same with the mixers that the blocks' tensors say, and experts behind dense blocks, as LFM2 has them."""
    depth, moe = values.size("block_count"), config.moe
    dense = values.size("leading_dense_block_count") if values.get("leading_dense_block_count") else 0
    if moe is not None:
        if values.get("expert_gating_func") != SIGMOID:
            raise values.bad("expert_gating_func", values.get("expert_gating_func"), f"{SIGMOID}, a sigmoid")
        biased = any(name.endswith(".exp_probs_b.bias") for name in tensors)
        moe = replace(moe, scores="sigmoid", bias=biased, native_bias=True, sum_eps=SUM_EPS)
    kinds = [
        BlockKind(
            mixer="short_conv" if f"blk.{block}.shortconv.conv.weight" in tensors else "attention",
            moe=moe is not None and block >= dense,
        )
        for block in range(depth)
    ]
    conv = ShortConvConfig(config.hidden_size, values.size("shortconv.l_cache"))
    return replace(config, layers=plan_layers(kinds), moe=moe, short_conv=conv)


def _growing(config: ModelConfig, values: GgufValues) -> ModelConfig:
    """The same with queries that grow with positions, from the length on that YaRN scales from, and YaRN as Mistral
    has it: amplitudes by a logarithm times `log_multiplier`, over one times 1."""
    rope, scale = config.rope, values.get("attention.temperature_scale", 0)
    if rope.kind == "yarn":
        beta = {
            key: values.number(f"rope.scaling.yarn_{key}", getattr(rope, key)) for key in ("beta_fast", "beta_slow")
        }
        times = values.get("rope.scaling.yarn_log_multiplier", 0)
        shared = (
            {"mscale": 1.0, "mscale_all_dim": values.number("rope.scaling.yarn_log_multiplier", 1.0)} if times else {}
        )
        rope = replace(rope, **beta, **shared)
    if not scale:
        return replace(config, rope=rope)
    floor = values.size("rope.scaling.original_context_length", config.max_positions)
    scale = values.number("attention.temperature_scale", 1.0)
    return replace(config, rope=rope, temperature=TemperatureConfig(scale, float(floor), first=0, everywhere=True))


def _as_hybrid(config: ModelConfig, tensors: Tensors, values: GgufValues) -> ModelConfig:
    """The same with the mixers that the blocks' tensors say, and the sizes of the recurrent ones.

    Layers of multi-token prediction are counted among the blocks, behind the last one.
    """
    ahead = values.size("nextn_predict_layers") if values.get("nextn_predict_layers") else 0
    depth = values.size("block_count") - ahead
    moe = config.moe is not None
    recurrent = [f"blk.{block}.ssm_out.weight" in tensors for block in range(depth)]
    heads, keys = values.size("ssm.time_step_rank"), values.size("ssm.group_count")
    inner = values.size("ssm.inner_size")
    if depth < 1 or heads % keys or inner % heads:
        raise CheckpointError(
            "the GGUF file has sizes of recurrent blocks that do not divide",
            {"file": values.file, "blocks": depth, "value heads": heads, "key heads": keys, "their width": inner},
            "copy or download the file again, or use the model's HF directory",
        )
    kinds = [BlockKind(mixer="gated_delta" if each else "attention", moe=moe) for each in recurrent]
    biased = {part: any(name.endswith(f".attn_{part}.bias") for name in tensors) for part in ("q", "output")}
    return replace(
        config,
        layers=plan_layers(kinds),
        qkv_bias=biased["q"],
        output_bias=biased["output"],
        rope=replace(config.rope, fraction=values.size("rope.dimension_count", config.head_dim) / config.head_dim),
        norm_product="offset",
        output_gate=True,
        delta=DeltaConfig(keys, heads, values.size("ssm.state_size"), inner // heads, values.size("ssm.conv_kernel")),
        mtp_layers=ahead,
    )


def _plain_config(tensors: Tensors, values: GgufValues, known: Architecture) -> ModelConfig:
    hidden, heads = values.size("embedding_length"), values.size("attention.head_count")
    moe = _moe(values, known)
    return ModelConfig(
        vocab_size=int(tensors["token_embd.weight"][1].shape[-1]) if "token_embd.weight" in tensors else 0,
        hidden_size=hidden,
        intermediate_size=values.size("feed_forward_length") if moe is None else _inner(values),
        num_heads=heads,
        num_kv_heads=_kv_heads(values, known, heads),
        head_dim=_head_dim(values, hidden // heads, partial=known.hybrid),
        layers=(LayerGroup((BlockKind(moe=moe is not None),), values.size("block_count")),),
        rope=rotation(tensors, values, hidden // heads),
        norm_eps=values.number("attention.layer_norm_rms_epsilon", 1e-5),
        tie_embeddings="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        qk_norm="head" if known.qk_norm else "none",
        moe=moe,
        max_positions=values.size("context_length"),
        family=_family(values, known, moe),
    )


def _kv_heads(values: GgufValues, known: Architecture, heads: int) -> int:
    """Key and value heads of the blocks that have some: with convolutions there is a number for each block, or 0."""
    found = values.get("attention.head_count_kv", heads)
    if known.short_conv and isinstance(found, list) and len(own := set(found) - {0}) == 1:
        return own.pop()
    return values.size("attention.head_count_kv", heads)


def _family(values: GgufValues, known: Architecture, moe: MoeConfig | None) -> str:
    found = known.dense if moe is None else known.sparse
    if found is None:
        raise CheckpointError(
            "the GGUF file has experts where its architecture has none, or none where it has",
            {"file": values.file, "architecture": values.name, values.key("expert_count"): values.get("expert_count")},
            "use another file, or the model's HF directory",
        )
    return found


def _moe(values: GgufValues, known: Architecture) -> MoeConfig | None:
    """Every block's experts. Their width is that of dense MLPs where no key says another."""
    if not values.get("expert_count", 0):
        return None
    shared = values.size("expert_shared_feed_forward_length", _inner(values)) if known.sparse in SHARING else 0
    return MoeConfig(
        num_experts=values.size("expert_count"),
        top_k=values.size("expert_used_count"),
        expert_size=values.size("expert_feed_forward_length", _inner(values)),
        shared_size=shared,
        shared_gate=shared > 0,
        renormalise=known.renormalise,
    )


def _inner(values: GgufValues) -> int:
    """Width of dense MLPs, where a file with experts has it."""
    return values.size("feed_forward_length", values.get("expert_feed_forward_length"))


def _head_dim(values: GgufValues, default: int, *, partial: bool = False) -> int:
    """partial: heads may be rotated in part."""
    size = values.size("attention.key_length", default)
    for key in ("attention.value_length", *(() if partial else ("rope.dimension_count",))):
        if values.get(key, size) != size:
            raise CheckpointError(
                "the GGUF file has partially rotated heads, or keys and values of different width",
                {"file": values.file, "head width": size, values.key(key): values.get(key)},
                "use another file",
            )
    return size
