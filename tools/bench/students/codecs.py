"""Effect of a codec on the result: the demo's student, recovered from a bf16, an int8 and an int4 cache.

The demo's own work: its teacher, text, cut, optimizer, steps and seed, three times in one run. Both taps are recorded
in the codec; int8 and int4 code `resid` as differences, with the default keyframes. Perplexities are on held-out rows.

    <codec>_perplexity        of the student that was trained from this cache
    <codec>_bytes_per_token   of this cache
    <codec>_worse_than_bf16   perplexity over the bf16 cache's, less one; below zero: better

One run has one seed, so differences far below the goals are chance. A cache is removed once its student is trained.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from distillcache.cache_builder.build import build_cache
from distillcache.models.checkpoint import read_config
from distillcache.schemas.cache.segment import open_cache
from distillcache.schemas.config import BenchConfig, BuildConfig, DemoConfig, TapsConfig
from distillcache.schemas.store.store import Store
from distillcache.tools.bench.figures import Goal, Measured, scratch_folder
from distillcache.tools.bench.students.room import OF_ATTENTION, check_room
from distillcache.tools.demo.command import (
    DEMO_ROWS,
    EVAL_ROWS,
    ROW_TOKENS,
    build_config,
    default_surgery,
    sized_text,
    train_config,
)
from distillcache.tools.demo.teacher import fetch_teacher
from distillcache.trainer.train import train

BASELINE = "bf16"
WORSE_AT_MOST = {"int8": 0.005, "int4": 0.04}


@dataclass(frozen=True)
class StudentSizes:
    """The demo's. eval_rows: at least 1. choices: name -> (codec, whether `resid` is delta-coded), bf16 among them."""

    row_tokens: int = ROW_TOKENS
    rows: int = DEMO_ROWS
    eval_rows: int = EVAL_ROWS
    steps: int = DemoConfig().steps
    batch_rows: int = DemoConfig().batch_rows
    choices: Mapping[str, tuple[str, bool]] = field(
        default_factory=lambda: {BASELINE: ("bf16", False), "int8": ("int8", True), "int4": ("int4", True)}
    )


@dataclass(frozen=True)
class Recovered:
    """Results from one cache. teacher, cut, recovered: perplexities on the held-out rows."""

    bytes_per_token: int
    teacher: float
    cut: float
    recovered: float


def measure(config: BenchConfig) -> Measured:
    """All figures of `bench student`."""
    with scratch_folder(config.dir) as folder:
        return measure_student(folder, str(fetch_teacher()), StudentSizes())


def measure_student(folder: Path, teacher: str, sizes: StudentSizes) -> Measured:
    """Measure with another teacher and other sizes.

    Raises:
        StorageError: the folder has too little room for the largest cache and a run.
    """
    builds = make_builds(folder, teacher, sizes)
    for build in builds.values():  # one cache is there at a time
        check_room(folder, teacher, [build], sizes.row_tokens * sizes.rows, OF_ATTENTION)
    found = {name: recover(build, folder / "run", sizes.steps) for name, build in builds.items()}
    base = found[BASELINE]
    figures: dict[str, float] = {"teacher_perplexity": base.teacher, "cut_perplexity": base.cut}
    for name, each in found.items():
        figures |= {f"{name}_perplexity": each.recovered, f"{name}_bytes_per_token": each.bytes_per_token}
    goals = [
        Goal(f"{name}_worse_than_{BASELINE}", found[name].recovered / base.recovered - 1, most, "at_most")
        for name, most in WORSE_AT_MOST.items()
        if name in found
    ]
    return Measured(figures, goals)


def make_builds(folder: Path, teacher: str, sizes: StudentSizes) -> dict[str, BuildConfig]:
    """Name -> the demo's build with these taps, of the same text, all in the same place: one is there at a time."""
    data = sized_text(folder, sizes.row_tokens, sizes.rows, sizes.eval_rows)
    return {
        name: build_config(folder / "cache", teacher, data, sizes.batch_rows, _both_taps(codec, delta))
        for name, (codec, delta) in sizes.choices.items()
    }


def _both_taps(codec: str, delta: bool) -> TapsConfig:
    return TapsConfig.model_validate({"attn_out": {"codec": codec}, "resid": {"codec": codec, "delta": delta}})


def recover(build: BuildConfig, run: Path, steps: int) -> Recovered:
    """Build the cache, train the demo's student from it, and remove both."""
    build_cache(build)
    teacher = build.teacher.path
    surgery = [default_surgery(read_config(teacher)).model_copy(update={"by": "index"})]  # the same from every cache
    result = train(train_config(run, build.cache, surgery, steps, build.batch_rows))
    assert result.before is not None
    assert result.after is not None
    perplexity, cut, recovered = result.after.teacher_perplexity, result.before.perplexity, result.after.perplexity
    assert perplexity is not None  # of plain text every token counts
    assert cut is not None
    assert recovered is not None
    bytes_per_token = open_cache(Store(build.cache))[0].plan.bytes_per_token
    for folder in (Path(build.cache), run):
        shutil.rmtree(folder)
    return Recovered(bytes_per_token=bytes_per_token, teacher=perplexity, cut=cut, recovered=recovered)
