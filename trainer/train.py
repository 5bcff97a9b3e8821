"""Stage 2: a student from a cache.

    <run>/config.yaml      the resolved config            <run>/metrics.jsonl, tensorboard/
    <run>/run.json         what the numbers depend on     <run>/eval.json   every evaluation
    <run>/student/         the student before step 1      <run>/checkpoints/

The same command goes on where an interrupted run was, to the same bits as a run that was never interrupted: the feed,
the step and the schedule are pure functions of the config and the step's number.
"""

import contextlib
import fcntl
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from models.decoder import Decoder
from models.routing import RouterSums
from schemas import settings
from schemas.config import TrainConfig
from schemas.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    Interrupted,
    NonFiniteError,
    PlanMismatchError,
)
from schemas.layout import TOKENIZER
from schemas.progress import Progress
from schemas.signals import StopRequest, watch_for_stop
from schemas.storage import is_url
from trainer.balance import BlockRouting
from trainer.checkpoints import CHECKPOINTS, STUDENT, Checkpoints, kept_steps
from trainer.evaluate import Evaluation, Evaluator
from trainer.feed import Feed, make_feed
from trainer.flops import peak_flops, step_flops
from trainer.metrics import MetricsLog, StepTimes, evaluation_metrics, read_metrics
from trainer.online import ROUTER
from trainer.open import Sources
from trainer.parameters import Parameters
from trainer.schedules import may_count
from trainer.sharding import check_rows, make_mesh
from trainer.source import Batch, Source
from trainer.stage import StageRun
from trainer.stages import Stage, resolve_stages
from trainer.student import open_student, start_parameters

