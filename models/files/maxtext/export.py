"""A decoder in MaxText's format: a scanned parameter checkpoint, written by Orbax, with the HF files beside it.

    <out>/items/                              `load_parameters_path` of MaxText, with scan_layers=True
    <out>/config.json, tokenizer.json, ...    of the same model as an HF directory has them

The folder is one that is read again like any checkpoint (checkpoint.py). It is written beside its place and renamed, so
that a killed or failed export leaves nothing there.
"""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from distillcache.models.decoder import Decoder
from distillcache.models.families import config_to_hf
from distillcache.models.files.export import PRODUCER, generation_ids
from distillcache.models.files.identity import CONFIG, locate_checkpoint
from distillcache.models.files.maxtext.checkpoint import ITEMS
from distillcache.models.files.maxtext.names import GEMMAS, SCANNED, Conversion, maxtext_layout
from distillcache.models.files.tensors import TensorSlot, slice_on_host, tensor_slots
from distillcache.models.text.tokenizer import tokenizer_files
from distillcache.schemas.errors import CheckpointError, ConfigError, install_advice
from distillcache.schemas.store.path import local_path
from distillcache.schemas.store.whole_file import staged_folder


def save_maxtext(decoder: Decoder, out: str | os.PathLike[str], *, tokenizer_from: Any = None) -> None:
    """Write the folder. On the host is a copy of the whole model meanwhile.

    Args:
        out: a local folder, new or empty.
        tokenizer_from: as of `save_pretrained`.

    Raises:
        ConfigError: it is in a bucket, or Orbax is not installed.
        CheckpointError: MaxText has no such decoder, or something else is there.
    """
    target = local_path(os.fspath(out), "--out")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(
            "the target of an export exists", {"target": target}, "name another folder, or remove this one"
        )
    config = config_to_hf(decoder.config, str(decoder.embed[...].dtype)) | {"producer": PRODUCER}
    tree = maxtext_tree(decoder)
    with staged_folder(target, "an export cannot be written") as staging:
        _write_orbax(staging / ITEMS[0], tree)
        if tokenizer_from is not None:
            contents, ids = tokenizer_files(locate_checkpoint(tokenizer_from))
            config |= ids | generation_ids(contents, decoder.config.vocab_size)
            for name, content in contents.items():
                (staging / name).write_bytes(content)
        (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def maxtext_tree(decoder: Decoder) -> dict[str, Any]:
    """The parameters as MaxText's converters save them: a train state after no steps, without an optimizer.

    Raises:
        CheckpointError: MaxText has no such decoder, or scans no stack of these blocks.
    """
    layout = maxtext_layout(decoder.config)
    if decoder.config.family in GEMMAS:
        raise CheckpointError(
            "Gemma's several stacks are read, but not written",
            {"family": decoder.config.family},
            "export an HF directory, and convert it with MaxText's own to_maxtext.py",
        )
    parameters = dict(nnx.to_flat_state(nnx.state(decoder, nnx.Param)))
    stacks: dict[str, list[np.ndarray]] = defaultdict(list)
    known = set()
    for slot in tensor_slots(decoder.config, layout):
        if slot.path in parameters and not slot.beside:
            known.add(slot.path)
            stacks[_array_name(slot)].append(slice_on_host(parameters[slot.path].get_value(), slot.index))
    if unknown := ["/".join(map(str, path)) for path in parameters if path not in known]:
        raise CheckpointError(
            "MaxText has no equivalent of some parameters",
            {"family": decoder.config.family, "parameters": ", ".join(unknown[:8])},
            "export an HF directory",
        )
    convert, blocks = Conversion.of(decoder.config), decoder.config.num_blocks
    tree: dict[str, Any] = {}
    for name, values in stacks.items():
        if name.startswith(SCANNED) and len(values) != blocks:
            raise CheckpointError(
                "MaxText scans blocks of one kind only",
                {"parameter": name, "blocks": f"{len(values)} of {blocks}"},
                "export an HF directory",
            )
        value = np.stack(values, axis=1) if name.startswith(SCANNED) else values[0]
        _put(tree, name.split("."), convert.from_hf(name, value))
    return {"step": np.zeros((), np.int32), "params": {"params": tree}, "opt_state": {}}


def _array_name(slot: TensorSlot) -> str:
    """The name with `scan_layers`: one for all blocks."""
    if not slot.name.startswith("decoder.layers_"):
        return slot.name
    return SCANNED + slot.name.split(".", 2)[2]


def _put(tree: dict[str, Any], path: list[str], value: np.ndarray) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def _write_orbax(folder: Path, tree: dict[str, Any]) -> None:
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ConfigError(
            "writing MaxText's checkpoints needs Orbax",
            {"missing": error.name},
            install_advice("maxtext"),
        ) from error
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)) as checkpointer:
        checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(tree))
