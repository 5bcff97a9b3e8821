"""A run's folder, as far as others than its trainer read it.

<run>/run.json                 what the run is of
<run>/eval.json                the evaluations
<run>/student/                 the HF directory that the run began with
<run>/checkpoints/00000100/    the state after 100 steps; whole once it has its record (checkpoint.py)
"""

from collections.abc import Sequence

from distillcache.schemas.format.checkpoint import RECORD
from distillcache.schemas.store.store import Store

IDENTITY, EVALUATIONS = "run.json", "eval.json"
STUDENT, CHECKPOINTS = "student", "checkpoints"
PARAMETERS = "parameters"  # the item of a checkpoint that the student needs


def checkpoint_key(step: int) -> str:
    """The key of a checkpoint's folder."""
    return f"{CHECKPOINTS}/{step:08d}"


def whole_steps(run: Store) -> list[int]:
    """The steps of a run's whole checkpoints, ascending."""
    keys = [key.split("/") for key in run.keys(f"{CHECKPOINTS}/")]
    return sorted(int(key[1]) for key in keys if len(key) == 3 and key[2] == RECORD and key[1].isdigit())


def best_index(evaluations: Sequence[tuple[float | None, float | None]]) -> int | None:
    """The index of the best of some evaluations, each a perplexity and a mean cosine distance.

    It is the one of lowest perplexity; where none is defined, of smallest distance; None where no distance is, either.
    """
    for figure in (0, 1):
        known = [(value, index) for index, entry in enumerate(evaluations) if (value := entry[figure]) is not None]
        if known:
            return min(known)[1]
    return None
