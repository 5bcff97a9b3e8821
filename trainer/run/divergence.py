"""Divergence: detection of trainings that end worse than they began, and the best checkpoint that was kept.

Held-out rows decide where an evaluation measures what the last stage trains: perplexity and KL where it compares
tokens, the blocks' cosine distance where it compares attention. What no evaluation measures (MLPs in blockwise mode,
experts' balance) and runs without held-out rows are judged by the loss of the last stage, its first steps against its
last ones, weighted alike. Everything is read from the run's own files, so a resumed run is compared with the
run's start, and all processes of a run come to the same end.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from distillcache.schemas.config.train import LossConfig, Ramp
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import DivergedError
from distillcache.trainer.run.evaluate import Evaluation
from distillcache.trainer.run.folder import best_of
from distillcache.trainer.run.stages import Stage
from distillcache.trainer.step.schedules import may_count

# Held-out rows are the same every time, so these are margins of what is worth a word, not of sampling.
NATS = 0.1  # of cross-entropy and KL: 10% of perplexity
COSINE, SHARE = 0.01, 1.25  # an untouched block wanders by less than 0.01 while others are trained
# Batches differ: of the first and the last quarter of the lines, ten at most.
WINDOW, ERRORS = 10, 3.0  # standard errors of the two means
FEW, FEW_SHARE = 4, 2.0  # with fewer lines than this in a window only twice the loss counts

# Losses of blocks by the names of their metrics, and those of their weights.
OF_BLOCKS = {"mlp": "distill/gamma_mlp", "block": "distill/delta_block", "stream": "distill/epsilon_stream"}
PERPLEXITY, COSINE_DISTANCE = "perplexity", "cosine distance"
EXPONENT = 700.0  # exp of more is no float
Lines = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Measure:
    """One figure of a student, lower is better. value: of a perplexity its logarithm. of: what it was measured on."""

    name: str
    value: float
    of: str = "held-out rows"

    @property
    def shown(self) -> str:
        """As people know it."""
        return f"{math.exp(min(self.value, EXPONENT)) if self.name == PERPLEXITY else self.value:.4g}"


@dataclass(frozen=True)
class RunDivergence:
    """A run that ended worse than it began. before, after: the same measure; limit: the most that would have done."""

    before: Measure
    after: Measure
    limit: Measure

    def spelled(self) -> str:
        """Say the figures in a line."""
        said = f"{self.before.shown} at the start, {self.after.shown} at the end ({self.after.of})"
        return f"{said}; more than {self.limit.shown} is worse"


def find_divergence(stage: Stage, evaluations: Sequence[Evaluation], lines: Lines) -> RunDivergence | None:
    """Find out whether a finished run is worse than at its start.

    Args:
        stage: the run's last.
        evaluations: of the run, those of step 0 and of its last step among them, if it has any.
        lines: the run's metrics.
    """
    found = {entry.step: entry for entry in evaluations}
    held = _judged(_held_out(stage, found.get(0)), _held_out(stage, found.get(stage.last)))
    if held is not None and not _trains_more(stage):
        return held.divergence
    trained = _judged_losses(stage, [line for line in lines if line["step"] > stage.first])
    if trained is None:
        return held.divergence if held else None
    worse_apart = held is not None and held.divergence is not None and not trained.better
    return trained.divergence or (held.divergence if held and worse_apart else None)


@dataclass(frozen=True)
class _Verdict:
    divergence: RunDivergence | None
    better: bool


def _trains_more(stage: Stage) -> bool:
    """True where an evaluation does not measure all that the stage trains."""
    loss = stage.loss
    apart = stage.compares_stream and not stage.compares_tokens
    return stage.compares_mlp or apart or may_count(loss.load_balance.weight) or may_count(loss.router_z)


def _held_out(stage: Stage, found: Evaluation | None) -> Measure | None:
    """The figure of an evaluation that the stage's loss is about."""
    if found is None:
        return None
    if stage.compares_tokens:
        alpha = _last(stage.loss.alpha)
        if alpha and found.kl is not None:
            if alpha == 1:
                return Measure("KL", found.kl)
            if found.perplexity is not None:
                value = alpha * found.kl + (1 - alpha) * math.log(found.perplexity)
                return Measure("KL and cross-entropy", value)
        return None if found.perplexity is None else Measure(PERPLEXITY, math.log(found.perplexity))
    if stage.compares_attention and found.blocks:
        return Measure(COSINE_DISTANCE, float(np.mean(found.cosine)), "held-out rows, mean of blocks")
    return None


def _judged(before: Measure | None, after: Measure | None) -> _Verdict | None:
    if before is None or after is None:
        return None
    margin = max(COSINE, (SHARE - 1) * before.value) if before.name == COSINE_DISTANCE else NATS
    return _verdict(before, after, margin)


def _verdict(before: Measure, after: Measure, margin: float) -> _Verdict:
    limit = replace(before, value=before.value + margin)
    worse = after.value > limit.value
    return _Verdict(RunDivergence(before, after, limit) if worse else None, after.value < before.value)


