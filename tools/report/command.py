"""`distillcache report`: write one HTML file about a cache or a run, which needs no network and only a browser.

distillcache report caches/mine --out mine.html
distillcache report gs://bucket/runs/cut --out gs://bucket/reports/cut.html
"""

import importlib.metadata
import json
import time
from collections.abc import Sequence
from typing import Any

from distillcache.schemas import command_line
from distillcache.schemas.cache.segment import no_cache, read_manifest, segment_names
from distillcache.schemas.config.report import ReportConfig
from distillcache.schemas.errors import ConfigError, InputError
from distillcache.schemas.format.run import IDENTITY, whole_steps
from distillcache.schemas.store.store import Store, using
from distillcache.schemas.store.whole_file import refuse_foreign_file, write_file
from distillcache.tools.pages.html import size
from distillcache.tools.report.cache import cache_page
from distillcache.tools.report.run import run_page

FOOTER_END = "This file loads no other files."  # no part of a page of others that speaks of distillcache


def run(argv: Sequence[str], command: str, as_json: bool) -> None:
    """Write the report, and print its path or, with `as_json`, its summary."""
    config = command_line.parse(ReportConfig, argv, command, positional=("target",))
    with using(config.storage):
        written = write_report(config)
    if as_json:
        print(json.dumps(written))
        return
    for warning in written["warnings"]:
        print(f"look at: {warning}")
    print(f"{written['report']}  {size(written['bytes'])}, of the {written['of']} {config.target}")


def write_report(config: ReportConfig) -> dict[str, Any]:
    """Write it; what was written, as plain values: report, bytes, of, sections, figures, warnings, and rows or steps.

    Raises:
        InputError: there is neither a cache nor a run.
        DamageError: what is read is not what was committed.
        StorageError: it cannot be read, or the file cannot be written.
    """
    store = Store(config.target)
    out = config.out or f"{kind_of(store)}-report.html"
    _check_out(out)
    kind = kind_of(store)
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    footer = f"distillcache {importlib.metadata.version('distillcache')}, {at} UTC. {FOOTER_END}"
    page, said = run_page(store, footer) if kind == "run" else cache_page(store, config.rows, config.seed, footer)
    data = page.render().encode()
    write_file(out, data, says=True)
    sections = [section.title for section in page.sections]
    drawn = data.count(b"<figure>")
    return {
        "report": out,
        "target": store.url,
        "bytes": len(data),
        "sections": sections,
        "figures": drawn,
        **said,
    }


def _check_out(out: str) -> None:
    """Raise `ConfigError` where no report can be written to this place."""
    if out.endswith("/"):
        raise ConfigError("out names a folder", {"out": out}, "name a file, such as report.html")
    refuse_foreign_file(out, "out", (b"<!DOCTYPE html>", b"<footer><p>distillcache ", FOOTER_END.encode()))


def kind_of(store: Store) -> str:
    """`cache` or `run`.

    Raises:
        InputError: there is neither.
    """
    if store.read(IDENTITY) is not None or whole_steps(store):  # also one that has lost its identity
        return "run"
    if read_manifest(store) is not None or segment_names(store, 0):
        return "cache"
    if store.keys("segments/"):
        raise no_cache(store)
    raise InputError(
        "there is neither a cache nor a run here",
        {
            "looked at": store.url,
            "a cache has": "manifest.json, or segments/0000/plan.json while it is being built",
            "a run has": IDENTITY,
        },
        "check the path; the demo's folder holds a cache and a run",
    )
