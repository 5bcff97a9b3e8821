"""GGUF files: opened, and their tensors under HF's names and in HF's layout. models/files/gguf/config.py reads the
metadata.

What llama.cpp's converter does to an HF checkpoint, and what is undone here:

- Q and K rows of architecture `llama` are permuted within each head, since llama.cpp rotates neighbours (0, 1), (2, 3),
  ... there, where HF rotates halves (0, hd/2), (1, hd/2 + 1), ...; for Qwen it rotates halves as well;
- the head is left out where it is tied to the embeddings;
- the experts of a block are one tensor;
- matrices are quantised in blocks; `gguf.quants` turns them into float32.

Source: llama.cpp `convert_hf_to_gguf.py` (LlamaModel: `permute`; Qwen2MoeModel: `modify_tensors`) and `llama-arch.cpp`.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf.gguf_reader import ReaderTensor
from gguf.quants import dequantize

from distillcache.models.config import ModelConfig
from distillcache.models.files.foreign import LFS_MAGIC, LFS_STEP, unreadable_weights
from distillcache.models.files.gguf import recurrent
from distillcache.models.files.gguf.reader import DAMAGE, CheckedGguf
from distillcache.models.files.gguf.remote import RemoteGguf, damaged, open_remote
from distillcache.models.files.ranges import Span, SpanReader
from distillcache.models.files.tensors import Box, some
from distillcache.schemas.errors import CheckpointError
from distillcache.schemas.store.path import Location, ObjectPath

MAGIC = b"GGUF"
PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")

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
SHORT_CONV_NAMES = {
    "attn_norm": "operator_norm",
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
    "shortconv.conv": "conv.conv",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
}
QK_NORM_NAMES = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
# Of families that name one of these otherwise, on either side.
OWN_NAMES: dict[str, dict[str, str]] = {
    "seed_oss": {"post_attention_norm": "post_attention_layernorm"},
    "hunyuan_v1_dense": {"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"},
}
# Of families with experts; `{e}` stands for the number of an expert.
EXPERT_NAMES: dict[str, dict[str, str]] = {
    "mixtral": {
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.{e}.w1",
        "ffn_up_exps": "block_sparse_moe.experts.{e}.w3",
        "ffn_down_exps": "block_sparse_moe.experts.{e}.w2",
    },
    "qwen2_moe": {
        "ffn_gate_inp": "mlp.gate",
        "ffn_gate_exps": "mlp.experts.{e}.gate_proj",
        "ffn_up_exps": "mlp.experts.{e}.up_proj",
        "ffn_down_exps": "mlp.experts.{e}.down_proj",
        "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
        "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
        "ffn_up_shexp": "mlp.shared_expert.up_proj",
        "ffn_down_shexp": "mlp.shared_expert.down_proj",
    },
}
EXPERT_NAMES["qwen3_5_moe_text"] = EXPERT_NAMES["qwen2_moe"]
EXPERT_NAMES["qwen3_moe"] = {key: name for key, name in EXPERT_NAMES["qwen2_moe"].items() if "shexp" not in key}
EXPERT_NAMES["granitemoe"] = EXPERT_NAMES["mixtral"]
EXPERT_NAMES["lfm2_moe"] = {
    "ffn_gate_inp": "feed_forward.gate",
    "ffn_gate_exps": "feed_forward.experts.{e}.w1",
    "ffn_up_exps": "feed_forward.experts.{e}.w3",
    "ffn_down_exps": "feed_forward.experts.{e}.w2",
    "exp_probs_b.bias": "feed_forward.expert_bias",
}
# Names behind a block's number that HF has without an ending.
WHOLE_NAMES = (*recurrent.WHOLE_NAMES, "exp_probs_b.bias")
# Families whose Q and K rows are; also of those that do not rotate.
PERMUTED = ("llama", "mixtral", "ministral3", "granite", "granitemoe", "granitemoehybrid", "nemotron_h", "smollm3")
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "token_embd_norm.weight": "model.embedding_norm.weight",
    "output.weight": "lm_head.weight",
}
ROPE_FREQS = "rope_freqs.weight"
# Tensors that the config is read from.
ROTATIONS = (ROPE_FREQS, "rope_factors_long.weight", "rope_factors_short.weight")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32


def _list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(isinstance(each, kind) for each in value)


TEXT = ("a string", lambda value: isinstance(value, str))
WHOLE = ("a whole number from 0", _whole)
SWITCH = ("true or false", lambda value: isinstance(value, bool))
TEXTS = ("an array of strings", _list_of(str))
# Keys that are read whatever the architecture, and their types: what is expected, and a test of it.
METADATA_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "general.architecture": TEXT,
    "split.count": WHOLE,
    "split.no": WHOLE,
    "tokenizer.chat_template": TEXT,
    "tokenizer.ggml.add_bos_token": SWITCH,
    "tokenizer.ggml.add_eos_token": SWITCH,
    "tokenizer.ggml.add_space_prefix": SWITCH,
    "tokenizer.ggml.merges": TEXTS,
    "tokenizer.ggml.model": TEXT,
    "tokenizer.ggml.pre": TEXT,
    "tokenizer.ggml.scores": (
        "an array of numbers",
        lambda value: _list_of(float)(value) and all(each == each for each in value),
    ),
    "tokenizer.ggml.token_type": ("an array of whole numbers", _list_of(int)),
    "tokenizer.ggml.tokens": TEXTS,
} | {f"xielu.{name}": ("an array of numbers", _list_of(float)) for name in ("alpha_p", "alpha_n", "beta", "eps")}


def is_gguf(place: Location) -> bool:
    """Return whether a checkpoint is a GGUF file rather than a directory; in a bucket this follows from its name."""
    return place.is_file() if isinstance(place, Path) else place.suffix.lower() == ".gguf"


def open_gguf(path: Location) -> gguf.GGUFReader:
    """The parsed header of a file, with its tensors memory-mapped, or in a bucket to be fetched.

    The last one is kept: parsing the vocabulary of a 135M model takes 3 s, and config, weights and tokenizer are
    requested one after the other.
    """
    return _open(*_version(path))


def part_files(path: Location) -> list[Location]:
    """The files of a model of which this is the first, by its name: `...-00001-of-00003.gguf`; else the file alone."""
    match = PART_NAME.fullmatch(path.name)
    if match is None or int(match[2]) != 1:
        return [path]
    return [path.parent / f"{match[1]}-{number:05}-of-{match[3]}.gguf" for number in range(1, int(match[3]) + 1)]


def open_parts(reader: gguf.GGUFReader, path: Location) -> list[gguf.GGUFReader]:
    """The headers of all files of a model, of which the first is open.

    Raises:
        CheckpointError: it is not the first, or they are not all there.
    """
    files, count = part_files(path), max(metadata(reader, "split.count", 1), 1)
    missing = [file.name for file in files[1:] if not file.exists()]
    match = PART_NAME.fullmatch(path.name)
    if match is not None and int(match[2]) != 1:
        first = path.parent / f"{match[1]}-00001-of-{match[3]}.gguf"
        raise CheckpointError(
            "this GGUF file is a later part of a split model",
            {"file": path, "found": f"part {int(match[2])} of {int(match[3])}"},
            f"name the first part, {first.name}"
            + ("" if first.exists() else ", and put it and the others beside this"),
        )
    if count != len(files) or missing:
        raise CheckpointError(
            "this GGUF file is one part of a split model, whose other parts are not found by its name",
            {
                "file": path,
                "parts": count,
                "missing": some(missing) if missing else f"a name ...-00001-of-{count:05}.gguf",
            },
            "name the first part, under the name that it was made with, and put the others beside it",
        )
    readers = [reader, *(_open.__wrapped__(*_version(file)) for file in files[1:])]
    for number, (file, each) in enumerate(zip(files, readers, strict=True)):
        found = (metadata(each, "split.no", 0), max(metadata(each, "split.count", 1), 1))
        if found != (number, count):
            raise CheckpointError(
                "a part of a split GGUF model is not what its name says",
                {"file": file, "found": f"part {found[0]} of {found[1]}", "expected": f"part {number} of {count}"},
                "copy the parts again",
            )
    return readers


def _version(path: Location) -> tuple[Location, bytes, object]:
    """A file with its first bytes and what tells whether it was replaced."""
    if isinstance(path, ObjectPath):
        magic, generation = path.read_range(0, len(MAGIC))
        if magic is None and not path.exists():
            raise CheckpointError(
                "no such checkpoint", {"path": path}, "check the names of bucket and file; or name an HF directory"
            )
        return path, magic or b"", generation
    try:
        stat = path.stat()
        with path.open("rb") as stream:
            magic = stream.read(len(MAGIC))
    except OSError as error:
        raise unreadable_weights(path, error) from error
    return path.resolve(), magic, (stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1)
def _open(path: Location, magic: bytes, _version: object) -> gguf.GGUFReader:
    if magic != MAGIC:
        pointer = LFS_MAGIC.startswith(magic)
        raise CheckpointError(
            "this file is not a GGUF file",
            {"file": path, "found": f"it starts with {magic!r}", "expected": f"it starts with {MAGIC!r}"},
            LFS_STEP if pointer and magic else "name a .gguf file, or the directory of an HF checkpoint",
        )
    if isinstance(path, ObjectPath):
        return open_remote(path)
    try:
        return CheckedGguf(path)
    except DAMAGE as error:
        raise damaged(path, path.stat().st_size, error) from error


def tensor_data(
    reader: gguf.GGUFReader, tensor: ReaderTensor, spans: SpanReader | None = None, expert: int | None = None
) -> np.ndarray:
    """A tensor as it is stored, or of one with experts those of one; in a bucket it is fetched now, or by `spans`."""
    if not isinstance(reader, RemoteGguf):
        return tensor.data if expert is None else tensor.data[expert]
    span, shape = _span(reader, tensor, expert), tensor.data.shape
    stored = spans.read(span) if spans else np.frombuffer(span.file.read(span.start, span.stop), np.uint8)
    return stored.view(tensor.data.dtype).reshape(shape if expert is None else shape[1:])


def _span(reader: RemoteGguf, tensor: ReaderTensor, expert: int | None) -> Span:
    """Return the byte range of a tensor, or of one of its experts, which are its first axis."""
    span = reader.span(tensor)
    if expert is None:
        return span
    size = span.size // len(tensor.data)
    return Span(span.file, span.start + expert * size, span.start + (expert + 1) * size)


def metadata(reader: gguf.GGUFReader, key: str, default: Any = None) -> Any:
    """The value of a metadata key, or `default` where the file has no such key.

    Raises:
        CheckpointError: it is of another type than the key has, or no UTF-8.
    """
    field = reader.fields.get(key)
    if field is None:
        return default
    try:
        value = field.contents()
    except DAMAGE as error:
        raise _bad_metadata(reader, key, str(error)[:200], "strings in UTF-8") from error
    expected, fits = METADATA_TYPES.get(key, ("", lambda _: True))
    if not fits(value):
        raise _bad_metadata(reader, key, repr(value)[:120], expected)
    return value


def _bad_metadata(reader: gguf.GGUFReader, key: str, found: str, expected: str) -> CheckpointError:
    place = reader.file.path if isinstance(reader, RemoteGguf) else getattr(reader.data, "filename", None)
    return CheckpointError(
        "the metadata of a GGUF file cannot be read",
        {"file": place, "key": key, "found": found, "expected": expected},
        "copy or download the file again, or use the model's HF directory",
    )


class StoredTensor(NamedTuple):
    """The location of an HF tensor in a file. expert: the index of the part that it is; None if it is all of the
    stored tensor.
    """

    reader: gguf.GGUFReader
    tensor: ReaderTensor
    shape: tuple[int, ...]
    expert: int | None = None


class GgufSource:
    """A GGUF file's tensors under HF's names and in HF's layout."""

    def __init__(
        self, reader: gguf.GGUFReader, config: ModelConfig, where: Location, names: Mapping[str, str] | None = None
    ) -> None:
        """names: HF's of the file's tensors; None: by the tables of this module."""
        self.where = where
        self._tensors = stored_tensors(open_parts(reader, where), config, names)
        self._spans = SpanReader() if isinstance(reader, RemoteGguf) else None
        permuted = config.family in PERMUTED
        self._delta = config.delta if names is None else None
        self._offset = config.norm_product == "offset"
        self._heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if permuted else {}
        self.shapes = {name: stored.shape for name, stored in self._tensors.items()}
        self.dtypes = {name: _dtype_name(stored.tensor.tensor_type) for name, stored in self._tensors.items()}

    def announce(self, reads: Sequence[tuple[str, Box]]) -> None:
        """See `TensorSource`."""
        if self._spans:
            self._spans.announce(
                _span(stored.reader, stored.tensor, stored.expert)
                for stored in (self._tensors[name] for name, _ in reads)
                if isinstance(stored.reader, RemoteGguf)
            )

    def read(self, name: str, box: Box | None = None) -> np.ndarray:
        """A tensor, out of its quantised blocks, or a part of it: all of it is fetched and dequantised then too."""
        stored = self._tensors[name]
        values = self._dequantised(stored).reshape(stored.shape)
        heads = self._heads.get(str(stored.tensor.name).split(".")[-2])
        values = values if heads is None else unpermute(values, heads)
        if name.endswith("A_log"):  # files have the rates of decay themselves, negative
            with np.errstate(all="ignore"):  # what is not finite is found by whoever loads it
                values = np.log(-values)
        values = values if self._delta is None else recurrent.as_in_hf(name, values, self._delta)
        # Where norms add one, files hold the sum; the norm behind the delta rule never adds it.
        if self._offset and name.endswith("norm.weight") and not name.endswith(recurrent.RULE_NORM):
            values = values.astype(np.float32) - np.float32(1)
        return values if box is None else values[box]

    def close(self) -> None:
        """Stop the reader's threads, where there are any."""
        if self._spans:
            self._spans.close()

    def _dequantised(self, stored: StoredTensor) -> np.ndarray:
        reader, tensor, _, expert = stored
        try:
            return np.asarray(dequantize(tensor_data(reader, tensor, self._spans, expert), tensor.tensor_type))
        except NotImplementedError as error:
            raise CheckpointError(
                "the GGUF file has a tensor of a type that the gguf package does not dequantise",
                {"file": self.where, "tensor": tensor.name, "type": tensor.tensor_type.name},
                "use a file in another quantisation, or the model's HF directory",
            ) from error


