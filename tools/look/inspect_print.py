"""Output of `distillcache inspect`: the facts, a line for every array, and the warnings last."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from distillcache.schemas.cache.describe import in_bytes, layers_words
from distillcache.schemas.counted import counted
from distillcache.tools.pages.terminal import table_console

LEVELS = "▁▂▃▄▅▆▇█"
DRAWN = 64  # characters of a curve: a slot each, as long as they fit a line of 80 columns beside the tap's name
DECADES = 0.5  # a curve is as high as its range, but at least this: noise is not drawn as hills


def print_cache(found: Mapping[str, Any]) -> None:
    """The description of a cache (`inspect.describe_cache`) on standard output."""
    console = table_console()
    console.print(_facts(found))
    console.print()
    console.print(_taps(found))
    for line in _curves(found["taps"]):
        console.print(escape(line))
    warnings = found["warnings"]
    console.print()
    for warning in warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}")
    if not warnings:
        console.print(
            "Nothing unusual in the plans, the statistics, a few rows and part of the index. For more: `stats` reads "
            "a sample of rows, `verify` checks every byte, `fidelity` compares with the teacher."
        )


def _facts(found: Mapping[str, Any]) -> Table:
    rows, shards, teacher, numerics = found["rows"], found["shards"], found["teacher"], found["numerics"]
    state = "finished" if found["finished"] else f"not finished: {found['to_finish']}"
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_row("cache", f"{escape(found['cache'])}  ({escape(state)})")
    facts.add_row(
        "teacher",
        f"{escape(teacher['path'])}  ({layers_words(teacher['num_blocks'], teacher['hidden_size'])})",
    )
    facts.add_row("weights", teacher["weights_digest"])
    facts.add_row(
        "computed", f"{numerics['dtype']} on {numerics['platform']}, jax {numerics['versions'].get('jax', 'unknown')}"
    )
    facts.add_row("rows", f"{rows['train']:,} train + {rows['eval']:,} eval of {rows['row_tokens']:,} tokens")
    facts.add_row("tokens", f"{rows['tokens']:,} without padding")
    done = f"{shards['done']:,} of {shards['of']:,} done, {counted(shards['rows_per_shard'], 'row')} each"
    facts.add_row(
        "shards", done if len(found["segments"]) == 1 else f"{done}; {counted(len(found['segments']), 'segment')}"
    )
    compressed = any(tap["compress"] != "none" for tap in found["taps"])
    stored = f"  (compressed to about {in_bytes(found['stored_bytes'])})" if compressed else ""
    whole = "" if found["finished"] else " when finished"
    facts.add_row("size", f"{in_bytes(found['bytes'])}{whole}, {found['bytes_per_token']:,} bytes a token{stored}")
    if found["keeps_head"]:
        facts.add_row("head", "kept: the teacher's last norm and LM head")
    facts.add_row("made", f"{found['created'].get('at')} on {escape(str(found['created'].get('host')))}")
    for words in said_of_times(found["segments"]):
        facts.add_row("time", escape(words))
    return facts


def said_of_times(segments: Sequence[Mapping[str, Any]]) -> list[str]:
    """Describe the time that the shards of every segment took, if it was recorded."""
    found = []
    for segment in segments:
        times = segment["seconds"]
        if times is None:
            continue
        name = "" if len(segments) == 1 else f"{segment['segment']}: "
        compute, write = (
            f"{times[phase]['median']:.3g} s ({times[phase]['least']:.3g} to {times[phase]['largest']:.3g})"
            for phase in ("compute", "write")
        )
        hosts = f", on {len(times['hosts'])} machines" if len(times["hosts"]) > 1 else ""
        found.append(f"{name}a shard took {compute} to compute and {write} to write{hosts}")
    return found


def _taps(found: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, right in (
        ("tap", False),
        ("codec", False),
        ("shape", False),
        ("dtype", False),
        ("bytes/token", True),
        ("size (of uncompressed)" if any(tap["compress"] != "none" for tap in found["taps"]) else "size", True),
        ("rms", True),
        ("max", True),
    ):
        table.add_column(column, justify="right" if right else "left")
    for tap in found["taps"]:
        rms = tap.get("rms")
        for number, (array, facts) in enumerate(tap["arrays"].items()):
            first = number == 0
            cells = [
                array if tap["segment"] == found["segments"][0]["segment"] else f"{array} ({_number(tap['segment'])})",
                tap["codec"] if first else "",
                "x".join(map(str, facts["shape"])),
                facts["bits_of"] or facts["dtype"],
                f"{tap['bytes_per_token']:,}" if first else "",
                _size(tap) if first else "",
                _range(rms) if rms and first else "",
                f"{max(tap['abs_max']):.3g}" if rms and first else "",
            ]
            table.add_row(*cells)
    return table


def _curves(taps: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rms of every slot, a line for each tap; nothing on a terminal that cannot draw it."""
    drawn = {_name(taps, tap): tap["rms"] for tap in taps if len(tap.get("rms") or ()) > 1}
    if not drawn or (sys.stdout.encoding or "").lower().replace("-", "") != "utf8":
        return []
    width, most = max(map(len, drawn)), max(map(len, drawn.values()))
    each = -(-most // DRAWN)
    bins = "slot" if each == 1 else f"up to {each} neighbouring slots, of which the largest counts"
    words = f"rms by slot, on a logarithmic scale of each tap; a character for each {bins}:"
    return ["", words, *(f"{name:{width}}  {curve(rms, each)}" for name, rms in drawn.items())]


def _name(taps: Sequence[Mapping[str, Any]], tap: Mapping[str, Any]) -> str:
    """The tap's name, with the segment's number where it is not the first one's."""
    return tap["name"] if tap["segment"] == taps[0]["segment"] else f"{tap['name']} ({_number(tap['segment'])})"


def _number(segment: str) -> str:
    """`0001` of `0001-1cf04207090f52da`: a finished cache has one segment of a number, and the table is wide enough."""
    return segment.split("-")[0]


def _size(tap: Mapping[str, Any]) -> str:
    """Describe the size of all rows; if compressed, the stored size and its share."""
    if tap["compress"] == "none":
        return in_bytes(tap["bytes"])
    return f"{in_bytes(tap['stored_bytes'])} ({tap['stored_bytes'] / max(tap['bytes'], 1):.2f})"


def _range(rms: Sequence[float]) -> str:
    return f"{rms[0]:.2g}" if len(rms) == 1 else f"{min(rms):.2g} to {max(rms):.2g}"


def curve(values: Sequence[float], each: int = 1) -> str:
    """Numbers of many sizes as a line of blocks, by their logarithm; zeros as spaces.

    Args:
        each: how many neighbours share a block, which is as high as their largest.
    """
    tops = [max(values[at : at + each]) for at in range(0, len(values), each)]
    logs = [math.log10(value) if value > 0 else None for value in tops]
    known = [value for value in logs if value is not None]
    if not known:
        return " " * len(tops)
    low, span = min(known), max(max(known) - min(known), DECADES)
    return "".join(
        " " if value is None else LEVELS[min(int((value - low) / span * len(LEVELS)), len(LEVELS) - 1)]
        for value in logs
    )
