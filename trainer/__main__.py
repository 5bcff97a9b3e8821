"""`python -m distillcache.trainer` is `distillcache train`: stage 2 of the batch job."""

import json
import sys
from collections.abc import Sequence

import jax

from distillcache.schemas import command_line
from distillcache.schemas.config import TrainConfig
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import DivergedError
from distillcache.schemas.runtime.peers import has_peers
from distillcache.schemas.runtime.supervise import is_supervised, supervise
from distillcache.trainer.run.evaluate import Evaluation
from distillcache.trainer.run.yardstick import told_gap
from distillcache.trainer.train import TrainResult, divergence_summary, train


def train_command(argv: Sequence[str], command: str = "distillcache train", as_json: bool = False) -> int:
    """Train the student that the command line describes, and print the results. If a run has several processes, a
    child of this one trains.
    """
    config = command_line.parse(TrainConfig, argv, command)
    if has_peers(config.coordinator) and not is_supervised():
        return supervise("trainer", [*argv, *(["--json"] if as_json else [])])
    try:
        result = train(config)
    except DivergedError as error:
        if as_json and not jax.process_index():
            print(json.dumps({"run": config.run, **divergence_summary(error)}))
        raise
    code = result.diverged.exit_code if result.diverged else 0
    if jax.process_index():  # the first process says it for all
        return code
    if as_json:
        print(json.dumps(result.summary()))
    else:
        print("\n".join(_lines(result)), file=sys.stderr)
    if result.diverged:
        print(result.diverged, file=sys.stderr)
    return code


def _lines(result: TrainResult) -> list[str]:
    loss = "undefined (no token of the last batch is a target)" if result.loss is None else f"{result.loss:.4g}"
    # Of steps alone: what evaluations, checkpoints and compiling take depends on how often a run does them.
    speed = f"{result.tokens_per_s:,.0f} tokens/s in the median step, not counting evaluations and checkpoints"
    lines = [f"run {result.run}: {counted(result.steps, 'step')}, loss {loss}, {speed}"]
    if result.before and result.after:
        lines += _changes(result.before, result.after)
    if result.diverged:
        return lines
    return [*lines, f"write the student: distillcache export {result.run} <folder>"]


def _changes(before: Evaluation, after: Evaluation) -> list[str]:
    """Describe what the training changed on the held-out rows."""
    lines = [told_gap(before, after)]
    if after.perplexity_without_bias is not None:
        lines.append(
            f"without router biases, as other readers of the export route: {after.perplexity_without_bias:.2f}"
        )
    if before.mean_cosine is not None and after.mean_cosine is not None:
        cosine = f"{before.mean_cosine:.3g} before, {after.mean_cosine:.3g} after"
        lines.append(f"cosine distance, mean over blocks: {cosine}")
    if before.kl is not None and after.kl is not None:
        lines.append(f"KL from the teacher, in nats a token: {before.kl:.3g} before, {after.kl:.3g} after")
    if before.agreement is not None and after.agreement is not None:
        shares = f"{before.agreement:.1%} of tokens before, {after.agreement:.1%} after"
        lines.append(f"same first choice as the teacher: {shares}")
    if before.max_violation is not None and after.max_violation is not None:
        violation = f"{before.max_violation:.2f} before, {after.max_violation:.2f} after"
        lines.append(
            f"max violation (the fullest expert's load over the mean, minus one), mean over blocks: {violation}"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: as that of `distillcache` (tools/cli.py)."""
    words = list(sys.argv[1:] if argv is None else argv)
    rest = [word for word in words if word != "--json"]
    return command_line.answer(lambda: train_command(rest, "python -m distillcache.trainer", "--json" in words))


if __name__ == "__main__":
    sys.exit(main())
