"""The teacher's own perplexity on the held-out rows, to which a student's is compared.

It is measured once a run, before step 1, as the student's is (where evaluations compare with the whole distribution,
exact.py, each of them gives it, and nothing is loaded here): by the same function, on the same rows and targets, with
the same padding of the vocabulary left out, in the dtype in which the cache was built. The teacher is loaded for that
alone, or is the one in the loop, and every process evaluates its share of the rows. eval.json keeps the figure, so a
resumed run does not measure it again.
"""

import gc
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distillcache.models.checkpoint import read_config
from distillcache.models.config import ModelConfig
from distillcache.models.decoder import Decoder
from distillcache.schemas.errors import DistillcacheError
from distillcache.schemas.runtime.peers import Peers
from distillcache.trainer.feed.open import Sources
from distillcache.trainer.feed.teacher import load_recorded
from distillcache.trainer.run.evaluate import Evaluation, gap_closed, told_perplexity
from distillcache.trainer.run.held_out import held_out

ROOM = 1.25  # times the weights: what must be free, so that a run never ends for want of this figure
GB = 1e9


class TeacherFigure(NamedTuple):
    """The teacher on the held-out rows. perplexity: None where it is not known; unknown: why, in words."""

    perplexity: float | None
    unknown: str | None = None


def known_teacher(evaluations: Sequence[Evaluation]) -> TeacherFigure | None:
    """The teacher's figure that a run's evaluations have; None where it is still to be measured."""
    found = (entry.teacher_perplexity for entry in evaluations)
    return next((TeacherFigure(value) for value in found if value is not None), None)


def measure_teacher(
    wanted: bool, batch_rows: int, sources: Sources, student: ModelConfig, peers: Peers
) -> TeacherFigure:
    """Evaluate the teacher on the held-out rows, or say why not. All processes of a run come to the same answer."""
    if not wanted:
        return TeacherFigure(None, "eval_teacher is off")
    rows = sources.held_out_rows
    if not rows.has_targets():
        return TeacherFigure(None, "no held-out token is a target")
    decoder, unknown = _opened(sources)
    opened = peers.sum(np.asarray([decoder is not None], np.float64))[0]
    if decoder is None or opened < peers.count:
        return TeacherFigure(None, unknown or "another process of the run cannot open it")
    found = held_out(decoder, rows, batch_rows, "teacher's perplexity", peers, student).perplexity
    del decoder
    gc.collect()  # Flax's modules are in cycles: their memory is given back when garbage is looked for
    if found is None or not math.isfinite(found):
        return TeacherFigure(None, "its loss on the held-out rows is not finite")
    return TeacherFigure(found)


def judged(found: Evaluation, start: Evaluation | None, teacher: TeacherFigure) -> Evaluation:
    """The evaluation with the teacher's figure beside it, and the share of the gap that is closed since `start`.

    A figure that the evaluation has itself, from the teacher's recorded last stream, stays.
    """
    begin = found.perplexity if start is None else start.perplexity
    if found.teacher_perplexity is not None:
        teacher = TeacherFigure(found.teacher_perplexity)
    return found.model_copy(
        update={
            "teacher_perplexity": teacher.perplexity,
            "teacher_unknown": teacher.unknown,
            "gap_closed": None if start is None else gap_closed(teacher.perplexity, begin, found.perplexity),
        }
    )


def told_gap(start: Evaluation, now: Evaluation) -> str:
    """Say in a line how a student's perplexity stands between its start and its teacher's."""
    if now.perplexity is None:
        return f"held-out perplexity {told_perplexity(None)}"
    figures = f"start {told_perplexity(start.perplexity)}, now {told_perplexity(now.perplexity)}"
    if now.teacher_perplexity is None:
        return f"held-out perplexity: {figures}; the teacher's is not known: {now.teacher_unknown or 'not measured'}"
    gap = "no gap to close" if now.gap_closed is None else f"{now.gap_closed:.1%} of the gap closed"
    return f"held-out perplexity: teacher {told_perplexity(now.teacher_perplexity)}, {figures}: {gap}"


def _opened(sources: Sources) -> tuple[Decoder | None, str | None]:
    """The teacher, or why there is none."""
    if (found := sources.looping_teacher) is not None:
        return found, None
    try:
        path, plan = sources.find_teacher(), sources.rows.plan
        unknown = _too_large(path, plan.numerics.dtype)
        return (None, unknown) if unknown else (load_recorded(path, plan), None)
    except DistillcacheError as error:
        return None, error.what


def _too_large(path: str, dtype: str) -> str | None:
    """Why a teacher would not fit on this process's first device beside what is there; None where it would."""
    model = read_config(path)
    leaves = jax.tree.leaves(nnx.state(nnx.eval_shape(lambda: Decoder(model))))
    needed = sum(leaf.size for leaf in leaves) * jnp.dtype(dtype).itemsize
    free = _free_bytes()
    if free is None or ROOM * needed <= free:
        return None
    return f"its {needed / GB:,.1f} GB of weights do not fit on a device beside the rest, {free / GB:,.1f} GB are free"


def _free_bytes() -> int | None:
    """Free memory of the first device, or of the host where that is the device; None if unknown."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    facts = Path("/proc/meminfo")
    if device.platform != "cpu" or not facts.exists():
        return None
    lines = dict(line.split(":", 1) for line in facts.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) << 10 if "MemAvailable" in lines else None