# What may differ when a run goes on: no number of the training depends on it.
FREE_FIELDS = frozenset(
    {"run", "cache", "checkpoint_every", "keep_checkpoints", "eval_every", "eval_batch_rows", "log_every"}
    | {"prefetch_batches", "partial", "profile", "mesh"}
)
EVALUATIONS = "eval.json"
IDENTITY = "run.json"
RESOLVED = "config.yaml"
TRACES = "traces"
LOCK = "lock"


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
    stages = resolve_stages(config)
    _say_what_is_off(config)
    make_mesh(config.mesh)
    _check_profile(config.profile, stages[-1].last)
    check_rows(config.mesh, config.batch_rows, "batch_rows")
    check_rows(config.mesh, config.batch_rows // config.micro_batches, "batch_rows / micro_batches")
    if config.batch_rows % config.micro_batches:
        raise ConfigError(
            "a batch cannot be cut into so many parts",
            {"batch_rows": config.batch_rows, "micro_batches": config.micro_batches},
            "make batch_rows a multiple of micro_batches",
        )
    sources = Sources(config)
    began = not (folder / STUDENT).is_dir()
    _claim_folder(folder, config, sources.rows)
    with watch_for_stop() as stop, _only_one(folder):
        try:
            biased = config.moe_balance_type == "noaux_tc"
            path = _teacher_path(config)
            decoder = open_student(folder, config.student, sources.rows, teacher_path=path, router_bias=biased)
            parameters = start_parameters(decoder, config.student, sources.rows.plan.teacher.hidden_size, config.seed)
            # All of them at once: what a later stage lacks is better said now.
            runs = [StageRun(config, stage, decoder, parameters, sources.open, sources.norms) for stage in stages]
        except BaseException:
            if began and not (folder / CHECKPOINTS).exists():
                _remove_beginning(folder)
            raise
        checkpoints = Checkpoints(folder, config.keep_checkpoints)
        try:
            first = _Run(config, runs, folder, sources, decoder, parameters, checkpoints, stop).go()
        finally:
            checkpoints.close()
    return _result(config, stages[-1].last, folder, first)


def _say_what_is_off(config: TrainConfig) -> None:
    """Balancing by biases turns the auxiliary loss off; a user who gave it a weight is told."""
    losses = [config.loss, *(stage.loss for stage in config.stages or [] if stage.loss)]
    if config.moe_balance_type == "noaux_tc" and any(may_count(loss.load_balance.weight) for loss in losses):
        print("moe_balance_type noaux_tc: loss.load_balance is off, its weight is not used", file=sys.stderr)


class _Run:
    """One process's part of a run: restores, steps, evaluates, saves."""

    def __init__(
        self,
        config: TrainConfig,
        runs: list[StageRun],
        folder: Path,
        sources: Sources,
        decoder: Decoder,
        parameters: Parameters,
        checkpoints: Checkpoints,
        stop: StopRequest,
    ) -> None:
        self.config, self.folder, self.sources = config, folder, sources
        self.checkpoints, self.stop = checkpoints, stop
        self.runs = runs  # of the stages still to come; taken out one by one, for a run that was made ready is large
        self.parameters = parameters  # all of the student's, as they are by now
        self.kept: set[str] = set()  # names of what was trained so far
        self.steps = runs[-1].stage.last
        self.evaluator = Evaluator(config, sources, decoder)

    def go(self) -> int:
        """Run to the end; returns the step at which this process began."""
        first = self.checkpoints.latest() or 0
        if first:
            restored = self.checkpoints.restore_parameters(first)
            self.parameters |= restored
            self.kept = set(restored)
        if first == self.steps:
            print(f"{self.config.run} is finished: nothing to do", file=sys.stderr)
            return first
        _cut_evaluations(self.folder, first)
        self._keep_best()
        log = MetricsLog(self.folder, first if first else -1)
        try:
            if not first and self.sources.held_out:
                log.log(0, self._evaluate(0, self.runs[0].stage))
            with Progress("train", self.steps, unit="steps") as bar:
                bar.skip(first)
                while self.runs:
                    run = self.runs.pop(0)
                    if first < run.stage.last:
                        self._run_stage(run, max(first, run.stage.first), log, bar)
        finally:
            log.close()
        return first

    def _run_stage(self, run: StageRun, first: int, log: MetricsLog, bar: Progress) -> None:
        """The steps of one stage that are not done yet."""
        run.prepare(self.parameters)
        if first > run.stage.first:
            balance = self.checkpoints.restore_balance(first) if run.balance() else {}
            run.restore(self.checkpoints.restore_moments(first, run.moments()), balance, first - run.stage.first)
        self.kept |= run.trained_names
        # The whole run is one walk over the rows, whatever its stages and restarts: batch s is a function of s.
        feed = make_feed(
            run.source,
            global_batch_rows=self.config.batch_rows,
            seed=self.config.seed,
            start_step=first,
            prefetch_batches=self.config.prefetch_batches,
        )
        flops = FlopCount(run, self.config, self.sources.rows.plan.rows.row_tokens)
        trace = Trace(self.config.profile, self.folder)
        with feed, trace:
            self._steps(run, first, feed, log, bar, flops, trace)
        self.parameters |= run.parameters()

    def _steps(
        self, run: StageRun, first: int, feed: Feed, log: MetricsLog, bar: Progress, flops: "FlopCount", trace: "Trace"
    ) -> None:
        host = next(feed)
        batch, tokens, teacher = run.place(host), _real_tokens(host), host.get(ROUTER)
        for number in range(first + 1, run.stage.last + 1):
            trace.before(number)
            start, waited, counted, routed = time.perf_counter(), feed.wait_s, tokens, teacher
            sums = run.advance(batch)  # returns before it is computed
            if number < run.stage.last:
                host = next(feed)
                batch, tokens, teacher = run.place(host), _real_tokens(host), host.get(ROUTER)
            metrics = self._settle(run, number, sums, routed)
            seconds = time.perf_counter() - start
            times = StepTimes(seconds, counted, (feed.wait_s - waited) / seconds, flops.of_step, flops.peak)
            metrics |= times.metrics()
            metrics["learning/current_learning_rate"] = float(np.asarray(run.schedule(number - 1 - run.stage.first)))
            wait = f"{100 * times.wait_share:.0f}% waiting"
            bar.advance(1, note=f"loss {metrics['distill/total_loss']:.4g}, {counted / seconds:,.0f} tokens/s, {wait}")
            self._keep(run, number, metrics, run.routing(sums), log, {**feed.get_state(), "next_step": number})

    def _settle(self, run: StageRun, number: int, sums: Any, teacher: RouterSums | None) -> dict[str, float]:
        """The step's losses, once computed.

        Raises:
            NonFiniteError: one of them is not a number; nothing of this step is kept.
        """
        losses = run.losses(sums)
        bad = {name: np.flatnonzero(~np.isfinite(np.atleast_1d(value))) for name, value in losses.items()}
        if broken := [name for name, at in bad.items() if at.size]:
            saved, name = self.checkpoints.latest(), broken[0]
            value = np.atleast_1d(losses[name])[bad[name][0]]
            by_block = np.ndim(losses[name]) == 1
            raise NonFiniteError(
                f"the training has diverged: {'the loss of a block' if by_block else 'the loss'} is not finite",
                {
                    "run": self.config.run,
                    "step": number,
                    "loss": name,
                    **({"block": ", ".join(map(str, bad[name]))} if by_block else {}),
                    "found": value,
                    "last checkpoint": "none" if saved is None else f"step {saved}",
                },
                "start another run with a lower optimizer.learning_rate or optimizer.clip_norm",
            )
        return run.metrics(losses, sums, teacher)

    def _keep(
        self,
        run: StageRun,
        number: int,
        metrics: dict[str, float],
        routing: BlockRouting | None,
        log: MetricsLog,
        feed: dict[str, int],
    ) -> None:
        """Everything that happens between two steps: evaluation, metrics, checkpoint, and the question to stop."""
        config, last = self.config, number == run.stage.last
        evaluates = bool(self.sources.held_out) and (last or (config.eval_every and number % config.eval_every == 0))
        saves = last or self.stop.requested or number % config.checkpoint_every == 0
        if evaluates or saves:
            self.parameters |= run.parameters()
        if evaluates:
            metrics = {**metrics, **self._evaluate(number, run.stage)}
        if evaluates or last or number % config.log_every == 0:
            log.log(number, metrics)
        if routing is not None and (saves or evaluates or number == run.stage.first + 1):
            log.log_load(number, run.stack.config.moe_blocks, np.asarray(routing.sums.load))
        if saves or evaluates:  # the best by evaluation is kept, so what was evaluated is saved
            trained = {name: self.parameters[name] for name in self.kept}
            self._keep_best()
            self.checkpoints.save(number, trained, run.moments(), run.balance(), feed)
        if last or self.stop.requested:
            self.checkpoints.wait()
        if self.stop.requested and number < self.steps:
            raise Interrupted(
                "the training was asked to stop",
                {"run": config.run, "kept": f"a checkpoint at step {number} of {self.steps}"},
                "run the same command again to go on",
            )

    def _keep_best(self) -> None:
        """Tell the checkpoints which one is the best by perplexity on the held-out rows."""
        found = [entry for entry in read_evaluations(self.folder) if entry.step]
        if found:
            self.checkpoints.keep_best(_best(found).step)

    def _evaluate(self, number: int, stage: Stage) -> dict[str, float]:
        """Evaluate what was reached after `number` steps and add it to eval.json; what is there is not done again."""
        kept = read_evaluations(self.folder)
        found = next((entry for entry in kept if entry.step == number), None)
        if found is None:
            found = self.evaluator.evaluate(number, self.parameters)
            kept = [*kept, found]
            _write_json(self.folder / EVALUATIONS, [entry.model_dump() for entry in kept])
        first = next((entry for entry in kept if entry.step == 0), None)
        return evaluation_metrics(found, first, stands_in=not stage.compares_tokens)


class FlopCount:
    """What a step of a stage computes, and what the devices could in a second."""

    def __init__(self, run: StageRun, config: TrainConfig, row_tokens: int) -> None:
        self.of_step = step_flops(run.stack.config, run.used_parameters(), config.batch_rows * row_tokens, row_tokens)
        self.peak = peak_flops(1 if run.mesh is None else run.mesh.size)


class Trace:
    """Writes a profile of the steps that `profile` names (`steps=10:13`: 10, 11 and 12) to the run's folder."""

    def __init__(self, profile: str | None, folder: Path) -> None:
        first, _, stop = (profile or "steps=0:0").removeprefix("steps=").partition(":")
        self._first, self._stop, self._folder, self._runs = int(first), int(stop), folder, False

    def before(self, number: int) -> None:
        """Called before each step."""
        if number == self._stop:
            self.__exit__()
        if self._first <= number < self._stop and not self._runs:
            jax.profiler.start_trace(str(self._folder / TRACES))
            self._runs = True

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: object) -> None:
        if self._runs:
            jax.profiler.stop_trace()
            self._runs = False


