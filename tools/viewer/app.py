"""The viewer as a web application: routes and error pages.

Nothing is written, and no address reaches a file: rows, tokens and slots are numbers, taps are looked up among those of
the plan. Pages are made one at a time, since each may hold some of a row's activations.
"""

import importlib.metadata
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from distillcache.schemas.errors import DamageError, DistillcacheError, InputError
from distillcache.schemas.store.redaction import redacted
from distillcache.tools.pages.html import facts, paragraph
from distillcache.tools.viewer.asked import NotThere, NotUnderstood, number_in, one_of, whole
from distillcache.tools.viewer.cache import overview, row_list
from distillcache.tools.viewer.guard import Guard
from distillcache.tools.viewer.live import build_page
from distillcache.tools.viewer.page import Frame, View
from distillcache.tools.viewer.row import row_page
from distillcache.tools.viewer.run import EXPERTS, PAGES, WatchedRun, run_view
from distillcache.tools.viewer.search import search_page
from distillcache.tools.viewer.slot import slot_page
from distillcache.tools.viewer.token import token_page
from distillcache.tools.viewer.watch import WatchedCache

PATIENCE_S = 60.0  # to wait for other pages
UNHURRIED, SELDOM_S = 4, 30.0  # a live page waits four times as long as it took to make, up to this

Words = Mapping[str, str]
Make = Callable[[Words, Words], View]  # (parts of the path, query) -> page


@dataclass(frozen=True)
class Site:
    """All pages of a target. pages: by address, with names in braces for what stands there."""

    frame: Frame
    pages: Mapping[str, Make]
    again: Callable[[], bool]  # whether what is looked at has changed while a page was made


def make_app(kind: str, url: str, names: tuple[str, ...] = (), exposed: bool = False) -> Guard:
    """The viewer of a cache or a run.

    Args:
        kind: `cache` or `run`.
        names, exposed: see `Guard`.

    Raises:
        InputError: there is none.
    """
    site = _cache_site(url) if kind == "cache" else _run_site(url)
    alone = threading.Lock()
    routes = [Route(path, _endpoint(site, make, alone), methods=["GET"]) for path, make in site.pages.items()]

    def refused(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        words = {
            404: "There is no such page.",
            405: "The viewer only reads: it answers only GET and HEAD.",
            500: "The viewer failed; see the server log.",
        }
        view = _told(words.get(status, "This cannot be answered."), status)
        kept = error.headers if isinstance(error, HTTPException) else None
        return HTMLResponse(view.render(site.frame), status, headers=kept)

    pages = Starlette(routes=routes, exception_handlers={HTTPException: refused, Exception: refused})
    return Guard(pages, names, exposed)


def _endpoint(site: Site, make: Make, alone: threading.Lock) -> Callable[[Request], Response]:
    def answer(request: Request) -> Response:  # not async: Starlette runs it in a thread of its own
        if not alone.acquire(timeout=PATIENCE_S):
            return HTMLResponse(_told("The server is busy with other pages: try again.", 503).render(site.frame), 503)
        try:
            began = time.monotonic()
            view = _made(site, make, request.path_params, request.query_params)
            if view.every_s:
                view.every_s = max(view.every_s, min(UNHURRIED * (time.monotonic() - began), SELDOM_S))
            return HTMLResponse(view.render(site.frame), view.status, headers=view.headers)
        finally:
            alone.release()

    return answer


def _made(site: Site, make: Make, parts: Words, query: Words) -> View:
    """The page, or one that says what is wrong."""
    try:
        with np.errstate(all="ignore"):  # numbers that are not finite are what may have to be shown
            try:
                return make(parts, query)
            except DistillcacheError:
                if not site.again():  # a build that is finished meanwhile takes its receipts away
                    raise
                return make(parts, query)
    except NotThere as error:
        return _told(str(error), 404)
    except NotUnderstood as error:
        return _told(str(error), 400)
    except DistillcacheError as error:
        return _wrong(error)


def _told(words: str, status: int) -> View:
    view = View({404: "Not here", 400: "Not understood"}.get(status, "Not possible"), "", status=status)
    view.put(paragraph(words))
    return view


def _wrong(error: DistillcacheError) -> View:
    """The tool's own message."""
    missing = isinstance(error, InputError)
    title = "Not here" if missing else "Damaged" if isinstance(error, DamageError) else "Not readable"
    view = View(title, f"{error.what[:1].upper()}{error.what[1:]}.", status=404 if missing else 500)
    found = {name.capitalize(): value for name, value in error.facts.items()}
    told = {**found, **({"Next": error.next} if error.next else {})}
    view.put(facts("What is known", {name: redacted(str(value)) for name, value in told.items()}))
    return view


def _frame(kind: str, url: str, links: tuple[tuple[str, str], ...]) -> Frame:
    version = importlib.metadata.version("distillcache")
    return Frame(kind, url, links, f"distillcache {version}. This viewer only reads.")


def _cache_site(url: str) -> Site:
    watched = WatchedCache(url)
    links = (("Overview", "/"), ("Rows", "/rows"), ("Search", "/search"), ("Build", "/build"))

    def slot(parts: Words, query: Words) -> View:
        taps = watched.taps()
        return slot_page(watched, one_of(parts["tap"], list(taps), "tap"), whole(parts["slot"], "slot"), query)

    def asked_slot(_: Words, query: Words) -> View:
        taps = watched.taps()
        return View.elsewhere(
            f"/slot/{one_of(query.get('tap', ''), list(taps), 'tap')}/{number_in(query, 'slot', 0, 10**9)}"
        )

    pages: dict[str, Make] = {
        "/": lambda parts, query: overview(watched),
        "/rows": lambda parts, query: row_list(watched, query),
        "/row": lambda parts, query: View.elsewhere(f"/row/{number_in(query, 'number', 0, 10**12)}"),
        "/row/{row}": lambda parts, query: row_page(watched, whole(parts["row"], "row"), query),
        "/row/{row}/token/{token}": lambda parts, query: token_page(
            watched, whole(parts["row"], "row"), whole(parts["token"], "token")
        ),
        "/slot": asked_slot,
        "/slot/{tap}/{slot}": slot,
        "/search": lambda parts, query: search_page(watched, query),
        "/build": lambda parts, query: build_page(watched),
    }
    return Site(_frame("cache", watched.store.url, links), pages, watched.reopen)


def _run_site(url: str) -> Site:
    watched = WatchedRun(url)
    pages: dict[str, Make] = {path: (lambda parts, query, path=path: run_view(watched, path)) for _, path in PAGES}
    links = tuple(page for page in PAGES if page[1] != EXPERTS or watched.look().may_have_experts)
    return Site(_frame("run", watched.store.url, links), pages, lambda: False)
