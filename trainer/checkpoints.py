"""What a run keeps: the student as it was made, and, at some steps, what training changed since.

    <run>/student/           HF directory of the student before its first step, with its tokenizer
    <run>/checkpoints/<n>/   Orbax: all parameters trained so far, projectors and routers' biases among them; optimizer
                             state; the state of biases that move; feed state

Parameters go by their names (parameters.py), without what a mesh adds, so a run may go on on another mesh. A
student's untrained parameters are stored once. Nothing else is needed to go on or to export: neither the teacher nor
the cache. Orbax commits a checkpoint whole or not at all: what a killed process leaves half-written is ignored.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from models.checkpoint import load_pretrained
from models.decoder import Decoder
from models.routing import BalanceState
from schemas.errors import CheckpointError, StorageError
from trainer.parameters import Parameters, install

STUDENT = "student"
CHECKPOINTS = "checkpoints"


class Checkpoints:
    """The checkpoints of one run, newest `keep` of them. Saving goes on in the background until `wait` or `close`."""

    def __init__(self, run: Path, keep: int | None = None) -> None:
        """`keep`: how many of the newest stay; None to only read."""
        self._folder = run / CHECKPOINTS
        self._kept = _Kept(keep or 0)
        if keep:
            options = ocp.CheckpointManagerOptions(preservation_policy=self._kept)
        else:
            options = ocp.CheckpointManagerOptions(
                read_only=True, create=False, save_interval_steps=0, enable_async_checkpointing=False
            )
        self._manager = ocp.CheckpointManager(self._folder.absolute(), options=options)

    def keep_best(self, step: int) -> None:
        """From now on the checkpoint of this step stays, whatever its age, and no older best one."""
        self._kept.best = step

    def steps(self) -> list[int]:
        """The steps of all whole checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        parameters: Parameters,
        moments: Mapping[str, Any],
        balance: Mapping[str, BalanceState],
        feed: dict[str, int],
    ) -> None:
        """Begin to save what was reached after `step` steps; a failure is raised by the next call.

        Raises:
            StorageError: this save or the one before it failed; earlier checkpoints stay.
        """
        items: dict[str, Any] = {
            "parameters": ocp.args.StandardSave(parameters),
            "optimizer": ocp.args.StandardSave(_named(moments)),
            "feed": ocp.args.JsonSave(feed),
        }
        if balance:
            items["router"] = ocp.args.StandardSave({unit: state._asdict() for unit, state in balance.items()})
        self._checked(lambda: self._manager.save(step, args=ocp.args.Composite(**items)))

    def restore_parameters(self, step: int) -> Parameters:
        """All parameters that were trained."""
        return self._restore(step, parameters=ocp.args.StandardRestore()).parameters

    def restore_moments(self, step: int, like: Any) -> Any:
        """The optimizer's state; `like` gives the structure."""
        found = self._restore(step, optimizer=ocp.args.StandardRestore(_shapes(like))).optimizer
        return jax.tree_util.tree_map_with_path(lambda path, _: found[_name(path)], like)

    def restore_balance(self, step: int) -> dict[str, BalanceState]:
        """The state of the routers' biases, as many groups as there were."""
        found = self._restore(step, router=ocp.args.StandardRestore()).router
        return {unit: BalanceState(**state) for unit, state in found.items()}

    def restore_feed(self, step: int) -> dict[str, int]:
        """Where the feed stood."""
        return self._restore(step, feed=ocp.args.JsonRestore()).feed

    def wait(self) -> None:
        """Return when all saves are durable; raises `StorageError` where one failed."""
        self._checked(self._manager.wait_until_finished)

    def close(self) -> None:
        """Wait, then stop the background threads."""
        self._manager.close()

    def _checked(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (ValueError, OSError, RuntimeError) as error:  # Orbax passes on TensorStore's own
            raise StorageError(
                "a checkpoint cannot be written",
                {"folder": self._folder, "cause": str(error).split(" [")[0].split("\n")[0][:300]},
                "free some space or make the place writable, then run the same command again: it goes on from the "
                "last whole checkpoint",
            ) from error

    def _restore(self, step: int, **items: Any) -> Any:
        if step not in self.steps():
            raise CheckpointError(
                "the run has no such checkpoint",
                {"run": self._folder.parent, "wanted": step, "found": self.steps()},
                "choose one of these steps",
            )
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax passes on whatever its readers raise, a bare Exception for damaged bytes
            raise CheckpointError(
                "a checkpoint cannot be read",
                {"checkpoint": self._folder / str(step), "cause": str(error).split("\n")[0][:300]},
                "delete this folder: the run goes on from the one before it",
            ) from error


@dataclass
class _Kept(checkpoint_managers.PreservationPolicy):
    """Which checkpoints stay: the newest, and the best by evaluation."""

    newest: int
    best: int | None = None

    def should_preserve(
        self,
        checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: checkpoint_managers.PreservationContext,
    ) -> Sequence[bool]:
        steps = [info.step for info in checkpoints]
        return [step in steps[-self.newest :] or step == self.best for step in steps]


@dataclass(frozen=True, eq=False)
class TrainedStudent:
    """A run's student. tokenizer: the folder that holds its tokenizer's files; step: how long it was trained."""

    decoder: Decoder
    tokenizer: Path
    step: int


def load_student(run: str, step: int | None = None) -> TrainedStudent:
    """The student of a run after `step` steps; default: at its newest checkpoint.

    Raises:
        CheckpointError: there is no run, or it has no such checkpoint.
    """
    folder = Path(run).expanduser()
    with _opened(folder) as checkpoints:
        chosen = checkpoints.latest() if step is None else step
        if chosen is None:
            raise CheckpointError(
                "the run has no checkpoint yet", {"run": run}, "run the same `distillcache train` again"
            )
        decoder = load_pretrained(folder / STUDENT, dtype="float32")
        install(decoder, checkpoints.restore_parameters(chosen))
    return TrainedStudent(decoder, folder / STUDENT, chosen)


def kept_steps(run: str) -> list[int]:
    """The steps of a run's checkpoints, ascending. Raises `CheckpointError` where there is no run."""
    with _opened(Path(run).expanduser()) as checkpoints:
        return checkpoints.steps()


@contextlib.contextmanager
def _opened(run: Path) -> Iterator[Checkpoints]:
    """A run's checkpoints, to read."""
    if not (run / STUDENT).is_dir() or not (run / CHECKPOINTS).is_dir():
        raise CheckpointError(
            "there is no trained student here", {"run": run}, "name the folder of a `distillcache train`"
        )
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns that what is opened to read cannot be written
    checkpoints = Checkpoints(run)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def _named(tree: Any) -> dict[str, jax.Array]:
    """The leaves by their paths."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _shapes(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in _named(tree).items()}


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
