"""Recipes for a job, compared by tokens and by time: from a cache, and with the teacher in the loop.

SmolLM2-135M and the demo's text. Every way of `jobs.WAYS` trains the same student on the same rows, each read once;
with as many seeds as there are rounds. Figures are on held-out rows of the same text, and on docstrings of Python's
standard library (`other`): perplexity, KL over the whole vocabulary from the teacher in nats a token, agreement of
first choices. `_low` and `_high` are the least and the largest over the seeds.

    <way>_perplexity, _kl, _agreement, _other_...   after the last step, all with the same tokens
    <way>_seconds, _tflop          of all steps: each stage's median over steps and seeds, without evaluations
    <codec>_build_seconds, _tflop  of recording the rows, in time the teacher's compilation included
    <way>_perplexity_in_time, ...  in the time of the cheapest way, with a third of the build
    <codec>_first_seconds, _tflop  the cost until the offline recipe has the perplexity at which `online_kl` ends, over
                                   the cost of that; likewise _third and _tenth: of a build that so many students share
"""

import ast
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax import nnx

from distillcache.cache_builder.build import build_cache
from distillcache.models.checkpoint import read_config
from distillcache.models.decoder import abstract_decoder
from distillcache.schemas.config import BenchConfig, DataConfig, TapsConfig, TrainConfig
from distillcache.schemas.store.whole_file import write_file
from distillcache.tools.bench.figures import Measured, plot_path, scratch_folder
from distillcache.tools.bench.students.compared import OTHER, Compared, Point, Trained, Unit, summarise
from distillcache.tools.bench.students.curves import DRAWN, FIGURES, draw_range, label_panels
from distillcache.tools.bench.students.jobs import CODECS, JOBS, WAYS, Job, Way, stages
from distillcache.tools.bench.students.room import OF_ALL_WEIGHTS, check_room
from distillcache.tools.demo.command import build_config, sized_text
from distillcache.tools.demo.teacher import fetch_teacher
from distillcache.tools.pages.pictures import write_figure
from distillcache.trainer.feed.open import Sources
from distillcache.trainer.run.checkpoints import load_student
from distillcache.trainer.run.exact import Exact, ExactFigures, exact_figures
from distillcache.trainer.run.folder import read_evaluations
from distillcache.trainer.run.metrics_log import read_metrics
from distillcache.trainer.step.flops import step_flops
from distillcache.trainer.train import train

SEEDS = 3
STEP_TIME, STEP_SPEED = "perf/step_time_seconds", "perf/tflops_per_second"
DEFAULT_JOB = "half-blocks"


@dataclass(frozen=True)
class RecipeSizes:
    """Sizes of the runs. points: evaluations of a run. text: to train on; None: the demo's."""

    row_tokens: int = 128
    eval_rows: int = 32
    batch_rows: int = 4
    steps: int = 48
    points: int = 6
    ways: tuple[str, ...] = tuple(WAYS)
    text: str | None = None
    first_seed: int = 0

    @property
    def rows(self) -> int:
        """Rows of the text: every step's, once, and the held-out ones."""
        return self.steps * self.batch_rows + self.eval_rows


def measure(config: BenchConfig) -> Measured:
    """All figures of `bench recipes`."""
    plot = plot_path(config)
    with scratch_folder(config.dir) as folder:
        job = JOBS[config.job or DEFAULT_JOB]
        sizes = RecipeSizes(ways=tuple(config.ways or WAYS), text=config.text, first_seed=config.seed)
        found = train_all(folder, str(fetch_teacher()), job, sizes, config.rounds or SEEDS)
    if plot is not None:
        write_plot(found, job, plot)
    return summarise(found)


