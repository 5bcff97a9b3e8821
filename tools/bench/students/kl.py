"""Half of a teacher's blocks, trained with three losses on tokens: cross-entropy, KL to its top k, KL to all of it.

The demo's teacher and text; the same dropped blocks, rows, steps and learning rates: blockwise first, then feature mode
with one of the losses alone. Each with as many seeds as there are rounds. Perplexity, KL over the whole vocabulary and
agreement of first choices are on held-out rows; `_low` and `_high` are the least and the largest over the seeds.

    <loss>_perplexity, <loss>_kl, <loss>_agreement   means over the seeds, after the last step
    head_kl_over_topk_kl                             their KLs, seed by seed, the median
"""

import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillcache.cache_builder.build import build_cache
from distillcache.schemas.config import BenchConfig, TapsConfig, TrainConfig
from distillcache.schemas.config.student import SurgeryOp
from distillcache.tools.bench.figures import Goal, Measured, plot_path, scratch_folder
from distillcache.tools.bench.students.curves import DRAWN, FIGURES, draw_range, label_panels, over_seeds
from distillcache.tools.bench.students.jobs import DROPPED
from distillcache.tools.bench.students.room import OF_ALL_WEIGHTS, check_room
from distillcache.tools.demo.command import build_config, sized_text, train_config
from distillcache.tools.demo.teacher import fetch_teacher
from distillcache.tools.pages.pictures import write_figure
from distillcache.trainer.run.evaluate import Evaluation
from distillcache.trainer.run.folder import read_evaluations
from distillcache.trainer.train import train

LOSSES: dict[str, dict[str, Any]] = {
    "ce": {"alpha": 0.0},
    "topk": {"alpha": 1.0, "kl": {"targets": "topk"}},
    "head": {"alpha": 1.0, "kl": {"targets": "head"}},
}
LABELS = {"ce": "cross-entropy", "topk": "KL to the top 64", "head": "KL to the whole distribution"}
COLOURS = {"ce": "#444444", "topk": "#c44e52", "head": "#4c72b0"}
SEEDS = 3
Found = Mapping[str, Sequence[Sequence[Evaluation]]]  # loss -> seed -> evaluations by step


@dataclass(frozen=True)
class KlSizes:
    """The sizes of the runs. eval_every: steps between points of the picture."""

    row_tokens: int = 128
    rows: int = 480
    eval_rows: int = 48
    batch_rows: int = 4
    blockwise_steps: int = 10
    steps: int = 40
    eval_every: int = 20
    blockwise_rate: float = 3e-3
    rate: float = 3e-4
    dropped: tuple[int, ...] = DROPPED


def measure(config: BenchConfig) -> Measured:
    """All figures of `bench kl`."""
    plot = plot_path(config)
    with scratch_folder(config.dir) as folder:
        found = train_all(folder, str(fetch_teacher()), KlSizes(), config.rounds or SEEDS)
    if plot is not None:
        write_plot(found, plot)
    return summarise(found)


def train_all(folder: Path, teacher: str, sizes: KlSizes, seeds: int) -> dict[str, list[list[Evaluation]]]:
    """Train every student; the losses take turns, so that a bench that is stopped has all of them of some seeds."""
    data = sized_text(folder, sizes.row_tokens, sizes.rows, sizes.eval_rows)
    taps = TapsConfig.model_validate({"resid": {"head": True}, "topk_logits": {"k": 64}})
    build = build_config(folder / "cache", teacher, data, sizes.batch_rows, taps)
    check_room(folder, teacher, [build], sizes.row_tokens * sizes.rows, OF_ALL_WEIGHTS)
    build_cache(build)
    found: dict[str, list[list[Evaluation]]] = {name: [] for name in LOSSES}
    for seed in range(seeds):
        for name in LOSSES:
            run = folder / f"{name}-{seed}"
            train(_run_config(run, folder / "cache", name, sizes, seed))
            found[name].append(read_evaluations(str(run)))
            shutil.rmtree(run)  # its checkpoints are as large as the cache
            end = found[name][-1][-1]
            print(f"bench: seed {seed}, {name}: perplexity {end.perplexity:.4g}, KL {end.kl:.4g}", file=sys.stderr)
    return found


def _run_config(run: Path, cache: Path, loss: str, sizes: KlSizes, seed: int) -> TrainConfig:
    cut = [SurgeryOp(op="drop_blocks", blocks=list(sizes.dropped))]
    base = train_config(run, str(cache), cut, sizes.steps, sizes.batch_rows)
    stages = [
        {"mode": "blockwise", "steps": sizes.blockwise_steps, "optimizer": {"learning_rate": sizes.blockwise_rate}},
        {
            "mode": "feature",
            "steps": sizes.steps,
            "optimizer": {"learning_rate": sizes.rate},
            "loss": {**LOSSES[loss], "feature": {"weight": 0.0}},
        },
    ]
    values = base.model_dump(exclude_unset=True) | {"stages": stages, "seed": seed, "eval_every": sizes.eval_every}
    rest = {"checkpoint_every": sizes.steps + sizes.blockwise_steps, "remat": "none"}  # a few rows at a time: faster
    return TrainConfig.model_validate(values | rest)


def summarise(found: Found) -> Measured:
    """Figures and goals of the ends of all runs."""
    figures: dict[str, float] = {"teacher_perplexity": found["ce"][0][-1].teacher_perplexity or 0.0}
    figures["cut_perplexity"] = found["ce"][0][0].perplexity or 0.0
    for name, runs in found.items():
        for figure in FIGURES:
            figures |= over_seeds(f"{name}_{figure}", [getattr(run[-1], figure) for run in runs])
    pairs = zip(found["head"], found["topk"], strict=True)
    ratio = statistics.median((head[-1].kl or 0.0) / (topk[-1].kl or 1.0) for head, topk in pairs)
    return Measured(figures, [Goal("head_kl_over_topk_kl", ratio, 1.0, "at_most")])


def write_plot(found: Found, path: Path) -> None:
    """Perplexity and KL by step: the mean over the seeds, and the range."""
    from matplotlib.figure import Figure

    figure = Figure((9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for name, runs in found.items():
        steps = [entry.step for entry in runs[0] if entry.step]
        for panel, what in zip(axes, DRAWN, strict=True):
            values = [[getattr(entry, what) for entry in run if entry.step] for run in runs]
            draw_range(panel, steps, values, COLOURS[name], label=LABELS[name])
    teacher = found["ce"][0][-1].teacher_perplexity
    if teacher is not None:
        axes[0].axhline(teacher, color="#888888", ls=":", label="teacher")
    label_panels(axes, "step")
    axes[0].legend(frameon=False)
    write_figure(figure, path)
