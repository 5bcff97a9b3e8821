"""The tables of `distillcache plan --simulate`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distillcache.schemas import command_line
from distillcache.schemas.config.simulate import SimulateConfig
from distillcache.schemas.counted import counted
from distillcache.schemas.store.path import local_path
from distillcache.schemas.store.whole_file import refuse_foreign_file
from distillcache.tools.pages.pictures import MARKS
from distillcache.tools.plan.scale import describe_scale
from distillcache.tools.plan.students import ONLINE, add_hours, write_plot

WIDTH = 170  # of the tables, wherever they go: they are made to be pasted
DAY_S, YEAR_S = 86400.0, 365 * 86400.0


def run(argv: Sequence[str], command: str, as_json: bool) -> None:
    """Print the cost of the caches that the command line describes."""
    config = command_line.parse(SimulateConfig, argv, command)
    plot = None if config.plot is None else local_path(config.plot, "--plot")
    if plot is not None:
        refuse_foreign_file(plot, "--plot", *MARKS, ONLINE.encode())  # the latter before files named it
    report = add_hours(config, describe_scale(config))
    if plot is not None:
        write_plot(report, plot)
    if as_json:
        print(json.dumps(report))
    else:
        print_report(report)


def print_report(report: Mapping[str, Any]) -> None:
    """Print the assumptions, then four tables with a line for every cache: sizes, build, reading, students."""
    console = Console(width=WIDTH, highlight=False)
    for line in assumptions(report["assumed"]):
        console.print(line)
    for warning in report["too_long"]:
        console.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)
    for fill in (sizes_table, builds_table, feeds_table, students_table):
        console.print()
        console.print(fill({**report, "caches": [cache for cache in report["caches"] if "impossible" not in cache]}))
    for cache in report["caches"]:
        if "impossible" in cache:
            console.print(f"not possible: {', '.join(_names(cache))}: {cache['impossible']}")


def assumptions(assumed: Mapping[str, Any]) -> list[str]:
    """The machines and prices, in words."""
    build, train, bucket = assumed["build"], assumed["train"], assumed["bucket"]
    speed = (
        f"{build['tokens_per_s']:,.0f} tokens/s a host"
        if build["tokens_per_s"]
        else f"{build['mfu']:.0%} of {build['host_tflops']:,.0f} TFLOP/s a host"
    )
    return [
        f"rows of {assumed['row_tokens']:,} tokens, objects of {assumed['object_mib']} MiB, shards of "
        f"{assumed['shard_mib']:,} MiB, {counted(assumed['batch_rows'], 'row')} in a teacher's batch",
        f"build: {speed}, {build['preemptions_per_h']:g} preemptions an hour and host, {build['restart_s']:,.0f} s "
        f"until it is back, {build['retry_share']:.1%} of writes sent twice",
        f"train: {counted(train['hosts'], 'host')}, {counted(train['batch_rows'], 'row')} a step of "
        f"{train['step_s']:g} s",
        f"students: {assumed['students']['size']:g} of the teacher's size, one after the other on "
        f"{counted(assumed['students']['hosts'], 'host')}, each sees the text once",
        f"bucket: {bucket['host_gb_s']:g} GB/s to a host, {bucket['egress_gb_s']:g} GB/s to all, "
        f"{bucket['puts_per_s']:,.0f} PUTs/s and {bucket['gets_per_s']:,.0f} GETs/s when new",
        f"prices: ${bucket['price_per_gib_month']:g} a GiB and month, "
        f"${bucket['price_per_1000_puts']:g} for 1,000 PUTs, ${bucket['price_per_1000_gets']:g} for 1,000 GETs",
    ]


def sizes_table(report: Mapping[str, Any]) -> Table:
    table = _table("bytes/token", "bytes", "shards", "objects", "PUTs", "their cost", "index", "a month")
    for cache in report["caches"]:
        table.add_row(
            *_names(cache),
            f"{cache['bytes_per_token']:,}",
            scaled(cache["bytes"], "B"),
            scaled(cache["shards"]),
            scaled(cache["objects"]),
            scaled(cache["puts"]),
            money(cache["dollars_for_puts"]),
            scaled(cache["index_bytes"], "B"),
            money(cache["dollars_per_month"]),
        )
    return table


def builds_table(report: Mapping[str, Any]) -> Table:
    hosts = report["assumed"]["build"]["hosts"]
    most = counted(hosts[-1], "host")
    names = ("tokens/s, a host", *(counted(count, "host") for count in hosts), "GB/s, a host", "preempted")
    table = _table(*names, f"scarce with {most}")
    for cache in report["caches"]:
        last = cache["builds"][-1]
        table.add_row(
            *_names(cache),
            f"{cache['host_tokens_per_s']:,.0f}",
            *(duration(build["seconds"]) for build in cache["builds"]),
            f"{last['write_gb_per_s_per_host']:.3g}",
            f"+{max(last['over_quiet'], 0):.1%}",
            scarce(cache["limits"], "build: ", "teacher FLOPs"),
        )
    return table


def feeds_table(report: Mapping[str, Any]) -> Table:
    table = _table("steps an epoch", "GETs an epoch", "their cost", "GB/s, a host", "scarce")
    for cache in report["caches"]:
        table.add_row(
            *_names(cache),
            scaled(cache["steps_per_epoch"]),
            scaled(cache["gets_per_epoch"]),
            money(cache["dollars_for_gets_per_epoch"]),
            f"{cache['read_gb_per_s_per_host']:.3g}",
            scarce(cache["limits"], "feed: ", "nothing"),
        )
    return table


def students_table(report: Mapping[str, Any]) -> Table:
    """Hours for each number of students from the cache, and with the teacher in the loop instead."""
    counts = report["assumed"]["students"]["counts"]
    most = counts[-1]
    table = _table(*(f"{count} {'student' if count == 1 else 'students'}" for count in counts), f"{most}, {ONLINE}")
    for cache in report["caches"]:
        hours = cache["students"]
        each = [*hours["cached_h"], hours["online_h"][-1]]
        table.add_row(*_names(cache), *(duration(3600 * value) for value in each))
    return table


def scarce(limits: Mapping[str, float], what: str, otherwise: str) -> str:
    """The bottlenecks, worst first; if every resource suffices, what comes next."""
    found = sorted(((value, name.removeprefix(what)) for name, value in limits.items() if name.startswith(what)))[::-1]
    over = [f"{name} {value:.2g}x" if value < 100 else f"{name} {value:,.0f}x" for value, name in found if value > 1]
    return ", ".join(over) or f"{otherwise}; next {found[0][1]} {found[0][0]:.2g}x"


def scaled(value: float, unit: str = "") -> str:
    """Three digits and a prefix."""
    for prefix, scale in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def money(dollars: float) -> str:
    return f"${dollars:,.0f}" if dollars >= 1 else f"${dollars:.2f}"


def duration(seconds: float) -> str:
    """In the unit that fits."""
    if seconds >= 2 * YEAR_S:
        return f"{seconds / YEAR_S:,.1f} years"
    if seconds >= 2 * DAY_S:
        return f"{seconds / DAY_S:,.1f} days"
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds / 60:,.0f} min"


def _names(cache: Mapping[str, Any]) -> tuple[str, str, str]:
    tokens = scaled(cache["tokens"]).replace(" G", "B").replace(" ", "")
    return cache["teacher"].partition("-")[2].removeprefix("3.1-").removeprefix("3.2-"), tokens, cache["choice"]


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("teacher", "tokens", "recorded"):
        table.add_column(name, no_wrap=True)
    for name in names:
        last = name.startswith("scarce")
        table.add_column(name, justify="left" if last else "right", no_wrap=not last)
    return table
