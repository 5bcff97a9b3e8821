"""Checkpoints of a run: the initial student and, at some steps, everything that training has changed since.

    <run>/student/                  HF directory of the student before its first step, with its tokenizer
    <run>/checkpoints/00000100/     after 100 steps: all parameters trained so far, projectors, adapters and routers'
                                    biases among them; optimizer state; the state of biases that move; feed state

Parameters go by their names (step/parameters.py), without what a mesh adds, so a run may go on on another mesh. A
student's untrained parameters are stored once. Nothing else is needed to go on or to export: neither the teacher nor
the cache. A checkpoint is there when its record is (schemas/format/checkpoint.py): what a killed process leaves is
ignored.
"""

import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distillcache.models.checkpoint import load_pretrained, source_dtype
from distillcache.models.decoder import Decoder
from distillcache.models.files.runs import RunCheckpoint, TrainedParameters
from distillcache.models.routing import BalanceState
from distillcache.schemas.errors import CheckpointError, DamageError, StorageError
from distillcache.schemas.format.checkpoint import (
    RECORD,
    CheckpointRecord,
    FiguresDigest,
    Held,
    SavedArrays,
    commit,
    held_whole,
    nothing_of,
    read_receipt,
    write_arrays,
)
from distillcache.schemas.format.run import (
    ADAPTERS,
    ALPHA,
    CHECKPOINTS,
    PARAMETERS,
    STUDENT,
    checkpoint_key,
    whole_steps,
)
from distillcache.schemas.format.run_identity import read_identity
from distillcache.schemas.runtime.peers import ALONE, Peers
from distillcache.schemas.store.path import locate
from distillcache.schemas.store.store import Store
from distillcache.trainer.mesh.host_parameters import HostShards, Kept

OPTIMIZER, ROUTER = "optimizer", "router"  # the items of a checkpoint beside its parameters
POLL_S = 0.2


class Checkpoints:
    """The checkpoints of one run, newest `keep` of them. Saving runs in the background until `wait` or `close`."""

    def __init__(self, store: Store, keep: int = 0, peers: Peers = ALONE, timeout_s: float = 600.0) -> None:
        """
        Args:
            store: the run.
            keep: how many of the newest stay; 0 to only read.
            timeout_s: how long the first process waits for the parts of the others.
        """
        self._store, self._keep, self._peers, self._timeout_s = store, keep, peers, timeout_s
        self._best: int | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def keep_best(self, step: int) -> None:
        """From now on the checkpoint of this step stays, whatever its age, and no older best one."""
        self._best = step

    def steps(self) -> list[int]:
        """The steps of all whole checkpoints, ascending."""
        return whole_steps(self._store)

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return max(self.steps(), default=None)

    def remove_unfinished(self) -> None:
        """Delete what killed processes left."""
        there, whole_ones = self._store.keys(f"{CHECKPOINTS}/"), {checkpoint_key(step) for step in self.steps()}
        for folder in {"/".join(key.split("/")[:2]) for key in there} - whole_ones:
            self._store.delete_folder(folder)

    def save(
        self,
        step: int,
        held: Mapping[str, Held],
        whole: Mapping[str, Any],
        feed: dict[str, int],
        figures: dict[str, FiguresDigest] | None = None,
    ) -> None:
        """Start saving the state after `step` steps; all processes call this.

        Args:
            held: what this process is to write, by item and name.
            whole: what every process has all of, on the host; the first one writes it.
            figures: of the first process: digests of the evaluations and of the metrics up to here.

        Raises:
            StorageError: the save before this one failed; earlier checkpoints stay.
        """
        self.wait()
        rest = {name: held_whole(np.array(value)) for name, value in whole.items()}
        mine = rest if self._peers.first else {name: nothing_of(value) for name, value in rest.items()}
        self._pending = self._pool.submit(self._write, step, {**held, **mine}, feed, figures)

    def wait(self) -> None:
        """Return when the save is durable; raises `StorageError` where it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def check(self) -> None:
        """Raise `StorageError` where the save that is under way has failed by now."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def close(self) -> None:
        """Wait, then stop the background thread."""
        self._pool.shutdown()
        self.wait()

    def _write(
        self, step: int, arrays: Mapping[str, Held], feed: dict[str, int], figures: dict[str, FiguresDigest] | None
    ) -> None:
        folder, peers = checkpoint_key(step), self._peers
        try:
            write_arrays(self._store, folder, peers.number, peers.attempt, arrays)
            if peers.first:
                identity = read_identity(self._store)
                run = None if identity is None else identity.digest
                parts = self._parts(folder)
                commit(
                    self._store, folder, CheckpointRecord(step=step, feed=feed, parts=parts, run=run, figures=figures)
                )
                self._prune()
        except StorageError as error:
            raise StorageError(
                f"a checkpoint cannot be written: {error.what}",
                error.facts,
                f"{error.next}; the run resumes from the last complete checkpoint",
            ) from error

    def _parts(self, folder: str) -> tuple[str, ...]:
        """The digests of all processes' parts, once all are there."""
        found: dict[int, str] = {}
        deadline = time.monotonic() + self._timeout_s
        while True:
            for process in [number for number in range(self._peers.count) if number not in found]:
                part = read_receipt(self._store, folder, process)
                if part is not None and part[0].attempt == self._peers.attempt:
                    found[process] = part[1]
            missing = [number for number in range(self._peers.count) if number not in found]
            if not missing:
                return tuple(found[number] for number in range(self._peers.count))
            if time.monotonic() > deadline:
                raise StorageError(
                    "processes have not written their part of a checkpoint",
                    {"checkpoint": self._store.where(folder), "missing": missing, "waited": f"{self._timeout_s:.0f} s"},
                    "check that every process reaches the same --run: a shared disk or a bucket",
                )
            time.sleep(POLL_S)

    def _prune(self) -> None:
        steps = self.steps()
        for step in [step for step in steps if step not in steps[-self._keep :] and step != self._best]:
            self._store.delete(f"{checkpoint_key(step)}/{RECORD}")  # first: half a checkpoint is none
            self._store.delete_folder(checkpoint_key(step))

    def open(self, step: int) -> SavedArrays:
        """The arrays of a checkpoint.

        Raises:
            CheckpointError: there is none at this step, or it is damaged.
        """
        steps = self.steps()
        if step not in steps:
            raise CheckpointError(
                "the run has no such checkpoint",
                {"run": self._store.url, "wanted": step, "found": steps},
                "choose one of these steps",
            )
        return _readable(lambda: SavedArrays(self._store, checkpoint_key(step)))

    def read_through(self, step: int) -> None:
        """Read all trained parameters of a checkpoint, one by one. Raises `CheckpointError` where they are damaged."""
        saved = self.open(step)
        for name in _readable(lambda: saved.names(PARAMETERS)):
            _readable(lambda name=name: saved.whole(PARAMETERS, name))

    def restore_parameters(self, step: int, like: Mapping[str, Kept] | None = None) -> dict[str, Kept]:
        """All parameters that were trained, on the host.

        Args:
            like: those that are given here in parts are restored in the same parts.
        """
        saved = self.open(step)

        def restored(name: str) -> Kept:
            there = (like or {}).get(name)
            if not isinstance(there, HostShards):
                return saved.whole(PARAMETERS, name)
            return there.read(lambda boxes: saved.boxes(PARAMETERS, name, boxes))

        return _readable(lambda: {name: restored(name) for name in saved.names(PARAMETERS)})


