"""Students cut out of teachers: fewer heads, everything else the teacher's, bit for bit; and biases for routers.

An operation is a value, so that a config can list several; they are applied in order. Cut decoders keep `head_dim`
as it was, and HF configs can say so (`num_attention_heads: 6, head_dim: 64`).
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.attention import Attention
from models.config import ModelConfig
from models.decoder import Decoder
from models.families import config_to_hf
from schemas.errors import CheckpointError, ConfigError
from schemas.train_config import SurgeryOp

# Axis of the heads in each parameter of an attention sublayer, the stack's axis included.
QUERY_AXES = {"q": 2, "o": 1, "q_bias": 1, "q_norm": 1}
KV_AXES = {"k": 2, "v": 2, "k_bias": 1, "v_bias": 1, "k_norm": 1}


def apply_surgery(decoder: Decoder, ops: Iterable[SurgeryOp]) -> Decoder:
    """The decoder after all cuts, each made in every block, as a new one; the given one is left as it was.

    `query_heads` keeps `to` query heads of each key/value group; `kv_heads` keeps `to` key/value heads, each with all
    its query heads. By `index` the first ones stay; by `weight_norm` those whose rows of the output projection have
    the largest norm, in their old order.

    Raises:
        ConfigError: a cut that this decoder does not allow, or a result that no HF config can describe: better now
            than when the trained student is exported.
    """
    cut = decoder
    for op in ops:
        config = _checked_config(cut.config, op)
        cut = _rebuild(cut, config, op)
    if cut is not decoder:
        try:
            config_to_hf(cut.config, "float32")
        except CheckpointError as error:
            raise ConfigError(f"the student could not be exported: {error.what}", error.facts, error.next) from error
    return cut


def _checked_config(config: ModelConfig, op: SurgeryOp) -> ModelConfig:
    group = config.num_heads // config.num_kv_heads
    if op.op == "query_heads":
        if group == 1:
            raise _refused(
                op,
                "query heads in each key/value group",
                1,
                "at least 2: a group cannot lose its only query head",
                f"use op: kv_heads with to: 1 to {config.num_kv_heads - 1}"
                if config.num_kv_heads > 1
                else "this model has one head; use another teacher",
            )
        _check_range(op, group, "query heads in each key/value group")
        return replace(config, num_heads=config.num_kv_heads * op.to)
    _check_range(op, config.num_kv_heads, "key/value heads")
    return replace(config, num_heads=group * op.to, num_kv_heads=op.to)


def _check_range(op: SurgeryOp, have: int, noun: str) -> None:
    if not 1 <= op.to <= have:
        raise _refused(op, "to", op.to, f"1 to {have}: the model has {have} {noun}", "choose a number in this range")


def _refused(op: SurgeryOp, label: str, found: object, expected: object, step: str) -> ConfigError:
    where = f"{{op: {op.op}, to: {op.to}, by: {op.by}}}"
    return ConfigError(
        "this surgery cannot be done on this model", {"surgery": where, label: found, "expected": expected}, step
    )


def add_router_bias(decoder: Decoder) -> Decoder:
    """The same decoder with a bias of zero on every expert; the given one where it has biases already.

    Raises:
        ValueError: it has no experts.
    """
    if decoder.config.moe_config.bias:
        return decoder
    config = replace(decoder.config, moe=replace(decoder.config.moe_config, bias=True))
    return _refilled(decoder, config, {})


def _rebuild(decoder: Decoder, config: ModelConfig, op: SurgeryOp) -> Decoder:
    """A decoder of the new config whose parameters are `decoder`'s, cut where attention has heads."""
    changed = {}
    for number, group in enumerate(decoder.groups):
        for place, block in enumerate(group.blocks):
            for name, kept in OPERATIONS[op.op](block.attention, decoder.config, op).items():
                changed["groups", number, "blocks", place, "attention", name] = kept
    return _refilled(decoder, config, changed)


def _refilled(decoder: Decoder, config: ModelConfig, changed: dict[tuple[Any, ...], Array]) -> Decoder:
    """A decoder of the new config with these parameters and otherwise `decoder`'s; what is new there is zero."""
    old = {path: value.get_value() for path, value in nnx.to_flat_state(nnx.state(decoder, nnx.Param))} | changed
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Decoder(config, dtype=decoder.embed[...].dtype)))
    state = [
        (path, value.replace(old[path] if path in old else jnp.zeros(value.shape, value.dtype)))
        for path, value in nnx.to_flat_state(abstract)
    ]
    return nnx.merge(graph, nnx.from_flat_state(state))


def _cut_query_heads(attention: Attention, config: ModelConfig, op: SurgeryOp) -> dict[str, Array]:
    group = config.num_heads // config.num_kv_heads
    kept = _kept(_head_norms(attention).reshape(-1, config.num_kv_heads, group), op)  # [repeats, K, to]
    heads = (kept + group * jnp.arange(config.num_kv_heads)[:, None]).reshape(kept.shape[0], -1)
    return _take(attention, QUERY_AXES, heads)


def _cut_kv_heads(attention: Attention, config: ModelConfig, op: SurgeryOp) -> dict[str, Array]:
    group = config.num_heads // config.num_kv_heads
    norms = jnp.square(_head_norms(attention)).reshape(-1, config.num_kv_heads, group).sum(-1)
    kept = _kept(norms, op)  # [repeats, to]
    heads = (kept[..., None] * group + jnp.arange(group)).reshape(kept.shape[0], -1)
    return _take(attention, QUERY_AXES, heads) | _take(attention, KV_AXES, kept)


OPERATIONS: dict[str, Any] = {"query_heads": _cut_query_heads, "kv_heads": _cut_kv_heads}


def _head_norms(attention: Attention) -> Float[Array, "N H"]:
    """Norm of each head's rows of the output projection, float32: what the head can at most add to the stream."""
    return jnp.linalg.norm(attention.o[...].astype(jnp.float32), axis=(-2, -1))


def _kept(norms: Float[Array, "*N H"], op: SurgeryOp) -> Int[Array, "*N to"]:
    """The places kept on the last axis, in ascending order."""
    if op.by == "index":
        return jnp.broadcast_to(jnp.arange(op.to), (*norms.shape[:-1], op.to))
    return jnp.sort(jax.lax.top_k(norms, op.to)[1], axis=-1)


def _take(attention: Attention, axes: dict[str, int], kept: Int[Array, "N k"]) -> dict[str, Array]:
    """Each parameter with only the kept heads, which may differ from block to block of the stack."""
    out = {}
    for name, axis in axes.items():
        # A norm of single heads has no axis of heads: it is the same for all of them.
        if hasattr(attention, name) and not (name.endswith("norm") and attention.config.qk_norm == "head"):
            value = getattr(attention, name)[...]
            shape = [kept.shape[0] if at == 0 else kept.shape[1] if at == axis else 1 for at in range(value.ndim)]
            out[name] = jnp.take_along_axis(value, kept.reshape(shape), axis=axis)
    return out
