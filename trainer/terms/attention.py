"""The attention term (beta): compares what attention adds to the stream with the teacher's."""

from jaxtyping import Array, Bool

from distillcache.schemas.config.train import LossConfig, Weight
from distillcache.trainer.losses import feature_loss
from distillcache.trainer.terms.parts import Means, Outputs, check_shares, mean_over_blocks, shares


class AttentionTerm:
    """`loss.feature`, in both modes."""

    name = "feature"
    setting = "loss.feature.weight"
    modes: tuple[str, ...] = ("blockwise", "feature")
    reads: tuple[str, ...] = ("attn_out",)
    weighs_blocks = True

    def weights(self, loss: LossConfig) -> dict[str, Weight]:
        return {"feature": loss.feature.weight}

    def check(self, loss: LossConfig, where: str) -> None:
        check_shares(loss.feature, "loss.feature", where)

    def distance(self, loss: LossConfig, own: Outputs, teacher: Outputs, mask: Bool[Array, "B T"]) -> Array:
        return feature_loss(own.attn_out, teacher.attn_out, mask, **shares(loss.feature)).total  # type: ignore[arg-type]

    def total(self, means: Means) -> float | None:
        if not means.blocks:
            return None
        return mean_over_blocks(means, "feature", weighted=True) * means.weights["feature"]

    def metrics(self, means: Means) -> dict[str, float]:
        total = self.total(means)
        if total is None or not (means.weights["feature"] or means.of["feature"].any()):
            return {}
        return {
            "distill/out_proj_feature_loss": total,
            "distill/beta_feature": means.weights["feature"],
            "feature/mean": mean_over_blocks(means, "feature"),
            **means.of_blocks("feature"),
        }
