"""Figures of students over several seeds, and their curves."""

import statistics
from collections.abc import Sequence
from typing import Any

from distillcache.tools.pages.pictures import scale_by_ratios

FIGURES = ("perplexity", "kl", "agreement")  # of an evaluation
DRAWN = ("perplexity", "kl")  # one panel each
TITLES = ("held-out perplexity", "KL from the teacher, nats a token")


def over_seeds(name: str, values: Sequence[float]) -> dict[str, float]:
    """The mean over the seeds, and as `_low` and `_high` the least and the largest."""
    return {name: statistics.mean(values), f"{name}_low": min(values), f"{name}_high": max(values)}


def draw_range(panel: Any, at: Sequence[float], seeds: Sequence[Sequence[float]], colour: str, **line: Any) -> None:
    """Draw the mean over the seeds as a line, and their range behind it.

    Args:
        panel: axes of Matplotlib's.
        at: horizontal places, as many as each seed has values.
        line: more settings of the line.
    """
    columns = list(zip(*seeds, strict=True))
    panel.plot(at, list(map(statistics.mean, columns)), color=colour, **line)
    panel.fill_between(at, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.2, lw=0)


def label_panels(panels: Sequence[Any], across: str) -> None:
    """Give the panels of DRAWN their titles and scales. across: what their horizontal axes are."""
    for panel, title in zip(panels, TITLES, strict=True):
        panel.set(xlabel=across, title=title)
    scale_by_ratios(panels[0])
    panels[1].set_ylim(bottom=0)
