"""The second sublayer of a block: a gated MLP, or a mixture of experts."""

import math
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from distillcache.models.config import BlockKind, ClampedGlu, ModelConfig, MoeConfig
from distillcache.models.layers.context import BlockContext
from distillcache.models.layers.experts import Experts, Gating, apply_experts, gated
from distillcache.models.layers.norm import norm_weight, parameter, rms_norm
from distillcache.models.layers.sublayer import Sublayer, add_norms, post_norm, pre_norm
from distillcache.models.routing import RouterOutput, expert_load, route

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def xielu(
    x: Float[Array, "*B"],
    positive: Float[Array, "#1"],
    negative: Float[Array, "#1"],
    linear: Float[Array, ""],
    edge: Float[Array, ""],
) -> Float[Array, "*B"]:
    """A parabola to the right of zero and the integral of an exponential to its left, with the same slope there.

    Args:
        positive, negative: how fast both bend, before a softplus, so that they stay positive. linear: the slope at
            zero. edge: just below it, where the exponential ends.

    Source: xIELU (arXiv 2411.13010), as HF transformers computes it.
    """
    right = jax.nn.softplus(positive) * jnp.square(x)
    left = (linear + jax.nn.softplus(negative)) * (jnp.expm1(jnp.minimum(x, edge)) - x)
    return jnp.where(x > 0, right, left) + linear * x


def _of_small_numbers(activation: str) -> Callable[[Array], Array]:
    """The activation where a norm follows, which makes what is small as large as the rest: of `1 + tanh` no digits are
    left there, of the same as a sigmoid all."""
    if activation != "gelu_tanh":
        return ACTIVATIONS[activation]
    return lambda x: x * jax.nn.sigmoid(2 * (2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))


class LastSublayer(Sublayer, Protocol):
    """A block's last sublayer. block_scale [1], and block_gate [D, P], block_up [P, D] and block_post_norm [D] exist if
    the config has `block_scale` and `block_inputs`."""

    block_scale: nnx.Param
    block_gate: nnx.Param
    block_up: nnx.Param
    block_post_norm: nnx.Param


