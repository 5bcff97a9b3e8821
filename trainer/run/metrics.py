"""Metrics of a run: one JSON line a step, and the same numbers for TensorBoard.

Names are MaxText's where MaxText has one, so that its dashboards fit; `feature/...` and `eval/...` are ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from distillcache.models.routing import RouterSums, max_violation
from distillcache.trainer.run.evaluate import Evaluation
from distillcache.trainer.terms import Terms
from distillcache.trainer.terms.parts import Means


@dataclass(frozen=True)
class StepTimes:
    """Time of a step. wait_share: share of the time spent waiting for data; flops: of all devices, 0 if unknown."""

    seconds: float
    tokens: int
    wait_share: float
    flops: float = 0.0
    peak_flops: float = 0.0

    def metrics(self) -> dict[str, float]:
        found = {
            "perf/step_time_seconds": self.seconds,
            "perf/tokens_per_second": self.tokens / self.seconds,
            "perf/data_wait_share": self.wait_share,
            "perf/tflops_per_second": self.flops / self.seconds / 1e12,
        }
        if self.peak_flops:
            found["perf/mfu"] = self.flops / self.seconds / self.peak_flops
        return found


def term_metrics(terms: Terms, means: Means) -> dict[str, float]:
    """The losses of a step; what is undefined is left out, and the total where it would be made of that alone."""
    if not means.of:
        return {}
    order = (*terms.logits, *terms.blocks)
    totals = [total for total in (term.total(means) for term in order) if total is not None]
    found = {"distill/total_loss": sum(totals[1:], totals[0])} if totals else {}
    for term in order:
        found |= term.metrics(means)
    return found


def router_metrics(
    losses: Mapping[str, np.ndarray],
    sums: RouterSums,
    blocks: Sequence[int],
    weights: Mapping[str, float],
    biases: Float[np.ndarray, "Lm E"] | None,
) -> dict[str, float]:
    """The routing of a step, over the blocks whose experts ran.

    Args:
        losses: `load_balance` and `router_z`, float `[L]`, before lambda and zeta.
        sums: stacked over `blocks`, those with experts.
        weights: lambda and zeta at this step, where the losses count.
        biases: where they move.
    """
    ran = [place for place in range(len(blocks)) if sums.tokens[place] > 0]
    if not ran:
        return {}
    names = [f"block_{blocks[place]:02d}" for place in ran]
    violation = np.asarray(max_violation(sums.load[ran]))
    entropy = sums.entropy[ran] / sums.tokens[ran]
    balance = [losses["load_balance"][blocks[place]] for place in ran]
    found = {"router/load_balance": float(np.mean(balance))}
    if "load_balance" in weights:
        z = [losses["router_z"][blocks[place]] for place in ran]
        found |= {
            "distill/moe_lb_loss": weights["load_balance"] * float(np.mean(balance)),
            "distill/router_z_loss": weights["router_z"] * float(np.mean(z)),
        }
    of_blocks = {"max_violation": violation, "entropy": entropy}
    if biases is not None:
        of_blocks["bias_norm"] = np.linalg.norm(biases[ran], axis=-1)
    for name, values in of_blocks.items():
        found[f"router/{name}"] = float(np.mean(values))
        found |= {f"router/{name}_{block}": float(value) for block, value in zip(names, values, strict=True)}
    return found


def evaluation_metrics(found: Evaluation, first: Evaluation | None, *, stands_in: bool) -> dict[str, float]:
    """The metrics of one evaluation on held-out rows; what is undefined has none.

    Args:
        first: the student's before its first step: `eval/relative_recovery` is the share of its cosine distance that
            is gone.
        stands_in: the steps compute no cross-entropy, so MaxText's name for their perplexity is free for this one.
    """
    metrics: dict[str, float] = {}
    if found.perplexity is not None:
        metrics["eval/student_perplexity"] = found.perplexity
        if stands_in:
            metrics["distill/student_perplexity"] = found.perplexity
    if found.mean_cosine is not None:
        metrics["eval/cosine"] = found.mean_cosine
        if first is not None and first.mean_cosine:
            metrics["eval/relative_recovery"] = 1.0 - found.mean_cosine / first.mean_cosine
    if found.kl is not None:
        metrics["eval/kl_div_T1"] = found.kl
    if found.agreement is not None:
        metrics["eval/agreement"] = found.agreement
    if found.max_violation is not None:
        metrics["eval/router_max_violation"] = found.max_violation
    if found.perplexity_without_bias is not None:
        metrics["eval/student_perplexity_without_bias"] = found.perplexity_without_bias
    blocks = zip(found.blocks, found.cosine, strict=True)
    return metrics | {f"eval/cosine_block_{block:02d}": cosine for block, cosine in blocks}
