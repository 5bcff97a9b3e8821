"""The decoder: stacked parameters, blocks scanned over their repeats, taps as return values.

One code path serves as teacher (recorder.py), as student (trainer/step/program.py) and for evaluation. The parameters
of equal blocks are stacked on a leading axis and scanned, so compile time does not grow with depth.

Source: LLaMA (arXiv 2302.13971), as HF transformers computes it: RMSNorm in float32, rotary embedding on halves,
grouped-query attention, gated MLP; what other families add is said where it is done.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from distillcache.models.config import BlockKind, Kernel, LayerGroup, ModelConfig
from distillcache.models.layers.attention import Attention
from distillcache.models.layers.context import BlockContext, Taken, block_context, context_of_block
from distillcache.models.layers.latent_attention import LatentAttention
from distillcache.models.layers.mixers import mixer_of
from distillcache.models.layers.mlp import Mlp, Moe, NoMlp
from distillcache.models.layers.norm import norm_weight, parameter, rms_norm, softcap
from distillcache.models.layers.sublayer import TokenMixer, pre_norm, second_input
from distillcache.models.routing import RouterOutput


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

    router: `RouterOutput` stacked over the blocks with experts (`ModelConfig.moe_blocks`), where it was requested.
    """

    logits: Array | None
    taps: dict[str, Array]
    router: RouterOutput | None = None


