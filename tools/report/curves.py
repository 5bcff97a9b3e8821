"""A run's metrics as curves of a bounded number of points, and as matrices of blocks by steps."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float

from distillcache.tools.pages.figures import HeatMap, Line, draw_lines, draw_maps

BLOCKS_AS_LINES = 4
POINTS = 180  # of a curve: two for each point of a figure's width would not be told apart
OF_BLOCK = re.compile(r"block_(\d+)$")


@dataclass(frozen=True)
class Curve:
    """A metric by step, `[n]` each; of several neighbouring steps the mean, the least and the greatest."""

    step: Float[np.ndarray, " n"]
    mean: Float[np.ndarray, " n"]
    low: Float[np.ndarray, " n"]
    high: Float[np.ndarray, " n"]


@dataclass(frozen=True)
class BlockCurves:
    """values: of each block by step, means where steps were joined; NaN where a line had none."""

    blocks: tuple[int, ...]
    step: Float[np.ndarray, " n"]
    values: Float[np.ndarray, "L n"]


def series(lines: Iterable[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of a metric, where a line has it."""
    pairs = [(line["step"], line[name]) for line in lines if name in line]
    return np.asarray([step for step, _ in pairs], float), np.asarray([value for _, value in pairs], float)


def curve(lines: Sequence[Mapping[str, Any]], name: str) -> Curve | None:
    """A metric's curve; None where no line has it."""
    steps, values = series(lines, name)
    if not len(steps):
        return None
    parts = _parts(len(steps))
    return Curve(
        np.asarray([steps[part].mean() for part in parts]),
        np.asarray([values[part].mean() for part in parts]),
        np.asarray([values[part].min() for part in parts]),
        np.asarray([values[part].max() for part in parts]),
    )


def block_curves(lines: Sequence[Mapping[str, Any]], prefix: str) -> BlockCurves | None:
    """The metrics `<prefix>block_00`, `<prefix>block_01`, ...; None where there are none."""
    known = {
        int(found[1]): name
        for name in {name for line in lines for name in line if name.startswith(f"{prefix}block_")}
        if (found := OF_BLOCK.search(name))
    }
    if not known:
        return None
    blocks = tuple(sorted(known))
    having = [line for line in lines if any(known[block] in line for block in blocks)]
    values = np.asarray([[line.get(known[block], np.nan) for line in having] for block in blocks], float)
    steps = np.asarray([line["step"] for line in having], float)
    parts = _parts(len(steps))
    joined = np.stack([_mean_of_known(values[:, part]) for part in parts], axis=1)
    return BlockCurves(blocks, np.asarray([steps[part].mean() for part in parts]), joined)


def step_map(found: BlockCurves, unit: str, *, log: bool) -> HeatMap:
    """Blocks by steps."""
    left, right = float(found.step[0]), float(found.step[-1])
    half = max((right - left) / max(len(found.step) - 1, 1) / 2, 0.5)
    return HeatMap(
        found.values, "", "step", "block", unit, left=left - half, right=right + half, row_labels=found.blocks, log=log
    )


def block_picture(found: BlockCurves, y: str, *, log: bool = False) -> tuple[str, str]:
    """A drawing of blocks by steps, behind its kind in words: a line each of a few blocks, else a heat map."""
    if len(found.blocks) <= BLOCKS_AS_LINES:
        lines = [Line(f"block {b}", found.step, v) for b, v in zip(found.blocks, found.values, strict=True)]
        return "Line chart", draw_lines(lines, "step", y, linear=not log)
    return "Heat map", draw_maps([step_map(found, y, log=log)], 2.6)


def _parts(count: int) -> list[slice]:
    """At most `POINTS` runs of neighbours that cover so many places."""
    edges = np.unique(np.linspace(0, count, min(count, POINTS) + 1).round().astype(int))
    return [slice(int(start), int(stop)) for start, stop in pairwise(edges)]


def _mean_of_known(values: Float[np.ndarray, "L n"]) -> Float[np.ndarray, " L"]:
    known = np.isfinite(values)
    total = np.where(known, values, 0).sum(axis=1)
    return np.divide(total, known.sum(axis=1), out=np.full(len(values), np.nan), where=known.any(axis=1))
