"""Tensors of the architectures of translated.py, under HF's names: by the `gguf` package's own table, and made of
several where llama.cpp's converter takes one of HF's apart.

- `kv_b_proj` of latent attention: the part that makes keys, turned, and the part that makes values;
- `in_proj_qkvz` of Qwen3-Next, whose runs of a key head are queries, keys, values and gates: queries, keys and values
  of all heads, and the gates apart;
- gate and up projections of Granite 4, of experts and of the shared MLP;
- gate and up projections of gpt-oss's experts, whose rows take turns, and its matrices, turned;
- the numbers of Apertus's activation, which are metadata.

Source: llama.cpp `conversion/deepseek.py` (DeepseekV2Model), `qwen.py` (Qwen3NextModel), `granite.py`
(GraniteMoeModel), `apertus.py`, `gpt_oss.py`, `gemma.py` (Gemma4Model); `gguf-py/gguf/tensor_mapping.py`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import gguf
import numpy as np

from distillcache.models.config import ModelConfig
from distillcache.models.families import layout_of
from distillcache.models.files.gguf.architectures import TRANSLATIONS
from distillcache.models.files.gguf.file import GgufSource, metadata, open_parts
from distillcache.models.files.tensors import Box, TensorSource
from distillcache.schemas.store.path import Location

Parts = Sequence[np.ndarray]
Shape = tuple[int, ...]


def _matrix(shapes: Sequence[Shape]) -> Shape:
    width = shapes[-1][-1]
    return sum(map(math.prod, shapes)) // width, width


def _runs(shapes: Sequence[Shape]) -> Shape:
    *outer, _, width = shapes[-1]
    return *outer, sum(shape[-2] for shape in shapes), width


def _first(shapes: Sequence[Shape]) -> Shape:
    return shapes[0]


@dataclass(frozen=True)
class Join:
    """One of HF's tensors, made of others.

    parts: their names behind the block's. join: them into it. shape: of it, by theirs. only: the family that has it.
    """

    parts: tuple[str, ...]
    join: Callable[[Parts, ModelConfig], np.ndarray]
    shape: Callable[[Sequence[Shape]], Shape]
    only: str | None = None


def _latent(parts: Parts, config: ModelConfig) -> np.ndarray:
    keys, values = parts
    return np.concatenate([keys.swapaxes(1, 2), values], axis=1).reshape(-1, values.shape[-1])


def _by_key_head(parts: Parts, config: ModelConfig) -> np.ndarray:
    delta, (mixed, gates) = config.delta_config, parts
    keys = delta.key_heads * delta.key_dim
    runs = [*np.split(mixed, [keys, 2 * keys]), gates]
    heads = [run.reshape(delta.key_heads, -1, run.shape[-1]) for run in runs]
    return np.concatenate(heads, axis=1).reshape(-1, gates.shape[-1])


def _behind(parts: Parts, config: ModelConfig) -> np.ndarray:
    return np.concatenate(list(parts), axis=-2)


def _same(parts: Parts, config: ModelConfig) -> np.ndarray:
    return parts[0]


def _turned(parts: Parts, config: ModelConfig) -> np.ndarray:
    return parts[0].swapaxes(-1, -2)


def _turns(parts: Parts, config: ModelConfig) -> np.ndarray:
    """Rows of two take turns."""
    both = np.stack(list(parts), axis=2)
    return both.reshape(both.shape[0], -1, *both.shape[3:]).swapaxes(1, -1)


GATE_UP = ("ffn_gate_exps.weight", "ffn_up_exps.weight")
# By the ending of HF's name.
JOINS: dict[str, tuple[Join, ...]] = {
    "self_attn.kv_b_proj.weight": (Join(("attn_k_b.weight", "attn_v_b.weight"), _latent, _matrix),),
    "linear_attn.in_proj_qkvz.weight": (Join(("attn_qkv.weight", "attn_gate.weight"), _by_key_head, _matrix),),
    "block_sparse_moe.input_linear.weight": (Join(GATE_UP, _behind, _runs),),
    "shared_mlp.input_linear.weight": (
        Join(("ffn_gate_shexp.weight", "ffn_up_shexp.weight"), _behind, _runs),
        Join(("ffn_gate.weight", "ffn_up.weight"), _behind, _runs),
    ),
    "mlp.experts.gate_up_proj": (
        Join(GATE_UP, _turns, lambda shapes: (*_turned_shape(_runs(shapes)),), "gpt_oss"),
        Join(GATE_UP, _behind, _runs, "mistral4"),
    ),
    "mlp.experts.gate_up_proj_bias": (
        Join(("ffn_gate_exps.bias", "ffn_up_exps.bias"), _turns, lambda shapes: (shapes[0][0], 2 * shapes[0][1])),
    ),
    "mlp.experts.down_proj": (
        Join(("ffn_down_exps.weight",), _turned, lambda shapes: _turned_shape(shapes[0]), "gpt_oss"),
    ),
    "experts.gate_up_proj": (Join(GATE_UP, _behind, _runs),),
    "router.scale": (Join(("ffn_gate_inp.scale",), _same, _first),),
    "router.per_expert_scale": (Join(("ffn_down_exps.scale",), _same, _first),),
}


def _turned_shape(shape: Shape) -> Shape:
    return *shape[:-2], shape[-1], shape[-2]


# HF's names of tensors that are metadata, an array with a number for each block.
STATED = {f"mlp.act_fn.{name}": f"xielu.{name}" for name in ("alpha_p", "alpha_n", "beta", "eps")}
SHAPES = {"mlp.act_fn.alpha_p": (1,), "mlp.act_fn.alpha_n": (1,)}  # others are scalars


@dataclass(frozen=True)
class Names:
    """The counterparts of HF's tensors in a file.

    named: HF's names by the file's. joined: HF's names with the parts' names. stated: HF's names with their numbers.
    """

    named: dict[str, str] = field(default_factory=dict)
    joined: dict[str, tuple[Join, tuple[str, ...]]] = field(default_factory=dict)
    stated: dict[str, np.ndarray] = field(default_factory=dict)


def hf_names(reader: gguf.GGUFReader, config: ModelConfig, present: frozenset[str]) -> Names:
    """Find what the decoder's tensors are in a file that has these."""
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[metadata(reader, "general.architecture")]
    table, found = gguf.get_tensor_name_map(arch, config.num_blocks), Names()
    for name, block, suffix in _tensors(config):
        own, numbers = _own_name(name, table, present), metadata(reader, STATED.get(suffix, ""), [])
        join = _join(suffix, block, present, config.family)
        if len(numbers) == config.num_blocks:
            found.stated[name] = np.full(SHAPES.get(suffix, ()), numbers[block], np.float32)
        elif join is not None and (own not in present or len(join.parts) == 1):
            found.joined[name] = join, tuple(f"blk.{block}.{part}" for part in join.parts)
        elif own is not None:
            found.named[own] = name
    for name in (f"{prefix}weight" for prefix in layout_of(config).foreign):  # which the loader then leaves out
        if (own := _own_name(name, table, present)) is not None:
            found.named[own] = name
    return found


