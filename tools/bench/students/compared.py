"""Figures of compared recipes: quality over the seeds, costs, and when one is as good as another.

A cost is that of the steps, and the share of the build that one of several students pays: in seconds, which depend on
the machine and on what else it does, and in TFLOPs of products, which do not.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from distillcache.tools.bench.figures import Goal, Measured
from distillcache.tools.bench.students.curves import DRAWN, FIGURES, over_seeds
from distillcache.tools.bench.students.jobs import CODECS, OFFLINE, ONLINE_KL, WAYS

SHARED_BY = {"first": 1, "third": 3, "tenth": 10}
AT_MOST = {"first": 1.1, "third": 0.5}
OTHER = "other"
Unit = Literal["seconds", "tflop"]
UNITS: tuple[Unit, ...] = get_args(Unit)


@dataclass(frozen=True)
class Point:
    """A student after `step` steps. figures: perplexity, kl, agreement."""

    step: int
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Trained:
    """Results of one run. steps: unit -> the cost of every step, in order; other: figures on the other text."""

    points: Sequence[Point]
    steps: Mapping[Unit, Sequence[float]]
    other: Mapping[str, float]
    teacher: float


@dataclass(frozen=True)
class Compared:
    """All runs of a job: way -> seed -> run. builds: unit -> codec -> cost; stage_steps: way -> steps of its stages."""

    runs: Mapping[str, Sequence[Trained]]
    builds: Mapping[Unit, Mapping[str, float]]
    stage_steps: Mapping[str, Sequence[int]]

    def spent(self, way: str, step: int, unit: Unit = "seconds") -> float:
        """The cost of the first `step` steps: each stage's median step over steps and seeds."""
        total, first = 0.0, 0
        for steps in self.stage_steps[way]:
            costs = [cost for run in self.runs[way] for cost in run.steps[unit][first : first + steps]]
            total += min(max(step - first, 0), steps) * statistics.median(costs)
            first += steps
        return total

    def cost(self, way: str, step: int, students: int = SHARED_BY["third"], unit: Unit = "seconds") -> float:
        """The same with this student's share of the build of its cache."""
        codec = WAYS[way].codec
        return self.spent(way, step, unit) + (self.builds[unit][codec] / students if codec else 0.0)


def summarise(found: Compared) -> Measured:
    """Figures and goals of all runs."""
    (first, *_), *_ = found.runs.values()
    figures = {"teacher_perplexity": first.teacher, "cut_perplexity": first.points[0].figures["perplexity"]}
    figures[f"{OTHER}_teacher_perplexity"] = first.other["teacher_perplexity"]
    for name, runs in found.runs.items():
        for figure in FIGURES:
            figures |= over_seeds(f"{name}_{figure}", [run.points[-1].figures[figure] for run in runs])
            figures |= over_seeds(f"{name}_{OTHER}_{figure}", [run.other[figure] for run in runs])
        figures |= {f"{name}_{unit}": found.spent(name, first.points[-1].step, unit) for unit in UNITS}
    figures |= {f"{codec}_build_{unit}": cost for unit in UNITS for codec, cost in found.builds[unit].items()}
    figures |= _in_time(found)
    ratios = {name: value for unit in UNITS for name, value in _cost_ratios(found, unit).items()}
    goals = [Goal(name, ratios.pop(name), most, "at_most") for name, most in _goals() if name in ratios]
    return Measured(figures | ratios, goals, _table(found, figures | ratios), {"runs": _curves(found)})


def _goals() -> list[tuple[str, float]]:
    return [
        (f"{codec}_{students}_{unit}", most) for codec in CODECS for students, most in AT_MOST.items() for unit in UNITS
    ]


def _in_time(found: Compared) -> dict[str, float]:
    """The means over the seeds in the time of the cheapest way, its share of a build for three students included."""
    last = {name: runs[0].points[-1].step for name, runs in found.runs.items()}
    budget = min(found.cost(name, step) for name, step in last.items())
    figures = {"seconds_in_time": budget}
    for name, runs in found.runs.items():
        at = [found.cost(name, point.step) for point in runs[0].points]
        for figure in DRAWN:
            curves = [[point.figures[figure] for point in run.points] for run in runs]
            figures[f"{name}_{figure}_in_time"] = statistics.mean(value_at(at, curve, budget) for curve in curves)
    return figures


