"""From a config's words about taps to their plans: slots, codec options and arrays."""

from collections.abc import Sequence

from distillcache.schemas.codecs import Codec, default_group, make_signs
from distillcache.schemas.config import ResidConfig, TapConfig, TapsConfig, TopKConfig
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import ConfigError
from distillcache.schemas.format import layout
from distillcache.schemas.format.manifest import TOPK_LOGITS, TOPK_SLOTS, PartPlan, TapPlan
from distillcache.schemas.format.tap_codec import tap_codec


def chosen_blocks(blocks: str | list[int], num_blocks: int) -> tuple[int, ...]:
    if isinstance(blocks, str):
        return tuple(range(num_blocks))
    chosen = tuple(sorted(set(blocks)))
    if not chosen or chosen[0] < 0 or chosen[-1] >= num_blocks:
        raise ConfigError(
            "the blocks to record are not the teacher's",
            {"blocks": blocks, "expected": f"some of 0 to {num_blocks - 1}"},
        )
    return chosen


def choose_taps(
    taps: TapsConfig,
    blocks: tuple[int, ...],
    num_blocks: int,
    hidden: int,
    vocab: int,
    token_ids: int | None = None,
) -> list[TapPlan]:
    """The taps with their slots and arrays; the objects are not divided yet.

    Args:
        vocab: rows of the teacher's vocabulary. token_ids: how many of them are ids of the tokenizer; None: all.

    Raises:
        ConfigError: a tap cannot be stored so, or there is none.
    """
    chosen = []
    for name in ("attn_out", "resid", "mlp_out"):
        config = getattr(taps, name)
        if config is None:
            continue
        chosen.append(tap_plan(name, config, _slots_of(config, blocks, num_blocks), hidden))
    if taps.topk_logits is not None:
        chosen.append(topk_plan(taps.topk_logits, hidden, vocab, token_ids))
    if not chosen:
        raise ConfigError("there is nothing to record", {"taps": "all are null"}, "set taps.attn_out or taps.resid")
    return chosen


def _slots_of(config: TapConfig, blocks: Sequence[int], num_blocks: int) -> list[int]:
    """The slots to record: those that the config names, or of the stream those on both sides of every block, from
    which each block's mlp_out follows.

    Raises:
        ConfigError: the stream has no such slots.
    """
    if not isinstance(config, ResidConfig):
        return list(blocks)
    slots = {*blocks, *(block + 1 for block in blocks)}
    if config.slots is not None:
        slots = {num_blocks if slot == "last" else slot for slot in config.slots}
    if not slots or max(slots) > num_blocks:
        raise ConfigError(
            "the slots to record are not the stream's",
            {"taps.resid.slots": config.slots, "expected": f"some of 0 to {num_blocks}; last is {num_blocks}"},
            "leave it out to record the stream on both sides of every block",
        )
    if config.head and num_blocks not in slots:
        raise ConfigError(
            "the head gives the logits of the last slot, and that is not recorded",
            {"taps.resid.head": True, "recorded": f"slots {sorted(slots)} of 0 to {num_blocks}"},
            "add last to taps.resid.slots, or leave out taps.resid.head",
        )
    return sorted(slots)


def tap_plan(name: str, config: TapConfig, slots: Sequence[int], hidden: int) -> TapPlan:
    """A tap in the codec that a config asks for; the objects are not divided yet.

    Raises:
        ConfigError: there is no such codec.
    """
    if config.delta and name != "resid":
        raise ConfigError(
            "delta coding is for the residual stream",
            {f"taps.{name}.delta": True, "why": "only the stream changes little from block to block"},
            f"leave out taps.{name}.delta",
        )
    integer = config.codec in ("int8", "int4")
    options = {
        "group": default_group(hidden) if integer and config.group is None else config.group,
        "rotate": config.rotate and integer,
        "delta": config.delta,
        "keyframe_every": config.keyframe_every if config.delta else 0,
        "head": isinstance(config, ResidConfig) and config.head,
    }
    tap = TapPlan(name=name, codec=config.codec, slots=(), parts=(), **options)
    return with_compression(with_slots(tap, slots, hidden), config.compress)


def topk_plan(config: TopKConfig, hidden: int, vocab: int, token_ids: int | None = None) -> TapPlan:
    """The tap `topk_logits`; the objects are not divided yet. Rows of the vocabulary behind `token_ids` are left out.

    Raises:
        ConfigError: the vocabulary has fewer ids.
    """
    ids = vocab if token_ids is None else min(vocab, token_ids)
    if config.k > ids:
        padding = f", {counted(vocab - ids, 'row')} of padding left out" if ids < vocab else ""
        raise ConfigError(
            "a token has fewer logits than should be recorded",
            {"taps.topk_logits.k": config.k, "the teacher's vocabulary": f"{ids:,} ids{padding}"},
            f"lower taps.topk_logits.k to {ids} or less",
        )
    real = ids if ids < vocab else None
    tap = TapPlan(name=TOPK_LOGITS, codec=config.dtype, k=config.k, vocab_size=real, slots=(), parts=())
    return with_compression(with_slots(tap, TOPK_SLOTS, hidden), config.compress)


def counting_as_recorded(taps: Sequence[TapPlan], recorded: Sequence[TapPlan]) -> list[TapPlan]:
    """The taps, with logits of the same ids as the recorded ones, so that both have the same meaning."""
    counted = {tap.name: tap.vocab_size for tap in recorded if tap.k is not None}
    return [
        tap.model_copy(update={"vocab_size": counted[tap.name]}) if tap.k is not None and tap.name in counted else tap
        for tap in taps
    ]


def with_slots(tap: TapPlan, slots: Sequence[int], hidden: int) -> TapPlan:
    """The tap with these slots alone; the objects are not divided yet."""
    codec = tap_codec(tap, {f"signs.{tap.name}": make_signs(tap.name, hidden)})
    changed = tap.model_copy(update={"slots": tuple(slots), "parts": _parts(tap.name, codec, hidden, len(slots))})
    return with_compression(changed, tap.compress)


def with_compression(tap: TapPlan, compress: layout.Compression) -> TapPlan:
    """The tap with its arrays compressed so."""
    return tap.model_copy(update={"parts": tuple(part.model_copy(update={"compress": compress}) for part in tap.parts)})


def _parts(tap: str, codec: Codec, hidden: int, slots: int) -> tuple[PartPlan, ...]:
    return tuple(
        PartPlan(
            array=tap if part.name == "codes" else f"{tap}.{part.name}",
            part=part.name,
            dtype=part.dtype,
            width=part.width,
            bits_of=part.bits_of,
            every=part.every,
            slots=part.slots(slots),
            slots_per_object=1,
        )
        for part in codec.parts(hidden)
    )