def train_all(folder: Path, teacher: str, job: Job, sizes: RecipeSizes, seeds: int) -> Compared:
    """Train every student; ways take turns, so that other work on the machine meets all of them alike."""
    ways = {name: WAYS[name] for name in sizes.ways}
    seconds = build_caches(folder, teacher, sizes, [way.codec or CODECS[0] for way in ways.values()])
    other, work = _build_other(folder, teacher, sizes), teacher_work(teacher, sizes)
    builds: dict[Unit, dict[str, float]] = {"seconds": seconds, "tflop": dict.fromkeys(seconds, work.build)}
    runs: dict[str, list[Trained]] = {name: [] for name in ways}
    for seed in range(sizes.first_seed, sizes.first_seed + seeds):
        for name in ways:
            runs[name].append(_train_one(folder, name, job, sizes, seed, other, work))
            end = runs[name][-1].points[-1].figures
            print(
                f"bench: seed {seed}, {name}: perplexity {end['perplexity']:.4g}, KL {end['kl']:.4g}", file=sys.stderr
            )
    steps = {name: [stage["steps"] for stage in stages(job, way, sizes.steps)] for name, way in ways.items()}
    return Compared(runs, builds, steps)


@dataclass(frozen=True)
class TeacherWork:
    """TFLOPs of the teacher's products.

    build: of recording all rows. step: of a batch's blocks; head: of a batch's logits.
    """

    build: float
    step: float
    head: float


def teacher_work(teacher: str, sizes: RecipeSizes) -> TeacherWork:
    """The teacher's forward passes, a third of what a training step of all its parameters takes."""
    config = read_config(teacher)
    shapes = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(abstract_decoder(config)[1])}
    blocks = {name: leaf for name, leaf in shapes.items() if name.startswith("groups/")}

    def forward(parameters: dict[str, Any], rows: int) -> float:
        return step_flops(config, parameters, rows * sizes.row_tokens, sizes.row_tokens) / 3 / 1e12

    step = forward(blocks, sizes.batch_rows)
    return TeacherWork(forward(blocks, sizes.rows), step, forward(shapes, sizes.batch_rows) - step)


def step_tflop(way: Way, mode: str, student: float, work: TeacherWork) -> float:
    """TFLOPs of a step: the student's, and what its losses need of the teacher."""
    compares_all = mode == "feature" and way.token_loss is not None and "kl" in way.token_loss
    return student + (work.step if way.online else 0.0) + (work.head if compares_all else 0.0)


def build_caches(folder: Path, teacher: str, sizes: RecipeSizes, codecs: Sequence[str]) -> dict[str, float]:
    """A cache for each codec, of the same rows; the seconds that each took."""
    data, seconds = sized_text(folder, sizes.row_tokens, sizes.rows, sizes.eval_rows), {}
    if sizes.text is not None:
        data = data.model_copy(update={"path": sizes.text})
    builds = {}
    for codec in dict.fromkeys(codecs):
        delta = codec != "bf16"
        taps = {"attn_out": {"codec": codec}, "resid": {"codec": codec, "delta": delta, "head": True}}
        builds[codec] = build_config(folder / codec, teacher, data, sizes.batch_rows, TapsConfig.model_validate(taps))
    check_room(folder, teacher, builds.values(), sizes.row_tokens * sizes.rows, OF_ALL_WEIGHTS)
    for codec, build in builds.items():
        start = time.monotonic()
        build_cache(build)
        seconds[codec] = time.monotonic() - start
    return seconds


def _build_other(folder: Path, teacher: str, sizes: RecipeSizes) -> Sources:
    """Held-out rows of another text, with what exact figures need; they are opened once for all students."""
    (folder / "docstrings").mkdir()
    lines = [json.dumps({"text": text}) for text in docstrings()]
    write_file(folder / "docstrings" / "docstrings.jsonl", ("\n".join(lines) + "\n").encode())
    data = DataConfig(
        path=str(folder / "docstrings"),
        row_tokens=sizes.row_tokens,
        eval_rows=sizes.eval_rows,
        max_rows=sizes.eval_rows + 1,  # a cache has a row to train on
    )
    taps = TapsConfig.model_validate({"attn_out": None, "resid": {"slots": ["last"], "head": True}})
    build_cache(build_config(folder / OTHER, teacher, data, sizes.batch_rows, taps))
    return Sources(TrainConfig(run=str(folder / "none"), cache=str(folder / OTHER)))


