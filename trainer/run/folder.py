"""A run's folder, on a disk or in a bucket: its identity, its lock or lease, and its records.

<run>/config.yaml      the resolved config            <run>/metrics.jsonl, router.jsonl, tensorboard/
<run>/run.json         what the numbers depend on     <run>/eval.json   every evaluation
<run>/student/         the student before step 1      <run>/checkpoints/
<run>/summary.json     what came of it, once it has ended
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

from pydantic import TypeAdapter, ValidationError

from distillcache.schemas import command_line
from distillcache.schemas.cache.lease import Leases
from distillcache.schemas.config import TrainConfig
from distillcache.schemas.config.differences import differing, told
from distillcache.schemas.config.train import TrainSpec
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import (
    CheckpointError,
    ConfigError,
    DamageError,
    DistillcacheError,
    FolderTakenError,
    InputError,
    PlanMismatchError,
    StorageError,
)
from distillcache.schemas.format.canonical import from_plain
from distillcache.schemas.format.layout import TOKENIZER
from distillcache.schemas.format.run import (
    CHECKPOINTS,
    EVALUATIONS,
    IDENTITY,
    STUDENT,
    best_index,
    lost_evaluations,
    read_entries,
)
from distillcache.schemas.format.run_identity import (
    file_digest,
    from_sealed,
    read_identity,
    spell_identity,
    to_sealed,
    without_identity,
)
from distillcache.schemas.store.locks import try_lock
from distillcache.schemas.store.redaction import redacted, shown
from distillcache.schemas.store.store import LOCK_SUFFIX, Store
from distillcache.trainer.feed.source import Source
from distillcache.trainer.run.checkpoints import has_student, kept_steps
from distillcache.trainer.run.evaluate import Evaluation
from distillcache.trainer.run.importance import IMPORTANCE
from distillcache.trainer.run.student import SURGERY

log = logging.getLogger(__name__)
Spec = TypeVar("Spec", bound=TrainSpec)

RESOLVED = "config.yaml"
SUMMARY, OF = "summary.json", "of_run"  # the second: its key for the digest of run.json
LOCK = "lock"
LEASE = "claim.json"  # in a bucket, instead of the lock
LEASE_EXPIRY_S = 120.0  # a lease is rewritten four times in this: rarely enough for one object of a bucket
# Of a process that ended before the student was made.
LEFTOVERS = (IDENTITY, RESOLVED, TOKENIZER, LOCK, LEASE, SURGERY, IMPORTANCE)


def take_run(store: Store, config: TrainConfig, source: Source) -> None:
    """Make the run's folder, or see that it holds this very run. A run has begun once its student is there.

    Args:
        store: guarded by `only_one`.

    Raises:
        InputError: the folder holds something else.
        PlanMismatchError: it holds the run of another config or cache.
    """
    spec = {"cache": source.digest, **config.model_dump(mode="json", include=set(TrainSpec.model_fields))}
    known = read_identity(store)
    if known is None or not has_student(store):
        refuse_foreign_folder(store)
        store.delete_folder(STUDENT)  # where there is one, nobody knows of which config it is
        store.write(IDENTITY, spell_identity(spec, None))
    differences = {} if known is None else told(differing(known.spec, spec))
    if differences:
        raise PlanMismatchError(
            "the run's folder contains the run of another config or cache",
            {"run": store.url, **differences},
            "use the config of that run, or another --run",
        )
    store.write(RESOLVED, command_line.dump_yaml(config).encode())


def as_begun(spec: Spec, store: Store) -> Spec:
    """The settings of a run that has begun, with the values that an earlier version wrote down where these name none.

    That version had one learning rate for both modes, and chose by index. A run keeps what it was begun with.
    """
    identity = read_identity(store)
    return spec if identity is None else with_values_of(spec, identity.spec)


def with_values_of(spec: Spec, begun: Mapping[str, Any]) -> Spec:
    """The settings with learning rates and choices as they were begun, where they name none.

    Args:
        begun: the spec in a run's `run.json`.
    """
    optimizer, stages = _value_of(spec.optimizer, begun.get("optimizer"), "learning_rate"), spec.stages
    if stages is not None:
        stages = [
            stage.model_copy(update={"optimizer": _value_of(stage.optimizer, then.get("optimizer"), "learning_rate")})
            for stage, then in _beside(stages, begun.get("stages"))
        ]
    cut = _beside(spec.student.surgery, begun.get("student", {}).get("surgery"))
    student = spec.student.model_copy(update={"surgery": [_value_of(op, then, "by") for op, then in cut]})
    found = {"optimizer": optimizer, "stages": stages, "student": student}
    return spec.model_copy(update={name: value for name, value in found.items() if value != getattr(spec, name)})


def _value_of(part: Any, begun: Any, field: str) -> Any:
    """A part of a config with one field as it was begun, where it names none."""
    then = begun.get(field) if isinstance(begun, dict) else None
    if part is None or then is None or getattr(part, field) is not None:
        return part
    return part.model_copy(update={field: then})


def _beside(entries: Sequence[Any], begun: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Each entry with the one that the run was begun with at its place; {} where there is none."""
    then = begun if isinstance(begun, list) and len(begun) == len(entries) else [{}] * len(entries)
    return [(entry, each if isinstance(each, dict) else {}) for entry, each in zip(entries, then, strict=True)]


