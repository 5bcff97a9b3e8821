"""The viewer's pages about a run, finished or not: progress, curves, evaluations, experts, speed and config.

Each page is redrawn only when the run has written something.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distillcache.schemas.store.store import Store
from distillcache.tools.pages.html import Numeric, code, figures, note, number, page_title, paragraph, progress, table
from distillcache.tools.report.evaluations import (
    GAP_CLOSED,
    PERPLEXITY,
    block_fragments,
    evaluation_figure,
    evaluation_fragments,
)
from distillcache.tools.report.experts import expert_fragments, expert_warnings
from distillcache.tools.report.run import (
    divergence_warnings,
    loss_fragments,
    lost_warnings,
    planned_steps,
    run_facts,
    run_subtitle,
    speed_fragments,
    terms_figure,
    warnings,
)
from distillcache.tools.viewer.page import View
from distillcache.trainer.run.checkpoints import Checkpoints
from distillcache.trainer.run.evaluate import Evaluation
from distillcache.trainer.run.folder import Ending, best_of, read_ending, read_evaluations, shown_config
from distillcache.trainer.run.metrics_log import read_loads, read_metrics

EVERY_S = 5.0
EXPERTS = "/experts"
PAGES = (
    ("Overview", "/"),
    ("Losses", "/losses"),
    ("Evaluations", "/evaluations"),
    ("Experts", EXPERTS),
    ("Speed", "/speed"),
    ("Config", "/config"),
)


@dataclass(frozen=True)
class RunLook:
    """The present content of a run's files. text: of its config."""

    text: str
    config: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Evaluation]
    loads: Sequence[Mapping[str, Any]]
    checkpoints: Sequence[int]
    ending: Ending | None

    @property
    def done(self) -> int:
        return self.lines[-1]["step"] if self.lines else 0

    @property
    def may_have_experts(self) -> bool:
        """Return False once a logged step has no router metrics."""
        return not self.lines or bool(expert_fragments(self.lines, self.loads))

    @property
    def of(self) -> int:
        return planned_steps(self.config)

    @property
    def state(self) -> tuple[object, ...]:
        """Differs where anything does."""
        counts = len(self.lines), len(self.evaluations), len(self.loads)
        return self.text, self.done, counts, tuple(self.checkpoints), self.ending


class WatchedRun:
    """One run. Used by one thread at a time."""

    def __init__(self, url: str) -> None:
        self.store = Store(url)
        self._made: dict[str, tuple[object, list[str]]] = {}
        self._seen: tuple[object, float | None] = (None, None)

    def look(self) -> RunLook:
        """Read the current state."""
        url = self.store.url
        words, config = shown_config(self.store)
        checkpoints = Checkpoints(self.store).steps()
        # The ending first: what it tells of is there by then.
        ending, evaluations = read_ending(self.store), read_evaluations(self.store)
        found = RunLook(words, config, read_metrics(url), evaluations, read_loads(url), checkpoints, ending)
        if self._seen[0] != found.state:
            self._seen = (found.state, None if self._seen[0] is None else time.time())
        return found

    def changed_at(self) -> float | None:
        """When the viewer last saw something new; None: not since it was begun."""
        return self._seen[1]

    def once(self, here: str, found: RunLook, make: Callable[[], list[str]]) -> list[str]:
        """A page's fragments, made again when the run has progressed."""
        if self._made.get(here, (None, None))[0] != found.state:
            self._made[here] = (found.state, make())
        return self._made[here][1]


def run_view(watched: WatchedRun, here: str) -> View:
    """One of the `PAGES`, by its address."""
    found = watched.look()
    (title,) = (words for words, address in PAGES if address == here)
    makers: dict[str, Callable[[], list[str]]] = {
        "/": lambda: _overview(watched, found),
        "/losses": lambda: loss_fragments(found.lines) if found.lines else [],
        "/evaluations": lambda: [
            *evaluation_fragments(found.evaluations),
            *block_fragments(found.evaluations),
            _checkpoints(found),
        ],
        EXPERTS: lambda: expert_fragments(found.lines, found.loads),
        "/speed": lambda: speed_fragments(found.lines) if found.lines else [],
        "/config": lambda: [code(found.text, "The resolved config")] if found.text else [],
    }
    view = View(
        page_title("Run", watched.store.url) if here == "/" else title,
        f"{run_subtitle(found.config, found.done, found.of)}{_last_news(watched, found)}",
        here,
        EVERY_S if _goes_on(watched, found) else 0,
    )
    view.put(*watched.once(here, found, makers[here]))
    if not view.fragments:
        empty = "The student has no experts." if here == EXPERTS else "Nothing is written yet."
        view.put(paragraph(empty))
    return view


def _goes_on(watched: WatchedRun, found: RunLook) -> bool:
    """True where more may come: steps, or after the last one that was watched an evaluation and the summary."""
    return found.done < found.of or not found.of or (found.ending is None and watched.changed_at() is not None)


def _last_news(watched: WatchedRun, found: RunLook) -> str:
    at = watched.changed_at()
    if found.done >= found.of or at is None:
        return ""
    return f", last news at {time.strftime('%H:%M:%S UTC', time.gmtime(at))}"


def _overview(watched: WatchedRun, found: RunLook) -> list[str]:
    told = warnings(found.lines, found.evaluations, found.done, found.of) + expert_warnings(found.loads)
    told = divergence_warnings(found.ending) + told + lost_warnings(watched.store)
    return [
        note("Look at this first", told),
        progress("Steps", found.done, found.of) if found.done < found.of else "",
        figures(
            [
                *(evaluation_figure(found.evaluations, name) for name in (PERPLEXITY, GAP_CLOSED)),
                terms_figure(found.lines),
            ]
        ),
        run_facts(watched.store, found.config, found.lines, found.evaluations),
    ]


def _checkpoints(found: RunLook) -> str:
    """List the kept checkpoints, with the results of the evaluation at their step."""
    best = best_of(found.evaluations)
    known = {entry.step: entry for entry in found.evaluations}
    rows = [
        (
            f"{step:,}{' (best)' if best is not None and step == best.step else ''}",
            number(known[step].perplexity) if step in known else Numeric("not evaluated"),
            number(known[step].mean_cosine if step in known else None),
        )
        for step in found.checkpoints
    ]
    return table("Checkpoints", ("step", "held-out perplexity", "mean cosine distance"), rows) or paragraph(
        "There is no checkpoint yet."
    )
