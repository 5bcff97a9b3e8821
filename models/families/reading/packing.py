"""`quantization_config`: the packed weights that are unpacked while they are loaded (models/files/packed.py)."""

from typing import Any

from distillcache.models.families.reading.values import Values, unknown_key
from distillcache.models.files.foreign import UNQUANTISED, quantised_as
from distillcache.schemas.errors import CheckpointError

KEY = "quantization_config"
MXFP4, FP8 = "mxfp4", "fp8"
# Which parts were left alone is told by the tensors, and how activations are rounded is no matter of the weights;
# `scale_fmt` (DeepSeek-V3.1) says that scales are powers of two, which they are as float32 as well.
UNDERSTOOD = {
    MXFP4: frozenset({"quant_method", "modules_to_not_convert", "dequantize"}),
    FP8: frozenset({"quant_method", "modules_to_not_convert", "dequantize", "activation_scheme", "fmt", "scale_fmt"}),
}
BLOCK = "weight_block_size"


def check_packing(values: Values) -> None:
    """Raise `CheckpointError` unless the weights are floats, or packed in a way that is understood."""
    found = values[KEY]
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else None
    if not isinstance(method, str) or method not in UNDERSTOOD:
        raise _quantised(values, found)
    for key, value in found.items():
        if key not in UNDERSTOOD[method] and not (method == FP8 and key == BLOCK):
            raise unknown_key(values.file, f"{KEY}.{key}", value)
    if method == FP8:
        _check_fp8(values, found)


def _check_fp8(values: Values, found: dict[str, Any]) -> None:
    """Squares of E4M3 numbers, without scales of activations in the file."""
    block = found.get(BLOCK)
    sized = isinstance(block, list) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block)
    if not sized or found.get("fmt", "e4m3") != "e4m3" or found.get("activation_scheme", "dynamic") != "dynamic":
        raise _quantised(values, found)


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
            "expected": f"floats, {MXFP4}, or {FP8} with {BLOCK} of two numbers, fmt e4m3, activation_scheme dynamic",
        },
        UNQUANTISED,
    )
