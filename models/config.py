"""Definition of a decoder, independent of the source of its weights.

A decoder's layers are a *plan*: a list of groups, each a pattern of block kinds and a number of repeats. A group
is scanned over its repeats, so each kind of block in a pattern is traced once, whatever the depth. Llama is one
group with a pattern of one kind; a stack with global attention in every fourth block is one group with a
pattern of four; dense first blocks are a group of their own.

Frozen dataclasses, not pydantic: these are static arguments of jitted functions, so they must hash.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Kernel = Literal["xla", "splash", "cudnn"]
Mixer = Literal["attention", "gated_delta", "short_conv", "mamba2", "attention_mamba2", "none"]
Norms = Literal["pre", "post", "both"]
NormProduct = Literal["wide", "offset", "centred"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) and the scaling of its frequencies.

    `kind` is one of `default`, `linear`, `dynamic`, `llama3`, `yarn`, `longrope`, under the names that HF configs use
    for `rope_type`; the fields marked with kinds are parameters of those and are ignored by the others.

    fraction: of a head's width that is rotated, its first part; the rest passes. interleaved: neighbours (0, 1),
    (2, 3), ... are rotated against each other, not halves.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    # yarn; None: 0.1 ln(factor) + 1. longrope; None: sqrt(1 + ln(factor) / ln(original_max_positions))
    attention_factor: float | None = None
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn
    short_factor: tuple[float, ...] = ()  # longrope: of every frequency, in documents up to original_max_positions
    long_factor: tuple[float, ...] = ()  # longrope: in longer ones
    fraction: float = 1.0
    interleaved: bool = False


@dataclass(frozen=True)
class BlockKind:
    """Properties that differ between the blocks of one decoder. Sizes are the decoder's.

    mixer: what mixes tokens. `attention`: softmax attention, latent where `ModelConfig.latent` is set; in
        models/layers/recurrent/ are `gated_delta`, a recurrence with a state for each document; `short_conv`, a
        convolution of a few tokens; `mamba2`, another recurrence; and `attention_mamba2`, attention and that beside
        each other. `none`: the block has no mixer. window, chunk, rotary and local_rope say nothing of a mixer without
        attention, and are at their defaults there.
    window: a token attends to itself and the `window - 1` tokens before it; None: to all before it.
    chunk: a token attends within its run of `chunk` positions of its document; None: runs have no end.
    rotary: queries and keys are rotated; False: the block knows no positions ("NoPE").
    moe: the MLP is a mixture of experts. mlp: False: the block has none.
    local_rope: it rotates by `ModelConfig.local_rope`.
    wide: its heads are those of `ModelConfig.wide`.
    taken: it has no keys and values of its own, but those of the last block before it that has, of the same width.
    taken_choice: it has no indexer of its own, and its queries attend to the keys that were chosen in the last block
        before it that has.
    """

    window: int | None = None
    chunk: int | None = None
    rotary: bool = True
    moe: bool = False
    local_rope: bool = False
    mixer: Mixer = "attention"
    wide: bool = False
    taken: bool = False
    taken_choice: bool = False
    mlp: bool = True

    @property
    def attends(self) -> bool:
        """Tell whether the block has attention, alone or beside another mixer."""
        return self.mixer in ("attention", "attention_mamba2")

    @property
    def is_mamba(self) -> bool:
        """Tell whether the block has Mamba-2, alone or beside attention."""
        return self.mixer in ("mamba2", "attention_mamba2")

    @property
    def is_dense(self) -> bool:
        """Tell whether the block has an MLP that all tokens take."""
        return self.mlp and not self.moe


@dataclass(frozen=True)
class LayerGroup:
    """`repeats` times the blocks of `pattern`, in order."""

    pattern: tuple[BlockKind, ...]
    repeats: int


@dataclass(frozen=True)
class TemperatureConfig:
    """Queries grow with the position p of their token, by `1 + scale * ln(1 + floor((p + first) / floor))`.

    first: the number of a document's first position. everywhere: in all blocks; else in those without rotary embedding
    alone. Sources: Llama 4 (from 1, there alone), Ministral 3 (from 0, everywhere); arXiv 2501.19399.
    """

    scale: float
    floor: float
    first: int = 1
    everywhere: bool = False


@dataclass(frozen=True)
class IndexConfig:
    """The indexer of sparse attention (DeepSeek-V3.2, arXiv 2512.02556): it chooses the keys that a query attends to.

    heads, head_dim: of its own queries and keys, of which the first `LatentConfig.rope_dim` numbers are rotated,
    interleaved: each with its neighbour; else halves. top_k: keys of a query.
    """

    heads: int
    head_dim: int
    top_k: int
    interleaved: bool = False


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values are made from one narrow vector of
    each token, and may be cached as that. See models/layers/latent_attention.py.

    query_rank: width of the vector that queries are made from; None: they are made from the stream.
    rank: of the vector that keys and values are made from.
    plain_dim, rope_dim: of a query's and key's numbers, those that carry no position, and behind them the rotated ones.
    value_dim: of a head's values. index: None: queries attend to all keys before them.
    """

    query_rank: int | None
    rank: int
    plain_dim: int
    rope_dim: int
    value_dim: int
    index: IndexConfig | None = None


