"""The frame of the viewer's pages: head, links to the other pages, and the script of live pages.

What is inside comes from pages/html.py, where all that is not ours is escaped. A page is complete without its script:
that only fetches a live page again and puts the new contents in place (without it, the browser reloads the page).
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import Template
from urllib.parse import urlencode

from distillcache.tools.pages.html import Section, section_html, text
from distillcache.tools.pages.style import STYLE

RELOAD_S = 10  # of a live page where no script runs

LAYOUT = """
.skip { position: absolute; left: -100rem; }
.skip:focus { left: 1rem; top: .5rem; background: var(--page); padding: .25rem .5rem; }
.where { font-size: .875rem; margin: 0; }
.where code { font-size: .8125rem; }
header { border-bottom: 1px solid var(--line); padding-bottom: .25rem; margin-bottom: 1rem; }
header nav ul { margin: .25rem 0; }
nav a[aria-current] { font-weight: 600; color: var(--ink); text-decoration: none; border-bottom: 3px solid var(--s1); }
.steps { display: flex; flex-wrap: wrap; gap: .5rem 1.25rem; margin: .75rem 0; align-items: center; }
.ask { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: end; margin: .75rem 0; }
.asks { display: flex; flex-wrap: wrap; gap: 0 2.5rem; }
.ask label { display: flex; flex-direction: column; gap: .15rem; font-size: .875rem; color: var(--soft); }
.ask label.wide { flex: 1 1 14rem; max-width: 32rem; }
input, select, button { font: inherit; color: var(--ink); background: var(--page); border: 1px solid var(--soft);
  border-radius: .25rem; padding: .3rem .5rem; min-height: 2.25rem; max-width: 100%; }
input[type=number] { width: 7.5rem; }
input[type=checkbox] { min-height: 0; width: 1.1rem; height: 1.1rem; vertical-align: middle; }
button { background: var(--card); cursor: pointer; }
input:focus-visible, select:focus-visible, button:focus-visible { outline: 2px solid var(--link); outline-offset: 1px; }
.running { white-space: pre-wrap; background: var(--card); padding: .75rem; margin: .25rem 0 1rem; max-height: 24rem;
  overflow-y: auto; line-height: 1.6; }
.running p { margin: 0 0 .75rem; max-width: 90ch; }
.running .tag { display: block; font-size: .8125rem; color: var(--soft); }
.running .off { color: var(--soft); font-style: italic; text-decoration: underline dotted; }
mark { background: var(--s5); color: var(--page); padding: 0 .1rem; }
.live { display: flex; flex-wrap: wrap; gap: .25rem 1rem; font-size: .875rem; margin: .25rem 0; }
h3 { font-size: 1rem; margin: 1rem 0 .25rem; }
.scroll[aria-label="The rows"] td:first-of-type, td:not(.n):last-child { min-width: 14rem; }
.facts td:last-child { min-width: 0; }
.around { margin: .25rem 0 1rem; }
@media (max-width: 40rem) { th, td { padding-right: .5rem; } td:not(.n) { min-width: 5rem; } }
"""

SCRIPT = """
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(each => { each.open = true; }));
const main = document.querySelector("main"), live = document.getElementById("live");
if (live) {
  const follow = document.getElementById("follow"), said = document.getElementById("said");
  const often = document.getElementById("often");
  const named = each => each.firstElementChild ? each.firstElementChild.textContent.split(":")[0] : "";
  const put = fresh => {
    const open = new Set([...main.querySelectorAll("details[open]")].map(named));
    fresh.querySelectorAll("details").forEach(each => { each.open = open.has(named(each)); });
    main.replaceChildren(...fresh.childNodes);
  };
  const look = async () => {
    if (follow.checked && !document.hidden) {
      try {
        const answer = await fetch(location.href, { cache: "no-store" });
        const page = new DOMParser().parseFromString(await answer.text(), "text/html");
        const fresh = page.querySelector("main");
        if (fresh.dataset.stamp !== main.dataset.stamp) put(fresh);
        Object.assign(main.dataset, fresh.dataset);
        often.textContent = main.dataset.every;
        said.textContent = Number(main.dataset.every) ? "" : "It is finished.";
      } catch (error) {
        said.textContent = "The viewer does not answer; trying again.";
      }
    }
    if (Number(main.dataset.every)) setTimeout(look, 1000 * Number(main.dataset.every));
  };
  live.hidden = false;
  setTimeout(look, 1000 * Number(main.dataset.every));
}
"""
SCRIPT_DIGEST = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()

# Drawings have style attributes and small pictures in them; nothing else is allowed, and nothing from elsewhere.
POLICY = (
    f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{SCRIPT_DIGEST}'; img-src data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">$reload
<title>$title</title>
<style>$style</style>
</head>
<body>
<a class="skip" href="#main">To the content</a>
<header>
<p class="where">$what <code>$target</code></p>
<nav aria-label="Pages"><ul>
$links
</ul></nav>$live
</header>
<main id="main" data-every="$every" data-stamp="$stamp">
<h1>$title</h1>
<p>$subtitle</p>
$inside
</main>
<footer><p>$footer</p></footer>
<script>$script</script>
</body>
</html>
""")


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
            self.fragments.append(section_html(Section(title, shown)))

    def render(self, frame: Frame) -> str:
        """The whole page."""
        inside, follows = "\n".join(self.fragments), bool(self.every_s)
        return PAGE.substitute(
            title=text(self.title),
            subtitle=text(self.subtitle),
            what=frame.of.capitalize(),
            target=text(frame.target),
            links="\n".join(_link(words, address, address == self.here) for words, address in frame.links),
            reload=f'\n<noscript><meta http-equiv="refresh" content="{RELOAD_S}"></noscript>' if follows else "",
            live=_live(self.every_s or 0) if follows else "",
            every=f"{self.every_s or 0:.0f}",
            stamp=hashlib.sha256(f"{self.title}{self.subtitle}{inside}".encode()).hexdigest()[:16],
            inside=inside,
            footer=text(frame.footer),
            style=STYLE + LAYOUT,
            script=SCRIPT,
        )


