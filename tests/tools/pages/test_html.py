"""Pages are made of templates, which escape whatever they are given."""

import ast
import inspect
import re
from pathlib import Path

import pytest
from markupsafe import Markup

from distillcache.tools.pages import html
from distillcache.tools.viewer import page

ROOT = Path(__file__).parents[3]
NASTY = "<script>alert('1')</script> & \"so on\""
# Sorted: Jinja keeps them in a set, and two workers must collect the same tests in the same order.
FRAGMENTS = sorted(name for name, macro in vars(html.FRAGMENTS).items() if callable(macro) and not name.startswith("_"))


def made(name: str, value: str) -> str:
    """What a macro makes of this value, wherever it takes a word."""
    cell = html.Linked(value, value)
    given = {
        "fragments": [value],
        "values": {value: value, "none": None},
        "header": [value],
        "rows": [[cell]],
        "lines": [value],
        "drawn": [{"title": value, "caption": value, "inside": value}],
        "links": [(value, value)],
        "fields": [value],
        "several": [value],
        "options": {value: value},
        "stretches": [("on", value), ("off", value), ("mark", value)],
        "times": 2,
    }
    macro = getattr(html.FRAGMENTS, name)
    words = {name: given.get(name, value) for name in macro.arguments}
    if name == "cell":
        words |= {"tag": "td", "value": cell}
    return macro(**words, **({"caller": lambda: value} if macro.caller else {}))


@pytest.mark.parametrize("name", FRAGMENTS)
def test_a_piece_escapes_what_it_is_given(name: str) -> None:
    found = made(name, NASTY)
    assert isinstance(found, Markup)
    assert "<script" not in found
    assert found.count('"') == made(name, "word").count('"')  # nothing ends an attribute
    assert "&lt;script&gt;" in found


def test_a_piece_inside_a_piece_stays_as_it_is() -> None:
    assert "<p>a &lt; b</p>" in html.folded("more", html.paragraph("a < b"))
    assert "&amp;lt;" not in html.section("one", [html.paragraph("a < b")])


def test_a_page_escapes_its_own_words() -> None:
    report = html.Page(NASTY, NASTY, NASTY)
    report.add(NASTY, html.paragraph(NASTY))
    frame = page.Frame("cache", NASTY, ((NASTY, f"/{NASTY}"),), NASTY)
    for made_page in (report.render(), page.View(NASTY, NASTY, every_s=5).render(frame)):
        assert made_page.count("<script>") == 1
        assert "&lt;script&gt;" in made_page


def test_html_is_in_templates_alone() -> None:
    found = []
    for path in sorted((ROOT / "tools").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and re.search(r"</?[a-z1-6]+( [a-z-]+=|>.*</)", node.value)
            ):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.value[:40]}")
    assert found == []


def test_every_template_is_used() -> None:
    used = "".join(inspect.getsource(each) for each in (html, page))
    used += "".join(path.read_text() for path in html.TEMPLATES.glob("*.jinja"))
    assert [path.name for path in html.TEMPLATES.iterdir() if path.name not in used] == []
