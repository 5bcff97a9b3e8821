"""`quantization_config`: the packed weights that are unpacked while they are loaded (models/files/packed.py)."""

from collections.abc import Mapping
from typing import Any

from distillcache.models.families.reading.values import Values, unknown_key
from distillcache.models.files.foreign import UNQUANTISED, quantised_as
from distillcache.schemas.errors import CheckpointError

KEY = "quantization_config"
MXFP4, FP8, INT4 = "mxfp4", "fp8", "compressed-tensors"
# Which parts were left alone is told by the tensors, and how activations are rounded is no matter of the weights;
# `scale_fmt` (DeepSeek-V3.1) says that scales are powers of two, which they are as float32 as well.
UNDERSTOOD = {
    MXFP4: frozenset({"quant_method", "modules_to_not_convert", "dequantize"}),
    FP8: frozenset({"quant_method", "modules_to_not_convert", "dequantize", "activation_scheme", "fmt", "scale_fmt"}),
    INT4: frozenset(
        {
            "config_groups",
            "format",
            "global_compression_ratio",
            "ignore",
            "quant_method",
            "quantization_status",
            "version",
        }
    ),
}
BLOCK = "weight_block_size"
E4M3 = ("e4m3", "float8_e4m3fn")  # the second as MiniMax M2 has it
# Of packed integers, what is read of a group of matrices; what else may stand there says how the codes were found.
GROUP = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
FOUND_BY = frozenset({"actorder", "block_structure", "dynamic", "observer", "observer_kwargs", "group_size"})


def check_packing(values: Values) -> None:
    """Raise `CheckpointError` unless the weights are floats, or packed in a way that is understood."""
    found = values[KEY]
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else None
    if not isinstance(method, str) or method not in UNDERSTOOD:
        raise _quantised(values, found)
    if method == INT4 and not _is_packed_int4(found):
        raise _quantised(values, found)
    for key, value in found.items():
        if key not in UNDERSTOOD[method] and not (method == FP8 and key == BLOCK) and value not in (None, {}):
            raise unknown_key(values.file, f"{KEY}.{key}", value)
    if method == FP8:
        _check_fp8(values, found)


def packing_inside(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config.json whose text model, and not the model around it, says how its weights are packed, with that moved out
    of it."""
    text = raw.get("text_config")
    if not isinstance(text, dict) or text.get(KEY) is None:
        return raw
    inner = {key: value for key, value in text.items() if key != KEY}
    return {**raw, KEY: raw.get(KEY) or text[KEY], "text_config": inner}


def _check_fp8(values: Values, found: dict[str, Any]) -> None:
    """E4M3 numbers: squares of them, or with null in place of a size whole matrices, which may have been calibrated."""
    block, scheme = found.get(BLOCK), found.get("activation_scheme", "dynamic")
    whole = BLOCK in found and block is None
    sized = isinstance(block, list) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block)
    known = scheme == "dynamic" or (whole and scheme == "static")
    if not (sized or whole) or found.get("fmt", E4M3[0]) not in E4M3 or not known:
        raise _quantised(values, found)


def _is_packed_int4(found: dict[str, Any]) -> bool:
    """Tell whether all groups of matrices are packed in the one way that is read, and activations are left alone."""
    groups = found.get("config_groups")
    if found.get("format") != "pack-quantized" or not isinstance(groups, dict) or not groups:
        return False
    sizes = []
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        others = {key for key, value in group.items() if value is not None} if isinstance(group, dict) else set()
        if not isinstance(weights, dict) or others - {"weights", "targets", "format"}:
            return False
        given = {key: value for key, value in weights.items() if value is not None}
        size = given.get("group_size")
        if not isinstance(size, int) or size < 1 or {key: given.get(key) for key in GROUP} != GROUP:
            return False
        if given.get("actorder") or given.get("dynamic") or given.keys() - GROUP.keys() - FOUND_BY:
            return False
        sizes.append(size)
    return len(set(sizes)) == 1


def _quantised(values: Values, found: object) -> CheckpointError:
    """The error for weights whose codes are not unpacked here."""
    method = quantised_as(found) or f"in a way that {KEY} does not name"
    facts = {key: found[key] for key in (BLOCK, "activation_scheme", "fmt") if isinstance(found, dict) and key in found}
    return CheckpointError(
        f"the checkpoint is quantised ({method}), which is not read",
        {
            "file": values.file,
            "key": KEY,
            **facts,
            "expected": f"floats, {MXFP4}, {FP8} of e4m3 with {BLOCK} of two numbers or null, or {INT4} with format "
            "pack-quantized, symmetric integers of 4 bits by group",
        },
        UNQUANTISED,
    )
