"""Attention kernels: queries, keys and values to mixed values, by one of several implementations.

- `xla`: `jax.nn.dot_product_attention`, and written out where a family needs what that does not know. Runs anywhere;
  XLA holds the scores `[B, H, T, T]`.
- `splash`: JAX's Pallas kernel for TPUs (`jax.experimental.pallas.ops.tpu.splash_attention`). No scores in memory, and
  blocks of tokens of which none sees the other are left out. On other devices Pallas interprets it, which is for tests.
- `cudnn`: flash attention for NVIDIA GPUs, in 16-bit dtypes, through `jax.nn.dot_product_attention`.
"""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from distillcache.models.config import BlockKind, Kernel, ModelConfig
from distillcache.models.layers.context import BlockContext
from distillcache.models.layers.norm import softcap
from distillcache.models.mesh.ambient import ROW_AXES, TENSOR_AXIS, splitting_axes
from distillcache.schemas.errors import ConfigError

LANES = 128  # of a TPU's vector unit: splash attention works on runs of tokens that are multiples of it
SPLASH_BLOCK = 512  # tokens at a time: JAX's default for the backward pass is of this order, and VMEM holds it
CUDNN_HEAD = 128  # the widest head that cuDNN takes on all GPUs that have flash attention


def chosen_kernel(way: str, config: ModelConfig, dtype: str) -> Kernel:
    """The kernel that `attention: auto|xla|splash|cudnn` means for this decoder on this process's devices.

    `auto`: splash on TPUs, cuDNN on GPUs where it can do what the decoder asks, XLA otherwise.

    Raises:
        ConfigError: the named kernel does not run here, or not for this decoder.
    """
    platform = jax.default_backend()
    if way == "auto":
        if platform == "tpu" and _splash_is_there():
            return "splash"
        return "cudnn" if platform == "gpu" and not _beyond_cudnn(config, dtype) else "xla"
    if way == "splash" and (platform != "tpu" or not _splash_is_there()):
        raise _refused(way, f"this machine computes on {platform}", "a TPU, and a JAX with splash attention")
    if way == "cudnn" and platform != "gpu":
        raise _refused(way, f"this machine computes on {platform}", "an NVIDIA GPU")
    if way == "cudnn" and (reason := _beyond_cudnn(config, dtype)):
        raise _refused(way, reason, f"float16 or bfloat16, heads of a multiple of 8 up to {CUDNN_HEAD}, plain softmax")
    return way  # type: ignore[return-value]


def _splash_is_there() -> bool:
    return importlib.util.find_spec("jax.experimental.pallas.ops.tpu.splash_attention") is not None


def _beyond_cudnn(config: ModelConfig, dtype: str) -> str:
    """List the features of the decoder that cuDNN does not support; empty if there are none."""
    if dtype not in ("float16", "bfloat16"):
        return f"attention in {dtype}"
    for _, width in map(config.heads_of, config.kinds):
        if width % 8 or width > CUDNN_HEAD:
            return f"heads of {width}"
    asked = {
        "soft caps on attention scores": config.attention_softcap is not None,
        "sinks": config.sinks,
        "latent attention": config.latent is not None,
    }
    return ", ".join(name for name, needed in asked.items() if needed)


def _refused(way: str, found: str, expected: str) -> ConfigError:
    return ConfigError(
        "this attention kernel cannot be used", {"attention": way, "found": found, "expected": expected}, "use auto"
    )


def attend(
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B T K hd"],
    v: Float[Array, "B T K vd"],
    context: BlockContext,
    kind: BlockKind,
    config: ModelConfig,
    sinks: Float[Array, " H"] | None = None,
    choice: Bool[Array, "B T T"] | None = None,
) -> Float[Array, "B T H vd"]:
    """Values mixed by the softmax of the scores of queries and keys, in the dtype of `q`.

    Args:
        sinks: a logit of every query head that takes part in the softmax and has no value. choice: the keys of a query,
            of those that its mask lets it see; splash attention knows no such masks, and XLA computes it.
    """
    if config.attention == "splash" and choice is None:
        return _splash(q, k, v, context, kind, config, sinks)
    mask = attention_mask(context, kind)
    if choice is not None:
        mask &= choice[:, None]
    if config.attention_softcap is None and sinks is None and q.shape[-1] == v.shape[-1]:
        way = "cudnn" if config.attention == "cudnn" else None
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=config.attention_scale, implementation=way)
    return _written_out(q, k, v, mask, config, sinks)


