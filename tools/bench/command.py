"""`distillcache bench feed|build|codec|student|kl|recipes|step|routing|load|accelerator`: against limits and peers.

    distillcache bench feed --json

A *figure* is a measured number, a *goal* a figure with a limit that it has to reach. What is compared is measured by
turns in one run, so that other work on the machine meets all of it alike.
"""

import importlib
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from types import ModuleType
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from distillcache.schemas import command_line
from distillcache.schemas.config import BenchConfig
from distillcache.tools.bench.figures import Goal, Measured, scratch_folder
from distillcache.tools.bench.machine import OtherWork, describe_machine

MODULES = {
    "feed": "tools.bench.feed",
    "build": "tools.bench.build",
    "student": "tools.bench.students.codecs",
    "kl": "tools.bench.students.kl",
    "recipes": "tools.bench.students.recipes",
    "step": "tools.bench.steps.step",
    "routing": "tools.bench.students.routing",
    "load": "tools.bench.load",
    "accelerator": "tools.bench.accelerator.sections",
}


CODEC_ROWS, CODEC_ROW_TOKENS = 8, 512  # real text, for which the codecs' goals are stated


BUSY_CORES = 0.25  # of other work: more than a quiet machine's


def run(argv: Sequence[str], command: str, as_json: bool) -> None:
    """Measure what the command line names, and print figures and goals."""
    config = command_line.parse(BenchConfig, argv, command, positional=("what",))
    others = OtherWork()
    measured = measure_codec(config) if config.what == "codec" else _module(config.what).measure(config)
    busy = others.cores()
    report = make_report(measured, busy)
    if busy is not None and busy > BUSY_CORES:
        print(f"bench: other work kept {busy:.1f} cores busy meanwhile; speeds suffer from it", file=sys.stderr)
    if as_json:
        print(json.dumps(report))
    else:
        _print(config.what, report, measured.table)


def measure_codec(config: BenchConfig) -> Measured:
    """All figures of `bench codec`."""
    from distillcache.models.checkpoint import load_pretrained
    from distillcache.tools.bench.build import reference_rows
    from distillcache.tools.bench.codec import check_goals, collect_taps, measure_codecs
    from distillcache.tools.bench.compress import ROWS, measure_compression
    from distillcache.tools.demo.teacher import fetch_teacher

    teacher = str(fetch_teacher())
    decoder = load_pretrained(teacher)
    with scratch_folder(config.dir) as folder:
        rows = reference_rows(folder, teacher, CODEC_ROW_TOKENS, CODEC_ROWS)
        taps = collect_taps(decoder, np.stack([row.tokens for row in rows.slice(0, CODEC_ROWS)]))
        figures = measure_compression({tap: values[:, :ROWS] for tap, values in taps.items()}, folder)
    figures |= measure_codecs(decoder, taps)
    goals = [Goal(found["name"], found["value"], found["goal"], "at_most") for found in check_goals(figures)]
    return Measured(figures, goals)


def make_report(measured: Measured, busy: float | None = None) -> dict[str, Any]:
    """The bench as plain values: machine, figures, goals. busy: cores that other work kept busy, where it is known."""
    return {
        "machine": describe_machine() | ({} if busy is None else {"other_work_cores": round(busy, 2)}),
        "figures": {name: float(f"{value:.6g}") for name, value in measured.figures.items()},
        "goals": [{**asdict(goal), "met": goal.met} for goal in measured.goals],
        **measured.details,
    }


def by_turns(paths: Mapping[str, Callable[[int], float]], rounds: int) -> dict[str, float]:
    """The median rate of every path.

    Args:
        paths: name -> `path(round)`, which does its work and returns a rate, such as rows a second.
        rounds: how often each is called, all of them in each round.
    """
    rates: dict[str, list[float]] = {name: [] for name in paths}
    for number in range(rounds):
        for name, path in paths.items():
            rates[name].append(path(number))
            print(f"bench: round {number + 1} of {rounds}, {name}", file=sys.stderr)
    return {name: statistics.median(found) for name, found in rates.items()}


def _module(what: str) -> ModuleType:
    return importlib.import_module(f"distillcache.{MODULES[what]}")


def _print(what: str, report: Mapping[str, Any], rows: Sequence[Sequence[str]]) -> None:
    """Print the report as a table. rows: of a table that stands in place of the figures."""
    console = Console()
    console.print("  ".join(f"{name} {value}" for name, value in report["machine"].items()), style="dim")
    goals = {goal["name"]: goal for goal in report["goals"]}
    title, figures = f"bench {what}", {} if rows else report["figures"]
    if rows:
        _print_rows(console, title, rows)
        title = "goals"
    if not (figures or goals):
        return
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("goal", justify="right")
    table.add_column("")
    for name, value in {**figures, **{name: goal["value"] for name, goal in goals.items()}}.items():
        goal = goals.get(name)
        sign = {"at_least": "≥", "at_most": "≤"}[goal["direction"]] if goal else ""
        limit = f"{sign} {goal['goal']:g}" if goal else ""
        verdict = "" if goal is None else "[green]met[/]" if goal["met"] else "[red]not met[/]"
        table.add_row(name, f"{value:,.4g}", limit, verdict)
    console.print(table)


def _print_rows(console: Console, title: str, rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)
