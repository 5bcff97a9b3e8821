"""A run's folder, as far as others than its trainer read it.

<run>/run.json                 what the run is of
<run>/eval.json                the evaluations
<run>/student/                 the HF directory that the run began with
<run>/checkpoints/00000100/    the state after 100 steps; whole once it has its record (checkpoint.py)
"""

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
