"""Per-block settings of configs: which blocks have a window, and which rotate.

Source: HF transformers, `layer_types`, `no_rope_layers` and their relatives in many `configuration_*.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distillcache.models.config import BlockKind, ModelConfig, RopeConfig
from distillcache.models.families.reading.family import not_exportable
from distillcache.models.families.reading.values import Values, rope_from_hf, unknown_key

SLIDING, FULL = "sliding_attention", "full_attention"


def window_in_use(values: Values) -> int | None:
    """`sliding_window` where `use_sliding_window` turns it on."""
    return values.size_or_none("sliding_window") if values.flag("use_sliding_window") else None


def typed_windows(values: Values, window: int | None, slides: Callable[[int], bool]) -> list[int | None]:
    """The window of every block, by `layer_types`.

    Args:
        window: of the blocks that slide; None where none may.
        slides: whether a block does where the config has no `layer_types`.
    """
    depth = values.size("num_hidden_layers")
    types = values.per_block("layer_types", (SLIDING, FULL), depth)
    if types is None:
        types = [SLIDING if window is not None and slides(at) else FULL for at in range(depth)]
    if SLIDING in types and window is None:
        raise values.bad("layer_types", f"no {SLIDING} where the config has no sliding_window in use")
    return [window if kind == SLIDING else None for kind in types]


def typed_ropes(
    values: Values, theta: float, local_theta: float, old_local: str, *, flat: bool = False
) -> tuple[RopeConfig, RopeConfig]:
    """Rotary embedding of the blocks that see all, and of those with a window.

    Transformers 5 has both in `rope_parameters`, by the kinds of `layer_types`; before, `rope_theta` and `rope_scaling`
    were the former's.

    Args:
        theta, local_theta: the bases that are assumed. old_local: the key of the latter's base before transformers 5.
        flat: the family's first files of transformers 5 had the former's parameters alone, not by kinds, and its base
            for both. A file that it saved again has them beside the kinds, where no version reads them.
    """
    given = values["rope_parameters"] or {}
    if flat and isinstance(given, dict):
        typed = {key: part for key, part in given.items() if key in (FULL, SLIDING)}
        base = {"rope_theta": given["rope_theta"]} if given.get("rope_theta") is not None else {}
        given = typed or ({FULL: given, SLIDING: base} if given else {})
    if not isinstance(given, dict) or not all(isinstance(part, dict | None) for part in given.values()):
        raise values.bad("rope_parameters", f"an object with an object for each of {FULL} and {SLIDING}")
    for key in given.keys() - {FULL, SLIDING}:
        raise unknown_key(values.file, f"rope_parameters.{key}", given[key])
    longest = values.size("max_position_embeddings")
    old = {"rope_theta": values["rope_theta"], "rope_scaling": values["rope_scaling"]}
    local = {"rope_theta": values[old_local]}
    if flat:  # one key beside two bases can only be a default for them
        old, local = (
            {**each, "rope_theta": None} if _has_base(given.get(kind)) else each
            for each, kind in ((old, FULL), (local, SLIDING))
        )
    return (
        rope_from_hf({**old, "rope_parameters": given.get(FULL)}, longest, values.file, theta),
        rope_from_hf({**local, "rope_parameters": given.get(SLIDING)}, longest, values.file, local_theta),
    )


def _has_base(parameters: Mapping[str, Any] | None) -> bool:
    return parameters is not None and parameters.get("rope_theta") is not None


def rotary_blocks(values: Values) -> list[bool]:
    """Return for every block whether it rotates. `no_rope_layers` has ones for rotary blocks, despite its name, and
    may be longer than the depth; an empty list means the default.
    """
    depth, given = values.size("num_hidden_layers"), values["no_rope_layers"]
    if not given:
        interval = values.size("no_rope_layer_interval")
        return [(block + 1) % interval != 0 for block in range(depth)]
    if not isinstance(given, list) or len(given) < depth or any(entry not in (0, 1) for entry in given):
        raise values.bad("no_rope_layers", f"at least {depth} of 0 and 1, one for each block")
    return [bool(entry) for entry in given[:depth]]


def only_window(kinds: Sequence[BlockKind]) -> int | None:
    """The window of the blocks that have one; None: none has.

    Raises:
        CheckpointError: there are several.
    """
    windows = {kind.window for kind in kinds if kind.window is not None}
    if len(windows) > 1:
        raise not_exportable(f"windows of {sorted(windows)}", "one window", "give all blocks with a window the same")
    return windows.pop() if windows else None


def window_keys(config: ModelConfig) -> dict[str, Any]:
    """`sliding_window` and `layer_types` of an export, with the switch for the former."""
    window = only_window(config.kinds)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": [FULL if kind.window is None else SLIDING for kind in config.kinds],
    }


def typed_window_keys(config: ModelConfig) -> dict[str, Any]:
    """The same for families without that switch. Transformers makes their mask of a window also where no block uses it:
    then the window is as long as rows may be."""
    window = only_window(config.kinds)
    return {
        "sliding_window": config.max_positions if window is None else window,
        "layer_types": [FULL if kind.window is None else SLIDING for kind in config.kinds],
    }


def check_dense(config: ModelConfig, *, rotary: bool = True) -> None:
    """Raise `CheckpointError` unless all blocks are dense, with attention, without chunks, and all of them rotate where
    `rotary`."""
    plain = BlockKind().mixer
    odd = [kind for kind in config.kinds if kind.moe or kind.chunk is not None or kind.mixer != plain]
    if odd := odd or [kind for kind in config.kinds if rotary and not kind.rotary]:
        rotating = " that rotate" if rotary else ""
        raise not_exportable(
            str(odd[0]), f"dense blocks with attention, without chunks{rotating}", "export it in another family"
        )
