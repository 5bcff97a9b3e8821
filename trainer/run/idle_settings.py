"""Settings of a training that would do nothing, because another one turns off what they belong to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from distillcache.schemas.config.asked import asked, asked_below
from distillcache.schemas.config.feed import FeedConfig
from distillcache.schemas.config.train import TrainSpec, may_count
from distillcache.trainer.run.importance import is_measured
from distillcache.trainer.run.stages import Stage
from distillcache.trainer.terms.parts import SHARES

Used = Callable[[Stage], bool]


def _has_kl(stage: Stage) -> bool:
    return stage.compares_tokens and may_count(stage.loss.alpha)


def _weighs(term: str) -> Used:
    """A stage computes this term of blocks with a weight."""
    return lambda stage: any(each.setting == f"loss.{term}.weight" for each in stage.terms.blocks)


def _has_balance_loss(stage: Stage) -> bool:
    return may_count(stage.loss.load_balance.weight)


_TOKENS = "a feature stage with loss.token_weight above zero"
_KL = "a feature stage with loss.token_weight and loss.alpha above zero"
# Field of `loss` -> which stages use it, and what they need for it.
_OF_LOSS: Mapping[str, tuple[Used, str]] = {
    "token_weight": (lambda stage: stage.compares_tokens, "a feature stage"),
    "alpha": (lambda stage: stage.compares_tokens, _TOKENS),
    "tau": (_has_kl, _KL),
    "kl.direction": (_has_kl, _KL),
    "kl.share": (_has_kl, _KL),
    **{
        f"{term}.{name}": (_weighs(term), f"loss.{term}.weight above zero in a {mode}")
        for term, mode in {
            "feature": "stage",
            "mlp": "blockwise stage",
            "block": "blockwise stage",
            "stream": "feature stage",
        }.items()
        for name in SHARES
    },
    "stream.slots": (_weighs("stream"), "loss.stream.weight above zero in a feature stage"),
    "feature.blocks": (
        lambda stage: stage.program.blocks_apart or stage.compares_attention,
        "a blockwise stage, or loss.feature.weight above zero",
    ),
    "feature.block_weights": (
        lambda stage: any(term.weighs_blocks for term in stage.terms.blocks),
        "loss.feature.weight, or in a blockwise stage loss.block.weight, above zero",
    ),
    "load_balance.scope": (_has_balance_loss, "loss.load_balance.weight above zero"),
}
_BIASES = "moe_balance_type: noaux_tc"
# Field of the run -> whether the run uses it, and what it needs for it.
_OF_RUN: Mapping[str, tuple[Callable[[TrainSpec, Sequence[Stage]], bool], str]] = {
    "remat": (lambda _, stages: any(not stage.program.blocks_apart for stage in stages), "a feature stage"),
    **{
        name: (lambda spec, _: spec.moe_balance_type == "noaux_tc", _BIASES)
        for name in ("moe_update_rule", "moe_update_rate", "moe_bias_cap", "moe_afb_warmup_steps")
    },
    "moe_update_momentum": (
        lambda spec, _: spec.moe_balance_type == "noaux_tc" and spec.moe_update_rule == "ema",
        f"{_BIASES} with moe_update_rule: ema",
    ),
    "moe_bias_sync_group": (lambda spec, _: spec.moe_balance_type == "noaux_tc", _BIASES),
    "expert_parallel_size": (
        lambda spec, _: spec.moe_balance_type == "noaux_tc" and spec.moe_bias_sync_group == "ep",
        f"{_BIASES} with moe_bias_sync_group: ep",
    ),
    "student.importance_rows": (
        lambda spec, _: any(is_measured(op, spec.student.init) for op in spec.student.surgery),
        "an operation of student.surgery with by: importance",
    ),
}


def idle_settings(spec: TrainSpec, feed: FeedConfig, stages: Sequence[Stage]) -> list[str]:
    """Return a note on each setting that was asked for and that no stage of the run uses.

    No refusal: one config serves several modes, and a sweep sets a field for all of its runs.

    Args:
        stages: as `resolve_stages` gives them.
    """
    losses = [stage.loss or spec.loss for stage in spec.stages or []] or [spec.loss]
    given = [replace(stage, loss=loss) for stage, loss in zip(stages, losses, strict=True)]  # noaux_tc takes some out
    found: list[str] = []
    for field, (used, needed) in _OF_LOSS.items():
        asking = [stage for stage in given if _asks(asked(stage.loss, field))]
        if asking and not any(used(stage) for stage in asking):
            found.append(_note(f"loss.{field}", needed))
    optimizers = [stage for stage in stages if asked(stage.optimizer, "inside_scan") is not None]
    if optimizers and not any(stage.program.blocks_apart for stage in optimizers):
        found.append(_note("optimizer.inside_scan", "a blockwise stage"))
    for field, (is_used, needed) in _OF_RUN.items():
        if asked(spec, field) is not None and not is_used(spec, stages):
            found.append(_note(field, needed))
    if asked(feed, "local_cache.max_gib") is not None and feed.local_cache.dir is None:
        found.append(_note("feed.local_cache.max_gib", "feed.local_cache.dir"))
    if feed.local_cache.dir is not None and spec.source != "cache":
        found.append(_note("feed.local_cache.dir", "source: cache"))
    if spec.source == "cache":
        found += [_note(name, "source: online") for name in asked_below(spec, "online")]
    return found


def idle_rest_bucket(spec: TrainSpec, stages: Sequence[Stage], *, reads_topk: bool) -> list[str]:
    """Return a note on a rest bucket where no KL is over a top k.

    Args:
        reads_topk: a stage or the evaluations compute such a KL.
    """
    losses = [spec.loss, *(stage.loss for stage in stages)]
    if reads_topk or not any(asked(loss, "rest_bucket") for loss in losses):
        return []
    return [_note("loss.rest_bucket", "a KL over the top k: a cache with taps.topk_logits, and not its head")]


def _asks(value: Any) -> bool:
    """Return whether a value asks for something: a weight of 0 turns something off."""
    return value is not None and not (isinstance(value, float | int) and not isinstance(value, bool) and value == 0)


def _note(name: str, needed: str) -> str:
    return f"{name} does nothing in this run: it needs {needed}"
