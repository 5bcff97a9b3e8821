"""The stream term (epsilon): compares the student's own stream with the teacher's, at chosen slots.

Source: TinyBERT (arXiv 1909.10351), hidden states of chosen layers, through a learned map where widths differ.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Bool

from distillcache.schemas.config.train import LossConfig, Weight
from distillcache.schemas.errors import ConfigError
from distillcache.trainer.losses import feature_loss
from distillcache.trainer.terms.parts import Means, Outputs, check_shares, shares


class StreamTerm:
    """`loss.stream`, in feature mode."""

    name = "stream"
    setting = "loss.stream.weight"
    modes: tuple[str, ...] = ("feature",)
    reads: tuple[str, ...] = ("stream",)
    weighs_blocks = False

    def weights(self, loss: LossConfig) -> dict[str, Weight]:
        return {"stream": loss.stream.weight}

    def check(self, loss: LossConfig, where: str) -> None:
        check_shares(loss.stream, "loss.stream", where)
        _check_slots(loss.stream.slots, where)

    def distance(self, loss: LossConfig, own: Outputs, teacher: Outputs, mask: Bool[Array, "B T"]) -> Array:
        return feature_loss(own.stream, teacher.stream, mask, **shares(loss.stream)).total  # type: ignore[arg-type]

    def total(self, means: Means) -> float | None:
        if not means.streams:
            return None
        return float(np.mean(means.of["stream"][list(means.streams)])) * means.weights["stream"]

    def metrics(self, means: Means) -> dict[str, float]:
        total = self.total(means)
        if total is None:
            return {}
        of_blocks = means.of_blocks("stream", means.streams)
        return {"distill/stream_loss": total, "distill/epsilon_stream": means.weights["stream"], **of_blocks}


def _check_slots(slots: Sequence[int | str] | str, where: str) -> None:
    """Raise `ConfigError` for slots that no student can be compared at, or that are named twice."""
    if slots == "all":
        return
    facts = {"stage": where, "loss.stream.slots": slots}
    if not slots:
        raise ConfigError("loss.stream names no slot", facts, "name some, or leave it out for all")
    if len(set(slots)) != len(slots):
        raise ConfigError("a slot is named twice", facts, "name every slot once")
    if any(slot == 0 for slot in slots):
        raise ConfigError(
            "slot 0 is the embedding of the teacher's tokens: no block has run yet, and nothing is compared there",
            facts,
            "name slots from 1 on: slot l is the stream that leaves the teacher's block l - 1",
        )
