"""Our logits on this device against those of transformers on the CPU, float32, of tiny random models.

parity_<family>  the largest difference, over the largest value
"""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distillcache.models.checkpoint import load_pretrained
from distillcache.tools.bench.figures import Goal

NEEDED = ("torch", "transformers")
AT_MOST = 1e-5  # two orders of summation in float32 differ by at most 2.9e-6 on two CPU cores
SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def missing() -> str | None:
    """Return why parity cannot be measured here, if it cannot."""
    found = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"{' and '.join(found)} not installed (extra `parity`)" if found else None


def measure_parity(folder: Path) -> tuple[dict[str, float], list[Goal]]:
    """The difference of every family, and its goal."""
    figures = {f"parity_{family}": _difference(folder / f"parity-{family}", family) for family in FAMILIES}
    return figures, [Goal(name, value, AT_MOST, "at_most") for name, value in figures.items()]


def _difference(folder: Path, family: str) -> float:
    torch, transformers = (importlib.import_module(name) for name in NEEDED)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES, **FAMILIES[family], pad_token_id=0, eos_token_id=1)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    model.save_pretrained(folder)
    tokens = np.random.default_rng(0).integers(2, SIZES["vocab_size"], (2, 48))
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    decoder = load_pretrained(folder, "float32")
    with jax.default_matmul_precision("highest"):  # accelerators multiply float32 less exactly otherwise
        ours = np.asarray(decoder(jnp.asarray(tokens, jnp.int32)).logits)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
