"""Shared parts of families with Mamba-2: its sizes under the names of Bamba, Granite and Falcon, and its tensors.

Source: HF transformers, the `mamba_*` keys of `configuration_bamba` and its relatives, `modeling_mamba2`.
"""

import math
from typing import Any

from distillcache.models.config import BlockKind, MambaConfig, Mixer, ModelConfig
from distillcache.models.families.reading.family import not_exportable
from distillcache.models.families.reading.keys import LINEAR
from distillcache.models.families.reading.kinds import FULL
from distillcache.models.families.reading.values import Values, is_number
from distillcache.models.files.tensors import BlockTensor, TensorSlice

# Old and new names of `layer_types`; versions of transformers that know the new ones read the old ones too.
MIXERS: dict[str, Mixer] = {"mamba": "mamba2", LINEAR: "mamba2", "attention": "attention", FULL: "attention"}
TYPES: dict[Mixer, str] = {"mamba2": "mamba", "attention": "attention"}
MAMBA_DEFAULTS: dict[str, Any] = {
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_head": "auto",
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "time_step_limit": None,
}
# How many tokens are computed at a time, and how many logits generation wants.
HARMLESS = frozenset({"mamba_chunk_size", "num_logits_to_keep"})


def mamba_sizes(values: Values, width: int | None = None, **more: Any) -> MambaConfig:
    """Sizes and options of Mamba-2.

    Args:
        width: of all heads; None: `mamba_expand` times the stream's. more: other fields.

    Raises:
        CheckpointError: the heads do not make up the width, or do not divide into the groups.
    """
    if width is None:
        width = values.size("mamba_expand") * values.size("hidden_size")
    heads = values.size("mamba_n_heads")
    head_dim = width // heads if values["mamba_d_head"] in ("auto", None) else values.size("mamba_d_head")
    if heads * head_dim != width:
        raise values.bad("mamba_n_heads", f"heads that are {width} numbers wide together, at {head_dim} each")
    bias, (least, most) = values.flag("mamba_proj_bias"), step_limits(values)
    fields = {
        "heads": heads,
        "head_dim": head_dim,
        "groups": heads_groups(values, "mamba_n_groups", heads),
        "state": values.size("mamba_d_state"),
        "taps": values.size("mamba_d_conv"),
        "activation": values.activation(),
        "conv_bias": values.flag("mamba_conv_bias"),
        "bias": bias,
        "output_bias": bias,
        "least_step": least,
        "most_step": most,
    }
    return MambaConfig(**fields | more)


def heads_groups(values: Values, key: str, heads: int) -> int:
    """Return the number of groups of heads.

    Raises:
        CheckpointError: they are not equal.
    """
    groups = values.size(key)
    if heads % groups:
        raise values.bad(key, f"a divisor of the number of heads of Mamba-2, which is {heads}")
    return groups


def step_limits(values: Values) -> tuple[float, float | None]:
    """`time_step_limit`, the least and the largest step of a token; None: there is no largest one."""
    given = values["time_step_limit"]
    if given is None:
        return 0.0, None
    if not isinstance(given, list | tuple) or len(given) != 2 or not is_number(given[0]) or given[0] < 0:
        raise values.bad("time_step_limit", "two numbers, the first one not below zero")
    least, most = given
    if most in (None, "inf", "Infinity", {"__float__": "Infinity"}) or (isinstance(most, float) and math.isinf(most)):
        return float(least), None
    if not is_number(most) or most <= least:
        raise values.bad("time_step_limit", "a second number above the first one")
    return float(least), float(most)


def mamba_keys(config: ModelConfig) -> dict[str, Any]:
    """The keys of an export that `mamba_sizes` reads, but for those of the width and of biases.

    Raises:
        CheckpointError: they cannot say it.
    """
    mamba = config.mamba_config
    if mamba.activation != config.activation:
        raise not_exportable(f"{mamba.activation} in Mamba-2", config.activation, "export it in another family")
    most = {"__float__": "Infinity"} if mamba.most_step is None else mamba.most_step
    limited = (mamba.least_step, mamba.most_step) != (0.0, None)
    return {
        "mamba_n_heads": mamba.heads,
        "mamba_n_groups": mamba.groups,
        "mamba_d_state": mamba.state,
        "mamba_d_head": mamba.head_dim,
        "mamba_d_conv": mamba.taps,
        "mamba_conv_bias": mamba.conv_bias,
        "mamba_proj_bias": mamba.bias,
        **({"time_step_limit": [mamba.least_step, most]} if limited else {}),
    }