def seal_student(store: Store) -> None:
    """Note the digests of the files that the run begins with, once the student is made; nothing where they are known.

    A run of an earlier version has none, and gets none: what may have changed since would pass for what was written.
    """
    identity = read_identity(store)
    if identity is None or identity.digest is None or identity.files is not None:
        return
    keys = [*store.keys(f"{STUDENT}/"), SURGERY, IMPORTANCE]
    found = {key: digest for key in keys if (digest := file_digest(store, key)) is not None}
    store.write(IDENTITY, spell_identity(identity.spec, found))


def refuse_foreign_folder(store: Store) -> None:
    """Raise before anything is written where the folder holds something else than a run.

    Raises:
        InputError: there are files of others.
        DamageError: there is a run that has lost a file which it cannot resume without.
    """
    has_identity, begun = store.read(IDENTITY) is not None, has_student(store)
    if (has_identity and begun) or not any(not _is_leftover(key) for key in store.keys("")):
        return
    if not (has_identity or begun) or not store.keys(f"{CHECKPOINTS}/"):
        raise InputError(
            "the run's folder contains something else", {"run": store.url}, "name a new or empty folder with --run"
        )
    lost, step = (
        (f"{STUDENT}/config.json", "without it, begin a new run with another --run")
        if has_identity
        else (IDENTITY, without_identity(store))
    )
    raise DamageError("a file of the run is missing", {"object": store.where(lost)}, f"copy it back; {step}")


@contextlib.contextmanager
def only_one(store: Store) -> Iterator[Callable[[], None]]:
    """Hold the run against other jobs, until this process ends, however it ends.

    Returns: what raises `FolderTakenError` where the run is another process's by now, or was deleted.

    Raises:
        InputError: another one is at work.
        StorageError: the folder cannot be written, or the file system cannot say.
    """
    with _leased(store) if store.local is None else _locked(store, store.local) as check:
        yield check


@contextlib.contextmanager
def _locked(store: Store, folder: Path) -> Iterator[Callable[[], None]]:
    store.check_inside(LOCK)
    with _opened_lock(folder) as lock:
        if not try_lock(lock.fileno(), folder / LOCK):
            raise _busy(store)

        def check() -> None:
            try:
                same = os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / LOCK))
            except FileNotFoundError:
                same = False
            if not same:
                raise _lost(store)

        yield check


def _opened_lock(folder: Path) -> TextIO:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / LOCK).open("a")
    except OSError as error:  # no permission, a file in the folder's place, a full disk
        raise StorageError(
            "the run's folder cannot be written",
            {"run": str(folder), "cause": error.strerror or str(error)},
            "make the folder writable, or name another one with --run",
        ) from None


