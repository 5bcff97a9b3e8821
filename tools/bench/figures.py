"""Results of a benchmark: figures, goals, and the scratch folder that it works in."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from distillcache.schemas.config import BenchConfig
from distillcache.schemas.store.path import local_path
from distillcache.schemas.store.whole_file import refuse_foreign_file
from distillcache.tools.pages.pictures import MARKS


@dataclass(frozen=True)
class Goal:
    """A figure's limit: `at_least` it, or `at_most`."""

    name: str
    value: float
    goal: float
    direction: Literal["at_least", "at_most"]

    @property
    def met(self) -> bool:
        return self.value >= self.goal if self.direction == "at_least" else self.value <= self.goal


@dataclass(frozen=True)
class Measured:
    """Results of one benchmark.

    table: rows of cells, the first of titles: printed in place of the figures. details: more for the JSON report.
    """

    figures: Mapping[str, float]
    goals: Sequence[Goal]
    table: Sequence[Sequence[str]] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


def plot_path(config: BenchConfig) -> Path | None:
    """Return the file of the picture, if one is asked for; it must be new or one of ours."""
    plot = None if config.plot is None else local_path(config.plot, "--plot")
    if plot is not None:
        refuse_foreign_file(plot, "--plot", *MARKS)
    return plot


@contextmanager
def scratch_folder(parent: str | None) -> Iterator[Path]:
    """A folder that is removed afterwards; in the system's own temporary folder if no parent is named."""
    where = None if parent is None else local_path(parent, "--dir")
    if where is not None:
        where.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="distillcache-bench-", dir=where) as folder:
        yield Path(folder)