@dataclass(frozen=True)
class WideHeads:
    """Heads of some blocks, of another width than `ModelConfig.head_dim`, which rotate by `ModelConfig.rope`.

    shared_values: values are the keys before their norm and rotation, and have no projection of their own.
    """

    num_kv_heads: int
    head_dim: int
    shared_values: bool = False


@dataclass(frozen=True)
class BlockInputs:
    """Inputs that every block has of its own: made of the token and of its embedding, and added through a gate behind
    the block's MLP (Gemma 3n, Gemma 4). vocab_size: of their table. width: of one block's."""

    vocab_size: int
    width: int


@dataclass(frozen=True)
class DeltaConfig:
    """Sizes of the gated delta rule (arXiv 2412.06464), see models/layers/recurrent/gated_delta.py.

    key_heads, value_heads: each of the former serves an equal number of the latter. key_dim: width of a query and a
    key; value_dim: of a value. taps: tokens that the short convolution sees, a token itself and those before it.
    doubled: strengths reach from 0 to 2, not to 1, so that a token may turn what is remembered of its key around.
    norm_eps: of the norm behind the rule; None: that of the others. by_channel: each number of a key has a decay of its
    own (Kimi delta attention, arXiv 2510.26692); then there are as many value heads as key heads.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    doubled: bool = False
    by_channel: bool = False
    norm_eps: float | None = None

    @property
    def groups(self) -> int:
        """Groups of value heads that surgery keeps equal: each key head's, or all where each has its own."""
        return 1 if self.by_channel else self.key_heads


@dataclass(frozen=True)
class ShortConvConfig:
    """Sizes of the gated short convolution (LFM2), see models/layers/recurrent/short_conv.py.

    taps: tokens that a channel sees, a token itself and those before it. bias: the convolution and the projections have
    one.
    """

    channels: int
    taps: int
    bias: bool = False


@dataclass(frozen=True)
class MambaConfig:
    """Sizes and options of Mamba-2 (arXiv 2405.21060), see models/layers/recurrent/mamba.py.

    heads, head_dim: of its values. groups: of equally many heads, which share a key and a query of `state` numbers.
    taps: tokens that the short convolution sees. conv_bias: the convolution has one; bias, output_bias: so have the
    projections of the input, and of the output. least_step, most_step: where a token's step is cut; None: nowhere.
    norm: of every group's output, `gated`: behind the gate, `first`: before it, `none`: no norm.
    """

    heads: int
    head_dim: int
    groups: int
    state: int
    taps: int
    activation: str = "silu"
    conv_bias: bool = True
    bias: bool = False
    output_bias: bool = False
    least_step: float = 0.0
    most_step: float | None = None
    norm: Literal["gated", "first", "none"] = "gated"

    @property
    def state_size(self) -> int:
        """Numbers that all heads' states have together."""
        return self.heads * self.state * self.head_dim