@contextlib.contextmanager
def _leased(store: Store) -> Iterator[Callable[[], None]]:
    """A lease that is rewritten while the context lasts (schemas/cache/lease.py)."""
    leases = Leases(store, "", LEASE_EXPIRY_S, key=lambda *_: LEASE)
    try:
        if not leases.take(0):
            raise _busy(store)

        def check() -> None:
            if not leases.holds(0):
                raise _lost(store)

        yield check
    finally:
        if leases.failure is not None:  # the training itself does not need the lease
            log.warning(f"the lease on {store.url} could not be kept: {leases.failure}")
        with contextlib.suppress(StorageError):  # then it expires
            leases.close()


def _lost(store: Store) -> FolderTakenError:
    return FolderTakenError(
        "the run is no longer this process's: it was deleted or taken over while this one was paused",
        {"run": store.url},
        "nothing more was written there; start the command again if the run is still wanted",
    )


def _busy(store: Store) -> DistillcacheError:
    return InputError("another process is training this run", {"run": store.url}, "wait for it, or name another --run")


def remove_beginning(store: Store) -> None:
    """Leave nothing of a run that could not be begun."""
    if store.keys(f"{CHECKPOINTS}/"):
        return
    store.delete_folder(STUDENT)
    # The lock goes last: every deletion asks whether the run is still this process's, and the lock's file says so.
    for key in sorted((key for key in store.keys("") if _is_leftover(key)), key=lambda key: key in (LOCK, LEASE)):
        store.delete(key)
    if store.local is not None:
        for lock in store.local.glob(f"*{LOCK_SUFFIX}"):
            lock.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the user's own folder may hold what we do not know
            store.local.rmdir()


def shown_config(store: Store) -> tuple[str, dict[str, Any]]:
    """The run's config as text and as a mapping; credentials in URLs are hidden.

    Without a file there is no text, and the mapping has what `run.json` knows of it, if anything.

    Raises:
        DamageError: the file is no YAML, or empty, or not the config of this run; or `run.json` is damaged.
    """
    data, identity = store.read(RESOLVED), read_identity(store)
    known = {} if identity is None or identity.digest is None else identity.spec
    if data is None:
        return "", shown({name: value for name, value in known.items() if name != "cache"})
    step = f"copy it again, or delete it: {IDENTITY} has what the numbers depend on"
    try:
        config = command_line.stored_settings(data, store.where(RESOLVED))
    except ConfigError as error:
        raise DamageError(error.what, error.facts, step) from error
    names = known.keys() - {"cache"}  # one is a digest, the other a path
    if other := differing({name: known[name] for name in names}, {name: config.get(name) for name in names}):
        raise DamageError(
            f"the config of a run is not the one that {IDENTITY} names",
            {"file": store.where(RESOLVED), **told(other)},
            step,
        )
    return redacted(data.decode(errors="replace")), shown(config)


def read_evaluations(run: Store | str | Path) -> list[Evaluation]:
    """The evaluations of a run, in the order of their steps.

    Raises:
        DamageError: the file holds something else.
    """
    store = run if isinstance(run, Store) else Store(str(run))
    entries = read_entries(store)
    try:
        return TypeAdapter(list[Evaluation]).validate_python(entries)
    except ValidationError as error:
        first = error.errors()[0]
        facts = {"object": store.where(EVALUATIONS), "field": ".".join(map(str, first["loc"])), "found": first["msg"]}
        raise DamageError(
            "a JSON file does not have the expected content", facts, f"copy {EVALUATIONS} again, or delete it"
        ) from error


def write_evaluations(store: Store, evaluations: Sequence[Evaluation]) -> None:
    """All evaluations of a run."""
    store.write(EVALUATIONS, _spelled_json([entry.model_dump(mode="json") for entry in evaluations]))


def write_summary(store: Store, summary: dict[str, Any]) -> None:
    """Write the summary of a run, with the digest of its `run.json`."""
    identity = read_identity(store)
    of = {} if identity is None or identity.digest is None else {OF: identity.digest}
    store.write(SUMMARY, to_sealed({**summary, **of}))


