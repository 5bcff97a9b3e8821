"""Adapters out: a run's adapters become a folder that `peft` loads, beside the model that they belong to.

    <out>/adapter_config.json         which modules have one, its rank and factor, and where the model is
    <out>/adapter_model.safetensors   `base_model.model.<module>.lora_A.weight` [rank, in], `lora_B.weight` [out, rank]
    <out>/base/                       the model, an HF directory: the student as it was before its first step

Where a family stores several matrices as one tensor (queries, keys and values), their adapters become one of that
tensor: the As under each other, the Bs in blocks, and a rank of its own.

Source: peft 0.21, `LoraConfig`, and what its `save_pretrained` writes.
"""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from distillcache.models.adapters import adapted_matrices, is_adapter
from distillcache.models.decoder import Decoder
from distillcache.models.families import exported_layout_of
from distillcache.models.files.export import (
    ADAPTER_FILES,
    BASE,
    ExportFile,
    export_files,
    json_file,
    weight_file,
    write_export,
)
from distillcache.models.files.runs import TrainedParameters
from distillcache.models.files.safetensors import TensorToWrite
from distillcache.models.files.tensors import TensorSlot, some, tensor_slots
from distillcache.schemas.errors import CheckpointError
from distillcache.schemas.store.path import ObjectPath, locate

PROJECTOR = "projector"
WEIGHT = ".weight"


def save_adapter(
    trained: TrainedParameters,
    base: Decoder,
    path: str | os.PathLike[str] | ObjectPath,
    *,
    tokenizer_from: Any = None,
    dtype: str = "float32",
) -> None:
    """Write a checkpoint's adapters for peft, with the model that they belong to in `base`.

    Args:
        base: the run's student before its first step, in the dtype to store.
        path, tokenizer_from: as of `save_pretrained`. dtype: of the adapters.

    Raises:
        CheckpointError: the checkpoint has none, or trained more than adapters; a tensor that peft cannot adapt.
    """
    _check_adapters_alone(trained)
    target = locate(path)
    where = str(target / BASE) if isinstance(target, ObjectPath) else str((target / BASE).resolve())

    def files() -> list[ExportFile]:
        modules = _modules(trained, base)
        tensors = {
            f"base_model.model.{module}.lora_{side}{WEIGHT}": _to_write(value.astype(np.dtype(dtype)))
            for module, pair in modules.items()
            for side, value in zip("AB", pair, strict=True)
        }
        inside = [ExportFile(f"{BASE}/{file.name}", file.write) for file in export_files(base, tokenizer_from)]
        config = _peft_config(trained, modules, base, where)
        return [*inside, weight_file(ADAPTER_FILES[0], tensors), json_file(ADAPTER_FILES[1], config)]

    write_export(target, files)


def _check_adapters_alone(trained: TrainedParameters) -> None:
    own = {name for name in trained.names if f"/{PROJECTOR}/" not in name}  # no part of any export
    if not any(map(is_adapter, own)):
        raise CheckpointError(
            "the run trained no adapters",
            {"checkpoint": trained.where},
            "export it without --adapter; adapters are trained with student.lora",
        )
    if more := sorted(name for name in own if not is_adapter(name)):
        raise CheckpointError(
            "the run changed more than its adapters",
            {"checkpoint": trained.where, "changed": some(more)},
            "export the merged weights, without --adapter",
        )


def _modules(trained: TrainedParameters, base: Decoder) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A `[rank, in]` and B `[out, rank]` of every module that has an adapter, in the order of the blocks."""
    stacks = {matrix: trained.adapter(matrix) for matrix in adapted_matrices(sorted(trained.names))}
    slots: dict[str, list[TensorSlot]] = defaultdict(list)
    for slot in tensor_slots(base.config, exported_layout_of(base.config)):
        if stacks.get("/".join(map(str, slot.path))) is not None:
            slots[slot.name].append(slot)
    found = {}
    for name, parts in slots.items():
        axes = [slot.part.axis for slot in parts if slot.part is not None]
        if any(slot.in_axes is None for slot in parts) or any(axes) or not name.endswith(WEIGHT):
            raise CheckpointError(
                "an adapter of this tensor has no form that peft reads",
                {"tensor": name, "family": base.config.family},
                "export the merged weights, without --adapter",
            )
        pairs = []
        for slot in parts:
            a, b = stacks["/".join(map(str, slot.path))] or (None, None)
            pairs.append((slot, a[slot.index].T, b[slot.index].T))  # type: ignore[index]
        found[name.removesuffix(WEIGHT)] = _joined(pairs)
    return found


def _joined(pairs: Sequence[tuple[TensorSlot, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The adapter of a tensor, of those of its parts: A under A, and each B in its rows and in columns of its own."""
    first = pairs[0][0].part
    if first is None:
        return pairs[0][1:]
    rank = pairs[0][1].shape[0]
    b = np.zeros((first.total, rank * len(pairs)), np.float32)
    for number, (slot, _, own) in enumerate(pairs):
        if slot.part is not None:
            b[slot.part.entries[0], number * rank : (number + 1) * rank] = own
    return np.concatenate([a for _, a, _ in pairs]), b


def _to_write(value: np.ndarray) -> TensorToWrite:
    return TensorToWrite(value.dtype, value.shape, partial(np.ascontiguousarray, value))


def _peft_config(
    trained: TrainedParameters, modules: Mapping[str, tuple[np.ndarray, np.ndarray]], base: Decoder, where: str
) -> dict[str, Any]:
    names = _shortened(list(modules), base)
    matrix = adapted_matrices(sorted(trained.names))[0]
    rank = (trained.adapter(matrix) or modules[next(iter(modules))])[0].shape[-1]
    wider = {names[module]: len(a) for module, (a, _) in modules.items() if len(a) != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": where,
        "r": rank,
        "lora_alpha": trained.alpha,
        "target_modules": list(dict.fromkeys(names.values())),
        "rank_pattern": wider,
        "alpha_pattern": {name: trained.alpha * (own / rank) for name, own in wider.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }


def _shortened(modules: Sequence[str], base: Decoder) -> dict[str, str]:
    """Each module as the config names it: by its last name, where no other module has that name, else in full."""
    slots = tensor_slots(base.config, exported_layout_of(base.config))
    others = {slot.name.removesuffix(WEIGHT).split(".")[-1] for slot in slots if _module(slot) not in set(modules)}
    return {module: module if (last := module.split(".")[-1]) in others else last for module in modules}


def _module(slot: TensorSlot) -> str:
    return slot.name.removesuffix(WEIGHT)
