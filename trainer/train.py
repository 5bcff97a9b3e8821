"""Stage 2: a student from a cache, by one process or by several in lockstep (schemas/runtime/peers.py).

The same command resumes an interrupted run with the same bits as a run that was never interrupted: the feed,
the step and the schedule are pure functions of the config and the step's number. What the run's folder holds:
run/folder.py.
"""

import contextlib
import logging
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from distillcache.models.adapters import is_adapter
from distillcache.models.config import ModelConfig
from distillcache.models.decoder import Decoder, with_attention
from distillcache.models.describe import teacher_context
from distillcache.models.layers.kernels import chosen_kernel
from distillcache.models.layers.rope import context_length
from distillcache.schemas.config import TrainConfig
from distillcache.schemas.config.train import MeshConfig, TrainOptions, TrainSpec
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import (
    CheckpointError,
    ConfigError,
    DamageError,
    DivergedError,
    InputError,
)
from distillcache.schemas.format.manifest import TOPK_LOGITS, Plan
from distillcache.schemas.format.rows import SPLITS, Split, no_targets_note, too_long_note
from distillcache.schemas.runtime.peers import Peers, join_peers
from distillcache.schemas.runtime.signals import watch_for_stop
from distillcache.schemas.store.store import Store, using
from distillcache.trainer.feed.open import Sources
from distillcache.trainer.feed.source import Source
from distillcache.trainer.loop import RunLoop, due_steps, say_what_is_lost
from distillcache.trainer.mesh.sharding import check_processes, check_rows, make_mesh
from distillcache.trainer.run.checkpoints import Checkpoints, has_student
from distillcache.trainer.run.divergence import end_of_run
from distillcache.trainer.run.evaluate import Evaluation
from distillcache.trainer.run.exact import evaluates_exactly
from distillcache.trainer.run.folder import (
    SUMMARY,
    as_begun,
    only_one,
    read_evaluations,
    refuse_foreign_folder,
    remove_beginning,
    seal_student,
    take_run,
    write_summary,
)
from distillcache.trainer.run.idle_settings import idle_rest_bucket, idle_settings
from distillcache.trainer.run.metrics_log import LINES, read_metrics
from distillcache.trainer.run.profile import check_profile
from distillcache.trainer.run.stage import StagePlan, plan_stage, recorded_taps
from distillcache.trainer.run.stages import Stage, idle_note, resolve_stages, warm_up_note
from distillcache.trainer.run.student import idle_checkpoint_note, kept_student, open_student, start_parameters
from distillcache.trainer.step.parameters import BESIDE, Parameters, sublayer_of
from distillcache.trainer.step.schedules import may_count
from distillcache.trainer.step.targets import block_starts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    metrics: the last line of metrics.jsonl. tokens_per_s: the median over its lines. before, after: evaluations of the
    student at step 0 and at the end; None where no rows are held out. resumed_from: the step at which this process
    began, `steps` if there was nothing left to do. diverged: what is to be said where the student ended worse than it
    began (run/divergence.py).
    """

    run: str
    steps: int
    resumed_from: int
    metrics: dict[str, float]
    tokens_per_s: float
    before: Evaluation | None
    after: Evaluation | None
    diverged: DivergedError | None = None

    @property
    def loss(self) -> float | None:
        """The last step's; None where it is undefined: it needs targets, and no token of the batch is one."""
        return self.metrics.get("distill/total_loss")

    def summary(self) -> dict[str, Any]:
        """The result as one JSON object."""
        evaluations = {"before": self.before, "after": self.after}
        return {
            "run": self.run,
            "steps": self.steps,
            "resumed_from": self.resumed_from,
            "loss": self.loss,
            "tokens_per_s": self.tokens_per_s,
            **{name: found.model_dump() if found else None for name, found in evaluations.items()},
            **divergence_summary(self.diverged),
        }


def divergence_summary(error: DivergedError | None) -> dict[str, Any]:
    """Summarise whether a run diverged; if so, in which words, and at which step its best checkpoint is."""
    if error is None:
        return {"diverged": False}
    return {"diverged": True, "best_checkpoint": error.best, "error": str(error)}