@dataclass(frozen=True)
class Ending:
    """The end of a run by its summary.

    error: the message of one that diverged; best_checkpoint: a step, if known. steps: of a run that came to its end,
    how many it has; None of an earlier version's.
    """

    steps: int | None = None
    diverged: bool = False
    best_checkpoint: int | None = None
    error: str = ""


def read_ending(store: Store) -> Ending | None:
    """Read whether a run diverged; None where it has no summary: it is at work, or was stopped, or is an older one's.

    Raises:
        DamageError: the file holds something else.
    """
    data = store.read(SUMMARY)
    if data is None:
        return None
    step, where = f"copy {SUMMARY} again, or delete it: the command of the run writes it again", store.where(SUMMARY)
    value, digest = from_sealed(data, where, step)
    identity = read_identity(store)
    if identity is not None and identity.digest is not None and (digest is None or value.get(OF) != identity.digest):
        found = "the summary of another run, or of an earlier version's"
        raise DamageError("the summary is not this run's", {"object": where, "found": found}, step)
    return from_plain(TypeAdapter(Ending), json.dumps(value).encode(), where, step)


def best_evaluation(run: str) -> Evaluation:
    """The best evaluation of those whose checkpoints are kept (never that before step 1).

    Raises:
        CheckpointError: there is no run, or no such evaluation.
    """
    kept, found = kept_steps(run), read_evaluations(run)
    if count := lost_evaluations(Store(run)):
        raise CheckpointError(
            "the best checkpoint is not known: the run's evaluations are missing",
            {"missing": Store(run).where(EVALUATIONS), "had": counted(count, "evaluation"), "checkpoints": kept},
            "copy it back, export the newest without --best, or name one with --step",
        )
    best = best_of([entry for entry in found if entry.step in kept])
    if best is None:
        raise CheckpointError(
            "no checkpoint of the run has a held-out evaluation, so there is no best one",
            {"run": run, "checkpoints": kept, "evaluations": [entry.step for entry in found]},
            "export the newest without --best, or name one with --step",
        )
    return best


def missing_checkpoints(run: str, *, best: bool, step: int | None) -> list[str]:
    """Say which checkpoints that a user may expect to be exported are gone, or that nobody can know.

    Args:
        best: the best one was asked for. step: the one that was; None: the newest.
    """
    store, kept, told = Store(run), kept_steps(run), []
    if store.read(IDENTITY) is None:
        told.append(f"{store.where(IDENTITY)} is missing: the run's files cannot be checked")
    known = [entry for entry in read_evaluations(store) if 0 < entry.step <= kept[-1]] if best else []
    found = best_of(known)
    if found is not None and found.step not in kept:
        told.append(f"the best evaluation is that of step {found.step:,}, whose checkpoint is gone")
    if best or step is not None:
        return told
    try:
        ending = read_ending(store)
    except DamageError as error:
        return [*told, f"{store.where(SUMMARY)} does not say at which step the run ended: {error.what}"]
    if ending is not None and not ending.diverged and (ending.steps or 0) > kept[-1]:
        told.append(
            f"the run ended at step {ending.steps:,}, whose checkpoint is gone; the newest is that of {kept[-1]:,}"
        )
    if ending is not None and ending.best_checkpoint is not None and ending.best_checkpoint not in kept:
        told.append(f"the best checkpoint was that of step {ending.best_checkpoint:,}, and it is gone")
    return told


def best_of(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """The one with the lowest perplexity; without perplexities, with the smallest cosine distance; else None."""
    best = best_index([(entry.perplexity, entry.mean_cosine) for entry in evaluations])
    return None if best is None else evaluations[best]


def _is_leftover(key: str) -> bool:
    """Return whether a folder holds only what a process leaves that ended before the student was complete."""
    return key in LEFTOVERS or key.startswith((f".{STUDENT}.", f"{STUDENT}/"))


def _spelled_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
