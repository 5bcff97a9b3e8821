"""The block term (delta): compares the stream that leaves a block with the one that leaves the teacher's span.

Source: MOHAWK (arXiv 2408.10189), hidden-state alignment: a block is given the teacher's stream, and its whole output
is compared.
"""

from jaxtyping import Array, Bool

from distillcache.schemas.config.train import LossConfig, Weight
from distillcache.trainer.losses import feature_loss
from distillcache.trainer.terms.parts import Means, Outputs, check_shares, mean_over_blocks, shares


class WholeBlockTerm:
    """`loss.block`, in blockwise mode."""

    name = "block"
    setting = "loss.block.weight"
    modes: tuple[str, ...] = ("blockwise",)
    reads: tuple[str, ...] = ("stream",)
    weighs_blocks = True

    def weights(self, loss: LossConfig) -> dict[str, Weight]:
        return {"block": loss.block.weight}

    def check(self, loss: LossConfig, where: str) -> None:
        check_shares(loss.block, "loss.block", where)

    def distance(self, loss: LossConfig, own: Outputs, teacher: Outputs, mask: Bool[Array, "B T"]) -> Array:
        return feature_loss(own.stream, teacher.stream, mask, **shares(loss.block)).total  # type: ignore[arg-type]

    def total(self, means: Means) -> float | None:
        return mean_over_blocks(means, "block", weighted=True) * means.weights["block"]

    def metrics(self, means: Means) -> dict[str, float]:
        weight = means.weights["block"]
        if not weight and not means.of["block"].any():
            return {}
        total = mean_over_blocks(means, "block", weighted=True) * weight
        return {"distill/block_loss": total, "distill/delta_block": weight, **means.of_blocks("block")}