def train(config: TrainConfig) -> TrainResult:
    """Train the student that `config` describes, or resume its run; a finished run is left as it is.

    A student that ended worse than it began is a result, with `diverged`.

    Raises:
        PlanMismatchError: the folder holds the run of another config or cache.
        ConfigError, InputError, CheckpointError: what was given cannot be used; no run is begun.
        DivergedError: a loss is not finite; the checkpoints before it stay.
        NonFiniteError: the student's figures are not finite before the first step.
        Interrupted: SIGTERM or SIGINT; a checkpoint of the last step was written, and the same command goes on.
        PeerError: another process of the run failed or died.
    """
    with (
        using(config.storage),
        join_peers(config.coordinator, config.num_processes, config.process_id, config.timeout_s) as peers,
    ):
        return _train(config, peers)


def _train(config: TrainConfig, peers: Peers) -> TrainResult:
    store = Store(config.run)
    begins = not has_student(store)
    config = config if begins else as_begun(config, store)
    stages = resolve_stages(config, config.mesh)
    _say_what_is_off(config, peers)
    if peers.first and begins:
        _warn([*idle_settings(config, config.feed, stages), *map(warm_up_note, stages)])
    _check_batches(config.mesh, config.batch_rows, config.micro_batches)
    check_profile(config.profile, stages[-1].last)
    sources = Sources(config)
    _check_targets(stages, sources, peers)
    with contextlib.ExitStack() as held:
        stop = held.enter_context(watch_for_stop(together=peers.count > 1))
        began = False
        if peers.first:
            refuse_foreign_folder(store)
            _check_epoch(config.batch_rows, sources.rows, not has_student(store))  # before anything is written
            store = store.guarded(held.enter_context(only_one(store)))
            began = not has_student(store)
            take_run(store, config, sources.rows)
        checkpoints = held.enter_context(contextlib.closing(Checkpoints(store, config.keep_checkpoints, peers)))
        try:
            decoder = _open_student(store, config, stages, sources, peers)
            if checkpoints.latest() == stages[-1].last:
                del decoder
                _check_finished(store, config, stages, sources, checkpoints, peers)
                return _end(config.run, stages[-1], store, stages[-1].last, peers)
            if peers.first:
                _warn_of_length(decoder.config, sources.rows.plan)
                whole = decoder if peers.count == 1 else None  # of several processes each has a part of it
                _warn_of_idleness(config, stages, sources.rows, store, whole, began)
            width = sources.rows.plan.teacher.hidden_size
            parameters = start_parameters(decoder, config.student, width, config.seed, store)
            # All of them at once: what a later stage lacks is better said now.
            plans = [plan_stage(config, config.mesh, stage, decoder, parameters, sources) for stage in stages]
            if peers.first and began:
                _warn(idle_rest_bucket(config, stages, reads_topk=_reads_topk(config, plans, sources)))
                _say_what_adapters_are(parameters)
        except BaseException:
            if began:
                remove_beginning(store)
            raise
        try:
            run = RunLoop(config, plans, store, sources, decoder, parameters, checkpoints, stop, peers)
            del decoder, parameters  # from here on they are on the host, and in the stages
            first = run.go()
        except DivergedError as error:
            if peers.first:
                write_summary(store, {"run": config.run, "steps": stages[-1].last, **divergence_summary(error)})
            raise
        return _end(config.run, stages[-1], store, first, peers)


def _end(run: str, stage: Stage, store: Store, first: int, peers: Peers) -> TrainResult:
    """The result of a run whose last stage has ended, also as summary.json; first: as of `_result`."""
    peers.meet("end")
    result = _result(run, stage, store, first)
    if peers.first and (first < result.steps or store.read(SUMMARY) is None):
        write_summary(store, result.summary())
    return result