def docstrings() -> Iterator[str]:
    """Long docstrings of Python's standard library, by file and line: English of another kind than the demo's."""
    for file in sorted(Path(ast.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text is not None and len(text) > 300:
                    yield text


def run_config(folder: Path, name: str, job: Job, way: Way, sizes: RecipeSizes, seed: int) -> TrainConfig:
    """The config of one run."""
    values: dict[str, Any] = {
        "run": str(folder / f"{name}-{seed}"),
        "cache": str(folder / (way.codec or CODECS[0])),
        "source": "online" if way.online else "cache",
        "student": dict(job.student),
        "stages": stages(job, way, sizes.steps),
        "steps": sizes.steps,
        "batch_rows": sizes.batch_rows,
        "eval_every": sizes.steps // sizes.points,
        "checkpoint_every": sizes.steps,
        "keep_checkpoints": 1,
        "seed": seed,
        **job.settings,
    }
    if way.token_loss is not None:
        values["remat"] = "none"  # a few rows at a time: faster
    return TrainConfig.model_validate(values)


def _train_one(
    folder: Path, name: str, job: Job, sizes: RecipeSizes, seed: int, other: Sources, work: TeacherWork
) -> Trained:
    way = WAYS[name]
    config = run_config(folder, name, job, way, sizes, seed)
    train(config)
    lines = {line["step"]: line for line in read_metrics(config.run) if STEP_TIME in line}
    modes = [stage["mode"] for stage in stages(job, way, sizes.steps) for _ in range(stage["steps"])]
    costs: dict[Unit, list[float]] = {
        "seconds": [lines[step][STEP_TIME] for step in sorted(lines)],
        "tflop": [
            step_tflop(way, mode, lines[step][STEP_SPEED] * lines[step][STEP_TIME], work)
            for step, mode in zip(sorted(lines), modes, strict=True)
        ],
    }
    evaluations = read_evaluations(config.run)
    points = [Point(each.step, {figure: getattr(each, figure) for figure in FIGURES}) for each in evaluations]
    decoder = load_student(config.run, config.steps).decoder
    found = exact_figures(decoder, Exact.of(other, decoder.config), config.eval_batch_rows)
    shutil.rmtree(config.run)  # its checkpoints are as large as a cache
    teacher = evaluations[-1].teacher_perplexity
    assert teacher is not None  # of plain text every token counts
    return Trained(points, costs, _of_other(found), teacher)


def _of_other(found: ExactFigures) -> dict[str, float]:
    values = {
        "perplexity": found.whole.perplexity,
        "kl": found.kl,
        "agreement": found.agreement,
        "teacher_perplexity": found.teacher_perplexity,
    }
    return {name: value for name, value in values.items() if value is not None}


def write_plot(found: Compared, job: Job, path: Path) -> None:
    """Perplexity and KL by TFLOPs, with a third of the build: the mean over the seeds, and the range."""
    from matplotlib.figure import Figure

    figure = Figure((10, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    shown = [name for name in found.runs if WAYS[name].codec in (None, "int8")]
    for name in shown:
        runs = found.runs[name]
        steps = [point.step for point in runs[0].points if point.step]
        at = [found.cost(name, step, unit="tflop") for step in steps]
        for panel, what in zip(axes, DRAWN, strict=True):
            values = [[point.figures[what] for point in run.points if point.step] for run in runs]
            draw_range(panel, at, values, WAYS[name].colour, marker="o", ms=3, label=WAYS[name].title)
    first = found.runs[shown[0]][0]
    axes[0].axhline(first.teacher, color="#888888", ls=":", label="teacher")
    axes[0].axhline(first.points[0].figures["perplexity"], color="#888888", ls="--", label="after the cut")
    label_panels(axes, "TFLOP, a third of the build included")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(job.title)
    write_figure(figure, path)