class Block(nnx.Module):
    """One decoder layer: a mixer of tokens, then MLP sublayer or mixture of experts; one of them may be missing.

    The first is `attention` whatever mixes: names of parameters and taps do not depend on it.
    """

    def __init__(self, config: ModelConfig, kind: BlockKind, repeats: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.attention = mixer_of(config, kind, repeats, dtype, rngs)
        if kind.moe and config.moe is None:
            raise ValueError("a block has experts, and the config says nothing of them")
        self.mlp = (
            Moe(config, config.moe, kind, repeats, dtype, rngs)
            if kind.moe and config.moe is not None
            else Mlp(config, kind, repeats, dtype, rngs)
            if kind.mlp
            else NoMlp()
        )


class Group(nnx.Module):
    """The blocks of one layer group: a stacked `Block` for each kind of the pattern."""

    def __init__(self, config: ModelConfig, group: LayerGroup, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.repeats = group.repeats
        self.blocks = nnx.List([Block(config, kind, group.repeats, dtype, rngs) for kind in group.pattern])


Kept = Taken | Array  # keys and values that blocks take over, or which keys were chosen
type_of_emit = Callable[[Any, BlockOutput, Array], tuple[Any, Any]]
BodyWrap = Callable[[Callable[..., Any]], Callable[..., Any]]
# `(group's number, its stacked parameters) -> (what the scan slices, a slice -> a repeat's parameters)`.
Adapt = Callable[[int, nnx.State], tuple[Any, Callable[[Any], nnx.State]]]


class Decoder(nnx.Module):
    """A decoder-only language model. embed [V, D], final_norm [D], head [D, V] unless tied to the embeddings; with
    `ModelConfig.block_inputs` block_embed [V, L P], block_projection [D, L P] and block_norm [P]."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype | str = jnp.float32, rngs: nnx.Rngs | None = None):
        dtype, rngs = jnp.dtype(dtype), rngs or nnx.Rngs(0)
        self.config = config
        self.embed = parameter(rngs, (config.vocab_size, config.hidden_size), config.hidden_size, dtype)
        self.groups = nnx.List([Group(config, group, dtype, rngs) for group in config.layers])
        self.final_norm = norm_weight((config.hidden_size,), config, dtype)
        if not config.tie_embeddings:
            self.head = parameter(rngs, (config.hidden_size, config.vocab_size), config.hidden_size, dtype)
        if (inputs := config.block_inputs) is not None:
            width = config.num_blocks * inputs.width
            self.block_embed = parameter(rngs, (inputs.vocab_size, width), inputs.width, dtype)
            self.block_projection = parameter(rngs, (config.hidden_size, width), config.hidden_size, dtype)
            self.block_norm = norm_weight((inputs.width,), config, dtype)

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

        context = self.context(positions, segment_ids, tokens)
        last, _, stacks = self.scan_layers(self.embed_tokens(tokens), context, emit, None)
        if "resid" in taps:
            stacks["resid"] = jnp.concatenate([stacks["resid"], last[None]])
        found = stacks.pop("router", None)
        return DecoderOutput(self.logits(last) if logits else None, stacks, found)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of parameters and of computation."""
        return self.embed[...].dtype

    def embed_tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The residual stream that enters block 0."""
        found = self.embed[...][tokens]
        scale = self.config.embed_scale
        if self.config.embed_scale_rounded:
            return found * jnp.asarray(scale, found.dtype)
        return found if scale == 1 else (found.astype(jnp.float32) * scale).astype(found.dtype)

    def context(
        self, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"], tokens: Int[Array, "B T"] | None = None
    ) -> BlockContext:
        """Compute the inputs that the blocks share; once, outside the scan.

        Args:
            tokens: needed where blocks have inputs of their own.
        """
        context = block_context(self.config, positions, segment_ids)
        if self.config.block_inputs is None:
            return context
        if tokens is None:
            raise ValueError("blocks have inputs of their own, which are made of the tokens")
        return context._replace(inputs=self._block_inputs(tokens))

    def _block_inputs(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T L P"]:
        """Half a token's own vectors, half made of its embedding; float32 inside, rounded once."""
        config, found = self.config, self.block_embed[...][tokens]
        width = self.block_norm[...].shape[-1]
        own = (found * jnp.asarray(width**0.5, found.dtype)).astype(jnp.float32)
        made = (self.embed_tokens(tokens) @ self.block_projection[...]).astype(jnp.float32) * config.hidden_size**-0.5
        own, made = (part.reshape(*tokens.shape, config.num_blocks, width) for part in (own, made))
        made = rms_norm(made, self.block_norm[...], config.norm_eps, product=config.norm_product)
        return ((made + own) * 2**-0.5).astype(found.dtype)

    def logits(self, resid: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Next-token logits from the stream that leaves the last block."""
        return logits_of(self.config, self.final_norm[...], self.head_matrix, resid)

    @property
    def head_matrix(self) -> Float[Array, "D V"]:
        """Return the matrix that the last norm's output is multiplied with."""
        return self.embed[...].T if self.config.tie_embeddings else self.head[...]

    def scan_layers(
        self,
        x: Float[Array, "B T D"],
        context: BlockContext,
        emit: type_of_emit,
        carry: Any,
        *,
        skip_last_mlp: bool = False,
        wrap: BodyWrap | None = None,
        adapt: Adapt | None = None,
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
            adapt: makes a repeat's parameters inside the body, of whatever it has the scan slice.

        Returns:
            the stream that leaves the last block, the last carry, and the `y` of all blocks stacked on axis 0; where
            `y` is a dict, each of its keys is stacked over the blocks that have it.
        """
        last = self.config.num_blocks - 1

        def run_block(block: Block, x: Array, carry: Any, index: Array, may_skip: bool) -> tuple[Array, Any, Any]:
            carry, kept = carry
            attn_out, kept = _attend(block.attention, x, context, kept)
            middle, own = x + attn_out, context_of_block(context, index)
            given = second_input(block.attention, x, middle)
            if may_skip:
                mlp_out, router = jax.lax.cond(index == last, _zeros_like(block.mlp), block.mlp, given, own)
            else:
                mlp_out, router = block.mlp(given, own)
            carry, y = emit(carry, BlockOutput(x, attn_out, mlp_out, router), index)
            return (middle + mlp_out).astype(x.dtype), (carry, kept), y

        stacks: list[tuple[Any, ...]] = []
        start, carry = 0, (carry, _nothing_kept(self.config, x))
        for number, group in enumerate(self.groups):
            size = len(group.blocks)
            graph, parameters = nnx.split(group)
            sliced_of, used = (parameters, _as_it_is) if adapt is None else adapt(number, parameters)
            ends = skip_last_mlp and number == len(self.groups) - 1

            def body(
                state: tuple[Array, Any],
                step: tuple[Any, Array],
                graph: Any = graph,
                skipped: int | None = size - 1 if ends else None,
                used: Callable[[Any], nnx.State] = used,
            ) -> Any:
                x, carry = state
                sliced, first = step
                outputs = []
                for place, block in enumerate(nnx.merge(graph, used(sliced)).blocks):
                    x, carry, y = run_block(block, x, carry, first + place, place == skipped)
                    outputs.append(y)
                return (x, carry), tuple(outputs)

            firsts = start + size * jnp.arange(group.repeats)
            (x, carry), ys = jax.lax.scan(wrap(body) if wrap else body, (x, carry), (sliced_of, firsts))
            stacks.append(ys)
            start += size * group.repeats
        return x, carry[0], _in_block_order(stacks)


def _nothing_kept(config: ModelConfig, x: Float[Array, "B T D"]) -> Kept | None:
    """Zeros in the shapes of what is kept for later blocks; None where nothing is."""
    index = None if config.latent is None else config.latent.index
    if config.takes_choices and index is not None and x.shape[1] > index.top_k:
        return jnp.zeros((*x.shape[:2], x.shape[1]), bool)
    if not config.takes_keys:
        return None
    plain, wide = (
        jnp.zeros((*x.shape[:2], *config.heads_of(kind)), x.dtype) for kind in (BlockKind(), BlockKind(wide=True))
    )
    return (plain, plain), (wide, wide)


def _attend(
    mixer: TokenMixer, x: Float[Array, "B T D"], context: BlockContext, kept: Kept | None
) -> tuple[Array, Kept | None]:
    """Return the addition of a block's mixer, and what later blocks may take over: the keys and values of the last
    block of each width that has some, which XLA computes once, or the choice of keys of the last one that chose."""
    if kept is None:
        return mixer(x, context), None
    if not isinstance(kept, tuple):
        if isinstance(mixer, LatentAttention) and not mixer.kind.taken_choice:
            kept = mixer.choice(pre_norm(mixer, x), context)
        return mixer(x, context._replace(choice=kept)), kept
    out = mixer(x, context._replace(taken=kept))
    if mixer.kind.taken or not isinstance(mixer, Attention):
        return out, kept
    made = mixer.keys_values(pre_norm(mixer, x), context)
    return out, (kept[0], made) if mixer.kind.wide else (made, kept[1])


@functools.lru_cache(maxsize=64)
def abstract_decoder(
    config: ModelConfig, dtype: jnp.dtype | str = "float32"
) -> tuple[nnx.GraphDef[Decoder], nnx.State]:
    """The structure of a decoder of this config, and its parameters' shapes and dtypes without their values.

    Kept: finding it traces every parameter's initialisation. All callers share the state, so none may change it.
    """
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, dtype=dtype)))


def with_attention(decoder: Decoder, kernel: Kernel) -> Decoder:
    """The same decoder, its attention computed by this kernel; the parameters are shared."""
    if decoder.config.attention == kernel:
        return decoder
    graph, _ = abstract_decoder(replace(decoder.config, attention=kernel), decoder.dtype)
    return nnx.merge(graph, nnx.state(decoder))


def logits_of(
    config: ModelConfig, norm: Float[Array, " D"], head: Float[Array, "D V"], resid: Float[Array, "B T D"]
) -> Float[Array, "B T V"]:
    """Next-token logits of a stream by the last norm's weights and the head."""
    x = rms_norm(resid, norm, config.norm_eps, product=config.norm_product)
    found = x @ (normed_head(head) if config.norm_head else head)
    if config.logits_divisor != 1:
        found = found / config.logits_divisor
    return found if config.logits_softcap is None else softcap(found, config.logits_softcap)


def normed_head(head: Float[Array, "D V"]) -> Float[Array, "D V"]:
    """Each hidden number's weights over their norm, in float32. Source: Ling's code, after Baichuan 2."""
    wide = head.astype(jnp.float32)
    norm = jax.lax.stop_gradient(jnp.linalg.norm(wide, axis=1, keepdims=True))
    return (wide / (norm + 1e-7)).astype(head.dtype)


def _as_it_is(parameters: nnx.State) -> nnx.State:
    return parameters


def _zeros_like(sublayer: Callable[..., Any]) -> Callable[..., Any]:
    """A function that returns zeros where `sublayer` returns what it computes."""

    def zeros(*args: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(sublayer, *args))

    return zeros


def _in_block_order(groups: list[tuple[Any, ...]]) -> Any:
    """Stack what the positions of every group's pattern returned, `[repeats, ...]` each, over the blocks in order."""
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
