"""Reports in a real browser: nothing wrong on the console or to axe, nothing too wide, the right numbers in sight."""

from pathlib import Path
from typing import Any

import pytest

from distillcache.schemas.config.report import ReportConfig
from distillcache.tools.report.command import write_report
from tests.browser import browser, visit
from tests.tools.report.test_command import write_run

__all__ = ["browser"]  # a fixture


@pytest.mark.slow
def test_a_caches_report(browser: Any, tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "cache.html"
    said = write_report(ReportConfig(target=str(cache), out=str(out), rows=2))
    page = visit(browser, out.as_uri(), "report-cache")
    assert page.locator("figure").count() == said["figures"] == 5
    rows = "{} and {}".format(*said["rows"])
    name = f"Heat maps of token norms by slot of the residual stream in rows {rows}."
    assert page.get_by_role("img", name=name).is_visible()
    statistics = page.get_by_role("table", name="Statistics of resid")
    assert not statistics.is_visible()
    page.get_by_text("resid: 4 slots, all numbers finite").click()
    assert statistics.get_by_role("row").count() == 5
    page.get_by_role("link", name="Storage").click()
    assert page.get_by_role("row", name="resid bf16 4 192 117 kB 117 kB 1").is_visible()
    # Words of a figure stay words, as large as they were drawn, on a phone's width.
    page.set_viewport_size({"width": 390, "height": 900})
    scale = page.locator("figure svg").first.evaluate("svg => svg.getBoundingClientRect().width / 360")
    assert scale > 0.95
    page.close()


@pytest.mark.slow
def test_a_runs_report(browser: Any, tmp_path: Path) -> None:
    out = tmp_path / "run.html"
    said = write_report(ReportConfig(target=str(write_run(tmp_path / "run")), out=str(out)))
    page = visit(browser, out.as_uri(), "report-run")
    assert page.get_by_role("row", name="20 (best) 30 0.035 0.5").is_visible()
    assert page.get_by_role("progressbar").evaluate("bar => bar.position") == 0.8
    for warning in said["warnings"]:
        assert page.get_by_text(warning).is_visible()
    # On paper: light, and everything unfolded.
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.get_by_role("table", name="Load of the experts").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.pdf().startswith(b"%PDF")
    page.close()
