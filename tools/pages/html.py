"""A report's page, assembled from escaped fragments: sections, tables, figures, notes.

A *fragment* is HTML that is complete and escaped; everything that comes from a cache, a run or a user passes `text`.
The page loads nothing: its own policy forbids every request.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from string import Template
from typing import Any

from distillcache.tools.pages.figures import ID, Figure
from distillcache.tools.pages.style import SCRIPT, STYLE

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
<h1>$title</h1>
<p>$subtitle</p>
</header>
<nav aria-label="Sections"><ul>
$contents
</ul></nav>
<main>
$sections
</main>
<footer><p>$footer</p></footer>
<script>$script</script>
</body>
</html>
""")


@dataclass(frozen=True)
class Numeric:
    """A table's cell that is set to the right."""

    value: str


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
        contents = "\n".join(f'<li><a href="#{slug(each.title)}">{text(each.title)}</a></li>' for each in self.sections)
        return PAGE.substitute(
            title=text(self.title),
            subtitle=text(self.subtitle),
            footer=text(self.footer),
            style=STYLE,
            script=SCRIPT,
            contents=contents,
            sections="\n".join(map(section_html, self.sections)),
        )


def text(value: object) -> str:
    """Escaped, also for attributes in double quotes."""
    return html.escape(str(value))


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
    return f"<p>{text(words)}</p>"


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table that scrolls by itself where it is too wide; the first cell of a row is its heading.

    Args:
        rows: cells as text, or as `Numeric` or `Linked`.
    """
    rows = [list(row) for row in rows]
    if not rows:
        return ""
    numeric = [_is_right(cell) for cell in rows[0]]
    head = "".join(
        f'<th scope="col"{_right(right)}>{text(name)}</th>' for name, right in zip(header, numeric, strict=True)
    )
    body = "\n".join(
        "<tr>" + _cell(row[0], "th") + "".join(_cell(cell, "td") for cell in row[1:]) + "</tr>" for row in rows
    )
    return _scrolling(caption, f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>")


def facts(caption: str, values: Mapping[str, object]) -> str:
    """A table of two columns, without a head: each row is a name and its value. What is None is left out."""
    rows = "\n".join(
        f'<tr><th scope="row">{text(name)}</th><td>{text(value)}</td></tr>'
        for name, value in values.items()
        if value is not None
    )
    return _scrolling(caption, f"<tbody>\n{rows}\n</tbody>", "facts")


def folded(summary: str, *fragments: str) -> str:
    """Return a section that a reader unfolds; on paper it is open."""
    inside = "\n".join(fragment for fragment in fragments if fragment)
    return f"<details><summary>{text(summary)}</summary>\n{inside}\n</details>" if inside else ""


def code(words: str, label: str) -> str:
    return f'<pre tabindex="0" role="region" aria-label="{text(label)}">{text(words)}</pre>'


def note(title: str, lines: Sequence[str]) -> str:
    """Return a note for the top of a section; nothing without lines."""
    if not lines:
        return ""
    listed = "".join(f"<li>{text(line)}</li>" for line in lines)
    return f'<div class="note"><strong>{text(title)}</strong><ul>{listed}</ul></div>'


def progress(label: str, done: int, of: int) -> str:
    """A bar with its numbers beside it."""
    words = f"{label}: {done:,} of {of:,} ({done / of if of else 0:.1%})"
    return f'<p><label>{text(words)}<br><progress max="{max(of, 1)}" value="{done}"></progress></label></p>'


def figures(drawn: Sequence[Figure | None]) -> str:
    """Figures side by side where there is room, each with its caption and, for who cannot see it, its words."""
    shown = [each for each in drawn if each is not None]
    return '<div class="figures">\n' + "\n".join(map(_figure, shown)) + "\n</div>" if shown else ""


def _figure(figure: Figure) -> str:
    named = f'<svg role="img" aria-label="{text(figure.alt)}" '
    svg = figure.svg.replace("<svg ", named, 1).replace(ID, slug(figure.title))
    return f"<figure><figcaption>{text(figure.title)}</figcaption>{svg}<p>{text(figure.caption)}</p></figure>"


def section_html(section: Section) -> str:
    """Under its heading, which links can point at by `slug`."""
    name, inside = slug(section.title), "\n".join(section.fragments)
    return f'<section aria-labelledby="{name}">\n<h2 id="{name}">{text(section.title)}</h2>\n{inside}\n</section>'


def slug(title: str) -> str:
    """A heading as an id."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in title.lower()).split())


def _scrolling(caption: str, inside: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(caption)}">'
        f"<table{named}><caption>{text(caption)}</caption>\n{inside}</table></div>"
    )


def _cell(cell: Any, tag: str) -> str:
    scope = ' scope="row"' if tag == "th" else ""
    words = text(cell.value if isinstance(cell, Numeric | Linked) else cell)
    inside = f'<a href="{text(cell.href)}">{words}</a>' if isinstance(cell, Linked) else words
    return f"<{tag}{scope}{_right(_is_right(cell))}>{inside}</{tag}>"


def _is_right(cell: Any) -> bool:
    return isinstance(cell, Numeric) or (isinstance(cell, Linked) and cell.right)


def _right(right: bool) -> str:
    return ' class="n"' if right else ""
