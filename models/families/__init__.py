"""Model families: config.json to ModelConfig and back, and tensor names. One module for each.

reading/        shared parts: checked values, known keys, layer kinds
llama.py        Llama, Mistral, Ministral
mistral.py      Mistral with eyes, Ministral 3, Mistral 4
qwen/           Qwen2, Qwen3, Qwen3-VL, Qwen3-Next, Qwen3.5
gemma.py        Gemma, Gemma 2, Gemma 3
gemma4.py       Gemma 4
phi3.py         Phi-3, Phi-4
olmo.py         OLMo 2, OLMo 3, OLMo Hybrid
olmoe.py        OLMoE, FlexOlmo
smollm3.py      SmolLM3
granite.py      Granite, GraniteMoE
mamba/          Granite 4, Nemotron-H, Falcon-H1, Bamba
mixtral.py      Mixtral
lfm2.py         LFM2, LFM2-MoE
gpt_oss.py      gpt-oss
glm/            GLM-4, GLM-4.5, GLM-4.7-Flash, GLM-5
deepseek/       DeepSeek-V2, V3, V3.2, Moonlight, Kimi K2, Kimi K2.5, Kimi Linear
minimax.py      MiniMax M2
bailing_moe.py  Ling, Ring
llama4.py       Llama 4
variants/       Seed-OSS, ERNIE 4.5, Hunyuan, EXAONE 4, Apertus, Command, dots.llm1, Solar Open

Adding a family is a module with a `Family` value, and its name below.
"""

from collections.abc import Mapping
from typing import Any

from distillcache.models.config import ModelConfig, RopeConfig
from distillcache.models.families.bailing_moe import BAILING_MOE, BAILING_MOE_V2
from distillcache.models.families.deepseek.kimi_linear import KIMI_LINEAR
from distillcache.models.families.deepseek.v2 import DEEPSEEK_V2
from distillcache.models.families.deepseek.v3 import DEEPSEEK_V3, KIMI_K25
from distillcache.models.families.deepseek.v32 import DEEPSEEK_V32
from distillcache.models.families.gemma import GEMMA, GEMMA2, GEMMA3, GEMMA3_TEXT
from distillcache.models.families.gemma4 import GEMMA4, GEMMA4_TEXT
from distillcache.models.families.glm.dense import GLM4
from distillcache.models.families.glm.latent import GLM4_MOE_LITE, GLM_MOE_DSA
from distillcache.models.families.glm.moe import GLM4_MOE
from distillcache.models.families.gpt_oss import GPT_OSS
from distillcache.models.families.granite import GRANITE, GRANITEMOE
from distillcache.models.families.lfm2 import LFM2, LFM2_MOE
from distillcache.models.families.llama import LLAMA, MINISTRAL, MISTRAL, exported_family
from distillcache.models.families.llama4 import LLAMA4, LLAMA4_TEXT
from distillcache.models.families.mamba.bamba import BAMBA
from distillcache.models.families.mamba.falcon import FALCON_H1
from distillcache.models.families.mamba.granite import GRANITE_HYBRID
from distillcache.models.families.mamba.nemotron import NEMOTRON_H
from distillcache.models.families.minimax import MINIMAX_M2
from distillcache.models.families.mistral import MINISTRAL3, MISTRAL3, MISTRAL4, text_of
from distillcache.models.families.mixtral import MIXTRAL
from distillcache.models.families.olmo import OLMO2, OLMO3, OLMO_HYBRID
from distillcache.models.families.olmoe import FLEX_OLMO, OLMOE
from distillcache.models.families.phi3 import PHI3, says_heads
from distillcache.models.families.qwen.dense import QWEN2, QWEN3
from distillcache.models.families.qwen.hybrid import QWEN3_5, QWEN3_5_MOE, QWEN3_5_MOE_TEXT, QWEN3_5_TEXT, QWEN3_NEXT
from distillcache.models.families.qwen.moe import QWEN2_MOE, QWEN3_MOE
from distillcache.models.families.qwen.vision import QWEN3_VL, QWEN3_VL_MOE
from distillcache.models.families.reading.family import Family, common_keys
from distillcache.models.families.reading.packing import KEY as PACKING
from distillcache.models.families.reading.packing import check_packing, packing_inside
from distillcache.models.families.reading.values import Values, rope_from_hf
from distillcache.models.families.smollm3 import SMOLLM3
from distillcache.models.families.variants.apertus import APERTUS
from distillcache.models.families.variants.cohere2 import COHERE2
from distillcache.models.families.variants.dots1 import DOTS1
from distillcache.models.families.variants.ernie import ERNIE4_5, ERNIE4_5_MOE
from distillcache.models.families.variants.exaone4 import EXAONE4
from distillcache.models.families.variants.hunyuan import HUNYUAN_DENSE, HUNYUAN_MOE
from distillcache.models.families.variants.seed_oss import SEED_OSS
from distillcache.models.families.variants.solar_open import SOLAR_OPEN
from distillcache.models.files.foreign import packing_key
from distillcache.models.files.tensors import Layout
from distillcache.models.layers.rope import rotated_width
from distillcache.schemas.errors import CheckpointError
from distillcache.schemas.store.path import Location

