"""Checkpoints in: an HF directory or a GGUF file, on a local disk or in a bucket, becomes a `Decoder`.

Loading never builds a decoder twice: its shape comes from `abstract_decoder`, and each stacked parameter is filled
tensor by tensor and then handed over, so that the peak of host memory is the result plus about one stacked parameter.

Nothing is guessed. Every tensor of the checkpoint has a place, every parameter is filled, or the load fails with the
list of those that do not fit.
"""

import os
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from distillcache.models.config import BlockKind, ModelConfig
from distillcache.models.decoder import Decoder, abstract_decoder
from distillcache.models.families import config_from_hf, layout_of
from distillcache.models.families.reading.packing import packing_inside
from distillcache.models.files.export import SOURCE_DTYPE
from distillcache.models.files.export import save_pretrained as save_pretrained
from distillcache.models.files.fill import ParameterFill, plan_fill
from distillcache.models.files.foreign import step_for_names
from distillcache.models.files.gguf.config import config_from_gguf, gguf_layout
from distillcache.models.files.gguf.file import is_gguf, open_gguf
from distillcache.models.files.gguf.joined import gguf_source
from distillcache.models.files.hf import SafetensorsSource, read_json
from distillcache.models.files.identity import CONFIG, locate_checkpoint
from distillcache.models.files.identity import weights_digest as weights_digest
from distillcache.models.files.maxtext.checkpoint import MaxtextSource, find_maxtext
from distillcache.models.files.maxtext.names import maxtext_layout
from distillcache.models.files.packed import unpacked, without_padding
from distillcache.models.files.runs import RunCheckpoint, TrainedParameters, check_student, find_run, hf_folder
from distillcache.models.files.tensors import FLOAT32, ROUTER_BIAS_FILE, Layout, TensorSource, some, tensor_slots
from distillcache.models.head import OutputHead, head_of
from distillcache.schemas.errors import CheckpointError
from distillcache.schemas.store.path import Location, ObjectPath

FLOAT_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ROWS_COMPARED = 4096  # of a vocabulary, at once: some 64 MB
# Buffers that old versions of transformers stored beside the weights; computed from the config, never trained.
HARMLESS_SUFFIXES = (".rotary_emb.inv_freq",)


def load_pretrained(
    path: str | os.PathLike[str] | ObjectPath, dtype: jnp.dtype | str | None = None, mesh: Mesh | None = None
) -> Decoder:
    """The decoder of a checkpoint.

    Args:
        path: an HF directory (config.json and safetensors), a folder with MaxText's checkpoint
        (files/maxtext/checkpoint.py), a run of
            the trainer's or one of its checkpoints (files/runs.py), or a .gguf file: a local path or a URL.
        dtype: of the parameters. None: the narrowest that holds all the checkpoint's tensors without rounding;
            a quantised GGUF gives float32.
        mesh: where its parameters are put (mesh/sharding.py); a process loads what its own devices hold, and of a
        tensor of
            which they hold nothing it reads nothing. None: one device.
    """
    where = locate_checkpoint(path)
    run = _run_of(where)
    folder = where if run is None else run.student
    if mesh is None or not mesh.is_multi_process or jax.process_index() == 0:  # one of them reads every byte
        check_student(folder)
    config, source, layout = _open(folder)
    try:
        own = jnp.dtype(dtype) if dtype is not None else _own_dtype(source, config, layout)
        return fill_decoder(config, source, own, mesh, layout, None if run is None else run.open())
    finally:
        source.close()


def load_head(path: str | os.PathLike[str] | ObjectPath, dtype: jnp.dtype | str) -> OutputHead:
    """The last norm and LM head of a checkpoint, on the host; no other weights are read.

    Args:
        path, dtype: as of `load_pretrained`.
    """
    where = locate_checkpoint(path)
    run = _run_of(where)
    config, source, layout = _open(where if run is None else run.student)
    try:
        trained = None if run is None else run.open()
        names = ("final_norm", "embed" if config.tie_embeddings else "head")
        _, source, fills = _planned_fills(config, source, jnp.dtype(dtype), None, layout, trained, names)
        return head_of(config, {path[0]: np.asarray(fill.load(source)) for path, _, fill in fills})
    finally:
        source.close()