@dataclass(frozen=True)
class Multipliers:
    """Factors that Falcon-H1 has in its blocks.

    attention_input, attention_output, key: of attention's input, its output and its keys. mamba_input, mamba_output: of
    Mamba-2's. mamba: of the gate, the values, the keys, the queries and the steps, behind their projections. gate,
    down: of an MLP's gate before its activation, and of its output.
    """

    attention_input: float = 1.0
    attention_output: float = 1.0
    key: float = 1.0
    mamba_input: float = 1.0
    mamba_output: float = 1.0
    mamba: tuple[float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 1.0)
    gate: float = 1.0
    down: float = 1.0


@dataclass(frozen=True)
class ClampedGlu:
    """A gated unit of cut inputs: `(up + 1) * gate * sigmoid(alpha * gate)`, gate at most `limit`, up within it both
    ways. Source: gpt-oss (arXiv 2508.10925)."""

    limit: float = 7.0
    alpha: float = 1.702


@dataclass(frozen=True)
class MoeConfig:
    """A mixture of experts: E experts, of which every token takes `top_k`. See models/routing.py for how.

    expert_size: width F of one expert. shared_size: of the expert that takes all tokens, 0 for none.
    scores: of an expert for a token. `softmax` and `sigmoid` of the router's logits; `sigmoid_input`: sigmoid of the
        logits, and it multiplies the expert's input rather than its output (Llama 4).
    renormalise: the chosen experts' weights are divided by their sum, to which `sum_eps` is added.
    scaling: factor on the weights after that.
    groups, groups_kept: experts are chosen within the best `groups_kept` of `groups` groups. group_best: experts of a
        group whose scores' sum ranks it.
    bias: there is one for each expert, added for the choice alone; native_bias: the family's files have a place for it.
    bias_on_scores: with `softmax` it is added to the probabilities, not to the logits.
    shared_gate: the shared expert's output is multiplied by the sigmoid of a linear map of its input.
    jitter: in training the input is multiplied by uniform noise in `[1 - jitter, 1 + jitter]`.
    float32_router: logits are a float32 product, whatever the dtype of the stream.
    logit_bias: the router is a linear map with a learned bias, which is part of its logits.
    expert_bias: so are the three projections of an expert.
    clamped: how gate and up become an expert's neurons; None: `act(gate) * up`.
    apart: the shared expert, the routed ones and the router have norms of their own, of the stream itself, and each
        routed expert a factor on its weights (Gemma 4).
    latent: width of what routed experts read and write, of which linear maps lead to and from the stream; None: they do
        that themselves (Nemotron 3).
    """

    num_experts: int
    top_k: int
    expert_size: int
    shared_size: int = 0
    scores: Literal["softmax", "sigmoid", "sigmoid_input"] = "softmax"
    renormalise: bool = True
    scaling: float = 1.0
    groups: int = 1
    groups_kept: int = 1
    bias: bool = False
    native_bias: bool = False
    bias_on_scores: bool = False
    shared_gate: bool = False
    jitter: float = 0.0
    float32_router: bool = False
    logit_bias: bool = False
    expert_bias: bool = False
    clamped: ClampedGlu | None = None
    apart: bool = False
    sum_eps: float = 0.0
    group_best: int = 2
    latent: int | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a decoder. Axis letters: D hidden, H query heads, K key/value heads, V vocabulary.

    intermediate_size: of dense MLPs. qk_norm: of queries and keys, `head`: RMS norm of every head, learned weights
    `[hd]`, before the rotation; `turned`: the same after it; `full`: of all heads together, `[H hd]`, before it; `l2`:
    of every head, no weights, after the rotation, and only in blocks that rotate. clip_qkv: queries, keys and values
    are cut at this magnitude.
    norm_head: the head's weights are divided by their norm over the vocabulary, without gradient through the norm.
    norms: of each sublayer: its input, its output before it is added to the stream, or both; `by_mixer`: outputs in
    blocks with attention, inputs in the others; `shared`: a block's sublayers lie beside each other, and both read the
    stream that enters it under one norm. norm_product: how a norm multiplies by its weight, see `rms_norm` in
    models/layers/norm.py. embed_scale, residual_scale: factors on embeddings, and on what a sublayer adds to the
    stream. embed_scale_rounded: the first is rounded to the parameters' dtype before it is used, as in Gemma's
    training. attention_scale: factor on the products of queries and keys; None:
    hd^-0.5. logits_divisor: of the logits. attention_softcap, logits_softcap: see `softcap` in models/layers/norm.py.
    local_rope: rotary embedding of the blocks whose kind says so. sinks: every query head has a learned logit that
    takes part in its softmax and has no value. latent: attention is multi-head latent attention; then head_dim is the
    width of queries and keys, and every query head has a key and value head of its own. output_gate: the heads' output
    is multiplied by the sigmoid of a linear map of the sublayer's input. delta: of the blocks whose mixer is the gated
    delta rule. short_conv: of those whose mixer is the gated short convolution. wide: heads of the blocks whose kind
    says so; then `rope` is theirs. value_norm: values of every head are normed, without weights. block_scale: what
    leaves a block is multiplied by a learned number of its own. block_inputs: see there. wider_taken: MLPs of blocks
    that take keys and values over are twice as wide.
    mamba: of the blocks with Mamba-2. multipliers: factors within blocks. mlp_gated: MLPs and experts have a gate; if
    not, they are `down(act(up(x)))`.
    attention, experts: how they are computed, see models/layers/kernels.py and models/layers/experts.py.
    mtp_layers: of multi-token prediction, behind the last block in the checkpoint's files; no part of the decoder.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerGroup, ...]
    rope: RopeConfig = RopeConfig()
    norm_eps: float = 1e-6
    activation: str = "silu"
    tie_embeddings: bool = False
    norm_head: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["none", "head", "turned", "full", "l2"] = "none"
    clip_qkv: float | None = None
    temperature: TemperatureConfig | None = None
    norms: Norms | Literal["by_mixer", "shared"] = "pre"
    norm_product: NormProduct = "wide"
    embed_scale: float = 1.0
    embed_scale_rounded: bool = False
    residual_scale: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logits_divisor: float = 1.0
    logits_softcap: float | None = None
    local_rope: RopeConfig | None = None
    sinks: bool = False
    latent: LatentConfig | None = None
    output_gate: bool = False
    delta: DeltaConfig | None = None
    short_conv: ShortConvConfig | None = None
    mamba: MambaConfig | None = None
    multipliers: Multipliers | None = None
    mlp_gated: bool = True
    wide: WideHeads | None = None
    value_norm: bool = False
    block_scale: bool = False
    block_inputs: BlockInputs | None = None
    wider_taken: bool = False
    moe: MoeConfig | None = None
    attention: Kernel = "xla"
    experts: Literal["auto", "dense", "tiled", "ragged"] = "auto"
    max_positions: int = 2048
    mtp_layers: int = 0
    family: str = "llama"

    @property
    def num_blocks(self) -> int:
        return sum(len(group.pattern) * group.repeats for group in self.layers)

    @property
    def kinds(self) -> tuple[BlockKind, ...]:
        """Every block's kind, in order."""
        return tuple(kind for group in self.layers for kind in group.pattern * group.repeats)

    @property
    def rope_dim(self) -> int:
        """The part of a head's width that `rope` receives (of which `RopeConfig.fraction` is rotated)."""
        if self.wide is not None:
            return self.wide.head_dim
        return self.head_dim if self.latent is None else self.latent.rope_dim

    def heads_of(self, kind: BlockKind) -> tuple[int, int]:
        """The number of key and value heads of blocks of this kind, and a head's width."""
        if self.wide is not None and kind.wide:
            return self.wide.num_kv_heads, self.wide.head_dim
        return self.num_kv_heads, self.head_dim

    def norms_of(self, kind: BlockKind) -> Norms:
        """`norms` of the sublayers of blocks of this kind."""
        if self.norms == "by_mixer":
            return "post" if kind.attends else "pre"
        return "pre" if self.norms == "shared" else self.norms

    def mlp_width(self, kind: BlockKind) -> int:
        """Neurons of the dense MLP of blocks of this kind."""
        return self.intermediate_size * (2 if self.wider_taken and kind.taken else 1)

    @property
    def takes_keys(self) -> bool:
        """Tell whether some blocks take over keys and values."""
        return any(kind.taken for kind in self.kinds)

    @property
    def takes_choices(self) -> bool:
        """Tell whether some blocks attend to the keys that others chose."""
        return any(kind.taken_choice for kind in self.kinds)

    @property
    def has_joined_blocks(self) -> bool:
        """Tell whether blocks need more than the stream, and cannot be computed alone."""
        return self.takes_keys or self.takes_choices or self.block_inputs is not None

    def values_are_keys(self, kind: BlockKind) -> bool:
        """Tell whether blocks of this kind have no projection of values."""
        return self.wide is not None and kind.wide and self.wide.shared_values

    @property
    def has_qk_norms(self) -> bool:
        """Tell whether norms of queries and keys have weights."""
        return self.qk_norm in ("head", "turned", "full")

    @property
    def value_dim(self) -> int:
        """Width of a head's values."""
        return self.head_dim if self.latent is None else self.latent.value_dim

    @property
    def delta_config(self) -> DeltaConfig:
        """`delta` of a decoder that has such blocks."""
        if self.delta is None:
            raise ValueError("this decoder has no blocks with the gated delta rule")
        return self.delta

    @property
    def short_conv_config(self) -> ShortConvConfig:
        """`short_conv` of a decoder that has such blocks."""
        if self.short_conv is None:
            raise ValueError("this decoder has no blocks with the gated short convolution")
        return self.short_conv

    @property
    def mamba_config(self) -> MambaConfig:
        """`mamba` of a decoder that has such blocks."""
        if self.mamba is None:
            raise ValueError("this decoder has no blocks with Mamba-2")
        return self.mamba

    @property
    def moe_config(self) -> MoeConfig:
        """`moe` of a decoder that has experts."""
        if self.moe is None:
            raise ValueError("this decoder has no experts")
        return self.moe

    @property
    def moe_blocks(self) -> tuple[int, ...]:
        """The blocks with experts."""
        return tuple(block for block, kind in enumerate(self.kinds) if kind.moe)

    def places(self) -> Iterator[tuple[int, int, int, int]]:
        """List for every block in order: (block, group, repeat, position in the pattern)."""
        block = 0
        for number, group in enumerate(self.layers):
            for repeat in range(group.repeats):
                for place in range(len(group.pattern)):
                    yield block, number, repeat, place
                    block += 1


def plan_layers(kinds: Sequence[BlockKind]) -> tuple[LayerGroup, ...]:
    """The plan of these blocks that traces the fewest: the least sum of pattern lengths, then the fewest groups.

    Dense first blocks and experts after them become two groups; experts in every other block and global attention in
    every fourth one group with a pattern of four. Exact, by dynamic programming over where the last group begins.
    """
    kinds = tuple(kinds)
    best: list[tuple[int, int, tuple[LayerGroup, ...]]] = [(0, 0, ())]
    for end in range(1, len(kinds) + 1):
        found = []
        for length in range(1, end + 1):
            pattern, repeats = kinds[end - length : end], 1
            while True:
                start = end - length * repeats
                cost, groups, plan = best[start]
                found.append((cost + length, groups + 1, (*plan, LayerGroup(pattern, repeats))))
                if start < length or kinds[start - length : start] != pattern:
                    break
                repeats += 1
        best.append(min(found, key=lambda entry: entry[:2]))
    return best[-1][2]
