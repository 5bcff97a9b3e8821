"""GGUF files of architecture `llama` (Llama, Mistral, SmolLM2, ...), with the numbers that llama.cpp would use.

What llama.cpp's converter does to an HF checkpoint, and what is undone here:

- Q and K rows are permuted within each head, since llama.cpp rotates neighbours (0, 1), (2, 3), ... where HF rotates
  halves (0, hd/2), (1, hd/2 + 1), ...;
- the head is left out where it is tied to the embeddings;
- Llama 3's scaling of the rotary frequencies is stored as divisors in a tensor, `rope_freqs.weight`;
- matrices are quantised in blocks; `gguf.quants` turns them into float32.

Source: llama.cpp `convert_hf_to_gguf.py` (LlamaModel: `permute`, `generate_extra_tensors`) and `llama-arch.cpp`.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.gguf_reader import ReaderTensor
from gguf.quants import dequantize

from models.config import BlockKind, LayerGroup, ModelConfig, RopeConfig
from models.families import check_heads
from models.ranges import SpanReader
from models.remote_gguf import PAST_THE_END, RemoteGguf, damaged, open_remote
from models.rope import base_frequencies, llama3_frequencies
from schemas.errors import CheckpointError
from schemas.object_path import ObjectPath, Place

MAGIC = b"GGUF"

# Keys that say nothing about the forward pass, or repeat what a tensor's shape says.
HARMLESS_KEYS = frozenset({"vocab_size", "rope.scaling.finetuned", "rope.scaling.original_context_length"})
UNDERSTOOD_KEYS = frozenset(
    """attention.head_count attention.head_count_kv attention.key_length attention.layer_norm_rms_epsilon
    attention.value_length block_count context_length embedding_length feed_forward_length rope.dimension_count
    rope.freq_base rope.scale_linear rope.scaling.factor rope.scaling.type""".split()  # noqa: SIM905 - one a line would be half a screen
)
# Keys that would change the forward pass, with the values under which they do not.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "use_parallel_residual": (False,),
}
# Factors of the Llama 3 scaling in use: 8 (Llama 3.1, 3.3) and 32 (Llama 3.2); the other parameters are the same.
LLAMA3_FACTORS = (8.0, 32.0)
LLAMA3_ORIGINAL_POSITIONS = 8192

# GGUF's names of a block's tensors -> HF's.
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ROPE_FREQS = "rope_freqs.weight"


def is_gguf(place: Place) -> bool:
    """Whether a checkpoint is a file rather than a directory: in a bucket its name says so."""
    return place.is_file() if isinstance(place, Path) else place.suffix.lower() == ".gguf"


def open_gguf(path: Place) -> gguf.GGUFReader:
    """The parsed header of a file, with its tensors memory-mapped, or in a bucket to be fetched.

    The last one is kept: parsing the vocabulary of a 135M model takes 3 s, and config, weights and tokenizer are
    asked for one after the other.
    """
    if isinstance(path, ObjectPath):
        magic, generation = path.read_range(0, len(MAGIC))
        if magic is None and not path.exists():
            raise CheckpointError(
                "no such checkpoint", {"path": path}, "check the names of bucket and file; or name an HF directory"
            )
        return _open(path, magic or b"", generation)
    stat = path.stat()
    with path.open("rb") as stream:
        magic = stream.read(len(MAGIC))
    return _open(path.resolve(), magic, (stat.st_mtime_ns, stat.st_size))


@functools.lru_cache(maxsize=1)
def _open(path: Place, magic: bytes, _version: object) -> gguf.GGUFReader:
    if magic != MAGIC:
        raise CheckpointError(
            "this file is not a GGUF file",
            {"file": path, "found": f"it starts with {magic!r}", "expected": f"it starts with {MAGIC!r}"},
            "name a .gguf file, or the directory of an HF checkpoint",
        )
    if isinstance(path, ObjectPath):
        return open_remote(path)
    try:
        return gguf.GGUFReader(path)
    except PAST_THE_END as error:
        raise damaged(path, path.stat().st_size, error) from error


def tensor_data(reader: gguf.GGUFReader, tensor: ReaderTensor, spans: SpanReader | None = None) -> np.ndarray:
    """A tensor as it is stored; of a file in a bucket it is fetched now, or by `spans`."""
    if not isinstance(reader, RemoteGguf):
        return tensor.data
    span = reader.span(tensor)
    stored = spans.read(span) if spans else np.frombuffer(span.file.read(span.start, span.stop), np.uint8)
    return stored.view(tensor.data.dtype).reshape(tensor.data.shape)


def metadata(reader: gguf.GGUFReader, key: str, default: Any = None) -> Any:
    """The value of a metadata key, or `default` where the file has no such key."""
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def config_from_gguf(reader: gguf.GGUFReader, file: Place) -> ModelConfig:
    """The decoder that a GGUF file's metadata describes."""
    family = metadata(reader, "general.architecture")
    if family != "llama":
        raise CheckpointError(
            "this GGUF architecture is not supported",
            {"file": file, "found": family, "supported": "llama"},
            "use a GGUF file of architecture llama, or an HF directory",
        )
    if metadata(reader, "split.count", 1) > 1:
        raise CheckpointError(
            "this GGUF file is one part of a split model",
            {"file": file, "parts": metadata(reader, "split.count")},
            "merge the parts with llama.cpp's `llama-gguf-split --merge`",
        )
    values = _architecture_values(reader, file)
    shapes = {str(tensor.name): tuple(int(size) for size in tensor.shape[::-1]) for tensor in reader.tensors}
    hidden, heads = _size(values, "embedding_length", file), _size(values, "attention.head_count", file)
    config = ModelConfig(
        vocab_size=shapes.get("token_embd.weight", (0,))[0],
        hidden_size=hidden,
        intermediate_size=_size(values, "feed_forward_length", file),
        num_heads=heads,
        num_kv_heads=_size(values, "attention.head_count_kv", file, heads),
        head_dim=_head_dim(values, hidden // heads, file),
        layers=(LayerGroup((BlockKind(),), _size(values, "block_count", file)),),
        rope=_rope(reader, values, hidden // heads, file),
        norm_eps=_short_float(values.get("attention.layer_norm_rms_epsilon", 1e-5)),
        tie_embeddings="output.weight" not in shapes,
        qkv_bias="blk.0.attn_q.bias" in shapes,
        output_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_gate.bias" in shapes,
        max_positions=_size(values, "context_length", file),
    )
    check_heads(config, file)
    return config


def _architecture_values(reader: gguf.GGUFReader, file: Place) -> dict[str, Any]:
    """The `llama.*` keys, each understood, harmless or refused."""
    values = {key.removeprefix("llama."): metadata(reader, key) for key in reader.fields if key.startswith("llama.")}
    for key, value in values.items():
        if key in NEUTRAL_VALUES and value in NEUTRAL_VALUES[key]:
            continue
        if key not in UNDERSTOOD_KEYS | HARMLESS_KEYS:
            raise CheckpointError(
                "the GGUF file has a setting that is not supported, and that may change what the model computes",
                {"file": file, "key": f"llama.{key}", "value": value},
                "use another file, or the model's HF directory",
            )
    return values


def _size(values: Mapping[str, Any], key: str, file: Place, default: int | None = None) -> int:
    value = values.get(key, default)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(
            "the GGUF file has a size that cannot be used",
            {"file": file, "key": f"llama.{key}", "found": value, "expected": "one positive whole number"},
            "use a file whose blocks are all of one size",
        )
    return value


def _short_float(value: float) -> float:
    """The shortest decimal of a float32: 1e-05, not 9.999999747378752e-06, so that an export reads as its source."""
    return float(str(np.float32(value)))


def _head_dim(values: Mapping[str, Any], default: int, file: Place) -> int:
    size = _size(values, "attention.key_length", file, default)
    for key in ("attention.value_length", "rope.dimension_count"):
        if values.get(key, size) != size:
            raise CheckpointError(
                "the GGUF file has heads that are not rotated whole, or whose keys and values differ in width",
                {"file": file, "head width": size, f"llama.{key}": values[key]},
                "use another file",
            )
    return size


def _rope(reader: gguf.GGUFReader, values: Mapping[str, Any], default_dim: int, file: Place) -> RopeConfig:
    """theta and scaling: linear by keys, Llama 3's by its tensor of divisors."""
    theta = _short_float(values.get("rope.freq_base", 10_000.0))
    divisors = next((tensor for tensor in reader.tensors if tensor.name == ROPE_FREQS), None)
    kind = values.get("rope.scaling.type", "linear" if "rope.scale_linear" in values else "none")
    factor = values.get("rope.scaling.factor", values.get("rope.scale_linear", 1.0))
    if kind not in ("none", "linear"):
        raise CheckpointError(
            "the GGUF file has a rotary scaling that is not supported",
            {"file": file, "key": "llama.rope.scaling.type", "found": kind, "supported": "none, linear"},
            "use the model's HF directory",
        )
    if kind == "linear" and factor != 1.0:
        return RopeConfig(theta=theta, kind="linear", factor=_short_float(factor))
    if divisors is None:
        return RopeConfig(theta=theta)
    stored = np.asarray(tensor_data(reader, divisors), np.float32)
    return _llama3_rope(stored, theta, values.get("attention.key_length", default_dim), file)


def _llama3_rope(divisors: np.ndarray, theta: float, head_dim: int, file: Place) -> RopeConfig:
    frequencies = base_frequencies(theta, head_dim)
    for factor in LLAMA3_FACTORS:
        rope = RopeConfig(theta, "llama3", factor, LLAMA3_ORIGINAL_POSITIONS, low_freq_factor=1.0, high_freq_factor=4.0)
        known = frequencies / llama3_frequencies(rope, frequencies)
        # 1e-4: the converter computes these in another order and stores float32.
        if known.shape == divisors.shape and np.allclose(known, divisors, rtol=1e-4):
            return rope
    raise CheckpointError(
        f"the GGUF file scales its rotary frequencies in a way that is not known ({ROPE_FREQS})",
        {
            "file": file,
            "found": f"{divisors.size} divisors from {divisors.min():g} to {divisors.max():g}",
            "known": f"Llama 3's, factors {', '.join(f'{factor:g}' for factor in LLAMA3_FACTORS)}",
        },
        "use the model's HF directory",
    )


class GgufSource:
    """A GGUF file's tensors under HF's names and in HF's layout."""

    def __init__(self, reader: gguf.GGUFReader, config: ModelConfig, where: Place) -> None:
        self.where = where
        self._gguf = reader
        self._spans = SpanReader() if isinstance(reader, RemoteGguf) else None
        self._heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
        self._tensors = {
            hf_name(str(tensor.name)): tensor for tensor in reader.tensors if str(tensor.name) != ROPE_FREQS
        }
        self.shapes = {name: tuple(int(n) for n in tensor.shape[::-1]) for name, tensor in self._tensors.items()}
        self.dtypes = {name: _dtype_name(tensor.tensor_type) for name, tensor in self._tensors.items()}

    def announce(self, names: Sequence[str]) -> None:
        """See `TensorSource`."""
        if self._spans and isinstance(self._gguf, RemoteGguf):
            self._spans.announce([self._gguf.span(self._tensors[name]) for name in names])

    def read(self, name: str) -> np.ndarray:
        """A tensor, out of its quantised blocks."""
        tensor = self._tensors[name]
        stored = tensor_data(self._gguf, tensor, self._spans)
        values = np.asarray(dequantize(stored, tensor.tensor_type)).reshape(self.shapes[name])
        heads = self._heads.get(str(tensor.name).split(".")[-2])
        return values if heads is None else unpermute(values, heads)

    def close(self) -> None:
        """Stop the reader's threads, where there are any."""
        if self._spans:
            self._spans.close()


def hf_name(name: str) -> str:
    """HF's name of a GGUF tensor; a name that we do not know stays, and is then reported as unknown."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in BLOCK_NAMES:
        return f"model.layers.{parts[1]}.{BLOCK_NAMES[parts[2]]}.{parts[3]}"
    return name


def unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of Q or K, from neighbours that rotate together to halves that do: (0, 2, 4, ..., 1, 3, 5, ...) a head."""
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _dtype_name(kind: gguf.GGMLQuantizationType) -> str:
    """As safetensors calls it. Quantised blocks become float32."""
    return kind.name if kind.name in ("F32", "F16", "BF16") else "F32"