KNOWN = (
    LLAMA,
    MISTRAL,
    MINISTRAL,
    MINISTRAL3,
    MISTRAL4,
    MISTRAL3,
    QWEN2,
    QWEN3,
    SMOLLM3,
    OLMO2,
    OLMO3,
    OLMO_HYBRID,
    PHI3,
    GRANITE,
    GEMMA,
    GEMMA2,
    GEMMA3_TEXT,
    GEMMA3,
    GEMMA4_TEXT,
    GEMMA4,
    MIXTRAL,
    GRANITEMOE,
    QWEN2_MOE,
    QWEN3_MOE,
    QWEN3_VL,
    QWEN3_VL_MOE,
    QWEN3_NEXT,
    QWEN3_5_TEXT,
    QWEN3_5,
    QWEN3_5_MOE_TEXT,
    QWEN3_5_MOE,
    LFM2,
    LFM2_MOE,
    GRANITE_HYBRID,
    NEMOTRON_H,
    FALCON_H1,
    BAMBA,
    OLMOE,
    LLAMA4_TEXT,
    LLAMA4,
    GLM4,
    GLM4_MOE,
    GLM4_MOE_LITE,
    GLM_MOE_DSA,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    KIMI_K25,
    KIMI_LINEAR,
    DEEPSEEK_V32,
    MINIMAX_M2,
    GPT_OSS,
    BAILING_MOE,
    BAILING_MOE_V2,
    SEED_OSS,
    ERNIE4_5,
    ERNIE4_5_MOE,
    HUNYUAN_DENSE,
    HUNYUAN_MOE,
    EXAONE4,
    APERTUS,
    COHERE2,
    DOTS1,
    SOLAR_OPEN,
    FLEX_OLMO,
)
MOST_EXPERTS = 2**18  # of all blocks; Kimi K2 has 23,040, each with tensors of its own
FAMILIES: dict[str, Family] = {family.name: family for family in KNOWN}
# Vision-language models: the text model that is read and exported; of Mistral 3 the first of several.
LANGUAGE_MODELS = {
    MISTRAL3.name: MISTRAL.name,
    KIMI_K25.name: DEEPSEEK_V3.name,
    LLAMA4.name: LLAMA4_TEXT.name,
    GEMMA3.name: GEMMA3_TEXT.name,
    GEMMA4.name: GEMMA4_TEXT.name,
    QWEN3_VL.name: QWEN3.name,
    QWEN3_VL_MOE.name: QWEN3_MOE.name,
    QWEN3_5.name: QWEN3_5_TEXT.name,
    QWEN3_5_MOE.name: QWEN3_5_MOE_TEXT.name,
}

__all__ = [
    "check_experts",
    "check_heads",
    "config_from_hf",
    "config_to_hf",
    "exported_layout_of",
    "layout_of",
    "rope_from_hf",
]


def config_from_hf(raw: Mapping[str, Any], file: Location) -> ModelConfig:
    """The decoder that a `config.json` describes.

    Args:
        raw: its content.
        file: where it came from, for messages.
    """
    family = _family_of(raw, file)
    if (key := packing_key(raw)) is not None:
        raw = {PACKING: raw[key], **{other: value for other, value in raw.items() if other != key}}
    raw = packing_inside(raw)
    values = Values(raw, family.defaults, file, family.aliases)
    values.check_keys(family.understood | {PACKING}, family.neutral)
    check_packing(values)
    config = family.read(values)
    values.check_stated(config)
    check_heads(config, file)
    check_experts(config, file)
    return config


