"""The decoder: stacked parameters, blocks scanned over their repeats, taps as return values.

One code path serves as teacher (recorder.py), as student (trainer/step.py) and for evaluation. The parameters of
equal blocks are stacked on a leading axis and scanned, so compile time does not grow with depth.

Source: LLaMA (arXiv 2302.13971), as HF transformers computes it: RMSNorm in float32, rotary embedding on halves,
grouped-query attention, gated MLP; what other families add is said where it is done.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from models.config import BlockKind, LayerGroup, ModelConfig, MoeConfig, TemperatureConfig
from models.experts import Experts, apply_experts
from models.rope import rope_tables, rotate
from models.routing import RouterOutput, expert_load, route

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class BlockContext(NamedTuple):
    """What every block needs to know of the rows: who sees whom, where, and the rotary angles.

    cos, sin: None in a decoder without rotary embedding. noise: in training with `MoeConfig.jitter`, a PRNG key for
    each row, `[B]`. bias_groups: `[B]`, which of several router biases a row's tokens are routed with.
    """

    cos: Float[Array, "B T 1 hd"]
    sin: Float[Array, "B T 1 hd"]
    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    noise: Array | None = None
    bias_groups: Int[Array, "B"] | None = None


class BlockOutput(NamedTuple):
    """One block's tensors, `[B, T, D]` each. `resid` enters the block; the next one gets the sum of the three.

    router: of a block with experts; None in the others.
    """

    resid: Array
    attn_out: Array
    mlp_out: Array
    router: RouterOutput | None = None


class DecoderOutput(NamedTuple):
    """logits `[B, T, V]` or None; taps by name: `attn_out`, `mlp_out` `[L, B, T, D]`, `resid` `[L + 1, B, T, D]`.

    router: `RouterOutput` stacked over the blocks with experts (`ModelConfig.moe_blocks`), where it was asked for.
    """

    logits: Array | None
    taps: dict[str, Array]
    router: RouterOutput | None = None


def rms_norm(x: Float[Array, "*B D"], weight: Float[Array, "D"], eps: float) -> Float[Array, "*B D"]:
    """`x` over its root mean square, times `weight`; float32 inside, the dtype of `x` outside."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return weight * wide.astype(x.dtype)


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


def _parameter(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype: jnp.dtype) -> nnx.Param:
    return nnx.Param((jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5).astype(dtype))


