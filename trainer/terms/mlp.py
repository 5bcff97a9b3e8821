"""The MLP term (gamma): compares what the MLP adds to the stream with the teacher's."""

from jaxtyping import Array, Bool

from distillcache.schemas.config.train import LossConfig, Weight
from distillcache.trainer.losses import feature_loss
from distillcache.trainer.terms.parts import Means, Outputs, check_shares, mean_over_blocks, shares


class MlpTerm:
    """`loss.mlp`, in blockwise mode."""

    name = "mlp"
    setting = "loss.mlp.weight"
    modes: tuple[str, ...] = ("blockwise",)
    reads: tuple[str, ...] = ("mlp_out",)
    weighs_blocks = False

    def weights(self, loss: LossConfig) -> dict[str, Weight]:
        return {"mlp": loss.mlp.weight}

    def check(self, loss: LossConfig, where: str) -> None:
        check_shares(loss.mlp, "loss.mlp", where)

    def distance(self, loss: LossConfig, own: Outputs, teacher: Outputs, mask: Bool[Array, "B T"]) -> Array:
        return feature_loss(own.mlp_out, teacher.mlp_out, mask, **shares(loss.mlp)).total  # type: ignore[arg-type]

    def total(self, means: Means) -> float | None:
        return mean_over_blocks(means, "mlp") * means.weights["mlp"]

    def metrics(self, means: Means) -> dict[str, float]:
        weight = means.weights["mlp"]
        if not weight and not means.of["mlp"].any():
            return {}
        total = mean_over_blocks(means, "mlp") * weight
        return {"distill/mlp_loss": total, "distill/gamma_mlp": weight, **means.of_blocks("mlp")}
