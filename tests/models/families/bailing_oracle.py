"""Bailing (Ling, Ring) in NumPy: what its published code computes, in float64, one document at a time, loops and all.

Written from the behaviour of inclusionAI's `modeling_bailing_moe.py` and `modeling_bailing_moe_v2.py` and knowing
nothing of our decoder: it reads a checkpoint's config.json and its tensors under their own names. test_bailing.py
checks it against transformers' GLM, which computes the same as the second version.
"""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

Tensors = dict[str, np.ndarray]
SECOND = "BailingMoeV2ForCausalLM"


class Bailing:
    """An open checkpoint."""

    def __init__(self, directory: Path) -> None:
        self.config = json.loads((directory / "config.json").read_text())
        stored = load_file(directory / "model.safetensors")
        self.tensors = {name: value.astype(np.float64) for name, value in stored.items()}
        self.second = SECOND in self.config["architectures"]

    def document(self, tokens: np.ndarray) -> Tensors:
        """attn_out [L, T, D], resid [L + 1, T, D], experts [Lm, T, k] by number, logits [T, V]."""
        stream = self.tensors["model.word_embeddings.weight"][tokens]
        attn_out, resid, experts = [], [stream], []
        for layer in range(self.config["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            attn_out.append(self.attention(f"{at}attention.", self.norm(f"{at}input_layernorm", stream)))
            stream = stream + attn_out[-1]
            x = self.norm(f"{at}post_attention_layernorm", stream)
            if layer < self.config["first_k_dense_replace"]:
                stream = stream + self.mlp(f"{at}mlp.", x)
            else:
                out, chosen = self.mixture(f"{at}mlp.", x)
                stream = stream + out
                experts.append(chosen)
            resid.append(stream)
        return {
            "attn_out": np.stack(attn_out),
            "resid": np.stack(resid),
            "experts": np.stack(experts),
            "logits": self.norm("model.norm", stream) @ self.head().T,
        }

    def head(self) -> np.ndarray:
        if self.config["tie_word_embeddings"]:
            return self.tensors["model.word_embeddings.weight"]
        weight = self.tensors["lm_head.weight"]
        if not self.config.get("norm_head", False):
            return weight
        return np.stack([column / (np.sqrt((column**2).sum()) + 1e-7) for column in weight.T], axis=1)

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        mean = (x**2).mean(-1, keepdims=True)
        return self.tensors[f"{name}.weight"] * x / np.sqrt(mean + self.config["rms_norm_eps"])

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors.get(f"{name}.bias", 0.0)

    def mlp(self, at: str, x: np.ndarray) -> np.ndarray:
        gate = self.linear(f"{at}gate_proj", x)
        assert self.config["hidden_act"] == "silu"
        return self.linear(f"{at}down_proj", gate / (1 + np.exp(-gate)) * self.linear(f"{at}up_proj", x))

    def attention(self, at: str, x: np.ndarray) -> np.ndarray:
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        dim = self.config.get("head_dim") or self.config["hidden_size"] // heads
        fused = self.linear(f"{at}query_key_value", x).reshape(len(x), heads + 2 * kv_heads, dim)
        out = []
        for head in range(heads):
            group = head // (heads // kv_heads)
            query, key, value = fused[:, head], fused[:, heads + group], fused[:, heads + kv_heads + group]
            if self.config.get("use_qk_norm", False):
                query = self.norm(f"{at}query_layernorm", query)
                key = self.norm(f"{at}key_layernorm", key)
            scores = self.rotated(query) @ self.rotated(key).T / np.sqrt(dim)
            scores[np.triu_indices(len(x), 1)] = -np.inf
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            out.append(shares / shares.sum(-1, keepdims=True) @ value)
        return self.linear(f"{at}dense", np.concatenate(out, axis=-1))

    def rotated(self, x: np.ndarray) -> np.ndarray:
        """Number i of the rotated part turns with number i + half of it."""
        width = int(x.shape[-1] * self.config.get("partial_rotary_factor", 1)) if self.second else x.shape[-1]
        half, out = width // 2, x.copy()
        scaling = self.config["rope_scaling"] or {"type": "linear", "factor": 1.0}
        assert scaling["type"] == "linear"
        for i in range(half):
            angle = np.arange(len(x)) / scaling["factor"] * self.config["rope_theta"] ** (-2 * i / width)
            out[:, i] = x[:, i] * np.cos(angle) - x[:, i + half] * np.sin(angle)
            out[:, i + half] = x[:, i + half] * np.cos(angle) + x[:, i] * np.sin(angle)
        return out

    def mixture(self, at: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        out = self.mlp(f"{at}shared_experts.", x) if self.config["num_shared_experts"] else np.zeros_like(x)
        experts = []
        for token, logits in enumerate(self.linear(f"{at}gate", x)):
            chosen, weights = self.second_choice(at, logits) if self.second else self.first_choice(logits)
            for expert, weight in zip(chosen, weights, strict=True):
                out[token] += weight * self.mlp(f"{at}experts.{expert}.", x[token])
            experts.append(sorted(chosen))
        return out, np.array(experts)

    def first_choice(self, logits: np.ndarray) -> tuple[list[int], np.ndarray]:
        top_k = self.config["num_experts_per_tok"]
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
        chosen = list(np.argsort(-scores)[:top_k])
        weights = scores[chosen]
        return chosen, weights / weights.sum() if top_k > 1 and self.config["norm_topk_prob"] else weights

    def second_choice(self, at: str, logits: np.ndarray) -> tuple[list[int], np.ndarray]:
        top_k, groups = self.config["num_experts_per_tok"], self.config["n_group"]
        scores = 1 / (1 + np.exp(-logits))
        rank = scores + self.tensors.get(f"{at}gate.expert_bias", 0.0)
        size = len(rank) // groups
        of_group = [sum(sorted(rank[group * size : (group + 1) * size])[-2:]) for group in range(groups)]
        kept = np.argsort(of_group)[-self.config["topk_group"] :]
        allowed = [expert for expert in range(len(rank)) if expert // size in kept]
        chosen = sorted(allowed, key=lambda expert: -rank[expert])[:top_k]
        weights = scores[chosen]
        weights = weights / (weights.sum() + 1e-20) if top_k > 1 else weights
        return chosen, weights * self.config["routed_scaling_factor"]


def write_checkpoint(directory: Path, config: dict[str, Any], seed: int) -> None:
    """A checkpoint of random weights: bfloat16, and as in the published ones float32 biases of experts."""
    noise = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes(config).items():
        value = noise.standard_normal(shape)
        if "norm" in name:
            value = 1 + 0.2 * value
        elif len(shape) == 1:
            value = 0.3 * value
        elif "embeddings" not in name:
            value = 1.3 * shape[-1] ** -0.5 * value
        tensors[name] = value.astype(np.float32 if "expert_bias" in name else ml_dtypes.bfloat16)
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint with this config; with those of multi-token prediction."""
    hidden, vocab, depth = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    found: dict[str, tuple[int, ...]] = {
        "model.word_embeddings.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocab, hidden)
    for layer in range(depth + config.get("num_nextn_predict_layers", 0)):
        at = f"model.layers.{layer}."
        found |= {f"{at}input_layernorm.weight": (hidden,), f"{at}post_attention_layernorm.weight": (hidden,)}
        found |= {f"{at}{name}": shape for name, shape in attention_shapes(config).items()}
        dense = layer < config["first_k_dense_replace"]
        of_mlp = mlp_shapes(hidden, config["intermediate_size"]) if dense else mixture_shapes(config)
        found |= {f"{at}mlp.{name}": shape for name, shape in of_mlp.items()}
        if layer >= depth:
            found |= {f"{at}{name}.weight": (hidden,) for name in ("enorm", "hnorm", "final_layernorm")}
            found[f"{at}eh_proj.weight"] = (hidden, 2 * hidden)
    return found


def attention_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    dim = config.get("head_dim") or hidden // heads
    rows = (heads + 2 * config["num_key_value_heads"]) * dim
    found: dict[str, tuple[int, ...]] = {
        "attention.query_key_value.weight": (rows, hidden),
        "attention.dense.weight": (hidden, heads * dim),
    }
    if config["use_qkv_bias"]:
        found["attention.query_key_value.bias"] = (rows,)
    if config["use_bias"]:
        found["attention.dense.bias"] = (hidden,)
    if config.get("use_qk_norm", False):
        found |= {f"attention.{name}_layernorm.weight": (dim,) for name in ("query", "key")}
    return found


def mixture_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, width, experts = config["hidden_size"], config["moe_intermediate_size"], config["num_experts"]
    found: dict[str, tuple[int, ...]] = {"gate.weight": (experts, hidden)}
    if config.get("moe_router_enable_expert_bias", False):
        found["gate.expert_bias"] = (experts,)
    for expert in range(experts):
        found |= {f"experts.{expert}.{name}": shape for name, shape in mlp_shapes(hidden, width).items()}
    if config["num_shared_experts"]:
        shared = mlp_shapes(hidden, width * config["num_shared_experts"])
        found |= {f"shared_experts.{name}": shape for name, shape in shared.items()}
    return found


def mlp_shapes(hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    up = {f"{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
    return up | {"down_proj.weight": (hidden, inner)}
