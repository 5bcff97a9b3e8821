"""Translations of architectures whose blocks are dense, or that have windows.

Gemma's files do not say what scales the products of queries and keys: llama.cpp knows it by the depth. Which blocks of
Gemma 2 and 3 have a window is as in the released models.

Source: llama.cpp `conversion/glm.py` (Glm4Model), `exaone.py` (Exaone4Model), `apertus.py`, `olmo.py` (Olmo2Model),
`phi.py` (Phi3MiniModel), `command_r.py` (Cohere2Model), `gemma.py`, `smollm.py`; `src/models/*.cpp` for what is assumed
without a key.
"""

from typing import Any

import numpy as np

from distillcache.models.families.reading.kinds import FULL, SLIDING
from distillcache.models.families.reading.values import ORIGINAL, PARTIAL
from distillcache.models.files.gguf.file import ROPE_FREQS, tensor_data
from distillcache.models.files.gguf.translated import BIAS, INNER, GgufModel, Translation, rope_keys

WINDOW, PATTERN, LOCAL_BASE = "attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"
OF_WINDOWS = frozenset({WINDOW, PATTERN, LOCAL_BASE})
BASE = 10_000.0  # of rotations, where no key says another


def _windows(model: GgufModel) -> dict[str, Any]:
    """`layer_types` by a flag for each block, where the file has them."""
    slides, window = model.values.get(PATTERN), model.values.get(WINDOW) or None
    if not isinstance(slides, list) or window is None:
        return {"sliding_window": window}
    return {"sliding_window": window, "layer_types": [SLIDING if each else FULL for each in slides[: model.depth]]}


def _local(model: GgufModel, base: float) -> dict[str, Any]:
    """The rotation of blocks with a window."""
    return {"rope_type": "default", "rope_theta": model.values.number(LOCAL_BASE, base)}


def _olmo(model: GgufModel) -> dict[str, Any]:
    """With windows it is OLMo 3, in which a scaling applies to the other blocks."""
    if not model.values.get(WINDOW):
        return {}
    rope = rope_keys(model)
    local = _local(model, rope["rope_theta"])
    return {"model_type": "olmo3", **_windows(model), "rope_parameters": {FULL: rope, SLIDING: local}}


def _scalar(model: GgufModel, largest: int) -> dict[str, int]:
    """largest: the depth of the model whose products are scaled by the stream's share of a head."""
    values, heads = model.values, model.size("attention.head_count")
    scale = values.size("embedding_length") // heads if model.depth == largest else model.width()
    return {"query_pre_attn_scalar": scale}


def _gemma2(model: GgufModel) -> dict[str, Any]:
    return {"sliding_window": model.values.get(WINDOW), **_scalar(model, 46)}


def _gemma3(model: GgufModel) -> dict[str, Any]:
    ropes = {FULL: rope_keys(model), SLIDING: _local(model, BASE)}
    return {"sliding_window": model.values.get(WINDOW), "rope_parameters": ropes, **_scalar(model, 62)}


def _gemma4(model: GgufModel) -> dict[str, Any]:
    """Blocks that see all have heads of their own, and values that are keys where they lack the former's weights."""
    values, (types, window) = model.values, _types(model)
    narrow, wide = (_heads(model, types, kind) for kind in (SLIDING, FULL))
    widths = model.sizes("feed_forward_length")
    full = next(block for block, kind in enumerate(types) if kind == FULL)
    same = not model.has("attn_v.weight", full)
    return {
        "layer_types": types,
        "sliding_window": window,
        "head_dim": values.size("attention.key_length_swa"),
        "num_key_value_heads": narrow,
        "global_head_dim": values.size("attention.key_length"),
        "num_global_key_value_heads": wide,
        "attention_k_eq_v": same,
        "rope_parameters": {FULL: _proportional(model), SLIDING: _local(model, BASE)},
        PARTIAL: None,
        "intermediate_size": widths[0],
        "num_kv_shared_layers": values.get("attention.shared_kv_layers", 0),
        "use_double_wide_mlp": len(set(widths)) > 1,
        "hidden_size_per_layer_input": values.get("embedding_length_per_layer_input", 0),
        "vocab_size_per_layer_input": model.rows("per_layer_token_embd.weight") or model.rows("token_embd.weight"),
        "enable_moe_block": bool(values.get("expert_count", 0)),
    }