def value_at(places: Sequence[float], values: Sequence[float], place: float) -> float:
    """The value at a place between points, straight in its logarithm; before the first point the first value."""
    for (a, b), (low, high) in zip(_pairs(places), _pairs(values), strict=True):
        if a <= place <= b:
            share = (place - a) / (b - a)
            return math.exp((1 - share) * math.log(low) + share * math.log(high))
    return values[0] if place < places[0] else values[-1]


def place_of(places: Sequence[float], values: Sequence[float], value: float) -> float | None:
    """The first place at which a falling curve has reached a value; None where it never does."""
    for (a, b), (low, high) in zip(_pairs(places), _pairs(values), strict=True):
        if high <= value < low:
            return a + (b - a) * (math.log(low) - math.log(value)) / (math.log(low) - math.log(high))
    return places[0] if values[0] <= value else None


def _pairs(values: Sequence[float]) -> list[tuple[float, float]]:
    return list(itertools.pairwise(values))


def _cost_ratios(found: Compared, unit: Unit) -> dict[str, float]:
    """Return the offline recipe's ratios by codec and number of students: medians over the seeds.

    Left out where a seed never has the perplexity of the run with the teacher in the loop.
    """
    ratios: dict[str, float] = {}
    if ONLINE_KL not in found.runs:
        return ratios
    online = found.runs[ONLINE_KL]
    whole = found.spent(ONLINE_KL, online[0].points[-1].step, unit)
    for codec in CODECS:
        for students, number in SHARED_BY.items():
            each = [
                _cost_to(found, f"{OFFLINE}_{codec}", run, other.points[-1].figures["perplexity"], number, unit)
                for run, other in zip(found.runs.get(f"{OFFLINE}_{codec}", ()), online, strict=False)
            ]
            reached = [cost / whole for cost in each if cost is not None]
            if each and len(reached) == len(each):
                ratios[f"{codec}_{students}_{unit}"] = statistics.median(reached)
    return ratios


def _cost_to(found: Compared, way: str, run: Trained, perplexity: float, students: int, unit: Unit) -> float | None:
    at = [found.cost(way, point.step, students, unit) for point in run.points]
    return place_of(at, [point.figures["perplexity"] for point in run.points], perplexity)


def _curves(found: Compared) -> dict[str, Any]:
    """Every run's evaluations, with the cost of the steps before each."""
    return {
        name: {
            **{unit: [found.spent(name, point.step, unit) for point in runs[0].points] for unit in UNITS},
            "seeds": [[{"step": point.step, **point.figures} for point in run.points] for run in runs],
        }
        for name, runs in found.runs.items()
    }


def _table(found: Compared, figures: Mapping[str, float]) -> list[list[str]]:
    """One row for each way, with the costs that one of three students pays."""
    quality = ["perplexity", "KL", "same first choice", "other text: perplexity", "KL"]
    costs = ["minutes", "+ 1/3 build", "TFLOP", "+ 1/3 build"]
    rows = [["way", *quality, *costs, "perplexity in equal time"]]
    for name, runs in found.runs.items():
        steps, codec = runs[0].points[-1].step, WAYS[name].codec
        rows.append(
            [
                WAYS[name].title,
                _range(figures, f"{name}_perplexity"),
                f"{figures[f'{name}_kl']:.3f}",
                f"{figures[f'{name}_agreement']:.1%}",
                f"{figures[f'{name}_{OTHER}_perplexity']:.4g}",
                f"{figures[f'{name}_{OTHER}_kl']:.3f}",
                f"{found.spent(name, steps) / 60:.2f}",
                "" if codec is None else f"{found.builds['seconds'][codec] / SHARED_BY['third'] / 60:.2f}",
                f"{found.spent(name, steps, 'tflop'):.1f}",
                "" if codec is None else f"{found.builds['tflop'][codec] / SHARED_BY['third']:.1f}",
                f"{figures[f'{name}_perplexity_in_time']:.4g}",
            ]
        )
    return rows


def _range(figures: Mapping[str, float], name: str) -> str:
    mean, low, high = (f"{figures[each]:.4g}" for each in (name, f"{name}_low", f"{name}_high"))
    return mean if low == high else f"{mean} ({low} to {high})"
