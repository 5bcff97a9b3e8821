"""The loop of a run: restores, steps, evaluates, saves; and which records of a resumed run are lost."""

import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from distillcache.models.decoder import Decoder
from distillcache.models.routing import RouterSums
from distillcache.schemas.config import TrainConfig
from distillcache.schemas.config.train import TrainOptions
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import (
    DivergedError,
    Interrupted,
    NonFiniteError,
)
from distillcache.schemas.format.run import EVALUATIONS, PARAMETERS, digest_evaluations, lost_evaluations
from distillcache.schemas.format.run_identity import changed_records
from distillcache.schemas.runtime.peers import Peers
from distillcache.schemas.runtime.progress import Progress
from distillcache.schemas.runtime.signals import StopRequest
from distillcache.schemas.store.store import Store
from distillcache.trainer.feed.cache_source import Feed, make_feed
from distillcache.trainer.feed.online import ROUTER
from distillcache.trainer.feed.open import Sources
from distillcache.trainer.mesh.host_parameters import HostShards, Kept, gathered, kept
from distillcache.trainer.mesh.placement import to_host
from distillcache.trainer.run.checkpoints import Checkpoints, adapter_arrays, balance_arrays
from distillcache.trainer.run.divergence import best_checkpoint, diverged_error
from distillcache.trainer.run.evaluate import Evaluation, Evaluator, told_perplexity
from distillcache.trainer.run.folder import (
    SUMMARY,
    best_of,
    read_ending,
    read_evaluations,
    write_evaluations,
)
from distillcache.trainer.run.metrics import StepTimes, evaluation_metrics
from distillcache.trainer.run.metrics_log import LINES, MetricsLog, find_lost_lines, read_metrics
from distillcache.trainer.run.profile import Trace
from distillcache.trainer.run.stage import StagePlan, StageRun
from distillcache.trainer.run.stages import Stage, evaluation_interval
from distillcache.trainer.run.yardstick import TeacherFigure, judged, known_teacher, measure_teacher
from distillcache.trainer.step.balance import BlockRouting, mean_biases
from distillcache.trainer.step.flops import peak_flops, step_flops
from distillcache.trainer.step.parameters import Parameters

log = logging.getLogger(__name__)

MISSING_SHOWN = 12  # steps in a message
WORTH_SAYING = 0.05  # share of a step that waits for data; less is noise


