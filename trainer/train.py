"""Stage 2: a student from a cache.

    <run>/config.yaml      the resolved config            <run>/metrics.jsonl, tensorboard/
    <run>/run.json         what the numbers depend on     <run>/eval.json   every evaluation
    <run>/student/         the student before step 1      <run>/checkpoints/

The same command goes on where an interrupted run was, to the same bits as a run that was never interrupted: the feed,
the step and the schedule are pure functions of the config and the step's number.
"""

import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from models.decoder import Decoder
from schemas import settings
from schemas.config import TrainConfig
from schemas.errors import ConfigError, InputError, Interrupted, NonFiniteError, PlanMismatchError
from schemas.layout import TOKENIZER
from schemas.progress import Progress
from schemas.signals import StopRequest, watch_for_stop
from schemas.storage import is_url
from trainer.checkpoints import STUDENT, Checkpoints
from trainer.evaluate import Evaluation, blockwise_cosine, held_out_perplexity
from trainer.feed import CacheSource, Feed, make_feed
from trainer.losses import MaskedSum
from trainer.metrics import MetricsLog, evaluation_metrics, read_metrics, training_metrics
from trainer.optimizer import learning_rate_schedule, make_optimizer
from trainer.step import AttentionStack, TapTable, TrainState, init_state, make_step, tap_table
from trainer.student import open_student

TAPS = ("resid", "attn_out")
# What may differ when a run goes on: no number of the training depends on it.
FREE_FIELDS = frozenset(
    {"run", "cache", "checkpoint_every", "keep_checkpoints", "eval_every", "eval_batch_rows", "log_every"}
    | {"prefetch_batches", "partial"}
)
EVALUATIONS = "eval.json"
IDENTITY = "run.json"
RESOLVED = "config.yaml"


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    metrics: the last line of metrics.jsonl. tokens_per_s: the median over its lines. before, after: evaluations of the
    student at step 0 and at the end; None where no rows are held out. resumed_from: the step at which this process
    began, `steps` if there was nothing left to do.
    """

    run: str
    steps: int
    resumed_from: int
    metrics: dict[str, float]
    tokens_per_s: float
    before: Evaluation | None
    after: Evaluation | None

    @property
    def loss(self) -> float:
        """The last step's."""
        return self.metrics["distill/total_loss"]


def train(config: TrainConfig) -> TrainResult:
    """Train the student that `config` describes, or go on with its run; a finished run is left as it is.

    Raises:
        PlanMismatchError: the folder holds the run of another config or cache.
        ConfigError, InputError, CheckpointError: what was given cannot be used; no run is begun.
        NonFiniteError: a loss is not finite; the checkpoints before it stay.
        Interrupted: SIGTERM or SIGINT; a checkpoint of the last step was written, and the same command goes on.
    """
    folder = _run_folder(config.run)
    blocks = None if config.loss.feature.blocks == "all" else config.loss.feature.blocks
    source = CacheSource(config.cache, TAPS, blocks, "train", leaving=False, partial=config.partial)
    held_out = CacheSource(config.cache, TAPS, None, "eval", leaving=False, partial=config.partial)
    _check_losses(config)
    _claim_folder(folder, config, source)
    with watch_for_stop() as stop:
        decoder = open_student(folder, config.student, source)
        checkpoints = Checkpoints(folder, config.keep_checkpoints)
        try:
            first = _Run(config, folder, source, held_out, decoder, checkpoints, stop).go()
        finally:
            checkpoints.close()
    return _result(config, folder, first)


