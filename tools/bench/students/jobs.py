"""Jobs, and the ways to do them.

A *job* is a student cut from its teacher; a *way* trains it: from which source, with which stages and losses. All ways
of a job make the same cuts and read the same rows; what importance chooses is measured on the way's own cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Of SmolLM2-135M's 30 blocks: those that turn the stream least (docs/surgery.md).
DROPPED = (2, 3, 4, 5, 6, 7, 9, 12, 13, 14, 15, 16, 17, 25, 26)
CODECS = ("bf16", "int8", "int4")  # the two last with differences from slot to slot
OFF = {"weight": 0.0}


@dataclass(frozen=True)
class Job:
    """A student.

    Args:
        student, settings: of its TrainConfig.
        block_loss: `loss` of the blockwise stage.
        blockwise_share: of the steps, where blockwise training is followed by a stage of KL.
        blockwise_rate: peak learning rate of the blockwise stage; feature_rate of the others.
    """

    title: str
    student: Mapping[str, Any]
    block_loss: Mapping[str, Any]
    blockwise_share: float
    blockwise_rate: float = 3e-3
    feature_rate: float = 3e-4
    settings: Mapping[str, Any] = field(default_factory=dict)


def _cut(**op: Any) -> dict[str, Any]:
    return {"surgery": [op]}


EXPERTS = _cut(op="upcycle", experts=4, top_k=3, how="partition", by="importance")
JOBS: Mapping[str, Job] = {
    "fewer-heads": Job(
        "two of three query heads", _cut(op="query_heads", to=2, by="importance"), {"feature": {"weight": 1.0}}, 0.5
    ),
    "narrower-mlps": Job(
        "half of the MLP's neurons",
        _cut(op="mlp_width", to=768, by="importance"),
        {"feature": OFF, "mlp": {"weight": 1.0}},
        0.5,
    ),
    "half-blocks": Job(
        "half of the blocks",
        _cut(op="drop_blocks", blocks=list(DROPPED)),
        {"feature": OFF, "block": {"weight": 1.0}},
        0.25,
    ),
    "experts": Job("three of four experts", EXPERTS, {"feature": OFF, "mlp": {"weight": 1.0}}, 0.5),
    "balanced-experts": Job(
        "three of four experts, balanced without a loss",
        EXPERTS,
        {"feature": OFF, "mlp": {"weight": 1.0}},
        0.5,
        settings={"moe_balance_type": "noaux_tc"},
    ),
}


@dataclass(frozen=True)
class Way:
    """Training of a student.

    codec: of the cache that it is trained from; None: only rows are read. blockwise: it begins with a blockwise stage.
    token_loss: `loss` of the feature stage; None: there is none.
    """

    title: str
    colour: str
    codec: str | None = None
    online: bool = False
    blockwise: bool = False
    token_loss: Mapping[str, Any] | None = None


KL = {"alpha": 1.0, "kl": {"targets": "head"}}
ONLINE_KL, OFFLINE = "online_kl", "blockwise_kl"
WAYS: Mapping[str, Way] = {
    "ce": Way("cross-entropy", "#444444", token_loss={"feature": OFF}),
    ONLINE_KL: Way("KL, teacher in the loop", "#c44e52", online=True, token_loss={**KL, "feature": OFF}),
    "online_features": Way(
        "KL and features, teacher in the loop", "#dd8452", online=True, token_loss={**KL, "feature": {"weight": 1.0}}
    ),
    "kl_int8": Way("KL, from the cache", "#937860", "int8", token_loss={**KL, "feature": OFF}),
    **{f"blockwise_{codec}": Way(f"blockwise, {codec}", "#8172b3", codec, blockwise=True) for codec in CODECS},
    **{
        f"{OFFLINE}_{codec}": Way(
            f"blockwise, then KL, {codec}", "#4c72b0", codec, blockwise=True, token_loss={**KL, "feature": OFF}
        )
        for codec in CODECS
    },
}


def stages(job: Job, way: Way, steps: int) -> list[dict[str, Any]]:
    """The stages of a run of this many steps, as TrainConfig has them.

    Learning rates stay at their peak after the warm-up, so that a student at any step is what a run that ends there
    would give.
    """
    blockwise = 0 if not way.blockwise else steps if way.token_loss is None else round(job.blockwise_share * steps)
    found = []
    if blockwise:
        optimizer = _steady(job.blockwise_rate, blockwise)
        found.append({"mode": "blockwise", "steps": blockwise, "loss": dict(job.block_loss), "optimizer": optimizer})
    if way.token_loss is not None and blockwise < steps:
        optimizer = _steady(job.feature_rate, steps - blockwise)
        loss = dict(way.token_loss)
        found.append({"mode": "feature", "steps": steps - blockwise, "loss": loss, "optimizer": optimizer})
    return found


def _steady(rate: float, steps: int) -> dict[str, Any]:
    return {"learning_rate": rate, "warmup_steps": min(4, steps // 2), "final_fraction": 1.0}