class RunLoop:
    """One process's part of a run: restores, steps, evaluates, saves."""

    def __init__(
        self,
        config: TrainConfig,
        plans: Sequence[StagePlan],
        store: Store,
        sources: Sources,
        decoder: Decoder,
        parameters: Parameters,
        checkpoints: Checkpoints,
        stop: StopRequest,
        peers: Peers,
    ) -> None:
        self.config, self.store, self.sources = config, store, sources
        self.checkpoints, self.stop, self.peers = checkpoints, stop, peers
        self.plans = plans
        # All of the student's, as they were when last looked at.
        self.parameters: dict[str, Kept] = {name: kept(value) for name, value in parameters.items()}
        self.kept: set[str] = set()  # names of what was trained so far
        self.steps = plans[-1].stage.last
        self.evaluator = Evaluator(config, config.eval_batch_rows, sources, decoder, peers)
        self.evaluations: list[Evaluation] = []
        self.teacher = TeacherFigure(None)  # on the held-out rows
        self.student = decoder.config
        self.log: MetricsLog | None = None  # the first process's

    def go(self) -> int:
        """Run to the end; returns the step at which this process began."""
        first = self.checkpoints.latest() or 0
        if first:
            restored = self.checkpoints.restore_parameters(first, self.parameters)
            self.parameters |= restored
            self.kept = set(restored)
        if self.peers.first:
            stages = [plan.stage for plan in self.plans]
            say_what_is_lost(self.store, first, due_steps(self.config, stages, bool(self.sources.held_out), first))
            steps = counted(self.steps - first, "step")
            log.info(f"training for {steps}{f' after step {first:,}' if first else ''}, after compiling")
        # Before the first checkpoint nothing says that evaluations are this run's, and they are soon made again.
        self.evaluations = [entry for entry in read_evaluations(self.store) if entry.step <= first] if first else []
        self.peers.meet("read")
        if self.peers.first:  # the steps past the checkpoint are done again
            self.store.delete(SUMMARY)
            write_evaluations(self.store, self.evaluations)
            self.log = MetricsLog(self.store, first if first else -1)
        self._keep_best()
        if self.sources.held_out:  # before the stages take the device's memory
            known = known_teacher(self.evaluations)
            wanted = self.config.eval_teacher and not self.evaluator.is_exact  # which measures it each time
            self.teacher = known or measure_teacher(
                wanted, self.config.eval_batch_rows, self.sources, self.student, self.peers
            )
        try:
            if not first and self.sources.held_out:
                self._log(0, self._evaluate(0, self.plans[0].stage))
            with Progress("train", self.steps, unit="steps", quiet=not self.peers.first) as bar:
                bar.skip(first)
                for plan in self.plans:
                    if first < plan.stage.last:
                        self._run_stage(plan, max(first, plan.stage.first), bar)
        finally:
            if self.log is not None:
                self.log.close()
        return first

    def _run_stage(self, plan: StagePlan, first: int, bar: Progress) -> None:
        """The steps of one stage that are not done yet."""
        done = first - plan.stage.first
        run = StageRun(plan, self.parameters, self.checkpoints.open(first) if done else None, done)
        self.kept |= run.trained_names
        # The whole run is one walk over the rows, whatever its stages and restarts: batch s is a function of s.
        feed = make_feed(
            plan.source,
            global_batch_rows=self.config.batch_rows,
            seed=self.config.seed,
            start_step=first,
            prefetch_batches=self.config.prefetch_batches,
        )
        flops = FlopCount(run, self.config.batch_rows, self.sources.rows.plan.rows.row_tokens)
        trace = Trace(self.config.profile, self.store)
        with feed, trace:
            self._steps(run, first, feed, bar, flops, trace)
        self.parameters |= run.parameters()

    def _steps(self, run: StageRun, first: int, feed: Feed, bar: Progress, flops: "FlopCount", trace: Trace) -> None:
        host = next(feed)
        batch, teacher = run.plan.place(host), host.get(ROUTER)
        for number in range(first + 1, run.stage.last + 1):
            trace.before(number)
            start, waited, routed = time.perf_counter(), feed.wait_s, teacher
            coming = run.advance(batch)  # returns before it is computed
            if number < run.stage.last:
                host = next(feed)
                batch, teacher = run.plan.place(host), host.get(ROUTER)
            sums = to_host(coming)
            metrics = self._settle(run, number, sums, routed)
            seconds, counted = time.perf_counter() - start, int(sums.tokens)
            times = StepTimes(seconds, counted, (feed.wait_s - waited) / seconds, flops.of_step, flops.peak)
            metrics |= times.metrics()
            metrics["learning/current_learning_rate"] = float(
                np.asarray(run.plan.schedule(number - 1 - run.stage.first))
            )
            wait = f", {times.wait_share:.0%} waiting for data" if times.wait_share >= WORTH_SAYING else ""
            loss = f"{metrics['distill/total_loss']:.4g}" if "distill/total_loss" in metrics else "undefined"
            bar.advance(1, note=f"loss {loss}, {counted / seconds:,.0f} tokens/s{wait}")
            self._keep(run, number, metrics, run.routing(sums), {**feed.get_state(), "next_step": number})

    def _settle(self, run: StageRun, number: int, sums: Any, teacher: RouterSums | None) -> dict[str, float]:
        """The step's losses, of its sums on the host.

        Raises:
            DivergedError: one of them is not a number; nothing of this step is kept.
        """
        losses = run.losses(sums)
        bad = {name: np.flatnonzero(~np.isfinite(np.atleast_1d(value))) for name, value in losses.items()}
        if broken := [name for name, at in bad.items() if at.size]:
            name = broken[0]
            value = np.atleast_1d(losses[name])[bad[name][0]]
            by_block = np.ndim(losses[name]) == 1
            raise self._diverged(
                f"the training has diverged: {'the loss of a block' if by_block else 'the loss'} is not finite",
                run.stage,
                {
                    "step": number,
                    "loss": name,
                    **({"block": ", ".join(map(str, bad[name]))} if by_block else {}),
                    "found": value,
                },
            )
        return run.metrics(losses, sums, None if teacher is None else self.peers.join_rows(teacher))

    def _diverged(self, what: str, stage: Stage, facts: dict[str, object]) -> DivergedError:
        """The error of figures that are not finite any more; the best checkpoint of those before is named in it."""
        self.checkpoints.wait()
        if self.log is not None:
            self.log.flush()
        lines = read_metrics(self.store.url)
        best = best_checkpoint(stage, self.checkpoints.steps(), self.evaluations, lines)
        return diverged_error(what, self.config.run, facts, best)

    def _keep(
        self,
        run: StageRun,
        number: int,
        metrics: dict[str, float],
        routing: BlockRouting | None,
        feed: dict[str, int],
    ) -> None:
        """Everything that happens between two steps: evaluation, metrics, checkpoint, and the question to stop."""
        config, last = self.config, number == run.stage.last
        self.checkpoints.check()  # a disk that is full is told now, not at the next checkpoint
        stops = self.peers.should_stop(self.stop, number)
        interval = evaluation_interval(config.eval_every, self.steps)
        evaluates = bool(self.sources.held_out) and (last or (interval and number % interval == 0))
        saves = evaluates or last or stops or number % config.checkpoint_every == 0  # the best is among what is saved
        if evaluates:
            self.parameters |= run.parameters()
            metrics = {**metrics, **self._evaluate(number, run.stage)}
        # The first step's loss is what the last one's is compared with.
        if evaluates or last or number % config.log_every == 0 or number == run.stage.first + 1:
            self._log(number, metrics)
        if routing is not None and self.log is not None and (saves or number == run.stage.first + 1):
            self.log.log_load(number, run.plan.setting.stack.config.moe_blocks, np.asarray(routing.sums.load))
        if saves:
            if self.log is not None:
                self.log.flush()  # a checkpoint counts on the lines before it
            self._save(run, number, feed)
        if last or stops:
            self.checkpoints.wait()
        if stops and number < self.steps:
            self.peers.meet("stop")  # then the first process has seen everybody's part
            raise Interrupted(
                "the training was asked to stop",
                {"run": config.run, "kept": f"a checkpoint at step {number} of {self.steps}"},
                "run the same command again to resume",
            )

    def _save(self, run: StageRun, number: int, feed: dict[str, int]) -> None:
        """Begin to save: each process what it holds of this stage's, the first also what no device group shares out."""
        self._keep_best()
        held, balance = run.held(), run.balance()
        biases = mean_biases(balance)
        before = {name: self.parameters[name] for name in self.kept if f"{PARAMETERS}/{name}" not in held}
        rest = {f"{PARAMETERS}/{name}": value for name, value in (before | biases).items()}
        held |= {name: value.held() for name, value in rest.items() if isinstance(value, HostShards)}
        whole = {name: value for name, value in rest.items() if name not in held}
        figures = None
        if self.log is not None:
            evaluations = digest_evaluations([entry.model_dump(mode="json") for entry in self.evaluations])
            figures = {EVALUATIONS: evaluations, **self.log.digests()}
        whole |= balance_arrays(balance) | adapter_arrays(run.plan.setting.adapter_alpha)
        self.checkpoints.save(number, held, whole, feed, figures)

    def _log(self, number: int, metrics: dict[str, float]) -> None:
        if self.log is not None:
            self.log.log(number, metrics)

    def _keep_best(self) -> None:
        """Tell the checkpoints which one is the best on the held-out rows."""
        best = best_of([entry for entry in self.evaluations if entry.step])
        if best is not None:
            self.checkpoints.keep_best(best.step)

    def _evaluate(self, number: int, stage: Stage) -> dict[str, float]:
        """Evaluate what was reached after `number` steps and add it to eval.json; what is there is not done again."""
        found = next((entry for entry in self.evaluations if entry.step == number), None)
        if found is None:
            start = next((entry for entry in self.evaluations if entry.step == 0), None)
            found = judged(self._evaluated(number, stage), start, self.teacher)
            self.evaluations.append(found)
            if self.peers.first:
                write_evaluations(self.store, self.evaluations)
                teacher = "" if found.teacher_perplexity is None else f" (teacher {found.teacher_perplexity:.5g})"
                log.info(f"step {number:,}: held-out perplexity {told_perplexity(found.perplexity, '.5g')}{teacher}")
        first = next((entry for entry in self.evaluations if entry.step == 0), None)
        return evaluation_metrics(found, first, stands_in=not stage.compares_tokens)

    def _evaluated(self, number: int, stage: Stage) -> Evaluation:
        """A new evaluation. Its figures may be not finite where those of the steps are: blocks are trained apart."""
        try:
            return self.evaluator.evaluate(number, gathered(self.parameters))
        except NonFiniteError as error:
            if number:
                what = f"the training has diverged: {error.what}"
                raise self._diverged(what, stage, {"step": number, **error.facts}) from error
            raise NonFiniteError(
                f"{error.what} before the first step",
                {"run": self.config.run, **error.facts},
                "start from another student: student.init, student.surgery",
            ) from error


