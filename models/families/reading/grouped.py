"""Shared parts of GLM, DeepSeek and Bailing: dense blocks first, experts in groups, and multi-token prediction layers.

Those layers guess tokens further ahead. Checkpoints have them behind the last block, numbered on; the forward pass that
predicts the next token does not run them, and we leave them out.
"""

from typing import Any

from distillcache.models.config import BlockKind, ModelConfig, MoeConfig
from distillcache.models.families.reading.family import (
    attention_tensors,
    bias_tensors,
    dense_tensors,
    expert_tensors,
    norm_tensors,
    not_exportable,
    shared_tensors,
)
from distillcache.models.families.reading.values import Values
from distillcache.models.files.tensors import BlockTensor, Layout

DENSE, SPARSE = "dense", "sparse"  # blocks, in `mlp_layer_types`


def dense_then_experts(values: Values) -> list[BlockKind]:
    """The first `first_k_dense_replace` blocks are dense, the others have experts."""
    dense = values.count("first_k_dense_replace")
    return [BlockKind(moe=block >= dense) for block in range(values.size("num_hidden_layers"))]


def typed_experts(values: Values) -> list[BlockKind]:
    """Every block's kind by `mlp_layer_types`; where that is silent, the first ones are dense."""
    types = values.per_block("mlp_layer_types", (DENSE, SPARSE), values.size("num_hidden_layers"))
    return dense_then_experts(values) if types is None else [BlockKind(moe=each == SPARSE) for each in types]


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
    """Return the width of the shared expert in routed experts.

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


def sigmoid_moe(values: Values, shared: int) -> MoeConfig:
    """Experts ranked by sigmoid and a bias that the files have, as DeepSeek-V3 and GLM-4 spell them.

    Args:
        shared: how many routed experts the shared one is as wide as.
    """
    groups, kept = expert_groups(values)
    width = values.size("moe_intermediate_size")
    return MoeConfig(
        num_experts=values.size("n_routed_experts"),
        top_k=values.size("num_experts_per_tok"),
        expert_size=width,
        shared_size=shared * width,
        scores="sigmoid",
        renormalise=values.flag("norm_topk_prob"),
        scaling=values.number("routed_scaling_factor"),
        groups=groups,
        groups_kept=kept,
        bias=True,
        native_bias=True,
        float32_router=True,
    )


def sigmoid_moe_keys(config: ModelConfig) -> dict[str, Any]:
    """Return the config keys that `sigmoid_moe` and `dense_then_experts` read, for this decoder.

    Raises:
        CheckpointError: they cannot say it.
    """
    return {"first_k_dense_replace": first_dense(config), **expert_keys(config)}


def typed_expert_keys(config: ModelConfig) -> dict[str, Any]:
    """The same that `sigmoid_moe` and `typed_experts` read; readers without types take the dense blocks to be first."""
    if odd := [kind for kind in config.kinds if kind != BlockKind(moe=kind.moe, taken_choice=kind.taken_choice)]:
        raise not_exportable(str(odd[0]), "rotary blocks without windows or chunks", "use another family")
    types = [SPARSE if kind.moe else DENSE for kind in config.kinds]
    dense = [*types, SPARSE].index(SPARSE)
    return {"mlp_layer_types": types, "first_k_dense_replace": dense, **expert_keys(config)}


def check_sigmoid(config: ModelConfig) -> None:
    """Raise `CheckpointError` unless the experts are as in DeepSeek-V3, and queries do not grow."""
    moe = config.moe_config
    if moe.scores != "sigmoid" or not moe.native_bias or not moe.shared_size or config.temperature is not None:
        raise not_exportable(
            f"scores {moe.scores}, a shared expert of {moe.shared_size}, growth of queries {config.temperature}",
            "sigmoid scores with a bias, a shared expert, no growth of queries",
            "use another family",
        )


def expert_keys(config: ModelConfig) -> dict[str, Any]:
    """Return the config keys that `sigmoid_moe` reads, for this decoder."""
    moe = config.moe_config
    return {
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_size,
        "n_shared_experts": shared_experts(moe),
        "norm_topk_prob": moe.renormalise,
        "routed_scaling_factor": moe.scaling,
        "n_group": moe.groups,
        "topk_group": moe.groups_kept,
        "num_nextn_predict_layers": 0,
    }


def moe_tensors(config: ModelConfig, bias: str) -> list[BlockTensor]:
    """List the tensors of a block's router, with its bias under this name, and of its experts."""
    return [
        BlockTensor("mlp.gate.weight", "mlp/router", 1),
        *bias_tensors(config, bias),
        *expert_tensors(),
        *(shared_tensors("mlp.shared_experts") if config.moe_config.shared_size else []),
    ]


def grouped_layout(config: ModelConfig) -> Layout:
    """The names in files of dense blocks and of such experts, both under attention of the common names."""
    moe = moe_tensors(config, "mlp.gate.e_score_correction_bias")
    common = [*norm_tensors(), *attention_tensors(config)]
    return Layout(lambda kind: [*common, *(moe if kind.moe else dense_tensors(config))], foreign=mtp_prefixes(config))


def mtp_prefixes(config: ModelConfig) -> tuple[str, ...]:
    """List the name prefixes of the tensors of `mtp_layers`."""
    return tuple(f"model.layers.{config.num_blocks + layer}." for layer in range(config.mtp_layers))