def balance_arrays(balance: Mapping[str, BalanceState]) -> dict[str, np.ndarray]:
    """The state of routers' biases by item and name."""
    return {
        f"{ROUTER}/{unit}{field}": np.asarray(value)
        for unit, state in balance.items()
        for field, value in state._asdict().items()
    }


def adapter_arrays(alpha: float | None) -> dict[str, np.ndarray]:
    """The number that adapters need beside their own, by item and name; nothing without adapters."""
    return {} if alpha is None else {f"{ADAPTERS}/{ALPHA}": np.asarray(alpha, np.float64)}


def restored_balance(saved: SavedArrays) -> dict[str, BalanceState]:
    """The state of the routers' biases, with the stored number of groups."""
    units = sorted({name.rpartition("/")[0] + "/" for name in saved.names(ROUTER)})
    return {
        unit: BalanceState(*(jnp.asarray(saved.whole(ROUTER, unit + field)) for field in BalanceState._fields))
        for unit in units
    }


@dataclass(frozen=True, eq=False)
class TrainedStudent:
    """A run's student. tokenizer: where its tokenizer's files are; step: how long it was trained. trained: what the
    checkpoint holds, where the decoder is the student before its first step.
    """

    decoder: Decoder
    tokenizer: str
    step: int
    trained: TrainedParameters | None = None


def load_student(
    run: str, step: int | None = None, dtype: str | None = "float32", *, merges: bool = True
) -> TrainedStudent:
    """The student of a run after `step` steps; default: at its newest checkpoint.

    Args:
        dtype: of its parameters; None, as `export` has it: that of the checkpoint that it was made of.
        merges: give its trained parameters their places in the decoder.

    Raises:
        CheckpointError: there is no run, or it has no such checkpoint.
    """
    store = _run(run)
    checkpoints = Checkpoints(store)
    chosen = checkpoints.latest() if step is None else step
    if chosen is None:
        raise CheckpointError("the run has no checkpoint yet", {"run": run}, "run the same `distillcache train` again")
    checkpoints.open(chosen)  # says which there are, if not this one
    own = source_dtype(locate(store.where(STUDENT))) if dtype is None else dtype
    if not merges:
        trained = RunCheckpoint(locate(store.url), chosen).open()
        return TrainedStudent(load_pretrained(store.where(STUDENT), dtype=own), store.where(STUDENT), chosen, trained)
    decoder = load_pretrained(store.where(checkpoint_key(chosen)), dtype=own)
    return TrainedStudent(decoder, store.where(STUDENT), chosen)


def kept_steps(run: str) -> list[int]:
    """The steps of a run's checkpoints, ascending. Raises `CheckpointError` where there is no run."""
    return Checkpoints(_run(run)).steps()


def has_student(store: Store) -> bool:
    """Return whether a run has begun: its student is there, whole."""
    return store.read(f"{STUDENT}/config.json") is not None


def named(tree: Any) -> dict[str, jax.Array]:
    """The leaves by their paths."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def path_name(path: tuple[Any, ...]) -> str:
    """Return the name of a leaf in a checkpoint."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _run(run: str) -> Store:
    store = Store(run)
    if not has_student(store):
        inside = re.fullmatch(r"(.+)/checkpoints/(\d+|best)/?", run)
        step = "name the folder of a `distillcache train`"
        if inside is not None:
            flag = "--best" if inside[2] == "best" else f"--step {int(inside[2])}"
            step = f"name the run and, as a flag, which of its checkpoints: {inside[1]} {flag}"
        if whole_steps(store):
            raise CheckpointError(
                "a file of the run is missing",
                {"object": store.where(f"{STUDENT}/config.json")},
                "copy it back; without it no checkpoint can be used",
            )
        raise CheckpointError("there is no trained student here", {"run": run}, step)
    return store


def _readable(read: Callable[[], Any]) -> Any:
    """Damage of a checkpoint as an error of the run's."""
    try:
        return read()
    except DamageError as error:
        raise CheckpointError("a checkpoint cannot be read", error.facts, error.next) from error
