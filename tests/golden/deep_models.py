"""Deep models for bfloat16's errors: the stored ones' configs with more blocks, and weights drawn like theirs.

They are made where they are needed, by NumPy alone, so that `make_bfloat16.py` and the test see the same numbers and
nothing large is stored. Values are those of bfloat16, in float32 files.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import Int
from safetensors.numpy import save_file

from distillcache.models.files.safetensors import MappedSafetensors

HERE = Path(__file__).parent
DEEP = ("llama_tied", "qwen3", "olmo2", "granite", "gemma2", "gemma3_text", "phi3_plain")
DEPTHS, SEEDS = (12, 24), (0, 1, 2)
BATCH, TOKENS, VOCAB = 2, 24, 61


def deep_tokens(seed: int) -> Int[np.ndarray, "B T"]:
    """The tokens that a model is run on."""
    return np.random.default_rng(seed).integers(0, VOCAB, (BATCH, TOKENS))


def save_deep(folder: Path, name: str, depth: int, seed: int) -> Path:
    """Write a model with the config of a stored one, `depth` blocks, and random weights of its weights' spread."""
    folder.mkdir(parents=True)
    config = json.loads((HERE / name / "config.json").read_text())
    blocks = config["num_hidden_layers"]
    if types := config.get("layer_types"):
        config["layer_types"] = [types[block % blocks] for block in range(depth)]
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": depth}))
    stored, rng = MappedSafetensors(HERE / name / "model.safetensors"), np.random.default_rng([seed, depth])
    tensors = {}
    for key in stored.tensors:
        like = stored.view(key).astype(np.float32)
        first, _, rest = key.partition(".layers.0.")
        if ".layers." in key and not rest:
            continue
        for target in (f"{first}.layers.{block}.{rest}" for block in range(depth)) if rest else (key,):
            drawn = np.std(like) * rng.standard_normal(like.shape) + (np.mean(like) if like.ndim == 1 else 0.0)
            tensors[target] = drawn.astype(ml_dtypes.bfloat16).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