class Attention(nnx.Module):
    """The attention sublayer: pre-norm, grouped-query attention, output projection.

    Parameters carry a leading axis `[repeats]` while they are stacked, none inside the scan:
    norm [D], q [D, H, hd], k and v [D, K, hd], o [H, hd, D], and biases and q/k norms where the family has them:
    q_norm and k_norm [hd] (`head`), or [H, hd] and [K, hd] (`full`).
    """

    def __init__(self, config: ModelConfig, kind: BlockKind, repeats: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        depth, dim = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_heads, config.num_kv_heads
        self.config, self.kind = config, kind
        self.norm = nnx.Param(jnp.ones((repeats, depth), dtype))
        self.q = _parameter(rngs, (repeats, depth, heads, dim), depth, dtype)
        self.k = _parameter(rngs, (repeats, depth, kv_heads, dim), depth, dtype)
        self.v = _parameter(rngs, (repeats, depth, kv_heads, dim), depth, dtype)
        self.o = _parameter(rngs, (repeats, heads, dim, depth), heads * dim, dtype)
        if config.qkv_bias:
            self.q_bias = nnx.Param(jnp.zeros((repeats, heads, dim), dtype))
            self.k_bias = nnx.Param(jnp.zeros((repeats, kv_heads, dim), dtype))
            self.v_bias = nnx.Param(jnp.zeros((repeats, kv_heads, dim), dtype))
        if config.output_bias:
            self.o_bias = nnx.Param(jnp.zeros((repeats, depth), dtype))
        if config.qk_norm in ("head", "full"):
            full = config.qk_norm == "full"
            self.q_norm = nnx.Param(jnp.ones((repeats, heads, dim) if full else (repeats, dim), dtype))
            self.k_norm = nnx.Param(jnp.ones((repeats, kv_heads, dim) if full else (repeats, dim), dtype))

    def __call__(self, resid: Float[Array, "B T D"], context: BlockContext) -> Float[Array, "B T D"]:
        """What the sublayer adds to the residual stream."""
        return self.attend(rms_norm(resid, self.norm[...], self.config.norm_eps), context)

    def attend(self, x: Float[Array, "B T D"], context: BlockContext) -> Float[Array, "B T D"]:
        """The same, of the normed stream."""
        q, k, v = self._heads(x)
        if self.kind.rotary:
            q, k = (rotate(part, context.cos, context.sin, self.config.rope) for part in (q, k))
            if self.config.qk_norm == "l2":
                one = jnp.ones((), q.dtype)
                q, k = rms_norm(q, one, self.config.norm_eps), rms_norm(k, one, self.config.norm_eps)
        elif self.config.temperature is not None:
            q = (q * _temperature(self.config.temperature, context.positions)).astype(q.dtype)
        mixed = jax.nn.dot_product_attention(q, k, v, mask=attention_mask(context, self.kind))
        out = jnp.einsum("bthk,hkd->btd", mixed, self.o[...])
        return out + self.o_bias[...] if self.config.output_bias else out

    def _heads(self, x: Float[Array, "B T D"]) -> tuple[Array, Array, Array]:
        """Queries [B, T, H, hd], keys and values [B, T, K, hd], before the rotation."""
        config = self.config
        q = jnp.einsum("btd,dhk->bthk", x, self.q[...])
        k = jnp.einsum("btd,dhk->bthk", x, self.k[...])
        v = jnp.einsum("btd,dhk->bthk", x, self.v[...])
        if config.qkv_bias:
            q, k, v = q + self.q_bias[...], k + self.k_bias[...], v + self.v_bias[...]
        if config.qk_norm in ("head", "full"):
            norm = rms_norm if config.qk_norm == "head" else _norm_of_heads
            q, k = norm(q, self.q_norm[...], config.norm_eps), norm(k, self.k_norm[...], config.norm_eps)
        if config.clip_qkv is not None:
            q, k, v = (jnp.clip(part, -config.clip_qkv, config.clip_qkv) for part in (q, k, v))
        return q, k, v


def _norm_of_heads(x: Float[Array, "B T H hd"], weight: Float[Array, "H hd"], eps: float) -> Float[Array, "B T H hd"]:
    """`rms_norm` of all heads of a token together."""
    return rms_norm(x.reshape(*x.shape[:2], -1), weight.reshape(-1), eps).reshape(x.shape)


def _temperature(config: TemperatureConfig, positions: Int[Array, "B T"]) -> Float[Array, "B T 1 1"]:
    steps = jnp.floor((positions.astype(jnp.float32) + 1.0) / config.floor)
    return (1.0 + config.scale * jnp.log1p(steps))[..., None, None]


class Mlp(nnx.Module):
    """The gated MLP sublayer: pre-norm, `down(act(gate(x)) * up(x))`. norm [D], gate and up [D, F], down [F, D]."""

    def __init__(self, config: ModelConfig, repeats: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        depth, inner = config.hidden_size, config.intermediate_size
        self.config = config
        self.norm = nnx.Param(jnp.ones((repeats, depth), dtype))
        self.gate = _parameter(rngs, (repeats, depth, inner), depth, dtype)
        self.up = _parameter(rngs, (repeats, depth, inner), depth, dtype)
        self.down = _parameter(rngs, (repeats, inner, depth), inner, dtype)
        if config.mlp_bias:
            self.gate_bias = nnx.Param(jnp.zeros((repeats, inner), dtype))
            self.up_bias = nnx.Param(jnp.zeros((repeats, inner), dtype))
            self.down_bias = nnx.Param(jnp.zeros((repeats, depth), dtype))

    def __call__(self, resid: Float[Array, "B T D"], context: BlockContext) -> tuple[Float[Array, "B T D"], None]:
        """What the sublayer adds to the residual stream, and no routing."""
        x = rms_norm(resid, self.norm[...], self.config.norm_eps)
        gate, up = x @ self.gate[...], x @ self.up[...]
        if self.config.mlp_bias:
            gate, up = gate + self.gate_bias[...], up + self.up_bias[...]
        out = (ACTIVATIONS[self.config.activation](gate) * up) @ self.down[...]
        return out + self.down_bias[...] if self.config.mlp_bias else out, None


class Moe(nnx.Module):
    """The mixture-of-experts sublayer: pre-norm, routed experts, and a shared one where the family has it.

    norm [D], router [D, E], gate and up [E, D, F], down [E, F, D]; shared_gate and shared_up [D, S], shared_down
    [S, D], shared_router [D, 1]; router_bias [E], or in training several, [groups, E]: float32, without gradient.
    """

    def __init__(self, config: ModelConfig, moe: MoeConfig, repeats: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        depth, inner, shared = config.hidden_size, moe.expert_size, moe.shared_size
        self.config, self.moe = config, moe
        self.norm = nnx.Param(jnp.ones((repeats, depth), dtype))
        self.router = _parameter(rngs, (repeats, depth, moe.num_experts), depth, dtype)
        self.gate = _parameter(rngs, (repeats, moe.num_experts, depth, inner), depth, dtype)
        self.up = _parameter(rngs, (repeats, moe.num_experts, depth, inner), depth, dtype)
        self.down = _parameter(rngs, (repeats, moe.num_experts, inner, depth), inner, dtype)
        if moe.bias:
            self.router_bias = nnx.Param(jnp.zeros((repeats, moe.num_experts), jnp.float32))
        if shared:
            self.shared_gate = _parameter(rngs, (repeats, depth, shared), depth, dtype)
            self.shared_up = _parameter(rngs, (repeats, depth, shared), depth, dtype)
            self.shared_down = _parameter(rngs, (repeats, shared, depth), shared, dtype)
        if moe.shared_gate:
            self.shared_router = _parameter(rngs, (repeats, depth, 1), depth, dtype)

    def __call__(
        self, resid: Float[Array, "B T D"], context: BlockContext
    ) -> tuple[Float[Array, "B T D"], RouterOutput]:
        """What the sublayer adds to the residual stream, and the routing."""
        moe, activation = self.moe, ACTIVATIONS[self.config.activation]
        x = rms_norm(resid, self.norm[...], self.config.norm_eps)
        if moe.jitter and context.noise is not None:
            x = x * _jitter(context.noise, x.shape[1:], moe.jitter).astype(x.dtype)
        router = route(self._logits(x), self._bias(context), moe)
        of_rows = jax.vmap(lambda ids, real: expert_load(ids, real, moe.num_experts))
        router = router._replace(counts=of_rows(router.ids, context.segment_ids > 0))
        out = apply_experts(
            Experts(self.gate[...], self.up[...], self.down[...]),
            x,
            router.ids,
            router.weights,
            activation,
            way=self.config.experts,
            weighs_input=moe.scores == "sigmoid_input",
        )
        if moe.shared_size:
            shared = (activation(x @ self.shared_gate[...]) * (x @ self.shared_up[...])) @ self.shared_down[...]
            out = out + (jax.nn.sigmoid(x @ self.shared_router[...]) * shared if moe.shared_gate else shared)
        return out, router

    def _logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        if self.moe.float32_router:
            return x.astype(jnp.float32) @ self.router[...].astype(jnp.float32)
        return x @ self.router[...]

    def _bias(self, context: BlockContext) -> Array | None:
        if not self.moe.bias:
            return None
        bias = jax.lax.stop_gradient(self.router_bias[...])
        return bias if context.bias_groups is None else bias[context.bias_groups][:, None]


def _jitter(keys: Array, shape: tuple[int, ...], width: float) -> Float[Array, "B T D"]:
    """Noise of every row by its own key, so that it does not depend on how a batch is cut."""
    return jax.vmap(lambda key: jax.random.uniform(key, shape, minval=1.0 - width, maxval=1.0 + width))(keys)


class Block(nnx.Module):
    """One decoder layer: attention sublayer, then MLP sublayer or mixture of experts."""

    def __init__(self, config: ModelConfig, kind: BlockKind, repeats: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.attention = Attention(config, kind, repeats, dtype, rngs)
        if kind.moe and config.moe is None:
            raise ValueError("a block has experts, and the config says nothing of them")
        self.mlp = (
            Moe(config, config.moe, repeats, dtype, rngs)
            if kind.moe and config.moe is not None
            else Mlp(config, repeats, dtype, rngs)
        )


class Group(nnx.Module):
    """The blocks of one layer group: a stacked `Block` for each kind of the pattern."""

    def __init__(self, config: ModelConfig, group: LayerGroup, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.repeats = group.repeats
        self.blocks = nnx.List([Block(config, kind, group.repeats, dtype, rngs) for kind in group.pattern])


type_of_emit = Callable[[Any, BlockOutput, Array], tuple[Any, Any]]
BodyWrap = Callable[[Callable[..., Any]], Callable[..., Any]]


class Decoder(nnx.Module):
    """A decoder-only language model. embed [V, D], final_norm [D], head [D, V] unless tied to the embeddings."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype | str = jnp.float32, rngs: nnx.Rngs | None = None):
        dtype, rngs = jnp.dtype(dtype), rngs or nnx.Rngs(0)
        self.config = config
        self.embed = _parameter(rngs, (config.vocab_size, config.hidden_size), config.hidden_size, dtype)
        self.groups = nnx.List([Group(config, group, dtype, rngs) for group in config.layers])
        self.final_norm = nnx.Param(jnp.ones((config.hidden_size,), dtype))
        if not config.tie_embeddings:
            self.head = _parameter(rngs, (config.hidden_size, config.vocab_size), config.hidden_size, dtype)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        taps: tuple[str, ...] = (),
        logits: bool = True,
        router: bool = False,
    ) -> DecoderOutput:
        """The forward pass. Without positions and segments, each row is one document from its first token.

        Args:
            router: the routing of the blocks with experts is wanted.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)

        def emit(carry: None, out: BlockOutput, _: Array) -> tuple[None, dict[str, Any]]:
            kept = {name: getattr(out, name) for name in taps}
            return carry, kept | ({"router": out.router} if router and out.router is not None else {})

        context = self.context(positions, segment_ids)
        last, _, stacks = self.scan_blocks(self.embed_tokens(tokens), context, emit, None)
        if "resid" in taps:
            stacks["resid"] = jnp.concatenate([stacks["resid"], last[None]])
        found = stacks.pop("router", None)
        return DecoderOutput(self.logits(last) if logits else None, stacks, found)

    def embed_tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The residual stream that enters block 0."""
        return self.embed[...][tokens]

    def context(self, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> BlockContext:
        """What the blocks share; computed once, outside the scan."""
        return block_context(self.config, positions, segment_ids)

    def logits(self, resid: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Next-token logits from the stream that leaves the last block."""
        return logits_of(self.config, self.final_norm[...], self.head_matrix, resid)

    @property
    def head_matrix(self) -> Float[Array, "D V"]:
        """What the last norm's output is multiplied with."""
        return self.embed[...].T if self.config.tie_embeddings else self.head[...]

    def scan_blocks(
        self,
        x: Float[Array, "B T D"],
        context: BlockContext,
        emit: type_of_emit,
        carry: Any,
        *,
        skip_last_mlp: bool = False,
        wrap: BodyWrap | None = None,
    ) -> tuple[Float[Array, "B T D"], Any, Any]:
        """Run every block on the stream of the one before it.

        Args:
            x: the stream that enters block 0.
            emit: `(carry, BlockOutput, l) -> (carry, y)`, called in every block; what a caller wants kept, already
                in the form in which it is kept, so that no wider stack ever exists.
            carry: what `emit` hands on from block to block.
            skip_last_mlp: leave out the last block's MLP; its `mlp_out` is zeros.
            wrap: around the scan's body, `((x, carry), (a repeat's parameters, l)) -> ...`: to have the backward pass
                compute some of it again, or to say where on a mesh these lie.

        Returns:
            the stream that leaves the last block, the last carry, and the `y` of all blocks stacked on axis 0; where
            `y` is a dict, each of its keys is stacked over the blocks that have it.
        """
        last = self.config.num_blocks - 1

        def run_block(block: Block, x: Array, carry: Any, index: Array, may_skip: bool) -> tuple[Array, Any, Any]:
            attn_out = block.attention(x, context)
            middle, own = x + attn_out, context_of_block(context, index)
            if may_skip:
                mlp_out, router = jax.lax.cond(index == last, _zeros_like(block.mlp), block.mlp, middle, own)
            else:
                mlp_out, router = block.mlp(middle, own)
            carry, y = emit(carry, BlockOutput(x, attn_out, mlp_out, router), index)
            return middle + mlp_out, carry, y

        stacks: list[tuple[Any, ...]] = []
        start = 0
        for number, group in enumerate(self.groups):
            size = len(group.blocks)
            graph, parameters = nnx.split(group)
            ends = skip_last_mlp and number == len(self.groups) - 1

            def body(
                state: tuple[Array, Any],
                step: tuple[Any, Array],
                graph: Any = graph,
                skipped: int | None = size - 1 if ends else None,
            ) -> Any:
                x, carry = state
                sliced, first = step
                outputs = []
                for place, block in enumerate(nnx.merge(graph, sliced).blocks):
                    x, carry, y = run_block(block, x, carry, first + place, place == skipped)
                    outputs.append(y)
                return (x, carry), tuple(outputs)

            firsts = start + size * jnp.arange(group.repeats)
            (x, carry), ys = jax.lax.scan(wrap(body) if wrap else body, (x, carry), (parameters, firsts))
            stacks.append(ys)
            start += size * group.repeats
        return x, carry, _in_block_order(stacks)


def logits_of(
    config: ModelConfig, norm: Float[Array, "D"], head: Float[Array, "D V"], resid: Float[Array, "B T D"]
) -> Float[Array, "B T V"]:
    """Next-token logits of a stream by the last norm's weights and the head."""
    return rms_norm(resid, norm, config.norm_eps) @ (_normed_head(head) if config.norm_head else head)


def _normed_head(head: Float[Array, "D V"]) -> Float[Array, "D V"]:
    """Each hidden number's weights over their norm, in float32. Source: Ling's code, after Baichuan 2."""
    wide = head.astype(jnp.float32)
    norm = jax.lax.stop_gradient(jnp.linalg.norm(wide, axis=1, keepdims=True))
    return (wide / (norm + 1e-7)).astype(head.dtype)


def block_context(config: ModelConfig, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> BlockContext:
    """What the blocks of a decoder share; computed once, outside the scan."""
    cos, sin = rope_tables(config.rope, config.head_dim, positions, config.max_positions)
    return BlockContext(cos, sin, segment_ids, positions)


def context_of_block(context: BlockContext, index: Array) -> BlockContext:
    """The context with noise of the block's own."""
    if context.noise is None:
        return context
    return context._replace(noise=jax.vmap(jax.random.fold_in, (0, None))(context.noise, index))


def _zeros_like(sublayer: Callable[..., Any]) -> Callable[..., Any]:
    """A function that returns zeros where `sublayer` returns what it computes."""

    def zeros(*args: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(sublayer, *args))

    return zeros


def _in_block_order(groups: list[tuple[Any, ...]]) -> Any:
    """What the places of every group's pattern returned, `[repeats, ...]` each, as stacks over the blocks in order."""
    if not isinstance(groups[0][0], dict):
        return _joined(groups)
    names = dict.fromkeys(name for places in groups for y in places for name in y)
    having = {name: [tuple(y[name] for y in places if name in y) for places in groups] for name in names}
    return {name: _joined([places for places in found if places]) for name, found in having.items()}


def _joined(groups: list[tuple[Any, ...]]) -> Any:
    def stack(*of_places: Array) -> Array:
        return jnp.stack(of_places, axis=1).reshape(-1, *of_places[0].shape[1:])

    stacked = [jax.tree.map(stack, *places) for places in groups]
    return stacked[0] if len(stacked) == 1 else jax.tree.map(lambda *ys: jnp.concatenate(ys), *stacked)