def _written_out(
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B T K hd"],
    v: Float[Array, "B T K vd"],
    mask: Bool[Array, "B 1 T T"],
    config: ModelConfig,
    sinks: Float[Array, " H"] | None,
) -> Float[Array, "B T H vd"]:
    """With what `jax.nn.dot_product_attention` does not know: soft caps, sinks, values of another width than keys."""
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, width)
    logits = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32) * _scale(config, width)
    if config.attention_softcap is not None:
        logits = softcap(logits, config.attention_softcap)
    logits = jnp.where(mask[:, :, None], logits, -0.7 * jnp.finfo(jnp.float32).max)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(kv_heads, heads // kv_heads, 1, 1)
        logits = jnp.concatenate([logits, jnp.broadcast_to(sink, (*logits.shape[:-1], 1))], axis=-1)
    shares = jax.nn.softmax(logits, axis=-1)[..., :length].astype(v.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", shares, v).reshape(batch, length, heads, v.shape[-1])


def _scale(config: ModelConfig, width: int) -> float:
    return width**-0.5 if config.attention_scale is None else config.attention_scale


def attention_mask(context: BlockContext, kind: BlockKind) -> Bool[Array, "B 1 T T"]:
    """Causal, within a document, within the window and the chunk of the block.

    Padding (segment 0) sees padding: finite, and seen by no one.
    """
    segments, index = context.segment_ids, jnp.arange(context.segment_ids.shape[1])
    distance = index[:, None] - index[None, :]
    seen = (distance >= 0) if kind.window is None else (distance >= 0) & (distance < kind.window)
    seen = (segments[:, :, None] == segments[:, None, :]) & seen
    if kind.chunk is not None:
        run = context.positions // kind.chunk
        seen &= run[:, :, None] == run[:, None, :]
    return seen[:, None]


def runs_of_tokens(context: BlockContext, kind: BlockKind) -> Int[Array, "B T"]:
    """A number for every run of tokens that may see each other: documents, cut at the block's chunks."""
    segments = context.segment_ids
    if kind.chunk is None:
        return segments
    run = context.positions // kind.chunk
    starts = (segments[:, 1:] != segments[:, :-1]) | (run[:, 1:] != run[:, :-1])
    return jnp.pad(jnp.cumsum(starts, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def _splash(
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B T K hd"],
    v: Float[Array, "B T K vd"],
    context: BlockContext,
    kind: BlockKind,
    config: ModelConfig,
    sinks: Float[Array, " H"] | None,
) -> Float[Array, "B T H vd"]:
    """Splash attention of every row, each device its own rows and heads.

    Rows are filled up to whole lanes with tokens of a run of their own.
    """
    length = q.shape[1]
    padding = -length % LANES
    wide = ((0, 0), (0, padding), (0, 0), (0, 0))
    q, k, v = (jnp.pad(part, wide) for part in (q * jnp.asarray(_scale(config, q.shape[-1]), q.dtype), k, v))
    runs = jnp.pad(runs_of_tokens(context, kind), ((0, 0), (0, padding)), constant_values=-1)

    def on_device(q: Array, k: Array, v: Array, runs: Array, sinks: Array | None) -> Array:
        kernel = _splash_kernel(q.shape[1], q.shape[2], kind.window, config.attention_softcap)

        def of_row(q: Array, k: Array, v: Array, runs: Array) -> Array:
            heads_first = (part.swapaxes(0, 1) for part in (q, k, v))
            return kernel(*heads_first, _segments(runs), sinks).swapaxes(0, 1)

        return jax.vmap(of_row)(q, k, v, runs)

    sizes = splitting_axes((*ROW_AXES, TENSOR_AXIS))
    rows = tuple(axis for axis in ROW_AXES if axis in sizes)
    by_head = TENSOR_AXIS in sizes and q.shape[2] % sizes[TENSOR_AXIS] == k.shape[2] % sizes[TENSOR_AXIS] == 0
    if rows or by_head:
        heads = TENSOR_AXIS if by_head else None
        of_heads = PartitionSpec(rows or None, None, heads)
        on_device = jax.shard_map(
            on_device,
            in_specs=(of_heads, of_heads, of_heads, PartitionSpec(rows or None), PartitionSpec(heads)),
            out_specs=of_heads,
            axis_names={*rows, *([TENSOR_AXIS] if by_head else [])},
            check_vma=False,  # a Pallas call does not say over which axes its result varies
        )
    return on_device(q, k, v, runs, sinks)[:, :length]


def _segments(runs: Int[Array, " T"]) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention

    return splash_attention.SegmentIds(q=runs, kv=runs)


def _splash_kernel(length: int, heads: int, window: int | None, cap: float | None) -> Any:
    """JAX's kernel for one row of this many tokens."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = (length, length)
    mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    block = next(size for size in (SPLASH_BLOCK, SPLASH_BLOCK // 2, LANES) if length % size == 0)
    sizes = dict.fromkeys(
        ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"), block
    )
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**sizes, block_q_dq=block, block_kv_dq=block),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=cap,
        mask_value=float(-0.7 * np.finfo(np.float32).max),
        interpret=jax.default_backend() != "tpu",
    )
