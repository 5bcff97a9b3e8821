"""Effects of an operation on a config, and every reason to refuse it; nothing here reads weights."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distillcache.models.config import BlockKind, ModelConfig, MoeConfig, plan_layers
from distillcache.models.families import config_from_hf, config_to_hf
from distillcache.schemas.config.student import SurgeryOp
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import CheckpointError, ConfigError

# Families with experts that a dense decoder may become, tried in this order: the first one whose config means it.
UPCYCLED = ("mixtral", "qwen3_moe", "qwen2_moe")
SHARED_NEURONS = 64  # of the shared expert that every Qwen2-MoE has: adds nothing at first


def changed_config(config: ModelConfig, ops: Sequence[SurgeryOp]) -> ModelConfig:
    """The config after all operations.

    Raises:
        ConfigError: an operation that this decoder does not allow, or a result that no HF config means: better now
            than when the trained student is exported.
    """
    if ops and config.has_joined_blocks:
        raise refused(ops[0], "found", "blocks that need more than the stream", "blocks of a stream", "leave it out")
    changed = config
    for op in ops:
        changed = after(changed, op)
    if ops:
        check_exportable(changed)
    return changed


def after(config: ModelConfig, op: SurgeryOp) -> ModelConfig:
    """The config after one operation, exportable or not."""
    return CHANGES[op.op](config, op)


def check_exportable(config: ModelConfig) -> None:
    """Raise `ConfigError` where no HF config means this decoder: it is written, read back and compared."""
    try:
        hf = config_to_hf(config, "float32")
        back = config_from_hf(hf, Path("config.json"))
    except CheckpointError as error:
        raise ConfigError(f"the student could not be exported: {error.what}", error.facts, error.next) from error
    if lost := _differences(config, back):
        raise ConfigError(
            "the student could not be exported: transformers has no config for this decoder",
            {"family": hf["model_type"], **lost},
            "leave out the operation that brings it, or use another teacher",
        )


def _differences(config: ModelConfig, back: ModelConfig) -> dict[str, str]:
    """Field -> what it is and what an export would say, where that computes something else."""
    same = {"family": config.family, "layers": config.layers, "experts": config.experts}
    same |= {"attention": config.attention, "mtp_layers": config.mtp_layers, "max_positions": config.max_positions}
    if not any(kind.is_dense for kind in config.kinds):
        same["intermediate_size"] = config.intermediate_size
    if back.moe is not None and config.moe is not None and not config.moe.native_bias:
        same["moe"] = replace(back.moe, bias=config.moe.bias)
    found = _unlike(vars(config), vars(replace(back, **same)))
    if isinstance(back.moe, MoeConfig) and isinstance(config.moe, MoeConfig) and "moe" in found:
        found = {**found, **_unlike(vars(config.moe), vars(back.moe))}
        del found["moe"]
    if back.kinds != config.kinds:
        found["blocks"] = "an export says other kinds"
    return found


def _unlike(here: dict[str, Any], back: dict[str, Any]) -> dict[str, str]:
    return {n: f"{here[n]}, an export says {value}" for n, value in back.items() if value != here[n]}


def _with_heads(config: ModelConfig, op: SurgeryOp) -> None:
    """Refuse an operation on heads where no block has attention."""
    if not any(kind.attends for kind in config.kinds):
        raise refused(op, "found", "no block with attention", "attention in some blocks", "leave it out")
    if config.wide is not None:
        raise refused(op, "found", "heads of two widths", "heads of one", "leave it out")


def _query_heads(config: ModelConfig, op: SurgeryOp) -> ModelConfig:
    _with_heads(config, op)
    group = config.num_heads // config.num_kv_heads
    if group == 1:
        raise refused(
            op,
            "query heads in each key/value group",
            1,
            "at least 2: a group cannot lose its only query head",
            f"use op: kv_heads with to: 1 to {config.num_kv_heads - 1}"
            if config.num_kv_heads > 1
            else "this model has one head; use another teacher",
        )
    return replace(config, num_heads=config.num_kv_heads * _checked(op, group, "query heads in each key/value group"))


def _kv_heads(config: ModelConfig, op: SurgeryOp) -> ModelConfig:
    _with_heads(config, op)
    to = _checked(op, config.num_kv_heads, "key/value heads")
    return replace(config, num_heads=config.num_heads // config.num_kv_heads * to, num_kv_heads=to)


def _value_heads(config: ModelConfig, op: SurgeryOp) -> ModelConfig:
    if config.mamba is not None and any(kind.is_mamba for kind in config.kinds):
        to = _checked(op, config.mamba.heads // config.mamba.groups, "heads of each group of Mamba-2")
        return replace(config, mamba=replace(config.mamba, heads=config.mamba.groups * to))
    if config.delta is None or not any(kind.mixer == "gated_delta" for kind in config.kinds):
        raise refused(op, "found", "no block with the gated delta rule or Mamba-2", "one at least", "leave it out")
    if config.delta.by_channel:
        to = _checked(op, config.delta.value_heads, "heads of Kimi delta attention")
        return replace(config, delta=replace(config.delta, key_heads=to, value_heads=to))
    served = config.delta.value_heads // config.delta.key_heads
    to = _checked(op, served, "value heads of each key head")
    return replace(config, delta=replace(config.delta, value_heads=config.delta.key_heads * to))


def _mlp_width(config: ModelConfig, op: SurgeryOp) -> ModelConfig:
    if not any(kind.is_dense for kind in config.kinds):
        raise refused(op, "found", "no block with a dense MLP", "one at least", "use op: expert_width, or experts")
    return replace(config, intermediate_size=_checked(op, config.intermediate_size, "neurons in an MLP"))


def _expert_width(config: ModelConfig, op: SurgeryOp) -> ModelConfig:
    moe = _with_experts(config, op, "use op: mlp_width")
    changed = replace(config, moe=replace(moe, expert_size=_checked(op, moe.expert_size, "neurons in an expert")))
    if op.by == "importance":
        raise refused(op, "by", op.by, "index or weight_norm", "choose one of these")
    return changed


def _experts(config: ModelConfig, op: SurgeryOp) -> ModelConfig:
    moe = _with_experts(config, op, "use op: upcycle to make experts")
    to = _checked(op, moe.num_experts, "experts in a block")
    if to % moe.groups:
        step = f"choose a multiple of {moe.groups}"
        raise refused(op, "to", to, f"a multiple of {moe.groups}: experts are chosen by group", step)
    reach = to // moe.groups * moe.groups_kept
    if moe.top_k > reach:
        least = -(-moe.top_k // moe.groups_kept) * moe.groups
        raise refused(
            op, "to", to, f"at least {least}: a token takes {counted(moe.top_k, 'expert')}", f"keep {least} or more"
        )
    return replace(config, moe=replace(moe, num_experts=to))


def _with_experts(config: ModelConfig, op: SurgeryOp, step: str) -> MoeConfig:
    if config.moe is None:
        raise refused(op, "found", f"family {config.family}, which has no experts", "a model with experts", step)
    return config.moe


def _hidden_size(config: ModelConfig, op: SurgeryOp) -> ModelConfig:
    to = _checked(op, config.hidden_size, "numbers in the residual stream")
    conv = config.short_conv and replace(config.short_conv, channels=to)
    return replace(config, hidden_size=to, short_conv=conv)


def _drop_blocks(config: ModelConfig, op: SurgeryOp) -> ModelConfig:
    kinds = [config.kinds[block] for block in kept_blocks(op, config.num_blocks)]
    moe = config.moe if any(kind.moe for kind in kinds) else None
    if config.moe is not None and moe is None:
        raise refused(op, "left", "no block with experts", "at least one", "keep a block with experts")
    mamba = config.mamba if any(kind.is_mamba for kind in kinds) else None
    return replace(config, layers=plan_layers(kinds), mamba=mamba)


def kept_blocks(op: SurgeryOp, blocks: int) -> list[int]:
    """The blocks that `drop_blocks` keeps, of a model with this number of blocks.

    Raises:
        ConfigError: it names blocks that are not there, or all of them.
    """
    dropped = named_blocks(op, blocks)
    if len(dropped) == blocks:
        raise refused(op, "blocks", f"all {blocks}", "at least one left", "keep some")
    return [block for block in range(blocks) if block not in dropped]


def named_blocks(op: SurgeryOp, blocks: int) -> set[int]:
    """The blocks that an operation names, of a model with this number of blocks."""
    named = list(range(blocks)) if op.blocks in ("all", None) else list(op.blocks)
    if beyond := sorted(block for block in named if not 0 <= block < blocks):
        raise refused(
            op, "blocks", beyond, f"0 to {blocks - 1}: the model has {counted(blocks, 'block')}", "name others"
        )
    if not named or len(set(named)) < len(named):
        raise refused(op, "blocks", named, "at least one, and none twice", "name each block once, or leave this out")
    return set(named)


def _upcycle(config: ModelConfig, op: SurgeryOp) -> ModelConfig:
    experts, top_k = op.experts or 0, op.top_k or 2
    named = named_blocks(op, config.num_blocks)
    if config.moe is not None:
        raise refused(op, "found", f"family {config.family}, which has experts", "dense MLPs alone", "leave it out")
    if config.mlp_bias:
        raise refused(op, "found", "biases in the MLPs", "none: no family's experts have them", "use a teacher without")
    if top_k > experts:
        raise refused(op, "top_k", top_k, f"at most {experts}, the number of experts", "choose fewer, or more experts")
    width = config.intermediate_size
    if op.how == "partition" and width % experts:
        step = "choose a number of experts that divides it"
        raise refused(op, "experts", experts, f"a divisor of {width}, the neurons of an MLP", step)
    kinds = [replace(kind, moe=at in named) for at, kind in enumerate(config.kinds)]
    moe = MoeConfig(experts, top_k, width // experts if op.how == "partition" else width)
    lost: dict[str, object] = {}
    for family in UPCYCLED:
        found = _as_family(config, family, moe, kinds)
        if isinstance(found, ModelConfig):
            return found
        lost[f"not {family}"] = found
    raise ConfigError(
        "this surgery cannot be done on this model: no family with experts computes the rest of it",
        {"surgery": op.spelled, "found": f"family {config.family}", **lost},
        "use a teacher whose attention is as in Llama, Mistral, Qwen2 or Qwen3",
    )


def _as_family(config: ModelConfig, family: str, moe: MoeConfig, kinds: Sequence[BlockKind]) -> ModelConfig | str:
    """The decoder with experts as one of this family; or what its config would not say."""
    if family == "qwen2_moe":
        moe = replace(moe, shared_size=SHARED_NEURONS, shared_gate=True)
    found = replace(config, family=family, moe=moe, layers=plan_layers(kinds))
    try:
        check_exportable(found)
    except ConfigError as error:
        return "; ".join(f"{name} {value}" for name, value in error.facts.items() if name != "family")
    return found


def _checked(op: SurgeryOp, have: int, noun: str) -> int:
    if op.to is None or not 1 <= op.to <= have:
        expected = f"1 to {have}: the model has {have} {noun}"
        raise refused(op, "to", op.to, expected, "choose a number in this range")
    return op.to


def refused(op: SurgeryOp, label: str, found: object, expected: object, step: str) -> ConfigError:
    """The error for an operation that cannot be done on a model."""
    return ConfigError(
        "this surgery cannot be done on this model", {"surgery": op.spelled, label: found, "expected": expected}, step
    )


CHANGES: dict[str, Callable[[ModelConfig, SurgeryOp], ModelConfig]] = {
    "query_heads": _query_heads,
    "kv_heads": _kv_heads,
    "value_heads": _value_heads,
    "mlp_width": _mlp_width,
    "experts": _experts,
    "expert_width": _expert_width,
    "hidden_size": _hidden_size,
    "drop_blocks": _drop_blocks,
    "upcycle": _upcycle,
}
