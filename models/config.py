"""What a decoder is, independent of where its weights come from.

A decoder's layers are a *plan*: a list of groups, each a pattern of block kinds and a number of repeats. A group
is scanned over its repeats, so each kind of block in a pattern is traced once, whatever the depth. Llama is one
group with a pattern of one kind; a stack with global attention in every fourth block is one group with a
pattern of four.

Frozen dataclasses, not pydantic: these are static arguments of jitted functions, so they must hash.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) and the scaling of its frequencies.

    `kind` is one of `default`, `linear`, `dynamic`, `llama3`, `yarn`, under the names that HF configs use for
    `rope_type`; the other fields are the parameters of that kind and are ignored by the others.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: 0.1 ln(factor) + 1
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn


@dataclass(frozen=True)
class BlockKind:
    """What differs between the blocks of one decoder. Sizes are the decoder's.

    window: a token attends to itself and the `window - 1` tokens before it; None: to all before it.
    """

    window: int | None = None


@dataclass(frozen=True)
class LayerGroup:
    """`repeats` times the blocks of `pattern`, in order."""

    pattern: tuple[BlockKind, ...]
    repeats: int


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a decoder. Axis letters: D hidden, H query heads, K key/value heads, V vocabulary."""

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
    attention_bias: bool = False
    mlp_bias: bool = False
    max_positions: int = 2048
    family: str = "llama"

    @property
    def num_blocks(self) -> int:
        return sum(len(group.pattern) * group.repeats for group in self.layers)