def _types(model: GgufModel) -> tuple[list[str], int]:
    found, slides = _windows(model), model.values.get(PATTERN)
    if len(found.get("layer_types", ())) != model.depth or FULL not in found["layer_types"]:
        raise model.values.bad(PATTERN, slides, f"{model.depth} flags, not all of them true, beside a window")
    return found["layer_types"], found["sliding_window"]


def _heads(model: GgufModel, types: list[str], kind: str) -> int:
    heads = model.sizes("attention.head_count_kv")
    found = {each for each, own in zip(heads, types, strict=False) if own == kind}
    if len(found) != 1 or len(heads) != len(types):
        raise model.values.bad("attention.head_count_kv", heads, "the same number in all blocks of a kind")
    return found.pop()


def _proportional(model: GgufModel) -> dict[str, Any]:
    """Frequencies of what does not rotate are divided by a number that leaves nothing of them."""
    found: dict[str, Any] = {"rope_type": "proportional", "rope_theta": model.values.number("rope.freq_base", 1e6)}
    if ROPE_FREQS not in model.tensors:
        return found | {PARTIAL: 1.0}
    divisors = np.asarray(tensor_data(*model.tensors[ROPE_FREQS]), np.float32)
    turned = int((divisors == 1).sum())
    if not (np.all(divisors[:turned] == 1) and np.all(divisors[turned:] > 1e29)):
        raise model.values.bad(ROPE_FREQS, divisors.tolist(), "ones, and then 1e30")
    return found | {PARTIAL: turned / len(divisors)}


LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"


def _phi3(model: GgufModel) -> dict[str, Any]:
    """The factor of amplitudes is what follows from the lengths."""
    values, found = model.values, {"sliding_window": model.values.get(WINDOW) or None}
    if LONG not in model.tensors or SHORT not in model.tensors:
        return found
    factors = {key: _decimals(model, name) for key, name in (("long_factor", LONG), ("short_factor", SHORT))}
    original = values.size("rope.scaling.original_context_length", values.size("context_length"))
    rope = {"rope_type": "longrope", "rope_theta": values.number("rope.freq_base", BASE), **factors}
    return found | {"rope_parameters": rope, ORIGINAL: original}


def _decimals(model: GgufModel, name: str) -> list[float]:
    return [float(str(number)) for number in np.asarray(tensor_data(*model.tensors[name]), np.float32).ravel()]


def _cohere2(model: GgufModel) -> dict[str, Any]:
    """Norms take the mean away, and their epsilon has a key of its own."""
    return {"rms_norm_eps": model.values.number(EPSILON, 1e-5), **_windows(model)}


EPSILON = "attention.layer_norm_epsilon"
CAPS = {name: name for name in ("attn_logit_softcapping", "final_logit_softcapping")}
NO_CAP = {"final_logit_softcapping": None}
DENSE = {
    "glm4": Translation({None: "glm4"}, said=BIAS),
    "exaone4": Translation({None: "exaone4"}, more=_windows, reads=OF_WINDOWS),
    "apertus": Translation({None: "apertus"}, said=BIAS),
    "olmo2": Translation({None: "olmo2"}, said=BIAS, more=_olmo, reads=OF_WINDOWS),
    "phi3": Translation({None: "phi3"}, more=_phi3, reads=frozenset({WINDOW, "rope.scaling.attn_factor"})),
    "smollm3": Translation({None: "smollm3"}, said={**BIAS, "mlp_bias": "ffn_gate.bias"}),
    "cohere2": Translation(
        {None: "cohere2"}, {"logit_scale": "logit_scale"}, more=_cohere2, reads=OF_WINDOWS | {EPSILON}
    ),
    "gemma2": Translation({None: "gemma2"}, CAPS, dict.fromkeys(CAPS), BIAS, _gemma2, OF_WINDOWS),
    "gemma3": Translation(
        {None: "gemma3_text"},
        {"final_logit_softcapping": "final_logit_softcapping"},
        NO_CAP,
        BIAS,
        _gemma3,
        OF_WINDOWS,
    ),
    "gemma4": Translation(
        {None: "gemma4_text"},
        {
            **INNER,
            "final_logit_softcapping": "final_logit_softcapping",
            "expert_count": "num_experts",
            "expert_used_count": "top_k_experts",
        },
        NO_CAP | dict.fromkeys(("num_experts", "top_k_experts", "moe_intermediate_size")),
        BIAS,
        _gemma4,
        OF_WINDOWS
        | {f"attention.{key}" for key in ("key_length_swa", "value_length_swa", "shared_kv_layers")}
        | {"embedding_length_per_layer_input", "rope.dimension_count_swa"},
    ),
}
