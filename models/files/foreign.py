"""Paths that hold something other than a readable checkpoint: detection, and the step that helps.

Hub cache: `models--owner--name/{blobs,refs,snapshots/<commit>}` (huggingface_hub). LoRA: `adapter_config.json` beside
`adapter_model.safetensors` (peft). Git LFS: a pointer of three lines in place of a file's bytes. Mistral's own
format: `params.json` and `consolidated*.safetensors`. Quantised weights: `quantization_config` in config.json
(transformers), `quantization` (MLX).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distillcache.schemas.counted import counted
from distillcache.schemas.errors import CheckpointError
from distillcache.schemas.store.path import Location, ObjectPath

LFS_MAGIC = b"version https://git-lfs.github.com/spec/"
LFS_STEP = "this is a Git LFS pointer, not the file: run `git lfs pull` in the clone, or download the files themselves"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")  # without an owner: gpt2
SHARD_NAME = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
MOST_SHARDS = 10_000  # that are looked for by number
# quant_method -> what it is, for a message.
METHODS = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "fp8": "FP8",
    "fbgemm_fp8": "FBGEMM FP8",
    "modelopt": "ModelOpt",
    "hqq": "HQQ",
    "eetq": "EETQ",
    "quanto": "Quanto",
    "torchao": "torchao",
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "vptq": "VPTQ",
    "bitnet": "BitNet",
}
# Of GPTQ and AWQ, bitsandbytes, compressed-tensors, FP8, ModelOpt, HQQ.
PACKED_SUFFIXES = (
    *(".qweight", ".qzeros", ".scales", ".g_idx", ".absmax", ".quant_map", ".SCB", ".weight_packed", ".weight_scale"),
    *(".weight_scale_inv", ".weight_zero_point", ".input_scale", ".weight_scale_2", ".k_scale", ".v_scale", ".W_q"),
)
OTHER_PACKING = ("quantization", "compression_config")  # of MLX, and of compressed-tensors before transformers knew it
UNQUANTISED = (
    "take the checkpoint that was quantised (the original, in bfloat16 or float16), or a .gguf file of the model; "
    "the codes are unreadable without the key, so removing it does not help"
)


def quantised_as(found: object) -> str | None:
    """The method of a `quantization_config`; None where it names none."""
    if not isinstance(found, dict):
        return None
    method = found.get("quant_method")
    if method is None:  # of old files of bitsandbytes, and of MLX
        bits = next((key for key in ("load_in_4bit", "load_in_8bit") if found.get(key)), None)
        return "bitsandbytes" if bits else "MLX" if {"group_size", "bits"} <= found.keys() else None
    return METHODS.get(str(method).lower(), str(method)[:40])


def step_for_missing_path(path: Location, otherwise: str = "name an HF directory, a run or a .gguf file") -> str:
    """The next step if nothing exists at a path.

    Args:
        otherwise: the step for what looks like a path and not like a model's name.
    """
    text = str(path)
    parts = Path(text).parts
    named = "/".join(parts[-2:])
    if HUB_ID.fullmatch(named) and (len(parts) == 1 or not Path(text).parent.exists()):
        return (
            f"if this is the name of a model on the Hugging Face hub, download it first: `hf download {named} "
            f"--local-dir DIR`, then name DIR; else {otherwise}"
        )
    return otherwise


def step_for_folder(directory: Location, names: Sequence[str]) -> str | None:
    """The next step for a folder that lacks config.json or weights, where it is known for something else."""
    if "adapter_config.json" in names:
        return (
            "this is a LoRA adapter, which changes a model and is none: merge it with peft "
            "(PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(DIR)) and name DIR"
        )
    if "snapshots" in names or directory.name == "snapshots":
        found = _snapshots(directory if directory.name == "snapshots" else directory / "snapshots")
        named = f": {found[-1]}" if found else ", with a snapshot in it: it is empty, so download the model again"
        return f"this is the root of a model in the Hugging Face cache: name a folder in its snapshots{named}"
    if any(name.startswith("models--") for name in names):
        return "this is the Hugging Face cache: name models--OWNER--NAME/snapshots/COMMIT in it"
    if any(name.startswith("consolidated") and name.endswith((".safetensors", ".pth")) for name in names):
        return (
            "consolidated files are in the format of the model's makers (with params.json): take the Hugging Face "
            "files of the same model (config.json and model*.safetensors), or convert it with transformers"
        )
    if shards := [found for name in names if (found := SHARD_NAME.fullmatch(name))]:
        return _step_for_shards(shards)
    if "model_index.json" in names:
        return "this is a diffusers pipeline: name the folder of its language model, if it has one"
    return None


def _step_for_shards(found: Sequence[re.Match[str]]) -> str:
    """The next step for shards without an index, of which some may be missing, too."""
    count = int(found[0][3])
    here = {int(shard[2]) for shard in found}
    lost = [number for number in range(1, min(count, MOST_SHARDS) + 1) if number not in here]
    step = "copy model.safetensors.index.json, which lists the shards, from the model's folder"
    if not lost:
        return step
    named = f"{found[0][1]}-{lost[0]:0{len(found[0][2])}d}-of-{found[0][3]}.safetensors"
    return f"{step}, and {len(lost)} of {counted(count, 'shard')}, such as {named}"


def step_for_names(missing: Sequence[str], unknown: Sequence[str]) -> str | None:
    """The next step for tensors under other names than expected, where these are known for something."""
    if any("lora_" in name for name in unknown):
        return (
            "these weights hold a LoRA that was not merged: load them with peft, then merge_and_unload() and "
            "save_pretrained(DIR), and name DIR"
        )
    if any(name.endswith(PACKED_SUFFIXES) for name in unknown):
        return f"these weights are quantised, though config.json does not say so: {UNQUANTISED}"
    first = next((name for name in unknown for lost in missing if name.endswith(f".{lost}")), None)
    if first is not None:
        lost = next(each for each in missing if first.endswith(f".{each}"))
        return (
            f"the names begin with {first.removesuffix(lost)}, as those of a wrapped model do: unwrap it and save it "
            "again (model.module or model._orig_mod; of a wrapper with more than a language model, that alone)"
        )
    if any(f"model.{name}" in missing for name in unknown):
        return "these are a model's without its head: save it with AutoModelForCausalLM, and not with AutoModel"
    return None


def _snapshots(folder: Location) -> Sequence[Location]:
    if isinstance(folder, ObjectPath):
        return []
    return sorted(each for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else []


def is_lfs_pointer(data: bytes) -> bool:
    """Tell whether these first bytes of a file are a pointer of Git LFS."""
    return data.startswith(LFS_MAGIC)


def packing_key(raw: Mapping[str, Any]) -> str | None:
    """The key of a config.json, other than `quantization_config`, that describes the quantisation of its weights."""
    return next((key for key in OTHER_PACKING if isinstance(raw.get(key), dict)), None)


def lfs_pointer(file: Location) -> CheckpointError:
    """The error for a pointer in place of a file."""
    return CheckpointError("a file of the checkpoint was not downloaded", {"file": file}, LFS_STEP)


def unreadable_weights(file: Location, error: OSError) -> CheckpointError:
    """The error for a weight file that the system does not give."""
    return CheckpointError(
        "a weight file cannot be read",
        {"file": file, "cause": error},
        "check that it is a file and that you may read it",
    )