def read_evaluations(run: Path) -> list[Evaluation]:
    """The evaluations of a run, in the order of their steps."""
    path = run / EVALUATIONS
    return [Evaluation.model_validate(entry) for entry in json.loads(path.read_text())] if path.exists() else []


def best_evaluation(run: str) -> Evaluation:
    """The evaluation with the lowest perplexity, of those whose checkpoints are kept (never that before step 1).

    Raises:
        CheckpointError: there is no run, or no such evaluation.
    """
    kept, found = kept_steps(run), read_evaluations(Path(run).expanduser())
    evaluated = [entry for entry in found if entry.step in kept]
    if not evaluated:
        raise CheckpointError(
            "no checkpoint of the run was evaluated, so none is the best",
            {"run": run, "checkpoints": kept, "evaluations": [entry.step for entry in found]},
            "export the newest without --best, or name one with --step",
        )
    return _best(evaluated)


def _best(evaluations: Sequence[Evaluation]) -> Evaluation:
    return min(evaluations, key=lambda entry: entry.perplexity)


def _check_profile(profile: str | None, steps: int) -> None:
    if profile is None:
        return
    first, stop = (int(number) for number in profile.removeprefix("steps=").split(":"))
    if not 1 <= first < stop <= steps + 1:
        raise ConfigError(
            "these steps cannot be profiled",
            {"profile": profile, "expected": f"steps=FIRST:STOP within 1 and {steps + 1}, STOP left out"},
            "name steps of this run",
        )


