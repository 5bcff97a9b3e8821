"""Pages and their fragments, made of the templates beside this module: sections, tables, figures, notes.

A *fragment* is HTML that is complete and escaped. The templates escape everything that comes from a cache, a run or a
user; what they make is `Markup`, which they leave as it is. A page loads nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from distillcache.tools.pages.figures import ID, Figure

TEMPLATES = Path(__file__).parent / "templates"


def source(name: str) -> Markup:
    """The text of a style sheet or script, for a page that has it inside."""
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))  # ours, not a reader's


def slug(title: str) -> str:
    """A heading as an id."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in title.lower()).split())


TEMPLATE_SETTINGS = Environment(
    loader=FileSystemLoader(TEMPLATES),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATE_SETTINGS.filters["slug"] = slug
FRAGMENTS: Any = TEMPLATE_SETTINGS.get_template("fragments.html.jinja").module
STYLE, SCRIPT = source("style.css"), source("print.js")


@dataclass(frozen=True)
class Numeric:
    """A table's cell that is set to the right."""

    value: str
    href: ClassVar[str] = ""
    right: ClassVar[bool] = True


@dataclass(frozen=True)
class Linked:
    """A table's cell that leads to another page. href: of our own making, never a reader's words."""

    value: str
    href: str
    right: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading; fragments are HTML."""

    title: str
    fragments: Sequence[str]


def page_title(kind: str, url: str) -> str:
    """`Cache caches/mine`: a folder's own name alone is often just the kind again."""
    return f"{kind} {'/'.join(url.rstrip('/').split('/')[-2:])}"


@dataclass
class Page:
    """title, subtitle and footer are plain text."""

    title: str
    subtitle: str
    footer: str
    sections: list[Section] = field(default_factory=list)

    def add(self, title: str, *fragments: str) -> None:
        """A section, unless nothing is in it."""
        shown = [fragment for fragment in fragments if fragment]
        if shown:
            self.sections.append(Section(title, shown))

    def render(self) -> str:
        """The whole file."""
        return TEMPLATE_SETTINGS.get_template("report.html.jinja").render(vars(self), style=STYLE, script=SCRIPT)


def number(value: float | None, digits: int = 4) -> Numeric:
    """`0.01234`, `1,234`, `1.2e+09`; a dash where there is none."""
    if value is None:
        return Numeric("–")  # noqa: RUF001 - a dash, as tables have it
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return Numeric(f"{int(value):,}")
    return Numeric(f"{value:,.1f}" if 1000 <= abs(value) < 1e7 else f"{value:.{digits}g}")


def size(count_bytes: float) -> str:
    """`1.44 GB`, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if abs(count_bytes) < 1000 or unit == "TB":
            break
        count_bytes /= 1000
    return f"{count_bytes:,.0f} bytes" if unit == "bytes" else f"{count_bytes:.3g} {unit}"


def paragraph(words: str) -> str:
    """A paragraph of plain words."""
    return FRAGMENTS.paragraph(words)


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table that scrolls by itself where it is too wide; the first cell of a row is its heading.

    Args:
        rows: cells as text, or as `Numeric` or `Linked`.
    """
    cells = [[each if isinstance(each, Numeric | Linked) else Linked(str(each), "") for each in row] for row in rows]
    return FRAGMENTS.table(caption, header, cells) if cells else ""


def facts(caption: str, values: Mapping[str, object]) -> str:
    """A table of two columns, without a head: each row is a name and its value. What is None is left out."""
    return FRAGMENTS.facts(caption, values)


def folded(summary: str, *fragments: str) -> str:
    """Return a section that a reader unfolds; on paper it is open."""
    shown = [fragment for fragment in fragments if fragment]
    return FRAGMENTS.folded(summary, shown) if shown else ""


def code(words: str, label: str) -> str:
    """Words that keep their lines, under a name for who cannot see them."""
    return FRAGMENTS.code(words, label)


def note(title: str, lines: Sequence[str]) -> str:
    """Return a note for the top of a section; nothing without lines."""
    return FRAGMENTS.note(title, lines) if lines else ""


def progress(label: str, done: int, of: int) -> str:
    """A bar with its numbers beside it."""
    words = f"{label}: {done:,} of {of:,} ({done / of if of else 0:.1%})"
    return FRAGMENTS.progress(words, done, max(of, 1))


def figures(drawn: Sequence[Figure | None]) -> str:
    """Figures side by side where there is room, each with its caption and, for who cannot see it, its words."""
    shown = [each for each in drawn if each is not None]
    return FRAGMENTS.figures(map(_drawing, shown)) if shown else ""


def _drawing(figure: Figure) -> dict[str, str]:
    """A figure's title, caption and its SVG, which is our own, with a name and ids of the page's."""
    named = figure.svg.replace("<svg ", FRAGMENTS.drawing(figure.alt), 1).replace(ID, slug(figure.title))
    return {"title": figure.title, "caption": figure.caption, "inside": Markup(named)}


def section(title: str, fragments: Sequence[str]) -> str:
    """Fragments under a heading, which links can point at by `slug`."""
    return FRAGMENTS.section(title, fragments)
