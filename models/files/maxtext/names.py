"""MaxText's parameter names, its stacking, and the differences of its numeric conventions from HF's.

A parameter's axes are ours; with `scan_layers` all blocks' are one array, stacked along its second axis. Gemma's are
several: Gemma 2 has one for the blocks with a window and one for the others, Gemma 3 one for each of six blocks that
take turns, and the blocks that are left over at the end one by one.

- Queries of Llama, Mistral, Mixtral and Gemma 2 are multiplied by 1/sqrt(head width), which their attention then leaves
  out (Qwen's and Gemma 3's does not).
- Of Llama 3.1, whose frequencies are scaled, the two numbers that rotate together are neighbours in a head.
- Gemma's norms have the 1 added that HF adds as it computes; its embeddings are multiplied by the root of their width.

Source: AI-Hypercomputer/maxtext src/maxtext/checkpoint_conversion/utils/param_mapping.py (LLAMA31, QWEN3, MIXTRAL,
GEMMA2, GEMMA3: names, `scale_query_layer`, `adjust_rope`, `scale_rmsnorm`, `pad_and_scale_embedding`),
standalone_scripts/llama_or_mistral_ckpt.py there, and src/maxtext/models/qwen2.py (`query_pre_attn_scalar`).
"""

import re
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from distillcache.models.config import BlockKind, ModelConfig
from distillcache.models.files.tensors import BlockTensor, Layout
from distillcache.schemas.errors import CheckpointError

EMBEDDING, HEAD = "token_embedder.embedding", "decoder.logits_dense.kernel"
SCANNED, BLOCK = "decoder.layers.", "decoder.layers_{block}."
EXPERTS = {"mixtral": "MoeBlock_0", "qwen3_moe": "moe_block"}
GEMMAS = frozenset({"gemma2", "gemma3", "gemma3_text"})
FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", *EXPERTS, *GEMMAS})
SCALED_QUERIES = frozenset({"llama", "mistral", "mixtral", "gemma2"})
CYCLE = 6  # blocks that take turns in Gemma 3
NORMS = {
    "attention/norm": "pre_self_attention_layer_norm.scale",
    "mlp/norm": "post_self_attention_layer_norm.scale",
}
GEMMA_NORMS = {
    "attention/norm": "pre_self_attention_norm.scale",
    "attention/post_norm": "post_self_attention_norm.scale",
    "mlp/norm": "pre_ffw_norm.scale",
    "mlp/post_norm": "post_ffw_norm.scale",
}
ROTATED = (".query.", ".query_norm.", ".key.", ".key_norm.")
OF_PAIRS = re.compile(r"decoder\.layers(?:_(\d+))?\.(\w+?)_(local|global)\.(.+)")  # Gemma 2, scanned or not
OF_CYCLES = re.compile(r"decoder\.layers\.layers_(\d+)\.(.+)")
LEFT_OVER = re.compile(r"decoder\.layers_remainder\.layers_(\d+)\.(.+)")


def maxtext_layout(config: ModelConfig) -> Layout:
    """The names of this decoder's parameters, block by block, below the root of MaxText's tree.

    Raises:
        CheckpointError: MaxText's names for this family are not known.
    """
    if config.family not in FAMILIES:
        raise CheckpointError(
            "MaxText's layout of this family is not supported",
            {"family": config.family, "known": ", ".join(sorted(FAMILIES))},
            "convert the checkpoint with MaxText's own to_huggingface.py, and name the HF directory",
        )

    def tensors(kind: BlockKind) -> list[BlockTensor]:
        return [BlockTensor(name, path) for path, name in _block_names(config, kind).items()]

    return Layout(
        tensors,
        embed=EMBEDDING,
        block=BLOCK,
        final_norm="decoder.decoder_norm.scale",
        head=HEAD,
        head_in_axes=None,
        foreign=("vision_encoder.",) if config.family == "gemma3" else (),
    )


