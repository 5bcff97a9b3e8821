"""`distillcache verify`: every byte of a cache against what was committed.

Exit code 0: all is well. 2: something is wrong; the report says what, and which rows it affects.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cache_builder.check import check_cache
from cache_builder.survey import survey_cache
from schemas import settings
from schemas.config import VerifyConfig
from schemas.progress import Progress
from schemas.storage import Store, use

SHOWN = 50  # findings on a terminal; --json tells all


def run(argv: Sequence[str], command: str, as_json: bool) -> int:
    """Print what is wrong as a table or as one JSON object; the exit code."""
    config = settings.parse(VerifyConfig, argv, command, positional=("cache",))
    use(config.storage)
    found = verify_cache(Store(config.cache), quick=config.quick)
    if as_json:
        print(json.dumps(found))
    else:
        _print(found)
    return 0 if found["ok"] else 2


def verify_cache(store: Store, *, quick: bool = False) -> dict[str, Any]:
    """What was checked, and every finding (`cache_builder.finding`), as plain values.

    Raises:
        InputError: there is no cache here.
    """
    survey = survey_cache(store)
    checked: Counter[str] = Counter()
    with Progress("verify", survey.num_objects, unit="objects") as bar:

        def on_checked(what: str, count: int) -> None:
            checked[what] += count
            if what in ("objects", "rows_files"):
                bar.advance(count)

        findings = list(check_cache(survey, quick=quick, on_checked=on_checked))
    return {
        "cache": store.url,
        "ok": not findings,
        "finished": survey.finished,
        "quick": quick,
        "checked": {what: checked[what] for what in ("files", "shards", "objects", "rows_files")},
        "findings": [finding.model_dump(mode="json") for finding in findings],
    }


def _print(found: dict[str, Any]) -> None:
    console, findings = Console(), found["findings"]
    counts = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in found["checked"].items())
    looked = "presence, lengths and shard indexes of" if found["quick"] else "every byte of"
    console.print(f"{found['cache']}: checked {looked} {counts}", highlight=False, markup=False, soft_wrap=True)
    if not found["finished"]:
        console.print("The cache is not finished: only its committed shards were checked.")
    if not findings:
        console.print("All is as it was committed.")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("what", "object", "rows", "tap", "slots", "detail"):
        table.add_column(column, overflow="fold")
    for finding in findings[:SHOWN]:
        rows = "" if finding["rows"] is None else f"{finding['rows'][0]} to {finding['rows'][1] - 1}"
        slots = ", ".join(map(str, finding["slots"]))
        words = (finding["what"], finding["object"], rows, finding["tap"] or "", slots, finding["detail"])
        table.add_row(*map(escape, words))
    console.print(table)
    if len(findings) > SHOWN:
        console.print(f"and {len(findings) - SHOWN} more: see all with --json")
    kinds = ", ".join(f"{count} {what}" for what, count in Counter(f["what"] for f in findings).items())
    print(f"found: {kinds}", file=sys.stderr)
    print(
        f"make what is damaged again: distillcache build --repair --cache {found['cache']} "
        "(a copy: distillcache copy SRC DST --repair)",
        file=sys.stderr,
    )
