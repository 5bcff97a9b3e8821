"""`distillcache verify`: compare every byte of a cache with what was committed.

Exit code 0: all is well. 2: something is wrong; the report says what, and which rows it affects.
"""

import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from distillcache.cache_builder.repair.check import check_cache
from distillcache.cache_builder.repair.lost_manifest import MANIFEST_STEP
from distillcache.cache_builder.repair.survey import Survey, survey_cache
from distillcache.schemas import command_line
from distillcache.schemas.cache.describe import numbers_in_runs
from distillcache.schemas.cache.lost_plan import step_for_file
from distillcache.schemas.config import VerifyConfig
from distillcache.schemas.counted import counted
from distillcache.schemas.format.layout import MANIFEST
from distillcache.schemas.runtime.progress import Progress
from distillcache.schemas.store.disk_errors import step_for
from distillcache.schemas.store.store import Store, using
from distillcache.tools.pages.terminal import table_console

ALL_RIGHT = "Every byte is as committed"
SHOWN = 20  # findings on a terminal; --json tells all


def run(argv: Sequence[str], command: str, as_json: bool) -> int:
    """Print the findings as a table or as one JSON object; return the exit code."""
    config = command_line.parse(VerifyConfig, argv, command, positional=("cache",))
    with using(config.storage):
        found = verify_cache(Store(config.cache), quick=config.quick)
    if as_json:
        print(json.dumps(found))
    else:
        _print(found)
    return 0 if found["ok"] else 2


def verify_cache(store: Store, *, quick: bool = False) -> dict[str, Any]:
    """Verify a cache; returns counts and every finding (`cache_builder.finding`), as plain values.

    Raises:
        InputError: there is no cache here.
    """
    start_s = time.monotonic()
    survey = survey_cache(store)
    checked: Counter[str] = Counter()
    with Progress("verify", survey.num_objects, unit="objects") as bar:

        def on_checked(what: str, count: int) -> None:
            checked[what] += count
            if what in ("objects", "rows_files"):
                bar.advance(count)

        findings = list(check_cache(survey, quick=quick, on_checked=on_checked))
    rows = {row for finding in findings if finding.rows is not None for row in [finding.rows]}
    count = _planned_rows(survey)
    if any(finding.object == MANIFEST for finding in findings):
        rows.add((0, count))  # nothing is read without it
    return {
        "cache": store.url,
        "ok": not findings,
        "finished": survey.finished,
        "quick": quick,
        "checked": {what: checked[what] for what in ("files", "shards", "objects", "rows_files")},
        "rows": {"of": count, "affected": _covered(sorted(rows))},
        "seconds": round(time.monotonic() - start_s, 3),
        "findings": [finding.model_dump(mode="json") for finding in findings],
    }


def _planned_rows(survey: Survey) -> int:
    listed = 0 if survey.manifest is None else survey.manifest.rows
    return max([listed, *(view.rows[1] for view in survey.segments)])


def _covered(ranges: Sequence[tuple[int, int]]) -> int:
    """Count the rows in any of these ranges `[start, stop)`, ascending."""
    count, end = 0, 0
    for start, stop in ranges:
        count += max(stop - max(start, end), 0)
        end = max(end, stop)
    return count


def _print(found: dict[str, Any]) -> None:
    console, findings = table_console(), found["findings"]
    things = {what: what.replace("_", " ").removesuffix("s") for what in found["checked"]}
    counts = ", ".join(counted(count, things[what]) for what, count in found["checked"].items())
    looked = "presence, lengths and shard indexes of" if found["quick"] else "every byte of"
    console.print(_verdict(found))
    console.print(f"{found['cache']}: checked {looked} {counts} in {found['seconds']:.1f} s", markup=False)
    if not found["finished"]:
        console.print("The cache is not finished: only its committed shards were checked.")
    if not findings:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("what", "object", "shard", "rows", "tap", "slots", "detail"):
        table.add_column(column, overflow="fold", justify="right" if column == "shard" else "left")
    for finding in findings[:SHOWN]:
        rows = "" if finding["rows"] is None else numbers_in_runs(range(*finding["rows"]))
        shard = "" if finding["shard"] is None else str(finding["shard"])
        slots = numbers_in_runs(finding["slots"])
        words = (finding["what"], finding["object"], shard, rows, finding["tap"] or "", slots, finding["detail"])
        table.add_row(*map(escape, words))
    console.print()
    console.print(table)
    if len(findings) > SHOWN:
        console.print(f"and {len(findings) - SHOWN:,} more: see all with --json")
    for line in _next_steps(found):
        print(f"next: {line}", file=sys.stderr)


def _verdict(found: dict[str, Any]) -> str:
    if found["ok"]:
        right = "All objects are there, with the committed lengths and indexes" if found["quick"] else ALL_RIGHT
        again = f"compare values with the teacher: distillcache fidelity {shlex.quote(found['cache'])}"
        return f"[green]{right}.[/] To {escape(again)}"
    kinds = Counter(finding["what"] for finding in found["findings"])
    words = ", ".join(f"{count:,} {what}" for what, count in kinds.most_common())
    rows = found["rows"]
    hit = (
        f"{rows['affected']:,} of {counted(rows['of'], 'row')} cannot be trusted"
        if rows["affected"]
        else "no row is affected"
    )
    lost = {finding["object"] for finding in found["findings"]}
    if MANIFEST in lost:
        hit = f"none of the {counted(rows['of'], 'row')} can be read before that is repaired"
    elif not rows["affected"] and any(key.endswith("/plan.json") for key in lost):
        hit = "nothing of its segment can be read without the plan"
    return f"[red]Problems found: {words}; {hit}.[/]"


def _is_lost_plan(finding: dict[str, Any]) -> bool:
    """Return whether a finding is about a plan, which no repair makes again."""
    return finding["object"].endswith("/plan.json") and finding["what"] != "foreign"


def _next_steps(found: dict[str, Any]) -> Iterator[str]:
    plans = sorted(each["object"] for each in found["findings"] if _is_lost_plan(each))
    if plans:
        yield step_for_file(Store(found["cache"]), plans[0], "")
    kinds = {finding["what"] for finding in found["findings"] if not _is_lost_plan(finding)}
    again = "run it again: the store failed to return some data; if it fails again, the disk or bucket is at fault"
    unreadable = [each["detail"] for each in found["findings"] if each["what"] == "unreadable"]
    yield from sorted({step_for(detail, reads=True) or again for detail in unreadable})
    damaged = {each["object"] for each in found["findings"] if each["what"] not in ("foreign", "unreadable")}
    if MANIFEST in damaged and len(damaged) > 1 and not plans:
        yield MANIFEST_STEP
    elif kinds - {"foreign", "unreadable"} and not plans:
        yield (
            f"recompute what is damaged: distillcache build --repair --cache {shlex.quote(found['cache'])} "
            "(a copy: distillcache copy SRC DST --repair)"
        )
    if "foreign" in kinds:
        yield "delete foreign files: nothing reads them; `build --repair` removes the leftovers of a build"