def _check_finished(
    store: Store,
    options: TrainOptions,
    stages: Sequence[Stage],
    sources: Sources,
    checkpoints: Checkpoints,
    peers: Peers,
) -> None:
    """Read a finished run's last checkpoint, and say what is lost beside it. Its teacher is not needed any more."""
    last = stages[-1].last
    if peers.first:
        checkpoints.read_through(last)
        say_what_is_lost(store, last, due_steps(options, stages, bool(len(sources.held_out_rows)), last))
    log.info(f"{store.url} is finished: nothing to do")


def _reads_topk(spec: TrainSpec, plans: Sequence[StagePlan], sources: Sources) -> bool:
    """Return whether a stage, or the evaluations, compare with the recorded top k."""
    held_out = sources.held_out
    evaluates = bool(held_out) and TOPK_LOGITS in held_out.codecs and not evaluates_exactly(spec, sources)
    return evaluates or any(TOPK_LOGITS in plan.program.taps for plan in plans)


def _check_batches(mesh: MeshConfig, batch_rows: int, micro_batches: int) -> None:
    """See that the mesh can be made, and batches be dealt out over it."""
    check_processes(make_mesh(mesh), mesh)
    check_rows(mesh, batch_rows, "batch_rows")
    check_rows(mesh, batch_rows // micro_batches, "batch_rows / micro_batches")
    if batch_rows % micro_batches:
        raise ConfigError(
            "a batch cannot be split into so many micro-batches",
            {"batch_rows": batch_rows, "micro_batches": micro_batches},
            "make batch_rows a multiple of micro_batches",
        )


def _check_targets(stages: Sequence[Stage], sources: Sources, peers: Peers) -> None:
    """Say where no token is a target.

    Raises:
        InputError: none of the rows to train on has a target, and a stage's losses are means over targets.
    """
    rows = {"train": sources.rows, "eval": sources.held_out_rows}
    without: list[Split] = [split for split in SPLITS if len(rows[split]) and not rows[split].has_targets()]
    needing = [stage.name for stage in stages if stage.compares_tokens]
    if "train" in without and needing:
        raise InputError(
            "no token of the rows to train on is a target, and cross-entropy and KL are means over targets",
            {
                "rows": sources.rows.url,
                "found": f"{counted(len(sources.rows), 'row')}, 0 targets",
                "needed by": "; ".join(needing),
            },
            "use rows with targets (of chats: with answers of the assistant), or losses that need none: "
            "mode: blockwise, or loss.token_weight: 0",
        )
    if without and peers.first:
        log.info(f"note: {no_targets_note(without)}")


def _check_epoch(batch_rows: int, rows: Source, begins: bool) -> None:
    """Refuse to begin a run whose batches would hold rows twice; a resumed one (from an earlier version) may.

    Every step would be the same few rows, and the steps, the speed and the losses would look like more than they are.
    """
    if not 0 < len(rows) < batch_rows:
        return
    if not begins:
        said = f"batch_rows is {batch_rows:,}, and there are {counted(len(rows), 'row')} to train on"
        log.warning(f"a batch contains rows twice: {said}")
        return
    raise ConfigError(
        "a batch is larger than the epoch: it would contain rows twice",
        {"rows": rows.url, "batch_rows": f"{batch_rows:,}", "rows to train on": f"{len(rows):,}"},
        f"set batch_rows to {len(rows):,} or less, or build a cache of more text",
    )


def _warn_of_length(student: ModelConfig, plan: Plan) -> None:
    """Say that rows are longer than what the teacher or the student is made for. No refusal: rotations have no end."""
    rows, change = plan.rows.row_tokens, "use a cache of shorter rows (data.row_tokens)"
    contexts = {"the teacher": teacher_context(plan.teacher), "the student": context_length(student)}
    notes = {whose: too_long_note(rows, context, whose, change) for whose, context in contexts.items()}
    if contexts["the teacher"] == contexts["the student"]:
        notes = {"both": too_long_note(rows, contexts["the student"], "teacher and student", change)}
    _warn(notes.values())


def _warn(notes: Iterable[str | None]) -> None:
    for note in filter(None, notes):
        log.warning(note)


def _warn_of_idleness(
    config: TrainConfig, stages: Sequence[Stage], source: Source, store: Store, student: Decoder | None, begins: bool
) -> None:
    """Say that the run begins with nothing to learn. No refusal: who measures what rounding does wants just that.

    Args:
        student: all of it; None: it is read from the run's folder where it must be compared.
    """
    teacher, init = source.plan.teacher, config.student.init
    whole = block_starts(config.student, teacher.num_blocks) in (None, list(range(teacher.num_blocks)))
    if not whole or "resid" not in recorded_taps(source):
        return
    if init in ("teacher", teacher.path, _teacher_path(config)):
        note = idle_note(config, stages)
    else:
        read = (lambda: student) if student is not None else (lambda: kept_student(store))
        note = idle_checkpoint_note(config, stages, read, source, _teacher_path(config)) if begins else None
    if note:
        log.warning(note)


def _open_student(
    store: Store, config: TrainConfig, stages: Sequence[Stage], sources: Sources, peers: Peers
) -> Decoder:
    """The student before its first step; the first process makes it, the others read it then."""
    biased = config.moe_balance_type == "noaux_tc"
    if not peers.first:
        peers.meet("student")
        if not has_student(store):
            raise CheckpointError(
                "a process does not see what the first one wrote",
                {"run": config.run, "process": f"{peers.number} of {peers.count}"},
                "name a --run that all processes reach: a shared disk or a bucket",
            )
    decoder = open_student(
        store,
        config.student,
        sources.rows,
        teacher_path=_teacher_path(config),
        router_bias=biased,
        seed=config.seed,
        open_source=sources.open,
        mesh=make_mesh(config.mesh),
        must_differ=not (biased or any(stage.teaches_teacher for stage in stages)),
    )
    if peers.first:
        seal_student(store)
        Checkpoints(store).remove_unfinished()
        peers.meet("student")
    return with_attention(decoder, chosen_kernel(config.attention, decoder.config, config.compute_dtype))


def _say_what_adapters_are(parameters: Parameters) -> None:
    """Say how many numbers the adapters have, and which share of the student's that is."""
    found = sum(value.size for name, value in parameters.items() if is_adapter(name))
    if found:
        whole = sum(value.size for name, value in parameters.items() if sublayer_of(name) not in BESIDE)
        log.info(f"adapters: {found:,} parameters, {found / whole:.2%} of the student's, which stay unchanged")


def _say_what_is_off(spec: TrainSpec, peers: Peers) -> None:
    """Balancing by biases turns the auxiliary loss off; a user who gave it a weight is notified."""
    losses = [spec.loss, *(stage.loss for stage in spec.stages or [] if stage.loss)]
    if (
        peers.first
        and spec.moe_balance_type == "noaux_tc"
        and any(may_count(loss.load_balance.weight) for loss in losses)
    ):
        log.info("moe_balance_type noaux_tc turns loss.load_balance off: its weight is not used")


def _teacher_path(spec: TrainSpec) -> str | None:
    """Return the teacher's present path, if the config names one."""
    return spec.online.teacher.path if spec.source == "online" and spec.online.teacher else None


def _result(run: str, stage: Stage, store: Store, first: int) -> TrainResult:
    """Read the result of a finished run from its files. stage: its last."""
    lines = [line for line in read_metrics(store.url) if "perf/tokens_per_second" in line]
    if not lines:  # every run has at least one: it was lost after the run
        raise DamageError(
            "the run is finished, but its metrics have no line of a step",
            {"file": store.where(f"{LINES}.jsonl"), "steps": stage.last},
            "copy the file back; the student can be exported without it",
        )
    evaluations, steps = read_evaluations(store), stage.last
    found = {entry.step: entry for entry in evaluations}
    return TrainResult(
        run=run,
        steps=steps,
        resumed_from=first,
        metrics=lines[-1],
        tokens_per_s=statistics.median(line["perf/tokens_per_second"] for line in lines),
        before=found.get(0),
        after=found.get(steps),
        diverged=end_of_run(run, stage, Checkpoints(store).steps(), evaluations, lines),
    )
