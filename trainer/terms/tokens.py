"""The token term (token_weight): cross-entropy on the data and KL to the teacher, mixed by alpha.

    token_weight * (alpha * tau^2 * KL + (1 - alpha) * CE)

Source: Hinton et al. 2015 (tau^2), MaxText distillation_utils (the sum and its names).
"""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from distillcache.schemas.config.train import KlConfig, LossConfig, Weight
from distillcache.schemas.errors import ConfigError
from distillcache.trainer.head_losses import Divergence, HeadSums, HeadWeights, support_divergence
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
from distillcache.trainer.terms.parts import LogitRow, Means, Recorded

OWN_NAMES = {"covered": "logits/targets_covered", "agreement": "logits/agreement"}  # MaxText has none for these
SHARES = {"jsd": 0.5, "skew": 0.1}  # of the teacher in the mixture, by default


def divergence_of(kl: KlConfig) -> Divergence:
    """The divergence that a config asks for."""
    share = SHARES.get(kl.direction, 0.0) if kl.share is None else kl.share
    return Divergence(kl.direction, share)


def chosen_targets(kl: KlConfig, *, has_topk: bool, keeps_head: bool) -> Literal["head", "topk"]:
    """The distribution that a KL compares with, whether the cache has it or not; `auto` is decided here."""
    if kl.targets != "auto":
        return kl.targets
    return "topk" if has_topk and not keeps_head else "head"


class TokensTerm:
    """`loss.token_weight`, in feature mode.

    Its sums: `ce`; with the teacher's distribution `kl` (at tau, in the direction of `loss.kl`), `kl_1` (KL from the
    teacher, at 1) and `teacher` (its own cross-entropy; of a top k, where a target lies outside it, the least that it
    can be); from a top k `covered` (targets among it), from its head `agreement` (of first choices).
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
        kl = loss.kl
        if kl.share is not None and (kl.direction not in SHARES or (kl.direction == "jsd" and kl.share == 0)):
            raise ConfigError(
                "the share of a mixture does not fit the divergence",
                {"stage": where, "loss.kl.direction": kl.direction, "loss.kl.share": kl.share},
                "leave it out, or set direction to skew (0 or more, below 1) or jsd (above 0, below 1)",
            )

    def teacher_distribution(self, loss: LossConfig, recorded: Recorded) -> Literal["head", "topk"] | None:
        if not may_count(loss.alpha):
            return None
        there = {"topk": "topk_logits" in recorded.recorded, "head": recorded.last_stream}
        wanted = chosen_targets(loss.kl, has_topk=there["topk"], keeps_head=recorded.keeps_head)
        if there[wanted]:
            return wanted
        missing, tap = {
            "topk": ("the teacher's top k logits", "taps.topk_logits"),
            "head": ("the stream that leaves the teacher's last block", "taps.resid.slots: [last]"),
        }[wanted]
        raise ConfigError(
            "the cache lacks what a KL loss compares with",
            {
                "cache": recorded.cache,
                "missing": missing,
                "loss.alpha": loss.alpha,
                "loss.kl.targets": loss.kl.targets,
            },
            f"add it: distillcache build --extend with {tap} (online: name it in online.taps); or set loss.alpha to 0",
        )

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
            "kl": support_divergence(divergence_of(loss.kl), support, counts, weights["tau"]).total,
            "kl_1": support_kl(jax.lax.stop_gradient(support), counts, 1.0).total,
            "teacher": teacher.at_least.total,
            "covered": teacher.share.total,
        }

    def head_weights(self, loss: LossConfig, weights: Mapping[str, Array], targets: Array) -> HeadWeights:
        alpha, whole = weights["alpha"], weights["tokens"] / targets
        return HeadWeights(whole * alpha * jnp.square(weights["tau"]), whole * (1.0 - alpha), weights["tau"])

    def head_sums(self, found: HeadSums) -> dict[str, Array]:
        return {
            "ce": found.cross_entropy,
            "kl": found.divergence,
            "kl_1": found.kl,
            "teacher": found.teacher_cross_entropy,
            "agreement": found.agreement,
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
            }
            found |= {name: losses[key] for key, name in OWN_NAMES.items() if key in losses}
        return found


def _soft(means: Means) -> float:
    tau = means.weights["tau"]
    return tau * tau * means.of.get("kl", 0.0)
