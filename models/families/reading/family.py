"""The interface of one HF `model_type`: how its config.json is read and written, and the names of its tensors.

Every family is a module of this folder with one or two `Family` values; `models/families/__init__.py` lists them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distillcache.models.config import BlockKind, ModelConfig, plan_layers
from distillcache.models.families.reading.values import EXPORTED_ACTIVATIONS, ROPE_KEYS, Values, rope_to_hf
from distillcache.models.files.tensors import BlockTensor, Layout, TensorSlice
from distillcache.schemas.errors import CheckpointError

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    name: the `model_type`, and `ModelConfig.family`. architecture: the class in `architectures`.
    defaults: the keys that are read beside the sizes and the rotary ones, with what transformers assumes where
        config.json is silent. Sizes have no default: a checkpoint states them.
    read: the decoder that a config means. write: the family's own keys of an export, beside the common ones.
    layout: the names of its tensors.
    also: other families' `model_type`s under which its checkpoints go too, told apart by `architectures`.
    harmless: more keys that do not change the forward pass. neutral: keys that would, with the values under which they
        do not. aliases: other spellings of keys. unwritten: common keys that its exports leave out.
    """

    name: str
    architecture: str
    defaults: Mapping[str, Any]
    read: Callable[[Values], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    layout: Callable[[ModelConfig], Layout]
    also: tuple[str, ...] = ()
    harmless: frozenset[str] = frozenset()
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    unwritten: frozenset[str] = frozenset()

    @property
    def understood(self) -> frozenset[str]:
        return self.harmless.union(SIZES, ROPE_KEYS, self.defaults)


def common_fields(
    values: Values, kinds: Sequence[BlockKind], *, activation: str | None = "hidden_act"
) -> dict[str, Any]:
    """The fields of `ModelConfig` that all families share, for a decoder of these blocks.

    `num_key_value_heads` null or absent means one for each query head, `head_dim` likewise the hidden size over the
    query heads. activation: the key that names it; None: the family has one of its own.
    """
    heads, hidden = values.size("num_attention_heads"), values.size("hidden_size")
    return {
        "vocab_size": values.size("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": values.size("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": values.size_or_none("num_key_value_heads") or heads,
        "head_dim": values.size_or_none("head_dim") or hidden // heads,
        "layers": plan_layers(kinds),
        "norm_eps": values.number("rms_norm_eps"),
        **({} if activation is None else {"activation": values.activation(activation)}),
        "tie_embeddings": values.flag("tie_word_embeddings"),
        "max_positions": values.size("max_position_embeddings"),
    }


def common_keys(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The keys of `config.json` that all families share, for readers of transformers 4.5x and 5.x.

    Both spellings of the rotary parameters and of the dtype are written; each version ignores the other's.
    """
    rope = rope_to_hf(config.rope)
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_blocks,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": EXPORTED_ACTIVATIONS[config.activation],
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": None if config.rope.kind == "default" else scaling,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def not_exportable(found: str, expected: str, step: str) -> CheckpointError:
    """The error for a decoder that no HF config of its family means."""
    return CheckpointError("transformers has no config for this decoder", {"found": found, "expected": expected}, step)


def only_kind(config: ModelConfig) -> BlockKind:
    """The kind of all blocks.

    Raises:
        CheckpointError: they are of several kinds, and the family's config cannot say that.
    """
    kinds = set(config.kinds)
    if len(kinds) > 1:
        raise not_exportable(
            f"{len(kinds)} kinds of blocks", "one kind", "export a decoder whose blocks are all of one kind"
        )
    return kinds.pop()


def check_plain(config: ModelConfig) -> None:
    """Raise `CheckpointError` unless all blocks are dense and rotate, and none has a window."""
    if (kind := only_kind(config)) != BlockKind():
        raise not_exportable(str(kind), "dense rotary blocks without windows", "use another family")


# Tensors under the names that most families share.


def norm_tensors() -> list[BlockTensor]:
    """The weights of both pre-norms."""
    return [
        BlockTensor("input_layernorm.weight", "attention/norm"),
        BlockTensor("post_attention_layernorm.weight", "mlp/norm"),
    ]


def post_norm_tensors() -> list[BlockTensor]:
    """The weights of both post-norms, where there are no others."""
    return [
        BlockTensor("post_attention_layernorm.weight", "attention/post_norm"),
        BlockTensor("post_feedforward_layernorm.weight", "mlp/post_norm"),
    ]


def attention_tensors(config: ModelConfig, norms: tuple[str, str] = ("q_norm", "k_norm")) -> list[BlockTensor]:
    """`self_attn.*`: projections, their biases, and under these names the norms of queries and keys."""
    queries = _queries(config)
    found = [BlockTensor("self_attn.q_proj.weight", f"attention/{name}", 1, part) for name, part in queries.items()]
    found += [BlockTensor(f"self_attn.{name}_proj.weight", f"attention/{name}", 1) for name in "kv"]
    found.append(BlockTensor("self_attn.o_proj.weight", "attention/o", 2))
    if config.qkv_bias:
        own = [BlockTensor("self_attn.q_proj.bias", f"attention/{n}_bias", None, part) for n, part in queries.items()]
        found += [*own, *(BlockTensor(f"self_attn.{name}_proj.bias", f"attention/{name}_bias") for name in "kv")]
    if config.output_bias:
        found.append(BlockTensor("self_attn.o_proj.bias", "attention/o_bias"))
    if config.has_qk_norms:
        pairs = zip(norms, "qk", strict=True)
        found += [BlockTensor(f"self_attn.{norm}.weight", f"attention/{name}_norm") for norm, name in pairs]
    return found


def _queries(config: ModelConfig) -> dict[str, TensorSlice | None]:
    """The parts of `q_proj`, by our names; with an output gate, its rows of a head behind the queries of that head."""
    if not config.output_gate:
        return {"q": None}
    width, heads = config.head_dim, config.num_heads
    whole = 2 * heads * width
    return {
        "q": TensorSlice(0, 0, width, whole, groups=heads),
        "gate": TensorSlice(0, width, 2 * width, whole, groups=heads),
    }


def dense_tensors(config: ModelConfig, prefix: str = "mlp") -> list[BlockTensor]:
    """A gated MLP's."""
    found = [BlockTensor(f"{prefix}.{name}_proj.weight", f"mlp/{name}", 1) for name in ("gate", "up", "down")]
    if config.mlp_bias:
        found += [BlockTensor(f"{prefix}.{name}_proj.bias", f"mlp/{name}_bias") for name in ("gate", "up", "down")]
    return found


def fused_dense_tensors(config: ModelConfig) -> list[BlockTensor]:
    """A gated MLP's whose gate and up projections are one tensor, the former's rows first."""
    inner, fused = config.intermediate_size, "mlp.gate_up_proj.weight"
    return [
        BlockTensor(fused, "mlp/gate", 1, TensorSlice(0, 0, inner, 2 * inner)),
        BlockTensor(fused, "mlp/up", 1, TensorSlice(0, inner, 2 * inner, 2 * inner)),
        BlockTensor("mlp.down_proj.weight", "mlp/down", 1),
    ]


def dense_layout(config: ModelConfig) -> Layout:
    """The names in files of dense blocks with both pre-norms, as in Llama."""
    return Layout(lambda kind: [*norm_tensors(), *attention_tensors(config), *dense_tensors(config)])


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def expert_tensors(prefix: str = "mlp.experts", names: tuple[str, str, str] = PROJECTIONS) -> list[BlockTensor]:
    """List the tensors of experts that are stored one by one; `names` of gate, up and down."""
    ours = ("mlp/gate", "mlp/up", "mlp/down")
    return [BlockTensor(f"{prefix}.{{e}}.{name}.weight", path, 1) for name, path in zip(names, ours, strict=True)]


def fused_tensors(both: str, down: str, width: int) -> list[BlockTensor]:
    """List the tensors of experts that are stored together, each as `nn.Linear` has it.

    Args:
        both: the name of gate and up, `[E, 2 F, D]`. down: the other's, `[E, D, F]`.
    """
    return [
        BlockTensor(both, "mlp/gate", part=TensorSlice(1, 0, width, 2 * width), turned=True),
        BlockTensor(both, "mlp/up", part=TensorSlice(1, width, 2 * width, 2 * width), turned=True),
        BlockTensor(down, "mlp/down", turned=True),
    ]


def shared_tensors(prefix: str) -> list[BlockTensor]:
    """List the tensors of the shared expert, which takes all tokens."""
    return [BlockTensor(f"{prefix}.{name}_proj.weight", f"mlp/shared_{name}", 1) for name in ("gate", "up", "down")]


def bias_tensors(config: ModelConfig, name: str) -> list[BlockTensor]:
    """The router's bias, where there is one and the family's files have a place for it."""
    moe = config.moe
    return [BlockTensor(name, "mlp/router_bias")] if moe is not None and moe.bias and moe.native_bias else []
