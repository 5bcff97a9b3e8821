"""What GLM and Bailing share: dense blocks first, experts in groups, and layers of multi-token prediction.

Those layers guess tokens further ahead. Checkpoints have them behind the last block, numbered on; the forward pass that
predicts the next token does not run them, and we leave them out.
"""

from models.config import BlockKind, ModelConfig, MoeConfig
from models.families.family import bias_tensors, expert_tensors, not_exportable, shared_tensors
from models.families.values import Values
from models.tensors import BlockTensor


def dense_then_experts(values: Values) -> list[BlockKind]:
    """The first `first_k_dense_replace` blocks are dense, the others have experts."""
    dense = values.count("first_k_dense_replace")
    return [BlockKind(moe=block >= dense) for block in range(values.size("num_hidden_layers"))]


def first_dense(config: ModelConfig) -> int:
    """`first_k_dense_replace` of these blocks.

    Raises:
        CheckpointError: no number says what they are.
    """
    dense = next(iter(config.moe_blocks), config.num_blocks)
    if config.kinds != tuple(BlockKind(moe=block >= dense) for block in range(config.num_blocks)):
        kinds = set(config.kinds)
        raise not_exportable(
            f"{len(kinds)} kinds of blocks" if len(kinds) > 1 else str(kinds.pop()),
            "dense blocks, then blocks with experts, all of them rotary and without windows or chunks",
            "export a decoder with such blocks, or in another family",
        )
    return dense


def expert_groups(values: Values) -> tuple[int, int]:
    """`n_group` and `topk_group`. One group, or none, is all experts."""
    groups = values.count("n_group")
    return (groups, values.size("topk_group")) if groups > 1 else (1, 1)


def shared_experts(moe: MoeConfig) -> int:
    """How many routed experts the shared one is as wide as.

    Raises:
        CheckpointError: not a whole number.
    """
    if moe.shared_size % moe.expert_size:
        raise not_exportable(
            f"a shared expert of {moe.shared_size}, others of {moe.expert_size}",
            "a shared expert that is a whole number of the others wide",
            f"give the experts a width that divides {moe.shared_size}",
        )
    return moe.shared_size // moe.expert_size


def moe_tensors(config: ModelConfig, bias: str) -> list[BlockTensor]:
    """Those of a block's router, with its bias under this name, and of its experts."""
    return [
        BlockTensor("mlp.gate.weight", "mlp/router", 1),
        *bias_tensors(config, bias),
        *expert_tensors(),
        *(shared_tensors("mlp.shared_experts") if config.moe_config.shared_size else []),
    ]


def mtp_prefixes(config: ModelConfig) -> tuple[str, ...]:
    """Of the tensors of `mtp_layers`."""
    return tuple(f"model.layers.{config.num_blocks + layer}." for layer in range(config.mtp_layers))