def stored_tensors(
    readers: Sequence[gguf.GGUFReader], config: ModelConfig, names: Mapping[str, str] | None = None
) -> dict[str, StoredTensor]:
    """Every tensor of HF's that the files hold, by name; one that we do not know has the file's own name.

    Args:
        names: see `GgufSource`.
    """
    of_blocks = _block_names(config)
    architecture = metadata(readers[0], "general.architecture")
    ahead = metadata(readers[0], f"{architecture}.nextn_predict_layers", 0)
    left_out = tuple(f"blk.{config.num_blocks + layer}." for layer in range(ahead))
    found: dict[str, StoredTensor] = {}
    for reader, tensor in ((part, tensor) for part in readers for tensor in part.tensors):
        own = str(tensor.name)
        if own.startswith(left_out) or own in ROTATIONS:
            continue
        name = hf_name(own, of_blocks) if names is None else names.get(own, own)
        shape = tuple(int(size) for size in tensor.shape[::-1])
        if "{e}" in name:
            found |= {name.format(e=at): StoredTensor(reader, tensor, shape[1:], at) for at in range(shape[0])}
        else:
            found[name] = StoredTensor(reader, tensor, _hf_shape(name, shape))
    return found


def _block_names(config: ModelConfig) -> dict[str, str]:
    names = {**BLOCK_NAMES, **OWN_NAMES.get(config.family, {}), **EXPERT_NAMES.get(config.family, {})}
    names |= QK_NORM_NAMES if config.qk_norm == "head" else {}
    names |= SHORT_CONV_NAMES if config.short_conv is not None else {}
    return names | ({**recurrent.NAMES, **recurrent.WHOLE_NAMES} if config.delta is not None else {})


