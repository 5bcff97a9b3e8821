"""Architectures whose keys become those of the config.json that they were converted from, which is then read as one.

A `Translation` is data: what HF calls a key, what llama.cpp assumes where a file is silent, and which flags tensors say
by being there. dense.py, mixtures.py and hybrids.py have them, joined.py finds the tensors.

Source: llama.cpp `conversion/base.py` (TextModel).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf

from distillcache.models.config import ModelConfig
from distillcache.models.families import config_from_hf
from distillcache.models.families.reading.values import MOST, PARTIAL, rope_to_hf
from distillcache.models.files.gguf.rotation import Tensors, rotation
from distillcache.models.files.gguf.values import NEUTRAL_VALUES, GgufValues
from distillcache.schemas.store.path import Location

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
        if isinstance(self.values.get(key), list):
            own = set(self.sizes(key)) - {0}
            if len(own) == 1:
                return own.pop()
        return self.values.size(key, default)

    def sizes(self, key: str) -> list[int]:
        """A size of every block, where one for all stands for all."""
        found = self.values.get(key)
        if not isinstance(found, list):
            return [self.values.size(key)] * self.depth
        if not all(isinstance(each, int) and not isinstance(each, bool) and 0 <= each <= MOST for each in found):
            raise self.values.bad(key, found, f"whole numbers from 0 to {MOST}")
        return found

    def width(self) -> int:
        """The width of a head, of queries and keys as of values."""
        hidden, heads = self.values.size("embedding_length"), self.size("attention.head_count")
        width = self.values.size("attention.key_length", max(hidden // heads, 1))
        if (found := self.values.get("attention.value_length", width)) != width:
            raise self.values.bad("attention.value_length", found, f"{width}, as of keys")
        return width

    def rows(self, name: str) -> int:
        """The number of a matrix's rows, 0 where there is none."""
        return int(self.tensors[name][1].shape[-1]) if name in self.tensors else 0

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
    more: other keys of HF's, which go before all the rest. reads: keys of the file that `more` reads, or that say
        nothing.
    """

    families: Mapping[int | None, str]
    keys: Mapping[str, str] = field(default_factory=dict)
    assumed: Mapping[str, Any] = field(default_factory=dict)
    said: Mapping[str, str] = field(default_factory=dict)
    more: Callable[[GgufModel], dict[str, Any]] = _nothing
    reads: frozenset[str] = frozenset()


def translated_config(
    reader: gguf.GGUFReader, name: str, known: Translation, tensors: Tensors, file: Location
) -> ModelConfig:
    """The decoder of a file of this architecture."""
    own = frozenset({*known.keys, *known.reads, "expert_gating_func", AHEAD})
    values = GgufValues(reader, name, file, own, NEUTRAL_VALUES)
    model = GgufModel(values, tensors)
    scores = values.get("expert_gating_func")
    if isinstance(scores, list) or scores not in known.families:
        raise values.bad("expert_gating_func", scores, " or ".join(str(each) for each in known.families))
    more = known.more(model)
    raw = {
        "model_type": known.families[scores],
        **{key: read() for key, read in _common(model).items() if key not in more},
        **known.assumed,
        **{flag: model.has(ending) for flag, ending in known.said.items()},
        **_named(model, known),
        **more,
    }
    return config_from_hf(raw, file)


def _common(model: GgufModel) -> dict[str, Callable[[], Any]]:
    """The keys of every family, each with what reads it."""
    values, tensors = model.values, model.tensors
    heads, width = lambda: model.size("attention.head_count"), model.width
    return {
        "vocab_size": lambda: model.rows("token_embd.weight"),
        "hidden_size": lambda: values.size("embedding_length"),
        "intermediate_size": lambda: model.size("feed_forward_length", values.get("expert_feed_forward_length")),
        "num_hidden_layers": lambda: model.depth,
        "num_attention_heads": heads,
        "num_key_value_heads": lambda: model.size("attention.head_count_kv", heads()),
        "head_dim": width,
        "max_position_embeddings": lambda: values.size("context_length"),
        "rms_norm_eps": lambda: values.number("attention.layer_norm_rms_epsilon", 1e-5),
        "rope_parameters": lambda: rope_keys(model),
        PARTIAL: lambda: values.size("rope.dimension_count", width()) / width(),
        "tie_word_embeddings": lambda: "output.weight" not in tensors,
    }


def rope_keys(model: GgufModel, width: int | None = None) -> dict[str, Any]:
    """`rope_parameters` of heads of which this many numbers are rotated."""
    return rope_to_hf(rotation(model.tensors, model.values, width or model.width()))


def _named(model: GgufModel, known: Translation) -> dict[str, Any]:
    found = {theirs: model.plain(ours) for ours, theirs in known.keys.items() if model.values.get(ours) is not None}
    for ours, theirs in known.keys.items():
        if theirs not in found and theirs not in known.assumed:
            raise model.values.bad(ours, None, "a value")
    return found


SSM = frozenset(f"ssm.{key}" for key in ("conv_kernel", "group_count", "inner_size", "state_size", "time_step_rank"))
BIAS = {"attention_bias": "attn_q.bias"}
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
}
ROUTING = {"routed_scaling_factor": 1.0, "norm_topk_prob": False, "n_group": 1, "topk_group": 1}