def _judged_losses(stage: Stage, lines: Lines) -> _Verdict | None:
    """The stage's loss at its first steps against that at its last ones."""
    values = stage_losses(stage, lines)
    if len(values) < 2:
        return None
    count = max(1, min(WINDOW, len(values) // 4))
    first, last = values[:count], values[-count:]
    errors = math.sqrt((np.var(first) + np.var(last)) / count)
    before, after = float(np.mean(first)), float(np.mean(last))
    share = FEW_SHARE if count < FEW else SHARE
    margin = max((share - 1) * before, ERRORS * errors if count >= FEW else 0.0, COSINE * _relative(stage.loss))
    of = f"training rows, mean of {counted(count, 'line')}"
    return _verdict(Measure("loss", before, of), Measure("loss", after, of), margin)


def stage_losses(stage: Stage, lines: Lines) -> list[float]:
    """The loss of each line, with the weights of the stage's last step, so that ramps do not count."""
    steps = _whole_lines(lines)
    return [_with_last_weights(line, steps[-1]) for line in steps]


def _whole_lines(lines: Lines) -> list[Mapping[str, float]]:
    """The steps whose losses can be compared: where any has token losses, not those of batches without a target."""
    steps = [line for line in lines if "distill/total_loss" in line]
    with_tokens = [line for line in steps if "distill/hard_loss" in line]
    return with_tokens or steps


def _with_last_weights(line: Mapping[str, float], last: Mapping[str, float]) -> float:
    alpha, tokens = last.get("distill/alpha", 0.0), last.get("distill/token_weight", 0.0)
    total = last.get("distill/beta_feature", 0.0) * line.get("feature/mean", 0.0)
    for of_blocks, weight in OF_BLOCKS.items():
        found = [value for name, value in line.items() if name.startswith(f"{of_blocks}/block_")]
        total += last.get(weight, 0.0) * float(np.mean(found)) if found else 0.0
    total += tokens * ((1 - alpha) * line.get("distill/hard_loss", 0.0) + alpha * line.get("distill/kl_div_T1", 0.0))
    return total + line.get("distill/moe_lb_loss", 0.0) + line.get("distill/router_z_loss", 0.0)


def _relative(loss: LossConfig) -> float:
    """The weight of terms that have a scale of their own, 0 to about 1."""
    return sum(
        term.relative_l2 + term.cosine
        for term in (loss.feature, loss.mlp, loss.block, loss.stream)
        if may_count(term.weight)
    )


def _last(weight: Any) -> float:
    """A weight at the last step of a stage."""
    if not isinstance(weight, Ramp):
        return float(weight)
    return weight.start if weight.schedule == "constant" else weight.end


@dataclass(frozen=True)
class BestCheckpoint:
    """The best of a run's checkpoints. flag: the `export` option that selects it."""

    step: int
    measure: Measure | None
    flag: str


def best_checkpoint(
    stage: Stage, kept: Sequence[int], evaluations: Sequence[Evaluation], lines: Lines
) -> BestCheckpoint | None:
    """The checkpoint, of those kept, with the best held-out figure; where none was evaluated, with the lowest loss."""
    measured = {entry.step: _held_out(stage, entry) for entry in evaluations if entry.step in kept}
    known = {step: measure for step, measure in measured.items() if measure and math.isfinite(measure.value)}
    if known:
        step = min(known, key=lambda at: known[at].value)
        best = best_of([entry for entry in evaluations if entry.step in kept])
        is_best = best is not None and step == best.step
        return BestCheckpoint(step, known[step], "--best" if is_best else f"--step {step}")
    mine = _whole_lines([line for line in lines if line["step"] > stage.first])
    losses = dict(zip((line["step"] for line in mine), stage_losses(stage, mine), strict=True))
    if there := [step for step in kept if step in losses]:
        step = min(there, key=lambda at: losses[at])
        return BestCheckpoint(step, Measure("loss", losses[step], "that step"), f"--step {step}")
    return BestCheckpoint(kept[-1], None, f"--step {kept[-1]}") if kept else None


def end_of_run(
    run: str, stage: Stage, kept: Sequence[int], evaluations: Sequence[Evaluation], lines: Lines
) -> DivergedError | None:
    """The message of a finished run that is worse than at its start; None where it is not.

    Args:
        stage, evaluations, lines: as in `find_divergence`. kept: the steps of the run's checkpoints.
    """
    found = find_divergence(stage, evaluations, lines)
    if found is None:
        return None
    best = best_checkpoint(stage, kept, evaluations, lines)
    facts = {"steps": stage.last, found.before.name: found.spelled()}
    return diverged_error("the training ended worse than it began", run, facts, best, found.before)


def diverged_error(
    what: str, run: str, facts: Mapping[str, object], best: BestCheckpoint | None, start: Measure | None = None
) -> DivergedError:
    """The message of a run that diverged.

    Args:
        start: the same measure as that of `best`, of the student before step 1.
    """
    other = "start another run with a lower optimizer.learning_rate or optimizer.clip_norm"
    if best is None:
        return DivergedError(what, {"run": run, **facts, "best checkpoint": "none was kept"}, other)
    said = f"step {best.step}" + (f": {best.measure.name} {best.measure.shown}" if best.measure else "")
    if start and best.measure and start.name == best.measure.name and best.measure.value >= start.value:
        said += f"; no better than the student before step 1 ({start.shown}), which is {run}/student"
    export = f"write that checkpoint: distillcache export {run} <folder> {best.flag}; or {other}"
    return DivergedError(what, {"run": run, **facts, "best checkpoint": said}, export, best.step)
