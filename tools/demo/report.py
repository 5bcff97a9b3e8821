"""The demo's report: figures as plain values, as tables for people, and as a chart."""

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
from distillcache.tools.pages.terminal import table_console
from distillcache.trainer.run.evaluate import told_perplexity
from distillcache.trainer.train import TrainResult, divergence_summary

CHART = "cosine_distance.png"
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
    return {
        "teacher": teacher,
        "surgery": [op.model_dump() for op in surgery],
        "perplexity": {"teacher": of_teacher, "cut": cut, "recovered": recovered},
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
    table.add_row("run", f"{report['run']}, {counted(report['steps'], 'step')}; with report.json and {CHART}")
    return table


def _next_steps(report: dict[str, Any]) -> list[str]:
    cache, run, again = map(shlex.quote, (report["cache"], report["run"], report["run"].rstrip("/") + "2"))
    return [
        *([] if shutil.which("distillcache") else [f". {_activate()}   # puts distillcache on the PATH"]),
        f"distillcache report {run}   # writes an HTML page; also of the cache",
        f"distillcache serve {cache}   # shows it in the browser; pip install -e '.[serve]' first",
        f"distillcache inspect {cache}",
        f"distillcache export {run} student   # an HF directory",
        f"distillcache train --cache {cache} --run {again} --steps 200 --student.surgery '[{{op: kv_heads, to: 2}}]'",
    ]


def _activate() -> str:
    """The script that puts this environment's commands on the PATH, as short as it can be named from here."""
    script = Path(sys.prefix) / "bin" / "activate"
    return str(script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script)


def write_chart(report: dict[str, Any], path: Path) -> None:
    """Cosine distance per block, cut and recovered, as a PNG; logarithmic, since the two are far apart."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    distance, perplexity = report["cosine_distance"], report["perplexity"]
    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for name, color, marker in (("cut", CUT_COLOR, "o"), ("recovered", RECOVERED_COLOR, "s")):
        label = f"{name} (perplexity {told_perplexity(perplexity[name], '.1f')})"
        axes.plot(distance["block"], distance[name], color=color, marker=marker, markersize=4, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("cosine distance to the teacher")
    of_teacher = told_perplexity(perplexity["teacher"], ".1f")
    axes.set_title(f"Attention outputs on held-out rows (teacher's perplexity {of_teacher})")
    axes.grid(axis="y", which="both", alpha=0.25)
    axes.legend()
    with writing(path) as file:
        figure.savefig(file, dpi=150, format="png")
    pyplot.close(figure)
