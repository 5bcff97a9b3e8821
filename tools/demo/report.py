"""The demo's report: figures as plain values, as tables for people, and as a picture."""

import shlex
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from distillcache.schemas.cache.segment import open_cache
from distillcache.schemas.config.train import SurgeryOp
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import InputError
from distillcache.schemas.store.store import Store
from distillcache.schemas.store.whole_file import writing
from distillcache.tools.pages.pictures import scale_by_ratios
from distillcache.tools.pages.terminal import table_console
from distillcache.trainer.run.evaluate import told_perplexity
from distillcache.trainer.run.folder import read_evaluations
from distillcache.trainer.train import TrainResult, divergence_summary

CHART = "recovery.png"
TEACHER_COLOR, CUT_COLOR, RECOVERED_COLOR = "#444444", "#c44e52", "#4c72b0"


def make_report(
    out: Path,
    teacher: str,
    surgery: list[SurgeryOp],
    result: TrainResult,
    seconds: dict[str, float],
    peak_anon_gb: float,
) -> dict[str, Any]:
    """Everything that the demo measured, ready for JSON. Perplexities and distances are on held-out rows."""
    if result.before is None or result.after is None:
        raise InputError("the demo needs held-out rows", {"data.eval_rows": 0}, "set --data.eval-rows 64")
    plan = open_cache(Store(str(out / "cache")))[0].plan
    of_teacher, cut, recovered = result.after.teacher_perplexity, result.before.perplexity, result.after.perplexity
    build_s = seconds["build"]
    curve = [(entry.step, entry.perplexity) for entry in read_evaluations(out / "run")]
    return {
        "teacher": teacher,
        "surgery": [op.model_dump() for op in surgery],
        "perplexity": {"teacher": of_teacher, "cut": cut, "recovered": recovered},
        "curve": {"step": [step for step, _ in curve], "perplexity": [perplexity for _, perplexity in curve]},
        "gap_closed": result.after.gap_closed,
        "cosine_distance": {
            "block": list(result.after.blocks),
            "cut": list(result.before.cosine),
            "recovered": list(result.after.cosine),
        },
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
        "peak_anon_gb": round(peak_anon_gb, 2),
        "tokens_per_s": {
            "build": plan.rows.count * plan.rows.row_tokens / build_s,
            "train": result.tokens_per_s,
        },
        "rows": {"train": plan.rows.count - len(plan.rows.eval_indices), "eval": len(plan.rows.eval_indices)},
        "steps": result.steps,
        **divergence_summary(result.diverged),
        "bytes_per_token": plan.bytes_per_token,
        "cache_gb": round(plan.bytes_per_row * plan.rows.count / 1e9, 6),
        "cache": str(out / "cache"),
        "run": str(out / "run"),
        "chart": str(out / "run" / CHART),
    }


def print_report(report: dict[str, Any]) -> None:
    """Tables on standard output."""
    console = table_console(markup=False)  # paths and commands may hold brackets
    console.print()
    console.print(_perplexity_table(report))
    console.print()
    console.print(_block_table(report))
    console.print()
    console.print(_facts(report))
    console.print()
    console.print("What to try next:")
    for line in _next_steps(report):
        console.print(f"  {line}", soft_wrap=True, highlight=False)


def _perplexity_table(report: dict[str, Any]) -> Table:
    perplexity, rows = report["perplexity"], report["rows"]
    table = Table(title=f"Perplexity on {rows['eval']} held-out rows", box=None, title_justify="left")
    table.add_column("model")
    table.add_column("perplexity", justify="right")
    for label, name in (("teacher", "teacher"), ("student, cut", "cut"), ("student, recovered", "recovered")):
        table.add_row(label, told_perplexity(perplexity[name], ".1f"))
    if perplexity["recovered"] is not None:
        gap = report["gap_closed"]
        table.add_row("gap closed", "none to close" if gap is None else f"{gap:.1%}")
    return table


