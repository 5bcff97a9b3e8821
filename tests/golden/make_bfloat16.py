"""How far transformers' bfloat16 forward is from its float32 one, for the stored models of every family.

python tests/golden/make_bfloat16.py

Writes `bfloat16.json`: of every directory here with bfloat16 weights and expected values (see goldens.py), the median
over tokens of `|x - truth| / |truth|`, averaged over all slots of `resid` but the first. Attention runs through
`scaled_dot_product_attention` where the family has it, the more exact of transformers' two. Also
`bfloat16_deep.json`: the same of the models of 12 and 24 blocks of `deep_models.py`, a figure for each seed. The
repository is on PYTHONPATH.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from deep_models import DEEP, DEPTHS, SEEDS, deep_tokens, save_deep
from goldens import EAGER, HERE, forward
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Mistral4ForCausalLM

# Models of images and text, whose layers the hooks do not reach; gemma3_text is the decoder of the first.
NO_LAYERS = (
    *("gemma3", "gemma4", "kimi_k25", "mistral3", "mistral3_ministral3", "mistral3_mistral4"),
    *("qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe"),
)


def median_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """`[L + 1, B, T, D]` each."""
    error = (found.float() - truth).norm(dim=-1) / truth.norm(dim=-1)
    return error[1:].flatten(1).median(dim=1).values.mean().item()


def hook_nothing(layer: torch.nn.Module, record: Any) -> Any:
    """In the place of what a layer's mixer adds, which is not compared."""
    return layer.register_forward_pre_hook(lambda _, args: record(args[0]))


def open_model(folder: Path) -> torch.nn.Module:
    """In bfloat16, with the attention that users get."""
    options = {"dtype": torch.bfloat16, "experts_implementation": "eager"}
    kind = Mistral4ForCausalLM if folder.name.startswith("mistral4") else AutoModelForCausalLM
    try:
        return kind.from_pretrained(folder, attn_implementation="sdpa", **options)
    except ValueError:
        return kind.from_pretrained(folder, attn_implementation="eager", **options)


def main() -> None:
    errors = {}
    for file in sorted(HERE.glob("*/expected.safetensors")):
        folder = file.parent
        stored = load_file(folder / "model.safetensors") if (folder / "model.safetensors").exists() else {}
        if folder.name in NO_LAYERS or not any(value.dtype == torch.bfloat16 for value in stored.values()):
            continue
        expected = load_file(file)
        found = forward(open_model(folder), expected["tokens"].long(), hook_added=hook_nothing)
        errors[folder.name] = median_error(found["resid"], expected["resid"])
    (HERE / "bfloat16.json").write_text(json.dumps(errors, indent=1) + "\n")
    (HERE / "bfloat16_deep.json").write_text(json.dumps(deep_errors(), indent=1) + "\n")


def deep_errors() -> dict[str, list[float]]:
    """`<family>-<blocks>` -> transformers' error for each seed."""
    errors: dict[str, list[float]] = {}
    for name, depth, seed in ((name, depth, seed) for name in DEEP for depth in DEPTHS for seed in SEEDS):
        with tempfile.TemporaryDirectory() as folder:
            saved, tokens = save_deep(Path(folder) / "m", name, depth, seed), torch.from_numpy(deep_tokens(seed))
            truth = forward(AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32, **EAGER).eval(), tokens)
            found = forward(open_model(saved).eval(), tokens)
        errors.setdefault(f"{name}-{depth}", []).append(median_error(found["resid"], truth["resid"]))
    return errors


if __name__ == "__main__":
    main()