class FlopCount:
    """FLOPs of a step of a stage, and the devices' peak in a second."""

    def __init__(self, run: StageRun, batch_rows: int, row_tokens: int) -> None:
        self.of_step = step_flops(
            run.plan.setting.stack.config, run.used_parameters(), batch_rows * row_tokens, row_tokens
        )
        self.peak = peak_flops(1 if run.mesh is None else run.mesh.size)


def say_what_is_lost(store: Store, first: int, due: set[int]) -> None:
    """Say which records of the steps before a resumed run are gone: the run itself does not need them.

    Args:
        due: the steps that have a line of metrics.
    """
    ending = read_ending(store)
    if ending is not None and not ending.diverged and ending.steps is not None and ending.steps > first:
        ended = f"the run had ended at step {ending.steps:,}"
        log.warning(f"{ended}; its checkpoint is gone, so it continues from step {first:,}")
    if count := lost_evaluations(store):
        lost = f"{counted(count, 'evaluation')} up to step {first:,}"
        log.warning(f"{store.where(EVALUATIONS)} is missing: {lost} are lost")
    for record in changed_records(store):
        log.warning(record)
    for lines in find_lost_lines(store):
        log.warning(f"{lines}{_missing_steps(store, due) if lines.name == LINES else ''}")


def due_steps(options: TrainOptions, stages: Sequence[Stage], evaluates: bool, first: int) -> set[int]:
    """The steps up to `first` that `log_every` and `eval_every` ask for."""
    due = {number for stage in stages for number in (stage.first + 1, stage.last)}
    due |= set(range(options.log_every, first + 1, options.log_every))
    if evaluates:
        interval = evaluation_interval(options.eval_every, stages[-1].last)
        due |= {0, *(range(interval, first + 1, interval) if interval else ())}
    return {number for number in due if number <= first}


def _missing_steps(store: Store, due: set[int]) -> str:
    """Name the due steps that have no line."""
    missing = sorted(due - {line["step"] for line in read_metrics(store.url)})
    if not missing:
        return ""
    shown = ", ".join(f"{number:,}" for number in missing[:MISSING_SHOWN])
    rest = f" and {len(missing) - MISSING_SHOWN:,} more" if len(missing) > MISSING_SHOWN else ""
    return f"; steps without a line: {shown}{rest}"