def _teacher_path(config: TrainConfig) -> str | None:
    """Where the teacher lies now, if the config says so."""
    return config.online.teacher.path if config.source == "online" and config.online.teacher else None


def _real_tokens(batch: Batch) -> int:
    return int(np.count_nonzero(batch["segment_ids"]))


def _run_folder(run: str) -> Path:
    if is_url(run):
        raise ConfigError(
            "a run is kept on a local disk only", {"run": run}, "name a local folder, and copy it when it is finished"
        )
    return Path(run.removeprefix("file://")).expanduser()


def _claim_folder(folder: Path, config: TrainConfig, source: Source) -> None:
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


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold the run's folder against other processes; the system lets go of it when this one ends, however it ends."""
    with (folder / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                "another process is training this run", {"run": folder}, "wait for it, or name another --run"
            ) from error
        yield


def _remove_beginning(folder: Path) -> None:
    """Leave nothing of a run that could not be begun."""
    shutil.rmtree(folder / STUDENT, ignore_errors=True)
    for path in [path for path in folder.iterdir() if _is_leftover(path)] if folder.is_dir() else []:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with contextlib.suppress(OSError):  # the user's own folder may hold what we do not know
        folder.rmdir()


def _is_leftover(path: Path) -> bool:
    """What a process leaves that ended before the student was made, for whatever reason."""
    return path.name in (IDENTITY, RESOLVED, TOKENIZER, LOCK) or path.name.startswith((f".{IDENTITY}.", f".{STUDENT}."))


def _differences(there: Any, here: Any, name: str = "") -> dict[str, str]:
    """Dotted field -> what is there and here, where they differ; the entries of a list are numbered."""
    if isinstance(there, list) and isinstance(here, list):
        there, here = (dict(enumerate(entries)) for entries in (there, here))
    if isinstance(there, dict) and isinstance(here, dict):
        pairs = ((key, there.get(key), here.get(key)) for key in sorted({*there, *here}))
        return {k: v for key, a, b in pairs for k, v in _differences(a, b, f"{name}.{key}".lstrip(".")).items()}
    return {} if there == here else {name: f"there {_spelled(there)}, here {_spelled(here)}"}


def _spelled(value: Any) -> str:
    """A value for a message; of a long list or mapping, its beginning."""
    text = repr(value)
    return f"{text[:80]} ..." if len(text) > 80 and not isinstance(value, str) else text


def _cut_evaluations(folder: Path, step: int) -> None:
    """Forget evaluations past the checkpoint: the steps before them are done again."""
    kept = [entry for entry in read_evaluations(folder) if entry.step <= step]
    _write_json(folder / EVALUATIONS, [entry.model_dump() for entry in kept])


def _write_json(path: Path, value: Any) -> None:
    """Replace a file at once, so that a kill leaves the old one or the new one."""
    staging = path.with_name(f".{path.name}.new")
    staging.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(staging, path)


def _result(config: TrainConfig, steps: int, folder: Path, first: int) -> TrainResult:
    lines = [line for line in read_metrics(folder) if "distill/total_loss" in line]
    found = {entry.step: entry for entry in read_evaluations(folder)}
    return TrainResult(
        run=config.run,
        steps=steps,
        resumed_from=first,
        metrics=lines[-1],
        tokens_per_s=statistics.median(line["perf/tokens_per_second"] for line in lines),
        before=found.get(0),
        after=found.get(steps),
    )
