"""Output of `distillcache plan`: the size of the cache by array, and with other codecs and blocks; then its time."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from distillcache.schemas.cache.describe import layers_words
from distillcache.schemas.counted import counted
from distillcache.schemas.format.rows import no_targets_note
from distillcache.schemas.runtime.progress import format_seconds
from distillcache.tools.pages.terminal import table_console

DIFFERENCES = "resid as differences"


DIFFERENCES_NOTE = (
    f"{DIFFERENCES} (taps.resid.delta: true): larger, because of its keyframes, but more accurate than the same codec "
    "without it"
)


def print_sizes(report: Mapping[str, Any]) -> None:
    """The report of `plan.describe_sizes` on standard output."""
    console = table_console()
    console.print(_facts(report))
    if not report["rows"]["exact"]:
        console.print("The text is large: a sample was tokenised, and the figures that depend on it are estimates.")
    if report["without_targets"]:
        where = "" if report["rows"]["exact"] else "in the sample, "
        console.print(f"[yellow]warning:[/] {where}{no_targets_note(report['without_targets'])}")
    if report["too_long"]:
        console.print(f"[yellow]warning:[/] {escape(report['too_long'])}")
    console.print()
    console.print(_taps(report))
    console.print()
    console.print("Size with other codecs and blocks, and its share of the size in bf16 with all blocks:")
    console.print(_choices(report))
    if any(choice["codec"].endswith(DIFFERENCES) for choice in report["choices"]):
        console.print(DIFFERENCES_NOTE)


def print_next(report: Mapping[str, Any]) -> None:
    """The time that a build takes, of `plan.describe_build`, and the next command."""
    console = table_console()
    console.print()
    console.print(f"time  {_time(report)}")
    for line in _next_steps(report):
        console.print(line)


def _facts(report: Mapping[str, Any]) -> Table:
    rows, shards, teacher = report["rows"], report["shards"], report["teacher"]
    facts = Table.grid(padding=(0, 2))
    about = "" if rows["exact"] else "about "
    most = "at most " if report["at_most"] else ""
    blocks = f"{report['blocks']} of {layers_words(teacher['num_blocks'], teacher['hidden_size'])}"
    facts.add_row("cache", escape(report["cache"]))
    facts.add_row("teacher", f"{escape(teacher['path'])}  ({blocks}{_computed(teacher)})")
    facts.add_row(
        "rows",
        f"{about}{rows['count']:,} of {rows['row_tokens']:,} tokens, {about}{rows['tokens']:,} without padding",
    )
    size = f"{most}{about}{in_bytes(report['bytes'])}, {report['bytes_per_token']:,} bytes a token"
    facts.add_row("size", size + (" before compression" if most else ""))
    each = f"{shards['rows']:,} row{'s' if shards['rows'] > 1 else ''} and {most}{in_bytes(shards['bytes'])} each"
    facts.add_row("shards", f"{about}{shards['count']:,} of {each}, in {counted(report['objects'], 'object')}")
    facts.add_row("memory", f"at most {in_bytes(report['memory_in_flight'])} on the host between teacher and store")
    facts.add_row("free", _free(report))
    return facts


def _computed(teacher: Mapping[str, Any]) -> str:
    return f", in {teacher['dtype']}" if teacher["dtype"] else ""


def _time(report: Mapping[str, Any]) -> str:
    if report["seconds"] is None:
        return "not measured, because of `--measure false`; measuring takes about half a minute"
    count = report["processes"]
    share = "one process like this one" if count == 1 else f"each of {count} processes like this one"
    rate = f"{report['tokens_per_s']:,.0f} tokens/s of {share}"
    return f"about {format_seconds(report['seconds'])}, extrapolated from {_measured(report)}: {rate}"


def _measured(report: Mapping[str, Any]) -> str:
    """`2 batches`, or the smaller part of a batch that was recorded."""
    calls, rows, tokens = (report["measured"][key] for key in ("calls", "rows", "row_tokens"))
    if tokens < report["rows"]["row_tokens"]:
        return f"{tokens:,} of a row's {report['rows']['row_tokens']:,} tokens"
    if rows < report["batch_rows"]:
        return f"{counted(rows, 'row')} of a batch's {report['batch_rows']:,}"
    return f"{calls} whole batch{'es' if calls > 1 else ''}"


def _free(report: Mapping[str, Any]) -> str:
    if report["free_bytes"] is None:
        return "unknown: a bucket"
    verdict = {True: "enough", False: "[bold red]too little room[/]", None: "perhaps enough, if the taps compress well"}
    return f"{in_bytes(report['free_bytes'])}: {verdict[report['enough_room']]}"


def _taps(report: Mapping[str, Any]) -> Table:
    table = _table(("array", "codec"), "slots", "bytes a token", "size", "objects", "object size", "slots per object")
    for tap in report["taps"]:
        for number, (array, facts) in enumerate(tap["arrays"].items()):
            most = "" if tap["compress"] == "none" else "≤ "
            of_tap = (str(tap["slots"]), f"{most}{tap['bytes_per_token']:,}", most + in_bytes(tap["bytes"]))
            each = (f"{facts['objects']:,}", most + in_bytes(facts["object_bytes"]), str(facts["slots_per_object"]))
            codec = (tap["codec"] + (f", {tap['compress']}" if most else "")) if number == 0 else ""
            table.add_row(array, codec, *(of_tap if number == 0 else ("", "", "")), *each)
    if len(report["taps"]) > 1:
        size = in_bytes(sum(tap["bytes"] for tap in report["taps"]))
        table.add_row("all", "", "", f"{report['bytes_per_token']:,}", size, f"{report['objects']:,}", "", "")
    return table


def _choices(report: Mapping[str, Any]) -> Table:
    """A codec a line, a choice of blocks a column."""
    counts = list(dict.fromkeys(choice["blocks"] for choice in report["choices"]))
    heads = [counted(count, "block") for count in counts]
    heads[0] = f"{'all ' if counts[0] > 1 else ''}{heads[0]}"
    table = _table(("codec",), *heads)
    found = {(choice["codec"], choice["blocks"]): choice for choice in report["choices"]}
    for codec in dict.fromkeys(choice["codec"] for choice in report["choices"]):
        table.add_row(codec, *(_choice(found.get((codec, count))) for count in counts))
    return table


def _choice(choice: Mapping[str, Any] | None) -> str:
    if choice is None:
        return ""
    return choice["impossible"] if "impossible" in choice else f"{in_bytes(choice['bytes'])}  {choice['of_bf16']:.2f}"


def _next_steps(report: Mapping[str, Any]) -> Sequence[str]:
    if report["enough_room"] is False:
        fits = [
            choice
            for choice in report["choices"]
            if "impossible" not in choice and choice["bytes"] <= (report["free_bytes"] or 0)
        ]
        best = max(fits, key=lambda choice: choice["bytes"], default=None)
        words = f"; {best['codec']}, of {counted(best['blocks'], 'block')}, would fit" if best is not None else ""
        return [
            f"[bold red]There is too little room at {escape(report['cache'])}[/]: choose another path or codec{words}."
        ]
    unsure = report["enough_room"] is None and report["free_bytes"] is not None
    words = f"There may be too little room at {escape(report['cache'])}: it depends on how well the taps compress."
    return [*([words] if unsure else []), "next: run `distillcache build` with the same flags"]


def _table(left: Sequence[str], *right: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def in_bytes(size: int) -> str:
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size / 1000:,.1f} kB"
