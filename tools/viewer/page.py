"""The viewer's pages, and what only they have: links to neighbours, and forms."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlencode

from markupsafe import Markup

from distillcache.tools.pages.html import FRAGMENTS, SCRIPT, STYLE, TEMPLATE_SETTINGS, section, source

RELOAD_S = 10  # of a live page where no script runs
LIVE_STYLE, LIVE_SCRIPT = STYLE + source("viewer.css"), SCRIPT + source("live.js")
SCRIPT_DIGEST = base64.b64encode(hashlib.sha256(LIVE_SCRIPT.encode()).digest()).decode()

# Drawings have style attributes and small pictures in them; nothing else is allowed, and nothing from elsewhere.
POLICY = (
    f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{SCRIPT_DIGEST}'; img-src data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class Frame:
    """The common frame of all pages. of: `cache` or `run`; target: its URL; links: (words, address) of its pages."""

    of: str
    target: str
    links: tuple[tuple[str, str], ...]
    footer: str


@dataclass
class View:
    """One page. Fragments are HTML (pages/html.py), title and subtitle plain text.

    here: the address of its link in the frame. every_s: how often to look again; None or 0: it does not change any
    more. status, headers: of the answer.
    """

    title: str
    subtitle: str = ""
    here: str = ""
    every_s: float | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    fragments: list[str] = field(default_factory=list)

    @classmethod
    def elsewhere(cls, to: str) -> "View":
        """Lead the browser to another page: `to` is an address of our own making."""
        return cls("Elsewhere", "", status=303, headers={"location": to})

    def put(self, *fragments: str) -> None:
        """More, without a heading."""
        self.fragments += [fragment for fragment in fragments if fragment]

    def add(self, title: str, *fragments: str) -> None:
        """A section, unless nothing is in it."""
        shown = [fragment for fragment in fragments if fragment]
        if shown:
            self.fragments.append(section(title, shown))

    def render(self, frame: Frame) -> str:
        """The whole page."""
        inside = Markup("\n").join(self.fragments)
        return TEMPLATE_SETTINGS.get_template("view.html.jinja").render(
            title=self.title,
            subtitle=self.subtitle,
            here=self.here,
            frame=frame,
            footer=frame.footer,
            reload_s=RELOAD_S,
            every_s=self.every_s,
            every=f"{self.every_s or 0:.0f}",
            stamp=hashlib.sha256(f"{self.title}{self.subtitle}{inside}".encode()).hexdigest()[:16],
            inside=inside,
            style=LIVE_STYLE,
            script=LIVE_SCRIPT,
        )


def address(path: str, **asked: object) -> str:
    """`/rows?start=50`: what is None is left out."""
    kept = {name: value for name, value in asked.items() if value is not None}
    return f"{path}?{urlencode(kept)}" if kept else path


def steps(label: str, links: Sequence[tuple[str, str | None]], intro: str = "") -> str:
    """Links to neighbours, in a row behind some words; one without an address is left out."""
    shown = [(words, to) for words, to in links if to is not None]
    return FRAGMENTS.steps(label, shown, intro) if shown else ""


def form(to: str, fields: Sequence[str], button: str, label: str) -> str:
    """Fields that are requested by a GET."""
    return FRAGMENTS.form(to, fields, button, label)


def choice(name: str, label: str, options: Mapping[str, str], chosen: str) -> str:
    """A list to choose from: value -> words."""
    return FRAGMENTS.choice(name, label, options, chosen)


def number_field(name: str, label: str, value: int, most: int) -> str:
    """A whole number from 0 to `most`."""
    return FRAGMENTS.number_field(name, label, value, most)


def text_field(name: str, label: str, value: str, most: int) -> str:
    """Text field with a maximum length."""
    return FRAGMENTS.text_field(name, label, value, most)
