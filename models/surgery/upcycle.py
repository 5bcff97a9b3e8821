"""Upcycling of a dense MLP to experts: copies of it, or a partition of its neurons.

Copies: every expert is the whole MLP, plus noise. Weights of the chosen experts sum to 1, so without noise the output
is the dense one, whatever the router says (Sparse Upcycling, arXiv 2212.05055).

Partition: expert e has `F / E` of the neurons, and its rows of the output projection times E. With equal weights
`1 / k` a token's k experts give `E / k` times the sum of their neurons (LLaMA-MoE, arXiv 2406.16554, scales likewise),
and all E experts together the dense output.

The router is small random numbers: with zeros, every token would begin with the same experts.
"""

import numpy as np

from distillcache.models.config import ModelConfig, MoeConfig
from distillcache.models.surgery.choose import block_scores
from distillcache.models.surgery.parts import Block, Parts
from distillcache.schemas.config.student import SurgeryOp

ROUTER_STD = 0.02  # logits of some tenths, so no expert is far ahead


def upcycled(parts: Parts, block: int, config: ModelConfig, op: SurgeryOp) -> Block:
    """One block with experts in place of its MLP; the dense one's norms stay.

    Args:
        parts: before the operation. config: after it.
    """
    moe, old = config.moe_config, parts.blocks[block]
    rng = np.random.default_rng([op.seed or 0, block])
    router = _drawn(rng, (config.hidden_size, moe.num_experts), ROUTER_STD if op.router_std is None else op.router_std)
    experts = _copies(old, moe, op.noise or 0.0, rng) if op.how != "partition" else _partition(parts, block, moe, op)
    new = {"mlp/router": router.astype(old["mlp/gate"].dtype), **experts}
    if moe.shared_size:
        new |= _silent_shared(config, moe, old["mlp/gate"].dtype, rng)
    return {**old, **new}


def _drawn(rng: np.random.Generator, shape: tuple[int, ...], std: float) -> np.ndarray:
    return (rng.standard_normal(shape) * std).astype(np.float32)


def _copies(old: Block, moe: MoeConfig, noise: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """`noise` is a share of the standard deviation of each matrix."""
    found = {}
    for name in ("mlp/gate", "mlp/up", "mlp/down"):
        copies = np.repeat(old[name][None], moe.num_experts, axis=0)
        if noise:
            wide = copies.astype(np.float32)
            copies = (wide + _drawn(rng, wide.shape, noise * float(wide.std()))).astype(copies.dtype)
        found[name] = copies
    return found


def _partition(parts: Parts, block: int, moe: MoeConfig, op: SurgeryOp) -> dict[str, np.ndarray]:
    """By index: runs of neighbours; otherwise dealt out by falling worth, so that experts are worth alike."""
    old, count = parts.blocks[block], moe.num_experts
    neurons = np.arange(old["mlp/down"].shape[0])
    if op.chosen_by == "index":
        shares = neurons.reshape(count, -1)
    else:
        order = np.argsort(-block_scores(parts, block, "F", op), kind="stable")
        shares = np.sort(order.reshape(-1, count).T, axis=1)
    down = old["mlp/down"]
    return {
        "mlp/gate": np.moveaxis(old["mlp/gate"][:, shares], 1, 0),
        "mlp/up": np.moveaxis(old["mlp/up"][:, shares], 1, 0),
        "mlp/down": (down[shares].astype(np.float32) * count).astype(down.dtype),
    }


def _silent_shared(
    config: ModelConfig, moe: MoeConfig, dtype: np.dtype, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """A shared expert that adds nothing: its output projection is zero."""
    shape = (config.hidden_size, moe.shared_size)
    std = config.hidden_size**-0.5
    return {
        "mlp/shared_gate": _drawn(rng, shape, std).astype(dtype),
        "mlp/shared_up": _drawn(rng, shape, std).astype(dtype),
        "mlp/shared_down": np.zeros(shape[::-1], dtype),
        "mlp/shared_router": np.zeros((config.hidden_size, 1), dtype),
    }