def _join(suffix: str, block: int, present: frozenset[str], family: str) -> Join | None:
    """The way to make a tensor of those that are there."""
    for join in JOINS.get(suffix, ()):
        if join.only in (None, family) and present.issuperset(f"blk.{block}.{part}" for part in join.parts):
            return join
    return None


def _tensors(config: ModelConfig) -> Iterator[tuple[str, int, str]]:
    """HF's name of every tensor, with `{e}` for experts; the block and the rest of the name in one, else -1."""
    layout = layout_of(config)
    for name in (layout.embed, layout.final_norm, layout.head, *(name for name, _, _ in layout.more)):
        yield name, -1, ""
    for block, kind in enumerate(config.kinds):
        for suffix in dict.fromkeys(tensor.suffix for tensor in layout.block_tensors(kind)):
            yield layout.block.format(block=block) + suffix, block, suffix


# As the converter spells names before it looks them up.
SPELLINGS = (
    ("e_score_correction_bias", "e_score_correction.bias"),
    ("dt_bias", "dt_proj.bias"),
    ("dt_bias", "dt.bias"),
    ("shared_mlp.output_linear", "mlp.down_proj"),
    ("mixer.experts", "mlp.experts"),
    ("down_proj_bias", "down_proj.bias"),
)


def _own_name(name: str, table: gguf.TensorNameMap, present: frozenset[str]) -> str | None:
    """The name in the file: of several the one that it has."""
    name = name.replace(".{e}", "")
    spelled = [name, f"{name}.weight", *(name.replace(old, new) for old, new in SPELLINGS)]
    spelled += [each.replace("backbone.", "model.") for each in spelled]
    found = [own for own in (table.get_name(each, (".weight", ".bias")) for each in spelled) if own is not None]
    return next((own for own in found if own in present), found[0] if found else None)


class JoinedSource:
    """A source with tensors that are made of others."""

    def __init__(self, source: GgufSource, config: ModelConfig, names: Names) -> None:
        self._source, self._config, self._names = source, config, names
        self.where = source.where
        parts = {part for _, own in names.joined.values() for part in own}
        self.shapes = {name: shape for name, shape in source.shapes.items() if name not in parts}
        self.dtypes = {name: kind for name, kind in source.dtypes.items() if name not in parts}
        for name, (join, own) in names.joined.items():
            self.shapes[name] = join.shape([source.shapes[part] for part in own])
            self.dtypes[name] = source.dtypes[own[0]]
        self.shapes |= {name: numbers.shape for name, numbers in names.stated.items()}
        self.dtypes |= dict.fromkeys(names.stated, "F32")

    def announce(self, reads: Sequence[tuple[str, Box]]) -> None:
        """See `TensorSource`."""
        self._source.announce([(own, box) for name, box in reads for own in self._parts(name)])

    def read(self, name: str, box: Box | None = None) -> np.ndarray:
        """See `TensorSource`. A tensor of several is made as a whole."""
        if name in self._names.stated:
            values = self._names.stated[name]
        elif name in self._names.joined:
            join, own = self._names.joined[name]
            values = join.join([self._source.read(part) for part in own], self._config)
        else:
            return self._source.read(name, box)
        return values if box is None else values[box]

    def close(self) -> None:
        """See `TensorSource`."""
        self._source.close()

    def _parts(self, name: str) -> tuple[str, ...]:
        if name in self._names.stated:
            return ()
        return self._names.joined[name][1] if name in self._names.joined else (name,)


def gguf_source(reader: gguf.GGUFReader, config: ModelConfig, where: Location) -> TensorSource:
    """A file's tensors under HF's names and in HF's layout."""
    if metadata(reader, "general.architecture") not in TRANSLATIONS:
        return GgufSource(reader, config, where)
    present = frozenset(str(tensor.name) for part in open_parts(reader, where) for tensor in part.tensors)
    names = hf_names(reader, config, present)
    return JoinedSource(GgufSource(reader, config, where, names.named), config, names)
