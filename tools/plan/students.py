"""Training hours for several students of one teacher: from a cache, and with the teacher in the loop.

    distillcache plan --simulate --plot docs/images/hours.svg

Every student sees the text once, on the same hosts, one student after the other. A training step takes three forward
passes' worth of FLOPs (forward, and twice that backward), at the MFU of the teacher. With the teacher in the loop its
forward pass is added for every student. From a cache the teacher runs once, and a student waits for whatever is
slower: its own FLOPs, or reading the cache.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distillcache.schemas.config.simulate import SimulateConfig
from distillcache.schemas.store.whole_file import make_folder_of, writing
from distillcache.tools.pages.pictures import METADATA
from distillcache.tools.plan.fleet import play
from distillcache.tools.plan.scale import Cache, host_rate, make_cache, make_fleet

STEP_FORWARDS = 3.0  # FLOPs of a training step, in forward passes of the same model
ONLINE = "teacher in the loop"
PLOTTED = {  # choice -> (color, marker)
    "attn_out, resid: bf16": ("#b3400f", "s"),
    "attn_out, resid: int8": ("#0b5cad", "o"),
}


def add_hours(config: SimulateConfig, report: Mapping[str, Any]) -> dict[str, Any]:
    """The report of `describe_scale` with the hours of students for each possible cache."""
    found = []
    for entry in report["caches"]:
        if "impossible" not in entry:
            cache = make_cache(config, entry["teacher"], entry["tokens"], entry["choice"])
            hours = {"online_h": online_hours(config, cache), "cached_h": cached_hours(config, cache)}
            entry = {**entry, "students": hours}
        found.append(entry)
    return {**report, "caches": found}


def cached_hours(config: SimulateConfig, cache: Cache) -> list[float]:
    """Hours of building this cache and training each number of students from it."""
    build_s = play(cache.work(), make_fleet(config, cache, config.students.hosts)).wall_s
    each_s = max(student_seconds(config, cache), read_seconds(config, cache))
    return [(build_s + count * each_s) / 3600 for count in config.students.counts]


def online_hours(config: SimulateConfig, cache: Cache) -> list[float]:
    """Hours of training each number of students with the teacher in the loop, which needs no cache."""
    each_s = teacher_seconds(config, cache) + student_seconds(config, cache)
    return [count * each_s / 3600 for count in config.students.counts]


def teacher_seconds(config: SimulateConfig, cache: Cache) -> float:
    """Seconds of the teacher's forward pass over the text."""
    rows = cache.plan.rows
    return rows.count * rows.row_tokens / (config.students.hosts * host_rate(config, cache))


def student_seconds(config: SimulateConfig, cache: Cache) -> float:
    """Seconds of a student's own FLOPs over the text."""
    return STEP_FORWARDS * config.students.size * teacher_seconds(config, cache)


def read_seconds(config: SimulateConfig, cache: Cache) -> float:
    """Seconds of reading the cache once."""
    gb_per_s = min(config.students.hosts * config.bucket.host_gb_s, config.bucket.egress_gb_s)
    return cache.plan.rows.count * cache.row_read_bytes / (gb_per_s * 1e9)


def write_plot(report: Mapping[str, Any], path: Path) -> None:
    """Plot hours by number of students for the first teacher and amount of text; .svg or .png, by the path."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    caches = plotted(report["caches"])
    first, counts = next(iter(caches.values())), report["assumed"]["students"]["counts"]
    make_folder_of(path)
    kind = path.name.rpartition(".")[2]  # also of a file that is called `.svg`
    with rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}):  # equal numbers give an equal file
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(counts, first["students"]["online_h"], label=ONLINE, color="#444b53", marker="D", linestyle="--")
        for choice, cache in caches.items():
            color, marker = PLOTTED[choice]
            axes.plot(counts, cache["students"]["cached_h"], label=f"cache, {choice}", color=color, marker=marker)
        axes.set_xlabel("students")
        axes.set_ylabel("hours, cache built and all students trained")
        axes.set_title(f"{first['teacher']}, {first['tokens'] / 1e9:g}B tokens", loc="left")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        with writing(path, says=True) as file:
            said = {"Description": json.dumps(figures(report))} if kind == "svg" else {}
            figure.savefig(file, dpi=110, format=kind, metadata=METADATA[kind] | said)


def figures(report: Mapping[str, Any]) -> dict[str, list[float]]:
    """The plotted hours, rounded, by line; an SVG file carries them as its description."""
    caches = plotted(report["caches"])
    lines = {choice: cache["students"]["cached_h"] for choice, cache in caches.items()}
    lines[ONLINE] = next(iter(caches.values()))["students"]["online_h"]
    return {name: [round(value, 2) for value in hours] for name, hours in lines.items()}


def plotted(caches: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The plotted caches of the first teacher and amount of text, by choice."""
    found = {
        cache["choice"]: cache
        for cache in caches
        if (cache["teacher"], cache["tokens"]) == (caches[0]["teacher"], caches[0]["tokens"]) and "students" in cache
    }
    return {choice: found[choice] for choice in PLOTTED if choice in found}