# Of Mamba-2, which files have with an axis of one entry, or the norm with one of groups.
FLAT = ("A_log", ".D", "mamba.norm.weight", "mixer.norm.weight")
ROWS = ("shared_expert_gate.weight", "moe_statics.e_score_correction_bias")  # of one, stored as a vector
CONVOLUTIONS = (recurrent.CONVOLUTION, "conv.conv.weight", "conv1d.weight")


def _hf_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in HF's files of a tensor that has this one here."""
    if name.endswith(ROWS) and len(shape) == 1:
        return (1, *shape)
    if name.endswith(CONVOLUTIONS):
        return (math.prod(shape[:-1]), 1, shape[-1])
    if name.endswith("self_attn.A_log"):  # of Kimi Linear
        return (1, 1, math.prod(shape), 1)
    return (math.prod(shape),) if name.endswith(FLAT) else shape


def hf_name(name: str, of_blocks: Mapping[str, str]) -> str:
    """HF's name of a GGUF tensor; a name that we do not know stays, and is then reported as unknown."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    parts = name.split(".")
    if parts[0] == "blk" and (tail := ".".join(parts[2:])) in of_blocks and tail in WHOLE_NAMES:
        return f"model.layers.{parts[1]}.{of_blocks[tail]}"
    if len(parts) >= 4 and parts[0] == "blk" and (stem := ".".join(parts[2:-1])) in of_blocks:
        return f"model.layers.{parts[1]}.{of_blocks[stem]}.{parts[-1]}"
    return name


def unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of Q or K, from neighbours that rotate together to halves that do: (0, 2, 4, ..., 1, 3, 5, ...) a head."""
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _dtype_name(kind: gguf.GGMLQuantizationType) -> str:
    """As safetensors calls it. Quantised blocks become float32."""
    return kind.name if kind.name in ("F32", "F16", "BF16") else "F32"
