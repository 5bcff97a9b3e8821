"""DeepSeek-V3.2: a DeepSeek-V3 whose queries attend to the keys that an indexer chooses.

Source: HF transformers `configuration_deepseek_v32`, `modeling_deepseek_v32`.
"""

from dataclasses import replace
from typing import Any

from distillcache.models.config import ModelConfig
from distillcache.models.families.deepseek.v3 import DEEPSEEK_V3
from distillcache.models.families.reading.grouped import typed_experts
from distillcache.models.families.reading.latent import indexed_fields, indexed_keys, latent_decoder
from distillcache.models.families.reading.values import Values


def _read(values: Values) -> ModelConfig:
    attention = indexed_fields(values, interleaved=False)
    return latent_decoder(values, typed_experts(values), attention, "deepseek_v32")


def _write(config: ModelConfig) -> dict[str, Any]:
    return indexed_keys(config, interleaved=False)


INDEX_DEFAULTS: dict[str, Any] = {
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
    "layer_types": None,
    "mlp_layer_types": None,
}
DEEPSEEK_V32 = replace(
    DEEPSEEK_V3,
    name="deepseek_v32",
    architecture="DeepseekV32ForCausalLM",
    defaults={key: value for key, value in DEEPSEEK_V3.defaults.items() if key != "rope_interleave"}
    | INDEX_DEFAULTS
    | {"max_position_embeddings": 163_840},
    read=_read,
    write=_write,
    also=(),
    neutral=dict(DEEPSEEK_V3.neutral) | {"rope_interleave": (True,), "indexer_rope_interleave": (False,)},
    aliases=dict(DEEPSEEK_V3.aliases) | {"num_experts": "n_routed_experts"},
)