class _Run:
    """One process's part of a run: restores, steps, evaluates, saves."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        source: CacheSource,
        held_out: CacheSource,
        decoder: Decoder,
        checkpoints: Checkpoints,
        stop: StopRequest,
    ) -> None:
        self.config, self.folder, self.source, self.held_out = config, folder, source, held_out
        self.decoder, self.checkpoints, self.stop = decoder, checkpoints, stop
        self.stack = AttentionStack(decoder)
        self.table = self._table(source)
        optimizer = make_optimizer(config.optimizer, config.steps)
        self.schedule = learning_rate_schedule(config.optimizer, config.steps)
        self.state: TrainState = init_state(self.stack, decoder, optimizer)
        self.step = make_step(self.stack, optimizer, config.loss.feature, self.table)

    def go(self) -> int:
        """Run to the end; returns the step at which this process began."""
        first = self.checkpoints.latest() or 0
        feed_state = {"seed": self.config.seed, "next_step": first}
        if first:
            self.state, feed_state = self.checkpoints.restore(first, self.state)
        if first == self.config.steps:
            print(f"{self.config.run} is finished: nothing to do", file=sys.stderr)
            return first
        _cut_evaluations(self.folder, first)
        log = MetricsLog(self.folder, first if first else -1)
        feed = make_feed(
            self.source,
            global_batch_rows=self.config.batch_rows,
            seed=feed_state["seed"],
            start_step=feed_state["next_step"],
            prefetch_batches=self.config.prefetch_batches,
        )
        try:
            if not first and self.held_out:
                log.log(0, evaluation_metrics(self._evaluate(0)))
            with feed, Progress("train", self.config.steps, unit="steps") as bar:
                bar.skip(first)
                self._steps(first, feed, log, bar)
        finally:
            log.close()
        return first

    def _steps(self, first: int, feed: Feed, log: MetricsLog, bar: Progress) -> None:
        batch = _on_device(next(feed))
        for number in range(first + 1, self.config.steps + 1):
            start, waited, tokens = time.perf_counter(), feed.wait_s, batch.pop("real_tokens")
            self.state, sums = self.step(self.state, batch)  # returns before it is computed
            if number < self.config.steps:
                batch = _on_device(next(feed))
            losses = self._settle(number, sums)
            seconds = time.perf_counter() - start
            metrics = self._metrics(number, losses, tokens, seconds, feed.wait_s - waited)
            bar.advance(1, note=f"loss {metrics['distill/total_loss']:.4g}")
            self._keep(number, metrics, log, {**feed.get_state(), "next_step": number})

    def _settle(self, number: int, sums: MaskedSum) -> np.ndarray:
        """The step's losses per block, once computed.

        Raises:
            NonFiniteError: one of them is not a number; nothing of this step is kept.
        """
        losses = np.asarray(sums.total, np.float64) / max(float(sums.weight), 1.0)
        broken = np.flatnonzero(~np.isfinite(losses))
        if broken.size:
            saved = self.checkpoints.latest()
            raise NonFiniteError(
                "the training has diverged: a block's loss is not finite",
                {
                    "run": self.config.run,
                    "step": number,
                    "block": ", ".join(map(str, broken)),
                    "found": losses[broken[0]],
                    "last checkpoint": "none" if saved is None else f"step {saved}",
                },
                "start another run with a lower optimizer.learning_rate or optimizer.clip_norm",
            )
        return losses

    def _metrics(self, number: int, losses: np.ndarray, tokens: int, seconds: float, waited: float) -> dict[str, float]:
        return training_metrics(
            losses,
            self.source.blocks,
            beta=self.config.loss.feature.weight,
            learning_rate=float(np.asarray(self.schedule(number - 1))),
            tokens_per_s=tokens / seconds,
            step_s=seconds,
            wait_share=waited / seconds,
        )

    def _keep(self, number: int, metrics: dict[str, float], log: MetricsLog, feed: dict[str, int]) -> None:
        """Everything that happens between two steps: evaluation, metrics, checkpoint, and the question to stop."""
        config, last = self.config, number == self.config.steps
        evaluates = bool(self.held_out) and (last or (config.eval_every and number % config.eval_every == 0))
        if evaluates:
            metrics = {**metrics, **evaluation_metrics(self._evaluate(number))}
        if evaluates or last or number % config.log_every == 0:
            log.log(number, metrics)
        if last or self.stop.requested or number % config.checkpoint_every == 0:
            self.checkpoints.save(number, self.state, feed)
        if last or self.stop.requested:
            self.checkpoints.wait()
        if self.stop.requested and not last:
            raise Interrupted(
                "the training was asked to stop",
                {"run": config.run, "kept": f"a checkpoint at step {number} of {config.steps}"},
                "run the same command again to go on",
            )

    def _evaluate(self, number: int) -> Evaluation:
        """Evaluate what was reached after `number` steps and add it to eval.json; what is there is not done again."""
        kept = read_evaluations(self.folder)
        for evaluation in kept:
            if evaluation.step == number:
                return evaluation
        rows, blocks = self.config.eval_batch_rows, self.held_out.blocks
        self.stack.install(self.decoder, self.state.parameters)
        perplexity = held_out_perplexity(self.decoder, self.held_out, rows)
        table = self._table(self.held_out)
        cosine = blockwise_cosine(self.stack, self.state.parameters, self.held_out, table, rows)
        found = Evaluation(
            step=number,
            perplexity=perplexity,
            blocks=blocks,
            cosine=tuple(float(cosine[block]) for block in blocks),
        )
        _write_json(self.folder / EVALUATIONS, [entry.model_dump() for entry in [*kept, found]])
        return found

    def _table(self, source: CacheSource) -> TapTable:
        return tap_table(self.decoder.config.num_blocks, source)


def read_evaluations(run: Path) -> list[Evaluation]:
    """The evaluations of a run, in the order of their steps."""
    path = run / EVALUATIONS
    return [Evaluation.model_validate(entry) for entry in json.loads(path.read_text())] if path.exists() else []


def _on_device(batch: dict[str, Any]) -> dict[str, Any]:
    """What the step needs of a host batch, on its way to the device; `real_tokens` is counted on the host."""
    needed = {name: batch[name] for name in ("positions", "segment_ids", *TAPS)}
    return {**jax.device_put(needed), "real_tokens": int(np.count_nonzero(batch["segment_ids"]))}


def _run_folder(run: str) -> Path:
    if is_url(run):
        raise ConfigError(
            "a run is kept on a local disk only", {"run": run}, "name a local folder, and copy it when it is finished"
        )
    return Path(run.removeprefix("file://")).expanduser()


def _check_losses(config: TrainConfig) -> None:
    loss = config.loss.feature
    if not loss.weight or not (loss.relative_l2 or loss.cosine or loss.l2):
        raise ConfigError(
            "no loss has a weight, so nothing would be trained",
            {"loss.feature": loss.model_dump()},
            "give loss.feature.weight and one of relative_l2, cosine and l2 a value above zero",
        )


def _claim_folder(folder: Path, config: TrainConfig, source: CacheSource) -> None:
    """Make the run's folder, or see that it holds this very run. A run has begun once its student is there."""
    identity = {"cache": source.digest, **config.model_dump(mode="json", exclude=set(FREE_FIELDS))}
    if not (folder / STUDENT).is_dir() or not (folder / IDENTITY).exists():
        if folder.exists() and (not folder.is_dir() or any(not _is_leftover(path) for path in folder.iterdir())):
            raise InputError(
                "the run's folder holds something else", {"run": folder}, "name a new or an empty folder with --run"
            )
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / IDENTITY, identity)
    differences = _differences(json.loads((folder / IDENTITY).read_text()), identity)
    if differences:
        raise PlanMismatchError(
            "the run's folder holds the run of another config or cache",
            {"run": folder, **differences},
            "use the config that it was begun with, or another --run",
        )
    (folder / RESOLVED).write_text(settings.dump_yaml(config))


