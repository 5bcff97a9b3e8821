"""The token term (token_weight): cross-entropy on the data and KL to the teacher's recorded logits, mixed by alpha.

    token_weight * (alpha * tau^2 * KL + (1 - alpha) * CE)

Source: Hinton et al. 2015 (tau^2), MaxText distillation_utils (the sum and its names).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array

from distillcache.schemas.config.train import LossConfig, Weight
from distillcache.schemas.errors import ConfigError
from distillcache.trainer.losses import (
    counted_predictions,
    next_token_loss,
    perplexity_of,
    support_kl,
    support_logits,
    topk_cross_entropy,
    without_padding,
)
from distillcache.trainer.step.schedules import all_positive, always_one, may_count
from distillcache.trainer.terms.parts import LogitRow, Means


class TokensTerm:
    """`loss.token_weight`, in feature mode.

    Its sums: `ce`; with recorded logits `kl` (at tau), `kl_1` (at 1), `teacher` (its own cross-entropy; where a target
    lies outside the top k, the least that it can be) and `covered` (targets among its top k).
    """

    name = "tokens"
    setting = "loss.token_weight"
    modes: tuple[str, ...] = ("feature",)

    def weights(self, loss: LossConfig) -> dict[str, Weight]:
        return {"tokens": loss.token_weight, "alpha": loss.alpha, "tau": loss.tau}

    def check(self, loss: LossConfig, where: str) -> None:
        if not all_positive(loss.tau):
            raise ConfigError(
                "a temperature must be above zero", {"stage": where, "loss.tau": loss.tau}, "set loss.tau to 1 or more"
            )

    def taps(self, loss: LossConfig) -> tuple[str, ...]:
        return ("topk_logits",) if may_count(loss.alpha) else ()

    def teaches_teacher(self, loss: LossConfig) -> bool:
        return not always_one(loss.alpha)

    def sums(self, loss: LossConfig, row: LogitRow, weights: Mapping[str, Array]) -> dict[str, Array]:
        losses = {"ce": next_token_loss(without_padding(row.logits, row.real_vocab), **row.fields).total}
        if row.recorded is None:
            return losses
        recorded = row.recorded
        counts = counted_predictions(row.fields["segment_ids"], row.fields["loss_mask"])
        support = support_logits(
            row.logits,
            recorded.values,
            recorded.ids,
            recorded.logsumexp,
            counts,
            rest_bucket=loss.rest_bucket,
            real_vocab=row.real_vocab,
        )
        teacher = topk_cross_entropy(*recorded, **row.fields)
        return losses | {
            "kl": support_kl(support, counts, weights["tau"]).total,
            "kl_1": support_kl(jax.lax.stop_gradient(support), counts, 1.0).total,
            "teacher": teacher.at_least.total,
            "covered": teacher.share.total,
        }

    def value(self, sums: Mapping[str, Array], weights: Mapping[str, Array], targets: Array) -> Array:
        soft = jnp.square(weights["tau"]) * sums.get("kl", 0.0) / targets
        hard = sums["ce"] / targets
        return weights["tokens"] * (weights["alpha"] * soft + (1.0 - weights["alpha"]) * hard)

    def total(self, means: Means) -> float | None:
        if "ce" not in means.of:
            return None
        alpha = means.weights["alpha"]
        return means.weights["tokens"] * (alpha * _soft(means) + (1 - alpha) * means.of["ce"])

    def metrics(self, means: Means) -> dict[str, float]:
        losses, weights, found = means.of, means.weights, dict[str, float]()
        if "ce" in losses:
            found = {
                "distill/hard_loss": losses["ce"],
                "distill/student_perplexity": perplexity_of(losses["ce"]),
                "distill/alpha": weights["alpha"],
                "distill/token_weight": weights["tokens"],
            }
        if "kl" in losses:
            found |= {
                "distill/soft_loss": _soft(means),
                "distill/kl_div_at_T": losses["kl"],
                "distill/kl_div_T1": losses["kl_1"],
                "distill/temperature": weights["tau"],
                "distill/teacher_loss": losses["teacher"],
                "distill/teacher_perplexity": perplexity_of(losses["teacher"]),
                "logits/targets_covered": losses["covered"],
            }
        return found


def _soft(means: Means) -> float:
    tau = means.weights["tau"]
    return tau * tau * means.of.get("kl", 0.0)
