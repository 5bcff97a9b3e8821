"""Metrics of a run: one JSON line a step, and the same numbers for TensorBoard.

Names are MaxText's where MaxText has one, so that its dashboards fit; `feature/...` and `eval/...` are ours.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from trainer.evaluate import Evaluation

LINES = "metrics.jsonl"
TENSORBOARD = "tensorboard"


class MetricsLog:
    """Where a run writes its metrics. Lines past `last_step` are cut first: the steps that a killed run repeats."""

    def __init__(self, run: Path, last_step: int) -> None:
        path = run / LINES
        kept = [line for line in read_metrics(run) if line["step"] <= last_step]
        path.write_text("".join(_spell(line) for line in kept))
        self._lines = path.open("a", encoding="utf-8")
        # TensorBoard drops what an earlier process wrote from purge_step on.
        self._tensorboard = SummaryWriter(str(run / TENSORBOARD), purge_step=last_step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add the metrics after `step` steps."""
        self._lines.write(_spell({"step": step, **values}))
        self._lines.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close both."""
        self._lines.close()
        self._tensorboard.close()


def training_metrics(
    losses: np.ndarray,
    trained: Sequence[int],
    *,
    beta: float,
    learning_rate: float,
    tokens_per_s: float,
    step_s: float,
    wait_share: float,
) -> dict[str, float]:
    """The metrics of one training step.

    Args:
        losses: float `[L]`, each block's feature loss after beta, a mean over tokens.
        trained: the blocks that count.
        wait_share: share of the step's time spent waiting for data.
    """
    feature = float(np.mean(losses[list(trained)]))
    return {
        "distill/total_loss": feature,
        "distill/out_proj_feature_loss": feature,
        "distill/beta_feature": beta,
        "learning/current_learning_rate": learning_rate,
        "perf/step_time_seconds": step_s,
        "perf/tokens_per_second": tokens_per_s,
        "perf/data_wait_share": wait_share,
        **{f"feature/block_{block:02d}": float(losses[block]) for block in trained},
    }


def evaluation_metrics(found: Evaluation) -> dict[str, float]:
    """The metrics of one evaluation on held-out rows."""
    blocks = zip(found.blocks, found.cosine, strict=True)
    return {
        "distill/student_perplexity": found.perplexity,
        "eval/cosine": found.mean_cosine,
        **{f"eval/cosine_block_{block:02d}": cosine for block, cosine in blocks},
    }


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run, in order; a last line that a killed run left unfinished is not one."""
    path = run / LINES
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _spell(line: dict[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"