def _is_leftover(path: Path) -> bool:
    """What a process leaves that ended before the student was made, for whatever reason."""
    return path.name in (IDENTITY, RESOLVED, TOKENIZER) or path.name.startswith((f".{IDENTITY}.", f".{STUDENT}."))


def _differences(there: Any, here: Any, name: str = "") -> dict[str, str]:
    """Dotted field -> what is there and here, where they differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        pairs = ((key, there.get(key), here.get(key)) for key in sorted({*there, *here}))
        return {k: v for key, a, b in pairs for k, v in _differences(a, b, f"{name}.{key}".lstrip(".")).items()}
    return {} if there == here else {name: f"there {there!r}, here {here!r}"}


def _cut_evaluations(folder: Path, step: int) -> None:
    """Forget evaluations past the checkpoint: the steps before them are done again."""
    kept = [entry for entry in read_evaluations(folder) if entry.step <= step]
    _write_json(folder / EVALUATIONS, [entry.model_dump() for entry in kept])


def _write_json(path: Path, value: Any) -> None:
    """Replace a file at once, so that a kill leaves the old one or the new one."""
    staging = path.with_name(f".{path.name}.new")
    staging.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(staging, path)


def _result(config: TrainConfig, folder: Path, first: int) -> TrainResult:
    lines = [line for line in read_metrics(folder) if "distill/total_loss" in line]
    found = {entry.step: entry for entry in read_evaluations(folder)}
    return TrainResult(
        run=config.run,
        steps=config.steps,
        resumed_from=first,
        metrics=lines[-1],
        tokens_per_s=statistics.median(line["perf/tokens_per_second"] for line in lines),
        before=found.get(0),
        after=found.get(config.steps),
    )