def add_block_end(sublayer: LastSublayer, repeats: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
    """Give a sublayer the parameters of what a block does behind it."""
    config = sublayer.config
    if config.block_scale:
        sublayer.block_scale = nnx.Param(jnp.ones((repeats, 1), dtype))
    if config.block_inputs is not None:
        depth, width = config.hidden_size, config.block_inputs.width
        sublayer.block_gate = parameter(rngs, (repeats, depth, width), depth, dtype)
        sublayer.block_up = parameter(rngs, (repeats, width, depth), width, dtype)
        sublayer.block_post_norm = norm_weight((repeats, depth), config, dtype)


def leaving(
    sublayer: LastSublayer, resid: Float[Array, "B T D"], out: Float[Array, "B T D"], context: BlockContext
) -> Float[Array, "B T D"]:
    """Compute all that is added to the stream that enters a block's last sublayer, of what this adds: with the block's
    own input, and so that what leaves the block is scaled. Then it is float32, so that the sum is rounded once."""
    config = sublayer.config
    if not config.block_scale and config.block_inputs is None:
        return out
    wide = resid.astype(jnp.float32)
    if config.block_inputs is not None:
        if context.inputs is None:
            raise ValueError("blocks have inputs of their own, and there are none")
        gate = _of_small_numbers(config.activation)((wide + out).astype(resid.dtype) @ sublayer.block_gate[...])
        more = ((gate * context.inputs) @ sublayer.block_up[...]).astype(jnp.float32)
        out = out + rms_norm(more, sublayer.block_post_norm[...], config.norm_eps, product=config.norm_product)
    return sublayer.block_scale[...].astype(jnp.float32) * (wide + out) - wide if config.block_scale else out


def _own_input(sublayer: LastSublayer, resid: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Compute the input; a sublayer whose norm is the mixer's is given it normed (`second_input`)."""
    return resid if sublayer.config.norms == "shared" else pre_norm(sublayer, resid)


class NoMlp(nnx.Module):
    """The place of an MLP in a block that has none: it adds zeros."""

    def __call__(self, resid: Float[Array, "B T D"], context: BlockContext) -> tuple[Float[Array, "B T D"], None]:
        """See `Mlp`."""
        return jnp.zeros_like(resid), None


class Mlp(nnx.Module):
    """The MLP sublayer: `down(act(gate(x)) * up(x))`, or without a gate `down(act(up(x)))`. norm and post_norm [D],
    gate and up [D, F], down [F, D]; of the activation `xielu` positive_scale and negative_scale [1], and linear_scale
    and edge_scale [], which have no gradient."""

    norm: nnx.Param
    post_norm: nnx.Param
    block_scale: nnx.Param
    block_gate: nnx.Param
    block_up: nnx.Param
    block_post_norm: nnx.Param

    def __init__(self, config: ModelConfig, kind: BlockKind, repeats: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        depth, inner = config.hidden_size, config.mlp_width(kind)
        self.config, self.kind = config, kind
        if config.norms != "shared":
            add_norms(self, repeats, dtype)
        if config.mlp_gated:
            self.gate = parameter(rngs, (repeats, depth, inner), depth, dtype)
        self.up = parameter(rngs, (repeats, depth, inner), depth, dtype)
        self.down = parameter(rngs, (repeats, inner, depth), inner, dtype)
        if config.mlp_bias:
            if config.mlp_gated:
                self.gate_bias = nnx.Param(jnp.zeros((repeats, inner), dtype))
            self.up_bias = nnx.Param(jnp.zeros((repeats, inner), dtype))
            self.down_bias = nnx.Param(jnp.zeros((repeats, depth), dtype))
        if config.activation == "xielu":
            self.positive_scale = nnx.Param(jnp.zeros((repeats, 1), dtype))
            self.negative_scale = nnx.Param(jnp.zeros((repeats, 1), dtype))
            self.linear_scale = nnx.Param(jnp.full((repeats,), 0.5, dtype))
            self.edge_scale = nnx.Param(jnp.full((repeats,), -1e-6, dtype))
        add_block_end(self, repeats, dtype, rngs)

    def __call__(self, resid: Float[Array, "B T D"], context: BlockContext) -> tuple[Float[Array, "B T D"], None]:
        """Return the sublayer's contribution to the residual stream, and no routing."""
        out, bias = self.hidden(resid) @ self.down[...], self.down_bias[...] if self.config.mlp_bias else None
        if (factors := self.config.multipliers) is not None:
            out, bias = out * factors.down, bias if bias is None else bias * factors.down
        out = post_norm(self, out, bias)
        return leaving(self, resid, out, context), None

    def hidden(self, resid: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        """Return the neurons' output, the input of the output projection."""
        x = _own_input(self, resid)
        config, gate = self.config, x @ self.gate[...] if self.config.mlp_gated else None
        gate_bias = self.gate_bias[...] if config.mlp_bias and config.mlp_gated else None
        up_bias = self.up_bias[...] if config.mlp_bias else None
        factor = 1.0 if config.multipliers is None else config.multipliers.gate
        gating = _gating(self._activation(), config.mlp_gated, factor=factor)
        return gated(gating, gate, x @ self.up[...], gate_bias, up_bias)

    def _activation(self) -> Callable[[Array], Array]:
        if self.config.activation != "xielu":
            return ACTIVATIONS[self.config.activation]
        learned = [number[...].astype(jnp.float32) for number in (self.positive_scale, self.negative_scale)]
        fixed = [jax.lax.stop_gradient(n[...].astype(jnp.float32)) for n in (self.linear_scale, self.edge_scale)]
        return lambda x: xielu(x, *learned, *fixed)


class Moe(nnx.Module):
    """The mixture-of-experts sublayer: routed experts, and a shared one where the family has it.

    norm and post_norm [D], router [D, E], gate and up [E, D, F], down [E, F, D]; where the family has them logit_bias
    [E], gate_bias and up_bias [E, F], down_bias [E, D];
    shared_gate and shared_up [D, S], shared_down [S, D], shared_router [D, 1]; router_bias [E], or in training several,
    [groups, E]: float32, without gradient; with `MoeConfig.apart` router_norm, shared_post_norm, expert_norm and
    expert_post_norm [D] and expert_scale [E]; with `MoeConfig.latent` latent_in [D, Q] and latent_out [Q, D], and
    experts of Q in the place of D.

    routing: the parameters that a loss on the routing has a gradient for. by_rule: those that a rule moves instead.
    """

    routing = ("norm", "router", "logit_bias", "router_norm")
    by_rule = ("router_bias",)
    norm: nnx.Param
    post_norm: nnx.Param
    block_scale: nnx.Param
    block_gate: nnx.Param
    block_up: nnx.Param
    block_post_norm: nnx.Param

    def __init__(
        self, config: ModelConfig, moe: MoeConfig, kind: BlockKind, repeats: int, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        depth, inner, shared = config.hidden_size, moe.expert_size, moe.shared_size
        self.config, self.moe, self.kind = config, moe, kind
        if config.norms != "shared":
            add_norms(self, repeats, dtype)
        self.router = parameter(rngs, (repeats, depth, moe.num_experts), depth, dtype)
        width = depth if moe.latent is None else moe.latent
        if config.mlp_gated:
            self.gate = parameter(rngs, (repeats, moe.num_experts, width, inner), width, dtype)
        self.up = parameter(rngs, (repeats, moe.num_experts, width, inner), width, dtype)
        self.down = parameter(rngs, (repeats, moe.num_experts, inner, width), inner, dtype)
        if moe.latent is not None:
            self.latent_in = parameter(rngs, (repeats, depth, width), depth, dtype)
            self.latent_out = parameter(rngs, (repeats, width, depth), width, dtype)
        if moe.logit_bias:
            self.logit_bias = nnx.Param(jnp.zeros((repeats, moe.num_experts), dtype))
        if moe.expert_bias:
            self.gate_bias = nnx.Param(jnp.zeros((repeats, moe.num_experts, inner), dtype))
            self.up_bias = nnx.Param(jnp.zeros((repeats, moe.num_experts, inner), dtype))
            self.down_bias = nnx.Param(jnp.zeros((repeats, moe.num_experts, depth), dtype))
        if moe.bias:
            self.router_bias = nnx.Param(jnp.zeros((repeats, moe.num_experts), jnp.float32))
        if shared:
            if config.mlp_gated:
                self.shared_gate = parameter(rngs, (repeats, depth, shared), depth, dtype)
            self.shared_up = parameter(rngs, (repeats, depth, shared), depth, dtype)
            self.shared_down = parameter(rngs, (repeats, shared, depth), shared, dtype)
        if moe.shared_gate:
            self.shared_router = parameter(rngs, (repeats, depth, 1), depth, dtype)
        if moe.apart:
            self.router_norm = norm_weight((repeats, depth), config, dtype)
            self.shared_post_norm = norm_weight((repeats, depth), config, dtype)
            self.expert_norm = norm_weight((repeats, depth), config, dtype)
            self.expert_post_norm = norm_weight((repeats, depth), config, dtype)
            self.expert_scale = nnx.Param(jnp.ones((repeats, moe.num_experts), dtype))
        add_block_end(self, repeats, dtype, rngs)

    def __call__(
        self, resid: Float[Array, "B T D"], context: BlockContext
    ) -> tuple[Float[Array, "B T D"], RouterOutput]:
        """Return the sublayer's contribution to the residual stream, and the routing."""
        moe, activation = self.moe, ACTIVATIONS[self.config.activation]
        x = _own_input(self, resid)
        if moe.jitter and context.noise is not None:
            x = x * _jitter(context.noise, x.shape[1:], moe.jitter).astype(x.dtype)
        router = route(self._logits(self._routed(resid, x)), self._bias(context), moe)
        if moe.apart:
            router = router._replace(weights=router.weights * self.expert_scale[...].astype(jnp.float32)[router.ids])
        of_rows = jax.vmap(lambda ids, real: expert_load(ids, real, moe.num_experts))
        router = router._replace(counts=of_rows(router.ids, context.segment_ids > 0))
        given = self._normed(resid, self.expert_norm[...]) if moe.apart else x
        out = apply_experts(
            self._experts(),
            given if moe.latent is None else given @ self.latent_in[...],
            router.ids,
            router.weights,
            _gating(activation, self.config.mlp_gated, moe.clamped),
            way=self.config.experts,
            weighs_input=moe.scores == "sigmoid_input",
        )
        if moe.latent is not None:
            out = out @ self.latent_out[...]
        if moe.shared_size:
            gate = x @ self.shared_gate[...] if self.config.mlp_gated else None
            hidden = gated(_gating(activation, self.config.mlp_gated), gate, x @ self.shared_up[...])
            shared = (hidden @ self.shared_down[...]).astype(jnp.float32)
            if moe.shared_gate:
                shared = jax.nn.sigmoid((x @ self.shared_router[...]).astype(jnp.float32)) * shared
            if moe.apart:
                out = self._normed(out.astype(jnp.float32), self.expert_post_norm[...])
                shared = self._normed(shared, self.shared_post_norm[...])
            out = (out + shared).astype(x.dtype)
        return leaving(self, resid, post_norm(self, out), context), router

    def _normed(self, x: Float[Array, "B T D"], weight: Float[Array, " D"]) -> Float[Array, "B T D"]:
        return rms_norm(x, weight, self.config.norm_eps, product=self.config.norm_product)

    def _routed(self, resid: Float[Array, "B T D"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The router's input: that of the experts, or the stream under a norm of its own over the root of its width."""
        if not self.moe.apart:
            return x
        weight = self.router_norm[...].astype(jnp.float32) * self.config.hidden_size**-0.5
        return rms_norm(resid, weight, self.config.norm_eps)

    def _experts(self) -> Experts:
        matrices = (self.gate[...] if self.config.mlp_gated else None, self.up[...], self.down[...])
        if not self.moe.expert_bias:
            return Experts(*matrices)
        return Experts(*matrices, self.gate_bias[...], self.up_bias[...], self.down_bias[...])

    def _logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        router = self.router[...]
        if self.moe.float32_router:
            x, router = x.astype(jnp.float32), router.astype(jnp.float32)
        return x @ router + self.logit_bias[...] if self.moe.logit_bias else x @ router

    def _bias(self, context: BlockContext) -> Array | None:
        if not self.moe.bias:
            return None
        bias = jax.lax.stop_gradient(self.router_bias[...])
        return bias if context.bias_groups is None else bias[context.bias_groups][:, None]


def _gating(
    activation: Callable[[Array], Array], has_gate: bool, clamped: ClampedGlu | None = None, factor: float = 1.0
) -> Gating:
    """Gate and up of an MLP or an expert to its neurons. factor: on the gate."""
    if not has_gate:
        return lambda _, up: activation(up)
    if clamped is None:
        return lambda gate, up: activation(gate if factor == 1 else gate * factor) * up
    limit, alpha = clamped.limit, clamped.alpha

    def cut(gate: Array, up: Array) -> Array:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return (up + 1) * gate * jax.nn.sigmoid(alpha * gate)

    return cut


def _jitter(keys: Array, shape: tuple[int, ...], width: float) -> Float[Array, "B T D"]:
    """Noise of every row by its own key, so that it does not depend on how a batch is cut."""
    return jax.vmap(lambda key: jax.random.uniform(key, shape, minval=1.0 - width, maxval=1.0 + width))(keys)
