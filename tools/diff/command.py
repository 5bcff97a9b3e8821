"""`distillcache diff`: the differences of two caches or two runs.

Exit code 0: nothing differs that numbers depend on. 2: something does.
"""

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from distillcache.schemas import command_line
from distillcache.schemas.cache.segment import no_cache, segment_names
from distillcache.schemas.config.look import DiffConfig
from distillcache.schemas.config.yaml_text import as_yaml
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import InputError
from distillcache.schemas.format.layout import MANIFEST
from distillcache.schemas.store.store import Store, using
from distillcache.tools.diff.caches import compare_caches
from distillcache.tools.diff.runs import compare_runs
from distillcache.tools.fidelity.topk import words
from distillcache.tools.look.stored_rows import StoredRows
from distillcache.tools.pages.terminal import table_console
from distillcache.trainer.run.folder import RESOLVED

SHOWN = 20  # lines of a table on a terminal; --json tells all


def run(argv: Sequence[str], command: str, as_json: bool) -> int:
    """Print the differences as tables or as one JSON object; return the exit code."""
    config = command_line.parse(DiffConfig, argv, command, positional=("a", "b"))
    with using(config.storage):
        found = compare(config.a, config.b, config.rows, config.seed)
    if as_json:
        print(json.dumps(found))
    else:
        _print(found)
    return 0 if found["same"] else 2


def compare(a: str, b: str, count: int, seed: int) -> dict[str, Any]:
    """Compare two caches or two runs; returns differences as plain values.

    Raises:
        InputError: they are not both caches or both runs.
    """
    kinds = {url: kind_of(url) for url in (a, b)}
    if kinds[a] != kinds[b]:
        facts = {url: f"a {kind}" for url, kind in kinds.items()}
        raise InputError("a cache and a run cannot be compared", facts, "name two caches or two runs")
    if kinds[a] == "run":
        found = compare_runs(a, b)
        curves = (curve["same"] for name, curve in found["curves"].items() if not name.startswith(("perf/", "time/")))
        return {**found, "same": not found["config"] and all(curves)}
    found = compare_caches(StoredRows(a), StoredRows(b), count, seed)
    same = not (found["findings"] or found["shards"]["differing"] or found["rows"]["other_tokens"])
    return {**found, "same": same and not [key for key in found["plans"] if not key.startswith("config.")]}


def kind_of(url: str) -> str:
    """`cache` or `run`.

    Raises:
        InputError: it is neither.
    """
    store = Store(url)
    if store.read(MANIFEST) is not None or segment_names(store, 0):
        return "cache"
    if store.read(RESOLVED) is not None:
        return "run"
    if store.keys("segments/"):
        raise no_cache(store)
    raise InputError("there is neither a cache nor a run here", {"path": url}, "check the path")


def _print(found: dict[str, Any]) -> None:
    console = table_console(markup=False)
    console.print(f"A {found['a']}\nB {found['b']}")
    for line in found["summary"]:
        console.print(f"  {line}")
    settled = found["plans"] if found["kind"] == "caches" else found["config"]
    _table(
        console,
        ("plan" if found["kind"] == "caches" else "config", "A", "B"),
        [(k, *map(as_yaml, v)) for k, v in settled.items()],
    )
    if found["kind"] == "runs":
        heads = ("curve", "step", "A", "B", "widest at step", "A", "B")
        curves = [(name, c) for name, c in found["curves"].items() if not c["same"]]
        _table(console, heads, [(n, c["steps"][-1], c["a"][-1], c["b"][-1], *c["widest"].values()) for n, c in curves])
        return
    statistics = [tuple(entry.values()) for entry in found["statistics"]]
    _table(console, ("tap", "slot", "rms of all rows, A", "B"), statistics)
    figures = [(t["tap"], t["slot"], t["cosine_distance"], t["error"], t["wrong_rows"]) for t in found["taps"]]
    title = f"{counted(len(found['rows']['compared']), 'row')}: tap"
    figures.sort(key=lambda each: each[4] == 0)  # of many slots the wrong ones first
    if figures and not any(error for _, _, _, error, _ in figures):
        rows, slots = counted(len(found["rows"]["compared"]), "row"), counted(len(figures), "slot")
        console.print(f"\n{rows} compared: the same numbers in every slot ({slots})")
    else:
        _table(console, (title, "slot", "cosine distance", "error", "wrong rows"), figures)
    if found["topk_logits"] is not None:
        console.print(f"\n{words(found['topk_logits'])}")


def _table(console: Console, heads: Sequence[str], rows: Sequence[Sequence[Any]], shown: int = SHOWN) -> None:
    if not rows:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, head in enumerate(heads):
        table.add_column(head, justify="left" if place == 0 else "right", overflow="fold")
    for row in rows[:shown]:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    console.print()
    console.print(table)
    if len(rows) > shown:
        console.print(f"and {len(rows) - shown} more: see all with --json")
