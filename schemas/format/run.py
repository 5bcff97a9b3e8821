"""A run's folder, as far as others than its trainer read it.

<run>/run.json                 what the run is of, and the digests of its student's files (run_identity.py)
<run>/eval.json                the evaluations
<run>/student/                 the HF directory that the run began with
<run>/checkpoints/00000100/    the state after 100 steps; whole once it has its record (checkpoint.py)

A checkpoint's record has digests of the figures up to its step: evaluations and lines of metrics. What is written after
the newest checkpoint has none, until the next.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import xxhash
from pydantic import BaseModel, ConfigDict, TypeAdapter

from distillcache.schemas.errors import DamageError
from distillcache.schemas.format.canonical import from_plain
from distillcache.schemas.format.checkpoint import RECORD, CheckpointRecord, FiguresDigest, read_record
from distillcache.schemas.format.run_identity import IDENTITY as IDENTITY
from distillcache.schemas.format.run_identity import STUDENT as STUDENT
from distillcache.schemas.store.store import Store

EVALUATIONS = "eval.json"
CHECKPOINTS = "checkpoints"
PARAMETERS = "parameters"  # the item of a checkpoint that the student needs
ADAPTERS, ALPHA = "adapters", "alpha"  # the item, where adapters are among the parameters, and the only number in it


class _Scores(BaseModel):
    """The part of an evaluation by which checkpoints are compared."""

    model_config = ConfigDict(strict=True)
    step: int
    perplexity: float | None
    cosine: list[float] = []


def checkpoint_key(step: int) -> str:
    """The key of a checkpoint's folder."""
    return f"{CHECKPOINTS}/{step:08d}"


def whole_steps(run: Store) -> list[int]:
    """The steps of a run's whole checkpoints, ascending."""
    keys = [key.split("/") for key in run.keys(f"{CHECKPOINTS}/")]
    return sorted(int(key[1]) for key in keys if len(key) == 3 and key[2] == RECORD and key[1].isdigit())


def newest_record(run: Store) -> CheckpointRecord | None:
    """The record of the newest whole checkpoint; None where there is none, or a damaged one, which says nothing."""
    steps = whole_steps(run)
    try:
        return read_record(run, checkpoint_key(steps[-1])) if steps else None
    except DamageError:
        return None


def digest_entries(entries: Iterable[bytes]) -> FiguresDigest:
    """The digest of some entries, each in its own spelling."""
    count, digest = 0, xxhash.xxh3_128()
    for entry in entries:
        count += 1
        digest.update(entry + b"\n")
    return FiguresDigest(count=count, digest=digest.hexdigest())


def digest_evaluations(entries: Sequence[dict[str, Any]]) -> FiguresDigest:
    """The digest of evaluations as they are in `eval.json`."""
    return digest_entries(json.dumps(entry).encode() for entry in entries)


def read_entries(run: Store) -> list[dict[str, Any]]:
    """The evaluations of a run, in the order of their steps; none where the file is not there.

    Raises:
        DamageError: the file holds something else, or not what had been written at the newest checkpoint.
    """
    record = newest_record(run)  # first: what it covers is in the file by then
    data = run.read(EVALUATIONS)
    if data is None:
        return []
    step = f"copy {EVALUATIONS} again, or delete it: then evaluations up to the newest checkpoint are lost"
    from_plain(TypeAdapter(list[_Scores]), data, run.where(EVALUATIONS), step)
    found = json.loads(data.decode())  # as they are spelled: their digest covers that
    expected = (record.figures or {}).get(EVALUATIONS) if record is not None else None
    if record is not None and expected is not None:
        covered = [entry for entry in found if entry["step"] <= record.step]
        if digest_evaluations(covered) != expected:
            raise DamageError(
                "the evaluations of a run are not those that were written",
                {
                    "object": run.where(EVALUATIONS),
                    "found": f"{len(covered)} up to step {record.step}",
                    "expected": f"{expected.count}, with another digest"
                    if len(covered) == expected.count
                    else f"{expected.count}",
                },
                step,
            )
    return found


def lost_evaluations(run: Store) -> int:
    """Count the evaluations that the newest checkpoint knows of, where the file of a run is not there."""
    record = newest_record(run) if run.read(EVALUATIONS) is None else None
    known = (record.figures or {}).get(EVALUATIONS) if record is not None else None
    return 0 if known is None else known.count


def best_index(evaluations: Sequence[tuple[float | None, float | None]]) -> int | None:
    """The index of the best of some evaluations, each a perplexity and a mean cosine distance.

    It is the one of lowest perplexity; where none is defined, of smallest distance; None where no distance is, either.
    """
    for figure in (0, 1):
        known = [(value, index) for index, entry in enumerate(evaluations) if (value := entry[figure]) is not None]
        if known:
            return min(known)[1]
    return None