def _block_names(config: ModelConfig, kind: BlockKind) -> dict[str, str]:
    """A block's parameters: ours -> MaxText's."""
    names = dict(GEMMA_NORMS if config.family in GEMMAS else NORMS)
    for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
        names[f"attention/{ours}"] = f"self_attention.{theirs}.kernel"
        if config.output_bias if ours == "o" else config.qkv_bias:
            names[f"attention/{ours}_bias"] = f"self_attention.{theirs}.bias"
        if ours in "qk" and config.qk_norm == "head":
            names[f"attention/{ours}_norm"] = f"self_attention.{theirs}_norm.scale"
    matrices = (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo"))
    if kind.moe:
        experts = EXPERTS[config.family]
        names["mlp/router"] = f"{experts}.gate.kernel"
        return names | {f"mlp/{ours}": f"{experts}.{theirs}" for ours, theirs in matrices}
    return names | {f"mlp/{ours}": f"mlp.{theirs}.kernel" for ours, theirs in matrices}


def names_in_stack(name: str, shape: tuple[int, ...], config: ModelConfig) -> list[str] | None:
    """The layout's names of what an array stacks along its second axis; None: it is one parameter."""
    if not name.startswith(SCANNED) or len(shape) < 2:
        return None
    numbers = range(shape[1])
    if config.family == "gemma2" and (found := OF_PAIRS.fullmatch(name)):
        _, part, kind, rest = found.groups()
        return [_of_block(2 * pair + (kind == "global"), f"{part}.{rest}") for pair in numbers]
    if config.family in GEMMAS and (found := OF_CYCLES.fullmatch(name)):
        return [_of_block(CYCLE * number + int(found[1]), found[2]) for number in numbers]
    return [_of_block(number, name.removeprefix(SCANNED)) for number in numbers]


def name_alone(name: str, config: ModelConfig) -> str:
    """The layout's name of an array that is one parameter."""
    if config.family == "gemma2" and (found := OF_PAIRS.fullmatch(name)) and found[1]:
        return _of_block(2 * int(found[1]) + (found[3] == "global"), f"{found[2]}.{found[4]}")
    if config.family in GEMMAS and (found := LEFT_OVER.fullmatch(name)):
        return _of_block(config.num_blocks // CYCLE * CYCLE + int(found[1]), found[2])
    return name


def _of_block(block: int, rest: str) -> str:
    return BLOCK.format(block=block) + rest


@dataclass(frozen=True)
class Conversion:
    """A conversion of numbers from MaxText's convention to HF's, and back.

    head_dim: a head's width. norm_offset: of norms, what was added. embed_scale: of embeddings, their factor.
    """

    scales_queries: bool
    neighbours: bool
    head_dim: int
    norm_offset: float = 0.0
    embed_scale: float = 1.0

    @classmethod
    def of(cls, config: ModelConfig, queries: str = "auto", rotary: str = "auto") -> "Conversion":
        """For a decoder.

        Args:
            queries: `scaled`, `plain`, or as MaxText has this family. rotary: `neighbours`, `halves`, or likewise.
        """
        scaled = queries == "scaled" or (queries == "auto" and config.family in SCALED_QUERIES)
        neighbours = rotary == "neighbours" or (rotary == "auto" and config.rope.kind == "llama3")
        if config.family not in GEMMAS:
            return cls(scaled, neighbours, config.head_dim)
        root = np.float32(config.hidden_size**0.5)
        # As the converters have it.
        rounded = root if config.family == "gemma2" else root.astype(ml_dtypes.bfloat16)
        return cls(scaled, rotary == "neighbours", config.head_dim, 1.0, float(rounded))

    def to_hf(self, name: str, value: np.ndarray) -> np.ndarray:
        """Convert a parameter to HF's convention; its last axis is a whole head if it has heads. Returns float32 if
        it was computed with, to be rounded once.
        """
        if self._is_rotated(name):
            value = np.concatenate([value[..., ::2], value[..., 1::2]], axis=-1)
        if self.norm_offset and name.endswith(".scale"):
            return value.astype(np.float32) - np.float32(self.norm_offset)
        return self._times(name, value, self.head_dim**0.5, 1 / self.embed_scale)

    def from_hf(self, name: str, value: np.ndarray) -> np.ndarray:
        """The reverse, in the dtype that it has."""
        if self._is_rotated(name):
            halves = np.split(value, 2, axis=-1)
            value = np.stack(halves, axis=-1).reshape(value.shape)
        if self.norm_offset and name.endswith(".scale"):
            return (value.astype(np.float32) + np.float32(self.norm_offset)).astype(value.dtype)
        return self._times(name, value, self.head_dim**-0.5, self.embed_scale).astype(value.dtype)

    def _is_rotated(self, name: str) -> bool:
        return self.neighbours and any(part in name for part in ROTATED)

    def _times(self, name: str, value: np.ndarray, of_queries: float, of_embeddings: float) -> np.ndarray:
        if self.scales_queries and ".query." in name:
            return value.astype(np.float32) * np.float32(of_queries)
        if name == EMBEDDING and of_embeddings != 1.0:
            return value.astype(np.float32) * np.float32(of_embeddings)
        return value
