"""Rotary embedding by a GGUF file's keys, or by the divisors of its frequencies.

Source: llama.cpp `conversion/base.py` (TextModel), `conversion/llama.py` (`generate_extra_tensors`).
"""

import gguf
import numpy as np
from gguf.gguf_reader import ReaderTensor

from distillcache.models.config import RopeConfig
from distillcache.models.files.gguf.file import ROPE_FREQS, tensor_data
from distillcache.models.files.gguf.values import GgufValues
from distillcache.models.layers.rope import base_frequencies, llama3_frequencies
from distillcache.schemas.errors import CheckpointError
from distillcache.schemas.store.path import Location

# A model's tensors by name, each with the file that it is in.
Tensors = dict[str, tuple[gguf.GGUFReader, ReaderTensor]]

# Factors of the Llama 3 scaling in use: 8 (Llama 3.1, 3.3), 16 (EXAONE 4) and 32 (Llama 3.2); the others are the same.
LLAMA3_FACTORS = (8.0, 16.0, 32.0)
LLAMA3_ORIGINAL_POSITIONS = 8192


def rotation(tensors: Tensors, values: GgufValues, default_dim: int) -> RopeConfig:
    """theta and scaling: linear and YaRN by keys, Llama 3's by its tensor of divisors."""
    theta = values.number("rope.freq_base", 10_000.0)
    kind = values.get("rope.scaling.type", "linear" if values.get("rope.scale_linear") is not None else "none")
    factor = values.number("rope.scaling.factor", values.get("rope.scale_linear", 1.0))
    if kind not in ("none", "linear", "yarn"):
        raise CheckpointError(
            "the GGUF file has a rotary scaling that is not supported",
            {"file": values.file, values.key("rope.scaling.type"): kind, "factor": factor,
             "supported": "none, linear, yarn"},
            "use the model's HF directory",
        )  # fmt: skip
    if kind == "linear" and factor != 1.0:
        return RopeConfig(theta=theta, kind="linear", factor=factor)
    if kind == "yarn":
        original = values.size("rope.scaling.original_context_length", values.size("context_length"))
        return RopeConfig(theta, "yarn", factor, original)
    if ROPE_FREQS not in tensors:
        return RopeConfig(theta=theta)
    stored = np.asarray(tensor_data(*tensors[ROPE_FREQS]), np.float32)
    return _llama3_rope(stored, theta, values.get("attention.key_length", default_dim), values.file)


def _llama3_rope(divisors: np.ndarray, theta: float, head_dim: int, file: Location) -> RopeConfig:
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