def expand_keys(config: ModelConfig) -> dict[str, Any]:
    """`mamba_keys`, and `mamba_expand` in families that have no other word for the width; of a decoder without Mamba-2
    a number of heads that fits any stream.

    Raises:
        CheckpointError: they cannot say it.
    """
    if config.mamba is None:
        return {"mamba_n_heads": 1}
    mamba = config.mamba
    width = mamba.heads * mamba.head_dim
    if width % config.hidden_size or mamba.norm != "gated" or mamba.bias != mamba.output_bias:
        raise not_exportable(
            f"heads of {width} numbers beside a stream of {config.hidden_size}, norm: {mamba.norm}, "
            f"biases: {mamba.bias}, {mamba.output_bias}",
            "a multiple of the stream, a norm behind the gate, all biases or none",
            "keep all heads and the stream, or export it in another family",
        )
    return mamba_keys(config) | {"mamba_expand": width // config.hidden_size}


def check_hybrid(config: ModelConfig, *, rotary: bool) -> None:
    """Raise `CheckpointError` unless blocks have attention or Mamba-2, no windows or chunks, and all attention rotates
    if `rotary`, or else none."""
    for kind in config.kinds:
        plain = BlockKind(mixer=kind.mixer, moe=kind.moe, rotary=rotary or not kind.attends)
        if kind != plain or kind.mixer not in TYPES:
            raise not_exportable(
                str(kind), "attention or Mamba-2 without windows, all rotary or none", "use another family"
            )


def mamba_tensors(config: ModelConfig, prefix: str = "mamba.", target: str = "attention/") -> list[BlockTensor]:
    """Tensors of Mamba-2; one projection makes its gate, values, keys, queries and steps, in this order.

    Args:
        prefix: of their names. target: of its parameters'.
    """
    mamba = config.mamba_config
    wide, narrow = mamba.heads * mamba.head_dim, mamba.groups * mamba.state
    projected = _parts({"z": wide, "v": wide, "k": narrow, "q": narrow, "alpha": mamba.heads})
    convolved = _parts({"v": wide, "k": narrow, "q": narrow})
    found = [BlockTensor(f"{prefix}in_proj.weight", target + name, 1, part) for name, part in projected.items()]
    if mamba.bias:
        found += [
            BlockTensor(f"{prefix}in_proj.bias", f"{target}{name}_bias", None, part) for name, part in projected.items()
        ]
    for name, part in convolved.items():
        found.append(BlockTensor(f"{prefix}conv1d.weight", f"{target}conv_{name}", None, part, True))
    if mamba.conv_bias:
        found += [
            BlockTensor(f"{prefix}conv1d.bias", f"{target}conv_{name}_bias", None, part)
            for name, part in convolved.items()
        ]
    found += [BlockTensor(prefix + name, target + ours) for name, ours in RATES.items()]
    if mamba.norm != "none":
        found.append(BlockTensor(f"{prefix}norm.weight", f"{target}out_norm"))
    found.append(BlockTensor(f"{prefix}out_proj.weight", f"{target}o", 2))
    return [*found, BlockTensor(f"{prefix}out_proj.bias", f"{target}o_bias")] if mamba.output_bias else found


RATES = {"dt_bias": "dt_bias", "A_log": "a_log", "D": "skip"}


def _parts(sizes: dict[str, int]) -> dict[str, TensorSlice]:
    """Runs of these lengths along a tensor's first axis."""
    found, start, total = dict[str, TensorSlice](), 0, sum(sizes.values())
    for name, size in sizes.items():
        found[name] = TensorSlice(0, start, start + size, total)
        start += size
    return found