def _open(where: Location) -> tuple[ModelConfig, TensorSource, Layout]:
    """A checkpoint, and the names that it has for a decoder's parameters."""
    if is_gguf(where):
        reader = open_gguf(where)
        config = config_from_gguf(reader, where)
        return config, gguf_source(reader, config, where), gguf_layout(config)
    config = _config_of_directory(where)
    if (found := find_maxtext(where)) is not None:
        return config, MaxtextSource(found, config), maxtext_layout(config)
    return config, open_tensors(where, config), layout_of(config)


def open_tensors(directory: Location, config: ModelConfig) -> TensorSource:
    """The tensors of an HF directory, under the names of the config's family and unpacked. Close it after use."""
    packing = packing_inside(read_json(directory / CONFIG)).get("quantization_config")
    source = SafetensorsSource(directory)
    try:
        return unpacked(source, layout_of(config), packing)
    except CheckpointError:
        source.close()
        raise


def read_config(path: str | os.PathLike[str] | ObjectPath) -> ModelConfig:
    """Return the config that `load_pretrained` would build, without reading weights."""
    where = locate_checkpoint(path)
    return config_from_gguf(open_gguf(where), where) if is_gguf(where) else _config_of_directory(hf_folder(where))


def checkpoint_dtype(path: str | os.PathLike[str] | ObjectPath) -> str:
    """Name the dtype of a checkpoint: that of its tensors; of packed weights, which are codes,
    the one that config.json names. A run's is that of the checkpoint that its student was made of."""
    where = locate_checkpoint(path)
    if is_gguf(where):
        config, source, layout = _open(where)
    else:
        folder = hf_folder(where)
        stated = read_json(folder / CONFIG)
        named = stated.get("dtype") or stated.get("torch_dtype")
        if folder != where or stated.get(SOURCE_DTYPE) in FLOAT_DTYPES.values():
            return source_dtype(folder)
        if packing_inside(stated).get("quantization_config") is not None and named in FLOAT_DTYPES.values():
            return str(named)
        config, source, layout = _open(folder)
    try:
        return str(_own_dtype(source, config, layout))
    finally:
        source.close()


def source_dtype(folder: Location) -> str:
    """Read which dtype a run's student folder notes; float32 where a version before this wrote it."""
    check_student(folder, whole=False)
    found = read_json(folder / CONFIG).get(SOURCE_DTYPE)
    return str(found) if found in FLOAT_DTYPES.values() else "float32"


def _run_of(where: Location) -> RunCheckpoint | None:
    return None if is_gguf(where) else find_run(where)


def _config_of_directory(directory: Location) -> ModelConfig:
    """Read config.json, with router biases if a file of them is beside it."""
    config = config_from_hf(read_json(directory / CONFIG), directory / CONFIG)
    if not (directory / ROUTER_BIAS_FILE).exists():
        return config
    if config.moe is None or config.moe.native_bias:
        raise CheckpointError(
            "router biases are stored beside a checkpoint that cannot use them",
            {"file": directory / ROUTER_BIAS_FILE, "family": config.family},
            "remove the file",
        )
    return replace(config, moe=replace(config.moe, bias=True))


def fill_decoder(
    config: ModelConfig,
    source: TensorSource,
    dtype: jnp.dtype,
    mesh: Mesh | None = None,
    layout: Layout | None = None,
    trained: TrainedParameters | None = None,
) -> Decoder:
    """A decoder with the parameters of `source`, one stacked parameter at a time.

    Args:
        layout: the source's names; None: those of the config's family.
        trained: parameters that are taken from here instead.
    """
    graph, source, fills = _planned_fills(config, source, dtype, mesh, layout, trained)
    filled = [(path, value.replace(fill.load(source))) for path, value, fill in fills]
    return nnx.merge(graph, nnx.from_flat_state(filled))


# Fields of a config that change nothing of what a decoder, or one kind of sublayer, computes.
NO_PART = ("family", "vocab_size", "attention", "experts", "mtp_layers")
_OUTSIDE = ("tie_embeddings", "norm_head", "embed_scale", "embed_scale_rounded", "logits_divisor", "logits_softcap")
OF_OTHERS: dict[str, tuple[str, ...]] = {
    "all": (),
    "attention": (*_OUTSIDE, "intermediate_size", "activation", "mlp_gated", "mlp_bias", "moe"),
    "mlp": (
        *_OUTSIDE,
        *("num_heads", "num_kv_heads", "head_dim", "rope", "local_rope", "qkv_bias", "output_bias", "qk_norm"),
        *("clip_qkv", "temperature", "attention_scale", "attention_softcap", "sinks", "latent", "output_gate", "delta"),
        *("short_conv", "mamba", "wide", "value_norm", "block_inputs"),
    ),
}