def _block_table(report: dict[str, Any]) -> Table:
    """Three blocks a line, so that thirty blocks fit on a screen."""
    distance = report["cosine_distance"]
    cells = [
        (str(block), f"{before:.4f}", f"{after:.4f}")
        for block, before, after in zip(distance["block"], distance["cut"], distance["recovered"], strict=True)
    ]
    table = Table(title="Cosine distance of attention outputs to the teacher's", box=None, title_justify="left")
    for _ in range(3):
        for name in ("block", "cut", "recovered"):
            table.add_column(name, justify="right")
    lines = -(-len(cells) // 3)
    for line in range(lines):
        table.add_row(*(text for place in range(line, len(cells), lines) for text in cells[place]))
    mean = [statistics.fmean(distance[name]) for name in ("cut", "recovered")]
    table.add_row("mean", f"{mean[0]:.4f}", f"{mean[1]:.4f}")
    return table


def _facts(report: dict[str, Any]) -> Table:
    seconds, rates = report["seconds"], report["tokens_per_s"]
    stages = ", ".join(f"{name.replace('_', ' ')} {value:.0f} s" for name, value in seconds.items() if name != "total")
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("teacher", report["teacher"])
    table.add_row("time", f"{seconds['total']:.0f} s: {stages}")
    table.add_row("build", f"{rates['build']:,.0f} tokens/s, including compilation")
    table.add_row("train", f"{rates['train']:,.0f} tokens/s in the median step")
    table.add_row("memory", f"{report['peak_anon_gb']:.2f} GB at most")
    size = f"{report['cache_gb']:.3g} GB, {report['bytes_per_token']:,} bytes a token"
    table.add_row("cache", f"{report['cache']}, {size}")
    table.add_row(
        "run", f"{report['run']}, {counted(report['steps'], 'step')}; with report.json and {Path(report['chart']).name}"
    )
    return table


def _next_steps(report: dict[str, Any]) -> list[str]:
    cache, run, again = map(shlex.quote, (report["cache"], report["run"], report["run"].rstrip("/") + "2"))
    return [
        *([] if shutil.which("distillcache") else [f". {_activate()}   # puts distillcache on the PATH"]),
        f"distillcache report {run}   # writes an HTML page",
        f"distillcache report {cache}",
        f"distillcache serve {cache}   # shows it in the browser; pip install -e '.[serve]' first",
        f"distillcache inspect {cache}",
        f"distillcache export {run} exports/demo   # an HF directory",
        f"distillcache train --cache {cache} --run {again} --steps 200 --student.surgery '[{{op: kv_heads, to: 2}}]'",
    ]


def _activate() -> str:
    """The script that puts this environment's commands on the PATH, as short as it can be named from here."""
    script = Path(sys.prefix) / "bin" / "activate"
    return str(script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script)


def write_chart(report: dict[str, Any], path: Path) -> None:
    """The recovery as a PNG: perplexity between the teacher's and the cut student's by step, and distance by block.

    Logarithmic, since before and after are far apart. A perplexity that is undefined leaves the blocks alone.
    """
    from matplotlib.figure import Figure

    has_curve = len(report["curve"]["step"]) > 1 and None not in report["curve"]["perplexity"]
    figure = Figure(figsize=(13 if has_curve else 7, 4.5), layout="constrained")
    panels = figure.subplots(1, 2 if has_curve else 1, squeeze=False)[0]
    if has_curve:
        _draw_curve(panels[0], report)
    _draw_blocks(panels[-1], report)
    with writing(path) as file:
        figure.savefig(file, dpi=150, format="png")


def _draw_curve(axes: Any, report: dict[str, Any]) -> None:
    """Perplexity by step, beside what it came from and what it can reach."""
    curve, perplexity, gap = report["curve"], report["perplexity"], report["gap_closed"]
    axes.plot(curve["step"], curve["perplexity"], color=RECOVERED_COLOR, marker="s", markersize=4, label="student")
    levels = (("cut", "student, cut", CUT_COLOR, "--"), ("teacher", "teacher", TEACHER_COLOR, ":"))
    for name, words, color, dashes in levels:
        if perplexity[name] is not None:
            label = f"{words}: {perplexity[name]:.1f}"
            axes.axhline(perplexity[name], color=color, linestyle=dashes, label=label)
    scale_by_ratios(axes)
    axes.set_xlabel("step")
    axes.set_ylabel("perplexity")
    closed = "" if gap is None else f": {gap:.1%} of the gap to the teacher closed"
    axes.set_title(f"Held-out perplexity{closed}", loc="left")
    axes.grid(axis="y", alpha=0.25)
    axes.legend()


def _draw_blocks(axes: Any, report: dict[str, Any]) -> None:
    """Cosine distance of every block, cut and recovered."""
    from matplotlib.ticker import MaxNLocator

    distance = report["cosine_distance"]
    for name, color, marker in (("cut", CUT_COLOR, "o"), ("recovered", RECOVERED_COLOR, "s")):
        axes.plot(distance["block"], distance[name], color=color, marker=marker, markersize=4, label=f"student, {name}")
    scale_by_ratios(axes)
    axes.set_xlabel("block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("cosine distance")
    axes.set_title("Distance of attention outputs to the teacher's by block", loc="left")
    axes.grid(axis="y", alpha=0.25)
    axes.legend()