def address(path: str, **asked: object) -> str:
    """`/rows?start=50`: what is None is left out."""
    kept = {name: value for name, value in asked.items() if value is not None}
    return f"{path}?{urlencode(kept)}" if kept else path


def steps(label: str, links: Sequence[tuple[str, str | None]]) -> str:
    """Links to neighbours, in a row; one without an address is left out."""
    shown = [f'<a href="{text(to)}">{text(words)}</a>' for words, to in links if to is not None]
    return f'<nav class="steps" aria-label="{text(label)}">{" ".join(shown)}</nav>' if shown else ""


def form(to: str, fields: Sequence[str], button: str, label: str) -> str:
    """Fields that are requested by a GET."""
    inside = "\n".join([*fields, f"<button>{text(button)}</button>"])
    return f'<form class="ask" action="{text(to)}" aria-label="{text(label)}">{inside}</form>'


def choice(name: str, label: str, options: Mapping[str, str], chosen: str) -> str:
    """A list to choose from: value -> words."""
    listed = "".join(
        f'<option value="{text(value)}"{" selected" if value == chosen else ""}>{text(words)}</option>'
        for value, words in options.items()
    )
    return f'<label>{text(label)}<select name="{text(name)}">{listed}</select></label>'


def number_field(name: str, label: str, value: int, most: int) -> str:
    """A whole number from 0 to `most`."""
    return (
        f'<label>{text(label)}<input type="number" name="{text(name)}" value="{value}" min="0" max="{most}" required>'
        "</label>"
    )


def text_field(name: str, label: str, value: str, most: int) -> str:
    """Text field with a maximum length."""
    return (
        f'<label class="wide">{text(label)}<input type="search" name="{text(name)}" value="{text(value)}" '
        f'maxlength="{most}"></label>'
    )


def _link(words: str, to: str, current: bool) -> str:
    marked = ' aria-current="page"' if current else ""
    return f'<li><a href="{text(to)}"{marked}>{text(words)}</a></li>'


def _live(every_s: float) -> str:
    """Shown by the script, which alone can stop following."""
    return (
        '\n<p class="live" id="live" hidden><label><input type="checkbox" id="follow" checked> '
        f'follow, every <span id="often">{every_s:.0f}</span> s</label><span id="said" role="status"></span></p>'
    )