def _family_of(raw: Mapping[str, Any], file: Location) -> Family:
    name, architectures = raw.get("model_type"), raw.get("architectures")
    known = [family for family in KNOWN if name in (family.name, *family.also)]
    if not known:
        raise CheckpointError(
            "this model_type is not supported",
            {"file": file, "found": name, "supported": ", ".join(FAMILIES)},
            "use a checkpoint of a supported family",
        )
    if len(known) == 1:
        return known[0]
    for family in known:
        if isinstance(architectures, list) and family.architecture in architectures:
            return family
    raise CheckpointError(
        "this model_type has several versions, and architectures names none that is supported",
        {
            "file": file,
            "model_type": name,
            "architectures": architectures,
            "supported": ", ".join(family.architecture for family in known),
        },
        "use a checkpoint of a supported version",
    )


def check_heads(config: ModelConfig, file: Location) -> None:
    """Query heads form equal groups; numbers of a head are rotated in pairs, so its rotated width is even."""
    for kv_heads, _ in map(config.heads_of, config.kinds):
        if config.num_heads % kv_heads:
            raise CheckpointError(
                "the query heads do not divide into the key/value heads",
                {"file": file, "query heads": config.num_heads, "key/value heads": kv_heads},
                "check num_attention_heads and num_key_value_heads",
            )
    width = rotated_width(config.rope, config.rope_dim)
    if config.wide is not None and config.head_dim % 2:
        width = config.head_dim
    if width % 2 or width == 0:
        raise CheckpointError(
            "rotary embedding needs an even head width",
            {"file": file, "found": width},
            "check head_dim, or hidden_size and num_attention_heads",
        )
    if config.rope.kind == "longrope":
        _check_factors(config.rope, width // 2, file)


def _check_factors(rope: RopeConfig, frequencies: int, file: Location) -> None:
    """LongRoPE has a factor for every frequency."""
    counts = {"short_factor": len(rope.short_factor), "long_factor": len(rope.long_factor)}
    if set(counts.values()) != {frequencies}:
        raise CheckpointError(
            "longrope needs one factor for each rotary frequency",
            {"file": file, "frequencies": frequencies, **counts},
            "check rope_scaling, head_dim and partial_rotary_factor",
        )


def check_experts(config: ModelConfig, file: Location) -> None:
    """Check that the groups of experts are equal, and that the kept ones have enough experts for a token."""
    if (moe := config.moe) is None:
        return
    found = {"file": file, "experts": moe.num_experts, "of a token": moe.top_k}
    if moe.num_experts * len(config.moe_blocks) > MOST_EXPERTS:
        raise CheckpointError(
            "the number of experts is impossible",
            found | {"blocks with experts": len(config.moe_blocks), "expected": f"at most {MOST_EXPERTS} in all"},
            "correct the numbers of blocks and experts",
        )
    found |= {"groups": moe.groups, "groups kept": moe.groups_kept} if moe.groups > 1 else {}
    if moe.num_experts % moe.groups or moe.groups_kept > moe.groups:
        raise CheckpointError(
            "the experts do not divide into their groups", found, "check the numbers of experts and groups"
        )
    if moe.top_k > moe.num_experts // moe.groups * moe.groups_kept:
        raise CheckpointError(
            "a token takes more experts than it can choose from", found, "check num_experts_per_tok and the experts"
        )


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of an export.

    Raises:
        CheckpointError: transformers has no config that means this decoder.
    """
    family = FAMILIES[_exported_name(config)]
    return {
        "architectures": [family.architecture],
        "model_type": family.name,
        **{key: value for key, value in common_keys(config, dtype).items() if key not in family.unwritten},
        **family.write(config),
    }


def _exported_name(config: ModelConfig) -> str:
    if config.family == MISTRAL3.name:
        return text_of(config).name
    if config.family in LANGUAGE_MODELS:
        return LANGUAGE_MODELS[config.family]
    if config.family == PHI3.name and not says_heads(config) and config.rope.fraction == 1:
        return MISTRAL.name  # which computes the same, of heads of any width
    return exported_family(config) if config.family in ("llama", "mistral") else config.family


def layout_of(config: ModelConfig) -> Layout:
    """The names of this decoder's tensors in its family's files."""
    return FAMILIES[config.family].layout(config)


def exported_layout_of(config: ModelConfig) -> Layout:
    """The names of this decoder's tensors in an export."""
    return FAMILIES[_exported_name(config)].layout(config)
