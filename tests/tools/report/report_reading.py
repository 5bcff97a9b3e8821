"""A report's page as a reader of its HTML sees it: tables, figures, links, headings."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "br", "link", "input"}


@dataclass
class Table:
    caption: str = ""
    scopes: list[str | None] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)

    def row(self, first: str) -> list[str]:
        """The cells behind a row's first one."""
        (found,) = (cells[1:] for cells in self.rows if cells and cells[0] == first)
        return found


class ReadPage(HTMLParser):
    """tables by caption; figures: (title, alt); links and loads: every address in the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.tables: dict[str, Table] = {}
        self.figures: dict[str, str] = {}
        self.headings: list[tuple[int, str]] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self._open: list[str] = []
        self._table = Table()
        self._alt = ""
        self.words = ""
        self.feed(text)
        assert self._open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._table = Table()
        elif tag == "th":
            self._table.scopes.append(found.get("scope"))
        elif tag == "tr":
            self._table.rows.append([])
        elif tag == "svg":
            assert found.get("role") == "img"
            self._alt = found.get("aria-label") or ""
        if tag in ("th", "td"):
            self._table.rows[-1].append("")
        if tag in ("h1", "h2", "h3"):
            self.headings.append((int(tag[1]), ""))
        if tag == "figcaption":
            self._title = ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "table":
            assert self._table.caption not in self.tables
            self.tables[self._table.caption] = self._table
        elif tag == "figure":
            assert self._title not in self.figures
            self.figures[self._title] = self._alt

    def handle_data(self, data: str) -> None:
        inside = next((tag for tag in reversed(self._open) if tag != "a"), "")
        if inside == "caption":
            self._table.caption += data
        elif inside in ("th", "td"):
            self._table.rows[-1][-1] += data
        elif inside in ("h1", "h2", "h3"):
            level, words = self.headings[-1]
            self.headings[-1] = (level, words + data)
        elif inside == "figcaption":
            self._title += data
        if inside not in ("style", "script"):
            self.words += data


def check_page(page: ReadPage) -> None:
    """What every report must be: complete by itself, small, and readable without seeing its figures."""
    assert len(page.source.encode()) < 3_000_000
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    assert "://" not in page.source.partition("</style>")[0]
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)
    assert [level for level, _ in page.headings].count(1) == 1
    assert all(title and alt.endswith(".") for title, alt in page.figures.items())
    for caption, table in page.tables.items():
        assert caption
        assert None not in table.scopes
        assert len({len(cells) for cells in table.rows}) == 1
