"""A training's student as a checkpoint: the run's folder, or one of its checkpoints.

    <run>                          the newest checkpoint
    <run>/checkpoints/00000100     the student after 100 steps; `best` for the number: of those kept, the one with the
                                   lowest held-out perplexity (smallest cosine distance, where no token is a target)

What was trained comes from the checkpoint's boxes (schemas/format/checkpoint.py), the rest from `<run>/student`, the
HF directory that the run began with. Adapters are added to their matrices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from distillcache.models.adapters import adapter_names
from distillcache.schemas.errors import CheckpointError, DamageError
from distillcache.schemas.format.checkpoint import RECORD, Box, SavedArrays
from distillcache.schemas.format.run import (
    ADAPTERS,
    ALPHA,
    CHECKPOINTS,
    PARAMETERS,
    STUDENT,
    best_index,
    checkpoint_key,
    read_entries,
    whole_steps,
)
from distillcache.schemas.format.run_identity import check_student_files
from distillcache.schemas.store.path import Location, open_folder

BEST = "best"
CONFIG = "config.json"


@dataclass(frozen=True)
class RunCheckpoint:
    """A checkpoint of a run. student: the HF directory with all that was not trained."""

    run: Location
    step: int

    @property
    def student(self) -> Location:
        return self.run / STUDENT

    @property
    def key(self) -> str:
        """The key of the checkpoint's folder, below the run."""
        return checkpoint_key(self.step)

    def record(self) -> bytes:
        """The record that commits the checkpoint, with the digests of all its parts."""
        return (self.run / self.key / RECORD).read_bytes()

    def open(self) -> "TrainedParameters":
        """Return the trained parameters.

        Raises:
            CheckpointError: it is damaged.
        """
        return TrainedParameters(self)


class TrainedParameters:
    """The parameters in a checkpoint, by their names in a decoder: `groups/0/blocks/0/attention/q`."""

    def __init__(self, checkpoint: RunCheckpoint) -> None:
        self.where = checkpoint.run / checkpoint.key
        try:
            self._saved = SavedArrays(open_folder(checkpoint.run), checkpoint.key)
        except DamageError as error:
            raise _damaged(error) from error
        self.names = frozenset(self._saved.names(PARAMETERS))

    @cached_property
    def alpha(self) -> float:
        """Return the `alpha` of the adapters among the parameters.

        Raises:
            CheckpointError: the checkpoint is damaged, or has no adapters.
        """
        try:
            return float(self._saved.whole(ADAPTERS, ALPHA))
        except DamageError as error:
            raise _damaged(error) from error

    def adapter(self, matrix: str) -> tuple[np.ndarray, np.ndarray] | None:
        """A and B of a stacked matrix, `[repeats, in, rank]` and `[repeats, rank, out]`; None if it has no adapter."""
        names = adapter_names(matrix)
        if not self.names.issuperset(names):
            return None
        a, b = (self.boxes(name, [tuple(slice(0, size) for size in self.shape(name))])[0] for name in names)
        return a, b

    def shape(self, name: str) -> tuple[int, ...]:
        return self._saved.info(PARAMETERS, name).shape

    def boxes(self, name: str, wanted: Sequence[Box]) -> list[np.ndarray]:
        """These parts of a parameter."""
        try:
            return self._saved.boxes(PARAMETERS, name, wanted)
        except DamageError as error:
            raise _damaged(error) from error


def find_run(where: Location) -> RunCheckpoint | None:
    """The checkpoint that a place names; None where it is neither a run nor in one.

    Raises:
        CheckpointError: the run has no such checkpoint, or has lost its student.
    """
    run = where.parent.parent if where.parent.name == CHECKPOINTS else where
    if not (run / STUDENT / CONFIG).exists() and not (where / CONFIG).exists():
        _refuse_without_student(run)
    if where.parent.name == CHECKPOINTS and (where.parent.parent / STUDENT / CONFIG).exists():
        run, asked = where.parent.parent, where.name
        if asked != BEST and not asked.isdigit():
            raise _no_checkpoint(where, asked, whole_steps(open_folder(run)))
    elif not (where / CONFIG).exists() and (where / STUDENT / CONFIG).exists():
        run, asked = where, ""
    else:
        return None
    steps = whole_steps(open_folder(run))
    step = _best(run, steps) if asked == BEST else int(asked) if asked else max(steps, default=None)
    if step not in steps:
        raise _no_checkpoint(where, asked or "the newest", steps)
    return RunCheckpoint(run, step)


def _refuse_without_student(run: Location) -> None:
    """Raise `CheckpointError` where a folder has checkpoints of a run: then it is one, and its student is lost."""
    if (isinstance(run, Path) and not run.is_dir()) or not whole_steps(open_folder(run)):
        return
    lost = run / STUDENT / CONFIG
    raise CheckpointError(
        "a file of the run is missing", {"object": lost}, "copy it back; without it no checkpoint can be used"
    )


def check_student(folder: Location, *, whole: bool = True) -> None:
    """Compare the files of a run's student with their digests in the run's record; other folders have none.

    Args:
        whole: every byte of all files; otherwise of those without weights.

    Raises:
        CheckpointError: they are not what the run began with.
    """
    if folder.name != STUDENT:
        return
    try:
        check_student_files(open_folder(folder.parent), whole=whole)
    except DamageError as error:
        raise CheckpointError(f"a run's student cannot be used: {error.what}", error.facts, error.next) from error


def numbered(where: Location) -> Location:
    """The place itself, or the folder of the checkpoint that it names without its zeros, or as the best."""
    found = find_run(where) if where.parent.name == CHECKPOINTS else None
    return where if found is None else found.run / found.key


def hf_folder(where: Location) -> Location:
    """Return the folder of a checkpoint's HF files, tokenizer included; of a run, that of its student.

    Raises:
        CheckpointError: a small file of the run's student is not what the run began with.
    """
    found = find_run(where)
    if found is None:
        return where
    check_student(found.student, whole=False)
    return found.student


def _best(run: Location, steps: Sequence[int]) -> int | None:
    try:
        found = [entry for entry in read_entries(open_folder(run)) if entry["step"] in steps]
    except DamageError as error:
        raise CheckpointError(f"the best checkpoint is not known: {error.what}", error.facts, error.next) from error
    best = best_index([(entry["perplexity"], _mean(entry.get("cosine", []))) for entry in found])
    return None if best is None else found[best]["step"]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _no_checkpoint(where: Location, asked: str, steps: Sequence[int]) -> CheckpointError:
    return CheckpointError(
        "the run has no such checkpoint",
        {"path": where, "wanted": asked, "found": ", ".join(map(str, steps)) or "none"},
        f"name one of these: <run>/{CHECKPOINTS}/<step>, or the run itself for the newest",
    )


def _damaged(error: DamageError) -> CheckpointError:
    return CheckpointError("a checkpoint cannot be read", error.facts, error.next)