def is_same_model(
    path: str | os.PathLike[str] | ObjectPath, decoder: Decoder, part: Literal["all", "attention", "mlp"] = "all"
) -> bool:
    """True where a checkpoint is this very decoder: it computes the same with parameters equal to the bit.

    Rows of the vocabulary that only one of them has do not count. One stacked parameter is loaded at a time, up to the
    first that differs, in the decoder's dtype.

    Args:
        part: compare this sublayer of every block alone, given the same stream.
    """
    where = locate_checkpoint(path)
    run = _run_of(where)
    folder = where if run is None else run.student
    check_student(folder)
    config, source, layout = _open(folder)
    try:
        here = decoder.config
        stored = {name: getattr(here, name) for name in (*NO_PART, *OF_OTHERS[part])}
        if part == "attention" and _without_experts(config) == _without_experts(here):
            stored["layers"] = here.layers
        if replace(config, **stored) != here:
            return False
        flat = {path: value.get_value() for path, value in nnx.to_flat_state(nnx.state(decoder, nnx.Param))}
        trained = None if run is None else run.open()
        _, source, fills = _planned_fills(config, source, jnp.dtype(decoder.dtype), None, layout, trained)
        if part != "all":
            flat = {path: value for path, value in flat.items() if part in path}
            fills = [each for each in fills if part in each[0]]
        return len(flat) == len(fills) and all(
            path in flat and _equal(fill.load(source), flat[path]) for path, _, fill in fills
        )
    finally:
        source.close()


def _without_experts(config: ModelConfig) -> list[tuple[list[BlockKind], int]]:
    """The layers, whatever their MLPs are."""
    return [([replace(kind, moe=False) for kind in group.pattern], group.repeats) for group in config.layers]


def _equal(left: jax.Array, right: jax.Array) -> bool:
    both = tuple(slice(0, min(sizes)) for sizes in zip(left.shape, right.shape, strict=True))
    return bool(jnp.array_equal(left[both], right[both]))


def _planned_fills(
    config: ModelConfig,
    source: TensorSource,
    dtype: jnp.dtype,
    mesh: Mesh | None,
    layout: Layout | None,
    trained: TrainedParameters | None,
    wanted: Collection[str] | None = None,
) -> tuple[nnx.GraphDef[Decoder], TensorSource, list[tuple[Any, Any, ParameterFill]]]:
    """The structure of a decoder, the source without rows of padding, and of every parameter its path, an abstract
    value and how it is filled.

    Args:
        wanted: of these parameters alone, by the first name of their paths; None: of all.
    """
    layout = _tied_layout(config, source, layout or layout_of(config))
    source = without_padding(source, layout, config)
    graph, abstract = abstract_decoder(config, dtype)
    parameters = dict(nnx.to_flat_state(abstract))
    slots = defaultdict(list)
    for slot in tensor_slots(config, layout):
        slots[slot.path].append(slot)
    shapes = {path: value.shape for path, value in parameters.items()}
    _check_tensors(config, layout, source, shapes, slots)
    fills = [
        (path, value, plan_fill(path, value, slots[path], mesh, trained))
        for path, value in parameters.items()
        if wanted is None or path[0] in wanted
    ]
    source.announce([(read.slot.name, read.box) for _, _, fill in fills for read in fill.reads])
    return graph, source, fills


def _tied_layout(config: ModelConfig, source: TensorSource, layout: Layout) -> Layout:
    """Read a tied embedding under the head's name where files store that one alone: safetensors' `save_model` keeps
    one name of tensors that share their memory."""
    alone = layout.head in source.shapes and layout.embed not in source.shapes
    return (
        replace(layout, embed=layout.head) if config.tie_embeddings and alone and layout.head_in_axes == 1 else layout
    )


