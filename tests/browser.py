"""`browser`: Debian's Chromium, without a window, driven by Playwright; and what every page must be in it.

Skipped where Chromium or Playwright is missing (`make browser` installs both); failed instead where
DISTILLCACHE_NEED_BROWSER is set, as in continuous integration. Screenshots are kept in .pytest_cache/screenshots.
"""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path("/usr/bin/chromium")
PACKAGES = ("playwright", "axe_playwright_python")
SCREENSHOTS = Path(__file__).parent.parent / ".pytest_cache" / "screenshots"
WIDTHS = (390, 1440)  # a phone and a desk, in CSS pixels


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One for each module: Playwright's event loop runs as long, and no other can be started in this thread."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        _do_without(f"a browser is driven by {', '.join(missing)}: make browser, or pip install -e '.[browser]'")
    if not CHROMIUM.exists():
        _do_without(f"no browser at {CHROMIUM}: make browser, or apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Continuous integration runs as root, where Chromium has no sandbox; and shared memory is short in containers.
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield chromium
        chromium.close()


def _do_without(reason: str) -> None:
    if os.environ.get("DISTILLCACHE_NEED_BROWSER"):
        pytest.fail(reason)
    pytest.skip(reason)


def visit(browser: Any, address: str, name: str) -> Any:
    """Open a page as on a phone in light, then as on a desk in dark; the latter stays open, for the caller to close.

    Asserts: nothing on the console, no request for anything else, no sideways scrolling, axe finds nothing wrong.

    Args:
        name: of the screenshots, `<name>-390.png` and `<name>-1440.png`.
    """
    from axe_playwright_python.sync_playwright import Axe

    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page = None
    for width, scheme in zip(WIDTHS, ("light", "dark"), strict=True):
        if page is not None:
            page.close()
        page, said = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme), []
        page.on("console", lambda message, said=said: said.append(message.text))
        page.on("pageerror", lambda error, said=said: said.append(str(error)))
        page.on("request", lambda request, said=said: said.append(request.url))
        page.goto(address)
        page.screenshot(path=SCREENSHOTS / f"{name}-{width}.png", full_page=True)
        assert [each for each in said if each != address and not each.startswith("data:")] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
    return page