def _check_tensors(
    config: ModelConfig, layout: Layout, source: TensorSource, shapes: dict[Any, Any], slots: dict[Any, Any]
) -> None:
    if set(shapes) != set(slots):
        raise ValueError(f"tensor_slots does not cover the decoder: {set(shapes) ^ set(slots)}")
    expected: dict[str, tuple[int, ...]] = {}
    for path, group in slots.items():
        for slot in group:
            expected[slot.name] = slot.stored_shape(shapes[path][len(slot.index) :])
    found = {name: shape for name, shape in source.shapes.items() if not _is_foreign(name, layout)}
    if config.tie_embeddings and layout.head in found and layout.embed in found and layout.head != layout.embed:
        _check_tied(source, layout)
        del found[layout.head]
    facts = {
        "missing": [name for name in expected if name not in found],
        "unknown": [name for name in found if name not in expected],
        "shape": [
            f"{name} is {list(found[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    }
    no_head = facts["missing"] == [layout.head] and not facts["unknown"]
    step = step_for_names(facts["missing"], facts["unknown"])
    facts = {label: some(names) for label, names in facts.items() if names}
    if facts:
        raise CheckpointError(
            "the checkpoint's tensors are not those of its config",
            {"checkpoint": source.where, **facts},
            "set tie_word_embeddings to true in config.json if the embeddings are the head; else copy the missing file"
            if no_head
            else step
            or _step_for_rows(config, found.get(layout.embed, ()))
            or "check that config.json belongs to these weights, and that they are a whole causal language model",
        )
    _own_dtype(source, config, layout)


def _step_for_rows(config: ModelConfig, embedding: tuple[int, ...]) -> str | None:
    """Name the next step where the embedding has fewer rows than the config has ids, and is else as expected."""
    if len(embedding) != 2 or embedding[0] >= config.vocab_size or embedding[1] != config.hidden_size:
        return None
    return (
        f"set vocab_size to {embedding[0]} in config.json if all ids of the tokenizer are below that; "
        "else copy the config.json and the weights of one checkpoint"
    )


def _is_foreign(name: str, layout: Layout) -> bool:
    return name.endswith(HARMLESS_SUFFIXES) or name.startswith(layout.foreign)


def _check_tied(source: TensorSource, layout: Layout) -> None:
    """Some files store the tied head as well; it is left out only if it is the embedding."""
    shape = source.shapes[layout.head]
    same = shape == source.shapes[layout.embed]
    for row in range(0, shape[0] if same else 0, ROWS_COMPARED):
        box = (slice(row, min(row + ROWS_COMPARED, shape[0])), slice(0, shape[1]))
        same = same and np.array_equal(source.read(layout.head, box), source.read(layout.embed, box))
    if not same:
        raise CheckpointError(
            f"tie_word_embeddings is true, but {layout.head} differs from the embeddings",
            {"checkpoint": source.where},
            "set tie_word_embeddings to false in config.json if the head is a matrix of its own",
        )


def _step_for_dtypes(found: Iterable[str]) -> str:
    if set(found) <= {"F64", "I64"}:  # which no quantised weights are stored in
        return "save it again in float32 or a narrower float: with transformers, model.to(dtype).save_pretrained(DIR)"
    return "use a checkpoint that is not quantised, or a .gguf file"


def _own_dtype(source: TensorSource, config: ModelConfig, layout: Layout) -> jnp.dtype:
    """The narrowest dtype that holds every tensor exactly; float16 beside bfloat16 gives float32.

    What is float32 here whatever the dtype (`FLOAT32`: biases of routers, rates of decay) does not count: many files
    have it as float32 beside bfloat16.
    """
    wide = {slot.name for slot in tensor_slots(config, layout) if slot.path[-1] in FLOAT32}
    kinds = {name: kind for name, kind in source.dtypes.items() if not _is_foreign(name, layout)}
    foreign = {kind: name for name, kind in kinds.items() if kind not in FLOAT_DTYPES}
    if foreign:
        raise CheckpointError(
            "the checkpoint has tensors of a dtype that is not supported",
            {
                "checkpoint": source.where,
                "found": some([f"{kind} ({name})" for kind, name in foreign.items()]),
                "expected": ", ".join(FLOAT_DTYPES),
            },
            _step_for_dtypes(foreign),
        )
    dtypes = {FLOAT_DTYPES[kind] for name, kind in kinds.items() if name not in wide}
    return jnp.result_type(*(jnp.dtype(dtype) for dtype in dtypes or {"float32"}))
